"""Who is in which slot, how long the slots are, and how many the memory allows."""

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
    """One task of a request while it is decoded, or waits for a slot.

    Attributes:
        job: The request.
        place: Of the task in it.
        tokens: The prompt, as `Inputs.prompt` gives it.
        audio: Embeddings that its negative tokens stand for, shape (audio tokens, hidden size).
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
    def held(self) -> npt.NDArray[np.int64]:
        """What its slot holds: the prompt, and the reply but for its last token, which comes with the next step."""
        chosen = self.choice.tokens[:-1] if self.choice else []
        return np.concatenate([self.tokens, np.asarray(chosen, dtype=np.int64)])

    def shared_with(self, other: "Prompt") -> int:
        """How many of its first tokens are in the other's slot; at least one is left, to have scores from."""
        if other.job is not self.job or other.choice is None:
            return 0
        held = other.held[: len(self.tokens) - 1]
        differ = np.flatnonzero(held != self.tokens[: len(held)])
        return int(differ[0]) if len(differ) else len(held)


class Admission(NamedTuple):
    """A prompt and the slot it is given, of which the first `start` positions are right already."""

    prompt: Prompt
    row: int
    start: int


class Pool:
    """Slots of one length: who is in them, and who waits for them.

    Attributes:
        slots: None while there is no memory for them.
        rows: By slot, the prompt that is or was last in it.
        active: Whether that one is still decoded.
        waiting: Prompts whose audio is encoded.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.slots: Slots | None = None
        self.rows: list[Prompt | None] = []
        self.active: list[bool] = []
        self.waiting: deque[Prompt] = deque()

    def open(self, slots: Slots) -> None:
        """Takes slots, all of them free."""
        self.slots = slots
        self.rows = [None] * slots.count
        self.active = [False] * slots.count

    def close(self) -> None:
        """Gives the memory back; who was in a slot waits for another, from the beginning."""
        ended = [prompt for prompt, active in zip(self.rows, self.active, strict=True) if prompt and active]
        for prompt in ended:
            prompt.choice = None
        self.waiting.extendleft(reversed(ended))
        self.slots, self.rows, self.active = None, [], []

    def admit(self, most_tokens: int) -> list[Admission]:
        """Gives waiting prompts free slots: those that hold most of them already.

        A prompt whose audio is just being prefilled for another task waits until it can share that.

        Args:
            most_tokens: To be prefilled, in all; a longer one alone is admitted.
        """
        assert self.slots is not None
        admissions: list[Admission] = []
        later: list[Prompt] = []
        tokens = 0
        while self.waiting and not all(self.active):
            prompt = self.waiting.popleft()
            shared = [prompt.shared_with(held) if held else 0 for held in self.rows]
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
        """Lets prompts that could not be prefilled wait again, in their order."""
        for prompt, row, _ in reversed(admissions):
            if self.active[row] and self.rows[row] is prompt:
                prompt.choice = None
                self.rows[row], self.active[row] = None, False
                self.waiting.appendleft(prompt)

    def forget(self, job: Job) -> None:
        """Lets go of a request's prompts, and of what slots hold of it."""
        self.waiting = deque(prompt for prompt in self.waiting if prompt.job is not job)
        for row, prompt in enumerate(self.rows):
            if prompt is not None and prompt.job is job:
                self.rows[row], self.active[row] = None, False

    def _free_row(self, wanted: set[Job]) -> int:
        """A free slot; not one that holds what somebody waits to share, where there is another."""
        free = [row for row, active in enumerate(self.active) if not active]
        return min(free, key=lambda row: (held := self.rows[row]) is not None and held.job in wanted)

    @property
    def free(self) -> int:
        """Slots that nobody is in or waits for."""
        return len(self.rows) - sum(self.active) - len(self.waiting)

    @property
    def is_idle(self) -> bool:
        return not any(self.active) and not self.waiting

    def compact(self) -> None:
        """Moves prompts into free slots before them: a step costs what its last slot makes it cost."""
        while any(self.active[sum(self.active) :]):
            last = max(row for row, active in enumerate(self.active) if active)
            hole = self.active.index(False)
            prompt = self.rows[last]
            assert prompt is not None
            assert self.slots is not None
            self.slots.copy(last, hole, len(prompt.held))
            self.rows[hole], self.active[hole] = prompt, True
            self.rows[last], self.active[last] = None, False


class Pools:
    """The pools of one device, by the length of their slots, within its memory.

    A pool is opened when somebody wants it and closed when another needs its memory and nobody is in it. What does
    not fit is halved; that is remembered for as long as this lives.

    Args:
        language: The model that works on the slots.
        slots: That a pool has at most.
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
        """The pool of this length, open or not."""
        return self._pools.setdefault(capacity, Pool(capacity))

    def has_slots(self, pool: Pool) -> bool:
        """Whether a pool has slots, opened now if need be; not while others have all the memory.

        Raises:
            Rejected: Not even one fits, though nothing else is there.
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
        """Takes less memory from now on, after an error in using a pool; its prompts begin again.

        Returns:
            The prompt that had all the memory to itself, and why it has failed; None where there is hope.
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
        """Gives back slots that nobody is in; whether there were any."""
        idle = [pool for pool in self._open() if pool.is_idle]
        for pool in idle:
            pool.close()
        return bool(idle)

    def _fitting(self, pool: Pool) -> int:
        """Slots that a pool may have: half of what memory is left, so that other lengths find some; one at least."""
        others = self._open()
        left = self._positions - sum(len(other.rows) * other.capacity for other in others)
        return max(1, left // 2 // pool.capacity) if left >= pool.capacity or not others else 0

    def _does_not_fit(self, what: str, error: Exception) -> Rejected:
        dtype = str(self._language.dtype).removeprefix("torch.")
        where = f"on {self._language.device}, beside the model in {dtype} and nothing else"
        detail = f"no room for {what} {where}: {first_line(error)}"
        return Rejected(Stage.GENERATE, Reason.OUT_OF_MEMORY, detail)
