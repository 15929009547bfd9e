"""Listings: the same as fsspec's own, but told page by page, from a server with as many objects as it takes."""

import os
import re
import threading
import time

import fsspec
import pytest
from fsspec.utils import glob_translate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage import listing, retry, walk
from benchmarks import synthetic_s3

_NAMES = st.sampled_from(["a", "b", "ab", "a b", "ä", "a.wav", "b.wav", "[x]", "c#1.wav", "deep"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=4).map("/".join)
_PARTS = st.sampled_from(["*", "**", "?", "a*", "*.wav", "[ab]", "[!a]*", "a", "b", "deep", "?.wav", "[[]x]", "ä"])
_GLOBS = st.lists(_PARTS, min_size=1, max_size=4).map("/".join).filter(lambda glob: any(c in glob for c in "*?["))
_QUICK = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Keys(synthetic_s3.Bucket):
    """These very keys."""

    def __init__(self, names):
        self._names = sorted(names)
        self.keys = len(self._names)
        self.body = b"x"

    def key(self, index):
        return self._names[index]


@pytest.fixture(scope="module")
def s3():
    with synthetic_s3.serving(Keys([])) as (url, server):
        storage.set_options({"s3://": {"endpoint_url": url, "key": "a", "secret": "b"}})
        yield server
        storage.set_options({})


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(listing, "_PAGE", 3)
    monkeypatch.setattr(walk, "THREADS", 2)
    monkeypatch.setattr(listing, "THREADS", 2)
    monkeypatch.setattr(synthetic_s3, "_PAGE", 3)


def fill(server, bucket):
    server._bucket = bucket
    server.requests.update(list=0, get=0, head=0)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "af3pipe-list"]


def without_folders_for_files(paths):
    """A path that is a file in one name and a folder in another is for buckets only."""
    return {path for path in paths if not any(other.startswith(f"{path}/") for other in paths)}


@_QUICK
@given(paths=st.sets(_PATHS, max_size=12), glob=_GLOBS)
def test_globs_mean_what_fsspec_says(paths, glob):
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    for path in without_folders_for_files(paths):
        fs.pipe_file(f"/top/{path}", b"x")
    found = [info.uri for info in storage.list_objects(f"memory://top/{glob}")]
    files = {name for name, info in fs.glob(f"/top/{glob}", detail=True).items() if info["type"] == "file"}
    assert sorted(found) == sorted(f"memory://{name}" for name in files)


@_QUICK
@given(paths=st.sets(_PATHS, max_size=12), glob=_GLOBS)
def test_globs_over_local_files_mean_what_fsspec_says(tmp_path_factory, paths, glob):
    top = tmp_path_factory.mktemp("top")
    for path in without_folders_for_files(paths):
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_bytes(b"x")
    fs = fsspec.filesystem("file")
    found = [info.uri for info in storage.list_objects(f"{top}/{glob}")]
    assert sorted(found) == sorted(
        name for name, info in fs.glob(f"{top}/{glob}", detail=True).items() if info["type"] == "file"
    )


@_QUICK
@given(paths=st.sets(_PATHS, max_size=20), glob=_GLOBS)
def test_globs_over_a_bucket_in_small_pages(s3, small_pages, paths, glob):
    fill(s3, Keys(paths))
    found = [info.uri for info in storage.list_objects(f"s3://bucket/{glob}")]
    pattern = re.compile(glob_translate(glob))
    assert sorted(found) == sorted(f"s3://bucket/{path}" for path in paths if pattern.match(path))


@_QUICK
@given(paths=st.sets(_PATHS, max_size=40))
def test_folders_of_a_bucket_in_small_pages(s3, small_pages, paths):
    fill(s3, Keys({*paths, "deep/", "x/folder.wav/", "x/y/z.wav"}))
    found = [info.uri for info in storage.list_objects("s3://bucket/")]
    assert sorted(found) == sorted(f"s3://bucket/{path}" for path in {*paths, "x/y/z.wav"} if path.endswith(".wav"))


