"""Parses Beam's options as Beam does, with errors that a command can print."""

import argparse
from collections.abc import Iterable
from typing import Any, NoReturn

from apache_beam.options.pipeline_options import PipelineOptions


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"option for Beam: {message}")


def beam_parser(classes: Iterable[type[PipelineOptions]] | None = None) -> argparse.ArgumentParser:
    """Creates a parser for the options that some classes declare, or all imported classes.

    Its `error`, which argparse calls, raises a ValueError of one sentence and does not end the program.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    for declaring in PipelineOptions.__subclasses__() if classes is None else classes:
        declaring._add_argparse_args(_FirstCounts(parser))
    return parser


def option_names(*classes: type[PipelineOptions]) -> frozenset[str]:
    """Returns the names of the options that classes declare: `flink_master`."""
    return frozenset(
        spelling.removeprefix("--") for action in beam_parser(classes)._actions for spelling in action.option_strings
    )


class _FirstCounts:
    """A parser that ignores an option which another class has declared already; Beam's classes do so."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def add_argument(self, *names: str, **settings: Any) -> None:
        if not any(name in self._parser._option_string_actions for name in names):
            self._parser.add_argument(*names, **(settings | {"required": False}))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)
