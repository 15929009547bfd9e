"""Acknowledges Pub/Sub messages after the rows of all their recordings are written; extends leases until then."""

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

# An event of a delivery: None for its arrival, or the number of an item that is durable; and its number of items.
_Event = tuple[int | None, int]


class _Delivery(NamedTuple):
    """Identifies one delivery of a message; its arrival and each of its items are reported once."""

    subscription: str
    message_id: str
    ack_id: str

    @property
    def key(self) -> str:
        return " ".join(self)  # none of them has a space


def _delivery(waiting: Waiting) -> _Delivery:
    return _Delivery(waiting.subscription, waiting.message_id, waiting.ack_id)


class _AwaitDoFn(beam.DoFn):
    """Keyed by work: emits an event to each delivery that waits for the work, once the work is durable.

    Either may arrive first. No timer clears the state, because a stopped stream would wait for the timer.
    """

    _DURABLE = ReadModifyWriteStateSpec("durable", BooleanCoder())
    _WAITING = BagStateSpec("waiting", FastPrimitivesCoder())

    def process(
        self,
        keyed: tuple[str, tuple[Any, ...]],
        durable: Any = beam.DoFn.StateParam(_DURABLE),
        waiting: Any = beam.DoFn.StateParam(_WAITING),
    ) -> Iterator[tuple[str, _Event]]:
        _, item = keyed
        if item:
            if durable.read():
                yield _done(item)
            else:
                waiting.add(item)
            return
        durable.write(True)
        yield from map(_done, waiting.read())
        waiting.clear()


def _done(waiting: tuple[Any, ...]) -> tuple[str, _Event]:
    delivery, item, items = waiting
    return delivery, (item, items)


class _AcknowledgeDoFn(beam.DoFn):
    """Keyed by delivery: extends its lease until all its items are durable, then acknowledges it.

    The key is not the message, because its recordings may have changed when it is delivered again, which makes other
    work. Each event of a delivery arrives once, in any order; after the last one the state is cleared.
    """

    _HAS_ARRIVED = ReadModifyWriteStateSpec("has_arrived", BooleanCoder())
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
        has_arrived: Any = beam.DoFn.StateParam(_HAS_ARRIVED),
        done: Any = beam.DoFn.StateParam(_DONE),
        lease: Any = beam.DoFn.TimerParam(_LEASE),
    ) -> None:
        key, (item, items) = keyed
        delivery = _Delivery(*key.split(" "))
        found = set(done.read())
        if item is None:
            has_arrived.write(True)
        else:
            done.add(item)
            found.add(item)
        if not has_arrived.read():
            return
        if len(found) < items:
            if item is None:
                self._lease(delivery, lease)
            return
        self._to_lease.discard(delivery)
        self._finished.append((delivery, timestamp))
        has_arrived.clear()
        done.clear()
        lease.clear()

    @on_timer(_LEASE)
    def on_lease(
        self,
        key: Any = beam.DoFn.KeyParam,
        has_arrived: Any = beam.DoFn.StateParam(_HAS_ARRIVED),
        lease: Any = beam.DoFn.TimerParam(_LEASE),
    ) -> None:
        if has_arrived.read():
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
    """Acknowledges a message after the rows of all its recordings are written, and extends its lease until then.

    The input is a dict of PCollections: `waiting`, from `Notified`, and `durable`, (recording id, content identity)
    of each recording whose rows are written, dead letters included. Either may arrive first. A later delivery of the
    message, or another message about the same recording, is acknowledged immediately.

    The output is (subscription, message id) of each acknowledged delivery.

    Args:
        ack_deadline_s: Length of a lease, 10 to 600 s, from when a message's work is known here; a lease is extended
            after half of its length.

    Raises:
        ValueError: The number of seconds is out of range.
    """

    def __init__(self, *, ack_deadline_s: int = ACK_DEADLINE_S) -> None:
        super().__init__()
        self._ack_deadline_s = check_deadline(ack_deadline_s)

    def expand(self, inputs: Any) -> Any:
        waiting = inputs["waiting"] | "Waiting" >> beam.WindowInto(GlobalWindows())
        durable = inputs["durable"] | "Durable" >> beam.WindowInto(GlobalWindows())
        any_tuple: Any = tuple[str, Any]
        by_work = (
            waiting | "WaitsFor" >> beam.FlatMap(_waits_for).with_output_types(any_tuple),
            durable | "IsDurable" >> beam.Map(_is_durable).with_output_types(any_tuple),
        ) | "ByWork" >> beam.Flatten()
        done = by_work | "Await" >> beam.ParDo(_AwaitDoFn()).with_output_types(any_tuple)
        delivered = waiting | "Delivered" >> beam.FlatMap(_arrived).with_output_types(any_tuple)
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


def _arrived(waiting: Waiting) -> Iterable[tuple[str, _Event]]:
    if not waiting.item:  # one event, however many items it has
        yield _delivery(waiting).key, (None, waiting.items)
