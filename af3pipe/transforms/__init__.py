"""Beam transforms, one file per stage; each usable alone in a pipeline of your own."""

from af3pipe.transforms import coders as coders  # registers the coders of all rows
from af3pipe.transforms.ask import AnswerRecordings, AskAudioFlamingo
from af3pipe.transforms.decode import DecodeAudio
from af3pipe.transforms.model_handler import AudioFlamingoModelHandler
from af3pipe.transforms.outcome import Outcome
from af3pipe.transforms.read import ReadRecordings
from af3pipe.transforms.reconcile import ReconcileRecordings
from af3pipe.transforms.write import WriteAnswers, WriteDeadLetters, WriteRecordings

__all__ = [
    "AnswerRecordings",
    "AskAudioFlamingo",
    "AudioFlamingoModelHandler",
    "DecodeAudio",
    "Outcome",
    "ReadRecordings",
    "ReconcileRecordings",
    "WriteAnswers",
    "WriteDeadLetters",
    "WriteRecordings",
]
