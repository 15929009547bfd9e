"""What to ask and how to read the reply: task factories, the families' own prompts, parsers, stitching."""

import functools
import hashlib
import importlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from af3pipe.audio.levels import combine
from af3pipe.models.engine import ModelError
from af3pipe.schemas import Answer, Decoding, Reason, Rejected, Stage, Task, TimedText, Turn, stitched_key

CAPTION = "caption"
TRANSCRIPT = "transcript"
ANSWER = "answer"

# family -> task -> prompt. Sources, read 2026-11:
# AudioFlamingo3 transcript: the model card of nvidia/audio-flamingo-3-hf, and its processor's
#   default_transcription_prompt. Caption: not on the card, which asks more specific questions.
# MusicFlamingo caption: the model card of nvidia/music-flamingo-2601-hf (and nvidia/music-flamingo-hf).
#   Transcript: not on the card, which lists lyrics among what the model knows but shows no prompt for them.
# nvidia/music-flamingo-hf is of the class AudioFlamingo3: give it its captions' prompt with `prompt=`.
_PROMPTS = {
    "AudioFlamingo3": {
        TRANSCRIPT: "Transcribe the input speech.",
        CAPTION: "Describe the audio in detail.",
    },
    "MusicFlamingo": {
        TRANSCRIPT: "Transcribe the lyrics of this song.",
        CAPTION: (
            "Describe this track in full detail - tell me the genre, tempo, and key, then dive into the "
            "instruments, production style, and overall mood it creates."
        ),
    },
}

# The model card of nvidia/audio-flamingo-3-hf: what its think adapter was trained to be asked with.
THINK = "\nPlease think and reason about the input audio before you respond."

DEFAULT_QUESTION_TOKENS = 256

_TABLES = {CAPTION: "captions", TRANSCRIPT: "transcripts"}
ANSWER_TABLES = (*_TABLES.values(), "answers")
"""Folders of an output with a row per answer."""
_LABELS = string.ascii_uppercase
_WRAPPING = " \"'`*.,;!\u201c\u201d\u2018\u2019"  # spaces, quotes (curly ones too), stops around a reply

Parser = Callable[[Task, str], tuple[str, str | None]]
"""Reads a reply: (task, reply) -> (text, choice or None). Says no with ValueError or `Rejected`."""


def caption(*, prompt: str | None = None, max_new_tokens: int = 512, think: bool = False) -> Task:
    """Asks for a description of the audio, greedily; rows go to `captions/`."""
    return Task(CAPTION, prompt=prompt, decoding=Decoding(max_new_tokens=max_new_tokens), think=think)


def transcript(*, prompt: str | None = None, max_new_tokens: int = 2048, think: bool = False) -> Task:
    """Asks for the words spoken (or sung), greedily; rows go to `transcripts/`.

    The framing sentence of the reply is removed, and the segments of a long recording make one answer.
    """
    return Task(
        TRANSCRIPT,
        prompt=prompt,
        decoding=Decoding(max_new_tokens=max_new_tokens),
        strip_prefix=True,
        stitch=True,
        think=think,
    )


