"""Reads Google Pub/Sub; messages are acknowledged only after the rows of their recordings are written.

Beam's own ReadFromPubSub runs only on Dataflow, and acknowledges as soon as the runner has the message. Here,
messages are pulled at regular ticks, which work on every runner, and stay leased until the rows are written. Pub/Sub
delivers unacknowledged messages again, so a killed job loses nothing.
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
from af3pipe.transforms.inputs.dedup import REMEMBER_S, Deduplicate
from af3pipe.transforms.inputs.messages import Message
from af3pipe.transforms.inputs.notifications import Notified, ParseNotification
from af3pipe.transforms.outcome import Outcome

ACK_DEADLINE_S = 600
"""Longest lease that Pub/Sub allows."""
_MOST_AT_ONCE = 1000
_WAIT_S = 2.0
_EVERY_S = 1.0
_REACH_S = 5.0
_CALL_TIMEOUT_S = 10.0
_PULLS_A_TICK = 10  # then the pulled messages are emitted
_SCHEME = "pubsub://"
_SUBSCRIPTION = re.compile(r"projects/[^/]+/subscriptions/[^/]+")
_log = logging.getLogger(__name__)


@functools.cache
def subscriber() -> Any:
    """Returns the process's Pub/Sub client, which uses PUBSUB_EMULATOR_HOST and Google's default credentials."""
    try:
        from google.cloud import pubsub_v1
    except ImportError as error:
        raise ImportError("Pub/Sub needs google-cloud-pubsub: pip install 'af3pipe[pubsub]'") from error
    return pubsub_v1.SubscriberClient()


def is_subscription(name: str) -> bool:
    """Returns whether an input is a subscription, as `pubsub://projects/PROJECT/subscriptions/NAME`."""
    return name.startswith(_SCHEME)


def subscription_of(name: str) -> str:
    """Returns the subscription of an input. Raises ValueError if it is invalid."""
    return check_subscription(name.removeprefix(_SCHEME))


def reach(subscription: str) -> None:
    """Checks that a subscription exists, with a timeout of a few seconds.

    Raises:
        ValueError: It does not exist, there are no credentials, or Pub/Sub does not answer; says what to do.
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
        return  # the permission to pull does not include that to get the subscription
    except exceptions.NotFound as error:
        raise ValueError("there is no such subscription") from error
    except exceptions.GoogleAPICallError as error:
        raise ValueError(f"Pub/Sub does not answer: {error.message}") from error


def check_subscription(subscription: str) -> str:
    """Returns the name of a subscription. Raises ValueError if it is invalid."""
    if not _SUBSCRIPTION.fullmatch(subscription):
        raise ValueError(f"subscription is {subscription!r}; write projects/PROJECT/subscriptions/NAME")
    return subscription


def pull(subscription: str, max_messages: int, ack_deadline_s: int) -> list[Message]:
    """Pulls waiting messages, leased for `ack_deadline_s`; returns none if there is none for two seconds.

    Raises:
        google.api_core.exceptions.GoogleAPICallError: The subscription does not exist or may not be read.
    """
    from google.api_core import exceptions

    client = subscriber()
    try:
        response = client.pull(subscription=subscription, max_messages=max_messages, timeout=_WAIT_S, retry=None)
    except exceptions.DeadlineExceeded:  # there is none
        return []
    except (exceptions.NotFound, exceptions.PermissionDenied, exceptions.InvalidArgument):
        raise
    except exceptions.GoogleAPICallError as error:  # the next tick pulls again
        _log.warning("subscription %s cannot be pulled now: %s", subscription, error)
        return []
    found = [_message(received, subscription) for received in response.received_messages]
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
    """Acknowledges deliveries; returns how many. Deliveries with expired leases do not count: they come again."""
    return _call(subscriber().acknowledge, subscription, ack_ids)


def modify_deadline(subscription: str, ack_ids: Sequence[str], ack_deadline_s: int) -> int:
    """Leases deliveries for this long from now; returns how many. Deliveries with expired leases come again."""
    lease = functools.partial(subscriber().modify_ack_deadline, ack_deadline_seconds=ack_deadline_s)
    return _call(lease, subscription, ack_ids)


