"""The steps of a Beam YAML pipeline. What a step's `config` may hold are the keys of a job file that concern it.

They are checked as a job file's are, where the pipeline is built. `error_handling: {output: NAME}`, as of Beam's own
steps, gives the dead letters as an output of that name; without it the first dead letter ends the pipeline.
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
from af3pipe.schemas import Answer, DeadLetter, Recording, RecordingResult, Rejected, Segment
from af3pipe.tables.layout import new_run_id
from af3pipe.yaml.rows import FromRows, ToRows

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
_WRITE = ("output", "partition_by", "storage_options")
_FAILING = ("error_handling",)
KEYS: Mapping[str, tuple[str, ...]] = {
    "ReadRecordings": ("inputs", "channel", "stream", "allow_prefixes", "storage_options", *_FAILING),
    "DecodeAudio": (*_MODEL, *_DECODE, *_FAILING),
    "AskAudioFlamingo": (*_MODEL, *_TASKS, *_ENGINE, *_FAILING),
    "AnswerRecordings": (*_MODEL, *_TASKS, *_DECODE, *_ENGINE, "accelerator", *_FAILING),
    "ReconcileRecordings": ("tasks", "questions"),
    "WriteAnswers": (*_WRITE, "run_id"),
    "WriteDeadLetters": (*_WRITE, "run_id"),
    "WriteRecordings": (*_WRITE, "run_id"),
}
"""By step, the keys of its `config`."""

_REQUIRED = ("inputs", "output")
_NOT_OF_A_JOB = ("error_handling", "run_id")
_GOOD = "good"  # what Beam's own steps call it
_FILE = RowTypeConstraint.from_fields([("uri", str)])
_run_ids: "weakref.WeakKeyDictionary[beam.Pipeline, str]" = weakref.WeakKeyDictionary()
_jobs: "weakref.WeakKeyDictionary[beam.PCollection, JobConfig]" = weakref.WeakKeyDictionary()
"""What segments were decoded for and answers were asked, while the pipeline is built."""


class _Step(beam.PTransform):
    """Checks its `config`, and leaves the rest to the transform of the same name.

    Raises:
        JobError: The config has a wrong key or value, or lacks one.
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

    def _answers(self, answers: Any) -> Any:
        rows = answers.good | "Rows" >> ToRows(Answer)
        _jobs[rows] = self._job
        return self._outputs(rows, answers.dead_letters)


class ReadRecordings(_Step):
    """Lists the recordings in `inputs`: files, folders, globs, manifests, tar shards, data sets.

    Gives rows with the columns of `Recording`, each recording once.
    """

    def expand(self, pipeline: Any) -> Any:
        job = self._job
        found = pipeline | "ReadRecordings" >> transforms.ReadRecordings(
            job.inputs,
            channel=job.channel,
            stream=job.stream,
            allow_prefixes=job.allow_prefixes,
            storage_options=job.storage_options,
        )
        return self._outputs(found.good | "Rows" >> ToRows(Recording), found.dead_letters)


class DecodeAudio(_Step):
    """Decodes recordings, rows as of `ReadRecordings`, into segments, which only `AskAudioFlamingo` takes."""

    def expand(self, recordings: Any) -> Any:
        decoded = recordings | FromRows(Recording) | "DecodeAudio" >> graph.asking(self._job).decode
        _jobs[decoded.good] = self._job
        return self._outputs(decoded.good, decoded.dead_letters)


class AskAudioFlamingo(_Step):
    """Asks `tasks` and `questions` of the segments of `DecodeAudio`; gives rows with the columns of `Answer`."""

    def expand(self, segments: Any) -> Any:
        if segments.element_type is not Segment:
            raise ValueError(
                f"its input must be that of DecodeAudio, which is segments; it is {segments.element_type}"
            )
        decoded_for = _jobs.get(segments, self._job)
        for key in _MODEL:
            here, there = getattr(self._job, key), getattr(decoded_for, key)
            if here != there:
                raise ValueError(f"{key} is {here!r} here and {there!r} in DecodeAudio; it must be the same")
        answers = segments | "AskAudioFlamingo" >> graph.asking(self._job).ask
        return self._answers(answers)


