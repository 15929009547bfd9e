"""Listings that arrive page by page, from many folders at once, and are never held as a whole."""

import itertools
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from fsspec.utils import glob_translate

from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage.retry import explained, retried
from af3pipe.storage.stores import is_local, protocols

_THREADS = 16
_PAGE = 1000
"""Entries that S3 and Google Cloud Storage tell in one answer, at most."""
_MOST_PAGES = _THREADS // 2
_MOST_ENTRIES = 100
"""Of a folder on a disk at a time: quickly told again, and of each thread some may wait."""
_WILD = re.compile(r"[*?\[]")


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


def has_wildcard(path: str) -> bool:
    """Whether it may be a glob."""
    return _WILD.search(path) is not None


class Wanted:
    """Which files of a store are meant: all below a folder, or those that a glob matches.

    Args:
        path: Of the folder, or the glob.
        is_glob: Which of the two it is.
        prefix: Of a folder, only the files whose path below it begins so.

    Attributes:
        stem: What all their names begin with: as much as need be listed.
    """

    def __init__(self, path: str, *, is_glob: bool, prefix: str = "") -> None:
        self._parts = path.split("/")
        self._first_stars = len(self._parts)
        self._files: re.Pattern[str] | None = None
        if not is_glob:
            self.stem = (f"{path.rstrip('/')}/" if path else "") + prefix
            self._begins = self.stem if prefix else ""
            return
        self.stem = _WILD.split(path, maxsplit=1)[0]
        self._first_stars = self._parts.index("**") if "**" in self._parts else len(self._parts) + 1
        self._files = re.compile(glob_translate(path))
        last = min(self._first_stars, len(self._parts) - 1)
        self._folders = [re.compile(glob_translate("/".join(self._parts[:depth]))) for depth in range(last + 1)]

    def has_file(self, name: str) -> bool:
        """Whether a file of this name, in the store's words, is meant."""
        return name.startswith(self._begins) if self._files is None else self._files.match(name) is not None

    def is_deep(self, stem: str) -> bool:
        """Whether files may be meant however deep below it they are."""
        return self._files is None or stem.count("/") >= self._first_stars

    def goes_into(self, folder: str) -> bool:
        """Whether there may be such files below a folder, named without a slash at its end."""
        if self._files is None:
            return f"{folder}/".startswith(self._begins)
        if (depth := folder.count("/") + 1) > self._first_stars:
            return True
        return depth < len(self._folders) and self._folders[depth].match(folder) is not None


_Task = TypeVar("_Task")
_Page = tuple[list[ObjectInfo], list[_Task]]


class _Walk(Generic[_Task]):
    """Threads that list folders side by side, into a queue that they wait for when it is full."""

    def __init__(self, first: _Task, pages: Callable[[_Task], Iterator[_Page[_Task]]]) -> None:
        self._pages = pages
        self._changed = threading.Condition()
        # The last one first, so that few wait at a time.
        self._todo = [first]
        self._busy = 0
        self._threads = 0
        self._ready: deque[list[ObjectInfo]] = deque()
        self._error: BaseException | None = None
        self._is_over = False

    def __iter__(self) -> Iterator[ObjectInfo]:
        try:
            with self._changed:
                self._start_threads()
            while (page := self._next()) is not None:
                yield from page
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _next(self) -> list[ObjectInfo] | None:
        with self._changed:
            while not self._ready and self._error is None and (self._todo or self._busy):
                self._changed.wait()
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            return None

    def _start_threads(self) -> None:
        for _ in range(min(len(self._todo), _THREADS - self._threads)):
            self._threads += 1
            threading.Thread(target=self._work, name="af3pipe-list", daemon=True).start()

    def _work(self) -> None:
        while (task := self._take()) is not None:
            error = None
            try:
                for found, more in self._pages(task[0]):
                    if not self._put(found, more):
                        break
            except BaseException as raised:  # noqa: BLE001 - raised again on the caller's thread
                error = raised
            with self._changed:
                self._busy -= 1
                if error is not None:
                    self._error = self._error or error
                    self._is_over = True
                self._changed.notify_all()

    def _take(self) -> tuple[_Task] | None:
        with self._changed:
            while not self._todo and self._busy and not self._is_over:
                self._changed.wait()
            if self._is_over or not self._todo:
                return None
            self._busy += 1
            return (self._todo.pop(),)

    def _put(self, found: list[ObjectInfo], more: list[_Task]) -> bool:
        with self._changed:
            self._todo.extend(reversed(more))
            self._start_threads()
            if more:
                self._changed.notify_all()
            while len(self._ready) >= _MOST_PAGES and not self._is_over:
                self._changed.wait()
            if found and not self._is_over:
                self._ready.append(found)
                self._changed.notify_all()
            return not self._is_over


