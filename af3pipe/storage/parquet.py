"""Reads Parquet files without Arrow's threads, which may abort the interpreter as it ends.

A thread of Arrow's that still references a buffer of a Python file while the interpreter shuts down ends the process
with "terminate called without an active exception" and exit code 134, after all work was done (Arrow's issues 33975,
34314 and 49942). Every file that fsspec opens is a Python file. ruff refuses `pyarrow.parquet.read_table` and
`pyarrow.parquet.ParquetFile` everywhere else, and tests/test_exit.py watches which threads Arrow uses.
"""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq


class ParquetFile(pq.ParquetFile):  # noqa: TID251
    """A Parquet file that is read in the calling thread only; otherwise pyarrow's class of this name.

    Args:
        file: A file open for reading, which stays open; or a path.
        buffer_size: If not 0, column chunks are read in pieces of this many bytes, instead of whole.

    Raises:
        pyarrow.ArrowInvalid, OSError: The file is not Parquet; pyarrow raises either for a damaged footer.
    """

    def __init__(self, file: BinaryIO | str, *, buffer_size: int = 0) -> None:
        super().__init__(file, pre_buffer=False, buffer_size=buffer_size)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads all row groups."""
        return super().read(columns=_listed(columns), use_threads=False)

    def read_row_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads one row group."""
        return super().read_row_group(index, columns=_listed(columns), use_threads=False)

    def iter_batches(
        self,
        batch_size: int = 65_536,
        row_groups: Sequence[int] | None = None,
        columns: Sequence[str] | None = None,
    ) -> Iterator[Any]:
        """Reads record batches of at most `batch_size` rows."""
        return iter(
            super().iter_batches(batch_size, row_groups=row_groups, columns=_listed(columns), use_threads=False)
        )


def _listed(columns: Sequence[str] | None) -> list[str] | None:
    return None if columns is None else list(columns)
