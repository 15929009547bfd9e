"""One object has one canonical URI, whoever wrote it and however; and a name that nothing can have stops nothing."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage.members import Cell, Span

_SCHEMES = [
    "s3",
    "S3A",
    "s3n",
    "gs",
    "gcs",
    "az",
    "abfss",
    "http",
    "HTTPS",
    "memory",
    "file",
    "local",
    "ftp",
    "zip",
    "x+y",
]
_BITS = [
    "a",
    "B.wav",
    "..",
    ".",
    "",
    "ä",
    "A\u0308",
    "a b",
    "a#b",
    "q?x=/",
    "::",
    "[::1]",
    "u@H:80",
    "~",
    "\0",
    "\ud800",
]
_NAMES = st.lists(st.sampled_from(_BITS), max_size=6).map("/".join)
_URIS = st.one_of(
    st.text(st.characters(), max_size=30),
    _NAMES,
    st.builds("{}://{}".format, st.sampled_from(_SCHEMES), _NAMES),
    st.builds("zip://{}::{}://{}".format, _NAMES, st.sampled_from(_SCHEMES), _NAMES),
    st.builds("{}.tar#offset=1&size=2&name=a.wav".format, _NAMES),
)


@given(_URIS)
def test_canonical_takes_any_string_and_is_idempotent(uri):
    found = storage.canonical(uri)
    assert storage.canonical(found) == found


@pytest.mark.parametrize(
    "spellings",
    [
        ["s3://b/a.wav", "S3://b/a.wav", "s3a://b/a.wav", "s3n://b/a.wav", "s3://b/a.wav/"],
        ["gs://b/a", "gcs://b/a", "GS://b/a"],
        ["abfs://c/a", "az://c/a", "abfss://c/a"],
        ["memory:///b/a", "memory://b/a", "MEMORY:////b/a/"],
        ["https://host/a/b", "HTTPS://HOST/a/b", "https://Host:443/a/./c/../b", "https://host/../a/b/"],
        ["http://u:P@host:8080/A?x=/", "http://u:P@HOST:8080/A?x=/"],
        ["http://[::1]/a", "HTTP://[::1]:80/b/../a"],
        ["zip://in/a.wav::s3://b/x.zip", "zip://in/a.wav::S3A://b/x.zip"],
        ["simplecache::s3://b/a", "simplecache::s3a://b/a"],
        [Span("s3://b/x.tar", 512, 9, "a b.wav").uri, Span("s3n://b/x.tar", 512, 9, "a b.wav").uri],
        [Cell("gs://b/x.parquet", 3, "audio").uri, Cell("gcs://b/x.parquet", 3, "audio").uri],
    ],
)
def test_all_spellings_of_one_object_are_one(spellings):
    assert {storage.canonical(uri) for uri in spellings} == {spellings[0]}


def test_objects_that_differ_stay_apart():
    different = [
        "s3://b/a/../c",  # a key of an object store may hold anything
        "s3://b/c",
        "s3://b/a//c",
        "s3://b/a/./c",
        "s3://B/c",
        "s3://b/C",
        "s3://b/\u00e4",
        "s3://b/a\u0308",
        "gs://b/c",
        "http://b/c",
        "https://b/c",
        "https://b/c?x",
        "https://b/%63",
        "https://b//c",
        "https://b:444/c",
        "https://u@b/c",
        "sftp://b/link/../c",  # a server of files may have a link there
        "zip://c::s3://b/x.zip",
        Span("s3://b/x.tar", 512, 9).uri,
        Span("s3://b/x.tar", 512, 8).uri,
    ]
    assert len({storage.canonical(uri) for uri in different}) == len(different)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """data/deep/a.wav, and links to the folder, to the file, and to it under other extensions."""
    home = tmp_path / "home"
    (home / "data" / "deep").mkdir(parents=True)
    (home / "data" / "deep" / "a.wav").write_bytes(b"x")
    (home / "far").symlink_to(home / "data" / "deep")
    (home / "data" / "b.wav").symlink_to("deep/a.wav")
    (home / "data" / "c.ulaw").symlink_to("deep/a.wav")
    (home / "gone.wav").symlink_to("nowhere.wav")
    (home / "round").symlink_to("round")
    monkeypatch.chdir(home / "data")
    monkeypatch.setenv("HOME", str(home))
    return home


def test_all_spellings_of_a_local_file_are_its_real_path(tree):
    spellings = [
        "deep/a.wav",
        "./deep//a.wav",
        "../data/deep/a.wav",
        "~/data/deep/a.wav",
        f"{tree}/data/deep/a.wav",
        f"{tree}//data/./deep/../deep/a.wav",
        f"file://{tree}/data/deep/a.wav",
        f"FILE://localhost{tree}/data/deep/a.wav",
        f"local://{tree}/far/a.wav",
        "../far/a.wav",
        "../far/../deep/a.wav",  # behind a link, `..` leads to where the link leads
        "b.wav",
    ]
    assert {storage.canonical(uri) for uri in spellings} == {f"{tree}/data/deep/a.wav"}
    assert {storage.read_bytes(uri) for uri in spellings} == {b"x"}


def test_a_link_of_another_extension_is_decoded_otherwise_and_stays_itself(tree):
    assert storage.canonical("../far/../c.ulaw") == f"{tree}/data/c.ulaw"
    assert storage.canonical(str(tree / "gone.wav")) == f"{tree}/nowhere.wav"
    assert storage.canonical(str(tree / "round" / "a.wav")) == f"{tree}/round/a.wav"


def test_a_file_that_is_called_like_a_member_is_a_file(tree):
    name = "x.tar#offset=1&size=2"
    (tree / "data" / "deep" / name).write_bytes(b"file")
    assert storage.canonical(f"../far/{name}") == f"{tree}/data/deep/{name}"
    (tree / "data" / "deep" / name).unlink()
    assert storage.canonical(f"../far/{name}") == f"{tree}/data/deep/{name}"


def test_rows_name_what_the_user_named_and_know_the_canonical_name(tree):
    (found,) = storage.list_objects("../far")
    assert (found.uri, found.canonical) == (f"{tree}/far/a.wav", f"{tree}/data/deep/a.wav")
    assert storage.stat("../data/../far/a.wav") == found
    (linked,) = (info for info in storage.list_objects(f"{tree}/data/*.wav"))
    assert linked.canonical == found.canonical == storage.canonical(linked.uri)


@given(
    st.lists(st.sampled_from(["a", "b", "..", ".", "", "l"]), max_size=7)
    .map("/".join)
    .map(lambda path: path.lstrip("/"))
)
def test_a_path_without_dots_opens_the_same_file(tmp_path_factory, path):
    top = tmp_path_factory.getbasetemp() / "dots"
    (top / "a" / "b" / "a").mkdir(parents=True, exist_ok=True)
    if not (top / "b").is_symlink():
        (top / "b").symlink_to("a/b")
        (top / "a" / "l").symlink_to(top)
    named = f"{top}/{path}"
    spelled = storage.resolve(path or ".", str(top))
    assert spelled == "/" or not {"..", ".", ""}.intersection(spelled.split("/")[1:])
    if Path(named).exists():
        assert Path(named).samefile(spelled)
    assert storage.canonical(spelled) == storage.canonical(named)


@pytest.mark.parametrize(
    "uri",
    [
        "/a\0b.wav",
        "/\ud800.wav",
        "http://[::1/a.wav",
        "s3://[x/a.wav",
        "https://h:99999/a.wav",
        "http:///a",
        "nosuch://x/a",
    ],
)
def test_what_no_object_can_be_called_is_rejected_and_stops_nothing(uri):
    calls = [storage.stat, storage.open_input, storage.read_bytes, lambda uri: list(storage.list_objects(uri))]
    for call in calls:
        with pytest.raises(Rejected, match="no name that an object can have") as caught:
            call(uri)
        assert caught.value.reason is Reason.UNSUPPORTED_FORMAT
        assert caught.value.stage is (Stage.LIST if call is calls[-1] else Stage.READ)
    storage.canonical(uri)


def test_stores_are_opened_by_any_of_their_schemes(request):
    request.addfinalizer(lambda: storage.delete("memory://names/a.wav"))
    storage.write_atomic("MEMORY://names/a.wav", b"x")
    assert storage.read_bytes("memory:///names/a.wav") == b"x"
    assert Path(storage.stat("MEMORY://names/a.wav").uri).name == "a.wav"
