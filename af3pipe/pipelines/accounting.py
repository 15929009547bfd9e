"""A run's books: what the Parquet says that was written, held against what was found."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from af3pipe import storage
from af3pipe.schemas import ANSWER_SCHEMA, DEAD_LETTER_SCHEMA, RECORDING_SCHEMA
from af3pipe.transforms.verify import Verified
from af3pipe.transforms.write import partition_folder

ANSWER_TABLES = ("captions", "transcripts", "answers")
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


def write_found(found: int, output: str, run_id: str) -> None:
    """Called in the pipeline, so that the number does not come from metrics, which count retries twice."""
    storage.write_atomic(found_uri(output, run_id), json.dumps({"recordings_found": found}).encode())


def verified_uri(output: str, run_id: str) -> str:
    """Where the pipeline leaves what became of the sample that was asked again."""
    return storage.join(output, "_runs", f"{run_id}.verified.json")


def write_verified(verified: Verified, output: str, run_id: str) -> None:
    """Called in the pipeline."""
    storage.write_atomic(verified_uri(output, run_id), json.dumps(verified.to_dict(), ensure_ascii=False).encode())


def read_verified(output: str, run_id: str) -> Verified:
    """What `write_verified` wrote.

    Raises:
        Rejected: It cannot be read.
    """
    return Verified.from_dict(json.loads(storage.read_bytes(verified_uri(output, run_id))))


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


def count_run(output: str, run_id: str) -> RunCounts:
    """Reads back what a run wrote and holds it against what it found.

    Raises:
        Rejected: The output cannot be read.
    """
    files = run_files(output, run_id)
    found = json.loads(storage.read_bytes(found_uri(output, run_id)))["recordings_found"]
    columns = ["recording_id", "terminal_state", "answers", "dead_letters", "covered_s"]
    recordings = list(read_rows(files["recordings"], columns))
    answers = {
        table: Counter(row["recording_id"] for row in read_rows(files[table], ["recording_id"]))
        for table in ANSWER_TABLES
    }
    letters = list(read_rows(files["dead_letters"], ["recording_id", "reason"]))
    expected_answers = Counter({row["recording_id"]: row["answers"] for row in recordings})
    expected_letters = Counter({row["recording_id"]: row["dead_letters"] for row in recordings})
    written_answers = sum(answers.values(), Counter[str]())
    written_letters = Counter(row["recording_id"] for row in letters)
    problems = [
        *_differ("recordings found", found, "recordings with a terminal state", len(recordings)),
        *_differ(
            "recordings with a state",
            len(recordings),
            "different ones",
            len({row["recording_id"] for row in recordings}),
        ),
        *_rows_differ("answers", expected_answers, written_answers),
        *_rows_differ("dead letters", expected_letters, written_letters),
    ]
    return RunCounts(
        found=found,
        states=dict(Counter(row["terminal_state"] for row in recordings)),
        answers={table: counted.total() for table, counted in answers.items() if counted},
        dead_letters=dict(Counter(row["reason"] for row in letters)),
        audio_s=sum(row["covered_s"] for row in recordings),
        problems=tuple(problems),
    )


def _differ(what: str, count: int, other: str, other_count: int) -> Iterator[str]:
    if count != other_count:
        yield f"{count} {what}, but {other_count} {other}"


def _rows_differ(what: str, expected: Counter[str], written: Counter[str]) -> Iterator[str]:
    wrong = [key for key in expected.keys() | written.keys() if expected[key] != written[key]]
    if wrong:
        yield (
            f"{expected.total()} {what} expected, {written.total()} rows written; "
            f"{len(wrong)} recordings differ, for example {sorted(wrong)[0]}"
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