def list_wanted(fs: Any, wanted: Wanted, uri: str) -> Iterator[ObjectInfo]:
    """The files that are meant, in no order, as they are told.

    Raises:
        Rejected: Some folder cannot be listed; what was told before is whole, but not all.
    """
    if is_local(fs):
        top = _LocalFolder(_folder_of(wanted.stem) or "/", ())
        return iter(_Walk(top, lambda task: _local_pages(fs, wanted, task)))
    flat = next((_FLAT[protocol] for protocol in protocols(fs) if protocol in _FLAT), None)
    if flat is None:
        fs.invalidate_cache()
        first = _folder_of(wanted.stem) + ("/" if "http" in protocols(fs) else "")
        return iter(_Walk(first, lambda task: _other_pages(fs, wanted, uri, task)))
    bucket, _, stem = wanted.stem.partition("/")

    def page(stem: str, by_folder: bool, token: str | None) -> _Told:
        return retried(lambda: flat(fs, bucket, stem, "/" if by_folder else "", token), uri, Stage.LIST)

    return iter(_Walk(stem, lambda task: _bucket_pages(fs, wanted, bucket, task, page)))


def _folder_of(stem: str) -> str:
    return stem.rpartition("/")[0]


class _Told(NamedTuple):
    """One answer of a store: objects, as fsspec describes them, and folders below, with a slash; and how to go on."""

    objects: list[dict[str, Any]]
    folders: list[str]
    token: str | None


def _s3_page(fs: Any, bucket: str, stem: str, delimiter: str, token: str | None) -> _Told:
    more = {"ContinuationToken": token} if token else {}
    told = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=stem, Delimiter=delimiter, **more)
    objects = [{**found, "name": found["Key"], "size": found["Size"]} for found in told.get("Contents", ())]
    folders = [found["Prefix"] for found in told.get("CommonPrefixes", ())]
    return _Told(objects, folders, told["NextContinuationToken"] if told.get("IsTruncated") else None)


def _gcs_page(fs: Any, bucket: str, stem: str, delimiter: str, token: str | None) -> _Told:
    asked = {"prefix": stem, "delimiter": delimiter, "pageToken": token, "maxResults": _PAGE}
    told = fs.call("GET", "b/{}/o", bucket, json_out=True, **{key: value for key, value in asked.items() if value})
    return _Told(told.get("items", []), told.get("prefixes", []), told.get("nextPageToken"))


# Their own calls, since s3fs and gcsfs hold a whole listing, and all they ever listed, in memory.
_FLAT: dict[str, Callable[[Any, str, str, str, str | None], _Told]] = {"s3": _s3_page, "gs": _gcs_page}


