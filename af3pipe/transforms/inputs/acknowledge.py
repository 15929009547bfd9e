"""Messages of Pub/Sub acknowledged once all that they asked for is durable, and leased until then."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import BooleanCoder, FastPrimitivesCoder, VarIntCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import GlobalWindow, GlobalWindows
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from af3pipe.transforms import metrics
from af3pipe.transforms.inputs.notifications import Waiting, work_name
from af3pipe.transforms.inputs.pubsub import ACK_DEADLINE_S, acknowledge, check_deadline, modify_deadline

# What becomes of a delivery: None when it came, or which of its items is durable; and how many it has.
_Event = tuple[int | None, int]


class _Delivery(NamedTuple):
    """One delivery of a message, which is told of once and whose items are each told of once."""

    subscription: str
    message_id: str
    ack_id: str

    @property
    def key(self) -> str:
        return " ".join(self)  # none of them has a space


def _delivery(waiting: Waiting) -> _Delivery:
    return _Delivery(waiting.subscription, waiting.message_id, waiting.ack_id)


class _AwaitDoFn(beam.DoFn):
    """Keyed by work: tells each delivery that waits for it when it is durable, whichever of the two comes first.

    No timer clears the state: a stream that is stopped would wait for it.
    """

    _DURABLE = ReadModifyWriteStateSpec("durable", BooleanCoder())
    _WAITING = BagStateSpec("waiting", FastPrimitivesCoder())

    def process(
        self,
        keyed: tuple[str, tuple[Any, ...]],
        durable: Any = beam.DoFn.StateParam(_DURABLE),
        waiting: Any = beam.DoFn.StateParam(_WAITING),
    ) -> Iterator[tuple[str, _Event]]:
        _, told = keyed
        if told:
            if durable.read():
                yield _done(told)
            else:
                waiting.add(told)
            return
        durable.write(True)
        yield from map(_done, waiting.read())
        waiting.clear()


def _done(told: tuple[Any, ...]) -> tuple[str, _Event]:
    delivery, item, items = told
    return delivery, (item, items)


class _AcknowledgeDoFn(beam.DoFn):
    """Keyed by delivery: leases it until all its items are done, and then acknowledges it.

    By delivery and not by message: what a message names may have changed when it is delivered again, and then is
    other work. Of a delivery each event comes once, in any order; with the last of them its state is cleared.
    """

    _IS_HERE = ReadModifyWriteStateSpec("is_here", BooleanCoder())
    _DONE = BagStateSpec("done", VarIntCoder())
    _LEASE = TimerSpec("lease", TimeDomain.REAL_TIME)

    def __init__(self, ack_deadline_s: int) -> None:
        self._ack_deadline_s = ack_deadline_s

    def start_bundle(self) -> None:
        self._finished: list[tuple[_Delivery, Any]] = []
        self._to_lease: set[_Delivery] = set()

    def process(
        self,
        keyed: tuple[str, _Event],
        timestamp: Any = beam.DoFn.TimestampParam,
        is_here: Any = beam.DoFn.StateParam(_IS_HERE),
        done: Any = beam.DoFn.StateParam(_DONE),
        lease: Any = beam.DoFn.TimerParam(_LEASE),
    ) -> None:
        key, (item, items) = keyed
        delivery = _Delivery(*key.split(" "))
        found = set(done.read())
        if item is None:
            is_here.write(True)
        else:
            done.add(item)
            found.add(item)
        if not is_here.read():
            return
        if len(found) < items:
            if item is None:
                self._lease(delivery, lease)
            return
        self._to_lease.discard(delivery)
        self._finished.append((delivery, timestamp))
        is_here.clear()
        done.clear()
        lease.clear()

    @on_timer(_LEASE)
    def on_lease(
        self,
        key: Any = beam.DoFn.KeyParam,
        is_here: Any = beam.DoFn.StateParam(_IS_HERE),
        lease: Any = beam.DoFn.TimerParam(_LEASE),
    ) -> None:
        if is_here.read():
            self._lease(_Delivery(*key.split(" ")), lease)

    def _lease(self, delivery: _Delivery, lease: Any) -> None:
        self._to_lease.add(delivery)
        lease.set(Timestamp.now() + self._ack_deadline_s / 2)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for subscription, ack_ids in _by_subscription(delivery for delivery, _ in self._finished):
            metrics.count("messages_acknowledged", acknowledge(subscription, ack_ids))
        for subscription, ack_ids in _by_subscription(self._to_lease):
            metrics.count("leases_extended", modify_deadline(subscription, ack_ids, self._ack_deadline_s))
        for delivery, timestamp in self._finished:
            yield WindowedValue((delivery.subscription, delivery.message_id), timestamp, (GlobalWindow(),))


def _by_subscription(deliveries: Iterable[_Delivery]) -> Iterable[tuple[str, list[str]]]:
    found: dict[str, list[str]] = defaultdict(list)
    for delivery in deliveries:
        found[delivery.subscription].append(delivery.ack_id)
    return found.items()


class AcknowledgeMessages(beam.PTransform):
    """Acknowledges a message once all that it asked for is durable, and leases it until then.

    Takes a dict of PCollections: `waiting`, of `Notified`, and `durable`: (recording id, content identity) of each
    recording whose rows are written, of dead letters, too. Each may come first. A message that is delivered again
    after that is acknowledged at once; so is another one about the same recording.

    Gives (subscription, message id) of each delivery that Pub/Sub was told to take for acknowledged.

    Args:
        ack_deadline_s: How long each lease is, 10 to 600 s, from when it is known here which work a message waits
            for; half of it before its end, it is extended.

    Raises:
        ValueError: No such number of seconds.
    """

    def __init__(self, *, ack_deadline_s: int = ACK_DEADLINE_S) -> None:
        super().__init__()
        self._ack_deadline_s = check_deadline(ack_deadline_s)

    def expand(self, told: Any) -> Any:
        waiting = told["waiting"] | "Waiting" >> beam.WindowInto(GlobalWindows())
        durable = told["durable"] | "Durable" >> beam.WindowInto(GlobalWindows())
        any_tuple: Any = tuple[str, Any]
        by_work = (
            waiting | "WaitsFor" >> beam.FlatMap(_waits_for).with_output_types(any_tuple),
            durable | "IsDurable" >> beam.Map(_is_durable).with_output_types(any_tuple),
        ) | "ByWork" >> beam.Flatten()
        done = by_work | "Await" >> beam.ParDo(_AwaitDoFn()).with_output_types(any_tuple)
        delivered = waiting | "Delivered" >> beam.FlatMap(_came).with_output_types(any_tuple)
        return (
            (delivered, done)
            | "ByMessage" >> beam.Flatten()
            | "Acknowledge" >> beam.ParDo(_AcknowledgeDoFn(self._ack_deadline_s)).with_output_types(tuple[str, str])
        )


def _waits_for(waiting: Waiting) -> Iterable[tuple[str, tuple[Any, ...]]]:
    if waiting.items:
        yield waiting.work, (_delivery(waiting).key, waiting.item, waiting.items)


def _is_durable(work: tuple[str, str]) -> tuple[str, tuple[Any, ...]]:
    return work_name(*work), ()


def _came(waiting: Waiting) -> Iterable[tuple[str, _Event]]:
    if not waiting.item:  # once, however many items it has
        yield _delivery(waiting).key, (None, waiting.items)
