import enum
import errno
import io
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import fsspec
import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage import objects, retry

NOBODY = 65534
ODD_NAMES = [
    "with space.wav",
    "Grüße aus Köln.mp3",
    "take [2].flac",
    "a#b.ogg",
    "what?.wav",
    "a::b.wav",
    "100%25.wav",
]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.001)


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def often_switching():
    """Threads take turns so often that whatever they share goes wrong soon."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@contextmanager
def nobody():
    """Root may read everything, so permissions are tried as somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def folder(tmp_path):
    """A folder that everybody may pass through; pytest's own are closed to all but their owner."""
    above = tmp_path
    while above.stat().st_uid == os.getuid() and above != above.parent and not above.stat().st_mode & 0o001:
        above.chmod(above.stat().st_mode | 0o011)
        above = above.parent
    tmp_path.chmod(0o755)
    return tmp_path


def uris(pattern):
    return sorted(found.uri for found in storage.list_objects(str(pattern)))


def rejection(call):
    with pytest.raises(Rejected) as caught:
        call()
    return caught.value


class TestListing:
    def test_a_folder_gives_its_audio_sorted_and_whole_names(self, tmp_path):
        for name in ("b.wav", "a.FLAC", "deep/er/c.m4a", "notes.txt", "movie.mp4", "wav", "deep/cover.jpg"):
            storage.write_atomic(str(tmp_path / name), b"x")
        expected = ["a.FLAC", "b.wav", "deep/er/c.m4a", "movie.mp4"]
        assert uris(tmp_path) == [str(tmp_path / name) for name in expected]
        assert uris(f"{tmp_path}/") == uris(f"file://{tmp_path}") == uris(tmp_path)

    def test_a_glob_gives_exactly_what_matches(self, tmp_path):
        for name in ("b.wav", "a.dat", "deep/er/c.dat", "deep/d.dat"):
            storage.write_atomic(str(tmp_path / name), b"x")
        assert uris(tmp_path / "*.dat") == [str(tmp_path / "a.dat")]
        assert uris(tmp_path / "**/*.dat") == [
            str(tmp_path / name) for name in ("a.dat", "deep/d.dat", "deep/er/c.dat")
        ]
        assert uris(tmp_path / "[ab].*") == [str(tmp_path / "a.dat"), str(tmp_path / "b.wav")]
        assert uris(tmp_path / "*") == [str(tmp_path / "a.dat"), str(tmp_path / "b.wav")]  # the folder is no file
        assert uris(tmp_path / "*.mp3") == []
        assert uris(tmp_path / "nowhere" / "*.mp3") == []

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_odd_names_are_found_stated_and_read(self, tmp_path, name):
        uri = str(tmp_path / name)
        storage.write_atomic(uri, b"12345")
        [found] = storage.list_objects(uri)
        assert found == storage.ObjectInfo(uri, 5, None, found.mtime, uri)
        assert uris(tmp_path) == [uri]
        assert storage.stat(uri) == found
        with storage.open_input(uri, size_bytes=5) as file:
            assert file.read() == b"12345"

    @pytest.mark.parametrize("name", [name for name in ODD_NAMES if "::" not in name])
    def test_odd_names_in_a_store(self, memory, name):
        storage.write_atomic(f"memory://bucket/{name}", b"12345")
        [found] = storage.list_objects(f"memory://bucket/{name}")
        assert found.uri.endswith(f"/bucket/{name}")
        assert [again.uri for again in storage.list_objects("memory://bucket")] == [found.uri]
        assert storage.stat(found.uri) == found
        assert storage.read_bytes(found.uri) == b"12345"

    def test_a_store_gives_full_urls_with_size_and_time(self, memory):
        memory.pipe_file("/bucket/sub/a.wav", b"123")
        memory.pipe_file("/bucket/sub/a.txt", b"123")
        [found] = storage.list_objects("memory://bucket")
        assert (found.uri, found.size_bytes) == ("memory:///bucket/sub/a.wav", 3)
        assert datetime.fromisoformat(found.mtime).tzinfo == timezone.utc
        assert [other.uri for other in storage.list_objects("memory://bucket/**/*.txt")] == [
            "memory:///bucket/sub/a.txt"
        ]

    def test_a_relative_path_becomes_absolute(self, tmp_path, monkeypatch):
        (tmp_path / "a.wav").write_bytes(b"x")
        monkeypatch.chdir(tmp_path)
        assert uris("a.wav") == uris("*.wav") == uris(".") == [str(tmp_path / "a.wav")]

    def test_the_time_is_the_files_own(self, tmp_path):
        path = tmp_path / "a.wav"
        path.write_bytes(b"x")
        os.utime(path, (1_700_000_000.25, 1_700_000_000.25))
        assert storage.stat(str(path)).mtime == "2023-11-14T22:13:20.250000+00:00"

    def test_what_does_not_exist_is_not_found(self, tmp_path, memory):
        for uri in (str(tmp_path / "none.wav"), "memory://none/none.wav", str(tmp_path / "none" / "none.wav")):
            rejected = rejection(lambda uri=uri: list(storage.list_objects(uri)))
            assert (rejected.stage, rejected.reason) == (Stage.LIST, Reason.NOT_FOUND)
            assert uri in rejected.detail

    def test_a_folder_that_may_not_be_read_is_not_passed_over(self, folder):
        storage.write_atomic(str(folder / "closed" / "a.wav"), b"x")
        storage.write_atomic(str(folder / "b.wav"), b"x")
        (folder / "closed").chmod(0o000)
        with nobody():
            for pattern in (folder, folder / "closed", folder / "**/*.wav"):
                rejected = rejection(lambda pattern=pattern: uris(pattern))
                assert (rejected.stage, rejected.reason) == (Stage.LIST, Reason.PERMISSION_DENIED)
        (folder / "closed").chmod(0o700)

    def test_a_link_to_a_file_is_that_file(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "a.bin").write_bytes(b"123")
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.wav").symlink_to("../elsewhere/a.bin")
        (tmp_path / "in" / "round.wav").symlink_to("../in")
        [found] = storage.list_objects(str(tmp_path / "in"))
        assert found == storage.stat(found.uri)
        assert (found.uri, found.size_bytes) == (str(tmp_path / "in" / "a.wav"), 3)

    def test_a_pipe_is_left_out_and_a_broken_link_is_not(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.wav")
        (tmp_path / "link.wav").symlink_to(tmp_path / "gone.wav")
        assert uris(tmp_path) == [str(tmp_path / "link.wav")]
        assert rejection(lambda: storage.open_input(str(tmp_path / "link.wav"))).reason is Reason.NOT_FOUND


@pytest.mark.parametrize(
    ("info", "etag", "mtime"),
    [
        (
            {"ETag": '"ab12"', "LastModified": datetime(2024, 1, 2, 3, tzinfo=timezone.utc)},
            "ab12",
            "2024-01-02T03:00:00+00:00",
        ),
        ({"etag": "CJ8=", "updated": "2024-01-02T03:04:05.678Z"}, "CJ8=", "2024-01-02T03:04:05.678000+00:00"),
        ({"mtime": 1_700_000_000}, None, "2023-11-14T22:13:20+00:00"),
        ({"created": datetime(2024, 1, 2)}, None, "2024-01-02T00:00:00+00:00"),
        ({}, None, None),
    ],
    ids=["s3", "gcs", "local", "naive", "nothing"],
)
def test_every_store_names_tag_and_time_its_own_way(info, etag, mtime):
    found = objects.object_info(fsspec.filesystem("memory"), {"name": "/b/a.wav", "size": 1, "type": "file", **info})
    assert found == storage.ObjectInfo("memory:///b/a.wav", 1, etag, mtime, "memory:///b/a.wav")


class TestReading:
    @pytest.mark.parametrize("scheme", ["local", "memory"])
    def test_seeks_and_reads_like_a_file(self, scheme, tmp_path, memory):
        data = bytes(range(256)) * 20_000
        uri = str(tmp_path / "a.wav") if scheme == "local" else "memory://bucket/a.wav"
        storage.write_atomic(uri, data)
        with storage.open_input(uri) as file:
            assert file.seek(0, io.SEEK_END) == len(data)
            assert file.read() == b""
            file.seek(3_000_001)
            assert file.read(5) == data[3_000_001:3_000_006]
            file.seek(-7, io.SEEK_CUR)
            assert file.tell() == 2_999_999
            assert file.read() == data[2_999_999:]

    def test_readers_of_one_object_do_not_disturb_each_other(self, memory, often_switching):
        data = os.urandom(3_000_000)
        storage.write_atomic("memory://bucket/a.wav", data)
        barrier = threading.Barrier(4)

        def read(_):
            with storage.open_input("memory://bucket/a.wav") as file:
                barrier.wait()
                return b"".join(iter(lambda: file.read(1000), b""))

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(read, range(4))) == {data}

    def test_missing_and_forbidden_are_told_apart(self, folder):
        path = folder / "a.wav"
        path.write_bytes(b"x")
        path.chmod(0o000)
        for call in (storage.open_input, storage.read_bytes):
            with nobody():
                assert rejection(lambda call=call: call(str(path))).reason is Reason.PERMISSION_DENIED
            assert rejection(lambda call=call: call(str(folder / "none.wav"))).reason is Reason.NOT_FOUND
        assert rejection(lambda: storage.stat(str(folder / "none.wav"))).reason is Reason.NOT_FOUND


