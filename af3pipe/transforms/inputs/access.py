"""Restricts which URIs manifests and messages may reference, so that their authors cannot read arbitrary files."""

import re
import unicodedata
from collections.abc import Sequence
from urllib.parse import unquote

from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage import names

# Where all that is below the first slash belongs to one owner. On other servers only a folder does.
_BUCKET_STORES = ("s3", "gs", "az", "abfs", "abfss", "adl", "oss", "oci", "cos", "obs", "tos")
_ELSEWHERE = "which may lead elsewhere; write it without '..' and control characters"


def check_named(url: str, *, source: str, where: str, allow_prefixes: Sequence[str] = ()) -> None:
    """Checks that a manifest may reference `url`.

    A local manifest may reference anything. A remote one may reference its own bucket or folder and everything below
    `allow_prefixes`, but no files of this machine.

    Args:
        url: URL as it would be opened.
        source: URI of the manifest, shard or data set that references it.
        where: Describes the row in error messages.
        allow_prefixes: URLs below which everything is allowed.

    Raises:
        Rejected: not_allowed; says which row, which URL and what to do.
    """
    if not is_remote(source):
        return
    if any(_is_local(link) for link in url.split("::")):
        why = "a file of this machine, which only a local manifest may name"
    elif _may_lead_elsewhere(url):
        why = _ELSEWHERE
    elif any(is_below(url, prefix) for prefix in (own_prefix(source), *allow_prefixes)):
        return
    else:
        why = f"which is outside {own_prefix(source)}; if you trust it, allow it: --allow-prefix {own_prefix(url)}"
    raise Rejected(Stage.LIST, Reason.NOT_ALLOWED, f"{where} names {url}, {why}")


def check_allowed(url: str, *, where: str, allow_prefixes: Sequence[str]) -> None:
    """Checks that a message may reference `url`: everything below one of `allow_prefixes`, and nothing else.

    A message has no bucket or folder of its own, and anyone who may publish can have written it.

    Args:
        url: URL as it would be opened.
        where: Describes the message in error messages.
        allow_prefixes: URLs, or folders of this machine, below which everything is allowed.

    Raises:
        Rejected: not_allowed; says which message, which URL and what to do.
    """
    if _may_lead_elsewhere(url):
        why = _ELSEWHERE
    elif any(is_below(url, prefix) for prefix in allow_prefixes):
        return
    else:
        allowed = ", ".join(allow_prefixes) or "nothing"
        why = f"and messages may name {allowed}; if you trust it, allow it: --allow-prefix {own_prefix(url)}"
    raise Rejected(Stage.LIST, Reason.NOT_ALLOWED, f"{where} names {url}, {why}")


def is_remote(uri: str) -> bool:
    """Returns whether a URI is not a file of this machine."""
    return not names.is_local(uri)


def own_prefix(uri: str) -> str:
    """Returns the bucket of an object; the folder of a file that is not on an object store."""
    scheme, _, rest = uri.partition("://")
    if names.scheme(uri) in _BUCKET_STORES:
        return f"{scheme}://{rest.lstrip('/').partition('/')[0]}"
    return names.parent(uri)


def is_below(url: str, prefix: str) -> bool:
    """Returns whether `url` is `prefix` or below it, by whole path parts: `s3://b-evil/a` is not below `s3://b`."""
    # A chain (`simplecache::s3://b/a`) goes on to another store behind each "::".
    return bool(prefix) and url.count("::") == prefix.count("::") and names.is_below(_spelled(url), _spelled(prefix))


def _may_lead_elsewhere(url: str) -> bool:
    return ".." in re.split(r"[/\\]", unquote(url)) or any(unicodedata.category(letter) == "Cc" for letter in url)


def _spelled(url: str) -> str:
    """Returns the canonical URL. Local symlinks are not resolved: their authors can read the target anyway."""
    if names.is_local(url):
        return names.local_path(url)
    kind, _, rest = names.canonical(url).rpartition("://")
    return f"{kind}://{rest.lstrip('/')}"  # to fsspec, `s3:///bucket` is `s3://bucket`


def _is_local(link: str) -> bool:
    """Returns whether a part of a chained URL is a local path; a part of only letters is a protocol."""
    if "://" in link:
        return names.is_local(link)
    return re.fullmatch("[a-z]+", link) is None
