"""The engine contract, and the only door to torch: an engine is opened by its name, on the machine that runs it."""

import atexit
import importlib
import threading
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from af3pipe.schemas import Reply, Request

ENGINES = {"transformers": "af3pipe.models.transformers_engine:TransformersEngine"}
_GROUP = "af3pipe.models.engine_group:open_group"


class ModelError(Exception):
    """The model cannot be loaded or does not fit this job. Ends the job; never a dead letter per recording."""


class EngineFailed(Exception):
    """The engine can answer nothing more (closed, or its device is lost). The runner must retry elsewhere."""


class EngineOptions(NamedTuple):
    """What an engine is opened with. Equal options share one engine in a process.

    Attributes:
        model: Hub id, local directory, or `demo` for the small checkpoint that ships with the package.
        engine: A name from `ENGINES`.
        revision: Branch, tag or commit on the hub; None for the default branch.
        dtype: `auto` (bfloat16 on CUDA, float32 on CPU), or `float32`, `bfloat16`, `float16`.
        device: As torch names it; `auto` claims a GPU that no other process has, and is the CPU where there is none.
            `all` claims every such GPU; for each, and for each of `cuda:0,cuda:1`, an engine process is started.
        slots: Most prompts (a request has one a task) decoded together; None for what the device is good for.
        queue_audio_s: Most seconds of audio that wait to be worked on.
        attention: The audio encoder's attention, by Hugging Face's name for it.
        cuda_graphs: Whether decoding steps are captured as CUDA graphs; without meaning on a CPU.
        adapter: Directory of a PEFT adapter that is merged into the weights.
        quantize: `none`, or `int8` or `fp8` for the language model's weights.
    """

    model: str
    engine: str = "transformers"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    slots: int | None = None
    queue_audio_s: float = 2400.0
    attention: str = "sdpa"
    cuda_graphs: bool = True
    adapter: str | None = None
    quantize: str = "none"


class EngineInfo(NamedTuple):
    """What was opened: lands in every answer and in the run's record.

    Attributes:
        slots: Prompts that are decoded together at most.
    """

    model_id: str
    model_revision: str
    family: str
    licence: str
    engine: str
    dtype: str
    device: str
    slots: int = 1


class EngineStats(NamedTuple):
    """What the engine did since it was last asked. Times are wall seconds of its thread.

    Attributes:
        windows: Windows of audio (30 s or less) through the audio encoder.
        prompt_tokens: Of all prompts; `reused_tokens` of them were there already, from another task or turn.
        steps: Decoding steps; `slot_steps` were taken by prompts, `slot_capacity` could have been.
        idle_s: Waiting with nothing to do, from the first request on.
    """

    requests: int = 0
    windows: int = 0
    audio_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    slot_steps: int = 0
    slot_capacity: int = 0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    idle_s: float = 0.0


class Engine(Protocol):
    """Turns requests into replies, on threads or processes of its own; shared by all threads of the process."""

    @property
    def info(self) -> EngineInfo:
        """What was opened."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether it still answers; once closed or lost, never again."""
        ...

    def submit(self, request: Request) -> "Future[list[Reply]]":
        """Queues a request; blocks while the queue is full.

        The future gives one reply per task, in order. It fails alone: with `Rejected` for a request that cannot
        be answered, with `EngineFailed` when the engine itself is lost. A cancelled future is not worked on.

        Raises:
            EngineFailed: The engine is closed or lost.
        """
        ...

    def ask_alone(self, request: Request) -> "Future[list[Reply]]":
        """As `submit`, but by stock `generate`, one task at a time: what `submit` must agree with."""
        ...

    def take_stats(self) -> EngineStats:
        """What was done since the last call; each piece of work is told once, whoever asks."""
        ...

    def close(self) -> None:
        """Stops the thread and frees the model. Requests not yet answered fail with `EngineFailed`."""
        ...


def open_engine(options: EngineOptions) -> Engine:
    """Loads a model into a new engine.

    Raises:
        ModelError: Unknown engine, or the model cannot be loaded here.
    """
    if options.engine not in ENGINES:
        raise ModelError(f"engine {options.engine!r} is not known; choose from {', '.join(sorted(ENGINES))}")
    is_group = options.device == "all" or "," in options.device
    module, name = (_GROUP if is_group else ENGINES[options.engine]).split(":")
    try:
        engine_class = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ModelError(
            f"engine {options.engine!r} needs {error.name or error}, which is not installed on this worker"
        ) from error
    engine: Engine = engine_class(options)
    return engine


class _Shared:
    """An engine in use, and by how many."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.engine: Engine | None = None
        self.users = 0


_shared: dict[EngineOptions, _Shared] = {}
_shared_lock = threading.Lock()
_kept: set[EngineOptions] = set()


def acquire_engine(options: EngineOptions) -> Engine:
    """The process's one engine for these options; the first caller loads it while the others wait.

    One that is lost is replaced by a new one: a runner tries a failed bundle again in the same process.

    Pair each call with one `release_engine`.
    """
    with _shared_lock:
        shared = _shared.setdefault(options, _Shared())
    with shared.lock:
        if shared.engine is None or not shared.engine.is_open:
            if shared.engine is not None:
                shared.engine.close()  # so that its device is free for the new one
                shared.engine = None
            shared.engine = open_engine(options)
        shared.users += 1
        return shared.engine


def hold_engine(options: EngineOptions) -> None:
    """Keeps the process's engine for these options open from when somebody acquires it; opens none.

    Pair each call with one `release_engine`.
    """
    with _shared_lock:
        shared = _shared.setdefault(options, _Shared())
    with shared.lock:
        shared.users += 1


def keep_engine(options: EngineOptions) -> None:
    """Keeps the process's engine for these options open until the process ends, however often it is called."""
    with _shared_lock:
        if options in _kept:
            return
        _kept.add(options)
    hold_engine(options)
    # Not left to the system: a thread that is in the middle of native code when Python ends may crash it.
    atexit.register(_close_engine, options)


def _close_engine(options: EngineOptions) -> None:
    """Whoever still uses it."""
    shared = _shared[options]
    with shared.lock:
        if shared.engine is not None:
            shared.engine.close()
            shared.engine = None


def release_engine(options: EngineOptions) -> None:
    """Gives back what `acquire_engine` gave or `hold_engine` kept; the last one closes the engine."""
    with _shared_lock:
        shared = _shared[options]
    with shared.lock:
        shared.users -= 1
        if shared.users == 0 and shared.engine is not None:
            shared.engine.close()
            shared.engine = None