@pytest.mark.parametrize(
    ("keys", "folders", "most_requests"),
    [
        pytest.param(12_000, 0, 15, id="one folder"),
        pytest.param(12_000, 12, 16, id="large folders", marks=pytest.mark.slow),
        pytest.param(12_000, 6000, 15, id="tiny folders", marks=pytest.mark.slow),
    ],
)
def test_a_large_bucket_takes_hardly_more_requests_than_it_has_pages(s3, keys, folders, most_requests):
    bucket = synthetic_s3.Bucket(keys, folders, seconds=0.01)
    fill(s3, bucket)
    found = {info.uri: info for info in storage.list_objects("s3://bucket")}
    assert len(found) == keys
    one = found[f"s3://bucket/{bucket.key(17)}"]
    assert one == (one.uri, len(bucket.body), f"{17:032x}", "2024-01-02T03:04:05+00:00", one.uri)
    assert s3.requests["list"] <= most_requests


def test_it_reads_ahead_so_far_and_no_further(s3, monkeypatch):
    monkeypatch.setattr(synthetic_s3, "_PAGE", 50)
    monkeypatch.setattr(walk, "_MOST_PAGES", 4)
    type(fsspec.filesystem("s3")).clear_instance_cache()  # other tests' clients have listings cached
    fill(s3, synthetic_s3.Bucket(4000, 0, seconds=0.01))
    count = 0
    for count, _ in enumerate(storage.list_objects("s3://bucket"), start=1):
        if count % 50 == 0:
            time.sleep(0.02)  # whoever reads further does so now
            # To see what it is, one in hand, those that wait, and one that waits for a place there.
            assert s3.requests["list"] <= count // 50 + 2 + 1 + 4 + 1
    assert count == 4000
    assert not any(fs.dircache for fs in type(fsspec.filesystem("s3"))._cache.values() if fs.dircache)


def test_who_stops_early_stops_the_listing(s3):
    fill(s3, synthetic_s3.Bucket(60_000, 60, seconds=0.01))
    found = storage.list_objects("s3://bucket")
    next(found)
    begun = threads()
    assert begun
    found.close()
    for thread in begun:
        thread.join(30)
    assert not threads()


def test_a_folder_that_is_named_on_two_pages_is_listed_once(s3, monkeypatch):
    bucket = Keys([f"a/{number}.wav" for number in range(900)] + [f"b{number}.wav" for number in range(2000)])
    fill(s3, bucket)
    page = bucket.page

    def repeating(prefix, delimiter, start, most):
        answer = page(prefix, delimiter, start, most)
        again = b"<CommonPrefixes><Prefix>a/</Prefix></CommonPrefixes></ListBucketResult>"
        return answer.replace(b"</ListBucketResult>", again) if delimiter and start else answer

    monkeypatch.setattr(bucket, "page", repeating)
    assert len(list(storage.list_objects("s3://bucket"))) == 2900


def test_only_what_may_match_is_listed(s3):
    fill(s3, synthetic_s3.Bucket(60_000, 600, seconds=0.01))
    assert len(list(storage.list_objects("s3://bucket/00001*/*.wav"))) == 1000
    assert s3.requests["list"] <= 12  # one for the folders, one for each of the ten, one to see that it is a glob


def test_a_listing_that_fails_in_the_middle_says_so(s3, monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.001)
    bucket = synthetic_s3.Bucket(5000, 0, seconds=0.01)
    fill(s3, bucket)
    page = bucket.page

    def failing(prefix, delimiter, start, most):
        if start >= 3000:
            raise ConnectionResetError("the server goes away")
        return page(prefix, delimiter, start, most)

    monkeypatch.setattr(bucket, "page", failing)
    told = []

    def tell():
        for info in storage.list_objects("s3://bucket"):
            told.append(info)

    with pytest.raises(Rejected) as caught:
        tell()
    assert (caught.value.stage, caught.value.reason) == (Stage.LIST, Reason.UNREADABLE)
    assert len(told) == 3000


