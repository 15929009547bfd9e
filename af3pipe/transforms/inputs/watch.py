"""Watches folders and globs: emits each new or changed recording once, until the stream is stopped."""

import functools
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import Any

import apache_beam as beam
from apache_beam.coders import StrUtf8Coder
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec

from af3pipe import storage
from af3pipe.schemas import MIX, DeadLetter, Recording, channel_text, stream_index
from af3pipe.transforms import metrics
from af3pipe.transforms.inputs.clock import Ticks
from af3pipe.transforms.inputs.containers import container_rows
from af3pipe.transforms.inputs.manifest import is_manifest
from af3pipe.transforms.inputs.pubsub import is_subscription
from af3pipe.transforms.inputs.read import list_recordings, tagged
from af3pipe.transforms.outcome import DEAD_LETTERS, Outcome
from af3pipe.transforms.stores import count_retries, set_storage

_EMITTED_AT_FIRST = 3  # a file without an etag must be seen twice
_REPEATED_EVERY = 20
_log = logging.getLogger(__name__)


def check_watched(name: str) -> None:
    """Checks that an input can be watched.

    Raises:
        ValueError: It is a manifest or a container, of which every listing would read all rows.
    """
    if is_subscription(name):
        raise ValueError(f"input {name} is a subscription, and no folder; ReadNotifications reads it")
    if is_manifest(name) or container_rows(name) is not None:
        raise ValueError(
            f"input {name} is a manifest or a container; only folders and globs of audio can be watched. Process it "
            "with `af3pipe run`, again whenever it changes: recordings that are done are skipped"
        )


class _ListingFilter:
    """Filters the listings of one input in this process, so that few known recordings reach the stateful step.

    Most recordings of a listing are known, and a state lookup costs more than listing them. So a recording is emitted
    in its first few listings, then only in every 20th: what a failed bundle has lost is emitted again.
    """

    def __init__(self) -> None:
        self._listings = 0
        self._times: dict[int, int] = {}
        self._fault = ""

    def warn_once(self, log: logging.Logger, sentence: str) -> None:
        """Logs a warning unless it is the same as the last one."""
        if sentence != self._fault:
            log.warning("%s", sentence)
        self._fault = sentence

    def to_emit(self, listed: Iterable[Recording | DeadLetter]) -> Iterator[Recording | DeadLetter]:
        """Yields the items of a complete listing that are to be emitted."""
        self._listings += 1
        before, self._times = self._times, {}
        for found in listed:
            name = hash((found.recording_id, _version(found)))
            times = before.get(name, 0)
            self._times[name] = min(times + 1, _EMITTED_AT_FIRST)
            if times < _EMITTED_AT_FIRST or (self._listings + name) % _REPEATED_EVERY == 0:
                yield found


_filters: dict[tuple[str, str], _ListingFilter] = {}


class _ListDoFn(beam.DoFn):
    """Lists an input: maps (tick, name) to (recording_id, (recording or dead letter, time))."""

    def __init__(
        self, channel: str, stream: int | None, exclude: Sequence[str], storage_options: storage.StorageOptions
    ) -> None:
        self._list = functools.partial(list_recordings, channel=channel, stream=stream, exclude=tuple(exclude))
        self._storage_options = storage_options
        self._watch_id = uuid.uuid4().hex  # several in this process may watch the same input

    def setup(self) -> None:
        set_storage(self._storage_options)

    def finish_bundle(self) -> None:
        count_retries()

    def process(self, listing: tuple[float, str]) -> Iterator[tuple[str, tuple[Recording | DeadLetter, float]]]:
        name = listing[1]
        listing_filter = _filters.setdefault((self._watch_id, name), _ListingFilter())
        listed_at = time.time()
        try:
            for found in listing_filter.to_emit(self._list(name)):
                if isinstance(found, DeadLetter) and found.uri == name:
                    metrics.count("listings_failed")
                    listing_filter.warn_once(_log, f"input {name} cannot be listed, will retry: {found.detail}")
                else:
                    yield found.recording_id, (found, listed_at)
        except storage.StorageError as error:  # a store may be down for longer than the retries last
            metrics.count("listings_failed")
            listing_filter.warn_once(_log, f"input {name} cannot be listed, will retry: {error}")


def _version(found: Recording | DeadLetter) -> str:
    """Returns the content identity of a recording; for a dead letter its reason, since its file may lack one."""
    return found.reason.value if isinstance(found, DeadLetter) else found.content_identity


