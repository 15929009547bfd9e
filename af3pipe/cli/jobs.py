"""Declares the commands that run jobs: `af3pipe demo`, `run`, `watch`, `redrive` and `finish`.

What they do is in `running`, which takes seconds to import, and is imported when one of them runs.
"""

from typing import Annotated, Any

import typer

from af3pipe.cli.flags import takes_job_flags
from af3pipe.cli.imports import quick_imports


def demo(
    output: Annotated[str, typer.Option(help="Folder for the Parquet.")] = "af3pipe-demo",
) -> None:
    """Run the whole pipeline on sample recordings with a tiny trained model; both ship with the package.

    One sample is broken and one is longer than the model takes: they show what a dead letter is. The model knows
    forty-odd words and ten sounds, and when told to transcribe what is no speech, it makes words up.
    """
    with quick_imports():
        from af3pipe.cli import running

    running.demo(output)


@takes_job_flags
def run(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Files, folders, globs, manifests (.jsonl, .csv, .tsv, .parquet), tar shards or Hugging Face data "
            "sets, local or on any fsspec URL; or one job file (.yaml).",
            show_default=False,
        ),
    ] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Ask a model about recordings and write the answers as Parquet.

    Give inputs and options, or a job file with the same words as keys; options win over the file.
    """
    with quick_imports():
        from af3pipe.cli import running

    running.run(inputs or [], flags)


@takes_job_flags
def watch(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Folders, globs or files, local or on any fsspec URL; Pub/Sub subscriptions "
            "(pubsub://projects/PROJECT/subscriptions/NAME); or one job file (.yaml).",
            show_default=False,
        ),
    ] = None,
    every: Annotated[str | None, typer.Option(help="How often to look: 30s by default.")] = None,
    window: Annotated[
        str | None, typer.Option(help="Windows of the files' modification time that rows land in: 5m by default.")
    ] = None,
    pane_every: Annotated[
        str | None, typer.Option(help="How long rows wait for others to land with: 60s by default.")
    ] = None,
    stop_after: Annotated[str | None, typer.Option(help="When to stop; the default is when it is told to.")] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Watch folders or messages, and ask a model about what lands or changes, until told to stop.

    Ctrl-C (or SIGTERM) has it write what it has found, and end; a second one ends it at once. What is not written
    then is asked by the next run or watch into the same output. What that has answered already is not asked again.
    """
    with quick_imports():
        from af3pipe.cli import running

    own = {"every": every, "window": window, "pane_every": pane_every, "stop_after": stop_after}
    given = {key: value for key, value in own.items() if value is not None}
    running.watch(inputs or [], flags | ({"watch": given} if given else {}))


def redrive(
    context: typer.Context,
    output: Annotated[str, typer.Argument(metavar="OUT", help="What --output was.", show_default=False)],
    reason: Annotated[
        list[str] | None, typer.Option(help="Only dead letters of this reason; may be repeated.")
    ] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only those of this stage; may be repeated.")] = None,
    retryable: Annotated[
        bool | None,
        typer.Option(
            "--retryable/--not-retryable", help="Only those that may succeed by themselves, or only others."
        ),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of the job: `over_length=split`; the value is read as YAML."),
    ] = None,
    job_file: Annotated[
        str | None,
        typer.Option("--job", help="Job file whose keys hold instead, for example for secrets in storage_options."),
    ] = None,
) -> None:
    """Run the dead letters of OUT again, from their own rows, into the same OUT.

    Each is asked what its own run was asked, and only what has no answer yet. What succeeds is no dead letter any
    more in what `export` and the views of docs/output.md show; all earlier rows stay.
    """
    with quick_imports():
        from af3pipe.cli import running

    running.redrive(output, context.args, reason or [], stage or [], retryable, change or [], job_file)


def finish(
    output: Annotated[str, typer.Argument(metavar="OUT", help="What --output was.", show_default=False)],
    run_id: Annotated[
        str, typer.Argument(metavar="RUN_ID", help="As the launcher's log says it.", show_default=False)
    ],
) -> None:
    """Close the books of a run that was submitted and left alone, as a Dataflow template leaves it.

    Ends as `run` would have. While the run goes on, it says what is missing, and nothing is written.
    """
    with quick_imports():
        from af3pipe.cli import running

    running.finish(output, run_id)
