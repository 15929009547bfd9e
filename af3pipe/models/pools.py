"""Assigns prompts to slots, chooses the lengths of slots, and limits them to the available memory."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from af3pipe.models.decoding import Choice
from af3pipe.models.devices import first_line, is_out_of_memory
from af3pipe.models.scheduler import Job
from af3pipe.models.slots import LanguageModel, Slots
from af3pipe.schemas import Reason, Rejected, Stage, Task


class Prompt:
    """A task of a request while it is decoded, or waits for a slot.

    Attributes:
        job: The request.
        place: Index of the task in the request.
        tokens: The prompt, from `Inputs.prompt`.
        audio: Embeddings for its negative tokens, shape (audio tokens, hidden size).
        choice: The reply so far.
    """

    def __init__(self, job: Job, place: int, tokens: npt.NDArray[np.int64], audio: torch.Tensor) -> None:
        self.job = job
        self.place = place
        self.tokens = tokens
        self.audio = audio
        self.choice: Choice | None = None

    @property
    def task(self) -> Task:
        return self.job.request.tasks[self.place]

    @property
    def cached(self) -> npt.NDArray[np.int64]:
        """The tokens in its slot: the prompt, and the reply except its last token, which the next step adds."""
        chosen = self.choice.tokens[:-1] if self.choice else []
        return np.concatenate([self.tokens, np.asarray(chosen, dtype=np.int64)])

    def shared_with(self, other: "Prompt") -> int:
        """Returns how many of its first tokens are in the other's slot, but not all: logits need one token."""
        if other.job is not self.job or other.choice is None:
            return 0
        cached = other.cached[: len(self.tokens) - 1]
        differ = np.flatnonzero(cached != self.tokens[: len(cached)])
        return int(differ[0]) if len(differ) else len(cached)


class Admission(NamedTuple):
    """A prompt and its slot, whose first `start` positions already contain the prompt's beginning."""

    prompt: Prompt
    row: int
    start: int


class Pool:
    """Slots of one length, with the prompts in them and the prompts that wait for them.

    Attributes:
        slots: None while there is no memory for them.
        rows: For each slot, the prompt that is in it or was last in it.
        active: For each slot, whether that prompt is still decoded.
        waiting: Prompts whose audio is encoded.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.slots: Slots | None = None
        self.rows: list[Prompt | None] = []
        self.active: list[bool] = []
        self.waiting: deque[Prompt] = deque()

    def open(self, slots: Slots) -> None:
        """Opens the pool with these slots, all of them free."""
        self.slots = slots
        self.rows = [None] * slots.count
        self.active = [False] * slots.count

    def close(self) -> None:
        """Frees the memory; prompts in slots wait for another slot, and start again."""
        ended = [prompt for prompt, active in zip(self.rows, self.active, strict=True) if prompt and active]
        for prompt in ended:
            prompt.choice = None
        self.waiting.extendleft(reversed(ended))
        self.slots, self.rows, self.active = None, [], []

    def admit(self, most_tokens: int) -> list[Admission]:
        """Assigns free slots to waiting prompts, and reuses slots that already contain most of a prompt.

        A prompt whose audio is being prefilled for another task waits until it can reuse that.

        Args:
            most_tokens: Most tokens to prefill in all; a single longer prompt is admitted.
        """
        assert self.slots is not None
        admissions: list[Admission] = []
        later: list[Prompt] = []
        tokens = 0
        while self.waiting and not all(self.active):
            prompt = self.waiting.popleft()
            shared = [prompt.shared_with(other) if other else 0 for other in self.rows]
            source = max(range(len(self.rows)), key=lambda row: (shared[row], not self.active[row]))
            start = shared[source]
            if not start and any(other.prompt.job is prompt.job for other in admissions):
                later.append(prompt)
                continue
            tokens += len(prompt.tokens) - start
            if admissions and tokens > most_tokens:
                later.append(prompt)
                break
            row = source
            if not start or self.active[source]:
                row = self._free_row({other.job for other in (*later, *self.waiting)})
                if start:
                    self.slots.copy(source, row, start)
            self.rows[row], self.active[row] = prompt, True
            admissions.append(Admission(prompt, row, start))
        self.waiting.extendleft(reversed(later))
        return admissions

    def take_back(self, admissions: Sequence[Admission]) -> None:
        """Returns prompts that could not be prefilled to the waiting ones, in their order."""
        for prompt, row, _ in reversed(admissions):
            if self.active[row] and self.rows[row] is prompt:
                prompt.choice = None
                self.rows[row], self.active[row] = None, False
                self.waiting.appendleft(prompt)

    def forget(self, job: Job) -> None:
        """Removes a request's prompts, and its prefixes in slots."""
        self.waiting = deque(prompt for prompt in self.waiting if prompt.job is not job)
        for row, prompt in enumerate(self.rows):
            if prompt is not None and prompt.job is job:
                self.rows[row], self.active[row] = None, False

    def _free_row(self, wanted: set[Job]) -> int:
        """Returns a free slot; if possible one without a prefix that a waiting prompt wants to share."""
        free = [row for row, active in enumerate(self.active) if not active]
        return min(free, key=lambda row: (last := self.rows[row]) is not None and last.job in wanted)

    @property
    def free(self) -> int:
        """Number of slots that no prompt is in or waits for."""
        return len(self.rows) - sum(self.active) - len(self.waiting)

    @property
    def is_idle(self) -> bool:
        return not any(self.active) and not self.waiting

    def compact(self) -> None:
        """Moves prompts into free slots before them: a step's cost depends on the last slot in use."""
        while any(self.active[sum(self.active) :]):
            last = max(row for row, active in enumerate(self.active) if active)
            hole = self.active.index(False)
            prompt = self.rows[last]
            assert prompt is not None
            assert self.slots is not None
            self.slots.copy(last, hole, len(prompt.cached))
            self.rows[hole], self.active[hole] = prompt, True
            self.rows[last], self.active[last] = None, False


