import hashlib
import math
from typing import get_type_hints

import pytest

from af3pipe.models import ModelError, answer, caption, parse, prompt, resolve, stitch, table_of, transcript
from af3pipe.models.family import FAMILIES
from af3pipe.models.tasks import THINK
from af3pipe.schemas import Answer, Decoding, Reason, Rejected, Stage, TimedText, Turn

SOUNDS = ("ticking", "siren", "melody", "silence")


def shout(task, text):
    """A user's parser, named as `tests.models.test_tasks:shout`."""
    if not text:
        raise ValueError("nobody said anything")
    return text.upper(), None


def test_the_defaults_are_greedy_and_long_enough():
    assert caption().decoding == Decoding(max_new_tokens=512)
    assert transcript().decoding == Decoding(max_new_tokens=2048)
    assert answer("What is it?").decoding == Decoding(max_new_tokens=256)
    assert (transcript().strip_prefix, transcript().stitch, caption().stitch) == (True, True, False)


@pytest.mark.parametrize("family", FAMILIES.values())
def test_every_family_has_prompts_of_its_own(family):
    assert resolve(caption(), family).prompt
    assert resolve(transcript(), family).prompt
    assert resolve(caption(prompt="Mine."), family).prompt == "Mine."


def test_prompts_are_those_of_the_model_cards():
    assert resolve(transcript(), "AudioFlamingo3").prompt == "Transcribe the input speech."
    assert resolve(caption(), "MusicFlamingo").prompt.startswith("Describe this track in full detail - tell me the")


def test_a_question_with_choices_is_asked_with_letters():
    task = answer("What is the sound?", SOUNDS)
    assert task.prompt == "What is the sound? (A) ticking (B) siren (C) melody (D) silence"
    assert (task.question, task.choices, task.parser) == ("What is the sound?", SOUNDS, "choice")


def test_a_question_names_itself():
    assert answer("Q?").question_id == answer("Q?").question_id
    assert len({answer("Q?").question_id, answer("R?").question_id, answer("Q?", ("a", "b")).question_id}) == 3
    assert answer("Q?", question_id="q7").question_id == "q7"


@pytest.mark.parametrize("choices", [("one",), ("a", "A."), ("a", " "), tuple(map(str, range(27)))])
def test_choices_no_reply_could_tell_apart_are_refused(choices):
    with pytest.raises(ValueError, match="choices"):
        answer("Q?", choices)


def test_empty_questions_and_prompts_are_refused():
    with pytest.raises(ValueError, match="empty"):
        answer(" ")
    with pytest.raises(ValueError, match="needs a name and a text"):
        prompt("mood", "")


def test_a_task_without_a_prompt_needs_one():
    with pytest.raises(ModelError, match="task 'mood' has no prompt for family 'AudioFlamingo3'"):
        resolve(caption()._replace(name="mood"), "AudioFlamingo3")


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("(B) siren", "siren"),
        ("B", "siren"),
        ("b.", "siren"),
        ("(B)", "siren"),
        ("B) siren", "siren"),
        ("B: Siren.", "siren"),
        ("siren", "siren"),
        ("  SIREN. ", "siren"),
        ('"siren"', "siren"),
        ("The sound is a siren.", "siren"),
        ("(B) a siren, wailing", "siren"),
        ("The answer is (B).", "siren"),
        ("(A) siren", "siren"),
    ],
)
def test_replies_that_name_a_choice(reply, choice):
    task = answer("What is the sound?", SOUNDS)
    assert parse(task, reply) == (reply.strip(), choice)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "E",
        "(E) dog",
        "a dog",
        "A siren or a melody",
        "(A) or (B)",
        "(B) siren (C) melody",
        "(A) a siren",
        "It is not a siren.",
        "It isn't a siren",
        "sirens",
    ],
)
def test_replies_that_name_none_or_several_are_invalid_and_quoted(reply):
    with pytest.raises(Rejected) as caught:
        parse(answer("What is the sound?", SOUNDS), reply)
    assert (caught.value.stage, caught.value.reason) == (Stage.PARSE, Reason.OUTPUT_INVALID)
    assert repr(reply) in caught.value.detail


@pytest.mark.parametrize(
    ("choices", "reply", "choice"),
    [
        (("tone", "rising tone"), "A rising tone.", "rising tone"),
        (("tone", "rising tone"), "tone", "tone"),
        (("yes", "no"), "No.", "no"),
        (("yes", "no"), "No, there is none", None),
        (("B", "A"), "A", None),
        (("B", "A"), "(A) B", "B"),
        (("C major", "A minor"), "A minor", "A minor"),
        (("3", "4"), "(B) 4", "4"),
    ],
)
def test_choices_that_look_like_each_other(choices, reply, choice):
    task = answer("Which?", choices)
    if choice:
        assert parse(task, reply)[1] == choice
    else:
        with pytest.raises(Rejected):
            parse(task, reply)