def _call(call: Any, subscription: str, ack_ids: Sequence[str]) -> int:
    from google.api_core import exceptions

    succeeded = 0
    for start in range(0, len(ack_ids), _MOST_AT_ONCE):
        some = list(ack_ids[start : start + _MOST_AT_ONCE])
        try:
            call(
                subscription=subscription, ack_ids=some, timeout=_CALL_TIMEOUT_S, retry=None
            )  # a bundle waits for it
            succeeded += len(some)
        except (exceptions.InvalidArgument, exceptions.FailedPrecondition) as error:
            if len(some) > 1:  # an expired one must not block the others
                succeeded += sum(_call(call, subscription, [one]) for one in some)
            else:
                _log.info("a lease of %s has expired; its message will be delivered again: %s", subscription, error)
        except exceptions.GoogleAPIError as error:  # they are delivered again
            _log.warning("%s: %d messages cannot be acknowledged or leased now: %s", subscription, len(some), error)
    return succeeded


class _PullDoFn(beam.DoFn):
    """Pulls the waiting messages at each tick; pulls again if a pull returned its maximum."""

    def __init__(self, subscription: str, max_messages: int, ack_deadline_s: int) -> None:
        self._subscription = subscription
        self._max_messages = max_messages
        self._ack_deadline_s = ack_deadline_s

    def process(self, tick: float) -> Iterator[Any]:
        for _ in range(_PULLS_A_TICK):
            found = pull(self._subscription, self._max_messages, self._ack_deadline_s)
            # Timestamps are times of arrival: times of publishing may be behind the watermark and be dropped as late.
            now = Timestamp.now()
            for message in found:
                yield TimestampedValue(message, now)
            if len(found) < self._max_messages:
                return


class PullMessages(beam.PTransform):
    """Pulls messages without acknowledging them; starts a pipeline and outputs an unbounded PCollection of `Message`.

    It runs on Prism, Flink and Dataflow, like `Ticks`.

    Args:
        subscription: `projects/PROJECT/subscriptions/NAME`.
        max_messages: Maximum number of messages of a pull.
        ack_deadline_s: First lease of a message, 10 to 600 s; `AcknowledgeMessages` extends it. If the job is killed,
            its messages are delivered again after this time.
        stop_uri: See `Ticks`.
        stop_after_s: See `Ticks`.
        storage_options: Options for the store of `stop_uri`.

    Raises:
        ValueError: The name is invalid, or a number is out of range.
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
    """Returns the number of seconds. Raises ValueError if Pub/Sub does not allow it."""
    if not 10 <= ack_deadline_s <= ACK_DEADLINE_S:
        raise ValueError(f"ack_deadline_s is {ack_deadline_s}; Pub/Sub takes 10 to {ACK_DEADLINE_S} seconds")
    return ack_deadline_s


class ReadNotifications(beam.PTransform):
    """Reads recordings that messages of a Pub/Sub subscription reference; starts a pipeline and outputs `Notified`.

    Its `good` and `dead_letters` are deduplicated: repeated notifications of a recording that has not changed are
    dropped. Messages are acknowledged only by `AcknowledgeMessages`, which takes its `waiting`.

    Args:
        subscription: See `PullMessages`.
        max_messages: See `PullMessages`.
        ack_deadline_s: See `PullMessages`.
        stop_uri: See `PullMessages`.
        stop_after_s: See `PullMessages`.
        allow_prefixes: See `ParseNotification`.
        channel: See `ParseNotification`.
        stream: See `ParseNotification`.
        storage_options: See `ParseNotification`.
        remember_s: See `Deduplicate`.

    Raises:
        ValueError: An argument is invalid, see `PullMessages` and `ParseNotification`.
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
        found = Outcome(notified.good, notified.dead_letters) | "Deduplicate" >> Deduplicate(self._remember_s)
        return Notified(found.good, found.dead_letters, notified.waiting)