class Pools:
    """The pools of one device, one for each slot length, within its memory.

    A pool is opened when a prompt needs it, and closed when it is idle and another needs its memory. If slots do not
    fit, their number is halved, for the lifetime of this object.

    Args:
        language: The model that uses the slots.
        slots: Most slots of a pool.
        free_bytes: Memory for all slots.
        graphs: Whether steps are captured as CUDA graphs.
        after_failure: Called with each out-of-memory error.
    """

    def __init__(
        self,
        language: LanguageModel,
        *,
        slots: int,
        free_bytes: int,
        graphs: bool,
        after_failure: Callable[[Exception], None],
    ) -> None:
        self._language = language
        self._slots = slots
        self._graphs = graphs
        self._after_failure = after_failure
        self._positions = free_bytes // language.position_bytes
        self._most: dict[int, int] = {}
        self._pools: dict[int, Pool] = {}

    def __iter__(self) -> Iterator[Pool]:
        return iter(list(self._pools.values()))

    def __getitem__(self, capacity: int) -> Pool:
        """Returns the pool of this length, open or not."""
        return self._pools.setdefault(capacity, Pool(capacity))

    def has_slots(self, pool: Pool) -> bool:
        """Returns whether a pool has slots, and opens it if needed; False while others use all the memory.

        Raises:
            Rejected: Not even one slot fits, although no other pool is open.
        """
        while pool.slots is None:
            wanted = self._most.get(pool.capacity, self._slots)
            if self._fitting(pool) < wanted:
                self._close_idle()
            count = min(wanted, self._fitting(pool))
            if not count:
                return False
            try:
                pool.open(Slots(self._language, count, pool.capacity, graphs=self._graphs))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._after_failure(error)
                self._most[pool.capacity] = max(1, count // 2)
                if count == 1 and not self._close_idle():
                    if self._open():
                        return False
                    raise self._does_not_fit(f"a slot of {pool.capacity} positions", error) from error
        return True

    def shrink(self, pool: Pool, error: Exception) -> tuple[Prompt, Rejected] | None:
        """Uses less memory from now on, after an error in using a pool; its prompts start again.

        Returns:
            The prompt that failed with all memory to itself, and why; None if a retry may succeed.
        """
        others = [other for other in self._open() if other is not pool]
        failed = None
        self._most[pool.capacity] = max(1, len(pool.rows) // 2)
        if len(pool.rows) == 1 and others:
            self._positions //= 2
            for other in others:
                other.close()
        elif len(pool.rows) == 1 and (prompt := pool.rows[0]) is not None:
            new = prompt.task.decoding.max_new_tokens
            asked = f"{len(prompt.tokens)} prompt tokens and up to {new} new ones"
            failed = prompt, self._does_not_fit(asked, error)
        pool.close()
        self._after_failure(error)
        return failed

    def _open(self) -> list[Pool]:
        return [pool for pool in self if pool.slots is not None]

    def _close_idle(self) -> bool:
        """Closes pools without prompts; returns whether there were any."""
        idle = [pool for pool in self._open() if pool.is_idle]
        for pool in idle:
            pool.close()
        return bool(idle)

    def _fitting(self, pool: Pool) -> int:
        """Returns how many slots a pool may have, at least one: half of the remaining memory, so that others fit."""
        others = self._open()
        remaining = self._positions - sum(len(other.rows) * other.capacity for other in others)
        return max(1, remaining // 2 // pool.capacity) if remaining >= pool.capacity or not others else 0

    def _does_not_fit(self, what: str, error: Exception) -> Rejected:
        dtype = str(self._language.dtype).removeprefix("torch.")
        where = f"on {self._language.device}, beside the model in {dtype} and nothing else"
        detail = f"no room for {what} {where}: {first_line(error)}"
        return Rejected(Stage.GENERATE, Reason.OUT_OF_MEMORY, detail)
