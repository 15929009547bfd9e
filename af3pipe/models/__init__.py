"""Turns audio into text: tasks, checkpoints, and the engines that run the model. Importing it never imports torch."""

from af3pipe.models.engine import (
    ENGINES,
    Engine,
    EngineFailed,
    EngineInfo,
    EngineOptions,
    EngineStats,
    ModelError,
    acquire_engine,
    open_engine,
    release_engine,
)
from af3pipe.models.family import DEFAULT_MODEL, Checkpoint, model_revision, open_checkpoint
from af3pipe.models.tasks import (
    PARSERS,
    Parser,
    answer,
    caption,
    parse,
    prompt,
    resolve,
    stitch,
    table_of,
    transcript,
)

__all__ = [
    "DEFAULT_MODEL",
    "ENGINES",
    "PARSERS",
    "Checkpoint",
    "Engine",
    "EngineFailed",
    "EngineInfo",
    "EngineOptions",
    "EngineStats",
    "ModelError",
    "Parser",
    "acquire_engine",
    "answer",
    "caption",
    "model_revision",
    "open_checkpoint",
    "open_engine",
    "parse",
    "prompt",
    "release_engine",
    "resolve",
    "stitch",
    "table_of",
    "transcript",
]
