"""Chooses the next tokens of many prompts at once, as unmodified `generate` would for each prompt alone."""

import functools
import json
from array import array
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import llguidance
import llguidance.hf
import numpy as np
import torch
import transformers

from af3pipe.models.engine import ModelError
from af3pipe.schemas import Decoding, Reason, Rejected, Stage

hf: Any = transformers  # typed in parts only: strict mypy refuses to call the rest

# As `json.dumps` writes: where any whitespace is allowed, a greedy model may go on with it for ever.
_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_CACHED = 64  # compiled constraints and sets of stop strings that are kept
_NO_TOKEN = 2**62  # outside every vocabulary: matches no stop string


class _Sampling(NamedTuple):
    """The parameters that rows must share to be processed by the same logits warpers."""

    temperature: float
    top_k: int
    top_p: float


class Choice:
    """The reply to one prompt while it is decoded; created by `Chooser.begin`.

    Attributes:
        tokens: Tokens so far, the end-of-sequence token included.
        finish_reason: None while it is decoded; `stop` if the model or a stop string ended it, else `length`.
        error: Why a constraint could not be followed to the end, or None. The reply is finished then, and invalid.
    """

    __slots__ = (
        "_drawn",
        "_matcher",
        "_plain",
        "_seen",
        "_tail",
        "_uniforms",
        "decoding",
        "error",
        "finish_reason",
        "tokens",
    )

    def __init__(
        self,
        decoding: Decoding,
        seed: int,
        prompt_ids: Sequence[int],
        tail: int,
        matcher: llguidance.LLMatcher | None,
    ) -> None:
        self.decoding = decoding
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.error: Rejected | None = None
        # A penalty falls on a token once, however often it came: 15,000 placeholders of audio are one id.
        self._seen = array("q", set(prompt_ids) if decoding.repetition_penalty != 1 else ())
        self._tail = list(prompt_ids[-tail:]) if tail else []
        self._matcher = matcher
        self._uniforms = _uniforms(decoding.seed, seed)
        self._plain = not (
            decoding.do_sample or decoding.repetition_penalty != 1 or decoding.stop or matcher is not None
        )
        self._drawn: tuple[int, float] = (-1, 0.0)

    def _uniform(self) -> float:
        """The random number for the next token; the same number until that token is appended."""
        if self._drawn[0] != len(self.tokens):
            self._drawn = (len(self.tokens), self._uniforms.random())
        return self._drawn[1]

    def _follow(self) -> None:
        """Updates the repetition penalty and the constraint with the last token."""
        if self.decoding.repetition_penalty != 1:
            self._seen.append(self.tokens[-1])
        if self._matcher is not None and self.finish_reason is None:
            self._matcher.consume_token(self.tokens[-1])  # a failure shows in the next mask


