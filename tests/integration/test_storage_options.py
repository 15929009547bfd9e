"""Two stores with accounts of their own in one job, by its storage_options; and what is secret in it stays so."""

import http.server
import json
import os
import threading
from importlib import resources

import pytest
import yaml
from typer.testing import CliRunner

from af3pipe import cli, storage
from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from af3pipe.storage import retry
from af3pipe.tables.latest import latest
from tests import fixtures_audio as make
from tests.integration.runners import portable_runner
from tests.integration.servers import S3, store_server
from tests.read_tables import read_table

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("engines")]
CLIPS = ("siren.flac", "corrupt.flac", "digits_four_zero_two_nine.mp3")
SECRET = "S3cr3tS1gnature0fNobody"


@pytest.fixture(autouse=True)
def forgotten():
    """A process that was told nothing of stores, before and afterwards."""
    storage.set_options({})
    yield
    storage.set_options({})


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two servers, of which neither knows the other's bucket, and no word of either in the environment.

    Only of their region, which signatures name; for the workers elsewhere, too.
    """
    with (
        pytest.MonkeyPatch.context() as patch,
        store_server(S3, tmp_path_factory.mktemp("first")) as first,
        store_server("moto", tmp_path_factory.mktemp("second")) as second,
    ):
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
            for clip in CLIPS:
                first.fs.put_file(str(clips / clip), f"archive/in/{clip}")
        first.fs.rmdir("labels")
        second.fs.rmdir("archive")
        yield {"s3://archive/": first.options, "s3://labels": second.options}


def values(stores, output):
    return {
        "inputs": ["s3://archive/in/**"],
        "output": output,
        "model": "demo",
        "tasks": ["transcript"],
        "engine": "constant",
        "decode_guard": False,
        "storage_options": stores,
    }


def look_at_two_runs(job, flags=()):
    reports = [batch.run(job, flags), batch.run(job, flags)]
    assert reports[0].counts.states == {"ok": 2, "dead_letter": 1}
    assert reports[1].counts.states == {"skipped_done": 3}
    assert all(report.counts.reconciled for report in reports)
    assert latest(job.output).read("transcripts").num_rows == 2


def test_one_job_reads_from_one_store_and_writes_to_another(stores):
    look_at_two_runs(make_job(values(stores, "s3://labels/here")))


@pytest.mark.slow
def test_workers_elsewhere_read_from_one_store_and_write_to_another(stores, tmp_path):
    asked = {"engine": "transformers", "max_new_tokens": 8, "device": "cpu"}
    with portable_runner(tmp_path) as flags:
        look_at_two_runs(make_job(values(stores, "s3://labels/elsewhere") | asked), flags)


def test_commands_on_an_output_take_the_options_from_the_job_file(stores, tmp_path):
    wanted = values(stores, "s3://labels/commands")
    batch.run(make_job(wanted))
    storage.set_options({})
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(wanted))
    # The broken one is still broken: a redrive without one answer says so.
    for command, code in ((["audit"], 0), (["compact"], 0), (["redrive", "--reason", "decode_error"], 4)):
        done = CliRunner().invoke(cli.app, [command[0], wanted["output"], "--job", str(job_file), *command[1:]])
        assert done.exit_code == code, done.output
        storage.set_options({})


class Refusing(http.server.BaseHTTPRequestHandler):
    """Has one recording, and refuses the others, repeating what was asked."""

    def do_GET(self):
        found = self.path.startswith("/fine.wav")
        body = make.wav(make.sound(1, 16000), 16000) if found else f"no {self.path}".encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815  (named by the protocol)

    def log_message(self, *args):
        pass


@pytest.fixture
def signed():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        yield [f"{base}/{name}?X-Amz-Signature={SECRET}&Expires=3600" for name in ("fine.wav", "gone.wav")]
        server.shutdown()


def test_secrets_appear_nowhere(signed, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.001)
    manifest = tmp_path / "list.jsonl"
    manifest.write_text("".join(json.dumps({"uri": uri}) + "\n" for uri in signed))
    output = tmp_path / "out"
    job = {
        **values({"s3://archive/": {"key": "AKIANOBODY", "secret": SECRET}}, str(output)),
        "inputs": [str(manifest), "http://user:" + SECRET + "@127.0.0.1:1/x.wav"],
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done = CliRunner().invoke(cli.app, ["run", str(tmp_path / "job.yaml")])
    assert done.exit_code == 0, done.output
    written = [path for path in output.rglob("*") if path.is_file()]
    told = [done.output, caplog.text]
    told += [str(read_table(path).to_pylist()) for path in written if path.suffix == ".parquet"]
    told += [path.read_text() for path in written if path.suffix == ".json"]
    assert len(told) > 5
    assert not [text for text in told if SECRET in text]
    rows = [row for path in (output / "recordings").iterdir() for row in read_table(path).to_pylist()]
    assert sorted(row["terminal_state"] for row in rows) == ["dead_letter", "dead_letter", "ok"]
    assert os.environ.get("AWS_SECRET_ACCESS_KEY") != SECRET
