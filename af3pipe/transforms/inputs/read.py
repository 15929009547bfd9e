"""Reads inputs (files, folders, globs, manifests, containers): lists their recordings on the workers."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, TypedDict

import apache_beam as beam

from af3pipe import storage
from af3pipe.schemas import (
    MIX,
    DeadLetter,
    Reason,
    Recording,
    Rejected,
    Stage,
    channel_text,
    source_key,
    stream_index,
)
from af3pipe.transforms.inputs.containers import arrow_rows, container_rows, dataset_files
from af3pipe.transforms.inputs.manifest import Row, is_manifest, is_text, manifest_rows, read_row
from af3pipe.transforms.outcome import DEAD_LETTERS, Outcome, outcomes, to_dead_letter
from af3pipe.transforms.overlap import OverlapDoFn
from af3pipe.transforms.plan import STAT_THREADS, PlanObjects
from af3pipe.transforms.stores import count_retries, set_storage


class _Chosen(TypedDict):
    channel: str
    stream: int | None


def list_recordings(
    name: str,
    *,
    channel: str | int = MIX,
    stream: int | None = None,
    allow_prefixes: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Iterator[Recording | DeadLetter]:
    """Lists the recordings of one input, as ReadRecordings does, but without Beam.

    An input is a file, folder or glob of audio; a manifest; a container (a tar shard, Parquet with audio in it, the
    `.arrow` files of a Hugging Face data set, or the folder of one). A glob may match several of any one kind.

    Raises:
        ValueError: There is no such channel or stream.
    """
    chosen: _Chosen = {"channel": channel_text(channel), "stream": stream_index(stream)}
    # Only Rejected becomes a dead letter: an unexpected error in a listing would lose all that is not listed yet.
    yield from outcomes(
        _listed(name, chosen, allow_prefixes, exclude), functools.partial(_rejected, name), catch=Rejected
    )


def _rejected(name: str, error: Exception) -> DeadLetter:
    """Makes the dead letter of an input itself, always with the stage `list`."""
    if isinstance(error, Rejected):
        error = Rejected(Stage.LIST, error.reason, error.detail)
    return to_dead_letter(error, Recording(source_key(name), name), stage=Stage.LIST)


def _listed(
    name: str, chosen: _Chosen, allow_prefixes: Sequence[str], exclude: Sequence[str]
) -> Iterator[Recording | DeadLetter]:
    def contained(uri: str, rows: Iterator[Row]) -> Iterator[Recording | DeadLetter]:
        read = (read_row(row, uri, allow_prefixes=allow_prefixes, **chosen) for row in rows)
        # A damaged one does not affect the others.
        return outcomes(read, functools.partial(_rejected, uri), catch=Rejected)

    if not _is_file(name) and (files := dataset_files(name)) is not None:
        for uri in files:
            yield from contained(uri, arrow_rows(uri))
        return
    are_manifests = is_manifest(name)
    for found in storage.list_objects(name, exclude):
        list_container = container_rows(
            found.uri, named=found.uri == name or found.canonical == storage.canonical(name)
        )
        if not is_text(found.uri) or not (list_container or are_manifests):
            yield _recording(found, chosen)
        else:
            yield from contained(found.uri, list_container(found) if list_container else manifest_rows(found.uri))


def _is_file(name: str) -> bool:
    """Returns whether a name cannot be that of a data set's folder, so that the store need not be queried."""
    is_audio = name.rpartition(".")[2].lower() in storage.AUDIO_EXTENSIONS
    return is_audio or is_manifest(name) or container_rows(name) is not None or any(c in name for c in "*?[")


def _recording(found: storage.ObjectInfo, chosen: _Chosen) -> Recording | DeadLetter:
    uri = found.canonical or found.uri
    recording = Recording(source_key(uri, **chosen), uri, found.size_bytes, found.etag, found.mtime, **chosen)
    return recording if is_text(found.uri) else _misnamed(recording)


def _misnamed(recording: Recording) -> DeadLetter:
    """Makes the dead letter of a file whose name is not UTF-8, with escaped bytes, as Parquet cannot store it."""
    shown = recording.uri.encode(errors="surrogateescape").decode(errors="backslashreplace")
    rejected = Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, f"the name {shown} is not UTF-8; rename the file")
    return to_dead_letter(rejected, recording._replace(uri=shown), stage=Stage.LIST)


def stat_recording(recording: Recording) -> Recording | DeadLetter:
    """Adds size, etag and modification time to a recording that lacks them; returns a dead letter on failure."""
    if recording.size_bytes is not None:
        return recording
    try:
        info = storage.stat(recording.uri)
    except Rejected as rejected:
        return to_dead_letter(rejected, recording, stage=Stage.READ)
    return recording._replace(size_bytes=info.size_bytes, etag=info.etag, mtime=info.mtime)