def _bucket_pages(
    fs: Any, wanted: Wanted, bucket: str, stem: str, page: Callable[[str, bool, str | None], _Told]
) -> Iterator[_Page[str]]:
    """All below `stem`: a small folder by one request; a large one by its folders, side by side where that pays."""
    by_folder = not wanted.is_deep(f"{bucket}/{stem}")
    told = page(stem, by_folder, None)
    if not by_folder and told.token is not None:
        beyond = [found["name"][len(stem) :] for found in told.objects]
        below = {name.partition("/")[0] for name in beyond if "/" in name}
        # A request for each of many small folders takes longer than one after the other for all of them.
        if len(below) * _THREADS <= _PAGE:
            by_folder = True
            told = page(stem, by_folder, None)
    seen: set[str] = set()
    while True:
        named = [{**found, "name": f"{bucket}/{found['name']}"} for found in told.objects]
        files = [object_info(fs, found) for found in named if _is_meant(wanted, found["name"])]
        # Some servers name a folder on each page that its objects would be on.
        folders = [name for name in told.folders if name not in seen and wanted.goes_into(f"{bucket}/{name[:-1]}")]
        seen.update(folders)
        yield files, folders
        if told.token is None:
            return
        told = page(stem, by_folder, told.token)


def _is_meant(wanted: Wanted, name: str) -> bool:
    # Empty objects stand for folders in a store.
    return not name.endswith("/") and wanted.has_file(name)


def _other_pages(fs: Any, wanted: Wanted, uri: str, folder: str) -> Iterator[_Page[str]]:
    try:
        told = retried(lambda: fs.ls(folder, detail=True), uri, Stage.LIST)
    except Rejected as rejected:
        if rejected.reason is not Reason.NOT_FOUND:  # it has gone meanwhile, or a glob names none
            raise
        return
    fs.dircache.pop(folder, None)  # or everything that was ever listed stays in memory
    if "http" in protocols(fs):  # a page may link to anything
        told = [found for found in told if found["name"].startswith(folder)]
    names = [found["name"] for found in told if found["type"] == "directory" and found["name"] != folder]
    folders = [name for name in names if wanted.goes_into(name.rstrip("/"))]
    files = [object_info(fs, found) for found in told if found["type"] == "file" and _is_meant(wanted, found["name"])]
    yield files, folders


class _LocalFolder(NamedTuple):
    """A folder, and device and inode of those above it: a link to one of them leads in a circle."""

    path: str
    above: tuple[tuple[int, int], ...]


def _local_pages(fs: Any, wanted: Wanted, folder: _LocalFolder) -> Iterator[_Page[_LocalFolder]]:
    def scan() -> tuple[tuple[int, int], Any]:
        found = Path(folder.path).stat()
        return (found.st_dev, found.st_ino), os.scandir(folder.path)

    try:
        own, entries = retried(scan, folder.path, Stage.LIST)
    except Rejected as rejected:
        if rejected.reason is not Reason.NOT_FOUND:  # it has gone meanwhile, or a glob names none
            raise
        return
    above = (*folder.above, own)
    with entries:
        while own not in folder.above:
            try:
                found = [(entry.path, _followed(entry)) for entry in itertools.islice(entries, _MOST_ENTRIES)]
            except OSError as error:  # another try would begin with the first entry again
                raise explained(error, folder.path, Stage.LIST) or error from error
            below = [path for path, info in found if info and stat.S_ISDIR(info.st_mode) and wanted.goes_into(path)]
            files = [
                object_info(fs, {"name": path, "size": info.st_size, "mtime": info.st_mtime})
                for path, info in found
                if info and _is_file(info) and wanted.has_file(path)
            ]
            yield files, [_LocalFolder(path, above) for path in below]
            if len(found) < _MOST_ENTRIES:
                return


def _is_file(info: os.stat_result) -> bool:
    # A pipe or a socket would block. A broken link is a file: a dead letter will name it.
    return stat.S_ISREG(info.st_mode) or stat.S_ISLNK(info.st_mode)


def _followed(entry: "os.DirEntry[str]") -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        try:
            return entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # gone meanwhile
            return None


def object_info(fs: Any, info: dict[str, Any]) -> ObjectInfo:
    """What fsspec's file systems tell of a file, each in its own words."""
    name = info["name"]
    uri = name if is_local(fs) else fs.unstrip_protocol(name)
    etag = next((info[key] for key in ("etag", "ETag", "e_tag", "blob_id") if info.get(key)), None)
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
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))  # Python 3.10 knows no Z
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    aware = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
    return aware.astimezone(timezone.utc).isoformat()
