"""Declares the commands that run jobs: `af3pipe demo`, `run`, `watch`, `redrive` and `finish`.

`running`, which runs them, takes seconds to import and is imported only when one of them is called.
"""

from typing import Annotated, Any

import typer

from af3pipe.cli.flags import takes_job_flags
from af3pipe.cli.imports import quick_imports


def demo(
    output: Annotated[
        str, typer.Option(help="Folder or URL that the Parquet tables are written to.")
    ] = "af3pipe-demo",
) -> None:
    """Run the whole pipeline on sample recordings with a tiny trained model; both ship with the package.

    One sample is broken and one exceeds the model's maximum duration: they become dead letters. The model knows
    forty-odd words and ten sounds; when it transcribes audio without speech, it makes words up.
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
    """Run a model on recordings and write its captions, transcripts and answers as Parquet.

    Give inputs and options, or a job file with the same names as keys; options take precedence over the file. Ctrl-C
    or SIGTERM ends the run; the same command again processes what was not written.
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
    every: Annotated[str | None, typer.Option(help="Interval between listings: 30s by default.")] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Length of the windows, by modification time of the files: 5m by default."),
    ] = None,
    pane_every: Annotated[
        str | None,
        typer.Option(help="Longest that a row waits for others of its window before it is written: 60s by default."),
    ] = None,
    stop_after: Annotated[
        str | None, typer.Option(help="Stop after this time, such as 8h; by default it runs until a signal.")
    ] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Watch folders or messages, and run a model on each new or changed recording.

    Ctrl-C or SIGTERM stops it when everything found so far is written; a second one cancels it at once. The next run
    or watch with the same --output processes what was not written, and skips what is answered.
    """
    with quick_imports():
        from af3pipe.cli import running

    own = {"every": every, "window": window, "pane_every": pane_every, "stop_after": stop_after}
    given = {key: value for key, value in own.items() if value is not None}
    running.watch(inputs or [], flags | ({"watch": given} if given else {}))


def redrive(
    context: typer.Context,
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="Output folder or URL of earlier runs.", show_default=False)
    ],
    reason: Annotated[
        list[str] | None, typer.Option(help="Only dead letters with this reason; may be repeated.")
    ] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only dead letters of this stage; may be repeated.")] = None,
    retryable: Annotated[
        bool | None,
        typer.Option(
            "--retryable/--not-retryable",
            help="Only dead letters whose retry may succeed with the same input, or only the others.",
        ),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change a key of the job: `over_length=split`; the value is YAML; may be repeated."
        ),
    ] = None,
    job_file: Annotated[
        str | None,
        typer.Option(
            "--job", help="Job file whose keys replace those of the job, for example for secrets in storage_options."
        ),
    ] = None,
) -> None:
    """Process the dead letters of OUT again and write the results to the same OUT.

    Each recording is processed with the job of its own run, and only the requests without an answer. A dead letter
    that succeeds is not in the latest-results view any more (`export`, docs/output.md); no row is deleted.
    """
    with quick_imports():
        from af3pipe.cli import running

    running.redrive(output, context.args, reason or [], stage or [], retryable, change or [], job_file)


def finish(
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="Output folder or URL of earlier runs.", show_default=False)
    ],
    run_id: Annotated[
        str, typer.Argument(metavar="RUN_ID", help="Id of the run, from the launcher's log.", show_default=False)
    ],
) -> None:
    """Finalize a detached run (such as a Dataflow Flex Template): verify its counts and write its run record.

    Exit codes are those of `run`. While the run goes on, it reports what is missing and writes nothing.
    """
    with quick_imports():
        from af3pipe.cli import running

    running.finish(output, run_id)
