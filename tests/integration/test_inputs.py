"""Every kind of input, on a disk and on an S3 server, through the whole pipeline: the same clip is
heard as the same."""

import io
import json
import os
import tarfile
import urllib.request
from importlib import resources

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from af3pipe import storage
from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from af3pipe.storage.members import parse
from af3pipe.tables.reader import files_of_run
from af3pipe.tables.reconcile import read_rows
from af3pipe.transforms.inputs.read import list_recordings
from tests.integration.servers import s3_by_environment

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("engines")]
NAMES = ("siren.flac", "digits_four_zero_two_nine.mp3", "zwei hohe Töne.flac")


@pytest.fixture(scope="module")
def clips():
    """Sample recordings by name, and 3 s of samples without a header, which only the name tells."""
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as folder:
        found = {name: (folder / name).read_bytes() for name in NAMES}
    return found | {"sample.g722": bytes(range(256)) * 94}


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_by_environment(tmp_path_factory.mktemp("s3"), "archive", "archive-evil") as found:
        yield found


def tar_of(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def parquet_of(files, **options):
    data = io.BytesIO()
    pq.write_table(pa.table({"audio": [{"bytes": files[name], "path": name} for name in files]}), data, **options)
    return data.getvalue()


def arrow_of(files):
    table = pa.table({"audio": [{"bytes": files[name], "path": name} for name in files]})
    data = io.BytesIO()
    with pa.ipc.new_stream(data, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return data.getvalue()


def write_all(root, clips):
    """The clips as plain files, named by a manifest, and in each kind of container."""
    for name, data in clips.items():
        storage.write_atomic(storage.join(root, "plain", name), data)
    rows = [json.dumps({"uri": f"plain/{name}", "id": f"manifest {name}"}) for name in clips]
    storage.write_atomic(storage.join(root, "m.jsonl"), "\n\n".join(rows).encode())
    storage.write_atomic(storage.join(root, "shards", "0.tar"), tar_of(clips))
    storage.write_atomic(storage.join(root, "rows", "0.parquet"), parquet_of(clips, row_group_size=2))
    storage.write_atomic(storage.join(root, "ds", "data-00000-of-00001.arrow"), arrow_of(clips))
    state = json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    storage.write_atomic(storage.join(root, "ds", "state.json"), state.encode())
    return [storage.join(root, name) for name in ("plain", "m.jsonl", "shards/*.tar", "rows/*.parquet", "ds")]


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_clip_has_the_same_text_wherever_it_lies(where, clips, tmp_path, request):
    root = str(tmp_path / "in")
    if where == "s3":
        request.getfixturevalue("s3")
        root = "s3://archive/in"
    inputs = write_all(root, clips)
    output = str(tmp_path / "out")
    values = {"inputs": inputs, "output": output, "model": "demo", "tasks": ["transcript"], "engine": "echo"}
    report = batch.run(make_job(values | {"decode_guard": False}))
    assert report.counts.states == {"ok": 5 * len(clips)}, report.counts
    assert report.counts.reconciled, report.counts.problems
    rows = list(
        read_rows(files_of_run(output, report.run_id)["transcripts"], ["uri", "text", "duration_s", "codec", "etag"])
    )
    heard = {}
    for row in rows:
        member = parse(row["uri"])
        name = member.name if member else storage.name(row["uri"])
        heard.setdefault(name, []).append((row["text"], row["duration_s"], row["codec"]))
    assert set(heard) == set(clips)
    assert {len(found) for found in heard.values()} == {5}
    assert {len(set(found)) for found in heard.values()} == {1}
    assert len({found[0][0] for found in heard.values()}) == len(clips)
    # What a rerun knows an answer by is known before the audio is opened.
    listed = {row.uri: row for name in inputs[2:] for row in list_recordings(name)}
    assert {row["uri"]: row["etag"] for row in rows if row["uri"] in listed} == {
        uri: row.etag for uri, row in listed.items()
    }


def test_a_member_costs_its_range_and_not_the_shard(s3):
    files = {f"{index}.wav": os.urandom(64_000) for index in range(200)}
    s3.pipe_file("archive/large.tar", tar_of(files))
    size = s3.info("archive/large.tar")["size"]
    assert size > 12 << 20
    member = list(list_recordings("s3://archive/large.tar"))[100]
    before = sent("/archive/large.tar")
    assert storage.read_bytes(member.uri) == files["100.wav"]
    assert len(files["100.wav"]) < sent("/archive/large.tar") - before <= len(files["100.wav"]) + 512  # its header


def test_rows_in_order_cost_their_row_groups_once(s3):
    files = {f"{index}.wav": os.urandom(100_000) for index in range(40)}
    s3.pipe_file("archive/large.parquet", parquet_of(files, row_group_size=10))
    size = s3.info("archive/large.parquet")["size"]
    listed = list(list_recordings("s3://archive/large.parquet"))
    assert sent("/archive/large.parquet") < size / 8  # listing reads no audio
    before = sent("/archive/large.parquet")
    assert [storage.stat(row.uri).size_bytes for row in listed] == [100_000] * 40
    assert [storage.read_bytes(row.uri) for row in listed] == list(files.values())
    assert sent("/archive/large.parquet") - before < 1.3 * size


def test_a_manifest_in_a_bucket_names_its_bucket_only(s3):
    rows = [
        "s3://archive/other/a.wav",
        "s3://archive-evil/a.wav",
        "file:///etc/passwd",
        "/etc/passwd",
        "x::/etc/passwd",
    ]
    s3.pipe_file("archive/lists/m.jsonl", "\n".join(json.dumps({"uri": row}) for row in rows).encode())
    good, *bad = list_recordings("s3://archive/lists/m.jsonl")
    assert good.uri == "s3://archive/other/a.wav"
    assert {row.reason.value for row in bad} == {"not_allowed"}
    assert len(bad) == 4
    _, allowed, *bad = list_recordings(
        "s3://archive/lists/m.jsonl", allow_prefixes=["s3://archive-evil", "/", "file:"]
    )
    assert allowed.uri == "s3://archive-evil/a.wav"
    assert len(bad) == 3


def test_allow_prefix_reaches_the_listing(clips, s3, tmp_path):
    s3.pipe_file("archive-evil/a.flac", clips["siren.flac"])
    s3.pipe_file("archive/m.csv", b"uri\ns3://archive-evil/a.flac\n")
    values = {"inputs": ["s3://archive/m.csv"], "model": "demo", "engine": "constant", "decode_guard": False}
    refused = batch.run(make_job(values | {"output": str(tmp_path / "refused")}))
    assert refused.counts.dead_letters == {"not_allowed": 1}
    assert refused.counts.reconciled, refused.counts.problems
    allowed = values | {"output": str(tmp_path / "allowed"), "allow_prefixes": "s3://archive-evil"}
    assert batch.run(make_job(allowed)).counts.states == {"ok": 1}


def test_a_conversation_in_a_manifest_is_asked_in_order(clips, tmp_path):
    (tmp_path / "a.flac").write_bytes(clips["siren.flac"])
    asked = ["Is there speech in the audio? Answer yes or no.", "What is heard?", "Is there speech in the audio?"]
    # The job asks the first question, too; there is one answer to it, and it is what the next one follows up.
    (tmp_path / "m.jsonl").write_text(json.dumps({"uri": "a.flac", "conversation": asked, "prompt": "Say it."}))
    values = {
        "inputs": [str(tmp_path / "m.jsonl")],
        "output": str(tmp_path / "out"),
        "model": "demo",
        "engine": "constant",
        "decode_guard": False,
    }
    report = batch.run(make_job(values | {"questions": asked[:1]}))
    assert report.counts.states == {"ok": 1}, report.counts
    assert report.counts.reconciled, report.counts.problems
    rows = list(read_rows(files_of_run(values["output"], report.run_id)["answers"], ["question", "history"]))
    assert {(row["question"], tuple(row["history"])) for row in rows} == {
        ("Say it.", ()),
        (asked[0], ()),
        (asked[1], (asked[0],)),
        (asked[2], (asked[0], asked[1])),
    }
    assert len(rows) == 4


def sent(path):
    """Bytes of an object that the server has sent, by its own account."""
    with urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL"] + "/_sent") as response:
        return json.load(response).get(path, 0)
