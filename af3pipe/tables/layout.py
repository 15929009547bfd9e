"""Names the folders and files of an output: its tables, their partitions, and the runs that wrote them."""

import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from urllib.parse import quote

import pyarrow as pa

from af3pipe import storage
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.schemas import ANSWER_SCHEMA, DEAD_LETTER_SCHEMA, RECORDING_SCHEMA

TABLE_SCHEMAS: dict[str, pa.Schema] = {
    **dict.fromkeys(ANSWER_TABLES, ANSWER_SCHEMA),
    "recordings": RECORDING_SCHEMA,
    "dead_letters": DEAD_LETTER_SCHEMA,
}
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""What Hive, Arrow, DuckDB and Polars read as null."""
_RUN_DAY = re.compile(r"(\d{4})(\d\d)(\d\d)T\d{6}Z")
_PARTITION_NAME = re.compile(r"[\w.-]+")


def new_run_id() -> str:
    """Names a run: sorts by time, and two runs at once do not meet."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


def is_file_of(uri: str, run_id: str) -> bool:
    """Whether it is a Parquet file that this run has written."""
    name = storage.name(uri)
    return name.startswith(run_id) and name.endswith(".parquet")


def run_files(output: str, run_id: str) -> dict[str, list[str]]:
    """The run's Parquet files by table."""
    return {
        table: [uri for uri in storage.list_files(storage.join(output, table)) if is_file_of(uri, run_id)]
        for table in TABLE_SCHEMAS
    }


def check_partition_by(partition_by: Sequence[str]) -> None:
    """Looks whether these can be the folders of the tables.

    Raises:
        ValueError: One is named twice, like a column that the tables have, or with what a folder's name cannot hold.
    """
    columns = {*ANSWER_SCHEMA.names, *DEAD_LETTER_SCHEMA.names, *RECORDING_SCHEMA.names}
    for name in partition_by:
        if name in columns:
            raise ValueError(
                f"partition_by names {name!r}, which is a column of the tables: a reader could not tell the two "
                "apart; take date, run, or a metadata column of the manifest that is named otherwise"
            )
        if not _PARTITION_NAME.fullmatch(name):
            raise ValueError(
                f"partition_by names {name!r}; letters, digits, '_', '-' and '.' only: rename the manifest's column"
            )
        if list(partition_by).count(name) > 1:
            raise ValueError(f"partition_by names {name!r} twice")


def partition_folder(
    partition_by: Sequence[str], run_id: str, metadata: Mapping[str, str], *, day: str | None = None
) -> str:
    """The folders below a table, as Hive names them: `date=2026-11-21/station=K%20Q`; empty without partitions.

    Args:
        partition_by: `date`, the UTC day on which the run began; `run`, its id; any other is a key of `metadata`.
        run_id: As `new_run_id` makes it, where `date` is asked for.
        metadata: Of a recording; what it lacks is null.
        day: `date`, where it is not the run's.

    Raises:
        ValueError: The run's id does not begin with a time, and `date` is asked for.
    """
    known = {"run": run_id}
    if "date" in partition_by:
        known["date"] = day or _day_of(run_id)
    values = ((name, known.get(name) or metadata.get(name)) for name in partition_by)
    return "/".join(f"{name}={quote(value, safe='') if value else NO_VALUE}" for name, value in values)


def _day_of(run_id: str) -> str:
    day = _RUN_DAY.match(run_id)
    if day is None:
        raise ValueError(f"partition_by date takes the day from the run's id, and {run_id!r} begins with none")
    return "-".join(day.groups())
