"""The default engine: Hugging Face models with continuous batching over a shared key-value cache.

One thread does the work, in rounds: it encodes and prefills requests for which slots are free, then decodes one token
in every slot. A slot whose reply has ended takes the next prompt in the next round, so no request waits for the
longest reply of a batch. The audio of a segment is encoded once. Tasks about the same audio, and later turns of a
conversation, reuse the cached prefix of another slot: it is copied, and only the rest is computed.
"""

import contextlib
import copy
import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from af3pipe.models.decoding import Chooser
from af3pipe.models.devices import first_line, free_bytes, is_device_lost, is_out_of_memory, open_device
from af3pipe.models.encoder import AudioEncoder
from af3pipe.models.engine import EngineFailed, EngineInfo, EngineOptions, EngineStats, ModelError
from af3pipe.models.family import Checkpoint, model_revision, open_checkpoint
from af3pipe.models.inputs import Inputs, Window, eos_token_ids
from af3pipe.models.oracle import Oracle
from af3pipe.models.pools import Admission, Pool, Pools, Prompt
from af3pipe.models.scheduler import Job, JobQueue, capacity_class, isolate
from af3pipe.models.slots import ATTENTION, LanguageModel, Piece
from af3pipe.models.weights import load_model
from af3pipe.schemas import Reason, Rejected, Reply, Request, Stage

_SLOTS = {"cpu": 32, "cuda": 64}
_PREFILL_TOKENS = {"cpu": 2048, "cuda": 16384}  # in one call
_REFILL_SHARE = 8  # slots are refilled an eighth at a time: encoding and prefilling one by one costs more
_LEAST_PREFILL_TOKENS = 256