class StatDoFn(OverlapDoFn[Recording, Recording | DeadLetter]):
    """Adds size, etag and modification time to recordings, with many concurrent requests to the store."""

    def __init__(self, storage_options: storage.StorageOptions) -> None:
        super().__init__(max_pending=2 * STAT_THREADS)
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)
        self._pool = ThreadPoolExecutor(STAT_THREADS, thread_name_prefix="af3pipe-stat")

    def teardown(self) -> None:
        super().teardown()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, recording: Recording) -> "Future[Recording | DeadLetter]":
        return self._pool.submit(stat_recording, recording)

    def finish_bundle(self) -> Iterator[Any]:
        yield from super().finish_bundle()
        count_retries()

    def emit(self, recording: Recording, future: "Future[Recording | DeadLetter]") -> Iterator[Any]:
        found = future.result()
        if isinstance(found, DeadLetter):
            yield beam.pvalue.TaggedOutput(DEAD_LETTERS, found)
        else:
            yield found


def tagged(items: Iterable[Recording | DeadLetter]) -> Iterator[Any]:
    """Yields recordings, and dead letters as tagged outputs."""
    for found in items:
        yield beam.pvalue.TaggedOutput(DEAD_LETTERS, found) if isinstance(found, DeadLetter) else found


class _ListDoFn(beam.DoFn):
    def __init__(
        self,
        chosen: _Chosen,
        allow_prefixes: Sequence[str],
        exclude: Sequence[str],
        storage_options: storage.StorageOptions,
    ) -> None:
        self._list = functools.partial(
            list_recordings, allow_prefixes=tuple(allow_prefixes), exclude=tuple(exclude), **chosen
        )
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)

    def finish_bundle(self) -> None:
        count_retries()

    def process(self, name: str) -> Iterator[Any]:
        return tagged(self._list(name))


class ListRecordings(beam.PTransform):
    """Lists the recordings of inputs, with repetitions; maps a PCollection of inputs to an `Outcome`.

    Args:
        channel: See `ReadRecordings`.
        stream: See `ReadRecordings`.
        allow_prefixes: See `ReadRecordings`.
        exclude: See `ReadRecordings`.
        storage_options: See `ReadRecordings`.
    """

    def __init__(
        self,
        *,
        channel: str | int = MIX,
        stream: int | None = None,
        allow_prefixes: Sequence[str] = (),
        exclude: Sequence[str] = (),
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        chosen: _Chosen = {"channel": channel_text(channel), "stream": stream_index(stream)}
        self._dofn = _ListDoFn(chosen, allow_prefixes, exclude, dict(storage_options))

    def expand(self, names: Any) -> Any:
        listed = names | "List" >> beam.ParDo(self._dofn).with_output_types(
            Recording, **{DEAD_LETTERS: DeadLetter}
        ).with_outputs(DEAD_LETTERS, main="recordings")
        return Outcome(listed.recordings, listed[DEAD_LETTERS])


class ReadRecordings(beam.PTransform):
    """Lists recordings: outputs one `AudioObject` for each audio object, with the recordings in it, in no order.

    It starts a pipeline (`p | ReadRecordings("s3://archive/**/*.flac")`), or takes a PCollection of inputs. Audio is
    not read here: URI, size, etag and modification time are shuffled to the workers. What cannot be listed is a dead
    letter in an `AudioObject`.

    Args:
        inputs: Files, folders (audio in them, recursively), globs, manifests (`.jsonl`, `.csv`, `.tsv`,
            `.parquet`), tar shards, Parquet files with audio in it, or Hugging Face data sets on disk, local or on
            any fsspec URL.
        channel: Audio channel: `mix` (the mean over all channels), `left`, `right`, or an index from 0. A manifest's
            `channel` column takes precedence.
        stream: Index among the audio streams of a container file; None takes its main one. A manifest's `stream`
            column takes precedence.
        allow_prefixes: URLs below which a remote manifest may reference audio, beside its own bucket (on an object
            store) or folder. It may never reference local files.
        exclude: Output folders whose files are never inputs, see `own_files.excluded`.
        storage_options: URL prefix to fsspec's options, see `storage.set_options`; if transforms in one process
            differ, the last ones apply.

    Raises:
        ValueError: There is no input, or no such channel or stream.
    """

    def __init__(
        self,
        inputs: str | Sequence[str] = (),
        *,
        channel: str | int = MIX,
        stream: int | None = None,
        allow_prefixes: Sequence[str] = (),
        exclude: Sequence[str] = (),
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self._storage_options = dict(storage_options)
        self._list = ListRecordings(
            channel=channel,
            stream=stream,
            allow_prefixes=allow_prefixes,
            exclude=exclude,
            storage_options=storage_options,
        )
        self._inputs = [inputs] if isinstance(inputs, str) else list(dict.fromkeys(inputs))

    def expand(self, pipeline_or_names: Any) -> Any:
        names = pipeline_or_names
        if not isinstance(names, beam.PCollection):
            if not self._inputs:
                raise ValueError("inputs is empty; give at least one file, folder, glob or manifest")
            # Create reshuffles several elements but not one, so the graph would depend on the number of inputs.
            created = pipeline_or_names | "Inputs" >> beam.Create(self._inputs, reshuffle=False)
            names = created | "SpreadInputs" >> beam.Reshuffle()
        listed = names | "ListRecordings" >> self._list
        planned = listed | "PlanObjects" >> PlanObjects(storage_options=self._storage_options)
        return planned.objects
