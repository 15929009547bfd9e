"""Keeps the storage options of the job for this process: URL prefix to the options of that store's client."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from af3pipe.storage.names import openable

StorageOptions = Mapping[str, Mapping[str, Any]]


class Chosen(NamedTuple):
    """The options that hold for a URL, and the prefix that they were given for."""

    prefix: str
    options: dict[str, Any]


_chosen: tuple[Chosen, ...] = ()


def set_options(options: StorageOptions) -> None:
    """Sets fsspec's storage options for this process, in place of those set before; a job that has any does so, too.

    Args:
        options: URL of a store (`s3://`), a bucket or a folder (`s3://archive/`), to what fsspec's file system for
            it takes: `{"s3://archive/": {"endpoint_url": "https://...", "profile": "archive"}}`. The longest prefix
            of a URL holds for it, alone: options are not joined. What no prefix covers is left to the environment.

    Raises:
        ValueError: A prefix that is no URL, or options that are no mapping.
    """
    global _chosen
    check_options(options)
    _chosen = tuple(Chosen(prefix, dict(options[prefix])) for prefix in sorted(options, key=len, reverse=True))


def check_options(options: StorageOptions) -> None:
    """Checks what `set_options` takes. Raises ValueError, which names the prefix."""
    for prefix, chosen in options.items():
        if "://" not in prefix:
            raise ValueError(f"{prefix!r} is no URL; name a store, a bucket or a folder, for example s3://archive/")
        if not isinstance(chosen, Mapping):
            raise ValueError(f"{prefix!r} is given {chosen!r}; it must be options and their values")


def options_for(uri: str) -> Chosen | None:
    """Returns what was set for the longest prefix of `uri`; None where nothing was, and for a local path."""
    if not _chosen or "://" not in uri:
        return None
    store, path = _parts(uri)
    for chosen in _chosen:
        own_store, own_path = _parts(chosen.prefix)
        if own_store == store and (not own_path or f"{path}/".startswith(f"{own_path}/")):
            return chosen
    return None


def all_options() -> list[dict[str, Any]]:
    """Returns everything that is set: where secrets may be."""
    return [chosen.options for chosen in _chosen]


def _parts(uri: str) -> tuple[str, str]:
    """Store and path, alike for all spellings of one place: `s3a://a` and `s3://a/`, `memory://a` and `memory:///a`."""
    protocol, _, path = openable(uri).partition("://")
    return protocol, path.strip("/")
