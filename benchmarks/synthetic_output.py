"""Writes outputs of millions of rows in seconds, with Arrow, for the benchmarks of audit, compact and export."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from af3pipe.tables.formats import with_format
from af3pipe.tables.layout import TABLE_SCHEMAS

_WORDS = [
    "quiet",
    "street",
    "birds",
    "passing",
    "car",
    "two",
    "people",
    "talk",
    "about",
    "weather",
    "near",
    "fountain",
]
_MOMENT = 1_767_323_045_000_000
_TEXTS = 5000


def write_output(
    output: Path,
    recordings: int,
    *,
    copies: float = 0.01,
    reruns: int = 0,
    rows_per_file: int = 50_000,
    seed: int = 0,
) -> int:
    """Writes a run with a caption and a transcript of each recording, and its record; returns the number of rows.

    Args:
        output: Folder, which is made.
        recordings: How many.
        copies: Which share of the captions is there twice, as of two runs at once.
        reruns: Runs that answer a tenth of the recordings again, with a new prompt.
        rows_per_file: As `tables.write` has it.
        seed: Of ids, keys and texts.
    """
    random = np.random.default_rng(seed)
    ids = _hex(random, recordings, 10)
    total = 0
    for number in range(1 + reruns):
        run_id = f"202601{1 + number:02}T030405Z-{number:06x}"
        some = np.arange(recordings) if number == 0 else random.permutation(recordings)[: recordings // 10]
        keys = [_hex(random, len(some), 32) for _ in range(2)]
        mine = ids.take(pa.array(some))
        shared = {"recording_id": mine, "run_id": run_id, "created_at": _MOMENT + number * 86_400_000_000}
        for table, task, key in (("captions", "caption", keys[0]), ("transcripts", "transcript", keys[1])):
            values = shared | {
                "answer_key": key,
                "task": task,
                "text": _texts(random, len(some)),
                "prompt": "Describe.",
            }
            total += _write(output, table, run_id, values, rows_per_file)
        named = pa.ListArray.from_arrays(
            pa.array(np.arange(len(some) + 1, dtype=np.int32) * 2),
            pa.concat_arrays(keys).take(pa.array(np.arange(2 * len(some)).reshape(2, -1).T.ravel())),
        )
        row = shared | {"terminal_state": "ok", "answers": 2, "answer_keys": named, "work_key": keys[0]}
        total += _write(output, "recordings", run_id, row, rows_per_file)
        counts = {"captions": len(some), "transcripts": len(some)}
        if number == 0 and copies:
            first = pa.array(np.arange(int(recordings * copies)))
            values = {"recording_id": ids.take(first), "run_id": run_id, "created_at": _MOMENT + 1, "task": "caption"}
            values |= {"answer_key": keys[0].take(first), "text": "the same once more", "prompt": "Describe."}
            total += _write(output, "captions", run_id, values, rows_per_file, first_file=1 << 40)
        record = {"run_id": run_id, "recordings_found": len(some), "recordings": {"ok": len(some)}, "answers": counts}
        path = output / "_runs" / f"{run_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record | {"dead_letters": {}, "job": {"inputs": ["s3://archive/"]}}))
    return total


def _write(
    output: Path, table: str, run_id: str, values: dict[str, Any], rows_per_file: int, first_file: int = 0
) -> int:
    ids = values["recording_id"]
    uris = pc.binary_join_element_wise("s3://archive/2026/", ids, ".flac", "")
    values = {"uri": uris, "metadata": '{"station": "K Q"}', "mtime": _MOMENT, "channel": "mix"} | values
    schema = with_format(TABLE_SCHEMAS[table])
    columns = [_column(values.get(field.name), field, len(ids)) for field in schema]
    rows = pa.Table.from_arrays(columns, schema=schema)
    folder = output / table
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(rows), rows_per_file)):
        piece = rows.slice(start, rows_per_file)
        pq.write_table(piece, folder / f"{run_id}-{first_file + number:016x}.parquet", compression="zstd")
    return len(rows)


def _column(value: Any, field: pa.Field, count: int) -> pa.Array:
    if isinstance(value, pa.Array):
        return value
    if value is None and not field.nullable:
        value = "" if pa.types.is_string(field.type) else 0
    scalar = pa.scalar(value, pa.int64()).cast(field.type) if isinstance(value, int) else pa.scalar(value, field.type)
    return pa.repeat(scalar, count)


def _hex(random: np.random.Generator, count: int, size: int) -> pa.Array:
    """Texts of 2 * `size` hex digits."""
    digits = random.bytes(count * size).hex().encode()
    offsets = np.arange(count + 1, dtype=np.int32) * (2 * size)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(digits))


def _texts(random: np.random.Generator, count: int) -> pa.Array:
    some = pa.array([" ".join(random.choice(_WORDS, 30)) for _ in range(_TEXTS)])
    return some.take(pa.array(random.integers(0, _TEXTS, count)))
