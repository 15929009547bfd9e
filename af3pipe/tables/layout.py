"""Names the folders and files of an output: its tables, their partitions, and the runs that wrote them."""

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.schemas import ANSWER_SCHEMA, DEAD_LETTER_SCHEMA, RECORDING_SCHEMA

TABLE_SCHEMAS: dict[str, pa.Schema] = {
    **dict.fromkeys(ANSWER_TABLES, ANSWER_SCHEMA),
    "recordings": RECORDING_SCHEMA,
    "dead_letters": DEAD_LETTER_SCHEMA,
}
FORMAT = 2
"""Version of the tables' columns, in the footer of each file. Files of version 1 have none there."""
FORMAT_KEY = b"af3pipe.format"
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""What Hive, Arrow, DuckDB and Polars read as null."""
_RUN_DAY = re.compile(r"(\d{4})(\d\d)(\d\d)T\d{6}Z")
_PARTITION_NAME = re.compile(r"[\w.-]+")
_MOST_NAME_BYTES = 64
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_PANE_AT_END = re.compile(r"-\d{8}T\d{6}Z$")
_MOST_VALUE_CHARACTERS = 120
"""Of a partition's value as a folder's name; file systems take 255 bytes with the column's name."""


def new_run_id() -> str:
    """Returns a new unique run id, which sorts by time."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


def check_run_id(run_id: str) -> str:
    """Checks that a run id can be part of file names and cannot be confused with another run's; returns it.

    Raises:
        ValueError: It is empty, long, or has other characters than letters, digits, `-` and `_`.
    """
    if not _RUN_ID.fullmatch(run_id) or _PANE_AT_END.search(run_id):
        raise ValueError(
            f"run_id is {run_id!r}; it must be 1 to 100 letters, digits, '-' and '_', begin with a letter or a "
            "digit, and not end like the time of a pane (-20261121T000000Z)"
        )
    return run_id


def check_partition_by(partition_by: Sequence[str]) -> None:
    """Checks that the tables can be partitioned by these columns.

    Raises:
        ValueError: One is repeated, is a column of the tables, or has characters that a folder name cannot have.
    """
    columns = {*ANSWER_SCHEMA.names, *DEAD_LETTER_SCHEMA.names, *RECORDING_SCHEMA.names}
    for name in partition_by:
        if name in columns:
            raise ValueError(
                f"partition_by names {name!r}, which is a column of the tables: readers would confuse the two; "
                "use date, run, or a metadata column of the manifest with another name"
            )
        if not _PARTITION_NAME.fullmatch(name) or len(name.encode()) > _MOST_NAME_BYTES:
            raise ValueError(
                f"partition_by names {name!r}; letters, digits, '_', '-' and '.' only, and {_MOST_NAME_BYTES} bytes "
                "at most: rename the manifest's column"
            )
        if list(partition_by).count(name) > 1:
            raise ValueError(f"partition_by names {name!r} twice")


def partition_folder(
    partition_by: Sequence[str], run_id: str, metadata: Mapping[str, Any], *, day: str | None = None
) -> str:
    """Returns the Hive partition folders below a table: `date=2026-11-21/station=K%20Q`; empty without partitions.

    A value of more than 120 characters (quoted) is truncated and ends with `~` and a hash of the full value.

    Args:
        partition_by: `date`, the UTC day on which the run began; `run`, its id; any other is a key of `metadata`.
        run_id: The run; with `date` and no `day`, an id as `new_run_id` returns it.
        metadata: Metadata of a recording; missing keys are null.
        day: Value of `date`, if it is not the day of the run.

    Raises:
        ValueError: `date` is a partition without `day`, and the run id does not begin with a time.
    """
    known = {"run": run_id}
    if "date" in partition_by:
        known["date"] = day or _day_of(run_id)
    values = ((name, known.get(name) or _as_text(metadata.get(name))) for name in partition_by)
    return "/".join(f"{name}={_folder_name(value) if value else NO_VALUE}" for name, value in values)


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _folder_name(value: str) -> str:
    name = quote(value, safe="")
    if len(name) <= _MOST_VALUE_CHARACTERS:
        return name
    digest = hashlib.sha256(value.encode()).hexdigest()[:12]
    kept = value[:_MOST_VALUE_CHARACTERS]
    while len(quote(kept, safe="")) > _MOST_VALUE_CHARACTERS - len(digest) - 1:
        kept = kept[:-1]  # whole characters: a quoted one takes up to twelve of the name
    return f"{quote(kept, safe='')}~{digest}"


def day_of(run_id: str) -> str | None:
    """Returns the day (`2026-11-21`) with which a run id begins; None for ids that begin with no time."""
    day = _RUN_DAY.match(run_id)
    return "-".join(day.groups()) if day else None


def _day_of(run_id: str) -> str:
    day = day_of(run_id)
    if day is None:
        raise ValueError(f"partition_by date takes the day from the run's id, and {run_id!r} begins with none")
    return day