class FlakyStore:
    """The memory store, failing on every call for as long as it has errors to raise."""

    def __init__(self, fs, errors):
        self._fs, self.errors, self.calls = fs, list(errors), 0

    def __getattr__(self, name):
        return getattr(self._fs, name)

    def _fail(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)

    def cat_file(self, path):
        self._fail()
        return self._fs.cat_file(path)

    def pipe_file(self, path, data):
        self._fail()
        return self._fs.pipe_file(path, data)

    def open(self, path, mode, **_):
        store = self

        class Handle(io.RawIOBase):
            inner = io.BytesIO(store._fs.cat_file(path))

            def read(self, size=-1):
                data = self.inner.read(size)  # moves, and then fails: a retry has to go back
                store._fail()
                return data

            def seek(self, *where):
                return self.inner.seek(*where)

            def tell(self):
                return self.inner.tell()

            def seekable(self):
                return True

        return Handle()


class HttpError(Exception):
    """As gcsfs has it."""

    def __init__(self, code):
        super().__init__(f"status {code}")
        self.code = code


def client_error(status):
    """As botocore has it, behind the OSError that s3fs makes of it."""
    error, cause = OSError(errno.EIO, "store"), Exception("botocore")
    cause.response = {"ResponseMetadata": {"HTTPStatusCode": status}}
    error.__cause__ = cause
    return error


