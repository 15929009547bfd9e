"""Prints to the terminal, and ends the program with an exit code and a reason."""

from typing import NoReturn

import typer
from rich.console import Console

EXIT_FAILED = 1
EXIT_WRONG_JOB = 2
EXIT_DEAD_LETTERS = 3

OUT = Console()
ERR = Console(stderr=True)


def say(line: str, style: str | None = None) -> None:
    """Prints a line as it is: not wrapped, not coloured, no markup read from it."""
    OUT.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def stop(message: str, code: int) -> NoReturn:
    """Ends the program, saying why."""
    ERR.print(f"af3pipe: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)
