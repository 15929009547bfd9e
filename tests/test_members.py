"""What a URI names inside another object, and opening it: real tars and Parquet files, local and in memory."""

import io
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected
from af3pipe.storage import members
from af3pipe.storage.members import Cell, Span, parse

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CONTAINER = st.sampled_from(["s3://b/a", "/d/a#b", "x", "s3://b/a.tar#offset=1&size=2", "ä ?[1]"])
NUMBER = st.integers(0, 2**62)


@given(CONTAINER, st.sampled_from([".tar", ".arrow", ".TAR"]), NUMBER, NUMBER, TEXT)
def test_a_span_is_told_and_read_alike(stem, suffix, offset, size, name):
    span = Span(stem + suffix, offset, size, name)
    assert parse(span.uri) == span
    assert "/" not in span.uri[len(span.container) :]  # the name's folders are no folders here


@given(CONTAINER, NUMBER, TEXT.filter(bool), TEXT)
def test_a_cell_is_told_and_read_alike(stem, row, column, name):
    cell = Cell(f"{stem}.parquet", row, column, name)
    assert parse(cell.uri) == cell


@given(st.binary(min_size=1, max_size=20).map(lambda name: name.decode("utf-8", "surrogateescape")))
def test_a_name_in_any_encoding_gives_a_uri_that_is_text(name):
    span = Span("/a.tar", 0, 1, name)
    span.uri.encode()
    assert parse(span.uri) == span


@given(st.text("0189+ #&=ofsetizrwcolumnam%2F/.", max_size=60).map(lambda tail: "/a.tar#" + tail))
def test_only_what_is_told_exactly_so_counts(uri):
    found = parse(uri)
    assert found is None or found.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "/a.tar",
        "/a.wav#offset=0&size=1",
        "/a.tar#offset=00&size=1",
        "/a.tar#offset=٣&size=1",
        "/a.tar#offset=0&size=1&name=",
        "/a.tar#offset=0&size=1&name=a b",
        "/a.tar#offset=0&size=1&name=a/b",
        "/a.tar#offset=0&size=1&name=%61",
        "/a.tar#size=1&offset=0",
        "/a.parquet#row=1",
        "/a.parquet#offset=0&size=1",
        "/a.tar#offset=" + "9" * 5000 + "&size=1",
    ],
)
def test_other_names_with_a_number_sign_are_names(uri):
    assert parse(uri) is None