class TransformersEngine:
    """Runs requests through an unmodified Hugging Face model; see `Engine` for the contract."""

    def __init__(self, options: EngineOptions, *, loaded: tuple[Any, Any] | None = None) -> None:
        """Loads the model and starts the engine's thread.

        Args:
            options: The model, its device and further options.
            loaded: Model and processor that are already in memory, on their device and in their dtype.

        Raises:
            ModelError: The checkpoint cannot be loaded here.
        """
        checkpoint = open_checkpoint(options.model, options.revision)
        self._options = options
        self._claimed = open_device(options.device)
        self._device = self._claimed.torch
        slots = options.slots or _SLOTS.get(self._device.type, 64)
        self._queue = JobQueue(2 * slots, options.queue_audio_s)
        self._working: set[Job] = set()
        # Halved when it does not fit, and remembered for as long as this engine lives.
        self._prefill_tokens = _PREFILL_TOKENS.get(self._device.type, 16384)
        self._stats = EngineStats()
        self._stats_lock = threading.Lock()
        opened: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(checkpoint, slots, loaded, opened), name="af3pipe-engine", daemon=True
        )
        self._thread.start()
        try:
            opened.result()
        except BaseException:
            self._queue.close(EngineFailed("the engine was never open"))
            raise

    def _load(self, checkpoint: Checkpoint, slots: int, loaded: tuple[Any, Any] | None) -> None:
        """Loads the processor and the model, and creates the objects that use them."""
        options = self._options
        dtype = _dtype(options.dtype, self._device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            # float32 is for those who want what they would get on a CPU.
            torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32 and dtype != torch.float32
            # On Hopper and Blackwell torch prefers cuDNN's attention, which makes a plan for every new length: half a
            # second each (pytorch/pytorch#155958, modelscope/FunASR#3704). Prompts are of any length.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if loaded:
            model, processor = loaded
            self._inputs = Inputs(checkpoint, processor)
        else:
            self._inputs = Inputs.load(checkpoint)
            model = load_model(
                checkpoint,
                self._device,
                dtype,
                attention=options.attention,
                adapter=options.adapter,
                quantize=options.quantize,
            )
        self._model = model
        self._oracle: Oracle | None = None
        self._encoder = AudioEncoder(model.model)
        self._language = LanguageModel(model)
        self._chooser = Chooser(
            self._inputs.processor.tokenizer, eos_token_ids(model.generation_config), self._language.vocabulary
        )
        self._pools = Pools(
            self._language,
            slots=slots,
            free_bytes=free_bytes(self._device),
            graphs=options.cuda_graphs,
            after_failure=self._after_failure,
        )
        self._info = EngineInfo(
            model_id=checkpoint.model_id,
            model_revision=model_revision(checkpoint, options.adapter, options.quantize),
            family=checkpoint.family,
            licence=checkpoint.licence,
            engine="transformers",
            dtype=str(self._language.dtype).removeprefix("torch."),
            device=str(self._device),
            slots=slots,
        )

    @property
    def info(self) -> EngineInfo:
        """The opened model, device and dtype."""
        return self._info

    @property
    def is_open(self) -> bool:
        """Whether it still accepts requests."""
        return self._queue.is_open

    def submit(self, request: Request) -> "Future[list[Reply]]":
        """Queues a request; blocks while the calling thread has enough waiting requests."""
        return self._submit(request, alone=False)

    def ask_alone(self, request: Request) -> "Future[list[Reply]]":
        """Like `submit`, but by unmodified `generate` with the same weights, while all other requests wait."""
        return self._submit(request, alone=True)

    def _submit(self, request: Request, *, alone: bool) -> "Future[list[Reply]]":
        seconds = sum(map(len, request.audios)) / self._inputs.checkpoint.limits.sample_rate
        job = Job(request, seconds, alone=alone)
        self._queue.raise_if_closed()
        try:
            job.capacity = capacity_class(self._longest(job))
        except Exception as error:  # noqa: BLE001 (a request that cannot be processed fails alone)
            job.fail(error)
            return job.future
        self._queue.put(job)
        return job.future

    def take_stats(self) -> EngineStats:
        """Returns the statistics since the last call."""
        with self._stats_lock:
            stats, self._stats = self._stats, EngineStats()
        return stats._replace(idle_s=self._queue.take_idle_s())

    def close(self) -> None:
        """Stops the thread, fails unanswered requests, and frees the model. A second call does nothing."""
        self._queue.close(EngineFailed(f"the engine of {self._info.model_id!r} was closed"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _longest(self, job: Job) -> int:
        """Checks a request; returns the most positions that one of its prompts may need, reply included."""
        tasks = job.request.tasks
        for audio in job.request.audios:
            self._inputs.check(audio)
        job.audio_tokens = [self._inputs.checkpoint.audio_tokens(len(audio)) for audio in job.request.audios]
        if not tasks:
            raise ValueError("a request has no tasks; give it at least one")
        positions = 1
        for place, task in enumerate(tasks):
            if task.prompt is None:
                raise ValueError(f"task {task.name!r} has no prompt; resolve() it before submitting")
            job.history(place)  # raises where a turn before it is missing
            empty = [""] * len(task.history)
            prompt = self._inputs.prompt(task.turns, empty, job.audio_tokens)
            if not (prompt < 0).any() and task.turns[0].audios != ():
                detail = f"task {task.name!r} has no audio; where that is meant, say so with audios=()"
                raise Rejected(Stage.WINDOW, Reason.TOO_SHORT, detail)
            before = [other for other in tasks[:place] if other.turns == task.turns[: len(other.turns)]]
            # A reply read back as text may take some tokens more than it was given as.
            said = sum(other.decoding.max_new_tokens * 5 // 4 + 8 for other in before if other.turns != task.turns)
            positions = max(positions, len(prompt) + said + task.decoding.max_new_tokens + 1)
        return positions

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(
        self, checkpoint: Checkpoint, slots: int, loaded: tuple[Any, Any] | None, opened: "Future[None]"
    ) -> None:
        """Loads the model, then processes requests.

        It loads in the same thread, because OpenMP keeps worker threads for each thread that used it: once there are
        more than cores, all wait by sleeping, and steps on a CPU take twice as long.
        """
        try:
            self._load(checkpoint, slots, loaded)
        except BaseException as error:  # noqa: BLE001 (raised again in the constructor)
            self._claimed.release()
            opened.set_exception(error)
            return
        opened.set_result(None)
        self._work()

    def _work(self) -> None:
        failure = EngineFailed("the engine's thread ended")
        try:
            while True:
                self._admit()
                for pool in self._pools:
                    self._queue.raise_if_closed()
                    self._step(pool)
        except EngineFailed as error:
            failure = error
        except Exception as error:  # noqa: BLE001 (a bug here, too, must not leave anybody waiting)
            failure = EngineFailed(f"the engine's thread died: {type(error).__name__}: {error}")
            failure.__cause__ = error
        finally:
            _let_frames_go(failure)
            self._queue.close(failure)
            for job in self._working:
                job.fail(failure)
            self._free()

    def _free(self) -> None:
        del self._model, self._oracle, self._encoder, self._language, self._chooser, self._pools
        self._working.clear()
        gc.collect()
        if self._device.type == "cuda":
            # After a lost device even this fails, and there is nothing to free.
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
        self._claimed.release()

    def _each_alone(
        self, items: Sequence[Any], work: Callable[[Sequence[Any]], None], job_of: Callable[[Any], Job]
    ) -> None:
        """Applies work to all items; a failure affects only the request of its item."""
        isolate(items, work, lambda item, error: self._fail(job_of(item), error), self._after_failure)

    def _alone(self, job: Job, work: Callable[..., None], *arguments: Any) -> None:
        """Does a piece of work for one request, and fails only that request on an error."""
        self._each_alone([job], lambda _: work(*arguments), _itself)

    def _after_failure(self, error: Exception) -> None:
        """Continues after an error, or ends the engine if it is closed or its device is lost."""
        if isinstance(error, EngineFailed):
            raise error
        if is_device_lost(error):
            raise EngineFailed(f"device {self._device} is lost: {first_line(error)}") from error
        # The frames reference the batch's tensors; a future, or the next attempt, must not keep them alive.
        for each in (error, error.__cause__, error.__context__):
            traceback.clear_frames(each.__traceback__ if each else None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _fail(self, job: Job, error: Exception) -> None:
        if is_out_of_memory(error):
            detail = f"no room on {self._device} for what this request needs alone: {first_line(error)}"
            error = Rejected(Stage.GENERATE, Reason.OUT_OF_MEMORY, detail)
        _let_frames_go(error)
        job.fail(error)
        self._let_go(job)

    def _let_go(self, job: Job) -> None:
        """Forgets a finished request: its other prompts, and its prefixes in slots."""
        self._working.discard(job)
        for pool in self._pools:
            pool.forget(job)

    # -- requests to slots ---------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Fills free slots; waits for requests if there is nothing else to do.

        Runs once per round: otherwise requests that end with their first token could starve those already in slots.
        """
        jobs = self._take()
        for job in jobs:
            if job.alone:
                self._alone(job, self._ask_alone, job)
        self._encode([job for job in jobs if not job.alone and not job.done])
        for pool in self._pools:
            self._fill(pool)

    def _fill(self, pool: Pool) -> None:
        """Assigns free slots to waiting requests."""
        try:
            while pool.waiting and self._pools.has_slots(pool) and not all(pool.active):
                self._prefill(pool)
        except Rejected as error:
            for prompt in list(pool.waiting):
                self._fail(prompt.job, error)

    def _take(self) -> list[Job]:
        """Takes requests for which slots are free; all of them are marked as running."""
        jobs: list[Job] = []
        prompts: dict[int, int] = {}  # that they will have, by the length of their slots
        refused: dict[Job, Exception] = {}
        full: set[int] = set()
        waiting = len(self._queue)

        def fits(job: Job) -> bool:
            if job.alone:
                return not any(other.alone for other in jobs)  # one a round
            # Who has been encoded, and lost its slot or never had one, goes first.
            if job.capacity in full or any(pool.waiting and pool.slots is None for pool in self._pools):
                return False
            pool = self._pools[job.capacity]
            try:
                if not self._pools.has_slots(pool):
                    return False
            except Rejected as error:
                refused[job] = error
                return True
            free = pool.free - prompts.get(job.capacity, 0)
            # A few at a time, unless these are all there are.
            enough = 1 if job.capacity in prompts else min(waiting, max(1, len(pool.rows) // _REFILL_SHARE))
            if free < enough:
                full.add(job.capacity)
            return free >= enough

        while job := self._queue.take(fits, wait=not self._working):
            self._working.add(job)
            self._count(requests=1)
            jobs.append(job)
            if job in refused:
                self._fail(job, refused[job])
            elif not job.alone:
                prompts[job.capacity] = prompts.get(job.capacity, 0) + len(job.request.tasks)
        return jobs

    def _ask_alone(self, job: Job) -> None:
        """Answers a request with unmodified `generate`, task by task."""
        if self._oracle is None:
            # A processor of its own: callers use the engine's meanwhile, and tokenizers bear one user at a time.
            checkpoint, processor = self._inputs.checkpoint, copy.deepcopy(self._inputs.processor)
            self._oracle = Oracle(checkpoint, self._model, processor)
        self._language.attention(self._language.stock_attention)
        try:
            for place, reply in enumerate(self._oracle.ask_all(job.request)):
                self._queue.raise_if_closed()
                job.reply(place, reply)
        finally:
            self._language.attention(ATTENTION)
        self._let_go(job)

    # -- samples to audio embeddings -----------------------------------------------------------------------------

    def _encode(self, jobs: Sequence[Job]) -> None:
        """Encodes the audio of requests, each once, and creates their first prompts."""
        if not jobs:
            return
        began = time.perf_counter()
        features: dict[Job, list[Window]] = {}
        audio: dict[Job, torch.Tensor] = {}
        device = str(self._device) if self._device.type == "cuda" else "cpu"

        def extract(some: Sequence[Job]) -> None:
            for job in some:
                heard = [self._inputs.windows(samples, device) for samples in job.request.audios]
                features[job] = [window for windows in heard for window in windows]

        def encode(some: Sequence[Job]) -> None:
            windows = [window for job in some for window in features[job]]
            embedded = iter(self._encoder.encode(windows, self._queue.raise_if_closed))
            for job in some:
                pieces = [next(embedded) for _ in features[job]]
                audio[job] = torch.cat(pieces) if pieces else torch.empty(0)
                job.request = job.request._replace(samples=())  # encoded; no need to keep it until the last reply
            self._count(windows=len(windows), audio_tokens=sum(window.tokens for window in windows))

        self._each_alone(jobs, extract, _itself)
        # One may have failed when it was tried again, alone.
        self._each_alone([job for job in jobs if not job.done], encode, _itself)
        for job in (job for job in jobs if not job.done):
            self._alone(job, self._begin, job, audio[job])
        self._count(encode_s=time.perf_counter() - began)

    def _begin(self, job: Job, audio: torch.Tensor) -> None:
        """Creates the prompts of those tasks of a request that can start now."""
        prompts = []
        for place in job.begin_ready():
            said = [self._inputs.said(reply) for reply in job.history(place) or ()]
            tokens = self._inputs.prompt(job.request.tasks[place].turns, said, job.audio_tokens)
            prompts.append(Prompt(job, place, tokens, audio))
        again = any(prompt.task.history for prompt in prompts)
        for prompt in reversed(prompts) if again else prompts:
            # Replies of odd bytes are much longer when they are read back as text: then it takes a longer slot.
            positions = len(prompt.tokens) + prompt.task.decoding.max_new_tokens + 1
            waiting = self._pools[max(job.capacity, capacity_class(positions))].waiting
            if again:
                waiting.appendleft(prompt)  # before the slot with the conversation is reassigned
            else:
                waiting.append(prompt)

    # -- prompts to first tokens ---------------------------------------------------------------------------------

    def _prefill(self, pool: Pool) -> None:
        """Prefills waiting prompts into free slots and chooses their first tokens."""
        began = time.perf_counter()
        admissions = pool.admit(self._prefill_tokens)

        def work(some: Sequence[Admission]) -> None:
            some = [each for each in some if each.row < len(pool.rows) and pool.rows[each.row] is each.prompt]
            if pool.slots is None or not some:
                return
            scores = []
            try:
                for pieces, ends in self._chunks(some):
                    scores.append(pool.slots.prefill(pieces)[ends])
                rows, known = self._without_overflow(some, torch.cat(scores))
                if rows:
                    self._choose(pool, rows, known, "prefill_s", began)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._prefill_out_of_memory(pool, admissions, error)

        self._each_alone(admissions, work, lambda admission: admission.prompt.job)

    def _without_overflow(self, some: Sequence[Admission], scores: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """Returns the slots and logits of prompts whose logits are finite; fails the other prompts.

        Samples far beyond full scale, or weights that overflow the dtype, give NaN or infinity: any token chosen from
        that would look like a reply.
        """
        known: list[bool] = scores.amax(-1).isfinite().tolist()
        if all(known):
            return [admission.row for admission in some], scores
        for admission, is_known in zip(some, known, strict=True):
            if not is_known:
                detail = "the model's scores are not finite: are samples far beyond full scale?"
                self._fail(admission.prompt.job, Rejected(Stage.GENERATE, Reason.ENGINE_ERROR, detail))
        places = [place for place, each in enumerate(some) if known[place] and not each.prompt.job.done]
        return [some[place].row for place in places], scores[places]

    def _chunks(self, admissions: Sequence[Admission]) -> Iterator[tuple[list[Piece], list[int]]]:
        """Yields what one prefill call takes, and which pieces end a prompt; long prompts take several calls."""
        pieces: list[Piece] = []
        ends: list[int] = []
        budget = self._prefill_tokens
        for prompt, row, start in admissions:
            ids = torch.from_numpy(self._inputs.ids(prompt.tokens[start:])).to(self._device)
            embeds = self._language.embed(ids)
            heard = torch.from_numpy(np.flatnonzero(prompt.tokens[start:] < 0))
            if len(heard):
                taken = torch.from_numpy(-1 - prompt.tokens[start:])[heard]
                embeds[heard.to(self._device)] = prompt.audio[taken.to(self._device)].to(embeds.dtype)
            place = 0
            while place < len(embeds):
                part = embeds[place : place + budget]
                pieces.append(Piece(row, start + place, part))
                place += len(part)
                budget -= len(part)
                if place == len(embeds):
                    ends.append(len(pieces) - 1)
                if not budget:
                    yield pieces, ends
                    pieces, ends, budget = [], [], self._prefill_tokens
            if prompt.choice is None:
                prompt.choice = self._chooser.begin(
                    prompt.task.decoding, prompt.job.request.seed, self._inputs.ids(prompt.tokens).tolist()
                )
            self._count(prompt_tokens=len(prompt.tokens), reused_tokens=start)
        if pieces:
            yield pieces, ends

    def _prefill_out_of_memory(self, pool: Pool, admissions: Sequence[Admission], error: Exception) -> None:
        """Prefills fewer tokens per call from now on; if they are few already, reduces the slots."""
        if self._prefill_tokens <= _LEAST_PREFILL_TOKENS:
            self._out_of_memory(pool, error)
            return
        self._prefill_tokens //= 2
        pool.take_back(admissions)
        self._after_failure(error)

    def _out_of_memory(self, pool: Pool, error: Exception) -> None:
        failed = self._pools.shrink(pool, error)
        if failed:
            self._fail(failed[0].job, failed[1])

    # -- steps ---------------------------------------------------------------------------------------------------

    def _step(self, pool: Pool) -> None:
        """Decodes one more token in every active slot."""
        if pool.slots is None or not any(pool.active):
            return
        began = time.perf_counter()
        if not pool.waiting:
            pool.compact()

        def work(some: Sequence[int]) -> None:
            # Some may have gone since: with another prompt of their request, or with all slots.
            rows = [row for row in some if row < len(pool.active) and pool.active[row]]
            if pool.slots is None or not rows:
                return
            first, count = rows[0], rows[-1] + 1 - rows[0]
            # A free slot between others takes part, at the position that no prompt uses.
            tokens, positions = np.zeros(count, np.int64), np.full(count, pool.capacity - 1)
            for row in rows:
                prompt = pool.rows[row]
                assert prompt is not None
                assert prompt.choice is not None
                tokens[row - first] = prompt.choice.tokens[-1]
                positions[row - first] = len(prompt.tokens) + len(prompt.choice.tokens) - 1
            try:
                scores = pool.slots.step(first, tokens, positions)
                scores = scores if count == len(rows) else scores[[row - first for row in rows]]
                self._choose(pool, rows, scores, "decode_s", began)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._out_of_memory(pool, error)

        rows = [row for row, active in enumerate(pool.active) if active]
        self._count(steps=1, slot_steps=len(rows), slot_capacity=len(pool.rows))
        self._each_alone(rows, work, lambda row: self._job_in(pool, row))

    def _job_in(self, pool: Pool, row: int) -> Job:
        prompt = pool.rows[row]
        assert prompt is not None
        return prompt.job

    def _choose(self, pool: Pool, rows: Sequence[int], scores: torch.Tensor, work: str, began: float) -> None:
        """Chooses the next token of each of these slots; frees those whose reply has ended.

        The time is added to the statistics before any reply is delivered, so that a caller with all replies sees all
        of the work.
        """
        prompts = [pool.rows[row] for row in rows]
        choices = [prompt.choice for prompt in prompts if prompt is not None and prompt.choice is not None]
        self._chooser.next(scores, choices)
        self._count(**{work: time.perf_counter() - began})
        for row, choice in zip(rows, choices, strict=True):
            if choice.finish_reason:
                pool.active[row] = False
                if (prompt := pool.rows[row]) is not None:  # else another of its request's prompts failed meanwhile
                    self._alone(prompt.job, self._finish, prompt)

    def _finish(self, prompt: Prompt) -> None:
        """Delivers a reply; prompts that were waiting for it come next, in the same slot."""
        assert prompt.choice is not None
        assert prompt.choice.finish_reason is not None
        if prompt.choice.error:
            raise prompt.choice.error
        reply = self._inputs.reply(prompt.choice.tokens, prompt.tokens, prompt.task, prompt.choice.finish_reason)
        self._count(new_tokens=len(reply.tokens))
        prompt.job.reply(prompt.place, reply)
        if prompt.job.done:
            self._let_go(prompt.job)
        else:
            self._begin(prompt.job, prompt.audio)

    def _count(self, **more: Any) -> None:
        with self._stats_lock:
            sums = {name: getattr(self._stats, name) + value for name, value in more.items()}
            self._stats = self._stats._replace(**sums)


def _itself(job: Job) -> Job:
    return job


def _let_frames_go(error: BaseException | None) -> None:
    """Replaces an error's traceback by its text: frames would keep slots and audio in memory with the error."""
    while error is not None:
        if error.__traceback__ is not None:
            if sys.version_info >= (3, 11):
                error.add_note("in the engine:\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip())
            error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _dtype(name: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    known["auto"] = torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in known:
        raise ModelError(f"dtype {name!r} is not known; choose from {', '.join(sorted(known))}")
    return known[name]
