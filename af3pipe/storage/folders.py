"""Lists local folders; follows symbolic links, and lists each folder only once."""

import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage.names import canonical, is_below
from af3pipe.storage.objects import ObjectInfo, object_info
from af3pipe.storage.retry import explained, retried
from af3pipe.storage.walk import Page, Walk, Wanted, folder_of

_MOST_ENTRIES = 100
"""Of a folder at a time: quickly read again, and of each thread some may wait."""


class _Root(NamedTuple):
    """A folder where a walk begins: the requested one, or the target of a link.

    Attributes:
        path: Its path as found; the prefix of the names of everything in it.
        real: Its real path, without links.
        above: For each root through whose links it was reached: the real paths of that root and of the link's folder.
            A link to a folder between the two is a cycle.
    """

    path: str
    real: str
    above: tuple[tuple[str, str], ...] = ()

    def is_circle(self, real: str) -> bool:
        """Returns whether a link to this real path would be a cycle."""
        return any(is_below(real, top) and is_below(leaf, real) for top, leaf in self.above)


class _Folder(NamedTuple):
    path: str
    real: str


def list_local(fs: Any, wanted: Wanted) -> Iterator[ObjectInfo]:
    """Lists the wanted files, each under one name; follows links last, in the order of their names.

    So a file is listed under the name with the fewest links in it; of several such names, under the first.

    Raises:
        Rejected: A folder cannot be listed. Files listed before are valid, but not complete.
    """
    path = folder_of(wanted.stem) or "/"
    walks = _Walks(fs, wanted)
    roots = [_Root(path, os.path.realpath(path))]
    while roots:
        links: list[_Root] = []
        for root in roots:
            yield from walks.walk(root, links)
        roots = sorted(links)


class _Walks:
    """Consecutive walks, each of which skips what earlier ones have listed."""

    def __init__(self, fs: Any, wanted: Wanted) -> None:
        self._fs = fs
        self._wanted = wanted
        self._before: dict[str, list[_Root]] = {}  # by real path

    def walk(self, root: _Root, links: list[_Root]) -> Iterator[ObjectInfo]:
        """Lists one root, and queues the targets of the links in it."""
        yield from Walk(_Folder(root.path, root.real), lambda folder: self._pages(root, folder, links))
        self._before.setdefault(root.real, []).append(root)

    def _pages(self, root: _Root, folder: _Folder, links: list[_Root]) -> Iterator[Page[_Folder]]:
        names = self._names_before(folder.real)
        if root.is_circle(folder.real) or self._wanted.excludes(folder.real) or (names and self._wanted.is_by_folder):
            return
        try:
            entries = retried(lambda: os.scandir(folder.path), folder.path, Stage.LIST)
        except Rejected as rejected:
            if rejected.reason is not Reason.NOT_FOUND:  # it has gone meanwhile, or a glob names none
                raise
            return
        with entries:
            while True:
                try:
                    found = [(entry, _followed(entry)) for entry in itertools.islice(entries, _MOST_ENTRIES)]
                except OSError as error:  # another try would begin with the first entry again
                    raise explained(error, folder.path, Stage.LIST) or error from error
                below: list[_Folder] = []
                files: list[ObjectInfo] = []
                for entry, info in found:
                    if info is None:
                        continue
                    if stat.S_ISDIR(info.st_mode):
                        self._add_folder(root, folder, entry, below, links)
                    elif _is_file(info) and self._is_new(entry, names):
                        files.append(self._object(folder, entry, info))
                yield files, below
                if len(found) < _MOST_ENTRIES:
                    return

    def _add_folder(
        self, root: _Root, folder: _Folder, entry: "os.DirEntry[str]", below: list[_Folder], links: list[_Root]
    ) -> None:
        if not self._wanted.goes_into(entry.path):
            return
        if entry.is_symlink():
            above = (*root.above, (root.real, folder.real))
            links.append(_Root(entry.path, os.path.realpath(entry.path), above))
        else:
            below.append(_Folder(entry.path, _join(folder.real, entry.name)))

    def _is_new(self, entry: "os.DirEntry[str]", names: list[str]) -> bool:
        if not self._wanted.has_file(entry.path):
            return False
        return not any(self._wanted.has_file(_join(name, entry.name)) for name in names)

    def _object(self, folder: _Folder, entry: "os.DirEntry[str]", info: os.stat_result) -> ObjectInfo:
        real = canonical(entry.path) if entry.is_symlink() else _join(folder.real, entry.name)
        described = {"name": entry.path, "size": info.st_size, "mtime": info.st_mtime}
        return object_info(self._fs, described, real)

    def _names_before(self, real: str) -> list[str]:
        """Returns the names under which earlier walks reached a folder."""
        if not self._before:
            return []
        found = []
        folders = [real, *map(str, Path(real).parents)]
        for top in folders:
            for root in self._before.get(top, ()):
                inside = real[len(top) :].strip("/")
                if self._came_to(root, inside.split("/") if inside else []):
                    found.append(_join(root.path, inside) if inside else root.path)
        return found

    def _came_to(self, root: _Root, parts: list[str]) -> bool:
        path, real = root.path, root.real
        if root.is_circle(real):
            return False
        for part in parts:
            path, real = _join(path, part), _join(real, part)
            if not self._wanted.goes_into(path) or root.is_circle(real):
                return False
        return True


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


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
