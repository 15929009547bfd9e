"""Stores that fail, hang, cut off, or no longer know who asks: real clients, and a server that answers as they do."""

import random

import pytest

from af3pipe import storage
from af3pipe.pipelines import batch
from af3pipe.pipelines.job import JobError, make_job
from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage import retry, stores
from af3pipe.transforms.inputs.read import list_recordings
from tests import flawed_store

DATA = random.Random(0).randbytes(300_000)
URIS = {"s3": "s3://bucket/a.wav", "gs": "gs://bucket/a.wav"}


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with flawed_store.serving(DATA) as found:
        storage.set_options(
            {
                "s3://": {"endpoint_url": found.url, "key": "AKIAEXAMPLE", "secret": "wJalrXUtnFEMIbPxRfiCY"},
                "gs://": {"endpoint_url": found.url, "token": "anon"},
            }
        )
        storage.take_retries()
        yield found
        storage.set_options({})


@pytest.fixture(params=["s3", "gs", "http"])
def uri(request, store):
    if request.param == "gs":
        pytest.importorskip("gcsfs")
    return URIS.get(request.param, f"{store.url}/bucket/a.wav")


def rejection(call):
    with pytest.raises(Rejected) as caught:
        call()
    return caught.value


SERVER_ERROR = (503, "InternalError", "we are busy")


@pytest.mark.parametrize("fault", ["cut", "nothing", SERVER_ERROR], ids=["cut", "nothing", "503"])
def test_a_read_goes_on_where_it_was_and_each_retry_is_counted(store, uri, fault):
    with storage.open_input(uri, size_bytes=len(DATA)) as file:
        assert file.read(1000) == DATA[:1000]
        store.faults.extend([fault] * 3)
        file.seek(100_001)
        assert file.read() == DATA[100_001:]
    assert storage.take_retries() == 3
    assert storage.take_retries() == 0


def test_half_a_body_is_not_the_end_of_the_file(store, uri):
    store.faults.extend(["short"] * 4)
    with storage.open_input(uri, size_bytes=len(DATA)) as file:
        assert file.read() == DATA


@pytest.mark.parametrize("fault", ["cut", "nothing", SERVER_ERROR], ids=["cut", "nothing", "503"])
def test_five_requests_are_all_that_is_tried(store, uri, fault):
    with storage.open_input(uri, size_bytes=len(DATA)) as file:
        before = store.bodies
        store.faults.extend([fault] * 20)
        rejected = rejection(lambda: file.read(1000))
    assert (rejected.stage, rejected.reason) == (Stage.READ, Reason.UNREADABLE)
    assert "in 5 tries" in rejected.detail
    assert store.bodies - before == 5


def test_a_server_that_says_nothing_is_asked_again(store, uri, monkeypatch):
    monkeypatch.setattr(stores, "_READ_S", 0.5)
    with storage.open_input(uri, size_bytes=len(DATA)) as file:
        store.faults.append("hang")
        assert file.read() == DATA
    assert storage.take_retries() == 1


@pytest.mark.parametrize("call", [storage.stat, storage.read_bytes, storage.open_input])
def test_opening_is_tried_again_too(store, uri, call):
    store.for_all = SERVER_ERROR
    rejected = rejection(lambda: call(uri))
    assert "in 5 tries" in rejected.detail
    assert store.asked <= 10  # gcsfs asks whether it is an object and whether it is a folder at once
    assert storage.take_retries() == 4


def test_a_write_is_tried_again(store):
    store.faults.extend([SERVER_ERROR] * 2)
    storage.write_atomic("s3://bucket/out", b"12345")
    assert (store.put, storage.take_retries()) == (b"12345", 2)


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (400, "ExpiredToken", "the credentials have expired"),
        (400, "ExpiredTokenException", "the credentials have expired"),
        (400, "TokenRefreshRequired", "the credentials have expired"),
        (403, "InvalidAccessKeyId", "the credentials are not valid"),
        (403, "SignatureDoesNotMatch", "the credentials are not valid"),
        (401, "Unauthorized", "absent or not valid"),
    ],
)
def test_bad_credentials_end_the_job_at_once_and_say_what_to_do(store, status, code, says):
    store.for_all = (status, code, "no, AKIAEXAMPLE may not")
    calls = [
        lambda: storage.stat("s3://bucket/a.wav"),
        lambda: storage.open_input("s3://bucket/a.wav"),
        lambda: storage.open_input("s3://bucket/a.wav", size_bytes=5).read(),
        lambda: storage.read_bytes("s3://bucket/a.wav"),
        lambda: storage.write_atomic("s3://bucket/a.wav", b"x"),
        lambda: storage.delete("s3://bucket/a.wav"),
        lambda: storage.check_writable("s3://bucket/out"),
        lambda: list(storage.list_objects("s3://bucket")),
        lambda: list(storage.list_objects("s3://bucket/*.wav")),
        lambda: list(list_recordings("s3://bucket")),  # no dead letter
    ]
    for call in calls:
        with pytest.raises(storage.CredentialsError, match=says) as caught:
            call()
        assert "run `aws sso login`" in str(caught.value)
        assert "AKIAEXAMPLE" not in str(caught.value)
        assert batch.explain_failure(caught.value) == str(caught.value)
    assert storage.take_retries() == 0


