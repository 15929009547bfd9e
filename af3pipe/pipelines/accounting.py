"""A run's books: what the Parquet says that was written, held against what was found."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from af3pipe import storage
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.schemas import ANSWER_SCHEMA, DEAD_LETTER_SCHEMA, RECORDING_SCHEMA, TerminalState
from af3pipe.transforms.stores import set_storage
from af3pipe.transforms.verify import Verified, total
from af3pipe.transforms.write import partition_folder

TABLE_SCHEMAS: dict[str, pa.Schema] = {
    **dict.fromkeys(ANSWER_TABLES, ANSWER_SCHEMA),
    "recordings": RECORDING_SCHEMA,
    "dead_letters": DEAD_LETTER_SCHEMA,
}


class RunCounts(NamedTuple):
    """What a run found and what it wrote.

    Attributes:
        found: Recordings matched, each once.
        states: Recordings by terminal state.
        answers: Rows by table.
        dead_letters: Rows by reason.
        audio_s: Seconds of audio covered by answers.
        problems: What does not reconcile, in sentences; empty when the books are right.
    """

    found: int
    states: dict[str, int]
    answers: dict[str, int]
    dead_letters: dict[str, int]
    audio_s: float
    problems: tuple[str, ...]

    @property
    def reconciled(self) -> bool:
        """Whether every recording found ended in one terminal state and every row is where it should be."""
        return not self.problems


def found_uri(output: str, run_id: str) -> str:
    """Where the pipeline leaves the number of recordings it found."""
    return storage.join(output, "_runs", f"{run_id}.found.json")


def write_found(found: int, uri: str, storage_options: storage.StorageOptions) -> None:
    """Where a pipeline counts what it finds: from its elements, since metrics count retries twice."""
    set_storage(storage_options)
    storage.write_atomic(uri, json.dumps({"recordings_found": found}).encode())


def take_found(output: str, run_id: str) -> int:
    """What `write_found` wrote, and gone from there.

    Raises:
        Rejected: It cannot be read.
    """
    uri = found_uri(output, run_id)
    found: int = json.loads(storage.read_bytes(uri))["recordings_found"]
    storage.delete(uri)
    return found


def verified_uri(output: str, run_id: str, chunk: int) -> str:
    """Where the pipeline leaves what became of the sample that was asked again; a run has one for each chunk."""
    return storage.join(output, "_runs", f"{run_id}.verified-{chunk}.json")


def write_verified(verified: Verified, uri: str, storage_options: storage.StorageOptions) -> None:
    """Called in the pipeline."""
    set_storage(storage_options)
    storage.write_atomic(uri, json.dumps(verified.to_dict(), ensure_ascii=False).encode())


def take_verified(uris: Iterable[str]) -> Verified:
    """All that `write_verified` wrote there, in one, and gone from there.

    Raises:
        Rejected: One cannot be read.
    """
    parts = []
    for uri in uris:
        parts.append(Verified.from_dict(json.loads(storage.read_bytes(uri))))
        storage.delete(uri)
    return total(parts)


def run_files(output: str, run_id: str) -> dict[str, list[str]]:
    """The run's Parquet files by table."""
    return {
        table: [
            uri
            for uri in storage.list_files(storage.join(output, table))
            if storage.name(uri).startswith(run_id) and uri.endswith(".parquet")
        ]
        for table in TABLE_SCHEMAS
    }


def read_rows(uris: Iterable[str], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of Parquet files, one file in memory at a time."""
    for uri in uris:
        with storage.open_input(uri) as file:
            yield from pq.read_table(file, columns=columns).to_pylist()


def count_run(output: str, run_id: str, found: int) -> RunCounts:
    """Reads back what a run wrote and holds it against the number of recordings that it found.

    Raises:
        Rejected: The output cannot be read.
    """
    files = run_files(output, run_id)
    expected = ["answers", "dead_letters"]
    recordings = _read(files["recordings"], "recordings", ["recording_id", "terminal_state", "covered_s", *expected])
    answers = {table: _read(files[table], table, ["recording_id"]) for table in ANSWER_TABLES}
    letters = _read(files["dead_letters"], "dead_letters", ["recording_id", "reason"])
    problems = [
        *_differ("recordings found", found, "recordings with a terminal state", len(recordings)),
        *_differ(
            "recordings with a state",
            len(recordings),
            "different ones",
            pc.count_distinct(recordings["recording_id"]).as_py(),
        ),
        *_rows_differ("answers", recordings, pa.concat_tables(answers.values())),
        *_rows_differ("dead_letters", recordings, letters.select(["recording_id"])),
    ]
    is_new = pc.not_equal(recordings["terminal_state"], TerminalState.SKIPPED_DONE.value)
    return RunCounts(
        found=found,
        states=_counted(recordings["terminal_state"]),
        answers={table: len(rows) for table, rows in answers.items() if len(rows)},
        dead_letters=_counted(letters["reason"]),
        audio_s=pc.sum(recordings.filter(is_new)["covered_s"]).as_py() or 0.0,
        problems=tuple(problems),
    )


def _read(uris: Iterable[str], table: str, columns: list[str]) -> pa.Table:
    """These columns of all rows, as Arrow: 20 bytes for an id, where Python takes ten times that."""
    schema = pa.schema([TABLE_SCHEMAS[table].field(name) for name in columns])
    parts = [schema.empty_table()]
    for uri in uris:
        with storage.open_input(uri) as file:
            parts.append(pq.read_table(file, columns=columns).select(columns).cast(schema))
    return pa.concat_tables(parts)


def _counted(column: Any) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(column).to_pylist()}


def _differ(what: str, count: int, other: str, other_count: int) -> Iterator[str]:
    if count != other_count:
        yield f"{count} {what}, but {other_count} {other}"


def _rows_differ(what: str, recordings: pa.Table, rows: pa.Table) -> Iterator[str]:
    """Where the rows of a recording are not as many as its own row says."""
    written = rows.group_by("recording_id").aggregate([([], "count_all")])
    stated = recordings.select(["recording_id", what]).filter(pc.greater(recordings[what], 0))
    both = stated.join(written, "recording_id", join_type="full outer")
    count, expected = pc.fill_null(both["count_all"], 0), pc.fill_null(both[what], 0)
    wrong = both.filter(pc.not_equal(count, expected))["recording_id"]
    if len(wrong):
        yield (
            f"{pc.sum(stated[what]).as_py() or 0} {what.replace('_', ' ')} expected, {len(rows)} rows written; "
            f"{len(wrong)} recordings differ, for example {pc.min(wrong)}"
        )


def fill_empty_tables(output: str, tables: Iterable[str], run_id: str, partition_by: Sequence[str] = ()) -> None:
    """Writes a table without rows where a table has no file, so that a query never fails on a night without any."""
    for table in tables:
        folder = storage.join(output, table)
        if not any(uri.endswith(".parquet") for uri in storage.list_files(folder)):
            buffer = pa.BufferOutputStream()
            pq.write_table(TABLE_SCHEMAS[table].empty_table(), buffer, compression="zstd")
            # With the partitions of the files to come: some readers refuse a table that mixes layouts.
            partition = partition_folder(partition_by, run_id, {})
            uri = storage.join(folder, *filter(None, [partition]), f"{run_id}-empty.parquet")
            storage.write_atomic(uri, buffer.getvalue().to_pybytes())
