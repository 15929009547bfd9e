"""URIs to bytes and back, on any store that fsspec knows: list, stat, open with retries, write atomically.

A local file's URI is its plain absolute path; every other one is a full URL. Nothing is decoded or unquoted, so
names with spaces, umlauts, `#`, `?` or `[` are what the store calls them.
"""

import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage.retry import advice, cause, retried, tries

_EXTENSIONS = (
    "3g2 3gp aac ac3 aif aifc aiff alac amr ape asf au avi awb bwf caf dff dsf dts eac3 f4v flac flv gsm m2ts m4a "
    "m4b m4r m4v mka mkv mov mp1 mp2 mp3 mp4 mpc mpeg mpg mts mxf oga ogg ogv opus ra rf64 snd sph spx tta ts vob "
    "voc w64 wav wave weba webm wma wmv wv "
    # Without a header: audio.headers.HEADERLESS says what they hold.
    "al alaw alw g722 mulaw sln sln8 sln12 sln16 sln24 sln32 sln44 sln48 sln96 sln192 ul ulaw ulw"
)
AUDIO_EXTENSIONS = frozenset(_EXTENSIONS.split())
"""Lower-case extensions, without the dot, by which audio and video are told from the rest of a folder."""

_BLOCK_BYTES = 1 << 20
_FIRST_BYTES = 1 << 16
_MOST_AHEAD_BYTES = 1 << 22
_STREAMS_IN_MEMORY_BYTES = 64 << 20
# Stores whose files take a known size, which saves the request that would ask for it.
_SIZED_STORES = frozenset({"s3", "s3a", "gs", "gcs", "http", "https"})


class StorageError(Exception):
    """The output cannot be written: where, why, and what to do. Ends the job, unlike `Rejected`."""


class ObjectInfo(NamedTuple):
    """What a listing says of one object.

    Attributes:
        uri: Full URL; a plain absolute path for a local file.
        size_bytes: None where the store does not state it.
        etag: The store's content tag, without quotes; None for local files.
        mtime: Of the last modification, ISO 8601 in UTC; None where the store has none.
    """

    uri: str
    size_bytes: int | None
    etag: str | None
    mtime: str | None


def list_objects(pattern: str) -> Iterator[ObjectInfo]:
    """Lists what `pattern` names, sorted by URI, with one listing request (and one to see what it is).

    Args:
        pattern: A file; a folder, searched through for names with one of `AUDIO_EXTENSIONS`; or a glob (`*`, `?`,
            `[ab]`, `**`), which matches files of any name. What exists under this very name is no glob.

    Raises:
        Rejected: not_found for a file or folder that does not exist, permission_denied, or unreadable. A glob that
            matches nothing yields nothing.
    """
    fs, path = _locate(pattern)
    return iter(retried(lambda: _list(fs, path, pattern), pattern, Stage.LIST))


def stat(uri: str) -> ObjectInfo:
    """What the store says of one object. Raises Rejected: not_found, permission_denied or unreadable."""
    fs, path = _locate(uri)
    return _object_info(fs, retried(lambda: fs.info(path), uri, Stage.READ))


