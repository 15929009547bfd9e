"""Compares the rows of an output's tables with each other and with the records of its runs."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from af3pipe import storage
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.schemas import TerminalState
from af3pipe.tables.formats import SETTLED_STATE, states
from af3pipe.tables.keys import IDENTITY, Keys, KeySet, Mask, hashes_of, joined, named_keys, read_keys
from af3pipe.tables.reader import Files, read_rows_of
from af3pipe.tables.run_records import Counts, Runs

RUN_AGAIN = "run the job again into the same output"
_COMPACT = "`af3pipe compact` keeps the newest of each"
_SKIPPED = TerminalState.SKIPPED_DONE.value


class Problem(NamedTuple):
    """Is an inconsistency that an audit found.

    Attributes:
        kind: `missing`, `duplicate`, `orphan`, `miscounted`, `inconsistent`, `unknown_run`, `unfinished` or
            `unreadable`; compared with a listing `never_processed` or `changed`.
        number: How many rows, keys, recordings, runs or files have the problem.
        what: The problem in a sentence.
        example: One of them.
        advice: How to fix it.
    """

    kind: str
    number: int
    what: str
    example: str
    advice: str


class RunAudit(NamedTuple):
    """Counts the rows that one run wrote, without copies.

    Attributes:
        run_id: The run.
        finished: Whether it has a run record.
        recordings: Rows by state. `skipped_done` is from the run record, as skipped recordings have no rows.
        answers: Rows by table.
        dead_letters: Rows by reason.
    """

    run_id: str
    finished: bool
    recordings: dict[str, int]
    answers: dict[str, int]
    dead_letters: dict[str, int]


class _Rows:
    """Reads the keys of the rows of one or more tables.

    Attributes:
        tables: The tables.
        files: Files of these tables, in order.
        keys: Keys of their rows, in the same order.
        set: The set of all identities.
        codes: For each row, the index of its identity in `set`.
    """

    def __init__(self, files: Files, tables: Sequence[str], category: str | None) -> None:
        self.tables = tables
        self.files = [info for table in tables for info in files[table]]
        self._by_file = [table for table in tables for _ in files[table]]
        self.keys = _joined_keys([read_keys(files[table], table, category or "run_id") for table in tables])
        self.set = KeySet(self.keys.identity)
        self.codes = self.set.codes
        self._is_by_table = category is None

    def by_table(self) -> dict[str, int]:
        """Returns the number of rows of each table."""
        found = Counter(dict.fromkeys(self.tables, 0))
        for table, count in zip(self._by_file, self.keys.counts.tolist(), strict=True):
            found[table] += count
        return dict(found)

    def counts(self) -> dict[str, Counter[str]]:
        """Counts rows by run and category (or table), without copies that the same run wrote."""
        runs = self.keys.runs
        _, first = np.unique(self.codes.astype(np.int64) * (len(runs.texts) + 1) + runs.codes, return_index=True)
        if self._is_by_table:
            number = {table: at for at, table in enumerate(self.tables)}
            of_file = np.array([number[table] for table in self._by_file], np.int64)
            categories, names = of_file[self.keys.files[first]], list(self.tables)
        else:
            categories, names = self.keys.categories.codes[first].astype(np.int64), self.keys.categories.texts
        pairs, numbers = np.unique(runs.codes[first] * np.int64(len(names) + 1) + categories, return_counts=True)
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for pair, count in zip(pairs.tolist(), numbers.tolist(), strict=True):
            run, category = divmod(pair, len(names) + 1)
            found[runs.texts[run]][names[category]] = count
        return found

    def copies(self, repeated: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the rows, of some with an identity that another row has too, that also have its metadata.

        A recording whose metadata changes gets its answers again, with the new metadata: these are no copies.
        """
        mask = np.zeros(len(self.keys), bool)
        mask[repeated] = True
        hashes, first = [np.zeros((0, 2), np.uint64)], 0
        for table in self.tables:
            files = [info for info, of in zip(self.files, self._by_file, strict=True) if of == table]
            for _, _, rows in read_rows_of(files, table, ["metadata"]):
                hashes.append(hashes_of(rows["metadata"].filter(pa.array(mask[first : first + len(rows)]))))
                first += len(rows)
        pairs = np.column_stack([self.codes[repeated].astype(np.uint64), np.concatenate(hashes)])
        _, at, times = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
        return repeated[times[np.ravel(at)] > 1]

    def shown(self, row: int) -> str:
        """Returns a row's identity as readable text."""
        table = self._by_file[self._file_of(row)]
        return self.text(row, IDENTITY[table]).replace("\0", " ")

    def text(self, row: int, columns: Sequence[str]) -> str:
        """Reads columns of one row from its file and joins them to one text."""
        number = self._file_of(row)
        within = row - int(self.keys.counts[:number].sum())
        for _, first, rows in read_rows_of([self.files[number]], self._by_file[number], columns):
            if within < first + len(rows):
                return str(joined(rows.slice(within - first, 1), columns)[0].as_py())
        return ""

    def where(self, rows: npt.NDArray[np.int64], most: int = 3) -> str:
        """Names the runs and files of some rows, for messages."""
        numbers = dict.fromkeys(self._file_of(row) for row in rows[:most].tolist())
        runs = dict.fromkeys(self.keys.runs.texts[code] for code in self.keys.runs.codes[rows[:most]].tolist())
        names = ", ".join(storage.name(self.files[number].uri) for number in numbers)
        return f"runs {', '.join(runs)}; files {names}"

    def _file_of(self, row: int) -> int:
        return int(np.searchsorted(np.cumsum(self.keys.counts), row, side="right"))


