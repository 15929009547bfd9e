"""Real tar shards, Parquet files and data sets, made by the libraries that people make them with."""

import io
import json
import os
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from af3pipe import storage
from af3pipe.schemas import DeadLetter, Reason, Recording, Rejected
from af3pipe.storage.members import parse
from af3pipe.tables.layout import TABLE_SCHEMAS
from af3pipe.transforms import metrics
from af3pipe.transforms.inputs.containers import container_rows
from af3pipe.transforms.inputs.manifest import read_manifest
from af3pipe.transforms.inputs.read import list_recordings
from tests import fixtures_audio as make

CLIP = make.flac(make.sound(0.5, 16_000), 16_000)


def write_tar(path, files, **options):
    with tarfile.open(path, **{"mode": "w"} | options) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def split(found):
    found = list(found)
    return [row for row in found if isinstance(row, Recording)], [row for row in found if isinstance(row, DeadLetter)]


SHARD = {
    "clips/a.one.flac": b"audio a",
    "clips/a.json": json.dumps({"id": "first", "question": "Who?", "speaker": {"age": 7}}).encode(),
    "clips/a.txt": "Grüße\n".encode(),
    "clips/a.jpg": b"no audio",
    "b c.wav": b"audio b",
    "b c.cls": b"3",
    "elsewhere.json": json.dumps({"uri": "more/c.wav", "offset": 1, "duration": 2}).encode(),
    "README.txt": b"no sample",
    "d.json": b'{"n": 1}',
    "e.left.g722": b"left",
    "e.right.g722": b"right",
}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_shard_is_its_audio_with_what_stands_beside_it(tmp_path, kind):
    long = "long/" + "n" * 90 + "/" + "ä" * 40 + ".wav"
    path = write_tar(tmp_path / "x.tar", SHARD | {long: b"long"}, format=kind)
    shard = storage.stat(path)
    found, bad = split(list_recordings(path))
    assert not bad
    assert [parse(row.uri) and parse(row.uri).name for row in found] == [
        "clips/a.one.flac",
        "b c.wav",
        None,
        "e.left.g722",
        "e.right.g722",
        long,
    ]
    first, second, elsewhere, *_ = found
    assert [storage.read_bytes(row.uri) for row in found if parse(row.uri)] == [
        b"audio a",
        b"audio b",
        b"left",
        b"right",
        b"long",
    ]
    assert (first.recording_id, first.size_bytes, first.mtime) == ("first", 7, shard.mtime)
    assert first.etag == storage.stat(first.uri).etag == f"{shard.size_bytes}:{shard.mtime}"
    assert [question.text for question in first.questions] == ["Who?"]
    assert json.loads(first.metadata) == {"speaker": {"age": 7}, "txt": "Grüße"}
    assert json.loads(second.metadata) == {"cls": "3"}
    assert (elsewhere.uri, elsewhere.offset_s, elsewhere.duration_s) == (str(tmp_path / "more/c.wav"), 1, 2)
    assert len({row.recording_id for row in found}) == len(found)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({"a.json": b"{"}, "its .json cannot be read"),
        ({"a.json": b"[]"}, "is not an object"),
        ({"a.txt": b"\xff\xfe"}, "its .txt cannot be read"),
        ({"a.json": b'{"offset": "soon"}'}, "offset is 'soon'"),
        ({"a.json": b"[" * 100_000}, "its .json cannot be read"),
        ({"a.txt": b"x" * (5 << 20)}, "has a .txt of more than 4 MiB"),
    ],
)
def test_a_sample_whose_text_is_wrong_costs_no_other(tmp_path, texts, says):
    path = write_tar(tmp_path / "x.tar", {"a.wav": b"a"} | texts | {"b.wav": b"b"})
    (good,), (bad,) = split(list_recordings(path))
    assert parse(good.uri).name == "b.wav"
    assert parse(bad.uri).name == "a.wav"
    assert says in bad.detail


