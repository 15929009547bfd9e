"""What is settled to Parquet, as it comes: all rows of some recordings in files of their own."""

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
from af3pipe.schemas import TerminalState
from af3pipe.tables.layout import check_partition_by, new_run_id, partition_folder
from af3pipe.tables.write import ANSWERS, DEAD_LETTER_ROWS, RECORDINGS, write_folders
from af3pipe.transforms import metrics
from af3pipe.transforms.settle import SettledRecording
from af3pipe.transforms.stores import count_retries, set_storage

# A file may be copied in with any modification time: none is too late to be written. Runners written in Go keep a
# duration in 64 bits of nanoseconds, which end after 292 years, and drop everything when they overflow.
_NEVER_TOO_LATE = Duration(seconds=100 * 365 * 24 * 3600)


def write_settled(
    settled: Sequence[SettledRecording],
    output: str,
    run_id: str,
    partition_by: Sequence[str] = (),
    *,
    day: str | None = None,
    pane: str = "",
) -> Iterator[str]:
    """Writes all rows of some recordings, as `write_folders` does those of one kind."""
    # The row of a recording names all others, and is there last: who finds it finds them.
    for rows, row_format in (
        ([row for found in settled for row in found.answers], ANSWERS),
        ([row for found in settled for row in found.dead_letters], DEAD_LETTER_ROWS),
        ([found.result for found in settled], RECORDINGS),
    ):
        yield from write_folders(rows, row_format, output, run_id, partition_by, day=day, pane=pane)


class _WriteDoFn(beam.DoFn):
    """Writes lists of `SettledRecording`; gives (recording_id, content identity) of each when its rows are there."""

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
        self, settled: Sequence[SettledRecording], *, day: str | None = None, pane: str = ""
    ) -> Iterator[tuple[str, str]]:
        """As of `write_settled`."""
        for _ in write_settled(settled, self._output, self._run_id, self._partition_by, day=day, pane=pane):
            metrics.count("files_written")
        for found in settled:
            if found.result.terminal_state is not TerminalState.SKIPPED_DONE:  # counted where it was skipped
                metrics.count(f"recordings_{found.result.terminal_state.value}")
            yield found.result.recording_id, found.result.content_identity


class _WritePaneDoFn(_WriteDoFn):
    """Takes (shard, `SettledRecording`s of a pane)."""

    def finish_bundle(self) -> None:
        count_retries()

    def process(
        self, pane: tuple[int, Iterable[SettledRecording]], begins: Any = beam.DoFn.WindowParam
    ) -> Iterator[tuple[str, str]]:
        begin = begins.start.to_utc_datetime()
        yield from self.write(list(pane[1]), day=f"{begin:%Y-%m-%d}", pane=f"-{begin:%Y%m%dT%H%M%SZ}")


class _WriteAsSettledDoFn(_WriteDoFn):
    """Takes `SettledRecording`, and writes those that it has when they are many, or have waited for long.

    Not first when the bundle ends, as a bundle may be all that a worker has to do.
    """

    def __init__(self, *where: Any, most_held: int, every_s: float) -> None:
        super().__init__(*where)
        self._most_held = most_held
        self._every_s = every_s

    def start_bundle(self) -> None:
        self._settled: list[SettledRecording] = []

    def process(self, settled: SettledRecording) -> Iterator[tuple[str, str]]:
        now = time.monotonic()
        if not self._settled:
            self._write_at = now + self._every_s
        self._settled.append(settled)
        if len(self._settled) >= self._most_held or now >= self._write_at:
            yield from self._write()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for written in self._write():
            yield GlobalWindows.windowed_value(written)
        count_retries()

    def _write(self) -> Iterator[tuple[str, str]]:
        settled, self._settled = self._settled, []
        return self.write(settled)


class WriteSettledRecordings(beam.PTransform):
    """Writes `SettledRecording` under `output`, and does not wait for all of them.

    A stream is written in windows of their objects' modification time. A pane is what has come to a window since the
    pane before it: each makes files of its own, in all tables, some time after its first element. However late an
    element is, it is written.

    What is bounded is written by the worker that has it, without a shuffle: what that has settled makes files of its
    own when it is so many recordings, or has waited as long as a pane would.

    Gives (recording_id, content identity) of each recording once its rows are there.

    Args:
        output: Folder, local or on any fsspec URL.
        run_id: Names the run in the files and their rows; the default is a new one.
        window_s: Length of a stream's windows.
        pane_every_s: How long a pane waits, from its first element on.
        shards: How many sets of files a stream's pane is spread over, where it is too much for one worker.
        most_held: How many recordings of what is bounded a worker holds before it writes them; kilobytes each.
        partition_by: As of `WriteAnswers`, but a stream's `date` is the day of the window.
        storage_options: As of `ReadRecordings`.
        accelerator: Beam's resource hint, where what is bounded comes from `AnswerAndSettle` with the same: they are
            one stage then, and nothing waits.

    Raises:
        ValueError: There can be no such partitions.
    """

    def __init__(
        self,
        output: str,
        *,
        run_id: str | None = None,
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
        run_id = run_id or new_run_id()
        partition_folder(partition_by, run_id, {})  # raises where the run's id has no day
        self._window_s = window_s
        self._pane_every_s = math.ceil(pane_every_s)  # Beam takes whole seconds
        self._shards = shards
        self._most_held = most_held
        self._where = output, run_id, partition_by, dict(storage_options)
        if accelerator:
            self.with_resource_hints(accelerator=accelerator)

    def expand(self, settled: Any) -> Any:
        if settled.is_bounded:
            write = _WriteAsSettledDoFn(*self._where, most_held=self._most_held, every_s=self._pane_every_s)
            return settled | "WriteAsSettled" >> beam.ParDo(write).with_output_types(tuple[str, str])
        shards = self._shards
        return (
            settled
            | "Window"
            >> beam.WindowInto(
                window.FixedWindows(self._window_s),
                trigger=trigger.Repeatedly(trigger.AfterProcessingTime(self._pane_every_s)),
                accumulation_mode=trigger.AccumulationMode.DISCARDING,
                allowed_lateness=_NEVER_TOO_LATE,
            )
            | "Shard"
            >> beam.Map(lambda found: (_shard(found, shards), found)).with_output_types(tuple[int, SettledRecording])
            | "Pane" >> beam.GroupByKey()
            | "WritePane" >> beam.ParDo(_WritePaneDoFn(*self._where)).with_output_types(tuple[str, str])
        )


def _shard(settled: SettledRecording, shards: int) -> int:
    digest = hashlib.sha256(settled.result.recording_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % shards
