"""Every job that docs/tasks.md shows is one, and asks what the text says."""

import re
from pathlib import Path

import pytest
import yaml

from af3pipe.pipelines.job import make_job

TEXT = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
JOBS = {
    re.findall(r"^##? (.+)$", TEXT[: found.start()], re.MULTILINE)[-1]: found[1]
    for found in re.finditer(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
}


@pytest.mark.parametrize(
    ("title", "asked"),
    [
        ("Tasks and questions", ["caption", "transcript", "mood", "answer", "answer", "answer"]),
        ("Choices", ["answer"]),
        ("JSON", ["facts"]),
        ("Follow-up questions", ["answer"] * 4),
        ("Thinking", ["answer"] * 2),
        ("Sampling", ["story"]),
    ],
)
def test_a_job_that_is_shown_is_one(title, asked):
    assert [task.name for task in make_job(yaml.safe_load(JOBS[title]), title).all_tasks()] == asked


def test_all_jobs_shown_are_looked_at():
    assert len(JOBS) == TEXT.count("```yaml") == 6


def test_the_keys_do_what_the_text_says():
    tasks = {title: make_job(yaml.safe_load(text)).all_tasks() for title, text in JOBS.items()}
    assert [len(task.history) for task in tasks["Follow-up questions"]] == [0, 1, 1, 2]
    assert [task.think for task in tasks["Thinking"]] == [True, False]
    assert "(A) speech" in tasks["Choices"][0].decoding.one_of
    assert tasks["JSON"][0].decoding.json_schema.startswith('{"type":"object","properties":{"genre"')
    assert tasks["Sampling"][0].decoding.stop == ("The end", "###")
