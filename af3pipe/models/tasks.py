"""Creates tasks, and parses and merges their replies: task factories, the families' prompts, parsers."""

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

# From the model card of nvidia/audio-flamingo-3-hf: the prompt that its think adapter was trained with.
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
    """Creates a task that describes the audio, with greedy decoding; rows go to `captions/`."""
    return Task(CAPTION, prompt=prompt, decoding=Decoding(max_new_tokens=max_new_tokens), think=think)


def transcript(*, prompt: str | None = None, max_new_tokens: int = 2048, think: bool = False) -> Task:
    """Creates a task that transcribes the words spoken (or sung), with greedy decoding; rows go to `transcripts/`.

    The reply's framing sentence is removed, and the replies for the segments of a long recording are merged.
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
    """Creates a task that asks a question, with greedy decoding; rows go to `answers/`.

    Args:
        question: The question in words. With choices the prompt is `question (A) first (B) second`.
        choices: Allowed answers; empty for free text. At most 26, no two alike.
        question_id: Identifies the question across runs; by default 12 hex digits over question, choices and earlier
            turns.
        prompt: Prompt to use instead of the one built from question and choices.
        max_new_tokens: Longest reply, in tokens; ignored if `decoding` is given.
        decoding: All decoding parameters, for example to sample.
        constrained: Whether decoding is constrained to the choices, with their letters or without.
        json_schema: A JSON schema, or its text, that the reply must follow; not together with choices.
        think: Whether the model is asked to reason first; needs the adapter trained for it.
        after: The task that this one follows up: the model sees its prompt and reply. Use both for the same
            recording, `after` first.

    Raises:
        ValueError: There is no question, choices are indistinguishable in a reply, or arguments exclude each other.
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
    """Creates a task of your own, whose prompt is given to the model verbatim.

    Args:
        name: The `task` column; rows go to `answers/`, except for the names `caption` and `transcript`.
        text: The prompt.
        max_new_tokens: Longest reply, in tokens; ignored if `decoding` is given.
        decoding: All decoding parameters, for example to sample.
        parser: A name from `PARSERS`, or `module:function` of a `Parser` that the workers can import.
        strip_prefix: Whether the checkpoint's framing sentence is removed.
        stitch: Whether the replies for the segments of a long recording are merged into one answer.
        json_schema: A JSON schema, or its text, that the reply must follow; the parser is then `json`, unless
            another one is given.
        think: Whether the model is asked to reason first; needs the adapter trained for it.

    Raises:
        ValueError: Name or prompt is empty, or arguments exclude each other.
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
    """Adds the schema, if there is one, to the task, and checks that all its constraints are compatible."""
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
    """Encodes equal schemas alike. The order of keys stays: it is the order in which the model writes them."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"json_schema is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"json_schema must be a JSON object, for example {{'type': 'object'}}; it is {text}")
    return text


def _replies_for(choices: tuple[str, ...]) -> tuple[str, ...]:
    """Returns all allowed replies: each choice with its letter, and without where that is unambiguous."""
    if not choices:
        raise ValueError("constrained needs choices; a question without any may be answered in any words")
    forms = [
        (index, f"{lead}{choice}") for index, choice in enumerate(choices) for lead in (f"({_LABELS[index]}) ", "")
    ]
    return tuple(dict.fromkeys(form for index, form in forms if _choices_named(choices, form) == {index}))


def thinking(task: Task) -> Task:
    """Adds the request to think to the task's prompt, once, if it is to think and has a prompt."""
    if not task.think or task.prompt is None or task.prompt.endswith(THINK):
        return task
    return task._replace(prompt=task.prompt + THINK)


def _turns_of(task: Task) -> tuple[Turn, ...]:
    """Returns the earlier turns for a follow-up to a task."""
    if task.prompt is None:
        raise ValueError(
            f"a follow-up needs to know the prompt it follows, and that of task {task.name!r} depends on the model; "
            f"give it one, or resolve() it first"
        )
    return thinking(task).turns


def resolve(task: Task, family: str) -> Task:
    """Completes a task for a model family: fills in the family's prompt, and checks its parser.

    It is idempotent.

    Raises:
        ModelError: The family has no prompt for this task, or the parser cannot be imported.
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
    """Returns the table folder for a task's rows."""
    return _TABLES.get(task_name, "answers")


def parse(task: Task, text: str) -> tuple[str, str | None]:
    """Parses a reply with the task's parser.

    Returns:
        The text to keep, and the choice that it selects (None for free text).

    Raises:
        Rejected: The task does not allow this reply; the detail quotes it.
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
    """Returns a parser by its name in `PARSERS`, or by `module:function`.

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
    """Merges the answers for a recording's segments to one task, in any order, into one answer.

    The texts are joined by spaces, and `segments` has the time range of each. The key is a sha256 over the parts'
    keys; a single part keeps its own, because it is the same work.

    Raises:
        ValueError: There are no answers, or they belong to different tasks.
    """
    if not answers:
        raise ValueError("nothing to stitch: no answers")
    asked = {(part.recording_id, part.task, part.prompt, part.question_id) for part in answers}
    if len(asked) > 1:
        raise ValueError(f"answers to different tasks or recordings cannot be merged: {sorted(map(str, asked))}")
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
    """Parses one JSON value, inside a code fence or not, to compact JSON, so that equal values are equal text."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    value = json.loads(fenced[1] if fenced else text)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")), None


def _parse_choice(task: Task, text: str) -> tuple[str, str | None]:
    """Returns the one choice that the reply selects, by its label or its words."""
    named = _choices_named(task.choices, text)
    if len(named) != 1:
        options = " ".join(f"({_LABELS[i]}) {choice}" for i, choice in enumerate(task.choices))
        problem = "names none" if not named else f"names {len(named)}"
        raise ValueError(f"the reply {problem} of the choices {options}")
    return text.strip(), task.choices[named.pop()]


PARSERS: dict[str, Parser] = {"text": _parse_text, "choice": _parse_choice, "json": _parse_json}

_NEGATION = re.compile(r"\b(no|not|none|neither|nor|never|without|cannot)\b|n't\b")


def _choices_named(choices: Sequence[str], reply: str) -> set[int]:
    """Returns the indices of the choices that a reply selects.

    A reply that is only a label (`B`, `(B)`, `B.`) or a choice's words selects that choice. A label with all words of
    a choice selects the choice of the words, even if the label is another's: small models copy the words of a choice
    more reliably than its letter. In a sentence, labels count in parentheses only (`A` is a word), and a negation
    selects nothing.
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
    """Normalises text: lower case, single spaces, without quotes and full stops around."""
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
