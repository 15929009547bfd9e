"""Reads, lists and writes objects on any store that fsspec knows, with retries, and writes them atomically.

A local file's URI is its plain absolute path; every other one is a full URL. Nothing is decoded or unquoted, so
names with spaces, umlauts, `#`, `?` or `[` are what the store calls them.
"""

import io
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage import members, names
from af3pipe.storage.listing import list_wanted
from af3pipe.storage.names import join, name, parent, resolve
from af3pipe.storage.objects import ObjectInfo, object_info
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
from af3pipe.storage.versions import VersionedFile, version_check
from af3pipe.storage.walk import Wanted, has_wildcard

__all__ = [
    "AUDIO_EXTENSIONS",
    "CredentialsError",
    "ObjectInfo",
    "StorageError",
    "StorageOptions",
    "VersionedFile",
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
    "open_version",
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


def list_objects(pattern: str, exclude: Sequence[str] = ()) -> Iterator[ObjectInfo]:
    """Lists what `pattern` names, in no order, while the store is still answering.

    Folders are listed side by side, and only a few thousand objects are held at a time. Closing the iterator stops
    the listing. Links to local folders are followed, and each folder is listed once, whatever links lead to it.

    Args:
        pattern: A file; a folder, searched through for names with one of `AUDIO_EXTENSIONS`; or a glob (`*`, `?`,
            `[ab]`, `**`), which matches files of any name. What exists under this very name is no glob.
        exclude: Folders, local or URLs, that nothing is listed of or below, such as an output below the input. A file
            that `pattern` itself names is given all the same.

    Raises:
        Rejected: not_found for a file, a folder or a bucket that does not exist, permission_denied, unreadable, or
            unsupported_format for a name that its store cannot have; after what was listed so far, where it happens
            in the middle. A glob that matches nothing yields nothing.
        CredentialsError: The store does not know who asks.
    """
    fs, path = _locate(pattern, Stage.LIST)
    excluded = _excluded(fs, pattern, exclude)
    try:
        found = _info(fs, path, pattern, Stage.LIST)
    except Rejected as rejected:
        if rejected.reason is not Reason.NOT_FOUND or not has_wildcard(path):
            raise
        yield from list_wanted(fs, Wanted(path, is_glob=True, exclude=excluded), pattern)
        return
    if found["type"] != "directory":
        yield object_info(fs, found)
        return
    below = list_wanted(fs, Wanted(path, is_glob=False, exclude=excluded), pattern)
    yield from (info for info in below if _extension(info.uri) in AUDIO_EXTENSIONS)


def _excluded(fs: Any, pattern: str, exclude: Sequence[str]) -> list[str]:
    """The excluded folders that are in this store, in its words."""
    if _is_local(fs):
        return [names.canonical(folder) for folder in exclude if names.is_local(folder)]
    kind = names.scheme(pattern)
    return [str(fs._strip_protocol(names.canonical(folder))) for folder in exclude if names.scheme(folder) == kind]


def stat(uri: str) -> ObjectInfo:
    """Asks the store about one object. Raises Rejected as `open_input`."""
    if (member := members.find(uri)) is not None:
        return members.stat(member)
    fs, path = _locate(uri)
    return object_info(fs, _info(fs, path, uri, Stage.READ))


def open_version(listed: ObjectInfo) -> VersionedFile:
    """Opens an object as it was listed: `with storage.open_version(info) as file:`. It reads as `open_input` does.

    In S3 and Google Cloud Storage every read is of the listed etag or generation. A local file's size and time are
    compared when it is opened and when it is left, an object's of any other store when it is left. What was not
    listed (None) is not compared.

    Args:
        listed: As `list_objects` or `stat` gave it: of a member of a container (`x.tar#offset=...`), with the etag of
            its shard.

    Raises:
        Rejected: changed, where it is not what was listed: from opening, from each read, and from leaving the `with`
            block. Read nothing into what was read then: `stat` it and open it again. Else as `open_input`.
        CredentialsError: As `open_input`.
    """
    if (member := members.find(listed.uri)) is not None:
        return members.open_member_version(member, listed)
    fs, path = _locate(listed.uri)
    raw = open_raw(fs, path, listed.uri, listed.size_bytes, listed.etag)
    try:
        check = version_check(fs, path, listed, raw)
    except BaseException:
        raw.close()
        raise
    block_bytes = BLOCK_BYTES if _is_local(fs) else FIRST_BYTES
    return VersionedFile(RetriedReads(raw, listed.uri), block_bytes, check)


def open_input(uri: str, *, size_bytes: int | None = None) -> BinaryIO:
    """Opens an object for reading: seekable, every read tried up to five times.

    It reads ahead by 64 KiB at first, and further the longer it is read in one go, up to 4 MiB: a header takes few
    bytes, wherever in the file it is, and a body few requests.

    Args:
        uri: A URL, or a local path.
        size_bytes: Where the listing stated it; saves a request on most stores.

    Raises:
        Rejected: not_found, permission_denied, archived, unreadable, or unsupported_format for a name that its store
            cannot have; from every read, too, and changed where S3 has another version by then.
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


def canonical(uri: str) -> str:
    """Returns the one spelling of a URI that identifies an object; of a member (`x.tar#offset=...`), its container's.

    See `names.canonical` for what is alike. About 20 us for a local path, 3 us for a URL; listings give it as
    `ObjectInfo.canonical` at no cost.
    """
    if "#" in uri and (member := members.parse(uri)) is not None and not members.is_file(uri):
        return member._replace(container=names.canonical(member.container)).uri
    return names.canonical(uri)


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
