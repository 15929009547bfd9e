"""Lists folders in parallel threads, page by page, into a bounded queue."""

import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from fsspec.utils import glob_translate

from af3pipe.storage.names import is_below
from af3pipe.storage.objects import ObjectInfo

THREADS = 16
_MOST_PAGES = THREADS // 2
_WILD = re.compile(r"[*?\[]")


def has_wildcard(path: str) -> bool:
    """Returns whether a path may be a glob."""
    return _WILD.search(path) is not None


class Wanted:
    """Decides which files of a store are wanted: all below a folder, or those that match a glob.

    Args:
        path: The folder or the glob, as the file system spells it.
        is_glob: Whether `path` is a glob.
        prefix: For a folder: only files whose path below it starts with this.
        exclude: Folders to skip, as the file system spells them, without a slash at their end.

    Attributes:
        stem: Common prefix of all wanted names: only names with it need to be listed.
        is_by_folder: Whether the file name alone decides, whatever folder it is in.
    """

    def __init__(self, path: str, *, is_glob: bool, prefix: str = "", exclude: Sequence[str] = ()) -> None:
        self._exclude = tuple(exclude)
        self.is_by_folder = True
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
        is_last = self._first_stars in (len(self._parts) - 2, len(self._parts) - 1)
        self.is_by_folder = is_last and self.stem.count("/") == self._first_stars
        last = min(self._first_stars, len(self._parts) - 1)
        self._folders = [re.compile(glob_translate("/".join(self._parts[:depth]))) for depth in range(last + 1)]

    def has_file(self, name: str) -> bool:
        """Returns whether a file of this name, as the file system spells it, is wanted."""
        is_wanted = name.startswith(self._begins) if self._files is None else self._files.match(name) is not None
        return is_wanted and not self.excludes(name)

    def is_deep(self, stem: str) -> bool:
        """Returns whether wanted files may be at any depth below `stem`."""
        return self._files is None or stem.count("/") >= self._first_stars

    def goes_into(self, folder: str) -> bool:
        """Returns whether a folder, given without a slash at its end, may contain wanted files."""
        if self.excludes(folder):
            return False
        if self._files is None:
            return f"{folder}/".startswith(self._begins)
        if (depth := folder.count("/") + 1) > self._first_stars:
            return True
        return depth < len(self._folders) and self._folders[depth].match(folder) is not None

    def excludes(self, name: str) -> bool:
        """Returns whether a name is an excluded folder, or below one."""
        return any(is_below(name, folder) for folder in self._exclude)


def folder_of(stem: str) -> str:
    """Returns the folder to list for all names with this prefix."""
    return stem.rpartition("/")[0]


_Task = TypeVar("_Task")
Page = tuple[list[ObjectInfo], list[_Task]]


class Walk(Generic[_Task]):
    """Lists folders in parallel threads, which wait while nobody consumes their results."""

    def __init__(self, first: _Task, pages: Callable[[_Task], Iterator[Page[_Task]]]) -> None:
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
        for _ in range(min(len(self._todo), THREADS - self._threads)):
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