class _NewDoFn(beam.DoFn):
    """Emits each version of a recording once.

    Object stores list only complete objects. A file without an etag may still be being written: it is emitted when it
    is unchanged in two listings that are at least `unchanged_s` apart.
    """

    _PASSED = ReadModifyWriteStateSpec("passed", StrUtf8Coder())
    _SEEN = ReadModifyWriteStateSpec("seen", StrUtf8Coder())

    def __init__(self, unchanged_s: float) -> None:
        self._unchanged_s = unchanged_s

    def process(
        self,
        found: tuple[str, tuple[Recording | DeadLetter, float]],
        passed: Any = beam.DoFn.StateParam(_PASSED),
        seen: Any = beam.DoFn.StateParam(_SEEN),
    ) -> Iterator[Any]:
        item, listed_at = found[1]
        version = _version(item)
        passed_at, _, passed_version = (passed.read() or "0 ").partition(" ")
        if passed_version == version or listed_at < float(passed_at):  # listings may arrive out of order
            return
        if isinstance(item, Recording) and not item.etag:
            first_at, _, seen_version = (seen.read() or "0 ").partition(" ")
            if seen_version != version:
                seen.write(f"{listed_at!r} {version}")
                return
            if listed_at - float(first_at) < self._unchanged_s:
                return
            seen.clear()
        passed.write(f"{listed_at!r} {version}")
        yield from tagged([item])


class NewRecordings(beam.PTransform):
    """Emits each version (etag, or size and modification time) of a recording once.

    The input is an unbounded PCollection of (recording_id, (`Recording` or `DeadLetter`, seconds since 1970 when it
    was listed)); the output is an `Outcome` of `Recording`. The last emitted version of each recording is kept in
    state.

    Args:
        unchanged_s: How long a file without an etag must be unchanged before it is emitted.
    """

    def __init__(self, unchanged_s: float) -> None:
        super().__init__()
        self._unchanged_s = unchanged_s

    def expand(self, listed: Any) -> Any:
        new = listed | "New" >> beam.ParDo(_NewDoFn(self._unchanged_s)).with_output_types(
            Recording, **{DEAD_LETTERS: DeadLetter}
        ).with_outputs(DEAD_LETTERS, main="recordings")
        return Outcome(new.recordings, new[DEAD_LETTERS])


class WatchRecordings(beam.PTransform):
    """Watches folders and globs: starts a stream of new and changed recordings, as an `Outcome`.

    Each version of a file is emitted once: an object as soon as it is listed, a file without an etag when its size
    and modification time are the same in two listings. A failed listing is logged and counted as `listings_failed`;
    the next listing finds what it missed.

    Args:
        inputs: Folders (audio in them, recursively), globs or files, local or on any fsspec URL.
        every_s: Seconds from one listing to the next.
        channel: See `ReadRecordings`.
        stream: See `ReadRecordings`.
        exclude: See `ReadRecordings`.
        stop_uri: See `Ticks`.
        stop_after_s: See `Ticks`.
        storage_options: See `ReadRecordings`.

    Raises:
        ValueError: There is no input, or one cannot be watched.
    """

    def __init__(
        self,
        inputs: str | Sequence[str],
        *,
        every_s: float = 30.0,
        channel: str | int = MIX,
        stream: int | None = None,
        exclude: Sequence[str] = (),
        stop_uri: str | None = None,
        stop_after_s: float | None = None,
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self._inputs = [inputs] if isinstance(inputs, str) else list(dict.fromkeys(inputs))
        if not self._inputs:
            raise ValueError("inputs is empty; give at least one folder or glob")
        for name in self._inputs:
            check_watched(name)
        self._every_s = every_s
        self._ticks = Ticks(every_s, stop_uri=stop_uri, stop_after_s=stop_after_s, storage_options=storage_options)
        self._list = _ListDoFn(channel_text(channel), stream_index(stream), exclude, dict(storage_options))

    def expand(self, pipeline: Any) -> Any:
        names = self._inputs
        return (
            pipeline
            | "Ticks" >> self._ticks
            | "Inputs"
            >> beam.FlatMap(lambda tick: [(tick, name) for name in names]).with_output_types(tuple[float, str])
            | "SpreadInputs" >> beam.Reshuffle()
            | "List" >> beam.ParDo(self._list).with_output_types(tuple[str, Any])
            | "NewRecordings" >> NewRecordings(self._every_s / 2)
        )
