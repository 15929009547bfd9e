"""Pipelines without code: the transforms as steps of Beam YAML, with the words of a job file.

`providers.yaml`, beside this file, lists them for a pipeline's `providers`.
"""

from pathlib import Path

from af3pipe.yaml.steps import (
    AnswerRecordings,
    Answers,
    AskAudioFlamingo,
    DeadLetters,
    DecodeAudio,
    ReadRecordings,
    Rows,
    WriteResults,
)

PROVIDERS = str(Path(__file__).parent / "providers.yaml")
"""Where the list of steps is, for `include`."""

__all__ = [
    "PROVIDERS",
    "AnswerRecordings",
    "Answers",
    "AskAudioFlamingo",
    "DeadLetters",
    "DecodeAudio",
    "ReadRecordings",
    "Rows",
    "WriteResults",
]
