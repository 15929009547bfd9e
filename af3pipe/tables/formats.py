"""Converts rows of older formats of the tables to the current format.

A Parquet file has its format version in its footer (`FORMAT_KEY`); a file without that has format 1:

- `metadata` is a map, and JSON text since format 2; `dead_letters/` has had the column since format 2.
- `mtime` is ISO 8601 text, and a timestamp since format 2.
- `source_key` did not exist.
- `recordings/` has rows of skipped recordings (`terminal_state` is `skipped_done`); their column `settled_state` is
  the terminal state from an earlier run. Format 2 has neither such rows nor the column.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime, timezone

import pyarrow as pa
import pyarrow.compute as pc

from af3pipe.schemas import TerminalState
from af3pipe.storage import ObjectInfo
from af3pipe.tables.layout import FORMAT, FORMAT_KEY, TABLE_SCHEMAS

MTIME = pa.timestamp("us", tz="UTC")
SETTLED_STATE = "settled_state"
_TOO_EXACT = re.compile(r"(\.\d{6})\d+")


class NotATable(Exception):
    """A file in a table's folder cannot be read as a file of that table; the message says which file and why.

    Attributes:
        info: The file.
    """

    def __init__(self, info: ObjectInfo, why: str) -> None:
        super().__init__(f"{info.uri} {why}")
        self.info = info


class NewerFormat(NotATable):
    """A file was written by a later version of af3pipe, in a format that this version cannot read."""


def check_format(info: ObjectInfo, stated: bytes | str | int | None) -> int:
    """Returns a file's format version, from the value in its footer or record.

    Args:
        info: The file.
        stated: The value; None means format 1.

    Raises:
        NewerFormat: This version of af3pipe cannot read that format.
        NotATable: The value is not a number.
    """
    try:
        found = 1 if stated is None else int(stated)
    except ValueError as error:
        raise NotATable(
            info, f"states the format {stated!r}, which is no number: another program wrote it"
        ) from error
    if found > FORMAT:
        raise NewerFormat(
            info, f"has format {found}, and this version of af3pipe reads up to {FORMAT}: install a newer af3pipe"
        )
    return found


def with_format(schema: pa.Schema) -> pa.Schema:
    """Returns the schema with the current format version in its metadata, which Parquet writes to the footer."""
    return schema.with_metadata({FORMAT_KEY: str(FORMAT).encode()})


def check_columns(table: str, columns: Sequence[str]) -> None:
    """Raises KeyError if a table has no such column in any format."""
    for name in columns:
        if name not in TABLE_SCHEMAS[table].names and not (table == "recordings" and name == SETTLED_STATE):
            raise KeyError(f"{table} has no column {name!r}; it has {', '.join(TABLE_SCHEMAS[table].names)}")


def normalised(rows: pa.Table, table: str, columns: Sequence[str] | None) -> pa.Table:
    """Converts rows of any format to the columns and types of the current one.

    Args:
        rows: Rows as they are in a file.
        table: Their table.
        columns: Columns to return, in this order. None: all of the current format, then further ones of the file.

    Returns:
        The rows; missing columns are null, and their fields nullable, whatever the table's schema says.

    Raises:
        pyarrow.ArrowException: A column cannot be converted to its type.
    """
    schema = TABLE_SCHEMAS[table]
    if columns is None:
        columns = [*schema.names, *(name for name in rows.schema.names if name not in schema.names)]
    fields, arrays = [], []
    for name in columns:
        known = schema.field(name) if name in schema.names else None
        if name not in rows.schema.names:
            kind = pa.string() if known is None else known.type
            arrays.append(pa.chunked_array([pa.nulls(len(rows), kind)], kind))
            fields.append(pa.field(name, kind))
        elif known is None:
            arrays.append(rows[name])
            fields.append(rows.schema.field(name).with_nullable(True))
        else:
            arrays.append(_as_type(rows[name], known.type))
            fields.append(known)
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _as_type(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if values.type.equals(kind):
        return values
    if pa.types.is_map(values.type) and pa.types.is_string(kind):
        return pa.chunked_array([_json_of(chunk) for chunk in values.chunks], pa.string())
    if pa.types.is_string(values.type) and pa.types.is_timestamp(kind):
        return timestamps(values)
    return values.cast(kind)


def _json_of(maps: pa.MapArray) -> pa.Array:
    """Returns each map as JSON text, like `json.dumps(..., ensure_ascii=False)`."""
    keys, values = (_quoted(texts) for texts in (maps.keys, maps.items))
    pairs = pc.binary_join_element_wise(keys, values, ": ")
    joined = pc.binary_join(pa.ListArray.from_arrays(maps.offsets, pairs), ", ")
    texts = pc.binary_join_element_wise("{", joined, "}", "")
    return pc.if_else(maps.is_valid(), texts, pa.scalar(None, pa.string()))


def _quoted(texts: pa.Array) -> pa.Array:
    """Returns each text as a JSON string; encodes each distinct text only once."""
    encoded = pa.array(texts, pa.string()).dictionary_encode()
    quoted = pa.array([json.dumps(text, ensure_ascii=False) for text in encoded.dictionary.to_pylist()], pa.string())
    return pc.fill_null(quoted.take(encoded.indices), "null")


def timestamps(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Parses ISO 8601 texts to timestamps (microseconds, UTC); null where a text is not a time."""
    try:
        return texts.cast(MTIME)
    except pa.ArrowInvalid:
        return pa.chunked_array([pa.array(map(_time_of, texts.to_pylist()), MTIME)], MTIME)


def _time_of(text: str | None) -> datetime | None:
    try:
        found = datetime.fromisoformat(_TOO_EXACT.sub(r"\1", (text or "").replace("Z", "+00:00")))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def states(rows: pa.Table) -> pa.ChunkedArray:
    """Returns each recording's terminal state; for a skipped recording, the state from an earlier run.

    Args:
        rows: Rows of `recordings/`, with `terminal_state` and, for rows of format 1, `settled_state`.
    """
    ended = rows["terminal_state"]
    if SETTLED_STATE not in rows.schema.names:
        return ended
    skipped = pc.equal(ended, TerminalState.SKIPPED_DONE.value)
    return pc.if_else(pc.and_(skipped, rows[SETTLED_STATE].is_valid()), rows[SETTLED_STATE], ended)
