"""Defines the engine contract, and opens engines by name on the machine that runs them; imports torch only then."""

import atexit
import importlib
import threading
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from af3pipe.schemas import Reply, Request

ENGINES = {"transformers": "af3pipe.models.transformers_engine:TransformersEngine"}
_GROUP = "af3pipe.models.engine_group:open_group"


class ModelError(Exception):
    """The model cannot be loaded, or does not fit this job. Ends the job; never becomes a dead letter."""


class EngineFailed(Exception):
    """The engine is closed or its device is lost. The runner must retry on another worker or process."""


class EngineOptions(NamedTuple):
    """Options that an engine is opened with. In a process, equal options share one engine.

    Attributes:
        model: Hub id, local directory, or `demo` for the small checkpoint that ships with the package.
        engine: A name from `ENGINES`.
        revision: Branch, tag or commit on the hub; None for the default branch.
        dtype: `auto` (bfloat16 on CUDA, float32 on CPU), or `float32`, `bfloat16`, `float16`.
        device: torch's name of a device; or `auto` for a GPU that no other process has claimed, or the CPU if there
            is none. `all` claims every such GPU; for each, and for each of `cuda:0,cuda:1`, an engine process starts.
        slots: Most prompts (one for each task of a request) decoded together; None for a default of the device.
        queue_audio_s: Most seconds of audio that wait in the queue.
        attention: The audio encoder's attention implementation, by Hugging Face's name.
        cuda_graphs: Whether decoding steps are captured as CUDA graphs; ignored on a CPU.
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
    """The opened engine; written with every answer and in the run record.

    Attributes:
        slots: Most prompts that are decoded together.
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
    """What the engine did since the last `take_stats`. Times are wall-clock seconds of its thread.

    Attributes:
        windows: Windows of audio (30 s or less) that the audio encoder processed.
        prompt_tokens: Tokens of all prompts; `reused_tokens` of them were copied from another task or turn.
        steps: Decoding steps, with `slot_steps` tokens for prompts out of `slot_capacity` possible ones.
        idle_s: Time without any request, counted from the first request on.
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
    """Turns requests into replies, on its own threads or processes; shared by all threads of the process."""

    @property
    def info(self) -> EngineInfo:
        """The opened model, device and dtype."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether it still accepts requests; once closed or lost, it never does again."""
        ...

    def submit(self, request: Request) -> "Future[list[Reply]]":
        """Queues a request; blocks while the queue is full.

        The future's result is one reply per task, in order. It fails independently: with `Rejected` for a request
        that cannot be answered, with `EngineFailed` if the engine itself is lost. A cancelled future is not
        processed.

        Raises:
            EngineFailed: The engine is closed or lost.
        """
        ...

    def ask_alone(self, request: Request) -> "Future[list[Reply]]":
        """Like `submit`, but by unmodified `generate`, one task at a time: the reference for `submit`."""
        ...

    def take_stats(self) -> EngineStats:
        """Returns the statistics since the last call; each piece of work is reported once, whoever calls."""
        ...

    def close(self) -> None:
        """Stops the thread and frees the model. Unanswered requests fail with `EngineFailed`."""
        ...


def open_engine(options: EngineOptions) -> Engine:
    """Loads a model into a new engine.

    Raises:
        ModelError: The engine is unknown, or the model cannot be loaded here.
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
    """A shared engine, and the number of its users."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.engine: Engine | None = None
        self.users = 0


_shared: dict[EngineOptions, _Shared] = {}
_shared_lock = threading.Lock()
_kept: set[EngineOptions] = set()


def acquire_engine(options: EngineOptions) -> Engine:
    """Returns the process's one engine for these options; the first caller loads it while the others wait.

    A lost engine is replaced by a new one: a runner retries a failed bundle in the same process.

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
    """Prevents the process's engine for these options from closing once somebody acquires it; opens none.

    Pair each call with one `release_engine`.
    """
    with _shared_lock:
        shared = _shared.setdefault(options, _Shared())
    with shared.lock:
        shared.users += 1


def keep_engine(options: EngineOptions) -> None:
    """Keeps the process's engine for these options open until the process ends; repeated calls have no effect."""
    with _shared_lock:
        if options in _kept:
            return
        _kept.add(options)
    hold_engine(options)
    # Closed explicitly: a thread in the middle of native code when Python ends may crash the process.
    atexit.register(_close_engine, options)


def _close_engine(options: EngineOptions) -> None:
    """Closes an engine, whoever still uses it."""
    shared = _shared[options]
    with shared.lock:
        if shared.engine is not None:
            shared.engine.close()
            shared.engine = None


def release_engine(options: EngineOptions) -> None:
    """Ends one use of `acquire_engine` or `hold_engine`; the last one closes the engine."""
    with _shared_lock:
        shared = _shared[options]
    with shared.lock:
        shared.users -= 1
        if shared.users == 0 and shared.engine is not None:
            shared.engine.close()
            shared.engine = None
