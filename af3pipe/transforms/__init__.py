"""Provides the Beam transforms, one file per stage; each can be used alone in a custom pipeline.

    results = p | ReadRecordings("s3://archive/**/*.flac") | AnswerRecordings(tasks=[caption(), transcript()])
    results | WriteResults("s3://labels")

`AudioFlamingoModelHandler` is in `af3pipe.transforms.model_handler`, because Beam's RunInference imports torch if it
is installed, which takes seconds that a launcher need not spend.
"""

from af3pipe.transforms import coders as coders  # registers the coders of all rows
from af3pipe.transforms.answer import AnswerRecordings
from af3pipe.transforms.ask import AskAudioFlamingo
from af3pipe.transforms.decode import DecodeAudio
from af3pipe.transforms.inputs.acknowledge import AcknowledgeMessages
from af3pipe.transforms.inputs.notifications import Notified, ParseNotification
from af3pipe.transforms.inputs.pubsub import PullMessages, ReadNotifications
from af3pipe.transforms.inputs.read import ReadRecordings
from af3pipe.transforms.inputs.watch import WatchRecordings
from af3pipe.transforms.outcome import Outcome
from af3pipe.transforms.verify import VerifyAnswers
from af3pipe.transforms.write import Answers, DeadLetters, Rows, WriteResults

__all__ = [
    "AcknowledgeMessages",
    "AnswerRecordings",
    "Answers",
    "AskAudioFlamingo",
    "DeadLetters",
    "DecodeAudio",
    "Notified",
    "Outcome",
    "ParseNotification",
    "PullMessages",
    "ReadNotifications",
    "ReadRecordings",
    "Rows",
    "VerifyAnswers",
    "WatchRecordings",
    "WriteResults",
]