@pytest.mark.parametrize("pattern", ["s3://*/a.wav", "s3://buck*", "s3://no bucket/a.wav"])
def test_a_name_that_no_bucket_has_is_refused(s3, pattern):
    with pytest.raises(Rejected, match="Invalid bucket name"):
        list(storage.list_objects(pattern))


def test_a_bucket_that_does_not_exist_is_not_found(s3, monkeypatch):
    monkeypatch.setattr(s3, "is_there", False)
    for pattern in ("s3://nowhere", "s3://nowhere/*.wav", "s3://nowhere/a.wav"):
        with pytest.raises(Rejected) as caught:
            list(storage.list_objects(pattern))
        assert caught.value.reason is Reason.NOT_FOUND


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "far").mkdir(parents=True)
    (tmp_path / "elsewhere" / "far" / "a.wav").write_bytes(b"123")
    (tmp_path / "in" / "deep" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "far" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "itself.wav").symlink_to("itself.wav")
    found = sorted(info.uri for info in storage.list_objects(str(tmp_path / "in")))
    assert found == [str(tmp_path / "in" / "deep" / "link" / "far" / "a.wav"), str(tmp_path / "in" / "itself.wav")]
    globbed = [info.uri for info in storage.list_objects(str(tmp_path / "in" / "*" / "li*" / "**" / "a.wav"))]
    assert globbed == [found[0]]


_FOLDERS = ["", "a", "b", "b/a", "b/keep"]
_LINKS = st.dictionaries(
    st.tuples(st.sampled_from(_FOLDERS), st.sampled_from(["l", "keep", "x"])),
    st.sampled_from([*_FOLDERS, "../out", "../out/deep", ".."]),
    max_size=4,
)


def all_names(path, glob, above=()):
    """Every name that a file has, whatever links are in it; the slow and obvious way."""
    real = os.path.realpath(path)
    if real in above:
        return
    for entry in os.scandir(path):
        if entry.is_dir():
            yield from all_names(entry.path, glob, (*above, real))
        elif glob.match(entry.path):
            yield entry.path


@_QUICK
@given(links=_LINKS, glob=st.sampled_from(["", "**/*.wav", "**/keep/*.wav", "*/*.wav", "b/**/x/**", "**/l/**/a.wav"]))
def test_each_file_is_listed_once_whatever_links_lead_to_it(tmp_path_factory, links, glob):
    above = tmp_path_factory.mktemp("links")
    top = above / "in"
    for folder in [top, *(top / name for name in _FOLDERS), above / "out" / "deep"]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.wav").write_bytes(b"x")
    for (folder, name), target in links.items():
        if not (top / folder / name).exists():
            (top / folder / name).symlink_to((top / target).resolve())
    found = list(storage.list_objects(f"{top}/{glob}"))
    start = str(top / re.split(r"[*]", glob)[0])  # what is above is not seen as leading in a circle
    named = list(all_names(start, re.compile(glob_translate(f"{top}/{glob or '**'}"))))
    assert sorted(info.canonical for info in found) == sorted({os.path.realpath(name) for name in named})
    assert {info.uri for info in found} <= set(named)
    assert sorted(found) == sorted(storage.list_objects(f"{top}/{glob}"))
    own = {info.uri for info in found if info.uri == info.canonical}
    assert own == {name for name in named if name == os.path.realpath(name)}  # no link takes a file's own name away


def test_of_two_links_the_first_by_name_is_kept(tmp_path):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "a.wav").write_bytes(b"x")
    (tmp_path / "in").mkdir()
    for name, target in {"z": "out/deep", "b": "out", "a": "out/deep"}.items():
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    (found,) = storage.list_objects(str(tmp_path / "in"))
    assert found.uri == str(tmp_path / "in" / "a" / "a.wav")


