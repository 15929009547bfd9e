"""Parses questions as users write them, by the same rules in manifest rows, job files and flags."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from af3pipe.models.tasks import answer
from af3pipe.schemas import Question, Task

QUESTION_KEYS = frozenset({"question", "choices", "id", "prompt", "then"})
"""Keys of a question that every place takes; a job file has more, which say how its reply is generated."""


def question_keys(item: Any, choices: Sequence[str] | None = None) -> dict[str, Any]:
    """Parses one question into its keys.

    Args:
        item: Text, in which choices may follow (`Who? | cat | dog`); or an object whose `question` is verbatim, with
            `choices` (a list, or text split at `|`), `id`, `prompt` (given to the model verbatim, instead of what is
            made of question and choices), and `then` (questions that follow it up). Without a `question`, the
            `prompt` is its text. Other keys are kept as they are.
        choices: Choices for a question that has none of its own; its text is then taken verbatim.

    Returns:
        `question` (str) and `choices` (tuple of str), and `id` and `prompt` (str) and `then` (list) where given.

    Raises:
        ValueError: A value has the wrong type, or there is no text.
    """
    if isinstance(item, str):
        if choices is not None:
            return {"question": _text(item, "question"), "choices": read_choices(choices)}
        text, *following = item.split("|")
        return {"question": _text(text, "question").strip(), "choices": read_choices(following)}
    if not isinstance(item, Mapping):
        raise ValueError(f"question is {item!r}; it must be a text, or an object with a question")
    keys = {name: value for name, value in item.items() if name not in QUESTION_KEYS or value not in (None, "")}
    if "prompt" in keys:
        keys["prompt"] = _text(keys["prompt"], "prompt")
    keys["question"] = _text(keys.get("question", keys.get("prompt")), "question")
    keys["choices"] = read_choices(keys.get("choices", choices or ()))
    if "id" in keys:
        keys["id"] = _word(keys["id"], "id")
    if "then" in keys:
        keys["then"] = keys["then"] if isinstance(keys["then"], list | tuple) else [keys["then"]]
    return keys


def read_choices(value: Any) -> tuple[str, ...]:
    """Parses choices: a list, or text split at `|`. Raises ValueError."""
    if isinstance(value, str):
        value = value.split("|")
    if not isinstance(value, list | tuple):
        raise ValueError(f"choices is {value!r}; it must be a list, or text split at |")
    return tuple(_word(choice, "choices") for choice in value)


def read_questions(item: Any, choices: Sequence[str] | None = None) -> Iterator[Question]:
    """Parses a question and its follow-ups; each comes after the one that it follows.

    Args:
        item: As for `question_keys`.
        choices: As for `question_keys`.

    Raises:
        ValueError: As `question_keys`; or two choices are indistinguishable in a reply.
    """
    yield from _questions(question_keys(item, choices), None)


def _questions(keys: Mapping[str, Any], before: Task | None) -> Iterator[Question]:
    text, choices, prompt = keys["question"], keys["choices"], keys.get("prompt")
    if prompt == text and not choices:
        prompt = None  # the text is given verbatim anyhow
    task = answer(text, choices, keys.get("id"), prompt=prompt, after=before)
    yield Question(task.question_id, text, choices, prompt, before.question_id if before else None)
    for following in keys.get("then", ()):
        yield from _questions(question_keys(following), task)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r}; it must be a text")
    return value


def _word(value: Any, name: str) -> str:
    """Returns a text or a number as text. Raises ValueError for a boolean, which YAML reads from a bare yes or no."""
    if isinstance(value, bool):
        raise ValueError(
            f"{name} has {value!r}, which is not a text: quote it, as YAML reads a bare yes or no as this"
        )
    if not isinstance(value, str | int | float):
        raise ValueError(f"{name} has {value!r}, which is not a text")
    return str(value).strip()