def botocore_error(code, status):
    """As s3fs raises it, from botocore's own exception."""
    reply = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(reply, "GetObject"))


def azure_error(code, status):
    """As azure.storage.blob has it: the code is a member of its enumeration of strings."""
    error = type("HttpResponseError", (Exception,), {})("This operation is not permitted on an archived blob.")
    error.status_code, error.error_code = status, enum.Enum("StorageErrorCode", {"FOUND": code}, type=str).FOUND
    return error


ClientPayloadError = type("ClientPayloadError", (Exception,), {})

TRANSIENT = {
    "reset": lambda: ConnectionResetError("reset"),
    "timeout": lambda: TimeoutError("slow"),
    "io": lambda: OSError(errno.EIO, "io"),
    "gcs 503": lambda: HttpError(503),
    "gcs 429": lambda: HttpError("429"),
    "s3 500": lambda: client_error(500),
    "botocore": lambda: type("EndpointConnectionError", (type("ConnectionError", (Exception,), {}),), {})("refused"),
    "aiohttp": lambda: ClientPayloadError("cut off"),
}
FINAL = {
    "missing": (lambda: FileNotFoundError("a"), Reason.NOT_FOUND),
    "denied": (lambda: PermissionError("a"), Reason.PERMISSION_DENIED),
    "gcs 403": (lambda: HttpError(403), Reason.PERMISSION_DENIED),
    "gcsfs 403": (lambda: OSError("Forbidden: bucket/a\nno access"), Reason.PERMISSION_DENIED),
    "s3 archived": (lambda: botocore_error("InvalidObjectState", 403), Reason.ARCHIVED),
    "s3 forbidden": (lambda: botocore_error("AccessDenied", 403), Reason.PERMISSION_DENIED),
    "s3 replaced": (lambda: botocore_error("PreconditionFailed", 412), Reason.CHANGED),
    "azure archived": (lambda: azure_error("BlobArchived", 409), Reason.ARCHIVED),
    "azure restoring": (lambda: azure_error("BlobBeingRehydrated", 409), Reason.ARCHIVED),
    "azure forbidden": (lambda: azure_error("AuthorizationPermissionMismatch", 403), Reason.PERMISSION_DENIED),
    "gcsfs 412": (lambda: FileExistsError("https://storage.googleapis.com/a"), Reason.CHANGED),
    "s3 400": (lambda: client_error(400), Reason.UNREADABLE),
    "name too long": (lambda: OSError(errno.ENAMETOOLONG, "long"), Reason.UNREADABLE),
}


