"""Describes objects by the same fields for every store."""

from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from af3pipe.storage import names
from af3pipe.storage.stores import is_local

_VERSION_KEYS = ("generation", "etag", "ETag", "e_tag", "blob_id")
_MTIME_KEYS = ("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created")


class ObjectInfo(NamedTuple):
    """Metadata of an object, as its store reports it.

    Attributes:
        uri: Full URL; a plain absolute path for a local file. It spells folders as the user did.
        size_bytes: None where the store does not state it.
        etag: The version of the content, without quotes: the store's etag, Google Cloud Storage's generation (its
            etags change with the metadata, too); None for local files.
        mtime: Of the last modification, ISO 8601 in UTC; None where the store has none.
        canonical: `storage.canonical(uri)`, if known at no cost; else empty.
    """

    uri: str
    size_bytes: int | None
    etag: str | None
    mtime: str | None
    canonical: str = ""


def object_info(fs: Any, info: dict[str, Any], canonical: str | None = None) -> ObjectInfo:
    """Converts the file information of any fsspec file system into an `ObjectInfo`.

    Args:
        fs: The file system.
        info: What its `ls` or `info` returned for the file.
        canonical: The canonical URI, if known; for a local file it is otherwise looked up on the disk.
    """
    name = info["name"]
    uri = str(name if is_local(fs) else fs.unstrip_protocol(name))
    etag = next((info[key] for key in _VERSION_KEYS if info.get(key)), None)
    size = info.get("size")
    return ObjectInfo(
        uri=uri,
        size_bytes=None if size is None else int(size),
        etag=None if etag is None else str(etag).strip('"'),
        mtime=_mtime(info),
        canonical=names.canonical(uri) if canonical is None else canonical,
    )


def _mtime(info: dict[str, Any]) -> str | None:
    value = next((info[key] for key in _MTIME_KEYS if info.get(key) is not None), None)
    if isinstance(value, (int, float)):
        value = datetime.fromtimestamp(value, timezone.utc)
    if isinstance(value, str):
        try:
            # Of a web server, "Tue, 02 Jan 2024 03:04:05 GMT"; Python 3.10 knows no Z.
            is_http = "," in value
            value = parsedate_to_datetime(value) if is_http else datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    aware = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
    return aware.astimezone(timezone.utc).isoformat()
