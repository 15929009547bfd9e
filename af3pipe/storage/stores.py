"""Opens the fsspec file system of a URL, with the job's options, timeouts, and without the client's own retries."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_storage_options

from af3pipe.schemas import Stage
from af3pipe.storage import names
from af3pipe.storage.options import Chosen, options_for
from af3pipe.storage.retry import StorageError, cause, check_credentials, explained, retried, status_of
from af3pipe.storage.secrets import redact

_T = TypeVar("_T")

_CONNECT_S = 10
_READ_S = 30
"""Longest time without data in a read from a store; then the request is repeated."""

# Clients that drop what they do not know in silence.
_SILENT = frozenset({"gs", "hf", "az", "abfs", "memory", "file"})
_ALL_CLIENTS_KNOW = frozenset({"use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache"})


def locate(uri: str, stage: Stage = Stage.READ) -> tuple[Any, str]:
    """Returns the file system of a URI, and the object's path in it.

    Raises:
        Rejected: unsupported_format, if no known store can have an object of this name.
        StorageError: The store's client does not accept the options that were set for it.
    """
    # Without "://" it is a path, whatever else is in it: fsspec would take "::" for a chain of stores.
    try:
        if names.is_local(uri):
            return LocalFileSystem(), names.local_path(uri)
        for link in uri.split("::"):
            infer_storage_options(link)  # raises for what is no URL
        return _open_store(names.openable(uri))
    except ValueError as error:
        raise explained(error, uri, stage) or error from error


def _open_store(uri: str) -> tuple[Any, str]:
    chosen = options_for(uri)
    defaults = _client_defaults(uri.partition("://")[0], chosen)
    if chosen is None:
        fs, path = fsspec.core.url_to_fs(uri, **defaults)
        _one_try(fs)
        return fs, path
    try:
        fs, path = fsspec.core.url_to_fs(uri, **{**chosen.options, **defaults})
        _one_try(fs)
        _check_names(fs, chosen)
        if "s3" in protocols(fs) and getattr(fs, "_s3", None) is None:
            fs.connect()  # sends no request: this reports an unknown profile or option
    except ImportError:
        raise
    except Exception as error:
        check_credentials(error, uri)
        raise StorageError(
            redact(f"storage_options for {chosen.prefix} cannot be used: {cause(error)}. Correct them.")
        ) from error
    return fs, path


def protocols(fs: Any) -> tuple[str, ...]:
    """Returns all protocol names of a file system: `("s3", "s3a")`."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def is_local(fs: Any) -> bool:
    """Returns whether a file system is this machine's own."""
    return "file" in protocols(fs)


def info(fs: Any, path: str, uri: str, stage: Stage) -> dict[str, Any]:
    """Requests the information about one path, with retries. Raises as `retried`."""

    def ask() -> dict[str, Any]:
        try:
            return dict(not_missing(fs, lambda: fs.info(path)))
        except OSError as error:
            _ask_s3_again(fs, path, uri, error)
            raise

    return retried(ask, uri, stage)


def not_missing(fs: Any, call: Callable[[], _T]) -> _T:
    """Calls `call`; if fsspec's web client reported a failure as a missing file, raises the actual cause."""
    try:
        return call()
    except FileNotFoundError as error:
        if "http" in protocols(fs) and error.__cause__ is not None and status_of(error.__cause__) not in (404, 410):
            raise error.__cause__ from None
        raise


def _ask_s3_again(fs: Any, path: str, uri: str, error: OSError) -> None:
    """Raises CredentialsError if S3's response without a body meant that: a HEAD returns only 400 or 403."""
    status = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
    if "s3" not in protocols(fs) or status not in (400, 403):
        return
    bucket, key, _ = fs.split_path(path)
    try:
        if key:
            fs.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
        else:
            fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except Exception as explained:  # noqa: BLE001 - the first error is raised where this one says no more
        check_credentials(explained, uri)


def _client_defaults(protocol: str, chosen: Chosen | None) -> dict[str, Any]:
    """Returns client options that set timeouts, except those that the job sets itself."""
    given = chosen.options if chosen else {}
    if protocol == "s3":
        # botocore's four retries times s3fs's five times our own would be 125 tries.
        own = {"connect_timeout": _CONNECT_S, "read_timeout": _READ_S, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": {**own, **given.get("config_kwargs", {})}}
    if protocol == "gs" and "requests_timeout" not in given:
        return {"requests_timeout": _aiohttp_timeout()}
    if protocol in ("http", "https"):
        return {"client_kwargs": {"timeout": _aiohttp_timeout(), **given.get("client_kwargs", {})}}
    return {}


def _aiohttp_timeout() -> Any:
    try:
        import aiohttp
    except ImportError:  # reported when it is needed
        return None
    return aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)


def _one_try(fs: Any) -> None:
    """Turns off retries of clients that have no option for it: `retried` retries, and counts."""
    if "s3" in protocols(fs):
        fs.retries = 1
    elif "gs" in protocols(fs):
        request = getattr(type(fs)._request, "__wrapped__", None)
        if request is not None and "_request" not in vars(fs):
            fs._request = functools.partial(request, fs)


def _check_names(fs: Any, chosen: Chosen) -> None:
    if not _SILENT.intersection(protocols(fs)):
        return
    initialisers = [vars(owner)["__init__"] for owner in type(fs).__mro__ if "__init__" in vars(owner)]
    known = {name for made in initialisers for name in inspect.signature(made).parameters} | _ALL_CLIENTS_KNOW
    unknown = sorted(set(chosen.options) - known)
    if unknown:
        raise ValueError(f"{type(fs).__name__} has no option {', '.join(unknown)}")
