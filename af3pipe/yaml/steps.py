"""Wraps the transforms as steps of Beam YAML; the `config` of a step takes the keys of a job file that concern it.

The keys are validated as in a job file, when the pipeline is built. `DecodeAudio` and `AskAudioFlamingo` take
`error_handling: {output: NAME}`, like Beam's own steps: dead letters become an output of that name. Without it, the
first dead letter fails the pipeline.
"""

import difflib
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import apache_beam as beam
from apache_beam.typehints.row_type import RowTypeConstraint

from af3pipe import transforms
from af3pipe.pipelines import graph
from af3pipe.pipelines.job import JobConfig, JobError, make_job
from af3pipe.schemas import Answer, AudioObject, DeadLetter, RecordingResult, RecordingRow, Rejected, Segment
from af3pipe.yaml.rows import ToRows

_MODEL = ("model", "revision")
_TASKS = ("tasks", "questions", "max_new_tokens", "think")
_DECODE = (
    "over_length",
    "split_at",
    "split_tolerance_s",
    "on_silent",
    "silent_below",
    "decode_threads",
    "decode_guard",
    "decode_timeout_s",
    "decode_memory_mib",
    "storage_options",
)
_ENGINE = ("engine", "dtype", "device", "attention", "cuda_graphs", "adapter", "quantize", "slots", "queue_audio_s")
_ERROR_HANDLING = ("error_handling",)
KEYS: Mapping[str, tuple[str, ...]] = {
    "ReadRecordings": ("inputs", "channel", "stream", "allow_prefixes", "storage_options"),
    "AnswerRecordings": (*_MODEL, *_TASKS, *_DECODE, *_ENGINE, "accelerator"),
    "WriteResults": ("output", "partition_by", "storage_options", "run_id"),
    "Answers": (),
    "DeadLetters": (),
    "Rows": (),
    "DecodeAudio": (*_MODEL, *_DECODE, *_ERROR_HANDLING),
    "AskAudioFlamingo": (*_MODEL, *_TASKS, *_ENGINE, *_ERROR_HANDLING),
}
"""By step, the keys of its `config`."""

_REQUIRED = ("inputs", "output")
_NOT_OF_A_JOB = ("error_handling", "run_id")
_RESULTS = "AnswerRecordings, which is results"
_GOOD = "good"  # what Beam's own steps call it
_FILE = RowTypeConstraint.from_fields([("uri", str)])
_jobs: "weakref.WeakKeyDictionary[beam.PCollection, JobConfig]" = weakref.WeakKeyDictionary()
"""The job of the `DecodeAudio` step by its output, while the pipeline is built."""


