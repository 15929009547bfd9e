"""Retries calls to a store whose errors may be temporary, and explains the other errors in a sentence."""

import errno
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import tenacity

from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage.names import scheme
from af3pipe.storage.options import options_for
from af3pipe.storage.secrets import redact

_TRIES = 5
_FIRST_WAIT_S = 0.5
# Errors that a retry would only repeat. Any other OSError may be temporary.
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
        "IncompleteRead",
        "IncompleteReadError",
        "ResponseParserError",
        "TimeoutError",  # asyncio's own, in Python 3.10
        "TransportError",
        "RequestException",
    }
)
_ABSENT = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"})
_EXPIRED = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "RequestExpired",
        "TokenRefreshRequired",
        "UnauthorizedSSOTokenError",
        "SSOTokenLoadError",
        "TokenRetrievalError",
        "RefreshError",
    }
)
_INVALID = frozenset(
    {
        "InvalidAccessKeyId",
        "XAdminUserNotFound",  # versitygw
        "InvalidClientTokenId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
        "CredentialRetrievalError",
        "ClientAuthenticationError",
    }
)
# By the store's own code, since their statuses (403, 409) mean other things, too.
_ARCHIVED = frozenset({"InvalidObjectState", "BlobArchived", "BlobBeingRehydrated"})
# A 401 of these stores is about the account. A web server's 401 says nothing about other servers, and Hugging Face's
# hub returns one for a repository that does not exist.
_STORES_OF_ACCOUNTS = frozenset({"s3", "gs", "abfs"})
_REMEDIES = {
    "s3": "run `aws sso login`, or renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, "
    "and start again",
    "gs": "run `gcloud auth application-default login`, or renew the file that GOOGLE_APPLICATION_CREDENTIALS names, "
    "and start again",
    "abfs": "run `az login`, or renew what storage_options give, and start again",
}

_T = TypeVar("_T")


class StorageError(Exception):
    """A store cannot be used; the message says where, why, and what to do. Ends the job, unlike `Rejected`."""


class CredentialsError(StorageError):
    """A store rejects the credentials: nothing on it can be read, so it is no fault of a single recording."""


class _Retries:
    """Counts the retries of this process since the last `take`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self, _: tenacity.RetryCallState) -> None:
        with self._lock:
            self._count += 1

    def take(self) -> int:
        with self._lock:
            count, self._count = self._count, 0
        return count


_retries = _Retries()


def take_retries() -> int:
    """Returns the number of retries of this process since the last call."""
    return _retries.take()


def tries(uri: str) -> tenacity.Retrying:
    """Calls a function up to five times, with growing waits between temporary errors; raises the last error."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: _is_transient(error) and not _account_fault(error, uri)),
        wait=tenacity.wait_random_exponential(multiplier=_FIRST_WAIT_S, max=20),
        stop=tenacity.stop_after_attempt(_TRIES),
        before_sleep=_retries.add,
        reraise=True,
    )


def retried(call: Callable[[], _T], uri: str, stage: Stage) -> _T:
    """Calls `call`, retries temporary errors, and converts errors about `uri` into a `Rejected` with an explanation.

    Raises:
        Rejected: The object, folder or bucket is to blame.
        CredentialsError: The account is.
    """
    try:
        return tries(uri)(call)
    except (Rejected, StorageError):
        raise
    except Exception as error:
        tried = f" in {_TRIES} tries" if _is_transient(error) else ""
        rejected = explained(error, uri, stage, tried)
        if rejected is None:
            raise
        raise rejected from error


def explained(error: Exception, uri: str, stage: Stage, tried: str = "") -> Rejected | None:
    """Returns the `Rejected` for an error that `retried` would raise; None if the error is not about `uri`.

    Raises:
        CredentialsError: The error is about the account.
    """
    check_credentials(error, uri)
    reason = _reason(error)
    if reason is None:
        return None
    detail = {
        Reason.NOT_FOUND: f"There is no object {uri}.",
        Reason.PERMISSION_DENIED: f"{uri} may not be read: {cause(error)}.",
        Reason.UNSUPPORTED_FORMAT: f"{uri} is no name that an object can have: {cause(error)}. Correct it.",
        Reason.ARCHIVED: f"{uri} is archived and must be restored before it can be read: {cause(error)}.",
        Reason.CHANGED: f"{uri} was replaced or modified after it was listed: it no longer has the listed version.",
    }.get(reason, f"{uri} could not be read{tried}: {cause(error)}.")
    return Rejected(stage, reason, redact(detail))


