"""Reads manifests (JSONL, CSV, Parquet) into recordings; a bad row becomes a dead letter and affects no other."""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa

from af3pipe import storage
from af3pipe.models.questions import QUESTION_KEYS, question_keys, read_choices, read_questions
from af3pipe.models.tasks import answer
from af3pipe.schemas import (
    MIX,
    DeadLetter,
    Question,
    Reason,
    Recording,
    Rejected,
    Stage,
    channel_text,
    source_key,
    stream_index,
    to_metadata,
)
from af3pipe.storage.parquet import ParquetFile
from af3pipe.transforms.inputs.access import check_named
from af3pipe.transforms.inputs.own_files import is_own_table, own_file
from af3pipe.transforms.outcome import to_dead_letter

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
MANIFEST_SUFFIXES = (*_TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in _TEXT_SUFFIXES), ".parquet")
URI_COLUMNS = ("uri", "audio_filepath", "path")
ID_COLUMNS = ("id", "recording_id")
_CONVERSATION_COLUMNS = ("conversation", "conversations")
_MOST_LINE_BYTES = 64 << 20
_ROWS_AT_ONCE = 1024
# Audio placeholders in LLaVA-style turns; the model's own template inserts the audio.
_PLACEHOLDER = re.compile(r"\s*<(?:sound|audio|speech)>\s*")


class Row(NamedTuple):
    """Is one row of an input, before it is validated.

    Attributes:
        where: Describes the row in error messages.
        uri: Identifies the row in a dead letter, if it references no audio.
        columns: Columns that say what to read and ask; an exception if the row could not be read.
        extra: Columns that are only metadata.
        audio: The audio, if the container has it or its URI is already checked.
    """

    where: str
    uri: str
    columns: Any
    extra: Mapping[str, Any] = {}
    audio: storage.ObjectInfo | None = None


def is_manifest(uri: str) -> bool:
    """Returns whether a name has the suffix of a manifest; a Parquet file may also contain audio."""
    return uri.lower().endswith(MANIFEST_SUFFIXES)


def read_manifest(
    uri: str, *, channel: str = MIX, stream: int | None = None, allow_prefixes: Sequence[str] = ()
) -> Iterator[Recording | DeadLetter]:
    """Reads a manifest lazily and yields its recordings in order; a bad row yields a dead letter.

    Columns: `uri` (or NeMo's `audio_filepath`, or `path`; relative names start from the manifest's folder), and if
    wanted `id`, `offset` and `duration` in seconds, `channel` (`mix`, `left`, `right` or an index from 0), `stream`
    (an index from 0), `question` with `choices` and `question_id`, `questions` (a list, of which
    `models.questions.question_keys` reads each), `prompt` (given to the model verbatim), `conversation` (user turns,
    each of which follows up the one before). All other columns are kept as metadata.

    Args:
        uri: A `.jsonl`, `.csv`, `.tsv` (each also with `.gz`) or `.parquet` file on any fsspec URL.
        channel: Channel of rows that have none.
        stream: Stream of rows that have none.
        allow_prefixes: URLs that rows may reference beside the manifest's own bucket or folder; see
            `access.check_named`.

    Raises:
        Rejected: The manifest cannot be read, or not to its end.
    """
    for row in manifest_rows(uri):
        yield read_row(row, uri, channel=channel, stream=stream, allow_prefixes=allow_prefixes)


