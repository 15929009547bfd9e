"""The books of an output, from its Parquet alone: what is missing, there twice, or nobody's; and what to do."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from af3pipe import storage
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.schemas import TerminalState
from af3pipe.storage import ObjectInfo
from af3pipe.tables.latest import (
    Latest,
    Mask,
    NotATable,
    codes,
    named_keys,
    newest,
    open_compactions,
    read_rows_of,
    table_files,
)
from af3pipe.tables.run_records import Counts, KeyedRows, Runs

# The last: of a row of a manifest that was corrected, and is another recording now.
_SETTLED = (TerminalState.OK, TerminalState.OK_PARTIAL, TerminalState.DEAD_LETTER, TerminalState.SKIPPED_DONE)
_RUN_AGAIN = "run the job again into the same output"
_COMPACT = "`af3pipe compact` keeps the newest of each"


class AuditError(Exception):
    """There is nothing to audit: why."""


class Problem(NamedTuple):
    """Something that is not as it should be.

    Attributes:
        kind: `missing`, `duplicate`, `orphan`, `miscounted`, `inconsistent`, `unknown_run`, `unfinished` or
            `unreadable`; against a listing `never_settled` or `changed`.
        number: Of rows, keys, recordings, runs or files.
        what: In a sentence.
        example: One of them.
        advice: What to do.
    """

    kind: str
    number: int
    what: str
    example: str
    advice: str


class RunAudit(NamedTuple):
    """The rows of one run, each once; `finished` when it left its record."""

    run_id: str
    finished: bool
    recordings: dict[str, int]
    answers: dict[str, int]
    dead_letters: dict[str, int]


class Audit(NamedTuple):
    """What an output holds and what is wrong with it.

    Attributes:
        output: Which.
        files: By table.
        rows: By table.
        states: Recordings by the state that they are in now.
        runs: In the order of their beginning.
        problems: None when all is right.
        notes: What is worth knowing and no error.
        listed: Recordings that the inputs name; None where none were given.
    """

    output: str
    files: dict[str, int]
    rows: dict[str, int]
    states: dict[str, int]
    runs: list[RunAudit]
    problems: list[Problem]
    notes: list[str]
    listed: int | None = None

    @property
    def right(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "right": self.right,
            **self._asdict(),
            "runs": [run._asdict() for run in self.runs],
            "problems": [problem._asdict() for problem in self.problems],
        }


class Compared(NamedTuple):
    """What a fresh listing of the inputs says of an output: numbers, each with the URI of one.

    Attributes:
        listed: Recordings that the inputs name.
        never: Those without a row.
        changed: Those that are not what they were when they were processed.
        gone: Recordings of the output that the inputs no longer name.
    """

    listed: int
    never: tuple[int, str]
    changed: tuple[int, str]
    gone: tuple[int, str]


def audit(output: str, compare_inputs: Callable[[Latest, Runs], Compared] | None = None) -> Audit:
    """Compares an output's rows with each other, with its run records, and with a fresh listing of its inputs.

    Nothing is changed. Memory holds the keys of all rows.

    Args:
        output: Folder of the tables.
        compare_inputs: Compares the latest view with a listing. Recordings without a row, and those that have
            changed, are problems.

    Raises:
        AuditError: There is no output of a run.
        Rejected: The store cannot be read.
    """
    output = storage.canonical(output)
    files = table_files(output)
    runs = Runs(output)
    if not any(files.values()) and not runs.known:
        raise AuditError(f"{output} has no tables and no runs of af3pipe; is this the folder that --output named?")
    problems: list[Problem] = []
    while True:
        try:
            books = _Books(files, runs)
            break
        except NotATable as error:
            files = {table: [info for info in infos if info != error.info] for table, infos in files.items()}
            advice = f"delete it and {_RUN_AGAIN}: what it held is asked again"
            problems.append(Problem("unreadable", 1, str(error), error.info.uri, advice))
    notes = [
        f"a compaction, {found.compaction_id}, is under way or was killed: `af3pipe compact` finishes or undoes it"
        for found in open_compactions(output)
    ]
    problems += books.problems
    listed = None
    if compare_inputs is not None:
        found = compare_inputs(Latest(output, files), runs)
        listed = found.listed
        for kind, what, (number, example) in (
            ("never_settled", "recordings of the input were never settled", found.never),
            ("changed", "recordings have changed since they were settled", found.changed),
        ):
            if number:
                problems.append(Problem(kind, number, what, example, _RUN_AGAIN))
        if found.gone[0]:
            notes.append(f"{found.gone[0]} recordings are not in the input any more, for example {found.gone[1]}")
    return Audit(
        output=output,
        files={table: len(infos) for table, infos in files.items()},
        rows=books.rows,
        states=books.states,
        runs=books.runs,
        problems=problems,
        notes=[*notes, *books.notes],
        listed=listed,
    )


class _Books:
    """All that is counted and held against each other."""

    def __init__(self, files: dict[str, list[ObjectInfo]], runs: Runs) -> None:
        self._files = files
        self._known = runs
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        recordings = KeyedRows.of(files, ["recordings"], "terminal_state")
        answers = KeyedRows.of(files, ANSWER_TABLES, None)
        letters = KeyedRows.of(files, ["dead_letters"], "reason")
        ids = codes(_column(files["recordings"], "recording_id"))
        latest = newest(ids, recordings.keys)
        self.states = self._check_recordings(recordings, latest)
        for what, rows in (("recordings", recordings), ("answers", answers), ("dead letters", letters)):
            self._check_duplicates(what, rows)
        self._check_names("answers", "answer_keys", answers, recordings, latest)
        self._check_names("dead letters", "dead_letter_keys", letters, recordings, latest)
        tables = {"recordings": recordings, "answers": answers, "dead_letters": letters}
        counts = {what: rows.counts() for what, rows in tables.items()}
        self._check_runs(counts, tables)
        by_file = {table: len(infos) for table, infos in files.items()}
        numbers = np.bincount(answers.keys["file"].to_numpy(), minlength=len(answers.files))
        ends = np.cumsum([by_file[table] for table in ANSWER_TABLES])
        by_table = [int(part.sum()) for part in np.split(numbers, ends[:-1])]
        self.rows = {
            **dict(zip(ANSWER_TABLES, by_table, strict=True)),
            "recordings": len(recordings.keys),
            "dead_letters": len(letters.keys),
        }

    def _report(self, kind: str, number: int, what: str, example: str, advice: str) -> None:
        self.problems.append(Problem(kind, int(number), what, example, advice))

    def _check_recordings(self, rows: KeyedRows, latest: Mask) -> dict[str, int]:
        """Whether each row says the same in all its columns; gives the states that hold."""
        number_columns = ["answers", "kept_answers", "dead_letters", "kept_dead_letters"]
        columns = ["uri", "terminal_state", "settled_state", "answer_keys", "dead_letter_keys", *number_columns]
        first = 0
        states: Counter[str] = Counter()
        wrong: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for _, _, piece in read_rows_of(rows.files, columns):
            counts = {name: piece[name].to_numpy() for name in number_columns}
            named = {name: _lengths(piece[name]) for name in ("answer_keys", "dead_letter_keys")}
            ended, settled = piece["terminal_state"], piece["settled_state"]
            skipped = _equal(ended, TerminalState.SKIPPED_DONE)
            is_ok, is_partial, is_dead, is_gone = (_equal(settled, state) for state in _SETTLED)
            same = np.asarray(pc.equal(ended, settled))
            checks = {
                "answers and kept_answers are not the number of answer_keys": (
                    counts["answers"] + counts["kept_answers"] != named["answer_keys"]
                ),
                "dead_letters and kept_dead_letters are not the number of dead_letter_keys": (
                    counts["dead_letters"] + counts["kept_dead_letters"] != named["dead_letter_keys"]
                ),
                "settled_state is not terminal_state, and the run did not skip the recording": ~skipped & ~same,
                "the run skipped the recording, and yet wrote rows for it": (
                    skipped & (counts["answers"] + counts["dead_letters"] > 0)
                ),
                "settled_state does not fit the keys": ~(
                    is_ok & (named["answer_keys"] > 0) & (named["dead_letter_keys"] == 0)
                    | is_partial & (named["answer_keys"] > 0)
                    | is_dead & (named["answer_keys"] == 0) & (named["dead_letter_keys"] > 0)
                    | is_gone & (named["answer_keys"] == 0) & (named["dead_letter_keys"] == 0)
                ),
            }
            for what, bad in checks.items():
                if bad.any():
                    wrong[what] += int(bad.sum())
                    examples.setdefault(what, piece["uri"][int(np.flatnonzero(bad)[0])].as_py())
            holding = settled.filter(pa.array(latest[first : first + len(piece)]))
            states.update({count["values"]: count["counts"] for count in pc.value_counts(holding).to_pylist()})
            first += len(piece)
        for what, count in wrong.items():
            self._report("inconsistent", count, f"rows of recordings/: {what}", examples[what], _RUN_AGAIN)
        return dict(sorted(states.items()))

    def _check_duplicates(self, what: str, rows: KeyedRows) -> None:
        times = np.bincount(rows.identity)
        if not len(times) or times.max() < 2:
            return
        copies = np.flatnonzero(rows.identity == int(times.argmax()))
        self._report(
            "duplicate",
            (times > 1).sum(),
            f"rows of {what} are there more than once",
            f"{rows.shown(int(copies[0]))} ({rows.where(copies)})",
            _COMPACT,
        )

    def _check_names(self, what: str, column: str, rows: KeyedRows, recordings: KeyedRows, latest: Mask) -> None:
        """Every key that is named has a row, and every row is named."""
        encoded = rows.encoded
        named = np.zeros(len(encoded.dictionary), bool)
        missing, past, example = 0, 0, ""
        for keys, sources in named_keys(recordings.files, column):
            found = pc.index_in(keys, value_set=encoded.dictionary).combine_chunks()
            absent = np.asarray(found.is_null())
            named[np.asarray(found.drop_null())] = True
            now = absent & latest[sources]
            past += int((absent & ~now).sum())
            if now.any():
                missing += int(now.sum())
                at = int(np.flatnonzero(now)[0])
                key = str(keys[at].as_py()).rpartition("\0")[2]
                example = example or f"{key} of {self._uri(recordings, int(sources[at]))}"
        if missing:
            self._report("missing", missing, f"{what} are named by recordings/ and have no row", example, _RUN_AGAIN)
        if past:
            self.notes.append(f"{past} {what} that once held and do so no more have no row")
        self._check_orphans(what, rows, ~named[np.asarray(encoded.indices)])

    def _check_orphans(self, what: str, rows: KeyedRows, unnamed: Mask) -> None:
        finished = np.array([run_id in self._known.records for run_id in rows.run_ids] or [False])
        waiting = np.array([run_id in self._known.unfinished for run_id in rows.run_ids] or [False])
        orphans = np.flatnonzero(unnamed & finished[rows.runs])
        if len(orphans):
            self._report(
                "orphan",
                len(orphans),
                f"rows of {what} are named by no row of recordings/",
                f"{rows.shown(int(orphans[0]))} ({rows.where(orphans)})",
                f"{_RUN_AGAIN}: it takes them as its own; or `af3pipe compact --latest` drops them",
            )
        for number, run_id in enumerate(rows.run_ids):
            left = int((unnamed & (rows.runs == number)).sum()) if waiting[number] else 0
            if left:
                self.notes.append(
                    f"{left} {what} left by run {run_id}, which did not finish; a run of the same job takes them as "
                    "its own"
                )

    def _uri(self, recordings: KeyedRows, row: int) -> str:
        """Of a row of recordings/."""
        numbers = recordings.keys["file"].to_numpy()
        number = int(numbers[row])
        within = row - int(np.searchsorted(numbers, number))
        for _, first, piece in read_rows_of([recordings.files[number]], ["uri"]):
            if within < first + len(piece):
                return str(piece["uri"][within - first].as_py())
        return ""

    def _check_runs(self, counts: dict[str, dict[str, Counter[str]]], tables: dict[str, KeyedRows]) -> None:
        """Each run's record against its rows; rows without a record or a marker; runs that did not finish."""
        known = self._known
        with_rows = {run_id for found in counts.values() for run_id in found}
        self.runs = [
            RunAudit(
                run_id,
                run_id in known.records,
                *(dict(sorted(counts[what].get(run_id, Counter()).items())) for what in counts),
            )
            for run_id in sorted({*with_rows, *known.known})
        ]
        differ = {
            run_id: list(self._differs(record, {what: counts[what].get(run_id, Counter()) for what in counts}))
            for run_id, record in known.records.items()
        }
        for run_id, found in sorted(differ.items()):
            if found and any(not differ[other] for other in known.later(run_id)):
                self.notes.append(f"run {run_id}: {'; '.join(found)}; a later run of the same inputs is whole")
            elif found:
                self._report(
                    "miscounted",
                    len(found),
                    f"run {run_id} wrote other rows than its record says",
                    "; ".join(found),
                    _RUN_AGAIN,
                )
        for run_id in sorted(with_rows - known.known):
            self._report(
                "unknown_run",
                sum(counts[what].get(run_id, Counter()).total() for what in counts),
                f"rows are of run {run_id}, which has neither a record nor a marker in _runs/",
                next(
                    rows.where(np.flatnonzero(rows.runs == rows.run_ids.index(run_id)), 1)
                    for rows in tables.values()
                    if run_id in rows.run_ids
                ),
                "restore the record, or move its files away",
            )
        for run_id in known.unfinished:
            started = known.started[run_id]
            place = f"began {started.get('started_at')} on {started.get('host')}, process {started.get('pid')}"
            if known.later(run_id):
                self.notes.append(f"run {run_id} did not finish ({place}); a later run of the same inputs did")
            else:
                advice = f"if it is still running, wait for it; else {_RUN_AGAIN}"
                self._report("unfinished", 1, f"run {run_id} has not finished", place, advice)

    def _differs(self, record: dict[str, Any], counts: Counts) -> Iterator[str]:
        dropped = self._known.dropped.get(record.get("run_id", ""), {})
        for what, found in counts.items():
            told = {name: number for name, number in (record.get(what) or {}).items() if number}
            there = {name: number for name, number in (found + dropped.get(what, Counter())).items() if number}
            if told != there:
                yield f"{what.replace('_', ' ')} are {_shown(there)}, and were {_shown(told)}"
        settled = sum((record.get("recordings") or {}).values())
        if record.get("recordings_found", settled) != settled:
            yield f"{record['recordings_found']} recordings were found, and {settled} ended in a state"


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items())) or "none"


def _column(files: list[ObjectInfo], name: str) -> pa.ChunkedArray:
    found = [piece[name].dictionary_encode() for _, _, piece in read_rows_of(files, [name])]
    chunks = [chunk for column in found for chunk in column.chunks]
    return pa.chunked_array(chunks, pa.dictionary(pa.int32(), pa.string())).unify_dictionaries()


def _lengths(lists: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0))


def _equal(values: pa.ChunkedArray, state: TerminalState) -> Mask:
    return np.asarray(pc.equal(values, state.value))