def answer(
    question: str,
    choices: Sequence[str] = (),
    question_id: str | None = None,
    *,
    prompt: str | None = None,
    max_new_tokens: int = DEFAULT_QUESTION_TOKENS,
    decoding: Decoding | None = None,
    constrained: bool = False,
    json_schema: Mapping[str, Any] | str | None = None,
    think: bool = False,
    after: Task | None = None,
) -> Task:
    """Asks a question, greedily; rows go to `answers/`.

    Args:
        question: In words. With choices it is asked as `question (A) first (B) second`.
        choices: What the answer must name one of; empty for free text. At most 26, no two alike.
        question_id: Names the question across runs; by default 12 hex digits over question, choices and what was
            asked before.
        prompt: Asked instead of what is built from question and choices.
        max_new_tokens: Where the reply is cut; not used when `decoding` is given.
        decoding: All decoding parameters, for example to sample.
        constrained: Whether the model can say nothing but one of the choices, with its letter or without.
        json_schema: A JSON schema, or its text, that the reply must follow; not together with choices.
        think: Whether the model is asked to reason first; needs the adapter that was trained to.
        after: The task that this one follows up: the model sees what it was asked and what it replied. Ask both of
            the same recording, `after` first.

    Raises:
        ValueError: No question, choices that no reply could tell apart, or wishes that exclude each other.
    """
    choices = tuple(choices)
    if not question.strip():
        raise ValueError("answer() needs a question; it got an empty one")
    _check_choices(choices)
    decoding = decoding or Decoding(max_new_tokens=max_new_tokens)
    if constrained:
        decoding = decoding._replace(one_of=_replies_for(choices))
    if json_schema is not None and choices:
        raise ValueError("a question has either choices or a json_schema; leave one out")
    history = () if after is None else _turns_of(after)
    labelled = [f"({label}) {choice}" for label, choice in zip(_LABELS, choices, strict=False)]
    task = Task(
        ANSWER,
        prompt=" ".join([question, *labelled]) if prompt is None else prompt,
        question_id=question_id or _hash(question, choices, history),
        question=question,
        choices=choices,
        decoding=decoding,
        parser="choice" if choices else "text",
        history=history,
        think=think,
    )
    return _constrained(task, json_schema)


def prompt(
    name: str,
    text: str,
    *,
    max_new_tokens: int = 256,
    decoding: Decoding | None = None,
    parser: str = "text",
    strip_prefix: bool = False,
    stitch: bool = False,
    json_schema: Mapping[str, Any] | str | None = None,
    think: bool = False,
) -> Task:
    """A task of your own: the prompt is given to the model as it stands.

    Args:
        name: The `task` column; rows go to `answers/`, but for the names `caption` and `transcript`.
        text: The user turn.
        max_new_tokens: Where the reply is cut; not used when `decoding` is given.
        decoding: All decoding parameters, for example to sample.
        parser: A name from `PARSERS`, or `module:function` of a `Parser` that the workers can import.
        strip_prefix: Whether the checkpoint's framing sentence is removed.
        stitch: Whether the replies of a long recording's segments make one answer.
        json_schema: A JSON schema, or its text, that the reply must follow; the parser is then `json`, unless
            another one is named.
        think: Whether the model is asked to reason first; needs the adapter that was trained to.

    Raises:
        ValueError: An empty name or prompt, or wishes that exclude each other.
    """
    if not name.strip() or not text.strip():
        raise ValueError(f"prompt() needs a name and a text; it got {name!r} and {text!r}")
    task = Task(
        name,
        prompt=text,
        decoding=decoding or Decoding(max_new_tokens=max_new_tokens),
        parser=parser,
        strip_prefix=strip_prefix,
        stitch=stitch,
        think=think,
    )
    return _constrained(task, json_schema)


def _constrained(task: Task, json_schema: Mapping[str, Any] | str | None) -> Task:
    """The task with its schema, if there is one, once it is sure that all its constraints can hold together."""
    if json_schema is not None:
        task = task._replace(
            decoding=task.decoding._replace(json_schema=_schema_text(json_schema)),
            parser="json" if task.parser == "text" else task.parser,
        )
    if task.decoding.one_of and task.decoding.json_schema:
        raise ValueError("a reply follows either one_of or a json_schema; leave one out")
    if task.think and (task.decoding.one_of or task.decoding.json_schema):
        raise ValueError("a reply that is constrained leaves no room to think; leave out one of the two")
    return task


