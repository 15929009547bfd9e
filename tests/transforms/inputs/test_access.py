import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.schemas import Reason, Rejected
from af3pipe.transforms.inputs.access import check_named, is_below, own_prefix

S3, WEB = "s3://own/lists/m.jsonl", "https://host/lists/m.jsonl"


def is_allowed(url, source, *prefixes):
    try:
        check_named(url, source=source, where="line 7 of m", allow_prefixes=prefixes)
    except Rejected as rejected:
        return (rejected.reason, rejected.detail[: len(url) + 20]) != (
            Reason.NOT_ALLOWED,
            f"line 7 of m names {url}, ",
        )
    return True


@pytest.mark.parametrize(
    ("url", "source", "prefixes"),
    [
        ("/etc/a.wav", "/data/m.jsonl", ()),
        ("s3://any/a.wav", "/data/m.jsonl", ()),
        ("/etc/a.wav", "file:///data/m.jsonl", ()),
        ("s3://own/other/a.wav", S3, ()),
        ("s3a://own/a.wav", S3, ()),
        ("S3N://own/a.wav", S3, ()),
        ("https://Host:443/lists/a.wav", WEB, ()),
        ("abfss://own/a.wav", "az://own/m.jsonl", ()),
        ("gcs://own/a.wav", "gs://own/m.jsonl", ()),
        ("s3://own/a#b?.wav", S3, ()),
        ("s3://own/a..b/..c.wav", S3, ()),
        ("https://HOST/lists/deep/a.wav", WEB, ()),
        ("s3://friend/a.wav", S3, ("s3://friend",)),
        ("s3://friend/a.wav", S3, ("s3://friend/",)),
        ("s3://friend/a.wav", S3, ("s3://",)),
        ("s3://friend/in/a.wav", S3, ("gs://x", "s3://friend/in")),
        ("ftp://host/a.wav", S3, ("ftp://host",)),
        ("memory://a.wav", S3, ("memory://",)),
        ("simplecache::s3://own/a.wav", S3, ("simplecache::s3://own",)),
        ("hf://datasets/me/it/data/a.wav", "hf://datasets/me/it/m.jsonl", ()),
        ("memory://lists/a.wav", "memory://lists/m.jsonl", ()),
    ],
)
def test_what_may_be_named(url, source, prefixes):
    assert is_allowed(url, source, *prefixes)


@pytest.mark.parametrize(
    ("url", "source", "prefixes"),
    [
        ("s3://own-evil/a.wav", S3, ()),
        ("s3://owns/a.wav", S3, ()),
        ("s3://other/a.wav", S3, ()),
        ("gs://own/a.wav", S3, ()),
        ("https://host/other/a.wav", WEB, ()),
        ("https://host/listsx/a.wav", WEB, ()),
        ("http://host/lists/a.wav", WEB, ()),
        ("https://host@evil/lists/a.wav", WEB, ()),
        ("https://host:444/lists/a.wav", WEB, ()),
        ("https://host/lists/../secret/a.wav", WEB, ()),
        ("https://host/lists/%2e%2E/secret/a.wav", WEB, ()),
        ("https://host/lists/..%2fsecret/a.wav", WEB, ()),
        ("https://host/lists/..\\secret", WEB, ()),
        ("https://host/lists/.\t./secret", WEB, ()),
        ("s3://own/../other/a.wav", S3, ("s3://own",)),
        ("hf://datasets/me/other/a.wav", "hf://datasets/me/it/m.jsonl", ()),
        ("memory://a.wav", S3, ()),
        ("ftp://own/a.wav", S3, ()),
        ("simplecache::s3://own/a.wav", S3, ()),
        ("simplecache::s3://own/a.wav", S3, ("s3://own", "simplecache://")),
        ("zip://a.wav::s3://own/a.zip", S3, ()),
        ("s3://own/a.wav::s3://other/a.wav", S3, ()),
        ("s3://friend-evil/a.wav", S3, ("s3://friend",)),
        ("s3://friend/inner/a.wav", S3, ("s3://friend/in",)),
        ("s3://friend/a.wav", S3, ("",)),
    ],
)
def test_what_may_not_be_named(url, source, prefixes):
    assert not is_allowed(url, source, *prefixes)


LOCAL = [
    "/etc/passwd",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "local:///etc/passwd",
    "simplecache::file:///etc/passwd",
    "zip://a.wav::/data/a.zip",
    "zip://a.wav::a.zip",
    "s3://own/a::b.wav",
]


@pytest.mark.parametrize("url", LOCAL)
def test_a_local_file_is_never_named_from_elsewhere_whatever_is_allowed(url):
    assert not is_allowed(url, S3, "/", "/etc", "file://", "FILE://", "local://", "simplecache::file://", url)


def test_a_refusal_says_what_to_allow():
    with pytest.raises(Rejected, match=r"outside s3://own; if you trust it, allow it: --allow-prefix s3://friend$"):
        check_named("s3://friend/in/a.wav", source=S3, where="row 1 of m")


PART = st.text("ab.-#?%", min_size=1, max_size=4)


@given(st.lists(PART, min_size=1, max_size=4), st.lists(PART, max_size=4), st.booleans())
def test_a_prefix_ends_where_a_part_does(parts, more, slash):
    prefix = "s3://" + "/".join(parts)
    url = "s3://" + "/".join(parts + more)
    assert is_below(url, prefix + "/" * slash)
    assert not is_below(f"{prefix}x{url.removeprefix(prefix)}", prefix)


@given(st.lists(PART, min_size=2, max_size=5), st.lists(PART, min_size=1, max_size=5))
def test_below_means_that_the_parts_begin_alike(found, wanted):
    url, prefix = "s3://" + "/".join(found), "s3://" + "/".join(wanted)
    assert is_below(url, prefix) == (found[: len(wanted)] == wanted)


def test_own_prefixes():
    assert own_prefix("s3://own/a/b.jsonl") == "s3://own"
    assert own_prefix("https://host/a/b.jsonl") == "https://host/a"


@pytest.mark.parametrize("prefix", ["/mnt/inbox", "/mnt/inbox/", "file:///mnt/inbox", "/mnt/./inbox", "file://", "/"])
def test_folders_of_this_machine_have_many_spellings(prefix):
    assert is_below("/mnt/inbox/a.wav", prefix)
    assert is_below("file:///mnt/inbox/a.wav", prefix)
    assert is_below("/mnt/inboxes/a.wav", prefix) == (prefix in ("/", "file://"))
