"""Writes recordings' results as a whole output, and gives their rows to other sinks.

Beam's own Parquet and dynamic-destination sinks put rows into the wrong file or lose them (with shards, with folders
that do not exist yet), and need a second library for s3://. Here the results of some recordings make files of their
own, in all tables, whose names follow from the run and the rows' keys: a retried bundle writes the same names.
"""

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import Any

import apache_beam as beam
from apache_beam.transforms import trigger, window
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.timestamp import Duration
from apache_beam.utils.windowed_value import WindowedValue

from af3pipe import storage
from af3pipe.schemas import Answer, DeadLetter, RecordingResult, RecordingRow
from af3pipe.tables.layout import check_partition_by, check_run_id, new_run_id, partition_folder
from af3pipe.tables.run_record import write_counted_record
from af3pipe.tables.write import write_results
from af3pipe.transforms import metrics
from af3pipe.transforms.stores import count_retries, set_storage

# A file may be copied in with any modification time: none is too late to be written. Runners written in Go keep a
# duration in 64 bits of nanoseconds, which end after 292 years, and drop everything when they overflow.
_NEVER_TOO_LATE = Duration(seconds=100 * 365 * 24 * 3600)


class _WriteDoFn(beam.DoFn):
    """Writes results; gives (recording_id, content identity) of each when its rows are there."""

    def __init__(
        self, output: str, run_id: str, partition_by: Sequence[str], storage_options: storage.StorageOptions
    ) -> None:
        self._output = output
        self._run_id = run_id
        self._partition_by = tuple(partition_by)
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)

    def write(
        self, results: Sequence[RecordingResult], *, day: str | None = None, pane: str = ""
    ) -> Iterator[tuple[str, str]]:
        """Writes as `tables.write_results` does."""
        for _ in write_results(results, self._output, self._run_id, self._partition_by, day=day, pane=pane):
            metrics.count("files_written")
        for found in results:
            yield found.row.recording_id, found.row.content_identity


class _WritePaneDoFn(_WriteDoFn):
    """Takes (shard, the `RecordingResult`s of a pane)."""

    def finish_bundle(self) -> None:
        count_retries()

    def process(
        self, pane: tuple[int, Iterable[RecordingResult]], begins: Any = beam.DoFn.WindowParam
    ) -> Iterator[tuple[str, str]]:
        begin = begins.start.to_utc_datetime()
        yield from self.write(list(pane[1]), day=f"{begin:%Y-%m-%d}", pane=f"-{begin:%Y%m%dT%H%M%SZ}")


class _WriteAsTheyComeDoFn(_WriteDoFn):
    """Takes `RecordingResult`, and writes those that it has when they are many, or have waited for long.

    Not only when the bundle ends, as a bundle may be all that a worker has to do.
    """

    def __init__(self, *where: Any, most_held: int, every_s: float) -> None:
        super().__init__(*where)
        self._most_held = most_held
        self._every_s = every_s

    def start_bundle(self) -> None:
        self._held: list[RecordingResult] = []

    def process(self, result: RecordingResult) -> Iterator[tuple[str, str]]:
        now = time.monotonic()
        if not self._held:
            self._write_at = now + self._every_s
        self._held.append(result)
        if len(self._held) >= self._most_held or now >= self._write_at:
            yield from self._write()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for written in self._write():
            yield GlobalWindows.windowed_value(written)
        count_retries()

    def _write(self) -> Iterator[tuple[str, str]]:
        results, self._held = self._held, []
        return self.write(results)


