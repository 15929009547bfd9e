"""The default engine: Hugging Face modules, the audio encoded once a segment, the prompts decoded in batches."""

import contextlib
import functools
import gc
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.models.musicflamingo import modeling_musicflamingo

from af3pipe.models.engine import EngineFailed, EngineInfo, EngineOptions, EngineStats, ModelError
from af3pipe.models.family import open_checkpoint
from af3pipe.models.inputs import Inputs, Windows, generation_config, load_model
from af3pipe.models.oracle import Oracle
from af3pipe.models.scheduler import Job, JobQueue, isolate
from af3pipe.schemas import Reason, Rejected, Reply, Request, Stage, Task

_rotate: Any = modeling_musicflamingo.apply_rotary_time_emb  # not typed
_ENCODER_WINDOWS = 8  # through the audio encoder at once; halved when it does not fit


class _Segment(NamedTuple):
    """A request, and its segment as the audio encoder takes it."""

    job: Job
    windows: Windows


class _Encoded(NamedTuple):
    """A request, and its segment as the language model takes it: shape (audio tokens, hidden size)."""

    job: Job
    audio: torch.Tensor


class _Row(NamedTuple):
    """One prompt to be decoded: a task about an encoded segment.

    Attributes:
        place: Of the task in its request.
        ids: The prompt with its placeholders, shape (length,), on the CPU.
        audio: What takes their place, shape (audio tokens, hidden size).
    """

    job: Job
    place: int
    ids: torch.Tensor
    audio: torch.Tensor

    @property
    def task(self) -> Task:
        return self.job.request.tasks[self.place]

    @property
    def math(self) -> str:
        """The decoding parameters that rows of one batch must share."""
        return self.task.decoding._replace(max_new_tokens=0).to_json()