def check_credentials(error: BaseException, uri: str) -> None:
    """Raises CredentialsError if `error` says that the account is at fault, not the requested object."""
    fault = _account_fault(error, uri)
    if fault is None:
        return
    remedy = _REMEDIES.get(scheme(uri), "renew them and start again")
    chosen = options_for(uri)
    given = f" Look at storage_options, too: {chosen.prefix} has its own." if chosen else ""
    detail = redact(f"{uri} cannot be used: {fault} ({cause(error)}): {remedy}.{given}")
    raise CredentialsError(detail) from error


def _account_fault(error: BaseException, uri: str) -> str | None:
    for found in _chain(error):
        names = _class_names(found) | {_code(found)}
        if names & _ABSENT:
            return "there are no credentials for it"
        if names & _EXPIRED or "invalid_grant" in str(found):
            return "the credentials have expired"
        if names & _INVALID:
            return "the credentials are not valid"
    if status_of(error) == 401 and scheme(uri) in _STORES_OF_ACCOUNTS:
        chosen = options_for(uri)
        # Anonymous access gets a 401 for each object that is not public.
        return None if chosen and chosen.options.get("token") == "anon" else "the credentials are absent or not valid"
    return None


def _reason(error: BaseException) -> Reason | None:
    """Returns the reason for an error; None if it is not about the object."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return Reason.NOT_FOUND
    if _is_archived(error):
        return Reason.ARCHIVED
    if _is_replaced(error):
        return Reason.CHANGED
    if _is_denied(error):
        return Reason.PERMISSION_DENIED
    if isinstance(error, ValueError):  # NUL, half of a surrogate pair, no IPv6 address, an unknown scheme
        return Reason.UNSUPPORTED_FORMAT
    is_refused = "ParamValidationError" in _class_names(error)  # botocore, of a name that no bucket can have
    return Reason.UNREADABLE if is_refused or isinstance(error, OSError) or _is_transient(error) else None


def _is_archived(error: BaseException) -> bool:
    return any(_code(found) in _ARCHIVED for found in _chain(error))


def _is_replaced(error: BaseException) -> bool:
    """Returns whether a conditional read was refused. gcsfs raises FileExistsError for any 412."""
    return status_of(error) == 412 or isinstance(error, FileExistsError)


def _is_denied(error: BaseException) -> bool:
    return (
        isinstance(error, PermissionError)
        or status_of(error) in (401, 403)
        or (isinstance(error, OSError) and str(error).startswith("Forbidden"))  # gcsfs, of a 403
    )


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)):
        return False
    if _is_archived(error):
        return False
    if _is_denied(error):
        return False
    # Before the status: aiohttp says 400 of a body that was cut off.
    if _TRANSIENT_NAMES & _class_names(error):
        return True
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT_STATUSES
    return isinstance(error, OSError) and error.errno not in _FINAL_ERRNOS


def _class_names(error: BaseException) -> set[str]:
    return {parent.__name__ for parent in type(error).__mro__}


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _code(error: BaseException) -> str:
    """Returns the store's own error code, as in errors of botocore and of Azure's client."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    code = getattr(error, "error_code", None) or ""  # of Azure's client, an enumeration of strings
    return str(getattr(code, "value", code))


def status_of(error: BaseException) -> int | None:
    """Returns the HTTP status of an error of aiohttp, gcsfs or botocore, or of its causes."""
    for seen in _chain(error):
        for name in ("status", "code", "status_code"):
            value = getattr(seen, name, None)
            if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
                return int(value)
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status
    return None


def cause(error: BaseException) -> str:
    """Returns an error's message in one line, without a full stop and without secrets."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return redact(" ".join(str(text).split()).rstrip("."))


def advice(error: BaseException) -> str:
    """Returns a sentence that says what to do about output that could not be written."""
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