class Chooser:
    """Chooses tokens as `generate` does, for prompts with different decoding parameters in one batch.

    The logits processors are Hugging Face's, each applied to all rows that share its parameters. A prompt's tokens do
    not depend on the other prompts: samples come from a counter-based generator keyed by the two seeds.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: tuple[int, ...], vocab_size: int) -> None:
        """Stores the vocabulary; compiles nothing yet.

        Args:
            tokenizer: The checkpoint's tokenizer.
            eos_token_ids: Tokens each of which ends a reply.
            vocab_size: Rows of the language model's head, which may be more than the tokenizer's tokens.
        """
        self._tokenizer = tokenizer
        self._eos = list(eos_token_ids)
        self._ends = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._stop_criteria = functools.lru_cache(_CACHED)(self._make_stop_criteria)
        self._matcher = functools.lru_cache(_CACHED)(self._make_matcher)
        self._guide = functools.lru_cache(1)(self._make_guide)

    def begin(self, decoding: Decoding, seed: int, prompt_ids: Sequence[int]) -> Choice:
        """Creates the reply to a prompt, still empty.

        Args:
            decoding: Decoding parameters.
            seed: Seed of the request.
            prompt_ids: Token ids of the prompt, with audio placeholders, as for unmodified `generate`.

        Raises:
            ModelError: Hugging Face rejects the parameters, or the constraint cannot be compiled.
        """
        if decoding.max_new_tokens < 1:
            raise ModelError(f"max_new_tokens is {decoding.max_new_tokens}; a reply needs at least one token")
        try:
            _penalty(decoding.repetition_penalty)
            _warpers(_sampling(decoding))
            tail = self._stop_criteria(decoding.stop).maximum_token_len if decoding.stop else 0
        except ValueError as error:
            raise ModelError(f"these decoding parameters cannot be used: {error}") from error
        matcher = None
        if decoding.one_of or decoding.json_schema is not None:
            if decoding.min_new_tokens:
                raise ModelError(
                    "min_new_tokens cannot be kept beside one_of or json_schema: they say how a reply ends"
                )
            matcher = self._matcher(decoding.one_of, decoding.json_schema).deep_copy()
        return Choice(decoding, seed, prompt_ids, tail, matcher)

    def next(self, logits: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
        """Chooses a token for each prompt, and marks replies that it finishes.

        Args:
            logits: Logits of the next token, shape (prompts, vocab size), any float dtype and device.
            choices: One for each row, none of them finished; the tokens are appended to them.

        Returns:
            The tokens, one for each row.
        """
        # Ties go to the first of equals in every dtype, so this needs no float32.
        tokens: list[int] = logits.argmax(-1).tolist()
        special = [
            row
            for row, (choice, token) in enumerate(zip(choices, tokens, strict=True))
            if not choice._plain or (token in self._ends and len(choice.tokens) < choice.decoding.min_new_tokens)
        ]
        if special:
            index = torch.tensor(special, device=logits.device)
            picked = self._pick(logits[index].float(), [choices[row] for row in special]).tolist()
            for row, token in zip(special, picked, strict=True):
                tokens[row] = token
        # Everything that may raise comes before the first change, so that the other prompts can be retried unchanged.
        stopped = self._stopped(choices, tokens) if special else ()
        ends = self._ends
        for choice, token in zip(choices, tokens, strict=True):
            choice.tokens.append(token)
            if token in ends:
                choice.finish_reason = "stop"
            elif len(choice.tokens) >= choice.decoding.max_new_tokens:
                choice.finish_reason = "length"
        for row in stopped:
            choices[row].finish_reason = "stop"
        for row in special:
            choices[row]._follow()
        return tokens

    def generate_arguments(self, decoding: Decoding, seed: int) -> dict[str, Any]:
        """Returns arguments with which unmodified `generate` chooses the same tokens, for one prompt.

        Pass them along with `inputs.generation_config`, and to one call only: the processors have state.

        Raises:
            ModelError: As `begin`.
        """
        choice = self.begin(decoding, seed, ())
        processors = hf.LogitsProcessorList()
        if choice._matcher is not None:
            processors.append(_Constrained(choice, self._allow))
        if decoding.do_sample:
            processors += [*_warpers(_sampling(decoding)), _Drawn(choice)]
        return {"logits_processor": processors, **({"tokenizer": self._tokenizer} if decoding.stop else {})}

    # -- rows with parameters of their own -------------------------------------------------------------------------

    def _pick(self, scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
        """Chooses tokens from float32 logits, which it overwrites, in the order of operations of `generate`."""
        for penalty, rows in _groups(choices, lambda choice: choice.decoding.repetition_penalty).items():
            if penalty != 1:
                ids = _padded([choices[row]._seen for row in rows]).to(scores.device)
                scores[rows] = _penalty(penalty)(ids, scores[rows])
        early = [row for row, choice in enumerate(choices) if len(choice.tokens) < choice.decoding.min_new_tokens]
        if early and self._eos:
            scores[torch.tensor(early).unsqueeze(1), torch.tensor(self._eos)] = -torch.inf
        bound = [row for row, choice in enumerate(choices) if choice._matcher is not None]
        if bound:
            scores[bound] = self._allow(scores[bound], [choices[row] for row in bound])
        for sampling, rows in _groups(choices, lambda choice: _sampling(choice.decoding)).items():
            if sampling is not None:
                scores[rows] = _warpers(sampling)(None, scores[rows])
        picked = scores.argmax(-1)
        drawn = [row for row, choice in enumerate(choices) if choice.decoding.do_sample]
        if drawn:
            picked[drawn] = _draw(scores[drawn], [choices[row]._uniform() for row in drawn])
        return picked

    def _stopped(self, choices: Sequence[Choice], tokens: Sequence[int]) -> list[int]:
        """Returns the rows whose reply ends in a stop string once their next token is appended."""
        stopped = []
        for stop, rows in _groups(choices, lambda choice: choice.decoding.stop).items():
            if stop:
                criteria = self._stop_criteria(stop)
                width = criteria.maximum_token_len
                # As `generate` does: at the end of prompt and reply together.
                ends = [(choices[row]._tail + choices[row].tokens[-width:] + [tokens[row]])[-width:] for row in rows]
                ids = torch.tensor([[_NO_TOKEN] * (width - len(end)) + end for end in ends])
                stopped += [row for row, at_end in zip(rows, criteria(ids, None).tolist(), strict=True) if at_end]
        return stopped

    def _allow(self, scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
        """Sets the logits of all tokens that a constraint forbids to -inf."""
        allowed = np.zeros((len(choices), self._vocab_size), dtype=bool)
        for row, choice in zip(allowed, choices, strict=True):
            assert choice._matcher is not None
            # After an error the library allows the end only, so that the reply ends here.
            bits = np.frombuffer(choice._matcher.compute_bitmask(), dtype=np.uint8)
            row[:] = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
            row[self._eos] = row[self._eos].any()
            if choice._matcher.is_error():
                why = _first_line(choice._matcher.get_error())
                detail = f"the constraint cannot be followed after {len(choice.tokens)} tokens: {why}"
                choice.error = Rejected(Stage.GENERATE, Reason.ENGINE_ERROR, detail)
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)

    # -- made once ---------------------------------------------------------------------------------------------------

    def _make_stop_criteria(self, stop: tuple[str, ...]) -> Any:
        """Compiles stop strings. Scans the whole vocabulary in Python: seconds for a large one."""
        if not all(stop):
            raise ValueError("a stop string is empty; give strings of at least one character")
        return hf.StopStringCriteria(self._tokenizer, list(stop))

    def _make_guide(self) -> llguidance.LLTokenizer:
        """Converts the tokenizer for the library of constrained decoding."""
        size = max(self._vocab_size, len(self._tokenizer))
        eos = self._eos[0] if self._eos else None
        return llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=size, eos_token=eos)

    def _make_matcher(self, one_of: tuple[str, ...], json_schema: str | None) -> llguidance.LLMatcher:
        """Compiles a constraint and returns its matcher at the start, to be copied for each reply.

        Raises:
            ModelError: The library rejects the constraint.
        """
        if one_of and json_schema is not None:
            raise ModelError("one_of and json_schema are two constraints on one reply; give one of them")
        try:
            if json_schema is not None:
                constraint = f"json_schema {json_schema[:200]!r}"
                grammar = llguidance.LLMatcher.grammar_from_json_schema(json_schema, defaults=_JSON_STYLE)
            else:
                constraint = f"one_of {list(one_of)!r:.200}"
                # One terminal, so that of two strings the longer one may follow on the shorter one.
                grammar = f"start: REPLY\nREPLY: {' | '.join(map(json.dumps, one_of))}"
            matcher = llguidance.LLMatcher(self._guide(), grammar, log_level=0)
        except ValueError as error:
            raise ModelError(f"{constraint} cannot be used as a constraint: {error}") from error
        if matcher.is_error():
            raise ModelError(f"{constraint} cannot be used as a constraint: {_first_line(matcher.get_error())}")
        return matcher


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Returns the text before the first stop string in it; all of it if there is none."""
    return text[: min((place for each in stop if (place := text.find(each)) >= 0), default=len(text))]