class TransformersEngine:
    """Turns requests into replies with a stock Hugging Face model; see `Engine` for the contract.

    Batches are static: a batch ends when its last row does.
    """

    def __init__(self, options: EngineOptions) -> None:
        """Loads the model and starts the thread.

        Raises:
            ModelError: The checkpoint cannot be loaded here.
        """
        checkpoint = open_checkpoint(options.model, options.revision)
        device = _device(options.device)
        dtype = _dtype(options.dtype, device)
        self._options = options
        self._inputs = Inputs.load(checkpoint)
        self._model = load_model(checkpoint, device, dtype)
        self._core = getattr(self._model, "model", self._model)
        self._device = device
        self._info = EngineInfo(
            model_id=checkpoint.model_id,
            model_revision=checkpoint.revision,
            family=checkpoint.family,
            licence=checkpoint.licence,
            engine="transformers",
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
        )
        self._released = self._model.generation_config
        # What is remembered of running out of memory, for as long as this engine lives.
        self._encoder_windows = _ENCODER_WINDOWS
        self._max_positions: int | None = None
        self._queue = JobQueue(options.slots or 16, options.queue_audio_s)
        self._working: list[Job] = []
        self._stats = EngineStats()
        self._stats_lock = threading.Lock()
        self._alone_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="af3pipe-engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        """What was opened."""
        return self._info

    @property
    def is_open(self) -> bool:
        """Whether it still answers."""
        return self._queue.is_open

    def submit(self, request: Request) -> "Future[list[Reply]]":
        """Queues a request; blocks while about two batches are waiting."""
        job = Job(request, len(request.samples) / self._inputs.checkpoint.limits.sample_rate)
        self._queue.put(job)
        return job.future

    def ask_alone(self, request: Request) -> "Future[list[Reply]]":
        """As `submit`, but by stock `generate`, one task at a time, on the caller's thread."""
        future: Future[list[Reply]] = Future()
        try:
            self._queue.raise_if_closed()
            with self._alone_lock:
                oracle = Oracle(self._inputs.checkpoint, self._model, self._inputs.processor)
                future.set_result([oracle.ask(request.audios[0], task) for task in request.tasks])
        except Exception as error:  # noqa: BLE001 (the future's, as of submit)
            future.set_exception(error)
        return future

    def take_stats(self) -> EngineStats:
        """What was done since the last call."""
        with self._stats_lock:
            stats, self._stats = self._stats, EngineStats()
        return stats._replace(idle_s=self._queue.take_idle_s())

    def close(self) -> None:
        """Stops the thread, fails what is not answered, and frees the model. A second call does nothing."""
        self._queue.close(EngineFailed(f"the engine of {self._info.model_id!r} was closed"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failure = EngineFailed("the engine's thread ended")
        try:
            while True:
                self._working = self._queue.take()
                self._count(requests=len(self._working))
                self._answer(self._working)
                self._working = []
        except EngineFailed as error:
            failure = error
        except Exception as error:  # noqa: BLE001 (a bug here, too, must not leave anybody waiting)
            failure = EngineFailed(f"the engine's thread died: {type(error).__name__}: {error}")
            failure.__cause__ = error
        finally:
            self._queue.close(failure)
            for job in self._working:
                job.fail(failure)
            self._free()

    def _free(self) -> None:
        self._model = self._core = None
        gc.collect()
        if self._device.type == "cuda":
            # After a lost device even this fails, and there is nothing left to free.
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Encode, make rows, decode. Whatever becomes of one request, the others are answered."""
        segments: list[_Segment] = []
        encoded: list[_Encoded] = []
        rows: list[_Row] = []
        each_alone = functools.partial(isolate, after_failure=self._after_failure)
        for job in jobs:
            each_alone([job], lambda one: segments.append(self._cut(one[0])), Job.fail)
        each_alone(segments, lambda some: encoded.extend(self._encode(some)), _fail)
        for segment in encoded:
            each_alone([segment], lambda one: rows.extend(self._rows(one[0])), _fail)
        for batch in self._batches(rows):
            each_alone(batch, self._decode, _fail)

    def _after_failure(self, error: Exception) -> None:
        """Goes on, or ends the engine: closed, or its device is lost."""
        if isinstance(error, EngineFailed):
            raise error
        if _is_device_lost(error):
            raise EngineFailed(f"device {self._device} is lost: {_first_line(error)}") from error
        # The frames hold the batch's tensors; a future, or the next attempt, must not keep them alive.
        for each in (error, error.__cause__, error.__context__):
            traceback.clear_frames(each.__traceback__ if each else None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # -- samples to audio embeddings -----------------------------------------------------------------------------

    def _cut(self, job: Job) -> _Segment:
        """The windows of a request's segment, as log-mel features."""
        began = time.perf_counter()
        self._inputs.check(job.request.samples)
        device = str(self._device) if self._device.type == "cuda" else "cpu"
        windows = self._inputs.windows(job.request.samples, device)
        self._count(encode_s=time.perf_counter() - began)
        return _Segment(job, windows)

    @torch.inference_mode()
    def _encode(self, segments: Sequence[_Segment]) -> list[_Encoded]:
        """Audio embeddings of segments, each encoded once; the windows of all go through in micro-batches."""
        began = time.perf_counter()
        features = torch.cat([segment.windows.features for segment in segments])
        masks = torch.cat([segment.windows.mask for segment in segments])
        tokens = [count for segment in segments for count in segment.windows.tokens]
        # A window's place in its own segment: Music Flamingo tells windows apart by it.
        places = torch.tensor([place for segment in segments for place in range(len(segment.windows.tokens))])
        pieces: list[torch.Tensor] = []
        while len(pieces) < len(tokens):
            self._queue.raise_if_closed()
            part = slice(len(pieces), len(pieces) + self._encoder_windows)
            try:
                embedded = self._embed_windows(features[part], masks[part], places[part])
            except Exception as error:
                if not _is_out_of_memory(error) or self._encoder_windows == 1:
                    raise
                self._encoder_windows //= 2
                continue
            pieces += [piece[:count] for piece, count in zip(embedded, tokens[part], strict=True)]
        remaining = iter(pieces)
        encoded = [
            _Encoded(segment.job, torch.cat([next(remaining) for _ in segment.windows.tokens]))
            for segment in segments
        ]
        self._count(windows=len(tokens), audio_tokens=sum(tokens), encode_s=time.perf_counter() - began)
        return encoded

    def _embed_windows(self, features: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Audio tower and projector; (windows, mel bins, frames) to (windows, tokens of a full window, hidden)."""
        features = features.to(self._device, self._model.dtype)
        hidden = self._core.audio_tower(features, input_features_mask=mask.to(self._device)).last_hidden_state
        if hasattr(self._core, "pos_emb"):
            # Stock code reads the windows' places off input_ids. The times must be those of full windows
            # (hidden is padded to one here), and float32 as there, for the same cosines.
            length, step = hidden.shape[-2], self._model.config.audio_frame_step * 4
            starts = places.to(self._device).unsqueeze(1) * length * step
            times = starts + torch.arange(length, device=self._device, dtype=torch.float32) * step
            cos, sin = self._core.pos_emb(times, seq_len=length)
            hidden = _rotate(hidden, cos, sin)
        embedded: torch.Tensor = self._core.multi_modal_projector(hidden)
        return embedded

    # -- prompts to batches --------------------------------------------------------------------------------------

    def _rows(self, encoded: _Encoded) -> list[_Row]:
        """One row a task, all over the same audio."""
        job, audio = encoded
        rows = []
        for index, task in enumerate(job.request.tasks):
            if task.prompt is None:
                raise ValueError(f"task {task.name!r} has no prompt; resolve() it before submitting")
            rows.append(_Row(job, index, self._inputs.prompt_ids(task.prompt, len(audio)), audio))
        return rows

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Rows that may be decoded together, of like length, within the limits as they are when asked for.

        `max_new_tokens` may differ in a batch: a greedy reply cut earlier is the beginning of the longer one.
        """
        waiting = sorted(rows, key=lambda row: (row.math, len(row.ids)))
        while waiting:
            count = next(n for n in range(len(waiting), 0, -1) if n == 1 or self._fits(waiting[:n]))
            # A request that has failed meanwhile needs none of its other rows.
            yield [row for row in waiting[:count] if not row.job.done]
            waiting = waiting[count:]

    def _fits(self, rows: Sequence[_Row]) -> bool:
        return (
            len(rows) <= (self._options.slots or 16)
            and len({row.math for row in rows}) == 1
            and sum(row.job.seconds / row.job.rows for row in rows) <= self._options.queue_audio_s
            and (self._max_positions is None or _positions(rows) <= self._max_positions)
        )

    # -- batches to replies --------------------------------------------------------------------------------------

    def _decode(self, rows: Sequence[_Row]) -> None:
        """Answers rows together; running out of memory is remembered, and of a single row it is the answer."""
        began = time.perf_counter()
        limits = [row.task.decoding.max_new_tokens for row in rows]
        watch = _Watch(torch.tensor(limits), max(len(row.ids) for row in rows), self._queue.raise_if_closed)
        try:
            output = self._generate(rows, watch)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            self._max_positions = max(1, _positions(rows) // 2)
            if len(rows) > 1:
                raise
            row, new = rows[0], limits[0]
            asked = f"{len(row.ids)} prompt tokens and up to {new} new ones do not fit {self._device} on their own"
            detail = f"{asked}, beside the model in {self._info.dtype}: {_first_line(error)}"
            raise Rejected(Stage.GENERATE, Reason.OUT_OF_MEMORY, detail) from error
        ended = time.perf_counter()
        replies = [
            self._inputs.reply(new, row.ids, row.task, self._released) for row, new in zip(rows, output, strict=True)
        ]
        self._count(
            steps=1,
            slot_steps=len(rows),
            slot_capacity=(self._options.slots or 16),
            prompt_tokens=sum(reply.prompt_tokens for reply in replies),
            new_tokens=sum(reply.new_tokens for reply in replies),
            prefill_s=watch.prefilled - began,
            decode_s=ended - watch.prefilled,
        )
        for row, reply in zip(rows, replies, strict=True):
            row.job.reply(row.place, reply)

    @torch.inference_mode()
    def _generate(self, rows: Sequence[_Row], watch: "_Watch") -> list[list[int]]:
        """Stock `generate` over rows padded on the left; the new tokens of each, padded to the longest."""
        width, placeholder = watch.prompt_length, self._inputs.audio_token_id
        # Padded with a token that every prompt holds anyway, because a repetition penalty looks at all of them.
        ids = torch.full((len(rows), width), placeholder)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, width - len(row.ids) :] = row.ids
            mask[index, width - len(row.ids) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        embeds = self._model.get_input_embeddings()(ids)
        embeds[(ids == placeholder) & (mask == 1)] = torch.cat([row.audio for row in rows]).to(embeds.dtype)
        longest = max(row.task.decoding.max_new_tokens for row in rows)
        output = self._model.generate(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            generation_config=generation_config(
                rows[0].task.decoding._replace(max_new_tokens=longest), self._released
            ),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        new: list[list[int]] = output[:, width:].tolist()
        return new

    def _count(self, **more: Any) -> None:
        with self._stats_lock:
            told = {name: getattr(self._stats, name) + value for name, value in more.items()}
            self._stats = self._stats._replace(**told)


class _Watch(StoppingCriteria):
    """Ends each row at its own `max_new_tokens`, and everything when the engine is closed.

    Attributes:
        prompt_length: Of the padded prompts.
        prefilled: When the first new tokens were there.
    """

    def __init__(self, limits: torch.Tensor, prompt_length: int, raise_if_closed: Callable[[], None]) -> None:
        self.prompt_length = prompt_length
        self.prefilled = 0.0
        self._limits = limits
        self._raise_if_closed = raise_if_closed

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._raise_if_closed()
        if not self.prefilled:
            input_ids[0, -1].item()  # waits for the device, else its work would be counted as decoding
            self.prefilled = time.perf_counter()
            self._limits = self._limits.to(input_ids.device)
        return self._limits <= input_ids.shape[1] - self.prompt_length


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is not known to torch; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name!r} was asked for, but torch sees no CUDA device on this machine")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    known["auto"] = torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in known:
        raise ModelError(f"dtype {name!r} is not known; choose from {', '.join(sorted(known))}")
    return known[name]


def _fail(part: _Segment | _Encoded | _Row, error: Exception) -> None:
    part.job.fail(error)


def _positions(rows: Sequence[_Row]) -> int:
    """Keys and values that a batch may come to hold, padding included."""
    return len(rows) * (max(len(row.ids) for row in rows) + max(row.task.decoding.max_new_tokens for row in rows))


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError; cuBLAS names its own failed allocation a CUDA error.
    signs = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)


def _is_device_lost(error: Exception) -> bool:
    """After such an error every further call on the device fails, too: this process cannot go on."""
    accelerator_error = getattr(torch, "AcceleratorError", ())  # torch 2.8 and later
    lost = isinstance(error, accelerator_error) or "CUDA error" in str(error)
    return lost and not _is_out_of_memory(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