def test_a_long_reply_is_quoted_in_part():
    with pytest.raises(Rejected) as caught:
        parse(answer("Q?", SOUNDS), "x" * 10_000)
    assert len(caught.value.detail) < 500


def test_json_replies():
    task = prompt("facts", "Give JSON.", parser="json")
    assert parse(task, '```json\n{"key": "C#",  "bpm": 92}\n```') == ('{"key":"C#","bpm":92}', None)
    with pytest.raises(Rejected, match="task 'facts'"):
        parse(task, "The key is C#.")


def test_a_parser_of_the_users_own():
    task = prompt("loud", "What?", parser="tests.models.test_tasks:shout")
    assert parse(task, "hey") == ("HEY", None)
    with pytest.raises(Rejected, match="nobody said anything"):
        parse(task, "")


@pytest.mark.parametrize("parser", ["shout", "no.such.module:f", "tests.models.test_tasks:no_such", ":", "x:"])
def test_unknown_parsers_are_found_before_anything_runs(parser):
    with pytest.raises(ModelError, match="choose from choice, json, text"):
        resolve(prompt("loud", "What?", parser=parser), "AudioFlamingo3")


@pytest.mark.parametrize(
    "task",
    [
        caption(think=True),
        transcript(think=True),
        answer("Who?", think=True),
        prompt("mood", "What mood?", think=True),
        answer("And?", after=answer("Who?", think=True), think=True),
    ],
    ids=lambda task: f"{task.name} {len(task.history)}",
)
def test_thinking_is_asked_for_once(task):
    resolved = resolve(task, "AudioFlamingo3")
    assert resolved.prompt == resolve(task._replace(think=False), "AudioFlamingo3").prompt + THINK
    assert resolve(resolved, "AudioFlamingo3") == resolved
    assert resolved.think


def test_thinking_is_asked_for_in_the_words_of_the_model_card():
    asked = resolve(prompt("mood", "What mood?", think=True), "AudioFlamingo3").prompt
    assert asked == "What mood?\nPlease think and reason about the input audio before you respond."


def test_a_follow_up_has_all_turns_before_it_as_they_are_asked():
    first = answer("Who speaks?", ("a man", "a woman"), think=True)
    second = answer("How old?", after=first)
    third = answer("Are you sure?", after=second)
    asked = [resolve(task, "AudioFlamingo3") for task in (first, second, third)]
    assert third.history == (
        Turn("Who speaks? (A) a man (B) a woman" + THINK),
        Turn("How old?"),
    )
    assert [task.history for task in asked] == [(), asked[0].turns, asked[1].turns]
    assert first.history == ()


def test_the_same_question_after_another_one_is_another_question():
    why = [
        answer("Why?", after=before)
        for before in (
            answer("Who?"),
            answer("Where?"),
            answer("Who?", think=True),
            answer("Why?"),
            answer("Who?", after=answer("Where?")),
            None,
        )
    ]
    assert len({task.question_id for task in why}) == len(why)
    assert why[-1].question_id == "87bcfe608650"  # as before there were follow-ups
    assert why[0].question_id == answer("Why?", after=answer("Who?")).question_id


def test_a_follow_up_to_a_prompt_that_is_not_known_yet():
    with pytest.raises(ValueError, match="task 'caption' depends on the model"):
        answer("Why?", after=caption())
    asked = resolve(caption(), "MusicFlamingo")
    assert answer("Why?", after=asked).history == (Turn(asked.prompt),)


@pytest.mark.parametrize(
    "choices",
    [
        SOUNDS,
        ("yes", "no"),
        ("B", "A"),
        ("A", "B"),
        ("tone", "rising tone"),
        ("(B) dog", "dog"),
        ("a dog", "not a dog", "neither"),
        ("C major", "A minor"),
        ("3", "4", "'5'"),
        tuple(f"choice {index}" for index in range(26)),
    ],
    ids=str,
)
def test_every_reply_that_a_constrained_question_allows_names_its_choice(choices):
    task = answer("Which?", choices, constrained=True)
    named = [parse(task, reply)[1] for reply in task.decoding.one_of]
    assert set(named) == set(choices)
    for choice, label in zip(choices, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=False):
        assert f"({label}) {choice}" in task.decoding.one_of or choice in task.decoding.one_of