@pytest.fixture
def flaky(memory, monkeypatch):
    def make(errors):
        store = FlakyStore(memory, errors)
        monkeypatch.setattr(storage, "_locate", lambda uri: (store, uri.removeprefix("memory:/")))
        return store

    memory.pipe_file("/bucket/a.wav", b"0123456789" * 100_000)
    return make


class TestRetries:
    @pytest.mark.parametrize("name", TRANSIENT)
    def test_what_passes_is_tried_again(self, flaky, name):
        store = flaky([TRANSIENT[name]() for _ in range(4)])
        assert len(storage.read_bytes("memory://bucket/a.wav")) == 1_000_000
        assert store.calls == 5

    @pytest.mark.parametrize("name", TRANSIENT)
    def test_five_tries_are_enough(self, flaky, name):
        store = flaky([TRANSIENT[name]() for _ in range(9)])
        rejected = rejection(lambda: storage.read_bytes("memory://bucket/a.wav"))
        assert (rejected.stage, rejected.reason) == (Stage.READ, Reason.UNREADABLE)
        assert "memory://bucket/a.wav could not be read in 5 tries" in rejected.detail
        assert store.calls == 5

    @pytest.mark.parametrize("name", FINAL)
    def test_what_does_not_pass_is_tried_once(self, flaky, name):
        make, reason = FINAL[name]
        store = flaky([make()])
        assert rejection(lambda: storage.read_bytes("memory://bucket/a.wav")).reason is reason
        assert store.calls == 1

    def test_an_unexpected_exception_is_left_alone(self, flaky):
        store = flaky([ZeroDivisionError("a mistake of ours")])
        with pytest.raises(ZeroDivisionError):
            storage.read_bytes("memory://bucket/a.wav")
        assert store.calls == 1

    def test_a_read_that_fails_in_the_middle_goes_on_where_it_was(self, flaky):
        store = flaky([])
        file = storage.open_input("memory://bucket/a.wav")
        assert file.read(10) == b"0123456789"
        store.errors = [ConnectionResetError("reset"), TimeoutError("slow")]
        file.seek(500_003)
        assert file.read(300_000) == (b"3456789012" * 30_000)
        assert store.errors == []

    def test_a_read_that_keeps_failing_is_unreadable(self, flaky):
        store = flaky([])
        file = storage.open_input("memory://bucket/a.wav")
        store.errors = [ConnectionResetError("reset") for _ in range(9)]
        rejected = rejection(lambda: file.read(10))
        assert (rejected.stage, rejected.reason) == (Stage.READ, Reason.UNREADABLE)

    def test_a_write_is_tried_again_and_then_given_up(self, flaky):
        store = flaky([HttpError(503), HttpError(503)])
        storage.write_atomic("memory://bucket/out", b"x")
        assert store.calls == 3
        store.errors = [HttpError(503) for _ in range(9)]
        with pytest.raises(storage.StorageError, match=r"memory://bucket/out cannot be written: status 503\."):
            storage.write_atomic("memory://bucket/out", b"x")