def open_input(uri: str, *, size_bytes: int | None = None) -> BinaryIO:
    """Opens an object for reading: seekable, every read tried up to five times.

    It reads ahead by 64 KiB at first, and further the longer it is read in one go, up to 4 MiB: a header takes few
    bytes, wherever in the file it is, and a body few requests.

    Args:
        uri: A URL, or a local path.
        size_bytes: Where the listing stated it; saves a request on most stores.

    Raises:
        Rejected: not_found, permission_denied or unreadable; from every read, too.
    """
    fs, path = _locate(uri)
    raw = retried(lambda: _open(fs, path, size_bytes), uri, Stage.READ)
    block_bytes = _BLOCK_BYTES if _is_local(fs) else _FIRST_BYTES
    return cast(BinaryIO, io.BufferedReader(_RetriedReads(raw, uri), block_bytes))


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises as `open_input`."""
    fs, path = _locate(uri)
    return bytes(retried(lambda: fs.cat_file(path), uri, Stage.READ))


def write_atomic(uri: str, data: bytes) -> None:
    """Writes an object so that a reader sees all of it or none; replaces what is there.

    A local file is written beside its name, synced and renamed; missing folders are made. A store gets one PUT.

    Raises:
        StorageError: After the tries are used up, or at once where another try is no use.
    """
    fs, path = _locate(uri)
    try:
        tries()(_write_local if _is_local(fs) else fs.pipe_file, path, data)
    except Exception as error:
        raise StorageError(f"{uri} cannot be written: {cause(error)}. {advice(error)}") from error


def delete(uri: str) -> None:
    """Deletes one object; one that is not there is no error. Raises as `write_atomic`."""
    fs, path = _locate(uri)
    try:
        tries()(fs.rm_file, path)
    except FileNotFoundError:
        return
    except Exception as error:
        raise StorageError(f"{uri} cannot be deleted: {cause(error)}. {advice(error)}") from error


def list_files(folder: str) -> list[str]:
    """URIs of all files below `folder`, sorted; none where there is no such folder."""
    return [info.uri for info in find_files(folder)]


def find_files(folder: str) -> list[ObjectInfo]:
    """All files below `folder`, sorted by URI; none where there is no such folder."""
    fs, path = _locate(folder)
    try:
        return retried(lambda: _find(fs, path), folder, Stage.LIST)
    except Rejected as rejected:
        if rejected.reason is Reason.NOT_FOUND:
            return []
        raise


def check_writable(folder: str) -> None:
    """Writes a small marker below `folder` and removes it, so that a job fails before its work and not after.

    Raises:
        StorageError: Names the folder, the cause and what to do.
    """
    try:
        marker = join(folder, f".af3pipe-{uuid.uuid4().hex}")
        write_atomic(marker, b"af3pipe was here\n")
        delete(marker)
    except Exception as error:
        first = error.__cause__ or error
        raise StorageError(f"The folder {folder} is not writable: {cause(first)}. {advice(first)}") from error


def join(base: str, *parts: str) -> str:
    """Joins a URL or a local path with names below it: `join("s3://bucket/out/", "captions")`."""
    stem = base if base.endswith("://") else base.rstrip("/") + "/"
    return stem + "/".join(part.strip("/") for part in parts)


def name(uri: str) -> str:
    """What stands behind the last slash."""
    return uri.rstrip("/").rpartition("/")[2]


def parent(uri: str) -> str:
    """The folder of an object: `s3://bucket/lists` for `s3://bucket/lists/a.csv`; of a bare name, the current one."""
    return uri.rstrip("/").rpartition("/")[0] or ("/" if uri.startswith("/") else ".")


def resolve(named: str, folder: str) -> str:
    """`named` where it is a URL or an absolute path, else what it names below `folder`."""
    if "://" in named or ("://" in folder and not named.startswith(("/", "~"))):
        return named if "://" in named else join(folder, named.removeprefix("./"))
    return str(Path(folder, Path(named).expanduser()).absolute())


def canonical(uri: str) -> str:
    """A URI as listings spell it: a local path absolute, a URL without aliases and slashes at its end."""
    fs, path = _locate(uri)
    return str(path if _is_local(fs) else fs.unstrip_protocol(path)).rstrip("/")


def _is_local(fs: Any) -> bool:
    return "file" in _protocols(fs)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _locate(uri: str) -> tuple[Any, str]:
    # Without "://" it is a path, whatever else is in it: fsspec would take "::" for a chain of stores.
    if "://" not in uri:
        return _LocalFiles(), str(Path(uri).expanduser().absolute())
    fs, path = fsspec.core.url_to_fs(uri)
    return (_LocalFiles() if _is_local(fs) else fs), path


class _LocalFiles(LocalFileSystem):
    """Local files, with nothing passed over in silence.

    fsspec takes a link to a file for no file, leaves broken links out, and leaves out folders that may not be read,
    below the first level even where it is asked not to. Links to folders are not followed: they may lead in circles.
    """

    def walk(self, path: str, maxdepth: int | None = None, topdown: bool = True, **kwargs: Any) -> Any:
        return super().walk(path, maxdepth, topdown, **{**kwargs, "on_error": self._raise_unless_gone})

    @staticmethod
    def _raise_unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    def info(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().info(path, **kwargs)
        if found["islink"] and isinstance(path, os.DirEntry):
            try:
                target = super().info(path.path, **kwargs)
            except FileNotFoundError:
                return {**found, "type": "file"}  # broken: a dead letter will name it
            return {**target, "type": "other" if target["type"] == "directory" else target["type"]}
        return found


def _list(fs: Any, path: str, pattern: str) -> list[ObjectInfo]:
    fs.invalidate_cache()
    try:
        info = fs.info(path)
    except FileNotFoundError:
        if not any(character in path for character in "*?["):
            raise
        matches = fs.glob(path, detail=True)
        return _sorted_files(fs, matches.values())
    if info["type"] != "directory":
        return [_object_info(fs, info)]
    return [found for found in _find(fs, path) if _extension(found.uri) in AUDIO_EXTENSIONS]


def _find(fs: Any, path: str) -> list[ObjectInfo]:
    fs.invalidate_cache()
    return _sorted_files(fs, fs.find(path, detail=True).values())


def _sorted_files(fs: Any, infos: Any) -> list[ObjectInfo]:
    # Neither are pipes and sockets, which would block, nor the empty objects that stand for folders in a store.
    files = [info for info in infos if info["type"] == "file" and not info["name"].endswith("/")]
    return sorted(_object_info(fs, info) for info in files)


def _extension(uri: str) -> str:
    return Path(uri).suffix[1:].lower()


def _object_info(fs: Any, info: dict[str, Any]) -> ObjectInfo:
    name = info["name"]
    uri = name if _is_local(fs) else fs.unstrip_protocol(name)
    etag = next((info[key] for key in ("etag", "ETag", "e_tag") if info.get(key)), None)
    size = info.get("size")
    return ObjectInfo(
        uri=uri,
        size_bytes=None if size is None else int(size),
        etag=None if etag is None else str(etag).strip('"'),
        mtime=_mtime(info),
    )


def _mtime(info: dict[str, Any]) -> str | None:
    keys = ("mtime", "LastModified", "last_modified", "updated", "created")
    value = next((info[key] for key in keys if info.get(key) is not None), None)
    if isinstance(value, (int, float)):
        value = datetime.fromtimestamp(value, timezone.utc)
    if isinstance(value, str):
        value = datetime.fromisoformat(value.replace("Z", "+00:00"))  # Python 3.10 knows no Z
    if not isinstance(value, datetime):
        return None
    aware = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
    return aware.astimezone(timezone.utc).isoformat()


def _open(fs: Any, path: str, size_bytes: int | None) -> Any:
    if _is_local(fs):
        return Path(path).open("rb", buffering=0)
    known = {"size": size_bytes} if size_bytes and _SIZED_STORES.intersection(_protocols(fs)) else {}
    handle = fs.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="none", **known)
    if isinstance(handle, io.BytesIO):
        # The memory store hands out its own object, whose position all readers would share.
        return io.BytesIO(handle.getbuffer())
    if handle.seekable():
        return handle
    copy = tempfile.SpooledTemporaryFile(_STREAMS_IN_MEMORY_BYTES)  # noqa: SIM115  (the caller closes it)
    with handle:  # a web server that knows no ranges
        shutil.copyfileobj(handle, copy, _BLOCK_BYTES)
    copy.seek(0)
    return copy


class _RetriedReads(io.RawIOBase):
    """A file whose reads are tried again, each from where it began, and which reads ahead."""

    def __init__(self, handle: Any, uri: str) -> None:
        self._handle = handle
        self._uri = uri
        self._position = 0
        self._held = b""
        self._held_from = 0
        self._ahead_bytes = _FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        if not isinstance(self._handle, io.FileIO):  # asking others may have them write to a disk what is in memory
            raise io.UnsupportedOperation("fileno")
        return self._handle.fileno()

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:  # the handle stands elsewhere: it has read ahead
            offset, whence = self._position + offset, io.SEEK_SET
        self._position = int(self._handle.seek(offset, whence))
        return self._position

    def readinto(self, buffer: Any) -> int:
        if not self._held_from <= self._position < self._held_from + len(self._held):
            self._fetch(len(buffer))
        start = self._position - self._held_from
        data = self._held[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, wanted: int) -> None:
        goes_on = self._held and self._position == self._held_from + len(self._held)
        self._ahead_bytes = min(4 * self._ahead_bytes, _MOST_AHEAD_BYTES) if goes_on else _FIRST_BYTES
        size = max(wanted, self._ahead_bytes)
        self._held = retried(lambda: self._read(size), self._uri, Stage.READ)
        self._held_from = self._position

    def _read(self, size: int) -> bytes:
        # After a failed read the handle may stand anywhere.
        if self._handle.tell() != self._position:
            self._handle.seek(self._position)
        return bytes(self._handle.read(size))

    def close(self) -> None:
        if not self.closed:
            self._handle.close()
        super().close()


def _write_local(path: str, data: bytes) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic on one file system only; hidden, so that no glob picks it up.
    beside = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