def test_both_forms_of_a_choice_are_allowed():
    assert answer("Which?", ("cat", "dog"), constrained=True).decoding.one_of == ("(A) cat", "cat", "(B) dog", "dog")
    assert answer("Which?", ("cat", "dog")).decoding.one_of == ()
    # "B" alone is a label, too.
    assert answer("Which?", ("B", "A"), constrained=True).decoding.one_of == ("(A) B", "(B) A")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"why": {"type": "string"}, "bpm": {"type": "integer"}}},
        '{ "type": "object",\n "properties": {"why": {"type": "string"}, "bpm": {"type":"integer"}} }',
    ],
    ids=["mapping", "text"],
)
def test_a_json_schema_has_one_spelling_and_keeps_its_order(schema):
    task = prompt("facts", "Give JSON.", json_schema=schema)
    assert task.decoding.json_schema == (
        '{"type":"object","properties":{"why":{"type":"string"},"bpm":{"type":"integer"}}}'
    )
    assert task.parser == "json"
    assert answer("What?", json_schema=schema).parser == "json"
    own = prompt("facts", "Give JSON.", json_schema=schema, parser="tests.models.test_tasks:shout")
    assert own.parser == "tests.models.test_tasks:shout"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: prompt("facts", "Give.", json_schema="{"), "json_schema is not JSON"),
        (lambda: prompt("facts", "Give.", json_schema="[1]"), "json_schema must be a JSON object"),
        (lambda: prompt("facts", "Give.", json_schema={"x": object()}), "json_schema is not JSON"),
        (lambda: answer("Q?", constrained=True), "constrained needs choices"),
        (lambda: answer("Q?", ("a", "b"), json_schema={}), "either choices or a json_schema"),
        (
            lambda: prompt("x", "Q?", decoding=Decoding(one_of=("a",)), json_schema={}),
            "either one_of or a json_schema",
        ),
        (lambda: answer("Q?", ("a", "b"), constrained=True, think=True), "no room to think"),
        (lambda: prompt("x", "Q?", json_schema={}, think=True), "no room to think"),
    ],
)
def test_wishes_that_cannot_hold_together(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_tables():
    assert [table_of(name) for name in ("caption", "transcript", "answer", "mood")] == [
        "captions",
        "transcripts",
        "answers",
        "answers",
    ]


def part(index, text, **changes):
    plain = {str: "x", int: 1, float: 1.0, bool: False}
    blank = Answer._make(plain.get(hint, ()) for hint in get_type_hints(Answer).values())
    segment = {"segment_index": index, "start_s": 600.0 * index, "end_s": 600.0 * (index + 1), "text": text}
    counts = {"audio_tokens": 10, "prompt_tokens": 20, "new_tokens": 3}
    return blank._replace(answer_key=f"key{index}", finish_reason="stop", **segment, **counts)._replace(**changes)


def test_stitching_joins_segments_in_order():
    parts = [part(2, " three "), part(0, "one two"), part(1, "")]
    whole = stitch([parts[0]._replace(duration_s=1800.0), parts[1], parts[2]._replace(finish_reason="length")])
    assert whole.text == "one two three"
    assert (whole.segment_index, whole.start_s, whole.end_s, whole.duration_s) == (0, 0.0, 1800.0, 1800.0)
    assert whole.segments == (
        TimedText(0.0, 600.0, "one two"),
        TimedText(600.0, 1200.0, ""),
        TimedText(1200.0, 1800.0, "three"),
    )
    assert (whole.audio_tokens, whole.prompt_tokens, whole.new_tokens) == (30, 60, 9)
    assert whole.finish_reason == "length"
    assert whole.answer_key == hashlib.sha256(b"key0key1key2").hexdigest()


def test_stitching_combines_levels_by_length():
    whole = stitch(
        [
            part(0, "a", peak_dbfs=-60.0, rms_dbfs=-100.0, clipped_share=0.0, silent=True),
            part(1, "b", end_s=900.0, peak_dbfs=-1.0, rms_dbfs=-10.0, clipped_share=0.3, silent=False),
        ]
    )
    assert whole.levels == pytest.approx((-1.0, -10.0 + 10 * math.log10(300 / 900), 0.1, False))
    assert stitch([part(0, "a", silent=True), part(1, "b", silent=True)]).silent


def test_one_segment_keeps_its_key():
    whole = stitch([part(0, "one")])
    assert whole.answer_key == "key0"
    assert whole.segments == (TimedText(0.0, 600.0, "one"),)


def test_what_cannot_be_stitched():
    with pytest.raises(ValueError, match="no answers"):
        stitch([])
    with pytest.raises(ValueError, match="different tasks or recordings"):
        stitch([part(0, "a"), part(1, "b")._replace(recording_id="another")])