def make_tar(files):
    """A tar, and its members' spans by name."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data.seek(0)
    with tarfile.open(fileobj=data) as tar:
        places = {info.name: (info.offset_data, info.size) for info in tar}
    return data.getvalue(), places


def test_a_member_reads_like_a_file_of_its_own(tmp_path):
    content = bytes(range(256)) * 500
    data, places = make_tar({"a.wav": b"before", "b.wav": content, "c.wav": b"behind"})
    (tmp_path / "x.tar").write_bytes(data)
    uri = Span(str(tmp_path / "x.tar"), *places["b.wav"], "b.wav").uri
    info = storage.stat(uri)
    assert (info.uri, info.size_bytes) == (uri, len(content))
    shard = storage.stat(str(tmp_path / "x.tar"))
    assert (info.etag, info.mtime) == (f"{shard.size_bytes}:{shard.mtime}", shard.mtime)
    assert storage.read_bytes(uri) == content
    with storage.open_input(uri, size_bytes=info.size_bytes) as file:
        for offset, whence, size in [
            (0, 0, 10),
            (1000, 0, 70_000),
            (-5, 2, 50),
            (-3, 1, 1),
            (0, 2, 9),
            (10**6, 0, 9),
        ]:
            place = file.seek(offset, whence)
            assert file.read(size) == content[place : place + size]
        with pytest.raises(OSError):
            file.fileno()  # the descriptor would be the shard's
        with pytest.raises(ValueError, match="cannot seek"):
            file.seek(-1)


def test_the_same_in_a_store(request):
    fs = fsspec.filesystem("memory")
    request.addfinalizer(fs.store.clear)
    data, places = make_tar({"a.wav": b"before", "b.wav": b"content", "c.wav": b"behind"})
    fs.pipe_file("/members/x.tar", data)
    assert storage.read_bytes(Span("memory://members/x.tar", *places["b.wav"]).uri) == b"content"


@pytest.mark.parametrize("of", [str, lambda folder: f"memory://{folder.name}"], ids=["local", "store"])
def test_an_object_of_this_very_name_is_that_object(tmp_path, request, of):
    request.addfinalizer(fsspec.filesystem("memory").store.clear)
    uri = Span(storage.join(of(tmp_path), "x.tar"), 512, 4, "a.wav").uri
    storage.write_atomic(uri, b"an object")
    assert storage.read_bytes(uri) == b"an object"
    assert storage.stat(uri).size_bytes == 9
    with storage.open_input(uri) as file:
        assert file.read() == b"an object"


def test_a_local_file_of_this_very_name_goes_before_the_member(tmp_path):
    data, places = make_tar({"a.wav": b"member"})
    (tmp_path / "x.tar").write_bytes(data)
    uri = Span(str(tmp_path / "x.tar"), *places["a.wav"], "a.wav").uri
    assert storage.read_bytes(uri) == b"member"
    storage.write_atomic(uri, b"an object")
    assert storage.read_bytes(uri) == b"an object"


@pytest.mark.parametrize(("offset", "size"), [(512, 5), (513, 6), (0, 6), (1 << 20, 6)])
def test_a_shard_that_was_written_anew_is_not_heard_in_the_middle(tmp_path, offset, size):
    (tmp_path / "x.tar").write_bytes(make_tar({"a.wav": b"member"})[0])
    with pytest.raises(Rejected, match="has no member of") as caught:
        storage.open_input(Span(str(tmp_path / "x.tar"), offset, size).uri)
    assert caught.value.reason is Reason.NOT_FOUND


def test_a_shard_that_is_not_there(tmp_path):
    with pytest.raises(Rejected, match="There is no object"):
        storage.open_input(Span(str(tmp_path / "x.tar"), 512, 5).uri)


def write_parquet(path, values, rows_per_group, column="audio"):
    structs = [{"bytes": value, "path": f"{index}.wav"} for index, value in enumerate(values)]
    pq.write_table(pa.table({column: structs, "text": ["x"] * len(values)}), path, row_group_size=rows_per_group)


@pytest.fixture
def reads(monkeypatch):
    """Rows for which a row group was read."""
    members._cells.__init__()
    seen = []
    original = members._read_run

    def read(cell, etag):
        seen.append(cell.row)
        return original(cell, etag)

    monkeypatch.setattr(members, "_read_run", read)
    yield seen
    members._cells.__init__()


def test_rows_read_in_order_cost_each_row_group_one_read(tmp_path, reads):
    values = [f"clip {index}".encode() * (index + 1) for index in range(50)]
    write_parquet(tmp_path / "x.parquet", values, 10)
    uris = [Cell(str(tmp_path / "x.parquet"), row, "audio", f"{row}.wav").uri for row in range(50)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(storage.read_bytes, uris)) == values
        assert [info.size_bytes for info in pool.map(storage.stat, uris)] == [len(value) for value in values]
    # Once to open, once to know which version of the file it is.
    assert sorted(row // 10 for row in reads) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    reads.clear()
    for uri in uris:
        storage.stat(uri)
        storage.read_bytes(uri)
    assert reads == []


def test_a_large_row_group_is_held_in_parts(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(members, "_RUN_BYTES", 40_000)
    monkeypatch.setattr(members, "_CACHE_BYTES", 100_000)
    values = [bytes([index]) * 1000 for index in range(200)]
    write_parquet(tmp_path / "x.parquet", values, 200)
    for row in range(200):
        assert storage.read_bytes(Cell(str(tmp_path / "x.parquet"), row, "audio").uri) == values[row]
        assert sum(run.size_bytes for run in members._cells._runs) <= 100_000
    assert len(reads) == 5  # 48 rows make 40,000 bytes in batches of 16


def test_a_file_that_was_written_anew_is_read_anew(tmp_path, reads):
    uri = Cell(str(tmp_path / "x.parquet"), 0, "audio").uri
    write_parquet(tmp_path / "x.parquet", [b"old"], 1)
    assert (storage.stat(uri).size_bytes, storage.read_bytes(uri)) == (3, b"old")
    write_parquet(tmp_path / "x.parquet", [b"newer"], 1)
    assert (storage.stat(uri).size_bytes, storage.read_bytes(uri)) == (5, b"newer")


def test_threads_that_want_the_same_row_read_it_once(tmp_path, reads):
    write_parquet(tmp_path / "x.parquet", [b"a", b"b"], 2)
    uri = Cell(str(tmp_path / "x.parquet"), 1, "audio").uri
    together = threading.Barrier(8)

    def read():
        together.wait()
        return storage.read_bytes(uri)

    with ThreadPoolExecutor(8) as pool:
        assert {job.result() for job in [pool.submit(read) for _ in range(8)]} == {b"b"}
    assert reads == [1]


@pytest.mark.parametrize(
    ("row", "column", "reason", "says"),
    [
        (9, "audio", Reason.NOT_FOUND, "has 2 rows"),
        (0, "sound", Reason.NOT_FOUND, "no column 'sound'"),
        (0, "text", Reason.NOT_FOUND, "no column 'text'"),
        (1, "audio", Reason.NOT_FOUND, "Row 1 of .* has no bytes"),
    ],
)
def test_a_cell_that_is_not_there(tmp_path, row, column, reason, says):
    write_parquet(tmp_path / "x.parquet", [b"a", None], 2)
    with pytest.raises(Rejected, match=says) as caught:
        storage.open_input(Cell(str(tmp_path / "x.parquet"), row, column).uri)
    assert caught.value.reason is reason


def test_a_column_with_a_dot_in_its_name(tmp_path):
    write_parquet(tmp_path / "x.parquet", [b"a", b"b"], 1, column="the.audio")
    assert storage.read_bytes(Cell(str(tmp_path / "x.parquet"), 1, "the.audio").uri) == b"b"


def test_a_damaged_row_group_says_so(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, [bytes(range(256)) * 40] * 3, 1)
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with pytest.raises(Rejected) as caught:
        storage.open_input(Cell(str(path), 0, "audio").uri)
    assert caught.value.reason is Reason.DECODE_ERROR
    assert storage.read_bytes(Cell(str(path), 2, "audio").uri) == bytes(range(256)) * 40


def test_what_the_store_says_is_told_through_parquet_s_reader(tmp_path):
    with pytest.raises(Rejected, match="There is no object") as caught:
        storage.open_input(Cell(str(tmp_path / "none.parquet"), 0, "audio").uri)
    assert caught.value.reason is Reason.NOT_FOUND