def is_text(value: str) -> bool:
    """Returns whether a string can be encoded as UTF-8: names and JSON may contain half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_row(
    row: Row, source: str, *, channel: str, stream: int | None, allow_prefixes: Sequence[str] = ()
) -> Recording | DeadLetter:
    """Converts a row to a recording, or to a dead letter if it is invalid.

    Args:
        row: Row of a manifest, a shard or a data set.
        source: URI of that manifest, shard or data set.
        channel: Channel if the row has none.
        stream: Stream if the row has none.
        allow_prefixes: See `read_manifest`.
    """
    try:
        columns, extra = _checked(row.columns, row.where), _checked(row.extra, row.where)
        return _recording({"channel": channel, "stream": stream} | columns, extra, row, source, allow_prefixes)
    except Rejected as rejected:
        error = rejected
    except Exception as unexpected:  # noqa: BLE001 - a row must not stop the rows after it
        error = _bad(f"{row.where}: {type(unexpected).__name__}: {unexpected}")
    return to_dead_letter(error, Recording(source_key(row.uri), row.uri), stage=Stage.LIST)


def manifest_rows(uri: str) -> Iterator[Row]:
    """Yields the rows of a manifest. Raises Rejected like `read_manifest`."""
    name = uri.lower().removesuffix(".gz")
    read = _parquet_rows if name.endswith(".parquet") else _json_rows if name.endswith("jsonl") else _csv_rows
    read = _json_rows if name.endswith(".ndjson") else read
    try:
        with storage.open_input(uri) as file:
            if uri.lower().endswith(".gz"):
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield from read(uri, cast(BinaryIO, unpacked))
            else:
                yield from read(uri, file)
    # A damaged footer is an OSError to pyarrow.
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _bad(f"manifest {uri}: {error}") from error


def _json_rows(uri: str, file: BinaryIO) -> Iterator[Row]:
    for number in itertools.count(1):
        line = file.readline(_MOST_LINE_BYTES)
        if not line:
            return
        where, name = f"line {number} of {uri}", f"{uri}#line={number}"
        if len(line) == _MOST_LINE_BYTES and not line.endswith(b"\n"):
            raise _bad(f"{where} is longer than {_MOST_LINE_BYTES >> 20} MiB; this is no manifest, or it is damaged")
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
        if text.strip():
            yield Row(where, name, _json(text, where))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return _bad(f"{where} is not JSON: {error}")


def _csv_rows(uri: str, file: BinaryIO) -> Iterator[Row]:
    """Yields the rows of a CSV file with all columns as text: `007` and `2024-01-02` are kept verbatim."""
    tabs = uri.lower().removesuffix(".gz").endswith(".tsv")
    lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    try:
        names = next(reader, [])
    except csv.Error as error:
        raise _bad(f"manifest {uri}: line 1, which names the columns: {error}") from error
    _check_columns(uri, names)
    for number in itertools.count(1):
        first_line = reader.line_num + 1
        try:
            fields: Any = next(reader)
            while not fields:  # a blank line
                first_line = reader.line_num + 1
                fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fields = error
        last_line = reader.line_num
        line_range = f"line {first_line}" if first_line >= last_line else f"lines {first_line} to {last_line}"
        where = f"row {number} ({line_range}) of {uri}"
        columns: Any
        if isinstance(fields, csv.Error):
            columns = _bad(f"{where}: {fields}")
        elif len(fields) != len(names):
            columns = _bad(f"{where} has {len(fields)} columns, and the first line has {len(names)}")
        else:
            columns = dict(zip(names, fields, strict=True))
        yield Row(where, f"{uri}#row={number}", columns)


def _check_columns(uri: str, names: Sequence[str]) -> None:
    """Raises Rejected if there is no column of URIs, or if two columns have the same name."""
    if not set(names).intersection(URI_COLUMNS):
        raise _bad(
            f"manifest {uri} names no audio; it needs one of the columns {', '.join(URI_COLUMNS)}, and has "
            f"{', '.join(names)}"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _bad(f"manifest {uri} has a column twice: {', '.join(twice)}")


def _parquet_rows(uri: str, file: BinaryIO) -> Iterator[Row]:
    # Without a buffer size, column chunks would be read whole.
    parquet = ParquetFile(file, buffer_size=1 << 20)
    if is_own_table(parquet.schema_arrow):
        raise own_file(uri)
    columns = [field.name for field in parquet.schema_arrow if not is_binary(field.type)]
    _check_columns(uri, columns)
    number = 0
    try:
        for group in range(parquet.metadata.num_row_groups):  # a damaged one does not affect those before it
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number} of {uri}", f"{uri}#row={number}", row)
    except (pa.ArrowException, OSError) as error:
        raise _bad(f"manifest {uri} cannot be read beyond row {number}: {error}") from error


def is_binary(kind: Any) -> bool:
    """Returns whether an Arrow type is binary or contains binary data, which cannot be metadata."""
    bare = pa.types
    if bare.is_binary(kind) or bare.is_large_binary(kind) or bare.is_fixed_size_binary(kind) or "view" in str(kind):
        return not bare.is_string(kind) and str(kind) != "string_view"
    return any(is_binary(kind.field(index).type) for index in range(kind.num_fields))


def _checked(columns: Any, where: str) -> dict[str, Any]:
    if isinstance(columns, Rejected):
        raise columns
    if not isinstance(columns, Mapping):
        raise _bad(f"{where} is not an object with columns")
    if not is_text(json.dumps(columns, default=str, ensure_ascii=False)):
        raise _bad(f"{where} has text that is not valid Unicode")
    return {name: value for name, value in columns.items() if value is not None and value != ""}


def _recording(
    columns: dict[str, Any], extra: Mapping[str, Any], row: Row, source: str, allow_prefixes: Sequence[str]
) -> Recording:
    where, audio = row.where, row.audio
    if audio is None:
        named = next((columns.pop(name) for name in URI_COLUMNS if name in columns), None)
        if not isinstance(named, str):
            raise _bad(f"{where} names no audio; it needs one of the columns {', '.join(URI_COLUMNS)}")
        url = storage.resolve(named, storage.parent(source))
        check_named(url, source=source, where=where, allow_prefixes=allow_prefixes)
        audio = storage.ObjectInfo(url, None, None, None)
    offset_s = _seconds(columns.pop("offset", 0.0), "offset", where)
    duration = columns.pop("duration", None)
    duration_s = None if duration is None else _seconds(duration, "duration", where)
    try:
        channel, stream = channel_text(columns.pop("channel")), stream_index(columns.pop("stream"))
        questions, more = _questions(columns)
    except ValueError as error:
        raise _bad(f"{where}: {error}") from error
    named_id = next((str(columns.pop(name)) for name in ID_COLUMNS if name in columns), None)
    metadata = {**extra, **columns, **more}
    uri = audio.canonical or storage.canonical(audio.uri)
    return Recording(
        recording_id=named_id or source_key(uri, offset_s, duration_s, channel=channel, stream=stream),
        uri=uri,
        size_bytes=audio.size_bytes,
        etag=audio.etag,
        mtime=audio.mtime,
        offset_s=offset_s,
        duration_s=duration_s,
        questions=questions,
        metadata=to_metadata(metadata),
        channel=channel,
        stream=stream,
    )


def _seconds(value: Any, name: str, where: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = float("nan")
    if not 0 <= seconds < float("inf"):
        raise _bad(f"{where}: {name} is {value!r}; it must be seconds, 0 or more")
    return seconds


def _questions(columns: dict[str, Any]) -> tuple[tuple[Question, ...], dict[str, Any]]:
    """Removes the question columns and returns their questions, and those columns that also have other data.

    Raises:
        ValueError: A question column is invalid.
    """
    more: dict[str, Any] = {}
    choices = read_choices(columns.pop("choices")) if "choices" in columns else None
    entries = [question_keys(item, choices) for item in _as_list(columns.pop("question", []))]
    if (prompt := columns.pop("prompt", None)) is not None:
        if len(entries) != 1:
            entries.insert(0, question_keys({"prompt": prompt}, choices))
        entries[0]["prompt"] = prompt
    if len(entries) == 1 and "question_id" in columns:
        entries[0]["id"] = columns.pop("question_id")
    questions = [question for entry in entries for question in read_questions(entry)]
    if (listed := columns.pop("questions", None)) is not None:
        listed = _as_list(_unfolded(listed))
        questions += [question for item in listed for question in read_questions(item, choices)]
        if any(isinstance(item, Mapping) and not QUESTION_KEYS.issuperset(item) for item in listed):
            more["questions"] = listed  # reference answers, for example
    for name in _CONVERSATION_COLUMNS:
        if (turns := columns.pop(name, None)) is not None:
            turns = _as_list(_unfolded(turns))
            questions += _conversation(turns)
            if any(_is_reply(turn) for turn in turns):
                more[name] = turns
    by_id = {question.question_id: question for question in questions}
    if len(by_id) < len(set(questions)):
        ids = [question.question_id for question in dict.fromkeys(questions)]
        raise ValueError(
            f"one id for different questions: {', '.join(sorted({str(i) for i in ids if ids.count(i) > 1}))}"
        )
    return tuple(dict.fromkeys(questions)), more


def _conversation(turns: Iterable[Any]) -> list[Question]:
    """Converts user turns to questions, each a follow-up of the one before; the turns of the model are dropped."""
    asked: list[Question] = []
    before = None
    for turn in turns:
        if _is_reply(turn):
            continue
        text = _turn_text(turn)
        before = answer(text, after=before)
        asked.append(Question(before.question_id, text, after=asked[-1].question_id if asked else None))
    if not asked:
        raise ValueError("conversation has no turn of the user, so there is no question")
    return asked


def _role(turn: Any) -> str:
    return str(turn.get("from") or turn.get("role") or "").lower() if isinstance(turn, Mapping) else "user"


def _is_reply(turn: Any) -> bool:
    return _role(turn) in ("gpt", "assistant", "model")


def _turn_text(turn: Any) -> str:
    if _role(turn) not in ("user", "human"):
        raise ValueError(
            f"conversation has a turn of {_role(turn)!r}; allowed are turns of the user (`human`, `user`) and of the "
            "model (`gpt`, `assistant`), which are ignored"
        )
    text = (turn.get("value") or turn.get("content")) if isinstance(turn, Mapping) else turn
    if isinstance(text, list):  # Hugging Face's parts: the audio is one, too
        text = "\n".join(_a_text(part.get("text"), "text") for part in text if part.get("type") == "text")
    return _PLACEHOLDER.sub(" ", _a_text(text, "a turn of conversation")).strip()


def _a_text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r}; it must be a text")
    return value


def _unfolded(value: Any) -> Any:
    """Parses a list that is JSON text, as in a CSV file."""
    return json.loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _bad(detail: str) -> Rejected:
    return Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, detail)
