"""Reads the run records of an output, and how many rows of each run compactions have dropped."""

import json
from collections import Counter, defaultdict
from typing import Any

from af3pipe import storage
from af3pipe.tables.compaction_record import done_compactions, open_compactions
from af3pipe.tables.prefetch import each

Counts = dict[str, Counter[str]]
"""Numbers of rows: of `recordings` by state, of `answers` by table, of `dead_letters` by reason."""


class Runs:
    """Reads the files in `_runs/`: each run writes a started file at its beginning and its run record at its end.

    Args:
        output: Folder of the tables.

    Attributes:
        records: Run records of finished runs, by run id.
        started: Started files, by run id.
        unfinished: Ids of runs that have only a started file.
        dropped: Number of rows that compactions have dropped, by run id.

    Raises:
        Rejected: The store cannot be read.
        NewerFormat: A later version of af3pipe compacted the output.
    """

    def __init__(self, output: str) -> None:
        uris = [uri for uri in storage.list_files(storage.join(output, "_runs")) if uri.endswith(".json")]
        read = dict(zip(uris, each(_read_json, uris), strict=True))
        self.records: dict[str, dict[str, Any]] = {}
        self.started: dict[str, dict[str, Any]] = {}
        for uri, found in read.items():
            name = storage.name(uri).removesuffix(".json")
            if name.endswith(".started"):
                self.started[name.removesuffix(".started")] = found
            elif "." not in name:
                self.records[name] = found
        self.unfinished = sorted(self.started.keys() - self.records.keys())
        self.dropped: dict[str, Counts] = defaultdict(lambda: defaultdict(Counter))
        compactions = [found for found in open_compactions(output) if found.state == "committed"]
        by_id = {found.compaction_id: found for found in [*compactions, *done_compactions(output)]}
        for compaction in by_id.values():
            for run_id, dropped in compaction.dropped.items():
                for what, counts in dropped.items():
                    self.dropped[run_id][what].update(counts)

    @property
    def known(self) -> set[str]:
        """Ids of all runs that have a record or a started file."""
        return {*self.records, *self.started}

    def later(self, run_id: str) -> list[str]:
        """Returns the ids of finished runs after this one with the same inputs; unknown inputs count as the same."""
        inputs = _inputs(self.records.get(run_id) or self.started.get(run_id) or {})
        return [
            other
            for other, record in self.records.items()
            if other > run_id and (not inputs or _inputs(record) in (None, inputs))
        ]


def _read_json(uri: str) -> dict[str, Any]:
    found = json.loads(storage.read_bytes(uri))
    return found if isinstance(found, dict) else {}


def _inputs(record: dict[str, Any]) -> Any:
    return (record.get("job") or {}).get("inputs")
