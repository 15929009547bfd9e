"""Names of files, folders, globs and manifests to recordings: listed, each once, spread over the workers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam

from af3pipe import storage
from af3pipe.schemas import DeadLetter, Recording, Rejected, Stage, make_recording_id
from af3pipe.transforms import metrics
from af3pipe.transforms.manifest import is_manifest, manifest_row_uri, read_manifest
from af3pipe.transforms.outcome import DEAD_LETTERS, Outcome, outcomes, to_dead_letter


def list_recordings(name: str) -> Iterator[Recording | DeadLetter]:
    """What a file, a folder, a glob or a manifest names: what ReadRecordings does for one input, without Beam."""

    def rejected(error: Exception) -> DeadLetter:
        return to_dead_letter(error, Recording(make_recording_id(name), name), stage=Stage.LIST)

    yield from outcomes(_manifest(name) if is_manifest(name) else _objects(name), rejected)


def _objects(name: str) -> Iterator[Recording | DeadLetter]:
    for found in storage.list_objects(name):
        yield Recording(make_recording_id(found.uri), found.uri, found.size_bytes, found.etag, found.mtime)


def _manifest(name: str) -> Iterator[Recording | DeadLetter]:
    for number, row in enumerate(read_manifest(name), start=1):
        if isinstance(row, Rejected):
            uri = manifest_row_uri(name, number)
            yield to_dead_letter(row, Recording(make_recording_id(uri), uri), stage=Stage.LIST)
        else:
            yield row


def merge(recordings: Iterable[Recording]) -> Recording:
    """The same recording, named more than once, is one: with the questions and metadata of all its mentions."""
    ordered = sorted(recordings, key=lambda found: (found.size_bytes is None, repr(found)))
    questions = tuple(dict.fromkeys(question for found in ordered for question in found.questions))
    metadata = tuple(sorted(dict(pair for found in ordered for pair in found.metadata).items()))
    return ordered[0]._replace(questions=questions, metadata=metadata)


class _ListDoFn(beam.DoFn):
    def process(self, name: str) -> Iterator[Any]:
        for found in list_recordings(name):
            if isinstance(found, DeadLetter):
                metrics.count("recordings_found")
                metrics.count("recordings_done")
                metrics.count(f"dead_letters_{found.reason.value}")
                yield beam.pvalue.TaggedOutput(DEAD_LETTERS, found)
            else:
                yield found


def _merge_group(_: str, recordings: Iterable[Recording]) -> Recording:
    metrics.count("recordings_found")
    return merge(recordings)


class ReadRecordings(beam.PTransform):
    """Lists recordings. Gives an `Outcome` of `Recording`, each once, in no order.

    Starts a pipeline (`p | ReadRecordings("s3://archive/**/*.flac")`), or takes a PCollection of such names.
    The audio itself is not read here: what is shuffled to the workers is the recording's name.

    Args:
        inputs: Files, folders (audio in them, recursively), globs or manifests (`.jsonl`, `.csv`, `.tsv`,
            `.parquet`), local or on any fsspec URL.

    Raises:
        ValueError: No input.
    """

    def __init__(self, inputs: str | Sequence[str] = ()) -> None:
        super().__init__()
        self._inputs = [inputs] if isinstance(inputs, str) else list(inputs)

    def expand(self, pipeline_or_names: Any) -> Any:
        names = pipeline_or_names
        if not isinstance(names, beam.PCollection):
            if not self._inputs:
                raise ValueError("inputs is empty; name at least one file, folder, glob or manifest")
            names = pipeline_or_names | "Inputs" >> beam.Create(self._inputs, reshuffle=True)
        listed = names | "List" >> beam.ParDo(_ListDoFn()).with_output_types(
            Recording, **{DEAD_LETTERS: DeadLetter}
        ).with_outputs(DEAD_LETTERS, main="recordings")
        recordings = (
            listed.recordings
            | "ById" >> beam.WithKeys(lambda found: found.recording_id).with_output_types(tuple[str, Recording])
            | "EachOnce" >> beam.GroupByKey()
            | "Merge" >> beam.MapTuple(_merge_group).with_output_types(Recording)
        )
        return Outcome(recordings, listed[DEAD_LETTERS])
