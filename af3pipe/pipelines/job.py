"""Defines and validates jobs: what to read, what to ask the model, and where to write."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from af3pipe import storage
from af3pipe.audio.guard import DEFAULT_LIMITS, LEAST_MEMORY_MIB, MOST_MEMORY_MIB, MOST_TIMEOUT_S
from af3pipe.audio.levels import FLOOR_DBFS, SILENT_BELOW_DBFS
from af3pipe.audio.recording import OverLength
from af3pipe.models.engine import ENGINES, EngineOptions
from af3pipe.models.family import DEFAULT_MODEL
from af3pipe.models.questions import question_keys
from af3pipe.models.tasks import DEFAULT_QUESTION_TOKENS, answer, caption, prompt, table_of, transcript
from af3pipe.schemas import MIX, Decoding, Task, channel_text, stream_index
from af3pipe.tables.layout import check_partition_by
from af3pipe.transforms.ask import check_tasks
from af3pipe.transforms.decode import OnSilent, SplitAt, check_split


class JobError(Exception):
    """A job is invalid: the message names the key, the value and what is allowed."""


def _as_list(value: Any) -> Any:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Asked(_Strict):
    """Has the keys that every task and question may set, named as in `Decoding` and the task factories.

    Attributes:
        think: Whether the model is prompted to reason first; None for the job's value.
        json_schema: Keys and values in YAML, or JSON text.
    """

    prompt: str | None = None
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 50
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_list)] = ()
    json_schema: dict[str, Any] | str | None = None
    think: bool | None = None

    @model_validator(mode="after")
    def _ends_after_it_may(self) -> "_Asked":
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, which is more than max_new_tokens {self.max_new_tokens}"
            )
        return self

    def decoding(self, max_new_tokens: int) -> Decoding:
        """Returns the decoding parameters for replies of at most this many tokens."""
        return Decoding(
            max_new_tokens=max_new_tokens,
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            min_new_tokens=self.min_new_tokens,
            seed=self.seed,
            stop=self.stop,
        )


class TaskConfig(_Asked):
    """Configures a task; a plain name in the job file stands for `{name: ...}`."""

    name: str
    parser: str | None = None

    @model_validator(mode="after")
    def _own_task_has_a_prompt(self) -> "TaskConfig":
        if self.name not in _FACTORIES and self.prompt is None:
            raise ValueError(
                f"task {self.name!r} is not known; choose from {', '.join(_FACTORIES)}, "
                "or give your own task a prompt"
            )
        if self.name in _FACTORIES and self.json_schema is not None:
            raise ValueError(f"task {self.name!r} has no json_schema; give a task of your own a name and a prompt")
        return self

    def to_tasks(self, max_new_tokens: int | None, think: bool) -> Iterator[Task]:
        """Yields the task for the transforms; the job's limit and `think` apply if it sets none."""
        think = think if self.think is None else self.think
        if self.name in _FACTORIES:
            task = _FACTORIES[self.name](prompt=self.prompt, think=think)
        else:
            task = prompt(self.name, self.prompt or "", json_schema=self.json_schema, think=think)
        limit = self.max_new_tokens or max_new_tokens or task.decoding.max_new_tokens
        decoding = self.decoding(limit)._replace(json_schema=task.decoding.json_schema)
        yield task._replace(decoding=decoding, parser=self.parser or task.parser)


_FACTORIES: dict[str, Callable[..., Task]] = {"caption": caption, "transcript": transcript}


class QuestionConfig(_Asked):
    """Configures a question about every recording; `models.questions.question_keys` reads it, as in a manifest.

    Attributes:
        constrained: Whether decoding is constrained to the choices.
        then: Follow-up questions, in the same conversation.
    """

    question: str
    choices: tuple[str, ...] = ()
    id: str | None = None
    constrained: bool = False
    then: Annotated[tuple["QuestionConfig", ...], BeforeValidator(lambda value: _question_configs(value))] = ()

    def to_tasks(self, max_new_tokens: int | None, think: bool, after: Task | None = None) -> Iterator[Task]:
        """Yields the question as a task, and then its follow-ups."""
        task = answer(
            self.question,
            self.choices,
            self.id,
            prompt=self.prompt,
            decoding=self.decoding(self.max_new_tokens or max_new_tokens or DEFAULT_QUESTION_TOKENS),
            constrained=self.constrained,
            json_schema=self.json_schema,
            think=think if self.think is None else self.think,
            after=after,
        )
        yield task
        for follow_up in self.then:
            yield from follow_up.to_tasks(max_new_tokens, think, after=task)


def _task_configs(value: Any) -> Any:
    return [{"name": item} if isinstance(item, str) else item for item in _as_list(value)]


