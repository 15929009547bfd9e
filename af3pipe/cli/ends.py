"""Ends the program on SIGTERM as on Ctrl-C, and removes everything temporary."""

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from af3pipe.cli.console import ERR, EXIT_INTERRUPTED, EXIT_TERMINATED

BY_SIGNAL = (EXIT_INTERRUPTED, EXIT_TERMINATED)


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM where Ctrl-C would raise KeyboardInterrupt, so that both end a command in the same way."""


class EndedBySignals(TyperGroup):
    """Group of commands, each of which Ctrl-C ends with exit code 130, and SIGTERM with 143."""

    def invoke(self, ctx: Any) -> Any:
        with _sigterm_raises():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as interrupt:
                code = EXIT_TERMINATED if isinstance(interrupt, Terminated) else EXIT_INTERRUPTED
                ERR.print("af3pipe: interrupted", style="red", highlight=False)
                raise typer.Exit(code) from interrupt


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Has SIGTERM raise `Terminated` in the main thread, as SIGINT raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave(code: int) -> NoReturn:
    """Ends an interrupted process: runs exit handlers, which remove temporary folders, and waits for no thread.

    A thread in the middle of native code while the interpreter is torn down would abort the process (exit code 134).
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable()  # what was running complains of being ended
    threading.excepthook = lambda _: None
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
