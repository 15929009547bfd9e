"""Compares a fresh listing of inputs with the recordings of an output."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from af3pipe import storage
from af3pipe.schemas import DeadLetter, Reason, Recording
from af3pipe.tables.audit import Compared
from af3pipe.tables.latest import Latest, codes, is_in
from af3pipe.transforms.inputs.identity import check_id, has_own_id, name_recordings
from af3pipe.transforms.inputs.read import list_recordings

_LISTED_AT_ONCE = 50_000


class InputError(Exception):
    """An input cannot be listed; the message says which and why."""


_LISTED_SCHEMA = pa.schema(
    [
        ("recording_id", pa.string()),
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("mtime", pa.timestamp("us", tz="UTC")),
        ("offset_s", pa.float64()),
        ("duration_s", pa.float64()),
        ("channel", pa.string()),
        ("stream", pa.int32()),
        ("metadata", pa.string()),
    ]
)


def relist(
    view: Latest,
    inputs: Sequence[str],
    *,
    channel: str,
    stream: int | None,
    allow_prefixes: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Compared:
    """Lists inputs again and compares each recording with its newest row.

    A recording has changed if its etag differs; without etags, if its size or modification time differs.

    Args:
        view: Latest view of the output.
        inputs: Inputs as of a run.
        channel: Of the run, as are `stream`, `allow_prefixes` and `exclude`.
        stream: See `channel`.
        allow_prefixes: See `channel`.
        exclude: See `channel`.

    Raises:
        InputError: An input does not exist or cannot be read.
    """
    chosen = {"channel": channel, "stream": stream, "allow_prefixes": allow_prefixes, "exclude": exclude}
    listed = _list(inputs, chosen)
    columns = ["recording_id", "uri", "size_bytes", "etag", "mtime"]
    known = view.read("recordings", columns)
    # An id that was given to two files counts as two recordings.
    ids, known_ids = (
        pc.binary_join_element_wise(rows["recording_id"], rows["uri"], "\0") for rows in (listed, known)
    )
    at = pc.index_in(ids, value_set=known_ids.combine_chunks()).combine_chunks()
    both = listed.filter(at.is_valid())
    then = known.take(at.drop_null())
    differ = {name: pc.fill_null(pc.not_equal(both[name], then[name]), False) for name in columns[2:]}
    tagged = pc.and_(both["etag"].is_valid(), then["etag"].is_valid())
    changed = pc.if_else(tagged, differ["etag"], pc.or_(differ["size_bytes"], differ["mtime"]))
    return Compared(
        listed=len(listed),
        never=_first(listed.filter(at.is_null())),
        changed=_first(both.filter(changed)),
        gone=_first(known.filter(pa.array(~is_in(known_ids, ids)))),
    )


def _first(rows: pa.Table) -> tuple[int, str]:
    return len(rows), str(rows["uri"][0].as_py()) if len(rows) else ""


def _list(inputs: Sequence[str], chosen: dict[str, Any]) -> pa.Table:
    """Lists the inputs and returns one row for each recording."""
    pieces = [_LISTED_SCHEMA.empty_table()]
    rows_of_piece: list[dict[str, Any]] = []
    for found in _listed(inputs, chosen):
        recording = found if isinstance(found, Recording) else Recording(found.recording_id, found.uri)
        rows_of_piece.append(_columns(recording))
        if len(rows_of_piece) == _LISTED_AT_ONCE:
            pieces.append(pa.Table.from_pylist(rows_of_piece, _LISTED_SCHEMA))
            rows_of_piece = []
    rows = pa.concat_tables([*pieces, pa.Table.from_pylist(rows_of_piece, _LISTED_SCHEMA)])
    same = codes(rows["recording_id"])
    repeated = np.bincount(same)[same] > 1 if len(same) else np.zeros(0, bool)
    mentions: dict[str, list[Recording]] = defaultdict(list)
    for row in rows.filter(pa.array(repeated)).to_pylist():
        mtime = row["mtime"] and row["mtime"].isoformat()
        mentions[row["recording_id"]].append(Recording(**row | {"mtime": mtime}))
    named = [found for group in mentions.values() for found in _named(group)]
    distinct = [_columns(found) for found in named]
    return pa.concat_tables([rows.filter(pa.array(~repeated)), pa.Table.from_pylist(distinct, _LISTED_SCHEMA)])


def _columns(found: Recording | DeadLetter) -> dict[str, Any]:
    columns = {name: getattr(found, name, None) for name in _LISTED_SCHEMA.names}
    return columns | {"mtime": columns["mtime"] and datetime.fromisoformat(columns["mtime"])}


def _named(mentions: list[Recording]) -> Iterator[Recording | DeadLetter]:
    """Yields the recordings that a run would make from the mentions of one id."""
    if has_own_id(mentions[0]):
        checked = list(check_id(mentions))
        yield from (found for found in checked if isinstance(found, DeadLetter))
        mentions = [found for found in checked if isinstance(found, Recording)]
    yield from name_recordings(mentions)


def _listed(inputs: Iterable[str], chosen: dict[str, Any]) -> Iterator[Recording | DeadLetter]:
    for name in inputs:
        is_audio_file = storage.name(name).rpartition(".")[2].lower() in storage.AUDIO_EXTENSIONS
        for found in list_recordings(name, **chosen):
            if isinstance(found, DeadLetter) and found.uri == name:  # the input itself, not a row of it
                is_dead_letter_of_the_run = found.reason is Reason.NOT_FOUND and is_audio_file
                if not is_dead_letter_of_the_run:
                    raise InputError(f"input {name}: {found.detail}")
            yield found
