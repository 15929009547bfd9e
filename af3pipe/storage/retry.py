"""Which errors of a store may pass, the tries they get, and what is said of those that do not."""

import errno
from collections.abc import Callable
from typing import TypeVar

import tenacity

from af3pipe.schemas import Reason, Rejected, Stage

_TRIES = 5
_FIRST_WAIT_S = 0.5
# The answer to this very request: another try gets the same one. Any other OSError may pass.
_FINAL = ("EINVAL", "ENOSPC", "EDQUOT", "EROFS", "EFBIG", "ENAMETOOLONG", "ELOOP", "EBADF", "ENOSYS")
_FINAL_ERRNOS = frozenset(getattr(errno, name) for name in _FINAL)
_TRANSIENT_STATUSES = frozenset({408, 429, *range(500, 600)})
# Clients' network errors that are no OSError, by name: the clients are optional, so they are not imported here.
_TRANSIENT_NAMES = frozenset(
    {
        "ConnectionError",
        "ClientConnectionError",
        "ClientPayloadError",
        "HTTPClientError",
        "TransportError",
        "RequestException",
    }
)
_CREDENTIALS_NAMES = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError"}
)

_T = TypeVar("_T")


def tries() -> tenacity.Retrying:
    """Calls a function up to five times, waiting longer each time, while its error may pass; raises the last one."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_random_exponential(multiplier=_FIRST_WAIT_S, max=20),
        stop=tenacity.stop_after_attempt(_TRIES),
        reraise=True,
    )


def retried(call: Callable[[], _T], uri: str, stage: Stage) -> _T:
    """Runs `call`, again where its error may pass, and says what is wrong with `uri` where it does not."""
    try:
        return tries()(call)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        tried = f" in {_TRIES} tries" if _is_transient(error) else ""
        detail = {
            Reason.NOT_FOUND: f"There is no object {uri}.",
            Reason.PERMISSION_DENIED: f"{uri} may not be read: {cause(error)}.",
        }.get(reason, f"{uri} could not be read{tried}: {cause(error)}.")
        raise Rejected(stage, reason, detail) from error


def _reason(error: BaseException) -> Reason | None:
    """None for an error that says nothing about the object."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return Reason.NOT_FOUND
    if _is_denied(error):
        return Reason.PERMISSION_DENIED
    return Reason.UNREADABLE if isinstance(error, OSError) or _is_transient(error) else None


def _is_denied(error: BaseException) -> bool:
    return (
        isinstance(error, PermissionError)
        or _status(error) in (401, 403)
        or bool(_CREDENTIALS_NAMES & _class_names(error))
        or (isinstance(error, OSError) and str(error).startswith("Forbidden"))  # gcsfs, of a 403
    )


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)):
        return False
    if _is_denied(error):
        return False
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUSES
    if isinstance(error, OSError):
        return error.errno not in _FINAL_ERRNOS
    return isinstance(error, TimeoutError) or bool(_TRANSIENT_NAMES & _class_names(error))


def _class_names(error: BaseException) -> set[str]:
    return {parent.__name__ for parent in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, however its client states it (aiohttp, gcsfs, botocore; or their wrapper)."""
    seen: BaseException | None = error
    # aiohttp says 400, of its own, of a body that is cut off.
    while seen is not None and "PayloadEncodingError" not in _class_names(seen):
        for name in ("status", "code", "status_code"):
            value = getattr(seen, name, None)
            if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
                return int(value)
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status
        seen = seen.__cause__
    return None


def cause(error: BaseException) -> str:
    """What an error says, in one line without a full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")


def advice(error: BaseException) -> str:
    """One sentence: what to do about output that could not be written."""
    if isinstance(error, ImportError):
        return "Install the client of that store: pip install 'af3pipe[gcs]' or 'af3pipe[s3]'."
    if _is_denied(error):
        return "Choose another folder, or give this account the right to create and delete objects there."
    if isinstance(error, FileNotFoundError):
        return "Create the bucket or folder first, or correct its name."
    if isinstance(error, (NotADirectoryError, FileExistsError, IsADirectoryError)):
        return "Something else has that name: choose another folder."
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return "Make room there, or choose another folder."
    return "Check the name and the network, then run it again."
