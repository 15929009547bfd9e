"""What a stream has settled to Parquet: all rows of a pane in files of their own."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import Any

import apache_beam as beam
from apache_beam.transforms import trigger, window
from apache_beam.utils.timestamp import Duration

from af3pipe import storage
from af3pipe.transforms import metrics
from af3pipe.transforms.settle import SettledRecording
from af3pipe.transforms.stores import count_retries, set_storage
from af3pipe.transforms.write import (
    ANSWERS,
    DEAD_LETTER_ROWS,
    RECORDINGS,
    check_partition_by,
    new_run_id,
    partition_folder,
    write_folders,
)

# A file may be copied in with any modification time: none is too late to be written. Runners written in Go keep a
# duration in 64 bits of nanoseconds, which end after 292 years, and drop everything when they overflow.
_NEVER_TOO_LATE = Duration(seconds=100 * 365 * 24 * 3600)


class _WritePaneDoFn(beam.DoFn):
    """(shard, `SettledRecording`s of a pane) to (recording_id, content identity) of each, when its rows are there."""

    def __init__(
        self, output: str, run_id: str, partition_by: Sequence[str], storage_options: storage.StorageOptions
    ) -> None:
        self._output = output
        self._run_id = run_id
        self._partition_by = tuple(partition_by)
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)

    def finish_bundle(self) -> None:
        count_retries()

    def process(
        self, pane: tuple[int, Iterable[SettledRecording]], begins: Any = beam.DoFn.WindowParam
    ) -> Iterator[tuple[str, str]]:
        settled = list(pane[1])
        begin = begins.start.to_utc_datetime()
        # The row of a recording names all others, and is there last: who finds it finds them.
        for rows, row_format in (
            ([row for found in settled for row in found.answers], ANSWERS),
            ([row for found in settled for row in found.dead_letters], DEAD_LETTER_ROWS),
            ([found.result for found in settled], RECORDINGS),
        ):
            for _ in write_folders(
                rows,
                row_format,
                self._output,
                self._run_id,
                self._partition_by,
                day=f"{begin:%Y-%m-%d}",
                pane=f"-{begin:%Y%m%dT%H%M%SZ}",
            ):
                metrics.count("files_written")
        for found in settled:
            metrics.count(f"recordings_{found.result.terminal_state.value}")
            yield found.result.recording_id, found.result.content_identity


class WriteSettledRecordings(beam.PTransform):
    """Writes a stream of `SettledRecording` under `output`, in windows of their objects' modification time.

    A pane is what has come to a window since the pane before it: each makes files of its own, in all tables, some
    time after its first element. However late an element is, it is written. Gives (recording_id, content identity)
    of each recording once its rows are there.

    Args:
        output: Folder, local or on any fsspec URL.
        run_id: Names the run in the files and their rows; the default is a new one.
        window_s: Length of the windows.
        pane_every_s: How long a pane waits, from its first element on.
        shards: How many sets of files a pane is spread over, for streams that are too much for one worker.
        partition_by: As of `WriteAnswers`, but `date` is the day of the window.
        storage_options: As of `ReadRecordings`.

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
        partition_by: Sequence[str] = (),
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        check_partition_by(partition_by)
        run_id = run_id or new_run_id()
        partition_folder(partition_by, run_id, {})  # raises where the run's id has no day
        self._window_s = window_s
        self._pane_every_s = math.ceil(pane_every_s)  # Beam takes whole seconds
        self._shards = shards
        self._write = _WritePaneDoFn(output, run_id, partition_by, dict(storage_options))

    def expand(self, settled: Any) -> Any:
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
            | "WritePane" >> beam.ParDo(self._write).with_output_types(tuple[str, str])
        )


def _shard(settled: SettledRecording, shards: int) -> int:
    digest = hashlib.sha256(settled.result.recording_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % shards
