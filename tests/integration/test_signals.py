"""SIGTERM ends every command as Ctrl-C does: exit code 143 (130), nothing temporary left, jobs cancelled."""

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from af3pipe import cli
from af3pipe.cli import running
from af3pipe.pipelines import batch, redrive
from af3pipe.runners import job_server
from af3pipe.runners.flink import Flink
from af3pipe.tables import audit, compact, latest
from tests import fixtures_audio as make
from tests.integration.servers import python_module
from tests.outputs import FIRST, write_run
from tests.waiting import wait_until

pytestmark = pytest.mark.integration
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
BOTH = pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)


def signalled(number):
    """Takes the place of a command's work: sends the process a signal, and waits for it to be handled."""

    def work(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(60)

    return work


WORK = {
    "audit": (audit, "audit", []),
    "compact": (compact, "compact", []),
    "export": (latest, "export_latest", ["clean"]),
    "finish": (running, "finishing", ["20260102T030405Z-abcdef"]),
    "redrive": (redrive, "_job_of", []),
}


@BOTH
@pytest.mark.parametrize("name", WORK)
def test_a_command_on_an_output_is_ended(name, number, tmp_path, monkeypatch):
    write_run(tmp_path / "out", FIRST, range(3), broken=[9])
    before = signal.getsignal(signal.SIGTERM)
    module, function, more = WORK[name]
    if name == "audit":  # it lists the inputs, and is interrupted there
        more = ["--input", str(tmp_path)]
    monkeypatch.setattr(module, function, signalled(number))
    done = CliRunner().invoke(cli.app, [name, str(tmp_path / "out"), *more])
    assert done.exit_code == CODES[number], done.output
    assert "af3pipe: interrupted" in done.output
    assert "Traceback" not in done.output
    assert signal.getsignal(signal.SIGTERM) == before


class FlinkCluster:
    """Flink's REST API with one running job, of any name; keeps what is cancelled."""

    def __init__(self):
        self.name = ""
        self.cancelled = []


@contextmanager
def flink_cluster():
    cluster = FlinkCluster()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            others = {"jid": "b", "name": "another", "end-time": -1}
            self._reply({"jobs": [{"jid": "a", "name": cluster.name, "end-time": -1}, others]})

        def do_PATCH(self):
            cluster.cancelled.append(self.path)
            self._reply({})

        def _reply(self, found):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    cluster.address = f"127.0.0.1:{server.server_port}"
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()


@BOTH
def test_the_job_at_a_flink_cluster_is_cancelled(number, tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(make.wav(make.sound(1, 16000), 16000))
    with flink_cluster() as cluster:

        def name_job(self, run_id):
            cluster.name = f"af3pipe-{run_id.lower()}"
            was_named(self, run_id)

        was_named = Flink.name_job
        monkeypatch.setattr(Flink, "name_job", name_job)
        monkeypatch.setattr(job_server, "_check_job_server", lambda endpoint: None)
        monkeypatch.setattr(batch, "_run_whole", signalled(number))
        flags = ["--runner=portable", "--job-endpoint=localhost:1", "--environment-type=LOOPBACK"]
        master = f"--flink-master={cluster.address}"
        run = ["run", str(tmp_path / "a.wav"), "--output", str(tmp_path / "out"), "--model", "demo"]
        done = CliRunner().invoke(cli.app, [*run, *flags, master])
        assert done.exit_code == CODES[number], done.output
        assert cluster.cancelled == ["/jobs/a?mode=cancel"]


@contextmanager
def process(*arguments, temporary):
    """A command in a process and a session of its own, with its own folder for temporary files."""
    temporary.mkdir()
    log = temporary.with_suffix(".log")
    with (
        log.open("wb") as file,
        subprocess.Popen(
            python_module("af3pipe", *map(str, arguments)),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(temporary)},
        ) as started,
    ):
        try:
            yield started, log
        finally:
            started.kill()


def of_ours(temporary):
    return [path.name for path in temporary.iterdir() if path.name.startswith(("af3pipe", "beam"))]


def children(session):
    listed = subprocess.run(["ps", "-o", "stat=,args=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if not line.startswith("Z")]


@BOTH
@pytest.mark.parametrize("name", ["run", "redrive", "demo"])
@pytest.mark.slow
def test_a_run_in_this_process_leaves_nothing_behind(name, number, tmp_path):
    """It is ended while the model works: a thread in native code must not abort the process."""
    archive, output = tmp_path / "in", tmp_path / "out"
    archive.mkdir()
    for seed in range(300):
        (archive / f"{seed}.wav").write_bytes(make.wav(make.sound(8, 16000, seed=seed), 16000))
    flags = ["--model", "demo", "--device", "cpu", "--slots", "2"]
    commands = {
        "run": ["run", archive, "--output", output, *flags],
        "redrive": ["redrive", output, "--set", "over_length=split", "--set", "max_new_tokens=500"],
        "demo": ["demo", "--output", output],
    }
    if name == "redrive":
        too_long = tmp_path / "long.wav"
        too_long.write_bytes(make.wav(make.sound(1300, 8000), 8000))
        assert CliRunner().invoke(cli.app, ["run", str(too_long), "--output", str(output), *flags]).exit_code == 4
    temporary = tmp_path / "temporary"
    with process(*commands[name], temporary=temporary) as (started, log):
        # The engine's compile cache comes when it opens; then it works.
        wait_until(lambda: len(of_ours(temporary)) >= 2 or started.poll() is not None, "the pipeline to run")
        wait_until(lambda: len(children(started.pid)) > 1 or started.poll() is not None, "a decoder to start")
        started.send_signal(number)
        code = started.wait(30)
    assert code == CODES[number], log.read_text()
    assert of_ours(temporary) == []
    wait_until(lambda: not children(started.pid), "its processes to end")
    assert "Traceback" not in log.read_text()
    assert log.read_text().endswith("af3pipe: interrupted\n")


@BOTH
@pytest.mark.slow
def test_the_second_signal_cancels_a_watch(number, tmp_path):
    archive = tmp_path / "in"
    archive.mkdir()
    sound = make.wav(make.sound(8, 16000), 16000)
    for number_of_file in range(1500):
        (archive / f"{number_of_file}.wav").write_bytes(sound)
    flags = ["--output", tmp_path / "out", "--model", "demo", "--device", "cpu", "--every", "1s", "--slots", "2"]
    with process("watch", archive, *flags, temporary=tmp_path / "temporary") as (started, log):
        wait_until(lambda: "/ 1500 recordings" in log.read_text() or started.poll() is not None, "work for a minute")
        started.send_signal(number)
        wait_until(lambda: "stopping" in log.read_text() or started.poll() is not None, "it to stop")
        time.sleep(1.1)  # what comes within a second of the first is taken for the same
        started.send_signal(number)
        code = started.wait(60)
    assert code == CODES[number], log.read_text()
    assert "cancelled; the next run or watch" in log.read_text()
    wait_until(lambda: not children(started.pid), "its processes to end")
