"""Writes the results of recordings to an output folder, and extracts their rows for other sinks.

Beam's own Parquet and dynamic-destination sinks put rows into the wrong file or lose them (with shards, or with
folders that do not exist yet), and need another library for s3://. Here, each batch of results is written to new
files in all tables; file names are derived from the run and the rows' keys, so that a retried bundle overwrites its
own files.
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

# A file may have any modification time, so no result is too late to be written. Runners written in Go keep durations
# as 64 bits of nanoseconds, which overflow after 292 years, and then drop everything.
_NEVER_TOO_LATE = Duration(seconds=100 * 365 * 24 * 3600)


class _WriteDoFn(beam.DoFn):
    """Writes results; emits (recording_id, content identity) of each after its rows are written."""

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
        """Writes results with `tables.write_results`; yields what identifies each of them."""
        for _ in write_results(results, self._output, self._run_id, self._partition_by, day=day, pane=pane):
            metrics.count("files_written")
        for found in results:
            yield found.row.recording_id, found.row.content_identity


class _WritePaneDoFn(_WriteDoFn):
    """Writes the results of a pane: (shard, `RecordingResult`s)."""

    def finish_bundle(self) -> None:
        count_retries()

    def process(
        self, pane: tuple[int, Iterable[RecordingResult]], begins: Any = beam.DoFn.WindowParam
    ) -> Iterator[tuple[str, str]]:
        begin = begins.start.to_utc_datetime()
        yield from self.write(list(pane[1]), day=f"{begin:%Y-%m-%d}", pane=f"-{begin:%Y%m%dT%H%M%SZ}")


class _WriteBufferedDoFn(_WriteDoFn):
    """Buffers `RecordingResult`s, and writes them when there are many or the first has waited long.

    Writing only at the end of a bundle would not do, since a bundle may be all the work of a worker.
    """

    def __init__(self, *where: Any, max_buffered: int, every_s: float) -> None:
        super().__init__(*where)
        self._max_buffered = max_buffered
        self._every_s = every_s

    def start_bundle(self) -> None:
        self._buffered: list[RecordingResult] = []

    def process(self, result: RecordingResult) -> Iterator[tuple[str, str]]:
        now = time.monotonic()
        if not self._buffered:
            self._write_at = now + self._every_s
        self._buffered.append(result)
        if len(self._buffered) >= self._max_buffered or now >= self._write_at:
            yield from self._write()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for written in self._write():
            yield GlobalWindows.windowed_value(written)
        count_retries()

    def _write(self) -> Iterator[tuple[str, str]]:
        results, self._buffered = self._buffered, []
        return self.write(results)


class WriteRows(beam.PTransform):
    """Writes `RecordingResult`s to the tables under `output` as they arrive, without a run record.

    A stream is written in fixed windows by modification time of the objects. The results that arrive in a window
    within `pane_every_s` form a Beam pane, which is written to new files in all tables. Late results are always
    written.

    Bounded input is written without a shuffle: each worker buffers results and writes them to new files when there
    are `max_buffered` of them, or when the first has waited for `pane_every_s`.

    The output is (recording_id, content identity) of each recording after its rows are written.

    Args:
        output: Folder, local or on any fsspec URL.
        run_id: The run, part of file names and rows.
        window_s: Length of a stream's windows.
        pane_every_s: Longest time that results wait before they are written.
        shards: Number of sets of files for each pane of a stream, if a pane is too large for one worker.
        max_buffered: Largest number of results (kilobytes each) that a worker buffers of bounded input.
        partition_by: Hive folders below each table, see `partition_folder`; a stream's `date` is the day of the
            window.
        storage_options: See `ReadRecordings`.
        accelerator: Beam's resource hint; give that of `AnswerRecordings`, so that both are fused into one stage.

    Raises:
        ValueError: The run_id or a partition is invalid.
    """

    def __init__(
        self,
        output: str,
        *,
        run_id: str,
        window_s: float = 300.0,
        pane_every_s: float = 60.0,
        shards: int = 1,
        max_buffered: int = 1000,
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
        self._max_buffered = max_buffered
        self._where = output, run_id, partition_by, dict(storage_options)
        if accelerator:
            self.with_resource_hints(accelerator=accelerator)

    def expand(self, results: Any) -> Any:
        if results.is_bounded:
            write = _WriteBufferedDoFn(*self._where, max_buffered=self._max_buffered, every_s=self._pane_every_s)
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
    """Writes the run record, given the number of recordings written; emits its URI."""

    def process(self, number: int) -> Iterator[str]:
        yield write_counted_record(self._output, self._run_id, number, self._partition_by)


class WriteResults(beam.PTransform):
    """Writes `RecordingResult`s as a complete output: rows in all tables, and a run record after all rows.

    `af3pipe audit`, `export`, `compact` and a later `af3pipe run` accept the output. The transform outputs the URI of
    the record; for a stream, which has no end, (recording_id, content identity) of each recording after its rows.

        results | WriteResults("s3://labels")

    Args:
        output: Folder, local or on any fsspec URL.
        run_id: The run, part of file names and rows; a new id by default.
        partition_by: Hive folders below each table, see `partition_folder`; none by default.
        window_s: Length of a stream's windows, see `WriteRows`.
        pane_every_s: See `WriteRows`.
        shards: See `WriteRows`.
        storage_options: See `ReadRecordings`.

    Raises:
        ValueError: The run_id or a partition is invalid.
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
    """Extracts the answers of `RecordingResult`s, as `Answer`, for any Beam sink."""

    def expand(self, results: Any) -> Any:
        return results | beam.FlatMap(lambda result: result.answers).with_output_types(Answer)


class DeadLetters(beam.PTransform):
    """Extracts the dead letters of `RecordingResult`s, as `DeadLetter`, for any Beam sink."""

    def expand(self, results: Any) -> Any:
        return results | beam.FlatMap(lambda result: result.dead_letters).with_output_types(DeadLetter)


class Rows(beam.PTransform):
    """Extracts the row of each `RecordingResult`, as `RecordingRow`: how the recording ended."""

    def expand(self, results: Any) -> Any:
        return results | beam.Map(lambda result: result.row).with_output_types(RecordingRow)