def _joined_keys(keys: Sequence[Keys]) -> Keys:
    """Concatenates the keys of several tables; `categories` are those of the last table only."""
    if len(keys) == 1:
        return keys[0]
    texts = list(dict.fromkeys(text for found in keys for text in found.runs.texts))
    number = {text: at for at, text in enumerate(texts)}
    runs = [np.array([number[text] for text in found.runs.texts], np.int32)[found.runs.codes] for found in keys]
    return replace(
        keys[-1],
        identity=np.concatenate([found.identity for found in keys]),
        runs=keys[-1].runs._replace(codes=np.concatenate(runs), texts=texts),
        created_at=np.concatenate([found.created_at for found in keys]),
        counts=np.concatenate([found.counts for found in keys]),
    )


class Checks:
    """Reads the tables and checks that they are consistent with each other and with the run records.

    Args:
        files: Files of each table, from `reader.table_files`.
        runs: Run records of the output.

    Attributes:
        rows: Number of rows by table.
        states: Number of recordings in the latest view by terminal state.
        runs: Counts of the rows that each run wrote.
        problems: What is inconsistent.
        notes: Remarks that are not errors.

    Raises:
        Rejected, NotATable: A file cannot be read.
    """

    def __init__(self, files: Files, runs: Runs) -> None:
        self._known = runs
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        recordings = _Rows(files, ["recordings"], "terminal_state")
        latest = recordings.keys.newest(KeySet(recordings.keys.recording).codes)
        self.states = self._check_recordings(recordings, latest)
        self.rows = dict.fromkeys((*ANSWER_TABLES, "recordings", "dead_letters"), 0)
        counts: dict[str, dict[str, Counter[str]]] = {}
        example: dict[str, str] = {}
        for what, tables, category, column in (
            ("recordings", ["recordings"], "terminal_state", None),
            ("answers", ANSWER_TABLES, None, "answer_keys"),
            ("dead_letters", ["dead_letters"], "reason", "dead_letter_keys"),
        ):
            # One after the other, so that memory holds the keys of few tables at a time.
            rows = recordings if column is None else _Rows(files, tables, category)
            self.rows |= rows.by_table()
            self._check_duplicates(what.replace("_", " "), rows)
            if column is not None:
                self._check_names(what.replace("_", " "), column, rows, recordings, latest)
            counts[what] = rows.counts()
            for number, run_id in enumerate(rows.keys.runs.texts):
                if run_id not in runs.known and run_id not in example:
                    example[run_id] = rows.where(np.flatnonzero(rows.keys.runs.codes == number), 1)
        self._check_runs(counts, example)

    def _report(self, kind: str, number: int, what: str, example: str, advice: str) -> None:
        self.problems.append(Problem(kind, int(number), what, example, advice))

    def _check_recordings(self, rows: _Rows, latest: Mask) -> dict[str, int]:
        """Checks that the columns of each row agree; counts the recordings in the latest view by state."""
        number_columns = ["answers", "kept_answers", "dead_letters", "kept_dead_letters"]
        columns = ["uri", "terminal_state", SETTLED_STATE, "answer_keys", "dead_letter_keys", *number_columns]
        first = 0
        found: Counter[str] = Counter()
        wrong: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for _, _, piece in read_rows_of(rows.files, "recordings", columns):
            for what, bad in _contradictions(piece).items():
                if bad.any():
                    wrong[what] += int(bad.sum())
                    examples.setdefault(what, str(piece["uri"][int(np.flatnonzero(bad)[0])].as_py()))
            current = states(piece).filter(pa.array(latest[first : first + len(piece)]))
            found.update({count["values"]: count["counts"] for count in pc.value_counts(current).to_pylist()})
            first += len(piece)
        for what, count in wrong.items():
            self._report("inconsistent", count, f"rows of recordings/: {what}", examples[what], RUN_AGAIN)
        return dict(sorted(found.items()))

    def _check_duplicates(self, what: str, rows: _Rows) -> None:
        times = np.bincount(rows.codes)
        if not len(times) or times.max() < 2:
            return
        copies = rows.copies(np.flatnonzero(times[rows.codes] > 1))
        if not len(copies):
            return
        number = len(np.unique(rows.codes[copies]))
        copies = copies[rows.codes[copies] == rows.codes[copies[0]]]
        self._report(
            "duplicate",
            number,
            f"rows of {what} are duplicated",
            f"{rows.shown(int(copies[0]))} ({rows.where(copies)})",
            _COMPACT,
        )

    def _check_names(self, what: str, column: str, rows: _Rows, recordings: _Rows, latest: Mask) -> None:
        """Checks that every referenced key has a row, and that every row is referenced."""
        named = np.zeros(rows.set.size, bool)
        missing, past, example = 0, 0, ""
        for keys in named_keys(recordings.files, column):
            found = rows.set.find(keys.hashes)
            absent = found < 0
            named[found[~absent]] = True
            now = absent & latest[keys.sources]
            past += int((absent & ~now).sum())
            if now.any():
                missing += int(now.sum())
                at = int(np.flatnonzero(now)[0])
                example = example or f"{keys.texts[at].as_py()} of {recordings.text(int(keys.sources[at]), ['uri'])}"
        if missing:
            self._report(
                "missing", missing, f"{what} are referenced by recordings/ and have no row", example, RUN_AGAIN
            )
        if past:
            self.notes.append(f"{past} {what} that only older rows of recordings/ reference have no row")
        self._check_orphans(what, rows, ~named[rows.codes])

    def _check_orphans(self, what: str, rows: _Rows, unnamed: Mask) -> None:
        runs = rows.keys.runs
        finished = np.array([run_id in self._known.records for run_id in runs.texts] or [False])
        orphans = np.flatnonzero(unnamed & finished[runs.codes])
        if len(orphans):
            self._report(
                "orphan",
                len(orphans),
                f"rows of {what} are referenced by no row of recordings/",
                f"{rows.shown(int(orphans[0]))} ({rows.where(orphans)})",
                f"{RUN_AGAIN}: it reuses them; or `af3pipe compact --latest` drops them",
            )
        numbers = np.bincount(runs.codes[unnamed], minlength=len(runs.texts))
        for run_id, number in zip(runs.texts, numbers.tolist(), strict=True):
            if number and run_id in self._known.unfinished:
                self.notes.append(
                    f"{number} {what} were written by run {run_id}, which did not finish; a run of the same job "
                    "reuses them"
                )

    def _check_runs(self, counts: dict[str, dict[str, Counter[str]]], example: dict[str, str]) -> None:
        """Compares each run's record with its rows; reports rows of unknown runs, and runs that did not finish."""
        known = self._known
        with_rows = {run_id for found in counts.values() for run_id in found}
        of_run = {
            run_id: {what: counts[what].get(run_id, Counter()) for what in counts}
            for run_id in {*with_rows, *known.known}
        }
        self.runs = [self._run_audit(run_id, of_run[run_id]) for run_id in sorted(of_run)]
        differ = {run_id: list(self._differs(record, of_run[run_id])) for run_id, record in known.records.items()}
        for run_id, found in sorted(differ.items()):
            if found and any(not differ[other] for other in known.later(run_id)):
                self.notes.append(f"run {run_id}: {'; '.join(found)}; a later run of the same inputs is complete")
            elif found:
                what = f"run {run_id} wrote other rows than its record says"
                self._report("miscounted", len(found), what, "; ".join(found), RUN_AGAIN)
        for run_id in sorted(with_rows - known.known):
            self._report(
                "unknown_run",
                sum(found.total() for found in of_run[run_id].values()),
                f"rows are of run {run_id}, which has neither a record nor a started file in _runs/",
                example[run_id],
                "restore the record, or move its files away",
            )
        for run_id in known.unfinished:
            started = known.started[run_id]
            place = f"began {started.get('started_at')} on {started.get('host')}, process {started.get('pid')}"
            if known.later(run_id):
                self.notes.append(f"run {run_id} did not finish ({place}); a later run of the same inputs did")
            else:
                advice = f"if it is still running, wait for it; else {RUN_AGAIN}"
                self._report("unfinished", 1, f"run {run_id} has not finished", place, advice)

    def _run_audit(self, run_id: str, counts: Counts) -> RunAudit:
        record = self._known.records.get(run_id)
        found = {what: dict(sorted(numbers.items())) for what, numbers in counts.items()}
        skipped = None if record is None else (record.get("recordings") or {}).get(_SKIPPED)
        if skipped:
            found["recordings"] = dict(sorted((found["recordings"] | {_SKIPPED: skipped}).items()))
        return RunAudit(run_id, record is not None, found["recordings"], found["answers"], found["dead_letters"])

    def _differs(self, record: dict[str, Any], counts: Counts) -> Iterator[str]:
        """Yields differences between a record's counts and the rows; skipped recordings may or may not have rows."""
        dropped = self._known.dropped.get(record.get("run_id", ""), {})
        for what, found in counts.items():
            stated = {
                name: number for name, number in (record.get(what) or {}).items() if number and name != _SKIPPED
            }
            there = found + dropped.get(what, Counter())
            there.pop(_SKIPPED, None)
            if stated != dict(there):
                yield f"{what.replace('_', ' ')} are {_shown(there)}, and the record says {_shown(stated)}"
        ended = sum((record.get("recordings") or {}).values())
        if record.get("recordings_found", ended) != ended:
            yield f"{record['recordings_found']} recordings were found, and {ended} ended in a state"