def _question_configs(value: Any) -> Any:
    return [item if isinstance(item, QuestionConfig) else question_keys(item) for item in _as_list(value)]


def _are_storage_options(value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    storage.check_options(value)
    return value


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)?")
_UNITS_S = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(value: Any) -> Any:
    """Parses `30s`, `5m`, `1h`, `2d`, or a number of seconds."""
    found = _DURATION.fullmatch(str(value).strip())
    if found is None or isinstance(value, bool):
        raise ValueError("it must be a time such as 30s, 5m or 1h")
    return float(found[1]) * _UNITS_S[found[2]]


Seconds: TypeAlias = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]


class WatchConfig(_Strict):
    """Configures `af3pipe watch`. Times are `30s`, `5m`, `1h`, or seconds.

    Attributes:
        every: Interval between listings; a file without an etag must be unchanged for one interval.
        window: Length of the windows, by modification time of the objects, whose rows are written together.
        pane_every: Longest that a row waits for others of its window before it is written.
        stop_after: Time after which it stops by itself; None for never.
        shards: Number of sets of files that the rows of a window are written to at a time.
    """

    every: Seconds = 30.0
    window: Seconds = 300.0
    pane_every: Seconds = 60.0
    stop_after: Seconds | None = None
    shards: Annotated[int, Field(gt=0)] = 1


class JobConfig(_Strict):
    """Configures a job: what to read, what to ask the model and how, and where to write.

    Attributes:
        inputs: Files, folders, globs, manifests, tar shards, or data sets of Parquet or Arrow, on any fsspec URL.
        allow_prefixes: URL prefixes below which manifests may reference audio, beside their own bucket or folder.
        output: Folder for the Parquet tables.
        partition_by: Hive folders below each table: `date`, `run`, or a metadata column of the manifest.
        model: Hub id, local directory, or `demo`. NVIDIA's released weights are for non-commercial use, and an
            adapter made from them inherits that.
        device: `auto` claims a GPU that no other process has (a run in one process: all such), or is the CPU. `all`
            starts an engine process for each GPU, `cuda:0,cuda:1` for those named; else a torch device name.
        attention: Attention implementation of the audio encoder, by its Hugging Face name.
        cuda_graphs: Whether decoding steps are captured as CUDA graphs.
        adapter: Directory of a PEFT LoRA, on the workers: the `think` folder of the released checkpoint, for example.
        quantize: Number format that the language model's weights are quantized to.
        think: Whether the model is prompted to reason first, for tasks and questions that do not set it.
        tasks: Requests about every recording.
        questions: Further requests about every recording.
        over_length: How recordings beyond the model's maximum duration are treated.
        decode_guard: Whether audio is decoded in separate processes, where a crash costs one recording.
        decode_timeout_s: Timeout for opening a recording, and for decoding 10 s of it, in such a process.
        decode_memory_mib: Memory limit of such a process.
        split_at: Where `over_length: split` cuts: at the maximum duration, or at the quietest point before it.
        split_tolerance_s: How long before the maximum duration that point may be; 15 by default.
        on_silent: Whether a silent segment is processed and flagged, or becomes a dead letter.
        silent_below: In dBFS: a segment whose peak is at or below this is silent.
        channel: Audio channel: `mix`, `left`, `right`, or an index; a manifest's column takes precedence.
        stream: Index among the audio streams of a container; a manifest's column takes precedence.
        accelerator: Beam's accelerator hint for the workers that hold the model.
        resume: Whether requests that earlier runs answered in `output` are skipped.
        chunk_recordings: Number of recordings that a worker processes before it writes their rows; after ten minutes
            it writes those it has. A run in one process processes one chunk after the other.
        fail_on_dead_letters: A count (`0`) or a percentage (`5%`): more dead letters than this fail the run.
        verify_sample: Number of randomly sampled requests that are run again one at a time by plain `generate`.
        storage_options: URL prefix (`s3://archive/`) to fsspec's options for what is below it: `endpoint_url`,
            `profile`, `anon`, `requester_pays`, ...; the longest prefix applies. URLs that none covers take their
            credentials from the environment, where secrets are better kept.
        watch: Settings of `af3pipe watch` only, see `WatchConfig`.
        beam: Beam's pipeline options.
    """

    inputs: Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]
    allow_prefixes: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_list)] = ()
    output: Annotated[str, Field(min_length=1)]
    partition_by: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    model: str = DEFAULT_MODEL
    revision: str | None = None
    engine: str = "transformers"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    attention: Annotated[str, Field(min_length=1)] = EngineOptions._field_defaults["attention"]
    cuda_graphs: bool = True
    adapter: Annotated[str, Field(min_length=1)] | None = None
    quantize: Literal["none", "int8", "fp8"] = "none"
    tasks: Annotated[tuple[TaskConfig, ...], BeforeValidator(_task_configs)] = ()
    questions: Annotated[tuple[QuestionConfig, ...], BeforeValidator(_question_configs)] = ()
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    think: bool = False
    over_length: OverLength = "dead-letter"
    split_at: SplitAt = "cap"
    split_tolerance_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    on_silent: OnSilent = "flag"
    silent_below: Annotated[float, Field(ge=FLOOR_DBFS, lt=0)] = SILENT_BELOW_DBFS
    channel: Annotated[str, BeforeValidator(channel_text)] = MIX
    stream: Annotated[int | None, BeforeValidator(stream_index)] = None
    slots: Annotated[int, Field(gt=0)] | None = None
    queue_audio_s: Annotated[float, Field(gt=0)] = EngineOptions._field_defaults["queue_audio_s"]
    decode_threads: Annotated[int, Field(gt=0)] | None = None
    decode_guard: bool = True
    decode_timeout_s: Annotated[float, Field(gt=0, le=MOST_TIMEOUT_S)] = DEFAULT_LIMITS.timeout_s
    decode_memory_mib: Annotated[int, Field(ge=LEAST_MEMORY_MIB, le=MOST_MEMORY_MIB)] = DEFAULT_LIMITS.memory_mib
    accelerator: str | None = None
    resume: bool = True
    chunk_recordings: Annotated[int, Field(gt=0)] = 1000
    fail_on_dead_letters: Annotated[str, Field(pattern=r"^(\d+|\d+(\.\d+)?%)$")] | None = None
    verify_sample: Annotated[int, Field(ge=0)] = 0
    storage_options: Annotated[dict[str, dict[str, Any]], AfterValidator(_are_storage_options)] = {}
    watch: WatchConfig = WatchConfig()
    beam: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _count_may_be_a_number(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("fail_on_dead_letters"), (int, float)):
            return values | {"fail_on_dead_letters": str(values["fail_on_dead_letters"])}
        return values

    @model_validator(mode="after")
    def _engine_is_known(self) -> "JobConfig":
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}, which is not known; choose from {', '.join(ENGINES)}")
        return self

    @model_validator(mode="after")
    def _tasks_are_right(self) -> "JobConfig":
        check_tasks(self.all_tasks())
        return self

    @model_validator(mode="after")
    def _splitting_makes_sense(self) -> "JobConfig":
        check_split(self.over_length, self.split_at, self.split_tolerance_s)
        return self

    @model_validator(mode="after")
    def _partitions_are_possible(self) -> "JobConfig":
        check_partition_by(self.partition_by)
        return self

    def all_tasks(self) -> list[Task]:
        """Returns the requests about every recording; a caption where the job has none."""
        configs: list[TaskConfig | QuestionConfig] = [*self.tasks, *self.questions] or [TaskConfig(name="caption")]
        return [task for config in configs for task in config.to_tasks(self.max_new_tokens, self.think)]

    def tables(self) -> list[str]:
        """Returns the names of the tables that the job writes."""
        return sorted({"recordings", "dead_letters", *(table_of(task.name) for task in self.all_tasks())})

    def dead_letters_allowed(self, recordings: int) -> float:
        """Returns how many dead letters a run over so many recordings may have."""
        if self.fail_on_dead_letters is None:
            return float("inf")
        if self.fail_on_dead_letters.endswith("%"):
            return float(self.fail_on_dead_letters[:-1]) / 100 * recordings
        return float(self.fail_on_dead_letters)


