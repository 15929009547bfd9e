"""URIs to bytes and back, on any store that fsspec knows: list, stat, open with retries, write atomically.

A local file's URI is its plain absolute path; every other one is a full URL. Nothing is decoded or unquoted, so
names with spaces, umlauts, `#`, `?` or `[` are what the store calls them.
"""

import io
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage import members
from af3pipe.storage.listing import ObjectInfo, Wanted, has_wildcard, list_wanted, object_info
from af3pipe.storage.options import StorageOptions, check_options, set_options
from af3pipe.storage.reading import BLOCK_BYTES, FIRST_BYTES, RetriedReads, is_bucket, open_raw
from af3pipe.storage.retry import (
    CredentialsError,
    StorageError,
    advice,
    cause,
    check_credentials,
    retried,
    take_retries,
    tries,
)
from af3pipe.storage.secrets import redact, redact_values
from af3pipe.storage.stores import info as _info
from af3pipe.storage.stores import is_local as _is_local
from af3pipe.storage.stores import locate as _locate

__all__ = [
    "AUDIO_EXTENSIONS",
    "CredentialsError",
    "ObjectInfo",
    "StorageError",
    "StorageOptions",
    "canonical",
    "check_options",
    "check_writable",
    "delete",
    "find_files",
    "join",
    "list_files",
    "list_objects",
    "name",
    "open_input",
    "parent",
    "read_bytes",
    "redact",
    "redact_values",
    "resolve",
    "set_options",
    "stat",
    "take_retries",
    "write_atomic",
]

_EXTENSIONS = (
    "3g2 3gp aac ac3 aif aifc aiff alac amr ape asf au avi awb bwf caf dff dsf dts eac3 f4v flac flv gsm m2ts m4a "
    "m4b m4r m4v mka mkv mov mp1 mp2 mp3 mp4 mpc mpeg mpg mts mxf oga ogg ogv opus ra rf64 snd sph spx tta ts vob "
    "voc w64 wav wave weba webm wma wmv wv "
    # Without a header: audio.headers.HEADERLESS says what they hold.
    "al alaw alw g722 mulaw sln sln8 sln12 sln16 sln24 sln32 sln44 sln48 sln96 sln192 ul ulaw ulw"
)
AUDIO_EXTENSIONS = frozenset(_EXTENSIONS.split())
"""Lower-case extensions, without the dot, by which audio and video are told from the rest of a folder."""


def list_objects(pattern: str) -> Iterator[ObjectInfo]:
    """Lists what `pattern` names, in no order, while the store still tells it.

    Folders are listed side by side, and only a few thousand objects are held at a time. Whoever stops early stops
    the listing. Links to folders are followed, unless they lead back to a folder that they are in.

    Args:
        pattern: A file; a folder, searched through for names with one of `AUDIO_EXTENSIONS`; or a glob (`*`, `?`,
            `[ab]`, `**`), which matches files of any name. What exists under this very name is no glob.

    Raises:
        Rejected: not_found for a file, a folder or a bucket that does not exist, permission_denied, or unreadable;
            after what was told so far, where it happens in the middle. A glob that matches nothing yields nothing.
        CredentialsError: The store does not know who asks.
    """
    fs, path = _locate(pattern)
    try:
        found = _info(fs, path, pattern, Stage.LIST)
    except Rejected as rejected:
        if rejected.reason is not Reason.NOT_FOUND or not has_wildcard(path):
            raise
        yield from list_wanted(fs, Wanted(path, is_glob=True), pattern)
        return
    if found["type"] != "directory":
        yield object_info(fs, found)
        return
    below = list_wanted(fs, Wanted(path, is_glob=False), pattern)
    yield from (info for info in below if _extension(info.uri) in AUDIO_EXTENSIONS)


def stat(uri: str) -> ObjectInfo:
    """What the store says of one object. Raises Rejected: not_found, permission_denied or unreadable."""
    if (member := members.find(uri)) is not None:
        return members.stat(member)
    fs, path = _locate(uri)
    return object_info(fs, _info(fs, path, uri, Stage.READ))


def open_input(uri: str, *, size_bytes: int | None = None) -> BinaryIO:
    """Opens an object for reading: seekable, every read tried up to five times.

    It reads ahead by 64 KiB at first, and further the longer it is read in one go, up to 4 MiB: a header takes few
    bytes, wherever in the file it is, and a body few requests.

    Args:
        uri: A URL, or a local path.
        size_bytes: Where the listing stated it; saves a request on most stores.

    Raises:
        Rejected: not_found, permission_denied or unreadable; from every read, too.
        CredentialsError: The store does not know who asks; from every read, too.
    """
    if (member := members.find(uri)) is not None:
        return members.open_member(member)
    fs, path = _locate(uri)
    raw = open_raw(fs, path, uri, size_bytes)
    block_bytes = BLOCK_BYTES if _is_local(fs) else FIRST_BYTES
    return cast(BinaryIO, io.BufferedReader(RetriedReads(raw, uri), block_bytes))


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises as `open_input`."""
    if members.find(uri) is not None:
        with open_input(uri) as file:
            return file.read()
    fs, path = _locate(uri)
    if is_bucket(fs):  # by ranges, each tried again by itself
        with open_input(uri) as file:
            return file.read()
    return bytes(retried(lambda: fs.cat_file(path), uri, Stage.READ))


def write_atomic(uri: str, data: bytes) -> None:
    """Writes an object so that a reader sees all of it or none; replaces what is there.

    A local file is written beside its name, synced and renamed; missing folders are made. A store gets one PUT.

    Raises:
        StorageError: After the tries are used up, or at once where another try is no use.
    """
    fs, path = _locate(uri)
    try:
        tries(uri)(_write_local if _is_local(fs) else fs.pipe_file, path, data)
    except Exception as error:
        raise _unusable(error, uri, "written") from error


def delete(uri: str) -> None:
    """Deletes one object; one that is not there is no error. Raises as `write_atomic`."""
    fs, path = _locate(uri)
    try:
        tries(uri)(fs.rm_file, path)
    except FileNotFoundError:
        return
    except Exception as error:
        raise _unusable(error, uri, "deleted") from error


def _unusable(error: Exception, uri: str, done: str) -> StorageError:
    check_credentials(error, uri)
    return StorageError(redact(f"{uri} cannot be {done}: {cause(error)}. {advice(error)}"))


def list_files(folder: str) -> list[str]:
    """URIs of all files below `folder`, sorted; none where there is no such folder."""
    return [info.uri for info in find_files(folder)]


def find_files(folder: str, prefix: str = "") -> list[ObjectInfo]:
    """All files below `folder`, sorted by URI; none where there is no such folder.

    Args:
        folder: A URL, or a local path.
        prefix: Only those whose path below the folder begins so: a store lists no others, in one request where they
            are few.
    """
    fs, path = _locate(folder)
    try:
        if not prefix and _info(fs, path, folder, Stage.LIST)["type"] != "directory":
            return []
        return sorted(list_wanted(fs, Wanted(path, is_glob=False, prefix=prefix), folder))
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
    except CredentialsError:
        raise
    except Exception as error:
        first = error.__cause__ or error
        raise StorageError(redact(f"The folder {folder} is not writable: {cause(first)}. {advice(first)}")) from error


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


def _extension(uri: str) -> str:
    return Path(uri).suffix[1:].lower()


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
