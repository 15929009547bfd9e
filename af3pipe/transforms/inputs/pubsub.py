"""Google Pub/Sub as an input whose messages are acknowledged when their answers are on disk, and not before.

Beam's own ReadFromPubSub runs on Dataflow alone, and acknowledges as soon as the runner holds the message. Here
messages are pulled at the ticks of a clock, which runs wherever Beam does, and each is leased until all that it names
is durable. What is not acknowledged is delivered again, so that a job that dies loses nothing.
"""

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from datetime import timezone
from types import MappingProxyType
from typing import Any

import apache_beam as beam
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from af3pipe import storage
from af3pipe.schemas import MIX
from af3pipe.transforms.inputs.clock import Ticks
from af3pipe.transforms.inputs.dedup import REMEMBER_S, Once
from af3pipe.transforms.inputs.messages import Message
from af3pipe.transforms.inputs.notifications import Notified, ParseNotification
from af3pipe.transforms.outcome import Outcome

ACK_DEADLINE_S = 600
"""What Pub/Sub allows at most."""
_MOST_AT_ONCE = 1000
_WAIT_S = 2.0
_EVERY_S = 1.0
_REACH_S = 5.0
_TELL_S = 10.0
_PULLS_A_TICK = 10  # then what was pulled goes on
_SCHEME = "pubsub://"
_SUBSCRIPTION = re.compile(r"projects/[^/]+/subscriptions/[^/]+")
_log = logging.getLogger(__name__)


@functools.cache
def subscriber() -> Any:
    """One client a process. It finds the emulator by PUBSUB_EMULATOR_HOST, and credentials as all of Google's do."""
    try:
        from google.cloud import pubsub_v1
    except ImportError as error:
        raise ImportError("Pub/Sub needs google-cloud-pubsub: pip install 'af3pipe[pubsub]'") from error
    return pubsub_v1.SubscriberClient()


def is_subscription(name: str) -> bool:
    """Whether an input is a subscription, as `pubsub://projects/PROJECT/subscriptions/NAME`."""
    return name.startswith(_SCHEME)


def subscription_of(name: str) -> str:
    """The subscription that an input names; else raises ValueError."""
    return check_subscription(name.removeprefix(_SCHEME))


def reach(subscription: str) -> None:
    """Looks whether a subscription is there, a few seconds long.

    Raises:
        ValueError: It is not, there are no credentials, or Pub/Sub does not answer; says what to do.
    """
    try:
        client = subscriber()
        from google.api_core import exceptions
    except ImportError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # google.auth's, which is not imported for its name alone
        raise ValueError(
            f"no credentials for Google Cloud ({error}); run `gcloud auth application-default login`, or set "
            "PUBSUB_EMULATOR_HOST for an emulator"
        ) from error
    try:
        client.get_subscription(subscription=subscription, timeout=_REACH_S, retry=None)
    except exceptions.PermissionDenied:
        return  # who may pull need not be allowed to look
    except exceptions.NotFound as error:
        raise ValueError("there is no such subscription") from error
    except exceptions.GoogleAPICallError as error:
        raise ValueError(f"Pub/Sub does not answer: {error.message}") from error


def check_subscription(subscription: str) -> str:
    """The name, where it is one; else raises ValueError."""
    if not _SUBSCRIPTION.fullmatch(subscription):
        raise ValueError(f"subscription is {subscription!r}; write projects/PROJECT/subscriptions/NAME")
    return subscription


def pull(subscription: str, max_messages: int, ack_deadline_s: int) -> list[Message]:
    """Messages that wait, leased for `ack_deadline_s`; none after two seconds without one.

    Raises:
        google.api_core.exceptions.GoogleAPICallError: There is no such subscription, or it may not be read.
    """
    from google.api_core import exceptions

    client = subscriber()
    try:
        told = client.pull(subscription=subscription, max_messages=max_messages, timeout=_WAIT_S, retry=None)
    except exceptions.DeadlineExceeded:  # there is none
        return []
    except (exceptions.NotFound, exceptions.PermissionDenied, exceptions.InvalidArgument):
        raise
    except exceptions.GoogleAPICallError as error:  # the next tick pulls again
        _log.warning("subscription %s cannot be pulled now: %s", subscription, error)
        return []
    found = [_message(received, subscription) for received in told.received_messages]
    if found:
        modify_deadline(subscription, [message.ack_id for message in found], ack_deadline_s)
    return found


def _message(received: Any, subscription: str) -> Message:
    message = received.message
    return Message(
        data=bytes(message.data),
        attributes=tuple(sorted(message.attributes.items())),
        message_id=message.message_id,
        published_at=message.publish_time.astimezone(timezone.utc).isoformat(),
        subscription=subscription,
        ack_id=received.ack_id,
    )


def acknowledge(subscription: str, ack_ids: Sequence[str]) -> int:
    """Acknowledges deliveries; gives how many were. One whose lease is over counts as none: it comes again."""
    return _tell(subscriber().acknowledge, subscription, ack_ids)


def modify_deadline(subscription: str, ack_ids: Sequence[str], ack_deadline_s: int) -> int:
    """Leases deliveries for this long from now; gives how many were. One whose lease is over comes again."""
    lease = functools.partial(subscriber().modify_ack_deadline, ack_deadline_seconds=ack_deadline_s)
    return _tell(lease, subscription, ack_ids)