def test_a_link_to_audio_is_not_lost(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("a.wav", tarfile.SYMTYPE), ("b\udcff.wav", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    good, bad = split(list_recordings(str(tmp_path / "x.tar")))
    assert not good
    assert [row.detail.endswith("is a link; pack the file itself") for row in bad] == [True, True]
    assert "b\\xff.wav" in bad[1].detail


MANY = {f"{index}.wav": bytes([index]) * 700 for index in range(5)}


def damaged(data, kind):
    """The shard's bytes, damaged behind the second member (which takes 512 + 1024 bytes)."""
    member, end = 1536, 5 * 1536
    if kind == "header":
        return data[: 2 * member] + b"\xff" * 512 + data[2 * member + 512 :]
    if kind == "in a member":
        return data[: 2 * member + 900]
    if kind == "in a header":
        return data[: 2 * member + 100]
    if kind == "between two":
        return data[: 2 * member]
    assert kind == "joined"
    return data[: 2 * member] + bytes(1024) + data[2 * member : end] + bytes(1024)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("header", "is damaged at byte 3072"),
        ("in a member", "is cut off: it ends at byte 3972, but its member 2.wav goes on to byte 4284"),
        ("in a header", "3072"),
        ("between two", "is cut off at byte 3072"),
        ("joined", "ends at byte 3072, but more data follows"),
    ],
)
def test_of_a_damaged_shard_what_could_be_listed_is_kept(tmp_path, kind, says):
    path = write_tar(tmp_path / "1.tar", MANY)
    write_tar(tmp_path / "2.tar", {"z.wav": b"z"})
    (tmp_path / "1.tar").write_bytes(damaged((tmp_path / "1.tar").read_bytes(), kind))
    good, (bad,) = split(list_recordings(str(tmp_path / "*.tar")))
    assert sorted(parse(row.uri).name for row in good) == ["0.wav", "1.wav", "z.wav"]
    assert (bad.uri, bad.stage.value, bad.reason) == (path, "list", Reason.UNSUPPORTED_FORMAT)
    assert says in bad.detail


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_tar_says_to_unpack_it(tmp_path, mode):
    for name in (f"x.tar.{mode}", f"{mode}.tar"):
        path = write_tar(tmp_path / name, MANY, mode=f"w:{mode}")
        (found,) = list_recordings(path)
        assert (found.uri, found.reason) == (path, Reason.UNSUPPORTED_FORMAT)
        assert "Unpack it to a plain .tar" in found.detail


def test_an_empty_shard_and_one_without_audio(tmp_path):
    (tmp_path / "empty.tar").touch()
    (found,) = list_recordings(str(tmp_path / "empty.tar"))
    assert found.reason is Reason.EMPTY_FILE
    assert list(list_recordings(write_tar(tmp_path / "text.tar", {"a.txt": b"x"}))) == []
    assert list(list_recordings(write_tar(tmp_path / "none.tar", {}))) == []


def test_anything_called_tar_is_at_worst_a_dead_letter(tmp_path):
    for index, data in enumerate((b"x", b"x" * 512, b"\xff" * 5000, CLIP, bytes(511), b"\0" * 512 + b"x" * 512)):
        path = tmp_path / f"{index}.tar"
        path.write_bytes(data)
        *_, last = list_recordings(str(path))
        assert isinstance(last, DeadLetter), data[:10]
        assert last.uri == str(path)


AUDIO = [
    {"bytes": CLIP, "path": "train/a.flac"},
    {"bytes": None, "path": "more/b.wav"},
    None,
    {"bytes": b"c", "path": None},
    {"bytes": None, "path": None},
]
COLUMNS = {
    "text": ["one", None, "three", "four", "five"],
    "id": [1, 1, 1, 1, 1],  # of the speaker, for example: no recording's
    "picture": [{"bytes": b"p", "path": "p.png"}] * 5,
    "raw": [b"r"] * 5,
    "turns": [[{"n": 1}]] * 5,
}


def check_audio(found, folder, column):
    good, bad = split(found)
    first, named, third = good
    assert first.uri.endswith("&name=a.flac")
    assert storage.read_bytes(first.uri) == CLIP
    assert storage.stat(first.uri)[1:3] == (len(CLIP), first.etag)
    assert first.size_bytes in (None, len(CLIP))
    assert json.loads(first.metadata) == {"text": "one", "id": 1, "turns": [{"n": 1}]}
    assert (named.uri, named.size_bytes) == (str(folder / "more/b.wav"), None)
    assert storage.read_bytes(third.uri) == b"c"
    assert [row.detail for row in bad] == [f"row {n} of {column} has no audio and no path of one" for n in (3, 5)]


