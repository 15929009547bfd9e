"""Normalises, joins and splits URIs, without requests to any store.

A local file's URI is its plain absolute path; every other one is a full URL. Nothing is unquoted and no Unicode is
normalised: names with spaces, umlauts, `#`, `?`, `%` or `[` are what the store calls them.
"""

import os
import posixpath
import re
from pathlib import Path

_LOCAL = frozenset({"file", "local"})
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs", "local": "file"}
# What follows "://" is a host, whose name is the same in any case; elsewhere it is a bucket, or part of the name.
_ON_HOSTS = frozenset({"http", "https", "ftp", "ftps", "sftp", "ssh", "hdfs", "webhdfs", "smb"})
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_WORD = re.compile("[a-z0-9]+")
_IPV6_HOST = re.compile(r"[^:/]+://([^/@]*@)?\[")


def is_local(uri: str) -> bool:
    """Returns whether a URI is a local path, or a `file://` or `local://` URL."""
    return "://" not in uri or _is_local_url(uri)


def scheme(url: str) -> str:
    """Returns a URL's scheme in lower case, without aliases: `s3` for `S3A://bucket`."""
    found = url.partition("://")[0].lower()
    return _ALIASES.get(found, found)


def openable(url: str) -> str:
    """Returns a URL in the spelling of `canonical`, but with its trailing slash."""
    links = _links(url)
    kind, rest = scheme(links[-1]), links[-1].partition("://")[2]
    if "://" not in links[-1] or kind in _LOCAL:
        return url
    if kind == "memory":
        rest = "/" + rest.lstrip("/")  # as fsspec spells it
    elif kind in _ON_HOSTS:
        host, slash, path = rest.partition("/")
        user, at, host = host.rpartition("@")
        host = host.lower().removesuffix(_DEFAULT_PORTS.get(kind, "\0"))
        if kind in _DEFAULT_PORTS:
            path, question, query = path.partition("?")
            path = _without_dots(path) + question + query
        rest = user + at + host + slash + path
    return "::".join([*links[:-1], f"{kind}://{rest}"])


def local_path(uri: str) -> str:
    """Returns the absolute path of a local URI, without `.`, `..` and doubled slashes; links are kept.

    Links that a `..` follows are resolved, as the operating system does when it opens the path.

    Raises:
        ValueError: No file can have such a name.
    """
    path = expanded(uri)
    if "://" in uri:
        path = uri.partition("://")[2].removeprefix("localhost") or "/"
    path = path if path.startswith("/") else f"{Path.cwd()}/{path}"
    parts = path.split("/")
    if ".." in parts:
        last = len(parts) - parts[::-1].index("..")
        path = "/".join([os.path.realpath("/".join(parts[:last])), *parts[last:]])
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def expanded(path: str) -> str:
    """Returns a path with a leading `~` replaced by the home folder; unchanged if there is no such user."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        return path


def canonical(uri: str) -> str:
    """Returns the one spelling of a URI that identifies an object, whoever wrote it.

    - A local path (`~`, relative, `file://`, `local://`) becomes its absolute real path: links to folders are
      resolved, and the file's own link, too, where it leads to a name of the same extension, by which headerless
      audio is decoded. This looks at the disk.
    - A scheme becomes lower case and loses its aliases (`s3a`, `s3n`, `gcs`, `az`, `abfss`). So do host names, and
      `:80` and `:443` go. Slashes at the end go, except behind a `?`.
    - `.` and `..` are resolved in http and https URLs, as browsers and servers do. On object stores they are part of
      the key, and `a//b` is another key than `a/b`, so both stay; on other servers a link may stand before them.
    - In a chain (`zip://a::s3a://b`) the last link becomes canonical.

    It is idempotent and takes any string: what no store can open comes back as it is, or in part.
    """
    if "://" not in uri or _is_local_url(uri):
        return _real_path(uri)
    links = _links(uri)
    if len(links) > 1 and ("://" not in links[-1] or _is_local_url(links[-1])):
        # A word is a store's name to fsspec, anything else without "://" a path.
        return uri if _WORD.fullmatch(links[-1]) else "::".join([*links[:-1], _real_path(links[-1])])
    url = openable(uri)
    return url if "?" in url else _without_slashes(url)


def join(base: str, *parts: str) -> str:
    """Joins a URL or a local path with names below it: `join("s3://bucket/out/", "captions")`."""
    stem = base if base.endswith("://") else base.rstrip("/") + "/"
    return stem + "/".join(part.strip("/") for part in parts)


def name(uri: str) -> str:
    """Returns the part after the last slash."""
    return uri.rstrip("/").rpartition("/")[2]


def parent(uri: str) -> str:
    """Returns an object's folder: `s3://b/lists` for `s3://b/lists/a.csv`; `.` for a bare name."""
    return uri.rstrip("/").rpartition("/")[0] or ("/" if uri.startswith("/") else ".")


def resolve(named: str, folder: str) -> str:
    """Returns `named` if it is a URL or an absolute path, else the path that it has below `folder`."""
    if "://" in named or ("://" in folder and not named.startswith(("/", "~"))):
        return named if "://" in named else join(folder, named.removeprefix("./"))
    return local_path(str(Path("" if "://" in folder else folder, expanded(named))))


def is_below(uri: str, folder: str) -> bool:
    """Returns whether a URI is a folder or below it, by whole path parts; both must be canonical."""
    folder = folder.rstrip("/")
    return uri == folder or uri.startswith(folder + "/")


def _is_local_url(uri: str) -> bool:
    return "::" not in uri and scheme(uri) in _LOCAL


def _links(url: str) -> list[str]:
    """Splits a chain (`zip://a::s3://b`) at its `::`; brackets contain a host's IPv6 address, not a chain."""
    return [url] if _IPV6_HOST.match(url) else url.split("::")


def _without_slashes(url: str) -> str:
    kind, found, rest = url.rpartition("://")
    return kind + found + rest.rstrip("/") if rest.strip("/") else url


def _real_path(uri: str) -> str:
    try:
        path = local_path(uri)
        found = os.path.realpath(path)
        if _extension(found) == _extension(path):
            return found
        folder, _, last = path.rpartition("/")
        return f"{os.path.realpath(folder or '/').rstrip('/')}/{last}"
    except (OSError, ValueError):  # the current folder is gone; no file can have such a name (NUL)
        return uri


def _without_dots(path: str) -> str:
    """Removes dot segments as RFC 3986 does; keeps empty segments."""
    kept: list[str] = []
    parts = path.split("/")
    for part in parts:
        if part == "..":
            del kept[-1:]
        elif part != ".":
            kept.append(part)
    return "/".join(kept) + ("/" if parts[-1] in (".", "..") and kept else "")


def _extension(path: str) -> str:
    return posixpath.splitext(path)[1].lower()