@pytest.mark.parametrize("glob", ["", "**", "*/*/*.wav", "**/*.wav"])
@pytest.mark.parametrize("exclude", ["in/out", "in/out/", "linked", "file://{}/in/./out", "in/sub/../out"])
def test_nothing_below_an_excluded_folder_is_listed(tmp_path, monkeypatch, glob, exclude):
    for name in ["in/out/x.wav", "in/out/deep/x.wav", "in/outer/x/a.wav", "in/sub/out/b.wav"]:
        storage.write_atomic(str(tmp_path / name), b"x")
    (tmp_path / "linked").symlink_to(tmp_path / "in" / "out")
    (tmp_path / "in" / "back").symlink_to(tmp_path / "in" / "out")
    seen = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(path) or scandir(path))
    excluded = exclude.format(tmp_path) if "{}" in exclude else str(tmp_path / exclude)
    found = sorted(info.uri for info in storage.list_objects(f"{tmp_path}/in/{glob}", [excluded, "s3://b", "/none"]))
    assert found == [str(tmp_path / name) for name in ("in/outer/x/a.wav", "in/sub/out/b.wav")]
    assert not [path for path in seen if f"{os.path.realpath(path)}/".startswith(f"{tmp_path}/in/out/")]
    assert not list(storage.list_objects(f"{tmp_path}/in/out/*", [excluded]))
    assert len(list(storage.list_objects(f"{tmp_path}/in/out/x.wav", [excluded]))) == 1  # named itself


@_QUICK
@given(paths=st.sets(_PATHS, max_size=20), glob=_GLOBS, exclude=st.lists(_PATHS, max_size=3))
def test_nothing_below_an_excluded_folder_of_a_bucket_is_listed(s3, small_pages, paths, glob, exclude):
    fill(s3, Keys(paths))
    excluded = [f"s3a://bucket/{folder}/" for folder in exclude]
    found = [info.uri for info in storage.list_objects(f"s3://bucket/{glob}", [*excluded, "gs://bucket/a", "/a"])]
    pattern = re.compile(glob_translate(glob))
    kept = {path for path in paths if not any(f"{path}/".startswith(f"{folder}/") for folder in exclude)}
    assert sorted(found) == sorted(f"s3://bucket/{path}" for path in kept if pattern.match(path))


def test_an_excluded_folder_of_a_bucket_takes_no_request(s3):
    fill(s3, synthetic_s3.Bucket(60_000, 600, seconds=0.01))
    assert list(storage.list_objects("s3://bucket/00001*/*.wav", ["s3://bucket/"])) == []
    assert s3.requests["list"] <= 1  # to see that it is a glob
    fill(s3, synthetic_s3.Bucket(60_000, 600, seconds=0.01))
    folders = {info.uri.rpartition("/")[0] for info in storage.list_objects("s3://bucket/00001*/*.wav")}
    before = s3.requests["list"]
    fill(s3, synthetic_s3.Bucket(60_000, 600, seconds=0.01))
    assert len(list(storage.list_objects("s3://bucket/00001*/*.wav", sorted(folders)[:9]))) == 100
    assert s3.requests["list"] == before - 9


@pytest.mark.parametrize("exclude", ["memory://top/out", "memory:///top/out/"])
def test_nothing_below_an_excluded_folder_of_any_other_store_is_listed(exclude):
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    for name in ["out/a.wav", "out/deep/a.wav", "outer/a.wav"]:
        fs.pipe_file(f"/top/{name}", b"x")
    for glob in ("", "**"):
        assert [info.uri for info in storage.list_objects(f"memory://top/{glob}", [exclude])] == [
            "memory:///top/outer/a.wav"
        ]


def test_a_large_local_folder_is_whole(tmp_path):
    for number in range(2 * listing._PAGE):
        (tmp_path / f"{number}.wav").touch()
    assert len(list(storage.list_objects(str(tmp_path)))) == 2 * listing._PAGE


def test_what_is_read_of_a_listed_object_is_its_listed_version(s3):
    bucket = synthetic_s3.Bucket(20, 0, seconds=0.01)
    fill(s3, bucket)
    for info in storage.list_objects("s3://bucket"):
        with storage.open_version(info) as file:
            assert file.read() == bucket.body
    assert s3.requests == {"list": 1, "get": 20, "head": 1}  # one to see that there is the bucket