def test_credentials_that_expire_while_a_job_runs_end_it(store, tmp_path):
    store.for_all = (400, "ExpiredToken", "The provided token has expired.")
    (tmp_path / "list.jsonl").write_text('{"uri": "s3://bucket/a.wav"}\n{"uri": "s3://bucket/b.wav"}\n')
    job = make_job({"inputs": str(tmp_path / "list.jsonl"), "output": str(tmp_path / "out"), "model": "demo"})
    with pytest.raises(batch.RunFailed, match=r"the credentials have expired .*: run `aws sso login`"):
        batch.run(job)
    assert not list(tmp_path.rglob("dead_letters/*.parquet"))


def test_credentials_that_have_expired_before_do_not_start_a_job(store, tmp_path):
    store.for_all = (400, "ExpiredToken", "The provided token has expired.")
    job = make_job({"inputs": "s3://bucket/*.wav", "output": str(tmp_path / "out"), "model": "demo"})
    with pytest.raises(JobError, match=r"input: s3://bucket/\*\.wav cannot be used: the credentials have expired"):
        batch.run(job)


def test_one_object_that_is_forbidden_is_no_matter_of_the_job(store):
    store.for_all = (403, "AccessDenied", "not this one")
    for call in (storage.stat, storage.open_input, storage.read_bytes, lambda uri: list(storage.list_objects(uri))):
        assert rejection(lambda call=call: call("s3://bucket/a.wav")).reason is Reason.PERMISSION_DENIED


def test_who_is_nobody_to_google_is_told_so_of_one_object(store):
    pytest.importorskip("gcsfs")
    store.for_all = (401, "", "Anonymous caller does not have storage.objects.get access")
    assert rejection(lambda: storage.read_bytes("gs://bucket/a.wav")).reason is Reason.PERMISSION_DENIED


def test_a_web_server_that_knows_no_such_user_is_no_matter_of_the_job(store):
    store.for_all = (401, "", "who are you")
    assert rejection(lambda: storage.read_bytes(f"{store.url}/a.wav")).reason is Reason.PERMISSION_DENIED


def test_no_credentials_at_all(store, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage.set_options({"s3://": {"endpoint_url": store.url}})
    with pytest.raises(storage.CredentialsError, match="there are no credentials for it"):
        storage.read_bytes("s3://bucket/a.wav")
    assert store.asked == 0


@pytest.mark.parametrize("name", ["RefreshError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"])
def test_clients_that_cannot_renew_their_credentials(name):
    expired = type(name, (Exception,), {})("('invalid_grant: Token has been expired or revoked.', {})")
    tries = 0

    def call():
        nonlocal tries
        tries += 1
        raise expired

    with pytest.raises(storage.CredentialsError, match="gcloud auth application-default login"):
        retry.retried(call, "gs://bucket/a.wav", Stage.READ)
    assert tries == 1


def test_a_wrong_option_is_named_with_its_prefix(store):
    wrong = {
        "s3://odd/": {"endpoint_url": store.url, "nosuch": 1},
        "s3://who/": {"endpoint_url": store.url, "profile": "nobody-has-this-profile"},
        "memory://odd/": {"nosuch": 1},
    }
    storage.set_options(wrong)
    for prefix in wrong:
        with pytest.raises(storage.StorageError) as caught:
            storage.stat(f"{prefix}a.wav")
        assert prefix in str(caught.value)
        assert "nosuch" in str(caught.value) or "nobody-has-this-profile" in str(caught.value)


def test_the_longest_prefix_holds_and_two_of_one_store_work_side_by_side(store):
    with flawed_store.serving(b"another") as other:
        common = {"key": "AKIAEXAMPLE", "secret": "wJalrXUtnFEMIbPxRfiCY"}
        storage.set_options(
            {
                "s3://": {"endpoint_url": store.url, **common},
                "s3://archive/other": {"endpoint_url": other.url, **common},
            }
        )
        assert storage.read_bytes("s3://archive/other/a.wav") == b"another"
        assert storage.read_bytes("s3a://archive/other/a.wav") == b"another"
        assert storage.read_bytes("s3://archive/others/a.wav") == DATA
        assert storage.read_bytes("s3://archive/a.wav") == DATA


def test_options_are_asked_for_in_urls():
    with pytest.raises(ValueError, match="'archive' is no URL"):
        storage.set_options({"archive": {}})