class AnswerRecordings(_Step):
    """`DecodeAudio` and `AskAudioFlamingo` as one step, which an `accelerator` keeps on the same workers."""

    def expand(self, recordings: Any) -> Any:
        how = graph.asking(self._job)
        answers = (
            recordings
            | FromRows(Recording)
            | "AnswerRecordings"
            >> transforms.AnswerRecordings(how.decode, how.ask, accelerator=self._job.accelerator)
        )
        return self._answers(answers)


class ReconcileRecordings(_Step):
    """Gives a row per recording, with the columns of `RecordingResult`: how it ended.

    Its input is a mapping: `recordings`, `answers`, and `dead_letters`, which are those of all steps before it. What
    was asked it knows from the step that gives the answers; the config says it where another is in between.
    """

    _INPUTS: ClassVar = {"recordings": Recording, "answers": Answer, "dead_letters": DeadLetter}

    def expand(self, inputs: Any) -> Any:
        if not isinstance(inputs, dict) or inputs.keys() != self._INPUTS.keys():
            found = ", ".join(inputs) if isinstance(inputs, dict) else "a single one"
            raise ValueError(f"its input must be a mapping of {', '.join(self._INPUTS)}; it is {found}")
        asked = self._job if self._config else _jobs.get(inputs["answers"])
        if asked is None:
            raise ValueError(
                "its answers come from another step than the one that asked; say what was asked, by the same tasks "
                "and questions as there"
            )
        rows = {name: inputs[name] | f"From_{name}" >> FromRows(self._INPUTS[name]) for name in self._INPUTS}
        settled = rows | "ReconcileRecordings" >> transforms.ReconcileRecordings(asked.all_tasks())
        return settled | "Rows" >> ToRows(RecordingResult)


class _WriteStep(_Step):
    """Writes rows below `output`; gives a row with the `uri` of each file.

    All such steps of a pipeline write as one run, by one `run_id`, unless the config names another.
    """

    _ROWS: ClassVar[type]
    _TRANSFORM: ClassVar[Any]

    def expand(self, rows: Any) -> Any:
        job = self._job
        run_id = self._config.get("run_id") or _run_ids.setdefault(rows.pipeline, new_run_id())
        write = self._TRANSFORM(
            job.output, run_id=run_id, partition_by=job.partition_by, storage_options=job.storage_options
        )
        files = rows | FromRows(self._ROWS) | type(self).__name__ >> write
        return files | "Files" >> beam.Map(lambda uri: beam.Row(uri=uri)).with_output_types(_FILE)


class WriteAnswers(_WriteStep):
    """Writes rows with the columns of `Answer` to `captions/`, `transcripts/` and `answers/` below `output`."""

    _ROWS = Answer
    _TRANSFORM = transforms.WriteAnswers


class WriteDeadLetters(_WriteStep):
    """Writes rows with the columns of `DeadLetter` to `dead_letters/` below `output`."""

    _ROWS = DeadLetter
    _TRANSFORM = transforms.WriteDeadLetters


class WriteRecordings(_WriteStep):
    """Writes rows with the columns of `RecordingResult` to `recordings/` below `output`."""

    _ROWS = RecordingResult
    _TRANSFORM = transforms.WriteRecordings


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
    """The config as a job, of which the step takes its part: a job's checks and defaults hold here, too."""
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
        hint = f"allowed are {', '.join(KEYS[step])}"
    raise JobError(f"config: {key} is not a key of {step}; {hint}")


def _fail(letter: DeadLetter) -> NoReturn:
    raise Rejected(
        letter.stage,
        letter.reason,
        f"{letter.uri}: {letter.detail}; to have such recordings as rows instead of this end, give the step "
        "error_handling: {output: dead_letters} and write that output with WriteDeadLetters",
    )
