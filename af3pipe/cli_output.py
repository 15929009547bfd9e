"""Commands on what runs have written: `af3pipe audit`, `compact` and `export`."""

import json
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from af3pipe import storage
from af3pipe.pipelines import audit as audits
from af3pipe.pipelines import compact as compactions
from af3pipe.pipelines.accounting import TABLE_SCHEMAS
from af3pipe.pipelines.job import JobError, load_job_values
from af3pipe.pipelines.view import NotATable, export_latest
from af3pipe.schemas import Rejected

EXIT_WRONG = 1
EXIT_NO_OUTPUT = 2

_out = Console()
_err = Console(stderr=True)
_OUT = typer.Argument(metavar="OUT", help="What --output was: the folder or URL of the tables.")


def _set_storage(job_file: str | None) -> str | None:
    if job_file is not None:
        try:
            storage.set_options(load_job_values(job_file).get("storage_options") or {})
        except (JobError, ValueError) as error:
            stop(f"--job {job_file}: {error}", EXIT_NO_OUTPUT)
    return job_file


_JOB = typer.Option("--job", callback=_set_storage, help="Job file whose storage_options hold for the stores.")


def stop(message: str, code: int) -> NoReturn:
    """Ends the program, saying why."""
    _err.print(f"af3pipe: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)


def _say(line: str, style: str | None = None) -> None:
    _out.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def audit(
    output: Annotated[str, _OUT],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="What was read, listed anew: files, folders, globs or manifests, as for run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON, for programs.")] = False,
    job_file: Annotated[str | None, _JOB] = None,
) -> None:
    """Recompute the books of OUT from its Parquet alone, and say what is wrong and what to do.

    Exit codes: 0 all is right; 1 it is not; 2 OUT holds nothing of af3pipe, or an input cannot be listed. Nothing is
    changed.
    """
    try:
        report = audits.audit(output, inputs or [])
    except (audits.AuditError, Rejected) as error:
        stop(str(error), EXIT_NO_OUTPUT)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    else:
        _show(report)
    if not report.right:
        raise typer.Exit(EXIT_WRONG)


def _show(report: audits.Audit) -> None:
    table = Table(title="Runs", title_justify="left")
    for title in ("run", "finished", "recordings", "answers", "dead letters"):
        table.add_column(title, overflow="fold")
    for run in report.runs:
        counts = (run.recordings, run.answers, run.dead_letters)
        table.add_row(run.run_id, "yes" if run.finished else "no", *map(_counts, counts))
    _out.print(table, markup=False)
    rows = ", ".join(f"{number} in {name}/" for name, number in report.rows.items() if number)
    _say(f"Rows: {rows or 'none'}, in {sum(report.files.values())} files")
    _say(f"Recordings now: {sum(report.states.values())} = {_counts(report.states)}")
    if report.listed is not None:
        _say(f"Recordings in the input: {report.listed}")
    for note in report.notes:
        _say(f"Note: {note}", style="dim")
    for problem in report.problems:
        _say(f"WRONG ({problem.kind}): {problem.number} {problem.what}", style="red")
        _say(f"  for example {problem.example}")
        _say(f"  what to do: {problem.advice}")
    _say("All is right." if report.right else f"{len(report.problems)} things are wrong.")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "none"


def compact(
    output: Annotated[str, _OUT],
    file_mib: Annotated[
        int, typer.Option(min=1, help="About how large a file is to be; one of half of it stays as it is.")
    ] = compactions.DEFAULT_FILE_MIB,
    only_latest: Annotated[
        bool, typer.Option("--latest", help="Drop what no longer holds, too: older rows of each recording.")
    ] = False,
    include_unfinished: Annotated[
        bool,
        typer.Option(help="Touch files of runs without a record, too; only where none of them is still running."),
    ] = False,
    job_file: Annotated[str | None, _JOB] = None,
) -> None:
    """Rewrite the many small files of OUT as few, sorted by recording, each row once.

    Killed at any point, no row is lost, and the next `af3pipe compact` finishes or undoes it.
    """
    try:
        done = compactions.compact(
            output, file_mib=file_mib, only_latest=only_latest, include_unfinished=include_unfinished
        )
    except (compactions.CompactError, NotATable, Rejected, storage.StorageError) as error:
        stop(f"nothing was replaced: {error}", EXIT_WRONG)
    if done.recovered:
        _say(f"{done.recovered} compactions that had been killed are finished or undone")
    if done.temporary:
        _say(f"{done.temporary} temporary files of killed writes are removed")
    if done.compaction_id is None:
        _say("Nothing to compact")
    else:
        _say(f"{done.files_before} files are now {done.files_after}, with {done.rows} rows")
    if done.duplicates:
        _say(
            f"{done.duplicates} rows were there twice and are dropped; the newest of each is kept"
            + (f"; {done.differing} of them had differing texts" if done.differing else "")
        )
    if done.superseded:
        _say(f"{done.superseded} rows held no longer and are dropped")
    if done.left_alone:
        _say(f"{done.left_alone} files are of runs that have not finished, and are left alone")


def export(
    output: Annotated[str, _OUT],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Folder or URL for one Parquet file per table.")],
    table: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(TABLE_SCHEMAS)}; all that have rows by default.")
    ] = None,
    job_file: Annotated[str | None, _JOB] = None,
) -> None:
    """Write what holds now to TARGET: each table as one Parquet file, without what was superseded."""
    unknown = sorted(set(table or ()) - set(TABLE_SCHEMAS))
    if unknown:
        stop(f"--table is {unknown[0]!r}; choose from {', '.join(TABLE_SCHEMAS)}", EXIT_NO_OUTPUT)
    try:
        written = export_latest(output, target, table or list(TABLE_SCHEMAS))
    except (NotATable, Rejected, storage.StorageError) as error:
        stop(str(error), EXIT_WRONG)
    if not written:
        stop(f"{output} has no rows to export", EXIT_NO_OUTPUT)
    for uri, rows in written.items():
        _say(f"{rows} rows in {uri}")