def _schema_text(schema: Mapping[str, Any] | str) -> str:
    """One spelling for equal schemas. The order of keys stays: it is the order in which the model writes them."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"json_schema is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"json_schema must be a JSON object, for example {{'type': 'object'}}; it is {text}")
    return text


def _replies_for(choices: tuple[str, ...]) -> tuple[str, ...]:
    """All that a constrained reply may be: each choice with its letter and without, where that names it alone."""
    if not choices:
        raise ValueError("constrained needs choices; a question without any may be answered in any words")
    forms = [
        (index, f"{lead}{choice}") for index, choice in enumerate(choices) for lead in (f"({_LABELS[index]}) ", "")
    ]
    return tuple(dict.fromkeys(form for index, form in forms if _choices_named(choices, form) == {index}))


def thinking(task: Task) -> Task:
    """The task with the words that ask for thinking in its prompt, once, if it is to think and has a prompt."""
    if not task.think or task.prompt is None or task.prompt.endswith(THINK):
        return task
    return task._replace(prompt=task.prompt + THINK)


def _turns_of(task: Task) -> tuple[Turn, ...]:
    """What a follow-up has before it."""
    if task.prompt is None:
        raise ValueError(
            f"a follow-up needs to know the prompt it follows, and that of task {task.name!r} depends on the model; "
            f"give it one, or resolve() it first"
        )
    return thinking(task).turns


def resolve(task: Task, family: str) -> Task:
    """The task as the model is asked it: its prompt filled in for this family, its parser looked up.

    Resolving a second time changes nothing.

    Raises:
        ModelError: The family has no prompt of its own for this task, or the parser cannot be imported.
    """
    load_parser(task.parser)
    if task.prompt is None:
        try:
            task = task._replace(prompt=_PROMPTS[family][task.name])
        except KeyError:
            raise ModelError(
                f"task {task.name!r} has no prompt for family {family!r}; give it one, "
                f'for example prompt({task.name!r}, "What is heard?")'
            ) from None
    return thinking(task)


def table_of(task_name: str) -> str:
    """The table folder that a task's rows go to."""
    return _TABLES.get(task_name, "answers")


def parse(task: Task, text: str) -> tuple[str, str | None]:
    """Reads a reply with the task's parser.

    Returns:
        The text to keep, and the choice it names (None for free text).

    Raises:
        Rejected: The reply is not what the task allows; the detail quotes it.
    """
    try:
        kept, choice = load_parser(task.parser)(task, text)
        if not isinstance(kept, str) or not isinstance(choice, str | None):
            raise ValueError(f"parser {task.parser!r} gave {kept!r} and {choice!r}, not text and a choice or None")
    except (TypeError, ValueError) as error:
        detail = f"task {task.name!r}: {error}; the reply was {_quote(text)}"
        raise Rejected(Stage.PARSE, Reason.OUTPUT_INVALID, detail) from error
    return kept, choice


@functools.cache
def load_parser(name: str) -> Parser:
    """A parser by its name in `PARSERS`, or by `module:function`.

    Raises:
        ModelError: There is no such parser.
    """
    if name in PARSERS:
        return PARSERS[name]
    module, separator, function = name.partition(":")
    known = f"choose from {', '.join(sorted(PARSERS))}, or name your own as module:function"
    if not separator:
        raise ModelError(f"parser {name!r} is not known; {known}")
    try:
        parser: Parser = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"parser {name!r} cannot be imported ({error}); {known}") from error
    return parser


def stitch(answers: Sequence[Answer]) -> Answer:
    """One answer out of a recording's segments' answers to one task, whatever order they come in.

    The text is joined by spaces, and `segments` tells when each piece was heard. The key is a sha256 over the
    parts' keys; one part keeps its own, because it is the same work.

    Raises:
        ValueError: No answers, or answers to different things.
    """
    if not answers:
        raise ValueError("nothing to stitch: no answers")
    asked = {(part.recording_id, part.task, part.prompt, part.question_id) for part in answers}
    if len(asked) > 1:
        raise ValueError(f"answers to different things cannot be stitched: {sorted(map(str, asked))}")
    parts = sorted(answers, key=lambda part: part.segment_index)
    first, last = parts[0], parts[-1]
    keys = [part.answer_key for part in parts]
    levels = combine([(part.end_s - part.start_s, part.levels) for part in parts])
    return last._replace(
        segment_index=0,
        start_s=first.start_s,
        text=" ".join(text for part in parts if (text := part.text.strip())),
        choice=None,
        segments=tuple(TimedText(part.start_s, part.end_s, part.text.strip()) for part in parts),
        finish_reason="length" if any(part.finish_reason == "length" for part in parts) else "stop",
        audio_tokens=sum(part.audio_tokens for part in parts),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        new_tokens=sum(part.new_tokens for part in parts),
        answer_key=stitched_key(keys),
        created_at=max(part.created_at for part in parts),
        **levels._asdict(),
    )


