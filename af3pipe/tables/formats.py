"""Turns rows of every older format of the tables into rows of the current one.

A Parquet file states its format in its footer (`FORMAT_KEY`); one without it is of format 1:

- `metadata` is a map, and JSON text since format 2; `dead_letters/` has had the column since format 2.
- `mtime` is ISO 8601 text, and a timestamp since format 2.
- `source_key` did not exist.
- `recordings/` has rows of recordings that a run skipped (`terminal_state` is `skipped_done`); their `settled_state`
  is the state that an earlier run had given them. Format 2 has neither such rows nor the column.
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
    """A file cannot be read as one of an output: which, why, and what to do.

    Attributes:
        info: The file.
    """

    def __init__(self, info: ObjectInfo, why: str) -> None:
        super().__init__(f"{info.uri} {why}")
        self.info = info


class NewerFormat(NotATable):
    """A later version of af3pipe wrote a file."""


def check_format(info: ObjectInfo, stated: bytes | str | int | None) -> int:
    """The format that a file states.

    Args:
        info: The file.
        stated: None for a file of format 1.

    Raises:
        NewerFormat: This version cannot read it.
        NotATable: It states no number.
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
    """A schema that states the format in the footer of a file which is written with it."""
    return schema.with_metadata({FORMAT_KEY: str(FORMAT).encode()})


def check_columns(table: str, columns: Sequence[str]) -> None:
    """Raises KeyError where a table has no such column in any format."""
    for name in columns:
        if name not in TABLE_SCHEMAS[table].names and not (table == "recordings" and name == SETTLED_STATE):
            raise KeyError(f"{table} has no column {name!r}; it has {', '.join(TABLE_SCHEMAS[table].names)}")


def normalised(rows: pa.Table, table: str, columns: Sequence[str] | None) -> pa.Table:
    """Rows of any format with the columns and types of the current one.

    Args:
        rows: As a file has them.
        table: That they are of.
        columns: Which are wanted, in this order. None: all of the current format, then those that only the file has.

    Returns:
        Missing columns are null, and those fields nullable, whatever the schema says.

    Raises:
        pyarrow.ArrowException: A column holds something else than its name says.
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
    """JSON text of each map, as `json.dumps` gives it without escapes."""
    keys, values = (_quoted(texts) for texts in (maps.keys, maps.items))
    pairs = pc.binary_join_element_wise(keys, values, ": ")
    joined = pc.binary_join(pa.ListArray.from_arrays(maps.offsets, pairs), ", ")
    texts = pc.binary_join_element_wise("{", joined, "}", "")
    return pc.if_else(maps.is_valid(), texts, pa.scalar(None, pa.string()))


def _quoted(texts: pa.Array) -> pa.Array:
    """Each text as JSON: of the few different ones that there are, once."""
    encoded = pa.array(texts, pa.string()).dictionary_encode()
    quoted = pa.array([json.dumps(text, ensure_ascii=False) for text in encoded.dictionary.to_pylist()], pa.string())
    return pc.fill_null(quoted.take(encoded.indices), "null")


def timestamps(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """ISO 8601 texts as microseconds UTC; null where a text is no time."""
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
    """The state that each recording is in: `settled_state` of a row that says that a run skipped the recording.

    Args:
        rows: Of `recordings/`, with `terminal_state` and, for rows of format 1, `settled_state`.
    """
    ended = rows["terminal_state"]
    if SETTLED_STATE not in rows.schema.names:
        return ended
    skipped = pc.equal(ended, TerminalState.SKIPPED_DONE.value)
    return pc.if_else(pc.and_(skipped, rows[SETTLED_STATE].is_valid()), rows[SETTLED_STATE], ended)
