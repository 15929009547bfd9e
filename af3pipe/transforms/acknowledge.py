"""Messages of Pub/Sub acknowledged once all that they asked for is durable, and leased until then."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import BooleanCoder, FastPrimitivesCoder, StrUtf8Coder, VarIntCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import GlobalWindow, GlobalWindows
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from af3pipe.transforms import metrics
from af3pipe.transforms.notify import Waiting, work_name
from af3pipe.transforms.pubsub import ACK_DEADLINE_S, acknowledge, check_deadline, modify_deadline

# (item, items, ack_id) of a message: item is None where it was delivered, ack_id is empty where an item is done.
_Event = tuple[int | None, int, str]


class _Finished(NamedTuple):
    ack_id: str
    message: str
    timestamp: Any


class _AwaitDoFn(beam.DoFn):
    """Keyed by work: tells each message that waits for it when it is durable, whichever of the two comes first.

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
        for each in dict.fromkeys(waiting.read()):
            yield _done(each)
        waiting.clear()


def _done(told: tuple[Any, ...]) -> tuple[str, _Event]:
    message, item, items = told
    return message, (item, items, "")


class _AcknowledgeDoFn(beam.DoFn):
    """Keyed by message: leases its latest delivery until all its items are done, and then acknowledges that."""

    _ACK_ID = ReadModifyWriteStateSpec("ack_id", StrUtf8Coder())
    _DONE = BagStateSpec("done", VarIntCoder())
    _LEASE = TimerSpec("lease", TimeDomain.REAL_TIME)

    def __init__(self, ack_deadline_s: int) -> None:
        self._ack_deadline_s = ack_deadline_s

    def start_bundle(self) -> None:
        self._to_acknowledge: dict[str, list[_Finished]] = defaultdict(list)
        self._to_lease: dict[str, str] = {}

    def process(
        self,
        keyed: tuple[str, _Event],
        timestamp: Any = beam.DoFn.TimestampParam,
        ack_id: Any = beam.DoFn.StateParam(_ACK_ID),
        done: Any = beam.DoFn.StateParam(_DONE),
        lease: Any = beam.DoFn.TimerParam(_LEASE),
    ) -> None:
        message, (item, items, delivered) = keyed
        if delivered:
            ack_id.write(delivered)
            self._lease(message, delivered, lease)
        found = set(done.read())
        if item is not None and item not in found:
            done.add(item)
            found.add(item)
        latest = ack_id.read()
        if not latest or len(found) < items:
            return
        self._to_lease.pop(message, None)
        self._to_acknowledge[_subscription_of(message)].append(_Finished(latest, message, timestamp))
        ack_id.clear()
        done.clear()
        lease.clear()

    @on_timer(_LEASE)
    def on_lease(
        self,
        message: Any = beam.DoFn.KeyParam,
        ack_id: Any = beam.DoFn.StateParam(_ACK_ID),
        lease: Any = beam.DoFn.TimerParam(_LEASE),
    ) -> None:
        if latest := ack_id.read():
            self._lease(message, latest, lease)

    def _lease(self, message: str, delivery: str, lease: Any) -> None:
        self._to_lease[message] = delivery
        lease.set(Timestamp.now() + self._ack_deadline_s / 2)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for subscription, finished in self._to_acknowledge.items():
            metrics.count("messages_acknowledged", acknowledge(subscription, [found.ack_id for found in finished]))
            for found in finished:
                message_id = found.message.partition(" ")[2]
                yield WindowedValue((subscription, message_id), found.timestamp, (GlobalWindow(),))
        leased: dict[str, list[str]] = defaultdict(list)
        for message, delivery in self._to_lease.items():
            leased[_subscription_of(message)].append(delivery)
        for subscription, ack_ids in leased.items():
            metrics.count("leases_extended", modify_deadline(subscription, ack_ids, self._ack_deadline_s))


class AcknowledgeMessages(beam.PTransform):
    """Acknowledges a message once all that it asked for is durable, and leases it until then.

    Takes a dict of PCollections: `waiting`, of `Notified`, and `durable`: (recording id, content identity) of each
    recording whose rows are written, of dead letters, too. Each may come first. A message that is delivered again
    after that is acknowledged at once; so is another one about the same recording.

    Gives (subscription, message id) of each message that was acknowledged.

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
        delivered = waiting | "Delivered" >> beam.Map(_delivered).with_output_types(any_tuple)
        return (
            (delivered, done)
            | "ByMessage" >> beam.Flatten()
            | "Acknowledge" >> beam.ParDo(_AcknowledgeDoFn(self._ack_deadline_s)).with_output_types(tuple[str, str])
        )


def _message_key(waiting: Waiting) -> str:
    return f"{waiting.subscription} {waiting.message_id}"


def _subscription_of(message_key: str) -> str:
    return message_key.partition(" ")[0]


def _waits_for(waiting: Waiting) -> Iterable[tuple[str, tuple[Any, ...]]]:
    if waiting.items:
        yield waiting.work, (_message_key(waiting), waiting.item, waiting.items)


def _is_durable(work: tuple[str, str]) -> tuple[str, tuple[Any, ...]]:
    return work_name(*work), ()


def _delivered(waiting: Waiting) -> tuple[str, _Event]:
    return _message_key(waiting), (None, waiting.items, waiting.ack_id)