class WriteRows(beam.PTransform):
    """Writes `RecordingResult` under `output`, and does not wait for all of them; leaves the run record to others.

    A stream is written in windows of their objects' modification time. A pane is what has come to a window since the
    pane before it: each makes files of its own, in all tables, some time after its first element. However late an
    element is, it is written.

    What is bounded is written by the worker that has it, without a shuffle: its results make files of their own when
    they are many, or have waited as long as a pane would.

    Gives (recording_id, content identity) of each recording once its rows are there.

    Args:
        output: Folder, local or on any fsspec URL.
        run_id: Names the run in the files and their rows.
        window_s: Length of a stream's windows.
        pane_every_s: How long a pane waits, from its first element on.
        shards: How many sets of files a stream's pane is spread over, where it is too much for one worker.
        most_held: How many recordings of what is bounded a worker holds before it writes them; kilobytes each.
        partition_by: Hive folders below each table, see `partition_folder`; a stream's `date` is the day of the
            window.
        storage_options: As of `ReadRecordings`.
        accelerator: Beam's resource hint, where the results come from `AnswerRecordings` with the same: they are one
            stage then, and nothing waits.

    Raises:
        ValueError: There can be no such run_id or partitions.
    """

    def __init__(
        self,
        output: str,
        *,
        run_id: str,
        window_s: float = 300.0,
        pane_every_s: float = 60.0,
        shards: int = 1,
        most_held: int = 1000,
        partition_by: Sequence[str] = (),
        storage_options: storage.StorageOptions = MappingProxyType({}),
        accelerator: str | None = None,
    ) -> None:
        super().__init__()
        check_partition_by(partition_by)
        partition_folder(partition_by, check_run_id(run_id), {})  # raises where the run's id has no day
        self._window_s = window_s
        self._pane_every_s = math.ceil(pane_every_s)  # Beam takes whole seconds
        self._shards = shards
        self._most_held = most_held
        self._where = output, run_id, partition_by, dict(storage_options)
        if accelerator:
            self.with_resource_hints(accelerator=accelerator)

    def expand(self, results: Any) -> Any:
        if results.is_bounded:
            write = _WriteAsTheyComeDoFn(*self._where, most_held=self._most_held, every_s=self._pane_every_s)
            return results | "WriteAsTheyCome" >> beam.ParDo(write).with_output_types(tuple[str, str])
        shards = self._shards
        return (
            results
            | "Window"
            >> beam.WindowInto(
                window.FixedWindows(self._window_s),
                trigger=trigger.Repeatedly(trigger.AfterProcessingTime(self._pane_every_s)),
                accumulation_mode=trigger.AccumulationMode.DISCARDING,
                allowed_lateness=_NEVER_TOO_LATE,
            )
            | "Shard"
            >> beam.Map(lambda found: (_shard(found, shards), found)).with_output_types(tuple[int, RecordingResult])
            | "Pane" >> beam.GroupByKey()
            | "WritePane" >> beam.ParDo(_WritePaneDoFn(*self._where)).with_output_types(tuple[str, str])
        )


def _shard(result: RecordingResult, shards: int) -> int:
    digest = hashlib.sha256(result.row.recording_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % shards


class _WriteRecordDoFn(_WriteDoFn):
    """The number of recordings written to the URI of the run's record, which says that the run is complete."""

    def process(self, number: int) -> Iterator[str]:
        yield write_counted_record(self._output, self._run_id, number, self._partition_by)


class WriteResults(beam.PTransform):
    """Writes `RecordingResult` as a whole output: rows in all tables, and the run's record when all are there.

    `af3pipe audit`, `export`, `compact` and a later `af3pipe run` accept what it leaves. Gives the URI of the record;
    of a stream, which has no end, (recording_id, content identity) of each recording once its rows are there.

        results | WriteResults("s3://labels")

    Args:
        output: Folder, local or on any fsspec URL.
        run_id: Names the run in the files and their rows; the default is a new one.
        partition_by: Hive folders below each table, see `partition_folder`; the default is none.
        window_s: As of `WriteRows`, for a stream. So are `pane_every_s` and `shards`.
        pane_every_s: See `window_s`.
        shards: See `window_s`.
        storage_options: As of `ReadRecordings`.

    Raises:
        ValueError: There can be no such run_id or partitions.
    """

    def __init__(
        self,
        output: str,
        *,
        run_id: str | None = None,
        partition_by: Sequence[str] = (),
        window_s: float = 300.0,
        pane_every_s: float = 60.0,
        shards: int = 1,
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.run_id = check_run_id(run_id or new_run_id())
        self._where = output, self.run_id, tuple(partition_by), dict(storage_options)
        self._rows = WriteRows(
            output,
            run_id=self.run_id,
            window_s=window_s,
            pane_every_s=pane_every_s,
            shards=shards,
            partition_by=partition_by,
            storage_options=storage_options,
        )

    def expand(self, results: Any) -> Any:
        written = results | "WriteRows" >> self._rows
        if not results.is_bounded:
            return written
        return (
            written
            | "Ids" >> beam.Keys()
            | "Distinct" >> beam.Distinct()
            | "Count" >> beam.combiners.Count.Globally()
            | "WriteRecord" >> beam.ParDo(_WriteRecordDoFn(*self._where)).with_output_types(str)
        )


class Answers(beam.PTransform):
    """Gives the answers of `RecordingResult`s, as `Answer`, for a sink of Beam's own."""

    def expand(self, results: Any) -> Any:
        return results | beam.FlatMap(lambda result: result.answers).with_output_types(Answer)


class DeadLetters(beam.PTransform):
    """Gives the dead letters of `RecordingResult`s, as `DeadLetter`."""

    def expand(self, results: Any) -> Any:
        return results | beam.FlatMap(lambda result: result.dead_letters).with_output_types(DeadLetter)


class Rows(beam.PTransform):
    """Gives the row of each `RecordingResult`, as `RecordingRow`: how the recording ended."""

    def expand(self, results: Any) -> Any:
        return results | beam.Map(lambda result: result.row).with_output_types(RecordingRow)
