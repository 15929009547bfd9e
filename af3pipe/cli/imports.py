"""Speeds up the import of Beam and of what else a command needs."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Collects no garbage in the block.

    Imports leave none, but make so many objects that Python would look through all of them several times, which is a
    quarter of the time that importing Beam takes. They stay, so later collections need not look at them either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
