"""Beam transforms, one file per stage; each usable alone in a pipeline of your own.

`AudioFlamingoModelHandler` is in `af3pipe.transforms.model_handler`: Beam's RunInference imports torch where it can,
which takes seconds that a launcher need not spend.
"""

from af3pipe.transforms import coders as coders  # registers the coders of all rows
from af3pipe.transforms.ask import AnswerRecordings, AskAudioFlamingo
from af3pipe.transforms.decode import DecodeAudio
from af3pipe.transforms.inputs.acknowledge import AcknowledgeMessages
from af3pipe.transforms.inputs.notifications import Notified, ParseNotification
from af3pipe.transforms.inputs.pubsub import PullMessages, ReadNotifications
from af3pipe.transforms.inputs.read import ReadRecordings
from af3pipe.transforms.inputs.watch import WatchRecordings
from af3pipe.transforms.outcome import Outcome
from af3pipe.transforms.panes import WriteSettledRecordings
from af3pipe.transforms.reconcile import ReconcileRecordings
from af3pipe.transforms.resume import ResumeRecordings
from af3pipe.transforms.settle import (
    AnswerAndSettle,
    JoinRejected,
    PlannedRecording,
    SettledRecording,
    SettleRejected,
)
from af3pipe.transforms.verify import VerifyAnswers
from af3pipe.transforms.write import WriteAnswers, WriteDeadLetters, WriteRecordings
from af3pipe.transforms.written import NotWritten, ReadWritten

__all__ = [
    "AcknowledgeMessages",
    "AnswerAndSettle",
    "AnswerRecordings",
    "AskAudioFlamingo",
    "DecodeAudio",
    "JoinRejected",
    "NotWritten",
    "Notified",
    "Outcome",
    "ParseNotification",
    "PlannedRecording",
    "PullMessages",
    "ReadNotifications",
    "ReadRecordings",
    "ReadWritten",
    "ReconcileRecordings",
    "ResumeRecordings",
    "SettleRejected",
    "SettledRecording",
    "VerifyAnswers",
    "WatchRecordings",
    "WriteAnswers",
    "WriteDeadLetters",
    "WriteRecordings",
    "WriteSettledRecordings",
]
