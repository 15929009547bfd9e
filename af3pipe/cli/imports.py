"""Speeds up the import of Beam and of other large packages."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Turns off garbage collection in the block.

    Imports leave no garbage, but create so many objects that Python would scan all of them several times, a quarter
    of the time of importing Beam. They stay alive, so later collections need not scan them either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
