"""The exit code that a run's counts give."""

import itertools

import pytest
import typer
from af3pipe.pipelines.report import RunReport

from af3pipe.cli import console
from af3pipe.cli.results import exit_by
from af3pipe.pipelines.job import make_job
from af3pipe.schemas import TerminalState
from af3pipe.tables.reconcile import RunCounts


def exit_code(states, *, dead_letters=0, kept=0, problems=(), **job):
    counts = RunCounts(sum(states.values()), states, {}, {"unreadable": dead_letters}, kept, 0.0, tuple(problems))
    try:
        exit_by(make_job({"inputs": "in", "output": "out", **job}), RunReport("1", counts, 1.0, {}))
    except typer.Exit as ended:
        return ended.exit_code
    return 0


@pytest.mark.parametrize("numbers", [*itertools.product([0, 1, 3], repeat=len(TerminalState))])
def test_no_answer_at_all_is_no_success_unless_all_was_done_before(numbers):
    states = {state.value: number for state, number in zip(TerminalState, numbers, strict=True) if number}
    answered = states.get("ok", 0) + states.get("ok_partial", 0)
    failed = states.get("dead_letter", 0)
    assert exit_code(states) == (console.EXIT_NO_ANSWERS if failed and not answered else 0)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (console.EXIT_FAILED, {"problems": ["1 is missing"], "fail_on_dead_letters": 0}),
        (console.EXIT_DEAD_LETTERS, {"fail_on_dead_letters": 0}),
        (console.EXIT_NO_ANSWERS, {"fail_on_dead_letters": 1}),
    ],
)
def test_the_first_of_several_reasons_decides(code, found):
    assert exit_code({"dead_letter": 1}, dead_letters=1, **found) == code


def test_each_code_has_one_meaning():
    codes = [value for name, value in vars(console).items() if name.startswith("EXIT_")]
    assert len(codes) == len(set(codes)) == 6
