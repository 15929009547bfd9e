"""Dead letters: what they say of their recording, and that nothing secret is in them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.schemas import Existing, Question, Reason, Recording, Rejected, Stage, to_metadata
from af3pipe.transforms.outcome import recording_of, to_dead_letter
from tests.rows import rows

GONE = Rejected(Stage.READ, Reason.NOT_FOUND, "gone")


@given(rows(Recording))
def test_a_dead_letter_gives_its_recording_back(recording):
    recording = recording._replace(
        uri=f"s3://bucket/{recording.uri.encode().hex()}", work_key=None, existing=Existing()
    )
    letter = to_dead_letter(GONE, recording, stage=Stage.READ)
    assert recording_of(letter.input) == recording
    assert letter.metadata == recording.metadata


def test_a_dead_letter_knows_its_recording_in_every_field():
    recording = Recording(
        'i"d/\u2028\x00',
        "/a b.wav",
        1,
        None,
        "now",
        1.5,
        None,
        (Question("q", "Who?", ("a", "b"), None, "p"), Question(None, "What?")),
        to_metadata({"k": "v", "": "", "number": 7, "list": [1, None, {"a": True}]}),
        "left",
        2,
    )
    letter = to_dead_letter(ValueError("x"), recording._replace(work_key="w"), stage=Stage.DECODE)
    assert recording_of(letter.input) == recording
    again = recording._replace(work_key="w2", existing=Existing((), ((letter.dead_letter_key, "run 1"),)))
    assert to_dead_letter(ValueError("y"), again, stage=Stage.DECODE).run_id == "run 1"
    assert to_dead_letter(ValueError("y"), again._replace(etag="new"), stage=Stage.DECODE).run_id == ""


def test_the_input_of_format_1_has_metadata_as_pairs():
    found = recording_of(
        json.dumps({"recording": {"recording_id": "7", "uri": "a", "metadata": [["speaker", "Ada"]]}})
    )
    assert found == Recording("7", "a", metadata='{"speaker": "Ada"}')


SECRETS = ["https://x/a?token=abcdef", 'say ?token=abc"def', "abcdef", 1234, ["?sig=abcdef", {"password": "abcdef"}]]


@pytest.mark.parametrize("secret", SECRETS, ids=repr)
@pytest.mark.parametrize("name", ["password", "note", "?token"])
def test_secrets_in_metadata_are_masked_and_all_of_it_stays_json(name, secret):
    plain = {"speaker": "Ada", "bpm": 128.5}
    recording = Recording("id", "s3://b/a.wav?X-Amz-Signature=abcdef", metadata=to_metadata({name: secret} | plain))
    letter = to_dead_letter(GONE, recording, stage=Stage.READ)
    is_masked = name != "note" or secret not in ("abcdef", 1234)
    for text in (letter.metadata, letter.input, letter.uri):
        assert ("abcdef" in text or "1234" in text) != is_masked or text is letter.uri
    assert "abcdef" not in letter.uri
    found = json.loads(letter.metadata)
    assert {key: found[key] for key in plain} == plain
    assert len(found) == 3
    assert recording_of(letter.input).metadata == letter.metadata


@given(
    st.dictionaries(st.text(max_size=9), st.text(st.sampled_from("password=?&\"\\'{}: ,x"), max_size=20), max_size=4)
)
def test_whatever_is_masked_the_metadata_stays_json(columns):
    letter = to_dead_letter(GONE, Recording("id", "a", metadata=to_metadata(columns)), stage=Stage.READ)
    assert len(json.loads(letter.metadata)) <= len(columns)
    assert recording_of(letter.input).metadata == letter.metadata
