"""Rows to Parquet: few files, named by what is in them, each of them there whole or not at all.

Beam's own Parquet and dynamic-destination sinks put rows into the wrong file or lose them (with shards, with folders
that do not exist yet), and need a second library for s3://. Here rows are grouped by table and shard, and one
group makes its files, whose names follow from the run and the rows' keys: a retried group writes the same names.
"""

import hashlib
import json
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from io import BytesIO
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

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
from af3pipe.transforms.stores import count_retries, set_storage

ROWS_PER_FILE = 50_000
ROWS_PER_SHARD = 10_000
_WRITERS = 8


def new_run_id() -> str:
    """Names a run: sorts by time, and two runs at once do not meet."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


def is_file_of(uri: str, run_id: str) -> bool:
    """Whether it is a Parquet file that this run has written."""
    name = storage.name(uri)
    return name.startswith(run_id) and name.endswith(".parquet")


class RowFormat(NamedTuple):
    """How one row type lands.

    Attributes:
        row_class: The NamedTuple.
        schema: Its Arrow schema.
        table: The folder of a row.
        key: Names a row; rows of the same key are the same row.
        metadata: Of the recording that a row is about.
    """

    row_class: type
    schema: pa.Schema
    table: Callable[[Any], str]
    key: Callable[[Any], str]
    metadata: Callable[[Any], Mapping[str, str]]


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
    return f"{row.recording_id}/{row.work_key or ''}"


def _own_metadata(row: Answer | RecordingResult) -> Mapping[str, str]:
    return dict(row.metadata)


def _input_metadata(row: DeadLetter) -> Mapping[str, str]:
    return dict(json.loads(row.input).get("recording", {}).get("metadata", ()))


ANSWERS = RowFormat(Answer, ANSWER_SCHEMA, _answer_table, _answer_key, _own_metadata)
DEAD_LETTER_ROWS = RowFormat(DeadLetter, DEAD_LETTER_SCHEMA, _dead_letter_table, _dead_letter_key, _input_metadata)
RECORDINGS = RowFormat(RecordingResult, RECORDING_SCHEMA, _recording_table, _recording_key, _own_metadata)

NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""What Hive, Arrow, DuckDB and Polars read as null."""
_RUN_DAY = re.compile(r"(\d{4})(\d\d)(\d\d)T\d{6}Z")
_PARTITION_NAME = re.compile(r"[\w.-]+")


def check_partition_by(partition_by: Sequence[str]) -> None:
    """Looks whether these can be the folders of the tables.

    Raises:
        ValueError: One is named twice, like a column that the tables have, or with what a folder's name cannot hold.
    """
    columns = {*ANSWER_SCHEMA.names, *DEAD_LETTER_SCHEMA.names, *RECORDING_SCHEMA.names}
    for name in partition_by:
        if name in columns:
            raise ValueError(
                f"partition_by names {name!r}, which is a column of the tables: a reader could not tell the two "
                "apart; take date, run, or a metadata column of the manifest that is named otherwise"
            )
        if not _PARTITION_NAME.fullmatch(name):
            raise ValueError(
                f"partition_by names {name!r}; letters, digits, '_', '-' and '.' only: rename the manifest's column"
            )
        if list(partition_by).count(name) > 1:
            raise ValueError(f"partition_by names {name!r} twice")


def partition_folder(
    partition_by: Sequence[str], run_id: str, metadata: Mapping[str, str], *, day: str | None = None
) -> str:
    """The folders below a table, as Hive names them: `date=2026-11-21/station=K%20Q`; empty without partitions.

    Args:
        partition_by: `date`, the UTC day on which the run began; `run`, its id; any other is a key of `metadata`.
        run_id: As `new_run_id` makes it, where `date` is asked for.
        metadata: Of a recording; what it lacks is null.
        day: `date`, where it is not the run's.

    Raises:
        ValueError: The run's id does not begin with a time, and `date` is asked for.
    """
    known = {"run": run_id}
    if "date" in partition_by:
        known["date"] = day or _day_of(run_id)
    values = ((name, known.get(name) or metadata.get(name)) for name in partition_by)
    return "/".join(f"{name}={quote(value, safe='') if value else NO_VALUE}" for name, value in values)


def _day_of(run_id: str) -> str:
    day = _RUN_DAY.match(run_id)
    if day is None:
        raise ValueError(f"partition_by date takes the day from the run's id, and {run_id!r} begins with none")
    return "-".join(day.groups())


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


def write_rows(
    rows: Iterable[Any], row_format: RowFormat, output: str, folder: str, run_id: str, *, pane: str = ""
) -> Iterator[str]:
    """Writes the rows of one group to Parquet files and yields their URIs; the same rows give the same files.

    Args:
        rows: Of one class.
        row_format: How it lands.
        output: Folder of all tables.
        folder: Below it: the table, and the partition where there are any.
        run_id: Goes into the rows and the names of the files.
        pane: Goes into the names behind it: of a stream, that part of which these rows are.

    Raises:
        StorageError: The output cannot be written.
    """
    by_key = {row_format.key(row): row._replace(run_id=run_id) for row in rows}
    keys = sorted(by_key)
    for start in range(0, len(keys), ROWS_PER_FILE):
        chunk = keys[start : start + ROWS_PER_FILE]
        digest = hashlib.sha256("\n".join(chunk).encode()).hexdigest()[:16]
        uri = storage.join(output, folder, f"{run_id}{pane}-{digest}.parquet")
        buffer = BytesIO()
        arrow = to_table((by_key[key] for key in chunk), row_format.schema)
        pq.write_table(arrow, buffer, compression="zstd")
        storage.write_atomic(uri, buffer.getvalue())
        yield uri


class _Folder:
    """A row's folder below the output: its table and partition."""

    def __init__(
        self, row_format: RowFormat, run_id: str, partition_by: Sequence[str], day: str | None = None
    ) -> None:
        self._format = row_format
        self._run_id = run_id
        self._partition_by = partition_by
        self._day = day

    def __call__(self, row: Any) -> str:
        metadata = self._format.metadata(row) if self._partition_by else {}
        partition = partition_folder(self._partition_by, self._run_id, metadata, day=self._day)
        return f"{self._format.table(row)}/{partition}".rstrip("/")


def write_folders(
    rows: Iterable[Any],
    row_format: RowFormat,
    output: str,
    run_id: str,
    partition_by: Sequence[str] = (),
    *,
    day: str | None = None,
    pane: str = "",
) -> Iterator[str]:
    """Writes rows as `write_rows` does, each to its table and partition: what the transforms do, without Beam."""
    folder_of = _Folder(row_format, run_id, partition_by, day)
    by_folder: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        by_folder[folder_of(row)].append(row)
    folders = sorted(by_folder)

    def write(folder: str) -> list[str]:
        return list(write_rows(by_folder[folder], row_format, output, folder, run_id, pane=pane))

    # Partitions may be many, and a store takes its time for each.
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="af3pipe-write") as pool:
        for uris in pool.map(write, folders):
            yield from uris


class _ToShard(beam.DoFn):
    """Keys a row by its folder and shard; the shard follows from the row's key, not from where it was made."""

    def __init__(self, row_format: RowFormat, folder: _Folder) -> None:
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
        self._folder = _Folder(self._FORMAT, self._run_id, tuple(partition_by))

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