@pytest.mark.parametrize("rows_per_group", [1, 2, 5])
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("column", ["audio", "sound"])
def test_parquet_with_audio_in_it(tmp_path, rows_per_group, statistics, column):
    path = tmp_path / "x.parquet"
    kinds = {name: {"_type": "Image"} for name in ("picture",)}
    table = pa.table(COLUMNS | {column: AUDIO})
    if column != "audio":  # by its name it is found without, by its kind with
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds}})})
    pq.write_table(table, path, row_group_size=rows_per_group, write_statistics=statistics)
    check_audio(list_recordings(str(path)), tmp_path, path)


def test_listing_parquet_does_not_read_the_audio(tmp_path):
    path = tmp_path / "x.parquet"
    clips = [{"bytes": os.urandom(200_000), "path": f"{index}.wav"} for index in range(40)]
    pq.write_table(pa.table({"audio": clips, "text": ["x"] * 40}), path, row_group_size=10)
    read = []
    found = list(_counting(str(path), read))
    assert len(found) == 40
    assert sum(read) < 1 << 20 < path.stat().st_size


def _counting(path, read):
    class Counting(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            read.append(count)
            return count

    from af3pipe.transforms.inputs import containers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers.storage, "open_input", lambda uri, **_: io.BufferedReader(Counting(uri)))
        yield from list_recordings(path)


def write_arrow(path, table, rows_per_batch, file_format=False, **options):
    new = pa.ipc.new_file if file_format else pa.ipc.new_stream
    with new(str(path), table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return path


@pytest.mark.parametrize("rows_per_batch", [1, 2, 5])
@pytest.mark.parametrize("file_format", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_an_arrow_file_with_audio_in_it(tmp_path, rows_per_batch, file_format, large):
    table = pa.table(COLUMNS | {"audio": AUDIO})
    if large:
        kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
        table = table.set_column(table.schema.get_field_index("audio"), "audio", table["audio"].cast(kind))
    path = write_arrow(tmp_path / "x.arrow", table, rows_per_batch, file_format)
    check_audio(list_recordings(str(path)), tmp_path, path)


@pytest.mark.parametrize(
    ("cut", "kept", "says"),
    [
        (-8, 5, "cut off after row 5"),
        (-60, 4, "cannot be read beyond row 4"),
        (100, 0, "cannot be read beyond row 0"),
    ],
)
def test_an_arrow_file_that_was_cut_off(tmp_path, cut, kept, says):
    path = write_arrow(tmp_path / "x.arrow", pa.table({"audio": [{"bytes": b"x" * 99, "path": "a"}] * 5}), 1)
    path.write_bytes(path.read_bytes()[:cut])
    good, (bad,) = split(list_recordings(str(path)))
    assert len(good) == kept
    assert bad.uri == str(path)
    assert says in bad.detail


def test_arrow_that_cannot_be_opened_at_a_row_says_what_to_do(tmp_path):
    clips = [{"bytes": b"x" * 9999, "path": "a"}] * 5
    packed = write_arrow(
        tmp_path / "packed.arrow", pa.table({"audio": clips}), 5, options=pa.ipc.IpcWriteOptions(compression="zstd")
    )
    coded = pa.table({"audio": clips, "who": pa.array(["a"] * 5).dictionary_encode()})
    coded = write_arrow(tmp_path / "coded.arrow", coded, 5)
    plain = write_arrow(tmp_path / "plain.arrow", pa.table({"text": ["a"]}), 5)
    for path, says in (
        (packed, "compressed batches"),
        (coded, "without dictionaries"),
        (plain, "no column with audio"),
    ):
        (bad,) = list_recordings(str(path))
        assert isinstance(bad, DeadLetter)
        assert says in bad.detail


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="needs Hugging Face's datasets")


@pytest.fixture
def dataset(datasets):
    rows = [
        {"audio": {"bytes": CLIP + bytes([index]), "path": f"{index}.flac"}, "text": f"t{index}"}
        for index in range(7)
    ]
    return datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))


def heard(found):
    good, bad = split(found)
    assert not bad
    return [
        (storage.read_bytes(row.uri)[len(CLIP)], row.size_bytes, json.loads(row.metadata)["text"]) for row in good
    ]


WANTED = [(index, len(CLIP) + 1, f"t{index}") for index in range(7)]


