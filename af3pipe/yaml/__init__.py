"""Pipelines without code: the transforms as steps of Beam YAML, with the words of a job file.

`providers.yaml`, beside this file, lists them for a pipeline's `providers`.
"""

from af3pipe.yaml.steps import (
    AnswerRecordings,
    AskAudioFlamingo,
    DecodeAudio,
    ReadRecordings,
    ReconcileRecordings,
    WriteAnswers,
    WriteDeadLetters,
    WriteRecordings,
)

__all__ = [
    "AnswerRecordings",
    "AskAudioFlamingo",
    "DecodeAudio",
    "ReadRecordings",
    "ReconcileRecordings",
    "WriteAnswers",
    "WriteDeadLetters",
    "WriteRecordings",
]
