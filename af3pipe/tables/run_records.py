"""What an audit counts: the records that runs left, and the keys of their rows."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from af3pipe import storage
from af3pipe.storage import ObjectInfo
from af3pipe.tables.latest import codes, done_compactions, each, open_compactions, read_keys

Counts = dict[str, Counter[str]]
"""Rows by what the run's record calls them: `recordings` by state, `answers` by table, `dead_letters` by reason."""


class Runs:
    """What the runs left below `_runs/`: a record at their end, a marker before.

    Attributes:
        records: Of finished runs, by id.
        started: Markers, by id.
        unfinished: Ids of runs with a marker only.
        dropped: Rows that compactions have dropped, by run.
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
        """All runs that left something there."""
        return {*self.records, *self.started}

    def later(self, run_id: str) -> list[str]:
        """Finished runs after this one, over the same inputs as far as both say theirs."""
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


class KeyedRows(NamedTuple):
    """The keys of one or more tables' rows.

    Attributes:
        files: That they are in, in order.
        keys: As `read_keys` gives them; `file` counts through `files`; `category` as of `Counts`.
        encoded: Their `identity` as a dictionary array.
    """

    files: list[ObjectInfo]
    keys: pa.Table
    encoded: pa.DictionaryArray

    @classmethod
    def of(cls, files: dict[str, list[ObjectInfo]], tables: Sequence[str], category: str | None) -> "KeyedRows":
        infos: list[ObjectInfo] = []
        found = []
        for table in tables:
            keys = read_keys(files[table], table, [category] if category else [])
            names = keys[category] if category else pa.array([table] * len(keys), pa.string()).dictionary_encode()
            at = keys["file"].to_numpy() + np.int32(len(infos))
            keys = keys.select(["identity", "run_id", "created_at"]).append_column("category", names)
            found.append(keys.append_column("file", pa.array(at)))
            infos += files[table]
        keys = pa.concat_tables(found).unify_dictionaries()
        return cls(infos, keys, keys["identity"].combine_chunks().dictionary_encode())

    @property
    def identity(self) -> npt.NDArray[np.int32]:
        """Of each row a number, the same for the same row."""
        return codes(self.encoded)

    @property
    def run_ids(self) -> list[str]:
        """By the number that `runs` gives."""
        return list(self.keys["run_id"].combine_chunks().dictionary.to_pylist())

    @property
    def runs(self) -> npt.NDArray[np.int32]:
        """Of each row, the number of its run."""
        return codes(self.keys["run_id"])

    def counts(self) -> dict[str, Counter[str]]:
        """Rows by run and category, a run's copies of a row once."""
        pairs = self.identity.astype(np.int64) * (len(self.run_ids) + 1) + self.runs
        _, first = np.unique(pairs, return_index=True)
        rows = self.keys.select(["run_id", "category"])
        rows = rows.take(pa.array(first)) if len(first) < len(rows) else rows
        counted = rows.group_by(["run_id", "category"]).aggregate([([], "count_all")]).to_pylist()
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for row in counted:
            found[row["run_id"]][row["category"]] = row["count_all"]
        return found

    def shown(self, row: int) -> str:
        """A row's identity, for people."""
        return str(self.keys["identity"][row].as_py()).replace("\0", " ")

    def where(self, rows: npt.NDArray[np.int64], most: int = 3) -> str:
        """Which runs and files some rows are of."""
        numbers = dict.fromkeys(self.keys["file"].take(pa.array(rows[:most])).to_pylist())
        runs = dict.fromkeys(self.keys["run_id"].take(pa.array(rows[:most])).to_pylist())
        names = ", ".join(storage.name(self.files[number].uri) for number in numbers)
        return f"runs {', '.join(runs)}; files {names}"
