"""Provides a local store that delays the answer to each call: `slow://` and a local path."""

import time
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

latency_s = 0.05


class _SlowFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        time.sleep(latency_s)
        with open(self.path, "rb") as file:  # noqa: PTH123
            file.seek(start)
            return file.read(end - start)


class SlowFileSystem(AbstractFileSystem):
    """Local files, by range requests: every listing, every look at a file, every range waits."""

    protocol = "slow"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._local = LocalFileSystem()

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list:
        time.sleep(latency_s)
        return self._local.ls(self._strip_protocol(path), detail=detail)

    def info(self, path: str, **kwargs: Any) -> dict:
        time.sleep(latency_s)
        return self._local.info(self._strip_protocol(path))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> _SlowFile:
        kwargs["size"] = kwargs.get("size") or self.info(path)["size"]
        return _SlowFile(self, path, mode, **kwargs)


def register() -> None:
    fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