class _Constrained(hf.LogitsProcessor):
    """Applies a constraint in unmodified `generate`, to one prompt."""

    def __init__(self, choice: Choice, allow: Callable[[torch.Tensor, Sequence[Choice]], torch.Tensor]) -> None:
        self._choice = choice
        self._allow = allow
        self._began = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._began and self._choice._matcher is not None:
            self._choice.tokens.append(int(input_ids[0, -1]))
            self._choice._matcher.consume_token(self._choice.tokens[-1])
        self._began = True
        scores = self._allow(scores, [self._choice])
        if self._choice.error:
            raise self._choice.error
        return scores


class _Drawn(hf.LogitsProcessor):
    """Keeps only the sampled token, so that greedy `generate` takes it."""

    def __init__(self, choice: Choice) -> None:
        self._uniforms = choice._uniforms

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = _draw(scores, [self._uniforms.random()])
        return torch.full_like(scores, -torch.inf).index_fill(1, drawn, 0.0)


def _uniforms(seed: int, request_seed: int) -> np.random.Generator:
    """Yields uniform numbers in [0, 1), one for each step; the seed may be negative."""
    key = np.array([seed % 2**64, request_seed % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _draw(scores: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """Samples tokens by inverse CDF, shape (rows,): the first whose cumulative probability exceeds a row's number."""
    cumulative = scores.double().softmax(-1).cumsum(-1)
    below = torch.tensor(uniforms, dtype=torch.float64, device=scores.device).unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, below, right=True).squeeze(1)
    # Only scores that are no numbers lead past the end; as an index that would cost the whole device.
    return drawn.clamp(max=scores.shape[-1] - 1)


def _sampling(decoding: Decoding) -> _Sampling | None:
    """Returns the sampling parameters; None for greedy decoding."""
    return _Sampling(decoding.temperature, decoding.top_k, decoding.top_p) if decoding.do_sample else None


def _warpers(sampling: _Sampling | None) -> Any:
    """Returns the logits warpers that `generate` would create for sampling.

    Raises:
        ValueError: A value is out of its range.
    """
    warpers = hf.LogitsProcessorList()
    if sampling is None:
        return warpers
    if sampling.temperature != 1:
        warpers.append(hf.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k != 0:
        warpers.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(sampling.top_p))
    return warpers


def _penalty(penalty: float) -> Any:
    return hf.RepetitionPenaltyLogitsProcessor(float(penalty))


def _groups(choices: Sequence[Choice], key: Callable[[Choice], Hashable]) -> dict[Any, list[int]]:
    """Groups rows by the parameters that they share."""
    groups = defaultdict(list)
    for row, choice in enumerate(choices):
        groups[key(choice)].append(row)
    return groups


def _padded(ids: Sequence["array[int]"]) -> torch.Tensor:
    """Pads rows of ids to the longest one, each with an id that it contains already."""
    padded = np.empty((len(ids), max(map(len, ids))), dtype=np.int64)
    for line, row in zip(padded, ids, strict=True):
        line[: len(row)] = row
        line[len(row) :] = row[0]
    return torch.from_numpy(padded)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
