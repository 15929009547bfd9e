"""Folders and globs to recordings, for as long as there is somebody to ask: what is new or has changed, once."""

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

_TOLD_AT_FIRST = 3  # a file without an etag has to be seen twice
_REMINDED_EVERY = 20
_log = logging.getLogger(__name__)


def check_watched(name: str) -> None:
    """Whether an input can be watched.

    Raises:
        ValueError: It is a manifest or a container, which would be read again and again from its beginning.
    """
    if is_subscription(name):
        raise ValueError(f"input {name} is a subscription, and no folder; ReadNotifications reads it")
    if is_manifest(name) or container_rows(name) is not None:
        raise ValueError(
            f"input {name} is a manifest or a container; watched are folders and globs of audio. Ask about it with "
            "`af3pipe run`, as often as it changes: what is answered is not asked again"
        )


class _Told:
    """What listings of one input have told, in this process.

    Most of what a listing finds was there before, and to look each up in state costs more than to list it. So what
    was told a few times is left out, but for a reminder now and then: what a failed bundle has lost is told again.
    """

    def __init__(self) -> None:
        self._listings = 0
        self._times: dict[int, int] = {}
        self._fault = ""

    def once(self, log: logging.Logger, sentence: str) -> None:
        """Warns of what keeps an input from being listed, until that changes."""
        if sentence != self._fault:
            log.warning("%s", sentence)
        self._fault = sentence

    def leave_out(self, listed: Iterable[Recording | DeadLetter]) -> Iterator[Recording | DeadLetter]:
        """What of a whole listing is to be told."""
        self._listings += 1
        before, self._times = self._times, {}
        for found in listed:
            name = hash((found.recording_id, _version(found)))
            times = before.get(name, 0)
            self._times[name] = min(times + 1, _TOLD_AT_FIRST)
            if times < _TOLD_AT_FIRST or (self._listings + name) % _REMINDED_EVERY == 0:
                yield found


_told: dict[tuple[str, str], _Told] = {}


class _ListDoFn(beam.DoFn):
    """(tick, name) to (recording_id, (what was found, when))."""

    def __init__(
        self, channel: str, stream: int | None, exclude: Sequence[str], storage_options: storage.StorageOptions
    ) -> None:
        self._list = functools.partial(list_recordings, channel=channel, stream=stream, exclude=tuple(exclude))
        self._storage_options = storage_options
        self._watch_id = uuid.uuid4().hex  # one of several that watch the same in this process

    def setup(self) -> None:
        set_storage(self._storage_options)

    def finish_bundle(self) -> None:
        count_retries()

    def process(self, looked: tuple[float, str]) -> Iterator[tuple[str, tuple[Recording | DeadLetter, float]]]:
        name = looked[1]
        told = _told.setdefault((self._watch_id, name), _Told())
        listed_at = time.time()
        try:
            for found in told.leave_out(self._list(name)):
                if isinstance(found, DeadLetter) and found.uri == name:
                    metrics.count("listings_failed")
                    told.once(_log, f"input {name} cannot be listed, and is looked for again: {found.detail}")
                else:
                    yield found.recording_id, (found, listed_at)
        except storage.StorageError as error:  # a store may be down for longer than it is tried
            metrics.count("listings_failed")
            told.once(_log, f"input {name} cannot be listed, and is looked for again: {error}")


def _version(found: Recording | DeadLetter) -> str:
    """Of a dead letter, why it is one: a file whose name cannot be written stays that, whatever becomes of it."""
    return found.reason.value if isinstance(found, DeadLetter) else found.content_identity


class _NewDoFn(beam.DoFn):
    """Lets each version of a recording pass once.

    Object stores show an object when it is whole. A file without an etag may still be written: it passes when two
    listings, this far apart, found it the same.
    """

    _PASSED = ReadModifyWriteStateSpec("passed", StrUtf8Coder())
    _SEEN = ReadModifyWriteStateSpec("seen", StrUtf8Coder())

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s

    def process(
        self,
        found: tuple[str, tuple[Recording | DeadLetter, float]],
        passed: Any = beam.DoFn.StateParam(_PASSED),
        seen: Any = beam.DoFn.StateParam(_SEEN),
    ) -> Iterator[Any]:
        item, listed_at = found[1]
        version = _version(item)
        passed_at, _, passed_version = (passed.read() or "0 ").partition(" ")
        if passed_version == version or listed_at < float(passed_at):  # listings may overtake one another
            return
        if isinstance(item, Recording) and not item.etag:
            first_at, _, seen_version = (seen.read() or "0 ").partition(" ")
            if seen_version != version:
                seen.write(f"{listed_at!r} {version}")
                return
            if listed_at - float(first_at) < self._settle_s:
                return
            seen.clear()
        passed.write(f"{listed_at!r} {version}")
        yield from tagged([item])


class NewRecordings(beam.PTransform):
    """Lets each version (etag, or size and modification time) of a recording pass once.

    Takes an unbounded PCollection of (recording_id, (`Recording` or `DeadLetter`, seconds since 1970 when it was
    listed)); gives an `Outcome` of `Recording`. What has passed is kept in state, by recording.

    Args:
        settle_s: How long a file without an etag must stay the same before it passes.
    """

    def __init__(self, settle_s: float) -> None:
        super().__init__()
        self._settle_s = settle_s

    def expand(self, listed: Any) -> Any:
        new = listed | "New" >> beam.ParDo(_NewDoFn(self._settle_s)).with_output_types(
            Recording, **{DEAD_LETTERS: DeadLetter}
        ).with_outputs(DEAD_LETTERS, main="recordings")
        return Outcome(new.recordings, new[DEAD_LETTERS])


class WatchRecordings(beam.PTransform):
    """Starts a stream of what is new in folders, or matches globs, and of what has changed. Gives an `Outcome`.

    Each version of a file passes once: an object as soon as it is listed, a file without an etag when its size and
    modification time were the same in two listings. A listing that fails is logged and counted as `listings_failed`;
    the next one finds what it would have found.

    Args:
        inputs: Folders (audio in them, recursively), globs or files, local or on any fsspec URL.
        every_s: Seconds from one listing to the next.
        channel: As of `ReadRecordings`.
        stream: As of `ReadRecordings`.
        exclude: As of `ReadRecordings`.
        stop_uri: As of `Ticks`.
        stop_after_s: As of `Ticks`.
        storage_options: As of `ReadRecordings`.

    Raises:
        ValueError: No input, or one that cannot be watched.
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
            raise ValueError("inputs is empty; name at least one folder or glob")
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