def _contradictions(rows: pa.Table) -> dict[str, Mask]:
    """Returns, for each kind of contradiction, a mask of the rows of `recordings/` that have it."""
    answers, kept_answers, letters, kept_letters = (
        pc.fill_null(rows[name], 0).to_numpy()
        for name in ("answers", "kept_answers", "dead_letters", "kept_dead_letters")
    )
    answer_keys, letter_keys = (_lengths(rows[name]) for name in ("answer_keys", "dead_letter_keys"))
    ended = rows["terminal_state"]
    skipped = _equal(ended, TerminalState.SKIPPED_DONE)
    differ = np.asarray(pc.fill_null(pc.not_equal(ended, rows[SETTLED_STATE]), False))
    state = states(rows)
    has_answers, has_letters = answer_keys > 0, letter_keys > 0
    fits = (
        _equal(state, TerminalState.OK) & has_answers & ~has_letters
        | _equal(state, TerminalState.OK_PARTIAL) & has_answers
        | _equal(state, TerminalState.DEAD_LETTER) & ~has_answers & has_letters
        # Of a row of a manifest that was corrected, and is another recording now.
        | _equal(state, TerminalState.SKIPPED_DONE) & ~has_answers & ~has_letters
    )
    return {
        "answers and kept_answers are not the number of answer_keys": answers + kept_answers != answer_keys,
        "dead_letters and kept_dead_letters are not the number of dead_letter_keys": (
            letters + kept_letters != letter_keys
        ),
        "settled_state is not terminal_state, and the run did not skip the recording": ~skipped & differ,
        "the run skipped the recording, and yet wrote rows for it": skipped & (answers + letters > 0),
        "the state does not fit the keys": ~fits,
    }


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items())) or "none"


def _lengths(lists: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0))


def _equal(values: pa.ChunkedArray, state: TerminalState) -> Mask:
    return np.asarray(pc.fill_null(pc.equal(values, state.value), False))
