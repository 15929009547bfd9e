"""Prints what a run wrote (answers, dead letters, counts) and chooses the exit code of the command."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from af3pipe import storage
from af3pipe.cli.console import EXIT_DEAD_LETTERS, EXIT_FAILED, EXIT_NO_ANSWERS, OUT, say, stop
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.pipelines.job import JobConfig
from af3pipe.pipelines.report import RunReport
from af3pipe.schemas import TerminalState
from af3pipe.tables.reader import files_of_run
from af3pipe.tables.reconcile import read_rows
from af3pipe.transforms.verify import Verified


def show_answers(job: JobConfig, report: RunReport) -> None:
    """Prints a table of the answers, one row per recording."""
    by_uri: dict[str, dict[str, str]] = {}
    for row in _rows(job, report, ANSWER_TABLES):
        cells = by_uri.setdefault(row["uri"], {"seconds": f"{row['duration_s'] or row['end_s']:.1f}"})
        cells[row["question"] or row["task"]] = row["text"]
    titles = list(dict.fromkeys(title for cells in by_uri.values() for title in cells))
    table = Table(title="Answers", title_justify="left")
    table.add_column("recording", overflow="fold")
    for title in titles:
        table.add_column(title)
    for uri, cells in by_uri.items():
        table.add_row(storage.name(uri), *(cells.get(title, "") for title in titles))
    OUT.print(table, markup=False)


def show_dead_letters(job: JobConfig, report: RunReport) -> None:
    """Prints a table of the dead letters."""
    table = Table("recording", "stage", "reason", "detail", title="Dead letters", title_justify="left")
    for row in _rows(job, report, ("dead_letters",)):
        table.add_row(storage.name(row["uri"]), row["stage"], row["reason"], row["detail"])
    OUT.print(table, markup=False)


def show_counts(job: JobConfig, report: RunReport) -> None:
    """Prints the counts of recordings, answers and dead letters, and where the rows are."""
    counts = report.counts
    states = ", ".join(f"{number} {state}" for state, number in sorted(counts.states.items())) or "none"
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.dead_letters.items()))
    answers = ", ".join(f"{number} in {table}/" for table, number in counts.answers.items()) or "none"
    kept = counts.kept_dead_letters
    speed = counts.audio_s / report.wall_s if report.wall_s else 0.0
    balance = "reconciles" if counts.reconciled else "DOES NOT RECONCILE"
    for line in (
        f"Recordings: {counts.found} found = {states} ({balance})",
        f"Answers: {answers}",
        f"Dead letters: {reasons or 'none'}" + (f"; {kept} of earlier runs are still current" if kept else ""),
        f"Audio: {counts.audio_s:.1f} s in {report.wall_s:.1f} s, {speed:.1f} seconds of audio per second",
        *([_verified(report.verified)] if report.verified else []),
        f"Written to {job.output}; the run's record is {storage.join(job.output, '_runs', report.run_id)}.json",
    ):
        say(line)


def _verified(verified: Verified) -> str:
    line = (
        f"Verified {verified.requests} requests by plain generate: "
        f"{verified.equal} of {verified.replies} replies equal"
    )
    if verified.equal < verified.replies and not verified.wrong:
        share = verified.equal / verified.replies
        line += f" ({share:.1%}; rounding in {', '.join(verified.dtypes)} makes some differ)"
    if verified.not_asked:
        missed, first = verified.sampled - verified.requests, verified.not_asked[0]
        line += f"; {missed} could not be run again, for example {first.uri}: {first.detail}"
    return line


def exit_by(job: JobConfig, report: RunReport) -> None:
    """Ends the program with an exit code of `console` unless the run needs no attention."""
    counts = report.counts
    if not counts.reconciled:
        stop("the counts do not reconcile: " + "; ".join(counts.problems), EXIT_FAILED)
    if report.unverified:
        stop(f"the replies do not verify: {report.unverified}", EXIT_FAILED)
    if report.refused:
        stop(report.refused, EXIT_FAILED)
    dead_letters = sum(counts.dead_letters.values()) + counts.kept_dead_letters
    if dead_letters > job.dead_letters_allowed(counts.found):
        stop(
            f"{dead_letters} dead letters are more than --fail-on-dead-letters {job.fail_on_dead_letters} allows",
            EXIT_DEAD_LETTERS,
        )
    if not _has_answers_or_nothing_to_do(counts.states):
        stop("none of the recordings processed has an answer; their dead letters say why", EXIT_NO_ANSWERS)


def _has_answers_or_nothing_to_do(states: Mapping[str, int]) -> bool:
    """Returns whether a recording has an answer of this run, or all were processed by earlier runs."""
    processed = {state: number for state, number in states.items() if number and state != TerminalState.SKIPPED_DONE}
    return not processed or not processed.keys().isdisjoint({TerminalState.OK, TerminalState.OK_PARTIAL})


def _rows(job: JobConfig, report: RunReport, tables: tuple[str, ...]) -> list[dict[str, Any]]:
    files = files_of_run(job.output, report.run_id)
    columns = {"dead_letters": ["uri", "stage", "reason", "detail"]}
    answer_columns = ["uri", "task", "question", "text", "duration_s", "end_s"]
    rows = [row for table in tables for row in read_rows(files[table], columns.get(table, answer_columns))]
    return sorted(rows, key=lambda row: str(row["uri"]))
