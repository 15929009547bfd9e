"""Rows to Parquet: few files, named by what is in them, each of them there whole or not at all.

Beam's own Parquet and dynamic-destination sinks put rows into the wrong file or lose them (with shards, with folders
that do not exist yet), and need a second library for s3://. Here rows are grouped by table and shard, and one
group makes its files, whose names follow from the run and the rows' keys: a retried group writes the same names.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import apache_beam as beam

from af3pipe import storage
from af3pipe.tables.layout import check_partition_by, new_run_id, partition_folder
from af3pipe.tables.write import ANSWERS, DEAD_LETTER_ROWS, RECORDINGS, Folder, RowFormat, write_rows
from af3pipe.transforms import metrics
from af3pipe.transforms.stores import count_retries, set_storage

ROWS_PER_SHARD = 10_000


class _ToShard(beam.DoFn):
    """Keys a row by its folder and shard; the shard follows from the row's key, not from where it was made."""

    def __init__(self, row_format: RowFormat, folder: Folder) -> None:
        self._format = row_format
        self._folder = folder

    def process(self, row: Any, rows: Mapping[str, int]) -> Iterator[tuple[str, Any]]:
        folder = self._folder(row)
        shards = max(1, -(-rows[folder] // ROWS_PER_SHARD))
        digest = hashlib.sha256(self._format.key(row).encode()).digest()
        yield f"{folder}/{int.from_bytes(digest[:8], 'big') % shards}", row


class _WriteShard(beam.DoFn):
    def __init__(
        self, row_format: RowFormat, output: str, run_id: str, storage_options: storage.StorageOptions
    ) -> None:
        self._format = row_format
        self._output = output
        self._run_id = run_id
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)

    def finish_bundle(self) -> None:
        count_retries()

    def process(self, shard: tuple[str, Iterable[Any]]) -> Iterator[str]:
        name, rows = shard
        folder = name.rsplit("/", 1)[0]
        for uri in write_rows(rows, self._format, self._output, folder, self._run_id):
            metrics.count("files_written")
            yield uri


class _WriteParquet(beam.PTransform):
    _FORMAT: RowFormat

    def __init__(
        self,
        output: str,
        *,
        run_id: str | None = None,
        partition_by: Sequence[str] = (),
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        check_partition_by(partition_by)
        self._output = output
        self._run_id = run_id or new_run_id()
        self._storage_options = dict(storage_options)
        partition_folder(partition_by, self._run_id, {})  # raises where the run's id has no day
        self._folder = Folder(self._FORMAT, self._run_id, tuple(partition_by))

    def expand(self, rows: Any) -> Any:
        if not rows.is_bounded:
            raise ValueError(f"{type(self).__name__} writes bounded collections only")
        row_class: Any = self._FORMAT.row_class
        write = _WriteShard(self._FORMAT, self._output, self._run_id, self._storage_options)
        counts = (
            rows
            | "Folder" >> beam.Map(self._folder).with_output_types(str)
            | "Count" >> beam.combiners.Count.PerElement()
        )
        return (
            rows
            | "ToShard"
            >> beam.ParDo(_ToShard(self._FORMAT, self._folder), beam.pvalue.AsDict(counts)).with_output_types(
                tuple[str, row_class]
            )
            | "GroupShard" >> beam.GroupByKey()
            | "WriteParquet" >> beam.ParDo(write).with_output_types(str)
        )


class WriteAnswers(_WriteParquet):
    """Writes `Answer` rows under `output`: `captions/`, `transcripts/`, and `answers/` for all other tasks.

    Gives the URIs of the files. Idempotent: a retry writes the same names; rows of the same `answer_key` are
    written once. Bounded collections only.

    Args:
        output: Folder, local or on any fsspec URL.
        run_id: Names the run in the files and their rows; the default is a new one.
        partition_by: Hive folders below each table, see `partition_folder`; the default is none.
        storage_options: As of `ReadRecordings`.

    Raises:
        ValueError: There can be no such partitions.
    """

    _FORMAT = ANSWERS


class WriteDeadLetters(_WriteParquet):
    """Writes `DeadLetter` rows to `dead_letters/` under `output`, as `WriteAnswers` does its rows."""

    _FORMAT = DEAD_LETTER_ROWS


class WriteRecordings(_WriteParquet):
    """Writes `RecordingResult` rows to `recordings/` under `output`, as `WriteAnswers` does its rows."""

    _FORMAT = RECORDINGS