def test_a_data_set_on_disk(tmp_path, dataset):
    dataset.save_to_disk(tmp_path / "ds", num_shards=3)
    (tmp_path / "ds" / "cache-123.arrow").write_bytes(b"no part of it")
    assert heard(list_recordings(str(tmp_path / "ds"))) == WANTED
    assert heard(list_recordings(str(tmp_path / "ds") + "/")) == WANTED
    assert sorted(heard(list_recordings(str(tmp_path / "ds" / "data-*.arrow")))) == WANTED


def test_splits_of_a_data_set_on_disk(tmp_path, dataset, datasets):
    datasets.DatasetDict({"train": dataset.select(range(3)), "test": dataset.select(range(3, 7))}).save_to_disk(
        tmp_path
    )
    assert heard(list_recordings(str(tmp_path))) == WANTED
    (tmp_path / "train" / "state.json").unlink()
    (bad,) = list_recordings(str(tmp_path))
    assert (bad.uri, bad.stage.value) == (str(tmp_path), "list")
    assert "has no state.json" in bad.detail


def test_parquet_as_hugging_face_writes_it(tmp_path, dataset):
    dataset.to_parquet(tmp_path / "x.parquet")
    rows = list(list_recordings(str(tmp_path / "*.parquet")))
    assert [row.size_bytes for row in rows] == [None] * 7
    assert [storage.read_bytes(row.uri)[-1] for row in rows] == list(range(7))


def test_a_data_set_in_a_store(tmp_path, dataset, request):
    fs = fsspec.filesystem("memory")
    request.addfinalizer(fs.store.clear)
    dataset.save_to_disk(tmp_path / "ds", num_shards=2)
    fs.put(str(tmp_path / "ds"), "/containers/ds", recursive=True)
    assert heard(list_recordings("memory://containers/ds")) == WANTED


def test_a_file_of_a_data_set_that_is_missing_costs_no_other(tmp_path, dataset):
    dataset.save_to_disk(tmp_path, num_shards=7)
    (tmp_path / "data-00003-of-00007.arrow").unlink()
    good, (bad,) = split(list_recordings(str(tmp_path)))
    assert len(good) == 6
    assert bad.uri == str(tmp_path / "data-00003-of-00007.arrow")
    assert (bad.reason, bad.stage.value) == (Reason.NOT_FOUND, "list")


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/passwd", "a#offset=1", ".."])
def test_a_data_set_names_files_of_its_own_folder_only(tmp_path, name):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (bad,) = list_recordings(str(tmp_path))
    assert "is not a file in its folder" in bad.detail


def test_a_folder_is_still_searched_for_audio_only(tmp_path):
    write_tar(tmp_path / "x.tar", MANY)
    pq.write_table(pa.table({"audio": AUDIO}), tmp_path / "x.parquet")
    (tmp_path / "a.wav").write_bytes(b"a")
    (tmp_path / "state.json").write_text("{}")  # of something else
    assert [row.uri for row in list_recordings(str(tmp_path))] == [str(tmp_path / "a.wav")]


def test_a_glob_opens_each_as_what_it_is(tmp_path):
    write_tar(tmp_path / "1.tar", {"a.wav": b"a"})
    pq.write_table(pa.table({"audio": AUDIO[:1]}), tmp_path / "2.parquet")
    pq.write_table(pa.table({"uri": ["b.wav"]}), tmp_path / "3.parquet")
    names = [(parse(row.uri) or row).uri for row in list_recordings(str(tmp_path / "*"))]
    assert sorted(name.rpartition("/")[2].partition("#")[0] for name in names) == ["1.tar", "2.parquet", "b.wav"]