class _Step(beam.PTransform):
    """Validates the `config` of a step; the transform of the same name does the work.

    Raises:
        JobError: The config has an invalid key or value, or lacks a required key.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self._errors = _error_output(config.get("error_handling"))
        self._config = config
        self._job = _job(type(self).__name__, config)

    def _outputs(self, good: Any, dead_letters: Any) -> Any:
        if self._errors is not None:
            return {_GOOD: good, self._errors: dead_letters | "DeadLetterRows" >> ToRows(DeadLetter)}
        _ = dead_letters | "FailOnDeadLetter" >> beam.Map(_fail)
        return good


class ReadRecordings(_Step):
    """Lists the recordings in `inputs`: files, folders, globs, manifests, tar shards, data sets.

    Its output is audio objects for `AnswerRecordings` and `DecodeAudio`, including dead letters for what cannot be
    listed.
    """

    def expand(self, pipeline: Any) -> Any:
        job = self._job
        return pipeline | "ReadRecordings" >> transforms.ReadRecordings(
            job.inputs,
            channel=job.channel,
            stream=job.stream,
            allow_prefixes=job.allow_prefixes,
            storage_options=job.storage_options,
        )


class AnswerRecordings(_Step):
    """Decodes the recordings of `ReadRecordings` and runs the model's `tasks` and `questions` on them.

    Its output is results for `WriteResults`, `Answers`, `DeadLetters` and `Rows`. No recording fails the pipeline.
    """

    def expand(self, objects: Any) -> Any:
        _check_input(objects, AudioObject, "ReadRecordings, which is audio objects")
        how = graph.asking(self._job)
        return objects | "AnswerRecordings" >> transforms.AnswerRecordings(
            decode=how.decode, ask=how.ask, accelerator=self._job.accelerator
        )


class WriteResults(_Step):
    """Writes the results of `AnswerRecordings` as a whole output, which `af3pipe audit` and `export` accept.

    Its output is a row with the `uri` of the run record, when everything is written.
    """

    def expand(self, results: Any) -> Any:
        _check_input(results, RecordingResult, _RESULTS)
        job = self._job
        written = results | "WriteResults" >> transforms.WriteResults(
            job.output,
            run_id=self._config.get("run_id"),
            partition_by=job.partition_by,
            storage_options=job.storage_options,
        )
        return written | "Record" >> beam.Map(lambda uri: beam.Row(uri=uri)).with_output_types(_FILE)


class _ViewStep(_Step):
    _VIEW: ClassVar[Any]
    _ROWS: ClassVar[type]

    def expand(self, results: Any) -> Any:
        _check_input(results, RecordingResult, _RESULTS)
        return results | type(self).__name__ >> self._VIEW() | "ToRows" >> ToRows(self._ROWS)


class Answers(_ViewStep):
    """Extracts the answers of results, as rows with the columns of `Answer`."""

    _VIEW = transforms.Answers
    _ROWS = Answer


class DeadLetters(_ViewStep):
    """Extracts the dead letters of results, as rows with the columns of `DeadLetter`."""

    _VIEW = transforms.DeadLetters
    _ROWS = DeadLetter


class Rows(_ViewStep):
    """Extracts how each recording ended, as rows with the columns of `RecordingRow`."""

    _VIEW = transforms.Rows
    _ROWS = RecordingRow


class DecodeAudio(_Step):
    """Decodes the recordings of `ReadRecordings` into segments for `AskAudioFlamingo`."""

    def expand(self, objects: Any) -> Any:
        _check_input(objects, AudioObject, "ReadRecordings, which is audio objects")
        decoded = objects | "DecodeAudio" >> graph.asking(self._job).decode
        _jobs[decoded.good] = self._job
        return self._outputs(decoded.good, decoded.dead_letters)


class AskAudioFlamingo(_Step):
    """Runs the model's `tasks` and `questions` on the segments of `DecodeAudio`; outputs rows of `Answer`."""

    def expand(self, segments: Any) -> Any:
        _check_input(segments, Segment, "DecodeAudio, which is segments")
        decoded_for = _jobs.get(segments, self._job)
        for key in _MODEL:
            here, there = getattr(self._job, key), getattr(decoded_for, key)
            if here != there:
                raise ValueError(f"{key} is {here!r} here and {there!r} in DecodeAudio; it must be the same")
        answers = segments | "AskAudioFlamingo" >> graph.asking(self._job).ask
        return self._outputs(answers.good | "ToRows" >> ToRows(Answer), answers.dead_letters)


def _check_input(found: Any, wanted: type, of: str) -> None:
    if getattr(found, "element_type", None) is not wanted:
        raise ValueError(f"its input must be that of {of}; it is {getattr(found, 'element_type', found)}")


def _error_output(error_handling: Any) -> str | None:
    if error_handling is None:
        return None
    output = error_handling.get("output") if isinstance(error_handling, dict) else None
    if not isinstance(output, str) or not output or output == _GOOD or len(error_handling) > 1:
        raise JobError(
            f"config: error_handling is {error_handling!r}; it must be {{output: NAME}}, the name of the output that "
            f"has the dead letters, for example dead_letters; {_GOOD!r} is that of the others"
        )
    return output


def _job(step: str, config: Mapping[str, Any]) -> JobConfig:
    """Validates a step's config as a job, so that the same checks and defaults apply."""
    allowed = KEYS[step]
    for key in config:
        if key not in allowed:
            _refuse(step, key)
    for key in _REQUIRED:
        if key in allowed and key not in config:
            raise JobError(f"config: {key} is missing")
    run_id = config.get("run_id")
    if run_id is not None and (not isinstance(run_id, str) or not run_id):
        raise JobError(f"config: run_id is {run_id!r}; it must be text that names the run")
    of_a_job = {key: value for key, value in config.items() if key not in _NOT_OF_A_JOB}
    return make_job(dict.fromkeys(_REQUIRED, "not of this step") | of_a_job, "config")


def _refuse(step: str, key: str) -> NoReturn:
    others = [other for other, keys in KEYS.items() if key in keys]
    near = difflib.get_close_matches(key, KEYS[step], n=1)
    if others:
        hint = f"it is one of {', '.join(others)}"
    elif near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = f"allowed are {', '.join(KEYS[step])}" if KEYS[step] else "it takes none"
    raise JobError(f"config: {key} is not a key of {step}; {hint}")


def _fail(letter: DeadLetter) -> NoReturn:
    raise Rejected(
        letter.stage,
        letter.reason,
        f"{letter.uri}: {letter.detail}; to get such recordings as rows instead of this failure, give the step "
        "error_handling: {output: dead_letters}",
    )
