import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe import storage
from af3pipe.pipelines.job import make_job

# With a beginning that nothing else has: Hypothesis draws words of the code, too, which the job's own keys may be.
_SECRETS = st.text(string.ascii_letters + string.digits + "-._~+/=%", min_size=10, max_size=60).map("S3cr3t".__add__)
_WORDS = st.sampled_from(
    ["", "could not be read: ", "403 Forbidden for url ", "GET '", '{"uri": "', "(", "\n  ", "<"]
)
_ENDS = st.sampled_from(["", ".", "'", '"}', ")", "\n", " in 5 tries", ">"])

_PARAMETERS = [
    "X-Amz-Signature",
    "X-Amz-Credential",
    "X-Amz-Security-Token",
    "AWSAccessKeyId",
    "Signature",
    "sig",
    "token",
    "access_token",
    "key",
    "api_key",
    "GoogleAccessId",
    "X-Goog-Signature",
    "X-Goog-Credential",
]


@given(secret=_SECRETS, name=st.sampled_from(_PARAMETERS), before=_WORDS, after=_ENDS, first=st.booleans())
def test_what_is_signed_in_a_url_is_masked(secret, name, before, after, first):
    query = f"{name}={secret}&Expires=3600" if first else f"Expires=3600&{name}={secret}"
    shown = storage.redact(f"{before}https://host/bucket/a.wav?{query}{after}")
    assert secret not in shown
    assert "https://host/bucket/a.wav?" in shown
    assert "Expires=3600" in shown


@given(secret=_SECRETS.map(lambda text: text.replace("/", "_")), before=_WORDS, after=_ENDS, at=st.booleans())
def test_who_signs_in_by_url_is_masked(secret, before, after, at):
    password = f"a@{secret}" if at else secret
    shown = storage.redact(f"{before}sftp://user:{password}@host/a.wav{after}")
    assert secret not in shown
    assert shown == f"{before}sftp://***@host/a.wav{after}"


_NAMES = ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AZURE_STORAGE_KEY"]


@pytest.mark.parametrize("name", _NAMES)
@given(secret=_SECRETS, before=st.text(max_size=20), after=st.text(max_size=20))
def test_a_secret_of_the_environment_is_masked_wherever_it_stands(name, secret, before, after):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, secret)
        for text in (f"{before}{secret}{after}", repr({"x": secret}), json.dumps([secret]), f"{secret}{secret}"):
            assert secret not in storage.redact(text)


@given(secret=_SECRETS, name=st.sampled_from(["secret", "token", "password", "account_key", "connection_string"]))
def test_a_secret_of_the_storage_options_is_masked_however_deep_it_is(secret, name):
    try:
        for options in ({name: secret}, {"client_kwargs": {name: secret}}, {"token": {"refresh": [secret]}}):
            storage.set_options({"s3://archive/": options})
            assert secret not in storage.redact(f"it was {secret}, and {secret!r}.")
            shown = storage.redact_values({"storage_options": {"s3://archive/": options}})
            assert secret not in json.dumps(shown)
    finally:
        storage.set_options({})


@given(secret=_SECRETS)
def test_no_secret_of_a_job_is_recorded(secret):
    job = make_job(
        {
            "inputs": [f"https://user:{secret.replace('/', '_')}@host/a.wav", f"https://host/a.wav?sig={secret}"],
            "output": "out",
            "max_new_tokens": 16,
            "storage_options": {"s3://archive/": {"key": secret, "secret": secret, "anon": False}},
            "beam": {"azure_connection_string": secret},
        }
    )
    shown = storage.redact_values(job.model_dump(mode="json"))
    assert secret not in json.dumps(shown)
    assert secret.replace("/", "_") not in json.dumps(shown)
    assert shown["max_new_tokens"] == 16
    assert shown["storage_options"] == {"s3://archive/": {"key": "***", "secret": "***", "anon": False}}


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a b/c#1.wav could not be read in 5 tries: Connection reset by peer",
        "https://host/a.wav?version=17&name=b.wav",
        "hf://datasets/user/name@main/data.parquet",
        "max_new_tokens is 16, which is more than the key frames",
        "a@b.example may not read gs://bucket/tokens/a.wav",
    ],
)
def test_what_is_no_secret_stays(text):
    assert storage.redact(text) == text
    assert storage.redact_values({"uri": text, "token": "anon", "anon": True}) == {
        "uri": text,
        "token": "anon",
        "anon": True,
    }


def test_what_a_store_repeats_of_a_signature_is_masked():
    told = "<Error><AWSAccessKeyId>AKIAEXAMPLE</AWSAccessKeyId><SignatureProvided>abc/d=</SignatureProvided></Error>"
    assert storage.redact(told) == (
        "<Error><AWSAccessKeyId>***</AWSAccessKeyId><SignatureProvided>***</SignatureProvided></Error>"
    )
    assert storage.redact("Authorization: Bearer ya29.abcdefgh") == "Authorization: Bearer ***"
