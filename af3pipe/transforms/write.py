"""Rows to Parquet: few files, named by what is in them, each of them there whole or not at all.

Beam's own Parquet and dynamic-destination sinks put rows into the wrong file or lose them (with shards, with folders
that do not exist yet), and need a second library for s3://. Here rows are grouped by table and shard, and one
group makes its files, whose names follow from the run and the rows' keys: a retried group writes the same names.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from io import BytesIO
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq

from af3pipe import storage
from af3pipe.models.tasks import table_of
from af3pipe.schemas import (
    ANSWER_SCHEMA,
    DEAD_LETTER_SCHEMA,
    RECORDING_SCHEMA,
    Answer,
    DeadLetter,
    RecordingResult,
)
from af3pipe.transforms import metrics

ROWS_PER_FILE = 50_000
ROWS_PER_SHARD = 10_000


def new_run_id() -> str:
    """Names a run: sorts by time, and two runs at once do not meet."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


class RowFormat(NamedTuple):
    """How one row type lands.

    Attributes:
        row_class: The NamedTuple.
        schema: Its Arrow schema.
        table: The folder of a row.
        key: Names a row; rows of the same key are the same row.
    """

    row_class: type
    schema: pa.Schema
    table: Callable[[Any], str]
    key: Callable[[Any], str]


def _answer_table(row: Answer) -> str:
    return table_of(row.task)


def _answer_key(row: Answer) -> str:
    return f"{row.recording_id}/{row.answer_key}"


def _dead_letter_table(_: DeadLetter) -> str:
    return "dead_letters"


def _dead_letter_key(row: DeadLetter) -> str:
    return row.dead_letter_key


def _recording_table(_: RecordingResult) -> str:
    return "recordings"


def _recording_key(row: RecordingResult) -> str:
    return row.recording_id


ANSWERS = RowFormat(Answer, ANSWER_SCHEMA, _answer_table, _answer_key)
DEAD_LETTER_ROWS = RowFormat(DeadLetter, DEAD_LETTER_SCHEMA, _dead_letter_table, _dead_letter_key)
RECORDINGS = RowFormat(RecordingResult, RECORDING_SCHEMA, _recording_table, _recording_key)


def to_table(rows: Iterable[Any], schema: pa.Schema) -> pa.Table:
    """Rows of one NamedTuple class as an Arrow table.

    Raises:
        pyarrow.ArrowInvalid, pyarrow.ArrowTypeError: A value does not fit its column.
    """
    return pa.Table.from_pylist([_columns(row) for row in rows], schema=schema)


def _columns(row: Any) -> dict[str, Any]:
    found: dict[str, Any] = row._asdict()
    if "segments" in found:
        found["segments"] = [piece._asdict() for piece in found["segments"]]
    return found


def write_rows(rows: Iterable[Any], row_format: RowFormat, output: str, table: str, run_id: str) -> Iterator[str]:
    """Writes the rows of one group to Parquet files and yields their URIs; the same rows give the same files.

    Raises:
        StorageError: The output cannot be written.
    """
    by_key = {row_format.key(row): row._replace(run_id=run_id) for row in rows}
    keys = sorted(by_key)
    for start in range(0, len(keys), ROWS_PER_FILE):
        chunk = keys[start : start + ROWS_PER_FILE]
        digest = hashlib.sha256("\n".join(chunk).encode()).hexdigest()[:16]
        uri = storage.join(output, table, f"{run_id}-{digest}.parquet")
        buffer = BytesIO()
        arrow = to_table((by_key[key] for key in chunk), row_format.schema)
        pq.write_table(arrow, buffer, compression="zstd")
        storage.write_atomic(uri, buffer.getvalue())
        yield uri


class _ToShard(beam.DoFn):
    """Keys a row by its table and shard; the shard follows from the row's key, not from where it was made."""

    def __init__(self, row_format: RowFormat) -> None:
        self._format = row_format

    def process(self, row: Any, rows: int) -> Iterator[tuple[str, Any]]:
        shards = max(1, -(-rows // ROWS_PER_SHARD))
        digest = hashlib.sha256(self._format.key(row).encode()).digest()
        yield f"{self._format.table(row)}/{int.from_bytes(digest[:8], 'big') % shards}", row


class _WriteShard(beam.DoFn):
    def __init__(self, row_format: RowFormat, output: str, run_id: str) -> None:
        self._format = row_format
        self._output = output
        self._run_id = run_id

    def process(self, shard: tuple[str, Iterable[Any]]) -> Iterator[str]:
        name, rows = shard
        table = name.rsplit("/", 1)[0]
        for uri in write_rows(rows, self._format, self._output, table, self._run_id):
            metrics.count("files_written")
            yield uri


class _WriteParquet(beam.PTransform):
    def __init__(self, row_format: RowFormat, output: str, run_id: str | None) -> None:
        super().__init__()
        self._format = row_format
        self._output = output
        self._run_id = run_id or new_run_id()

    def expand(self, rows: Any) -> Any:
        if not rows.is_bounded:
            raise ValueError(f"{type(self).__name__} writes bounded collections only")
        row_class: Any = self._format.row_class
        count = beam.pvalue.AsSingleton(rows | "Count" >> beam.combiners.Count.Globally())
        return (
            rows
            | "ToShard" >> beam.ParDo(_ToShard(self._format), count).with_output_types(tuple[str, row_class])
            | "GroupShard" >> beam.GroupByKey()
            | "WriteParquet"
            >> beam.ParDo(_WriteShard(self._format, self._output, self._run_id)).with_output_types(str)
        )


class WriteAnswers(_WriteParquet):
    """Writes `Answer` rows under `output`: `captions/`, `transcripts/`, and `answers/` for all other tasks.

    Gives the URIs of the files. Idempotent: a retry writes the same names; rows of the same `answer_key` are
    written once. Bounded collections only.

    Args:
        output: Folder, local or on any fsspec URL.
        run_id: Names the run in the files and their rows; the default is a new one.
    """

    def __init__(self, output: str, *, run_id: str | None = None) -> None:
        super().__init__(ANSWERS, output, run_id)


class WriteDeadLetters(_WriteParquet):
    """Writes `DeadLetter` rows to `dead_letters/` under `output`, as `WriteAnswers` does its rows."""

    def __init__(self, output: str, *, run_id: str | None = None) -> None:
        super().__init__(DEAD_LETTER_ROWS, output, run_id)


class WriteRecordings(_WriteParquet):
    """Writes `RecordingResult` rows to `recordings/` under `output`, as `WriteAnswers` does its rows."""

    def __init__(self, output: str, *, run_id: str | None = None) -> None:
        super().__init__(RECORDINGS, output, run_id)