class TestWriting:
    def test_makes_folders_and_replaces(self, tmp_path):
        uri = str(tmp_path / "a" / "b" / "c.parquet")
        storage.write_atomic(uri, b"old")
        storage.write_atomic(uri, b"new")
        assert storage.read_bytes(uri) == b"new"
        assert storage.list_files(str(tmp_path)) == [uri]

    def test_a_write_that_fails_leaves_the_old_object_and_nothing_else(self, tmp_path, monkeypatch):
        uri = str(tmp_path / "c.parquet")
        storage.write_atomic(uri, b"old")

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(storage.StorageError, match=r"No space left on device\. Make room there"):
            storage.write_atomic(uri, b"new")
        assert storage.read_bytes(uri) == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["c.parquet"]

    def test_readers_never_see_half_a_file(self, tmp_path):
        uri = str(tmp_path / "c.parquet")
        versions = [bytes([letter]) * 200_000 for letter in b"abcd"]
        storage.write_atomic(uri, versions[0])
        with ThreadPoolExecutor(3) as pool:
            writing = [pool.submit(storage.write_atomic, uri, version) for version in versions * 5]
            seen = [storage.read_bytes(uri) for _ in range(100)]
            [done.result() for done in writing]
        assert set(seen) <= set(versions)

    def test_delete_is_content_where_nothing_is(self, tmp_path, memory):
        for uri in (str(tmp_path / "a"), "memory://bucket/a"):
            storage.write_atomic(uri, b"x")
            storage.delete(uri)
            storage.delete(uri)
            assert storage.list_files(uri.rpartition("/")[0]) == []

    def test_list_files_of_a_folder_that_is_not_there_is_empty(self, tmp_path):
        assert storage.list_files(str(tmp_path / "none")) == []
        assert storage.list_files("memory://none") == []


class TestCheckWritable:
    def test_leaves_nothing_behind(self, tmp_path, memory):
        for folder in (str(tmp_path / "new"), "memory://bucket/new"):
            storage.check_writable(folder)
            assert storage.list_files(folder) == []

    def test_names_folder_cause_and_remedy(self, folder):
        folder.chmod(0o555)
        with nobody(), pytest.raises(storage.StorageError) as caught:
            storage.check_writable(str(folder / "out"))
        folder.chmod(0o755)
        assert str(caught.value) == (
            f"The folder {folder}/out is not writable: Permission denied. "
            "Choose another folder, or give this account the right to create and delete objects there."
        )

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "out").write_bytes(b"")
        with pytest.raises(storage.StorageError, match="Something else has that name"):
            storage.check_writable(str(tmp_path / "out"))

    def test_an_unknown_store(self):
        with pytest.raises(storage.StorageError, match="nosuch://bucket/out is not writable"):
            storage.check_writable("nosuch://bucket/out")


@pytest.mark.parametrize(
    ("base", "parts", "joined"),
    [
        ("s3://bucket/out/", ("captions", "a.parquet"), "s3://bucket/out/captions/a.parquet"),
        ("s3://bucket", ("a",), "s3://bucket/a"),
        ("memory://", ("a",), "memory://a"),
        ("/data/out", ("/a/", "b"), "/data/out/a/b"),
        ("/", ("a",), "/a"),
        ("out", ("a",), "out/a"),
    ],
)
def test_join(base, parts, joined):
    assert storage.join(base, *parts) == joined


def test_names_around_a_uri():
    assert storage.name("s3://bucket/a b/c#1.wav") == "c#1.wav"
    assert storage.parent("s3://bucket/lists/a.csv") == "s3://bucket/lists"
    assert (storage.parent("a.csv"), storage.parent("/a.csv")) == (".", "/")
    assert storage.resolve("sub/a.wav", "s3://bucket/lists") == "s3://bucket/lists/sub/a.wav"
    assert storage.resolve("./a.wav", "/data") == "/data/a.wav"
    assert storage.resolve("~/a.wav", "s3://bucket/lists") == str(Path("~/a.wav").expanduser())
    assert storage.resolve("a.wav", "lists") == str(Path("lists/a.wav").absolute())
    for absolute in ("gs://b/a.wav", "/data/a.wav"):
        assert storage.resolve(absolute, "s3://bucket/lists") == absolute


def test_a_relative_seek_counts_from_where_the_reader_is_and_not_from_what_was_read_ahead():
    data = random.Random(0).randbytes(3_000_000)
    fsspec.filesystem("memory").pipe("/relative.bin", data)
    with storage.open_input("memory://relative.bin", size_bytes=len(data)) as file:
        file.read(70_000)
        file.seek(2_000_001, io.SEEK_CUR)
        assert file.tell() == 2_070_001
        assert file.read(10) == data[2_070_001:2_070_011]
