"""Rows of a manifest to recordings. A bad row is rejected with its number; the others go on."""

import json
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from af3pipe import storage
from af3pipe.models.tasks import answer
from af3pipe.schemas import (
    MIX,
    Question,
    Reason,
    Recording,
    Rejected,
    Stage,
    channel_text,
    make_recording_id,
    stream_index,
)

MANIFEST_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_URI_COLUMNS = ("uri", "audio_filepath", "path")
_ID_COLUMNS = ("id", "recording_id")


def is_manifest(uri: str) -> bool:
    """Whether a name is a manifest's, by its suffix."""
    return uri.lower().endswith(MANIFEST_SUFFIXES)


def read_manifest(uri: str, *, channel: str = MIX, stream: int | None = None) -> Iterator[Recording | Rejected]:
    """A manifest's recordings, in order; a bad row gives the `Rejected` that says what is wrong with it.

    Columns: `uri` (or NeMo's `audio_filepath`, or `path`; relative names start from the manifest's folder), and if
    wanted `id`, `offset` and `duration` in seconds, `channel` (`mix`, `left`, `right` or an index from 0), `stream`
    (an index from 0), `question` with `choices` (a list, or text split at `|`), `questions` (a list). All other
    columns ride along as metadata.

    Args:
        uri: A `.jsonl`, `.csv`, `.tsv` or `.parquet` file on any fsspec URL.
        channel: Of rows that name none.
        stream: Of rows that name none.

    Raises:
        Rejected: The manifest itself cannot be read.
    """
    chosen = {"channel": channel, "stream": stream}
    for number, row in enumerate(_rows(uri), start=1):
        where = f"row {number} of {uri}"
        try:
            yield _recording(chosen | _checked(row, where), uri, where)
        except Rejected as rejected:
            yield rejected
        except Exception as error:  # noqa: BLE001 - whatever a row holds, the rows after it are read
            yield Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, f"{where}: {type(error).__name__}: {error}")


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: names and JSON may hold half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def manifest_row_uri(uri: str, number: int) -> str:
    """Names a manifest's row where the row itself names no audio."""
    return f"{uri}#row={number}"


def _rows(uri: str) -> Iterator[Any]:
    data = storage.read_bytes(uri)
    suffix = uri.lower().rsplit(".", 1)[-1]
    if suffix in ("jsonl", "ndjson"):
        # Not splitlines(): it would also split at U+2028, which JSON allows inside a string.
        yield from (_json(line) for line in data.decode("utf-8-sig", "surrogateescape").split("\n") if line.strip())
        return
    try:
        if suffix == "parquet":
            table = pyarrow.parquet.read_table(BytesIO(data))
        else:
            table = _read_csv(data, "\t" if suffix == "tsv" else ",")
    except (pa.ArrowException, OSError) as error:  # a damaged footer is an OSError to pyarrow
        raise Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, f"manifest {uri}: {error}") from error
    yield from table.to_pylist()


def _read_csv(data: bytes, delimiter: str) -> pa.Table:
    """All columns as text, as they are written: `007` is a name, and `2024-01-02` is what the user wants back."""
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter)
    names = pyarrow.csv.open_csv(BytesIO(data), parse_options=parse).schema.names
    as_text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return pyarrow.csv.read_csv(BytesIO(data), parse_options=parse, convert_options=as_text)


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return error


def _checked(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, ValueError):
        raise Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, f"{where} is not JSON: {row}")
    if not isinstance(row, dict):
        raise Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, f"{where} is not an object with columns")
    if not is_text(json.dumps(row, default=str, ensure_ascii=False)):
        raise Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, f"{where} holds text that is not valid Unicode")
    return {name: value for name, value in row.items() if value is not None and value != ""}


def _recording(row: Mapping[str, Any], manifest: str, where: str) -> Recording:
    left = dict(row)
    named = next((left.pop(name) for name in _URI_COLUMNS if name in left), None)
    if not isinstance(named, str):
        raise Rejected(
            Stage.LIST,
            Reason.UNSUPPORTED_FORMAT,
            f"{where} names no audio; it needs one of the columns {', '.join(_URI_COLUMNS)}",
        )
    offset_s = _seconds(left.pop("offset", 0.0), "offset", where)
    duration = left.pop("duration", None)
    duration_s = None if duration is None else _seconds(duration, "duration", where)
    try:
        channel, stream = channel_text(left.pop("channel")), stream_index(left.pop("stream"))
    except ValueError as error:
        raise Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, f"{where}: {error}") from error
    uri = storage.resolve(named, storage.parent(manifest))
    named_id = next((str(left.pop(name)) for name in _ID_COLUMNS if name in left), None)
    return Recording(
        recording_id=named_id or make_recording_id(uri, offset_s, duration_s, channel=channel, stream=stream),
        uri=uri,
        offset_s=offset_s,
        duration_s=duration_s,
        questions=tuple(_questions(left, where)),
        metadata=tuple(sorted((name, _text(value)) for name, value in left.items())),
        channel=channel,
        stream=stream,
    )


def _seconds(value: Any, name: str, where: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = float("nan")
    if not 0 <= seconds < float("inf"):
        raise Rejected(
            Stage.LIST,
            Reason.UNSUPPORTED_FORMAT,
            f"{where}: {name} is {value!r}; it must be seconds, 0 or more",
        )
    return seconds


def _questions(row: dict[str, Any], where: str) -> Iterator[Question]:
    choices = row.pop("choices", ())
    if isinstance(choices, str):
        choices = choices.split("|")
    if not isinstance(choices, list | tuple):
        detail = f"{where}: choices is {choices!r}; it must be a list, or text split at |"
        raise Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, detail)
    options = tuple(str(choice).strip() for choice in choices)
    for text in [*_as_list(row.pop("question", [])), *_as_list(row.pop("questions", []))]:
        try:
            task = answer(str(text), choices=options)
        except ValueError as error:
            raise Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, f"{where}: {error}") from error
        yield Question(task.question_id, str(text), options)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
