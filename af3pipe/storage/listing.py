"""Lists the files that a folder or a glob selects, on any store."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage.folders import list_local
from af3pipe.storage.objects import ObjectInfo, object_info
from af3pipe.storage.retry import retried
from af3pipe.storage.stores import is_local, protocols
from af3pipe.storage.walk import THREADS, Page, Walk, Wanted, folder_of

_PAGE = 1000
"""Most entries in one response of S3 and Google Cloud Storage."""


def list_wanted(fs: Any, wanted: Wanted, uri: str) -> Iterator[ObjectInfo]:
    """Lists the wanted files, in no order, as they arrive.

    Raises:
        Rejected: A folder cannot be listed. Files listed before are valid, but not complete.
    """
    if wanted.excludes(folder_of(wanted.stem)):
        return iter(())
    if is_local(fs):
        return list_local(fs, wanted)
    flat = next((_FLAT[protocol] for protocol in protocols(fs) if protocol in _FLAT), None)
    if flat is None:
        fs.invalidate_cache()
        first = folder_of(wanted.stem) + ("/" if "http" in protocols(fs) else "")
        return iter(Walk(first, lambda task: _other_pages(fs, wanted, uri, task)))
    bucket, _, stem = wanted.stem.partition("/")

    def page(stem: str, by_folder: bool, token: str | None) -> _Answer:
        return retried(lambda: flat(fs, bucket, stem, "/" if by_folder else "", token), uri, Stage.LIST)

    return iter(Walk(stem, lambda task: _bucket_pages(fs, wanted, bucket, task, page)))


class _Answer(NamedTuple):
    """A page of a store's listing: objects, as fsspec describes them, subfolders with a slash, and the next token."""

    objects: list[dict[str, Any]]
    folders: list[str]
    token: str | None


def _s3_page(fs: Any, bucket: str, stem: str, delimiter: str, token: str | None) -> _Answer:
    more = {"ContinuationToken": token} if token else {}
    answer = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=stem, Delimiter=delimiter, **more)
    objects = [{**found, "name": found["Key"], "size": found["Size"]} for found in answer.get("Contents", ())]
    folders = [found["Prefix"] for found in answer.get("CommonPrefixes", ())]
    return _Answer(objects, folders, answer["NextContinuationToken"] if answer.get("IsTruncated") else None)


def _gcs_page(fs: Any, bucket: str, stem: str, delimiter: str, token: str | None) -> _Answer:
    query = {"prefix": stem, "delimiter": delimiter, "pageToken": token, "maxResults": _PAGE}
    answer = fs.call("GET", "b/{}/o", bucket, json_out=True, **{key: value for key, value in query.items() if value})
    return _Answer(answer.get("items", []), answer.get("prefixes", []), answer.get("nextPageToken"))


# API calls of the stores, since s3fs and gcsfs keep whole listings, and all earlier ones, in memory.
_FLAT: dict[str, Callable[[Any, str, str, str, str | None], _Answer]] = {"s3": _s3_page, "gs": _gcs_page}


def _bucket_pages(
    fs: Any, wanted: Wanted, bucket: str, stem: str, page: Callable[[str, bool, str | None], _Answer]
) -> Iterator[Page[str]]:
    """Lists all below `stem`: a small folder by one request, a large one by parallel requests for its subfolders."""
    by_folder = not wanted.is_deep(f"{bucket}/{stem}")
    answer = page(stem, by_folder, None)
    if not by_folder and answer.token is not None:
        beyond = [found["name"][len(stem) :] for found in answer.objects]
        below = {name.partition("/")[0] for name in beyond if "/" in name}
        # One request for each of many small folders takes longer than consecutive pages of a flat listing.
        if len(below) * THREADS <= _PAGE:
            by_folder = True
            answer = page(stem, by_folder, None)
    seen: set[str] = set()
    while True:
        named = [{**found, "name": f"{bucket}/{found['name']}"} for found in answer.objects]
        files = [object_info(fs, found) for found in named if _is_meant(wanted, found["name"])]
        # Some servers repeat a folder on each page that its objects would be on.
        folders = [name for name in answer.folders if name not in seen and wanted.goes_into(f"{bucket}/{name[:-1]}")]
        seen.update(folders)
        yield files, folders
        if answer.token is None:
            return
        answer = page(stem, by_folder, answer.token)


def _is_meant(wanted: Wanted, name: str) -> bool:
    # Empty objects whose name ends with a slash stand for folders.
    return not name.endswith("/") and wanted.has_file(name)


def _other_pages(fs: Any, wanted: Wanted, uri: str, folder: str) -> Iterator[Page[str]]:
    try:
        answer = retried(lambda: fs.ls(folder, detail=True), uri, Stage.LIST)
    except Rejected as rejected:
        if rejected.reason is not Reason.NOT_FOUND:  # deleted meanwhile, or a glob's folder that does not exist
            raise
        return
    fs.dircache.pop(folder, None)  # or everything that was ever listed stays in memory
    if "http" in protocols(fs):  # a page may link to anything
        answer = [found for found in answer if found["name"].startswith(folder)]
    names = [found["name"] for found in answer if found["type"] == "directory" and found["name"] != folder]
    folders = [name for name in names if wanted.goes_into(name.rstrip("/"))]
    files = [
        object_info(fs, found) for found in answer if found["type"] == "file" and _is_meant(wanted, found["name"])
    ]
    yield files, folders
