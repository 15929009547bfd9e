"""Keeps the job's storage options for this process: a mapping from URL prefix to client options."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from af3pipe.storage.names import openable

StorageOptions = Mapping[str, Mapping[str, Any]]


class Chosen(NamedTuple):
    """The options that apply to a URL, and the prefix they were set for."""

    prefix: str
    options: dict[str, Any]


_chosen: tuple[Chosen, ...] = ()


def set_options(options: StorageOptions) -> None:
    """Sets fsspec's storage options for this process, and replaces all earlier ones. Jobs with options call it.

    Args:
        options: URL of a store (`s3://`), a bucket or a folder (`s3://archive/`), to what fsspec's file system for
            it takes: `{"s3://archive/": {"endpoint_url": "https://...", "profile": "archive"}}`. Only the longest
            prefix of a URL applies: options are not merged. URLs without a prefix use the environment.

    Raises:
        ValueError: A prefix is not a URL, or its options are not a mapping.
    """
    global _chosen
    check_options(options)
    _chosen = tuple(Chosen(prefix, dict(options[prefix])) for prefix in sorted(options, key=len, reverse=True))


def check_options(options: StorageOptions) -> None:
    """Validates options for `set_options`. Raises ValueError, which quotes the prefix."""
    for prefix, chosen in options.items():
        if "://" not in prefix:
            raise ValueError(f"{prefix!r} is no URL; name a store, a bucket or a folder, for example s3://archive/")
        if not isinstance(chosen, Mapping):
            raise ValueError(f"{prefix!r} is given {chosen!r}; it must be options and their values")


def options_for(uri: str) -> Chosen | None:
    """Returns the options of the longest prefix of `uri`; None if no prefix matches, and for local paths."""
    if not _chosen or "://" not in uri:
        return None
    store, path = _parts(uri)
    for chosen in _chosen:
        own_store, own_path = _parts(chosen.prefix)
        if own_store == store and (not own_path or f"{path}/".startswith(f"{own_path}/")):
            return chosen
    return None


def all_options() -> list[dict[str, Any]]:
    """Returns all options that are set, which may contain secrets."""
    return [chosen.options for chosen in _chosen]


def _parts(uri: str) -> tuple[str, str]:
    """Splits a URL into store and path, in one spelling: `s3a://a` and `s3://a/`, `memory://a` and `memory:///a`."""
    protocol, _, path = openable(uri).partition("://")
    return protocol, path.strip("/")