def _tell(call: Any, subscription: str, ack_ids: Sequence[str]) -> int:
    from google.api_core import exceptions

    told = 0
    for start in range(0, len(ack_ids), _MOST_AT_ONCE):
        some = list(ack_ids[start : start + _MOST_AT_ONCE])
        try:
            call(subscription=subscription, ack_ids=some, timeout=_TELL_S, retry=None)  # a bundle waits for it
            told += len(some)
        except (exceptions.InvalidArgument, exceptions.FailedPrecondition) as error:
            if len(some) > 1:  # one that is over must not hold up the others
                told += sum(_tell(call, subscription, [one]) for one in some)
            else:
                _log.info("a delivery of %s is over, and will come again: %s", subscription, error)
        except exceptions.GoogleAPIError as error:  # they come again, and are told of then
            _log.warning("subscription %s cannot be told of %d deliveries now: %s", subscription, len(some), error)
    return told


class _PullDoFn(beam.DoFn):
    """At each tick, all that waits; a bundle pulls once more only where there was as much as it may take."""

    def __init__(self, subscription: str, max_messages: int, ack_deadline_s: int) -> None:
        self._subscription = subscription
        self._max_messages = max_messages
        self._ack_deadline_s = ack_deadline_s

    def process(self, tick: float) -> Iterator[Any]:
        for _ in range(_PULLS_A_TICK):
            found = pull(self._subscription, self._max_messages, self._ack_deadline_s)
            # The time of arrival: that of publishing may be behind the watermark, and such elements may be dropped.
            now = Timestamp.now()
            for message in found:
                yield TimestampedValue(message, now)
            if len(found) < self._max_messages:
                return


class PullMessages(beam.PTransform):
    """Pulls messages, and acknowledges none. Starts a pipeline; gives an unbounded PCollection of `Message`.

    Runs where `Ticks` does: on Prism, Flink, Dataflow.

    Args:
        subscription: `projects/PROJECT/subscriptions/NAME`.
        max_messages: Most that are pulled at a time.
        ack_deadline_s: How long a message is leased at first, 10 to 600 s; `AcknowledgeMessages` extends it. Where a
            job dies, its messages come again when this is over.
        stop_uri: As of `Ticks`, with the next two: when it pulls no more.
        stop_after_s: After so many seconds.
        storage_options: Of the store where `stop_uri` is.

    Raises:
        ValueError: No such name or number.
    """

    def __init__(
        self,
        subscription: str,
        *,
        max_messages: int = _MOST_AT_ONCE,
        ack_deadline_s: int = ACK_DEADLINE_S,
        stop_uri: str | None = None,
        stop_after_s: float | None = None,
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        check_subscription(subscription)
        self._ticks = Ticks(_EVERY_S, stop_uri=stop_uri, stop_after_s=stop_after_s, storage_options=storage_options)
        if not 1 <= max_messages <= _MOST_AT_ONCE:
            raise ValueError(f"max_messages is {max_messages}; 1 to {_MOST_AT_ONCE} can be pulled at a time")
        self._pull = _PullDoFn(subscription, max_messages, check_deadline(ack_deadline_s))

    def expand(self, pipeline: Any) -> Any:
        return (
            pipeline
            | "Ticks" >> self._ticks
            | "Pull" >> beam.ParDo(self._pull).with_output_types(Message)
            | "Spread" >> beam.Reshuffle()
        )


def check_deadline(ack_deadline_s: int) -> int:
    """The number of seconds, where Pub/Sub takes it; else raises ValueError."""
    if not 10 <= ack_deadline_s <= ACK_DEADLINE_S:
        raise ValueError(f"ack_deadline_s is {ack_deadline_s}; Pub/Sub takes 10 to {ACK_DEADLINE_S} seconds")
    return ack_deadline_s


class ReadNotifications(beam.PTransform):
    """Recordings that messages of a Pub/Sub subscription name. Starts a pipeline; gives `Notified`.

    `good` has each recording once as long as its bytes stay the same, however often it is told of; and `dead_letters`
    so, too. Nothing is acknowledged before `AcknowledgeMessages` was given `waiting` and what became durable.

    Args:
        subscription: As of `PullMessages`, with the next four.
        max_messages: Most that are pulled at a time.
        ack_deadline_s: First lease of a message.
        stop_uri: When it pulls no more.
        stop_after_s: After so many seconds.
        allow_prefixes: As of `ParseNotification`, with the rest.
        channel: What is heard of each recording.
        stream: Index among the audio streams.
        storage_options: URL prefix to fsspec's options.
        remember_s: How long a recording that was told of is remembered.

    Raises:
        ValueError: As `PullMessages` and `ParseNotification`.
    """

    def __init__(
        self,
        subscription: str,
        *,
        allow_prefixes: Sequence[str],
        channel: str | int = MIX,
        stream: int | None = None,
        storage_options: storage.StorageOptions = MappingProxyType({}),
        max_messages: int = _MOST_AT_ONCE,
        ack_deadline_s: int = ACK_DEADLINE_S,
        stop_uri: str | None = None,
        stop_after_s: float | None = None,
        remember_s: float = REMEMBER_S,
    ) -> None:
        super().__init__()
        self._pull = PullMessages(
            subscription,
            max_messages=max_messages,
            ack_deadline_s=ack_deadline_s,
            stop_uri=stop_uri,
            stop_after_s=stop_after_s,
            storage_options=storage_options,
        )
        self._parse = ParseNotification(
            allow_prefixes=allow_prefixes, channel=channel, stream=stream, storage_options=storage_options
        )
        self._remember_s = remember_s

    def expand(self, pipeline: Any) -> Any:
        notified = self._parse.notified(pipeline | "PullMessages" >> self._pull)
        once = Outcome(notified.good, notified.dead_letters) | "Once" >> Once(self._remember_s)
        return Notified(once.good, once.dead_letters, notified.waiting)