def _parse_text(task: Task, text: str) -> tuple[str, str | None]:
    return text.strip(), None


def _parse_json(task: Task, text: str) -> tuple[str, str | None]:
    """One JSON value, out of its code fence; kept as compact JSON, so that equal values are equal text."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    value = json.loads(fenced[1] if fenced else text)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")), None


def _parse_choice(task: Task, text: str) -> tuple[str, str | None]:
    """The one choice that the reply names, by its label or its words."""
    named = _choices_named(task.choices, text)
    if len(named) != 1:
        options = " ".join(f"({_LABELS[i]}) {choice}" for i, choice in enumerate(task.choices))
        problem = "names none" if not named else f"names {len(named)}"
        raise ValueError(f"the reply {problem} of the choices {options}")
    return text.strip(), task.choices[named.pop()]


PARSERS: dict[str, Parser] = {"text": _parse_text, "choice": _parse_choice, "json": _parse_json}

_NEGATION = re.compile(r"\b(no|not|none|neither|nor|never|without|cannot)\b|n't\b")


def _choices_named(choices: Sequence[str], reply: str) -> set[int]:
    """Indices of the choices that a reply names.

    A reply that is nothing but a label (`B`, `(B)`, `B.`) or a choice's words counts as it stands. A label and
    the whole words of a choice name that choice, even where the label is another's: small models copy the words
    of what they hear better than its letter. In a sentence, labels count in parentheses only (`A` is a word),
    and a negation makes it name nothing.
    """
    said = _normal(reply)
    labels = {label.lower(): index for index, label in enumerate(_LABELS[: len(choices)])}
    words = {_normal(choice): index for index, choice in enumerate(choices)}
    bare = re.fullmatch(r"\(?([a-z])[).:]?", said)
    whole = {index for index in (words.get(said), labels.get(bare[1]) if bare else None) if index is not None}
    if whole:
        return whole
    lead = re.match(r"\(?([a-z])[).:]\s", said)
    rest = said[lead.end() :] if lead else said
    if lead and _normal(rest) in words:
        return {words[_normal(rest)]}
    found = {labels.get(label) for label in [*(lead.groups() if lead else ()), *re.findall(r"\(([a-z])\)", rest)]}
    rest = re.sub(r"\([a-z]\)", " ", rest)
    # Longest first, each mention used up: "rising tone" is not also a mention of "tone".
    for form in sorted(words, key=len, reverse=True):
        rest, count = re.subn(rf"(?<!\w){re.escape(form)}(?!\w)", " ", rest)
        found.add(words[form] if count else None)
    return set() if _NEGATION.search(rest) else {index for index in found if index is not None}


def _normal(text: str) -> str:
    """Lower case, single spaces, without quotes and full stops around."""
    return " ".join(text.casefold().split()).strip(_WRAPPING)


def _check_choices(choices: tuple[str, ...]) -> None:
    forms = [_normal(choice) for choice in choices]
    if len(choices) == 1 or len(choices) > len(_LABELS):
        raise ValueError(f"a question needs 2 to {len(_LABELS)} choices, or none; it got {len(choices)}")
    if "" in forms or len(set(forms)) < len(forms):
        raise ValueError(f"choices must differ and not be empty; they are {choices}")


def _hash(question: str, choices: tuple[str, ...], history: tuple[Turn, ...]) -> str:
    before = [[list(turn) for turn in history]] if history else []  # without any, ids are what they always were
    return hashlib.sha256(json.dumps([question, choices, *before]).encode()).hexdigest()[:12]


def _quote(text: str, limit: int = 200) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")
