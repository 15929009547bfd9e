"""Reads, lists and writes objects on any fsspec store, with retries and atomic writes.

A local file's URI is its plain absolute path; every other one is a full URL. Nothing is percent-decoded: names with
spaces, umlauts, `#`, `?` or `[` are spelled as in the store.
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
    # Without a header: see audio.headers.HEADERLESS.
    "al alaw alw g722 mulaw sln sln8 sln12 sln16 sln24 sln32 sln44 sln48 sln96 sln192 ul ulaw ulw"
)
AUDIO_EXTENSIONS = frozenset(_EXTENSIONS.split())
"""Lower-case extensions, without the dot, by which audio and video files in a folder are recognised."""


def list_objects(pattern: str, exclude: Sequence[str] = ()) -> Iterator[ObjectInfo]:
    """Lists the objects that `pattern` matches, in no order, while the store is still responding.

    Folders are listed in parallel, and only a few thousand objects are in memory at a time. Closing the iterator
    stops the listing. Links to local folders are followed, and each folder is listed once, whatever links lead to it.

    Args:
        pattern: A file; a folder, searched through for names with one of `AUDIO_EXTENSIONS`; or a glob (`*`, `?`,
            `[ab]`, `**`), which matches files of any name. The name of an existing object is not taken as a glob.
        exclude: Folders, local or URLs, to skip, such as an output below the input. A file that `pattern` names
            is listed all the same.

    Raises:
        Rejected: not_found for a file, a folder or a bucket that does not exist, permission_denied, unreadable, or
            unsupported_format for a name that its store cannot have. An error in the middle is raised after what was
            listed so far. A glob that matches nothing yields nothing.
        CredentialsError: The store rejects the credentials.
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
    """Returns the excluded folders that are in this store, as its file system spells them."""
    if _is_local(fs):
        return [names.canonical(folder) for folder in exclude if names.is_local(folder)]
    kind = names.scheme(pattern)
    return [str(fs._strip_protocol(names.canonical(folder))) for folder in exclude if names.scheme(folder) == kind]


def stat(uri: str) -> ObjectInfo:
    """Requests an object's metadata from its store. Raises Rejected as `open_input`."""
    if (member := members.find(uri)) is not None:
        return members.stat(member)
    fs, path = _locate(uri)
    return object_info(fs, _info(fs, path, uri, Stage.READ))


def open_version(listed: ObjectInfo) -> VersionedFile:
    """Opens the listed version of an object: `with storage.open_version(info) as file:`. Reads as `open_input` does.

    In S3 and Google Cloud Storage every read is of the listed etag or generation. A local file's size and time are
    compared when it is opened and at the end of the `with` block, those of objects on other stores only at the end.
    Fields that are None are not compared.

    Args:
        listed: What `list_objects` or `stat` returned; for a member of a container (`x.tar#offset=...`), with the
            etag of its shard.

    Raises:
        Rejected: changed, if it is not the listed version: from opening, from each read, and at the end of the `with`
            block. Discard what was read then: `stat` it and open it again. Else as `open_input`.
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
    """Opens an object for reading: seekable, with up to five attempts for each read.

    It reads ahead 64 KiB at first, and up to 4 MiB while reads are sequential: so a header costs few bytes, wherever
    in the file it is, and a body few requests.

    Args:
        uri: A URL, or a local path.
        size_bytes: Size, if known from a listing; saves a request on most stores.

    Raises:
        Rejected: not_found, permission_denied, archived, unreadable, or unsupported_format for a name that its store
            cannot have. Reads raise the same, and changed if S3 has another version by then.
        CredentialsError: The store rejects the credentials. Reads raise it, too.
    """
    if (member := members.find(uri)) is not None:
        return members.open_member(member)
    fs, path = _locate(uri)
    raw = open_raw(fs, path, uri, size_bytes)
    block_bytes = BLOCK_BYTES if _is_local(fs) else FIRST_BYTES
    return cast(BinaryIO, io.BufferedReader(RetriedReads(raw, uri), block_bytes))


def read_bytes(uri: str) -> bytes:
    """Reads a whole object. Raises as `open_input`."""
    if members.find(uri) is not None:
        with open_input(uri) as file:
            return file.read()
    fs, path = _locate(uri)
    if is_bucket(fs):  # by ranges, each retried separately
        with open_input(uri) as file:
            return file.read()
    return bytes(retried(lambda: fs.cat_file(path), uri, Stage.READ))


def write_atomic(uri: str, data: bytes) -> None:
    """Writes an object so that readers see all of it or none; replaces an existing one.

    A local file is written under a temporary name, synced and renamed; missing folders are created. Object stores get
    one PUT.

    Raises:
        StorageError: All attempts failed, or the error is not temporary.
    """
    fs, path = _locate(uri)
    try:
        tries(uri)(_write_local if _is_local(fs) else fs.pipe_file, path, data)
    except Exception as error:
        raise _unusable(error, uri, "written") from error


def delete(uri: str) -> None:
    """Deletes an object; a missing one is no error. Raises as `write_atomic`."""
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
    """Returns the URIs of all files below `folder`, sorted; none if the folder does not exist."""
    return [info.uri for info in find_files(folder)]


def find_files(folder: str, prefix: str = "") -> list[ObjectInfo]:
    """Returns all files below `folder`, sorted by URI; none if the folder does not exist.

    Args:
        folder: A URL, or a local path.
        prefix: Only files whose path below the folder starts with this. Object stores list no others, so few files
            take one request.
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
    """Writes and deletes a small file below `folder`, so that a job fails before its work and not after.

    Raises:
        StorageError: The folder is not writable; the message says why and what to do.
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
    """Returns the one canonical spelling of an object's URI; for a member (`x.tar#offset=...`), with its container's.

    See `names.canonical` for the rules. Takes about 20 us for a local path, 3 us for a URL; listings give it as
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
