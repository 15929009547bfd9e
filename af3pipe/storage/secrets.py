"""Masks passwords, keys, tokens and signatures in what is logged or written."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

from af3pipe.storage.options import all_options

_MASK = "***"
# Names of settings are searched: `max_new_tokens` is none.
_SECRET_NAME = re.compile(
    r"secret|token$|token[_-]|passw|pwd|credential|conn(?:ection)?_str|(?:access|account|api|private|shared)[_-]?key|"
    r"signature|authorization|^key$|^auth$|^sas",
    re.IGNORECASE,
)
# fsspec's `token` of a public bucket names a way to sign in, and is no secret.
_NO_SECRETS = frozenset({"anon", "google_default", "cloud", "cache", "browser"})
_SECRET_ENV = re.compile(r"(?:SECRET|TOKEN|PASSWORD|_KEY|CONNECTION_STRING)(?:_|$)(?!.*(?:FILE|PATH|URL|URI|ID)$)")
# As short as this, a value would be found in words that have nothing to do with it.
_SHORTEST_IN_ENV, _SHORTEST_GIVEN = 8, 6

# To the last @ before the path: a password may contain an @.
_USER_IN_URL = re.compile(r"(?<=://)[^/\s\"'<>?#]+@")
_PARAMETER = re.compile(
    r"(?<=[?&;#])(?P<name>[\w.-]*(?:sig|signature|token|key|credential|secret|passw|accessid|expires_auth)[\w.-]*)="
    r"[^&#\s\"'<>]+",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    r"\b(?P<name>(?:aws_)?(?:secret_access_key|session_token|access_key_id)|AWSAccessKeyId|AccountKey|"
    r"SharedAccessSignature|client_secret|refresh_token|access_token|password)(?P<is>[\"']?\s*[=:]\s*[\"']?)"
    r"[^\s\"'&;,<>]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(?P<kind>Bearer|Basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE)
# S3 says to whom it says no.
_XML = re.compile(r"<(?P<tag>AWSAccessKeyId|SignatureProvided|Token-0|StringToSign|CanonicalRequest)>[^<]*<")


def redact(text: str) -> str:
    """Returns `text` with passwords, keys, tokens and signatures replaced by `***`.

    Masks users and passwords in URLs, signatures and tokens in their query parameters, and the literal values of the
    secrets that this process knows: in the environment, and among the storage options.
    """
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, _MASK)
    text = _USER_IN_URL.sub(f"{_MASK}@", text)
    text = _PARAMETER.sub(rf"\g<name>={_MASK}", text)
    text = _ASSIGNED.sub(rf"\g<name>\g<is>{_MASK}", text)
    text = _BEARER.sub(rf"\g<kind> {_MASK}", text)
    return _XML.sub(rf"<\g<tag>>{_MASK}<", text)


def redact_values(value: Any, name: str = "") -> Any:
    """Returns JSON-like values without secrets: masks values whose key names a secret, and redacts all text."""
    if value is not None and not isinstance(value, bool) and is_secret_name(name):
        return value if isinstance(value, str) and value in _NO_SECRETS else _MASK
    if isinstance(value, Mapping):
        return {redact(str(key)): redact_values(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_values(item, name) for item in value]
    return redact(value) if isinstance(value, str) else value


def is_secret_name(name: str) -> bool:
    """Returns whether a value of this name is secret: `secret`, `token`, `AWS_SECRET_ACCESS_KEY`, `api_key`, ..."""
    return bool(_SECRET_NAME.search(name))


def _known() -> set[str]:
    named = {value for name, value in os.environ.items() if _SECRET_ENV.search(name)}
    values = {value for value in named if len(value) >= _SHORTEST_IN_ENV}
    values.update(value for value in _secrets_of(all_options()) if len(value) >= _SHORTEST_GIVEN)
    plain = values - _NO_SECRETS
    # Verbatim, URL-encoded, and as in the repr of their containers.
    return plain.union(*((quote(value, safe=""), quote_plus(value), repr(value)[1:-1]) for value in plain))


def _secrets_of(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            # All that is inside of `token={...}` is secret.
            yield from _secrets_of(item, name if is_secret_name(name) else str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _secrets_of(item, name)
    elif isinstance(value, str) and is_secret_name(name):
        yield value
