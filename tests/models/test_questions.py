"""One spelling of a question gives one question, whether a manifest, a job file or a flag has it."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from af3pipe import cli
from af3pipe.cli import running
from af3pipe.models.questions import question_keys, read_questions
from af3pipe.pipelines.job import JobError, make_job
from af3pipe.schemas import Question
from af3pipe.transforms.inputs.manifest import read_manifest

SPELLINGS = {
    "text": ("Who?", [("Who?", (), None)]),
    "text with choices": ("Who? | cat | dog", [("Who?", ("cat", "dog"), None)]),
    "list of choices": ({"question": "Who?", "choices": ["cat", "dog"]}, [("Who?", ("cat", "dog"), None)]),
    "choices as text": ({"question": "Who?", "choices": "cat | dog"}, [("Who?", ("cat", "dog"), None)]),
    "numbers as choices": ({"question": "How many?", "choices": [1, 2.5]}, [("How many?", ("1", "2.5"), None)]),
    "verbatim text": ({"question": "A | B?"}, [("A | B?", (), None)]),
    "id": ({"question": "Who?", "id": "who"}, [("Who?", (), "who")]),
    "number as id": ({"question": "Who?", "id": 7}, [("Who?", (), "7")]),
    "prompt": ({"question": "Who?", "prompt": "Name it."}, [("Who?", (), None)]),
    "prompt alone": ({"prompt": "Name it."}, [("Name it.", (), None)]),
    "follow-ups": (
        {"question": "Who?", "id": "a", "then": ["Why? | x | y", {"question": "How?", "then": "Really?"}]},
        [("Who?", (), "a"), ("Why?", ("x", "y"), None), ("How?", (), None), ("Really?", (), None)],
    ),
}


def by_manifest(item, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"uri": "a.wav", "questions": [item]}))
    (recording,) = read_manifest(str(path))
    return recording.questions


def of_job(job):
    """What the questions of a job are: their ids are those that rows have."""
    return [
        (task.question_id, task.question, task.choices, task.prompt, len(task.history)) for task in job.all_tasks()
    ]


def as_job_has_them(questions):
    depths, found = {}, []
    for one in questions:
        depths[one.question_id] = depths[one.after] + 1 if one.after else 0
        labelled = " ".join([one.text, *(f"({letter}) {c}" for letter, c in zip("ABC", one.choices, strict=False))])
        found.append((one.question_id, one.text, one.choices, one.prompt or labelled, depths[one.question_id]))
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_question_is_the_same_wherever_it_stands(spelling, tmp_path, monkeypatch):
    item, expected = SPELLINGS[spelling]
    questions = list(read_questions(item))
    assert [(one.text, one.choices) for one in questions] == [(text, choices) for text, choices, _ in expected]
    assert all(one.question_id == id for one, (_, _, id) in zip(questions, expected, strict=True) if id)
    assert list(by_manifest(item, tmp_path)) == questions

    in_file = yaml.safe_load(yaml.safe_dump({"inputs": "a.wav", "output": "out", "questions": [item]}))
    assert of_job(make_job(in_file)) == as_job_has_them(questions)

    jobs = []
    monkeypatch.setattr(running, "run_job", lambda job, flags: jobs.append(job) or pytest.skip.Exception)
    monkeypatch.setattr(running, "show_counts", lambda *_: None)
    monkeypatch.setattr(running, "exit_by", lambda *_: None)
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(item))
    flags = [["--questions", str(file)], *([["--question", item]] if isinstance(item, str) else [])]
    for flag in flags:
        CliRunner().invoke(cli.app, ["run", "a.wav", "--output", "out", *flag], catch_exceptions=False)
    assert [of_job(job) for job in jobs] == [as_job_has_them(questions)] * len(flags)


WRONG = {
    "no text": ({"id": "who"}, "question is None; it must be a text"),
    "empty": ("  ", "question is '  '; it must be a text"),
    "number": (5, "question is 5; it must be a text, or an object"),
    "boolean as choice": (
        {"question": "Is it?", "choices": [True, False]},
        "choices has True, which is not a text: quote it",
    ),
    "object as choice": ({"question": "Is it?", "choices": [{}]}, "choices has {}, which is not a text"),
    "choices of no list": ({"question": "Is it?", "choices": 5}, "choices is 5; it must be a list"),
    "boolean as id": ({"question": "Is it?", "id": True}, "id has True"),
    "prompt of no text": ({"question": "Is it?", "prompt": 5}, "prompt is 5; it must be a text"),
}


@pytest.mark.parametrize("spelling", WRONG)
def test_what_is_no_question_is_refused_in_the_same_words(spelling, tmp_path):
    item, says = WRONG[spelling]
    (tmp_path / "m.jsonl").write_text(json.dumps({"uri": "a.wav", "questions": [item]}))
    (letter,) = read_manifest(str(tmp_path / "m.jsonl"))
    assert says in letter.detail
    with pytest.raises(JobError) as error:
        make_job({"inputs": "a.wav", "output": "out", "questions": [item]})
    assert says in str(error.value)


def test_the_choices_of_a_row_make_its_question_verbatim():
    assert question_keys("A | B?", ["cat", "dog"]) == {"question": "A | B?", "choices": ("cat", "dog")}


words = st.text("abc XYZ?", min_size=1).filter(str.strip).map(str.strip)


@given(words, st.lists(words, unique=True, min_size=2, max_size=5))
def test_text_list_and_object_agree(text, choices):
    if len({choice.casefold() for choice in choices}) < len(choices):
        return
    try:
        expected = list(read_questions({"question": text, "choices": choices}))
    except ValueError:
        return  # no reply could tell them apart
    assert list(read_questions(" | ".join([text, *choices]))) == expected
    assert list(read_questions(text, choices)) == expected
    assert isinstance(expected[0], Question)
