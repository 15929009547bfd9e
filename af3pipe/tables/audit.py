"""Audits an output: checks its tables and run records for missing, duplicate and unreferenced rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected
from af3pipe.tables.audit_checks import RUN_AGAIN, Checks, Problem, RunAudit
from af3pipe.tables.compaction_record import Compactions
from af3pipe.tables.formats import NewerFormat, NotATable
from af3pipe.tables.latest import Latest
from af3pipe.tables.reader import Files, table_files
from af3pipe.tables.run_records import Runs

__all__ = ["Audit", "AuditError", "Compared", "Problem", "RunAudit", "audit"]

_ATTEMPTS = 5


class AuditError(Exception):
    """An output cannot be audited: there is none, or it cannot be read."""


class Audit(NamedTuple):
    """Reports the numbers of rows of an output and its problems.

    Attributes:
        output: Folder of the tables.
        files: Number of files by table.
        rows: Number of rows by table.
        states: Number of recordings in the latest view by terminal state.
        runs: The runs, in the order of their beginning.
        problems: What is inconsistent; empty if nothing is.
        notes: Remarks that are not errors.
        listed: Number of recordings in the inputs; None if no inputs were given.
    """

    output: str
    files: dict[str, int]
    rows: dict[str, int]
    states: dict[str, int]
    runs: list[RunAudit]
    problems: list[Problem]
    notes: list[str]
    listed: int | None = None

    @property
    def right(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a dict that can be dumped to JSON."""
        return {
            "right": self.right,
            **self._asdict(),
            "runs": [run._asdict() for run in self.runs],
            "problems": [problem._asdict() for problem in self.problems],
        }


class Compared(NamedTuple):
    """Counts how a fresh listing of the inputs differs from an output; each count comes with an example URI.

    Attributes:
        listed: Number of recordings in the inputs.
        never: Recordings without a row in the output.
        changed: Recordings that have changed since they were processed.
        gone: Recordings of the output that are no longer in the inputs.
    """

    listed: int
    never: tuple[int, str]
    changed: tuple[int, str]
    gone: tuple[int, str]


def audit(output: str, compare_inputs: Callable[[Latest, Runs], Compared] | None = None) -> Audit:
    """Compares an output's rows with each other, with its run records, and with a fresh listing of its inputs.

    It changes nothing. Memory use: hashes of keys, about 0.12 KB per row.

    Args:
        output: Folder of the tables.
        compare_inputs: Compares the latest view with a listing. Recordings without a row, and those that have
            changed, are problems.

    Raises:
        AuditError: There is no output of a run, or a later version of af3pipe wrote a part of it.
        Rejected: The store cannot be read.
    """
    output = storage.canonical(output)
    try:
        for _ in range(_ATTEMPTS - 1):
            try:
                return _audit(output, compare_inputs)
            except Rejected as rejected:
                if rejected.reason is not Reason.NOT_FOUND:  # else a compaction has replaced a file meanwhile
                    raise
        return _audit(output, compare_inputs)
    except NewerFormat as error:
        raise AuditError(str(error)) from error


def _audit(output: str, compare_inputs: Callable[[Latest, Runs], Compared] | None) -> Audit:
    files, runs, under_way = _snapshot(output)
    if not any(files.values()) and not runs.known:
        raise AuditError(f"{output} has no tables and no runs of af3pipe; is this the folder that --output named?")
    problems: list[Problem] = []
    while True:
        try:
            checks = Checks(files, runs)
            break
        except NewerFormat:
            raise
        except NotATable as error:
            files = {table: [info for info in infos if info != error.info] for table, infos in files.items()}
            advice = f"delete it and {RUN_AGAIN}: the recordings of its rows are processed again"
            problems.append(Problem("unreadable", 1, str(error), error.info.uri, advice))
    notes = [
        f"a compaction, {found}, is under way or was killed: `af3pipe compact` finishes or undoes it"
        for found in under_way
    ]
    problems += checks.problems
    listed = None
    if compare_inputs is not None:
        found = compare_inputs(Latest(output, files), runs)
        listed = found.listed
        for kind, what, (number, example) in (
            ("never_processed", "recordings of the input have never been processed", found.never),
            ("changed", "recordings have changed since they were processed", found.changed),
        ):
            if number:
                problems.append(Problem(kind, number, what, example, RUN_AGAIN))
        if found.gone[0]:
            notes.append(f"{found.gone[0]} recordings are not in the input any more, for example {found.gone[1]}")
    return Audit(
        output=output,
        files={table: len(infos) for table, infos in files.items()},
        rows=checks.rows,
        states=checks.states,
        runs=checks.runs,
        problems=problems,
        notes=[*notes, *checks.notes],
        listed=listed,
    )


def _snapshot(output: str) -> tuple[Files, Runs, list[str]]:
    """Lists files and run records at one moment: each row is in a file, or counted as dropped by a compaction."""
    while True:
        before = Compactions(output)
        runs = Runs(output)
        files = table_files(output)
        if Compactions(output).states == before.states:
            return files, runs, [found.compaction_id for found in before.under_way]