def test_paths_in_a_container_from_elsewhere_are_held_to_the_same_rule(request):
    fs = fsspec.filesystem("memory")
    request.addfinalizer(fs.store.clear)
    data = io.BytesIO()
    named = ["/etc/a.wav", "file:///etc/b.wav", "memory://other/c.wav", "d.wav"]
    pq.write_table(pa.table({"audio": [{"bytes": None, "path": path} for path in named]}), data)
    fs.pipe_file("/containers/x.parquet", data.getvalue())
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for index, path in enumerate(named):
            content = json.dumps({"uri": path}).encode()
            info = tarfile.TarInfo(f"{index}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    fs.pipe_file("/containers/x.tar", data.getvalue())
    for name in ("x.parquet", "x.tar"):
        (good,), bad = split(list_recordings(f"memory://containers/{name}"))
        assert good.uri == "memory:///containers/d.wav"
        assert [row.reason for row in bad] == [Reason.NOT_ALLOWED] * 3
        good, bad = split(list_recordings(f"memory://containers/{name}", allow_prefixes=["memory://other", "/etc"]))
        assert len(bad) == 2


def write_own(path, schema, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(schema.empty_table().replace_schema_metadata(metadata), path)
    return storage.stat(str(path))


OWN = {
    **{f"columns of {table}": (schema, None) for table, schema in TABLE_SCHEMAS.items()},
    "more columns": (TABLE_SCHEMAS["captions"].append(pa.field("score", pa.float64())), None),
    "the key": (pa.schema([("uri", pa.string()), ("text", pa.string())]), {b"af3pipe.format": b"2"}),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_table_of_an_output_is_skipped_where_it_is_found_and_refused_where_it_is_named(tmp_path, kind, caplog):
    found = write_own(tmp_path / kind / "a.parquet", *OWN[kind])
    second = write_own(tmp_path / kind / "b.parquet", *OWN[kind])
    with pytest.raises(Rejected, match=r"belongs to an output of af3pipe and is no input.*af3pipe redrive") as caught:
        list(container_rows(found.uri)(found))
    assert caught.value.reason is Reason.UNSUPPORTED_FORMAT
    with pytest.raises(Rejected, match="belongs to an output"):
        list(read_manifest(found.uri))
    before = metrics.tally()["own_files_skipped"]
    for one in (found, second):
        assert list(container_rows(one.uri, named=False)(one)) == []
    assert metrics.tally()["own_files_skipped"] - before == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped the files in {tmp_path / kind}: the output of af3pipe is no input"
    ]


@pytest.mark.parametrize(
    "columns", [["recording_id", "uri"], ["uri", "answer_key", "text"], ["uri", "task", "run_id"]]
)
@pytest.mark.parametrize("named", [True, False])
def test_a_manifest_made_of_an_output_is_a_manifest(tmp_path, columns, named):
    pq.write_table(pa.table({name: ["a.wav"] for name in columns}), tmp_path / "m.parquet")
    found = storage.stat(str(tmp_path / "m.parquet"))
    assert [row.columns["uri"] for row in container_rows(found.uri, named=named)(found)] == ["a.wav"]


@pytest.mark.parametrize("name", ["_runs/x.json", "_runs/x.started.json", "_runs/x.stop", "_compactions/1.json"])
def test_records_of_an_output_are_no_inputs(name):
    for top in ("/out", "s3://b/out", "s3://b"):
        found = storage.ObjectInfo(f"{top}/{name}", 1, None, None)
        assert list(container_rows(found.uri, named=False)(found)) == []
        with pytest.raises(Rejected, match="belongs to an output"):
            list(container_rows(found.uri)(found))


@pytest.mark.parametrize(
    "name", ["/_runs/a.wav", "/_runs/deep/a.json", "/runs/a.json", "/a_runs/a.json", "/_runs.json"]
)
def test_other_names_are_others(name):
    assert container_rows(name) is None


def test_a_shard_that_is_written_anew_while_it_is_listed_says_so(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.wav": b"a", "b.wav": b"b"})
    rows = list_recordings(path)
    first = next(rows)
    write_tar(path, {"a.wav": b"longer than before" * 1000, "b.wav": b"b"})
    (changed,) = split(rows)[1]
    assert (changed.reason, changed.uri, changed.retryable) == (Reason.CHANGED, path, True)
    with pytest.raises(Rejected, match="was replaced or modified"):
        storage.open_version(storage.ObjectInfo(first.uri, first.size_bytes, first.etag, first.mtime))


def test_members_know_the_canonical_name_of_their_shard(tmp_path):
    (tmp_path / "real").mkdir()
    write_tar(tmp_path / "real" / "x.tar", {"a.wav": b"a"})
    pq.write_table(pa.table({"audio": [{"bytes": b"a", "path": "a.wav"}]}), tmp_path / "real" / "x.parquet")
    (tmp_path / "link").symlink_to("real")
    for name in ("x.tar", "x.parquet"):
        found = storage.stat(str(tmp_path / "link" / name))
        (row,) = container_rows(found.uri)(found)
        assert row.audio.uri.startswith(str(tmp_path / "link" / name))
        assert row.audio.canonical == storage.canonical(row.audio.uri) == storage.stat(row.audio.uri).canonical
        assert row.audio.canonical == row.audio.uri.replace("/link/", "/real/")
