"""Provides the transforms as steps of Beam YAML, configured with the keys of a job file.

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
"""Path of the list of steps, for `include`."""

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
