"""Prints to the terminal, and ends the program with an exit code and a reason."""

from typing import NoReturn

import typer
from rich.console import Console

EXIT_FAILED = 1
"""The command did not succeed: a run failed, its counts do not reconcile, an audit found problems."""
EXIT_WRONG_JOB = 2
"""Nothing was started: the job or the command line is wrong, or the folder is not an output."""
EXIT_DEAD_LETTERS = 3
"""The run has more dead letters than `--fail-on-dead-letters` allows."""
EXIT_NO_ANSWERS = 4
"""The run processed recordings, and every one of them failed."""
EXIT_INTERRUPTED = 130
"""Ended by Ctrl-C (128 + SIGINT)."""
EXIT_TERMINATED = 143
"""Ended by SIGTERM (128 + SIGTERM)."""

OUT = Console()
ERR = Console(stderr=True)


def say(line: str, style: str | None = None) -> None:
    """Prints a line verbatim: not wrapped, not coloured, without markup."""
    OUT.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def stop(message: str, code: int) -> NoReturn:
    """Ends the program with a message and an exit code."""
    ERR.print(f"af3pipe: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)
