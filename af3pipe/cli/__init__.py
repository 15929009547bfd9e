"""Assembles the command line: `af3pipe demo`, `run`, `watch`, `redrive`, `finish`, `audit`, `compact`, `export`.

The modules that declare commands (`jobs`, `tables`, `flags`) import Beam, Arrow and the pipelines only when a command
runs: help and version are printed at once.
"""

from typing import Annotated

import typer

from af3pipe import __version__
from af3pipe.cli import jobs, tables
from af3pipe.cli.ends import EndedBySignals
from af3pipe.cli.log import be_verbose

app = typer.Typer(
    name="af3pipe",
    cls=EndedBySignals,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Caption, transcribe and query audio archives with Audio Flamingo 3 and Music Flamingo.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"af3pipe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log details and tracebacks.")] = False,
) -> None:
    """Options of the program itself."""
    if verbose:
        be_verbose()


_EXIT_CODES = "Exit codes are those of `run`."
_TAKES_BEAM_FLAGS = {"ignore_unknown_options": True, "allow_extra_args": True}

app.command()(jobs.demo)
app.command(
    context_settings=_TAKES_BEAM_FLAGS,
    epilog="Options that are not listed here go to Beam, for example `--runner flink --flink-master HOST:8081`. "
    "Exit codes: 0 done; 1 the run failed, its counts do not reconcile or its replies do not verify; 2 the job is "
    "wrong; 3 more dead letters than allowed; 4 no recording processed has an answer; 130 or 143 interrupted.",
)(jobs.run)
app.command(
    context_settings=_TAKES_BEAM_FLAGS,
    epilog="Options that are not listed here go to Beam; the runner is Prism unless `--runner` names Flink or "
    f"Dataflow. {_EXIT_CODES}",
)(jobs.watch)
app.command(
    context_settings=_TAKES_BEAM_FLAGS,
    epilog=f"Options that are not listed here go to Beam. {_EXIT_CODES}",
)(jobs.redrive)
app.command()(jobs.finish)
app.command()(tables.audit)
app.command()(tables.compact)
app.command()(tables.export)
