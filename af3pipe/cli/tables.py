"""Declares the commands that read or rewrite an output: `af3pipe audit`, `compact` and `export`.

Each imports what it needs when it is called: the pipelines take seconds to import.
"""

import json
import tempfile
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from af3pipe.cli.console import EXIT_FAILED, EXIT_WRONG_JOB, OUT, say, stop
from af3pipe.cli.imports import quick_imports

if TYPE_CHECKING:
    from af3pipe.tables.audit import Audit

_TABLES = ["captions", "transcripts", "answers", "recordings", "dead_letters"]
_OUT = typer.Argument(metavar="OUT", help="Output folder or URL of earlier runs.")


def _set_storage(job_file: str | None) -> str | None:
    if job_file is not None:
        from af3pipe import storage
        from af3pipe.pipelines.job import JobError
        from af3pipe.pipelines.job_file import load_job_values

        try:
            storage.set_options(load_job_values(job_file).get("storage_options") or {})
        except (JobError, ValueError) as error:
            stop(f"--job {job_file}: {error}", EXIT_WRONG_JOB)
    return job_file


_JOB = typer.Option("--job", callback=_set_storage, help="Job file whose storage_options are used.")


def audit(
    output: Annotated[str, _OUT],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Input to list and compare with OUT: a file, folder, glob or manifest, as for run; may be repeated.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    job_file: Annotated[str | None, _JOB] = None,
) -> None:
    """Verify that the tables and run records of OUT are consistent, and say how to repair what is not.

    Nothing is changed. Exit codes: 0 consistent; 1 problems found; 2 OUT is not an output of af3pipe, or OUT or an
    input cannot be read.
    """
    with quick_imports():
        from af3pipe.cli.outputs import require_output
        from af3pipe.pipelines.audit import audit as audit_output
        from af3pipe.schemas import Rejected
        from af3pipe.storage import StorageError
        from af3pipe.tables.audit import AuditError

    try:
        require_output(output)
        report = audit_output(output, inputs or [])
    except (AuditError, Rejected, StorageError) as error:
        stop(str(error), EXIT_WRONG_JOB)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    else:
        _show(report)
    if not report.right:
        raise typer.Exit(EXIT_FAILED)


def _show(report: "Audit") -> None:
    table = Table(title="Runs", title_justify="left")
    for title in ("run", "finished", "recordings", "answers", "dead letters"):
        table.add_column(title, overflow="fold")
    for run in report.runs:
        counts = (run.recordings, run.answers, run.dead_letters)
        table.add_row(run.run_id, "yes" if run.finished else "no", *map(_counts, counts))
    OUT.print(table, markup=False)
    rows = ", ".join(f"{number} in {name}/" for name, number in report.rows.items() if number)
    say(f"Rows: {rows or 'none'}, in {sum(report.files.values())} files")
    say(f"Recordings now: {sum(report.states.values())} = {_counts(report.states)}")
    if report.listed is not None:
        say(f"Recordings in the input: {report.listed}")
    for note in report.notes:
        say(f"Note: {note}", style="dim")
    for problem in report.problems:
        say(f"WRONG ({problem.kind}): {problem.number} {problem.what}", style="red")
        say(f"  for example {problem.example}")
        say(f"  what to do: {problem.advice}")
    say("The output is consistent." if report.right else f"{len(report.problems)} problems found.")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "none"


def compact(
    output: Annotated[str, _OUT],
    file_mib: Annotated[
        int, typer.Option(min=1, help="Target file size in MiB. Files larger than half of it are not rewritten.")
    ] = 128,
    only_latest: Annotated[
        bool,
        typer.Option("--latest", help="Also delete superseded rows: those that are not in the latest-results view."),
    ] = False,
    include_unfinished: Annotated[
        bool,
        typer.Option(
            help="Also rewrite files of runs that have no record; use it only when none of them is still running."
        ),
    ] = False,
    job_file: Annotated[str | None, _JOB] = None,
) -> None:
    """Merge the many small files of OUT into few, sorted by recording, without duplicate rows.

    If it is killed, no row is lost, and the next `af3pipe compact` completes or reverts it. Exit codes: 0 done; 1
    failed, nothing was replaced; 2 OUT is not an output of af3pipe.
    """
    with quick_imports():
        from af3pipe.cli.outputs import require_output
        from af3pipe.schemas import Rejected
        from af3pipe.storage import StorageError
        from af3pipe.tables.compact import CompactError
        from af3pipe.tables.compact import compact as compact_output
        from af3pipe.tables.latest import NotATable

    try:
        require_output(output)
        done = compact_output(
            output, file_mib=file_mib, only_latest=only_latest, include_unfinished=include_unfinished
        )
    except (CompactError, NotATable, Rejected, StorageError) as error:
        stop(f"nothing was replaced: {error}", EXIT_FAILED)
    except OSError as error:  # of a temporary file: errors of the output are StorageError
        stop(
            f"nothing was replaced: {error}; is the folder for temporary files full ({tempfile.gettempdir()}, set by "
            "TMPDIR)?",
            EXIT_FAILED,
        )
    if done.recovered:
        say(f"{done.recovered} killed compactions were completed or reverted")
    if done.temporary:
        say(f"{done.temporary} temporary files of killed writes were removed")
    if done.compaction_id is None:
        say("Nothing to compact")
    else:
        say(f"{done.files_before} files are now {done.files_after}, with {done.rows} rows")
    if done.duplicates:
        say(
            f"{done.duplicates} duplicate rows were deleted; the newest of each was kept"
            + (f"; {done.differing} of them had different texts" if done.differing else "")
        )
    if done.superseded:
        say(f"{done.superseded} superseded rows were deleted")
    if done.left_alone:
        say(f"{done.left_alone} files of unfinished runs were not rewritten")


def export(
    output: Annotated[str, _OUT],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Folder or URL that gets one Parquet file per table.")
    ],
    table: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(_TABLES)}; by default all that have rows; may be repeated."),
    ] = None,
    job_file: Annotated[str | None, _JOB] = None,
) -> None:
    """Write the latest-results view to TARGET: each table as one Parquet file, without superseded rows."""
    unknown = sorted(set(table or ()) - set(_TABLES))
    if unknown:
        stop(f"--table is {unknown[0]!r}; choose from {', '.join(_TABLES)}", EXIT_WRONG_JOB)
    with quick_imports():
        from af3pipe.cli.outputs import require_output
        from af3pipe.schemas import Rejected
        from af3pipe.storage import StorageError
        from af3pipe.tables.latest import NotATable, export_latest

    try:
        require_output(output)
        written = export_latest(output, target, table or _TABLES)
    except (NotATable, Rejected, StorageError) as error:
        stop(str(error), EXIT_FAILED)
    if not written:
        stop(f"{output} has no rows to export", EXIT_WRONG_JOB)
    for uri, rows in written.items():
        say(f"{rows} rows in {uri}")