def make_job(values: Mapping[str, Any], source: str = "command line") -> JobConfig:
    """Validates a job.

    Raises:
        JobError: Names each wrong key, its value, and what is allowed.
    """
    try:
        return JobConfig.model_validate(dict(values))
    except ValidationError as error:
        raise JobError("\n".join(f"{source}: {_explain(dict(found))}" for found in error.errors())) from error


def _explain(found: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        allowed = _allowed_keys(found["loc"])
        near = difflib.get_close_matches(str(found["loc"][-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"
        return f"{key} is not a key of a job; {hint}"
    if found["type"] == "missing":
        return f"{key} is missing"
    if key == "inputs" and found["type"] == "too_short":
        return "inputs is missing; name a file, folder, glob or manifest"
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] == "value_error":
        names_itself = not key or message.startswith(f"{key} is ")
        return str(message) if names_itself else f"{key}: {message}"
    return f"{key} is {found['input']!r}: {message[0].lower()}{message[1:]}"


def _allowed_keys(loc: Sequence[Any]) -> list[str]:
    nested: dict[Any, type[BaseModel]] = {"tasks": TaskConfig, "questions": QuestionConfig, "watch": WatchConfig}
    owner = nested.get(loc[0], JobConfig) if len(loc) > 1 else JobConfig
    return list(owner.model_fields)
