"""Holds the keys of millions of rows in memory as 128-bit hashes, and compares, counts and finds them as arrays.

A key takes 16 bytes here, however long its text. Two different keys among n have the same hash with a probability of
about n^2 / 2^129: 10^-18 among ten billion. BLAKE2b is cryptographic: nobody can make two such keys on purpose.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.storage import ObjectInfo
from af3pipe.tables.layout import FORMAT
from af3pipe.tables.reader import format_of, read_rows_of

Mask = npt.NDArray[np.bool_]
"""One truth value per row."""
Hashes = npt.NDArray[np.uint64]
"""Of shape (n, 2)."""

_SOURCE = ("uri", "offset_s", "channel", "stream")
IDENTITY = {
    **dict.fromkeys(ANSWER_TABLES, ("recording_id", "answer_key")),
    "recordings": ("recording_id", *_SOURCE, "run_id"),
    "dead_letters": ("dead_letter_key",),
}
"""By table, the columns that tell its rows apart."""
_BETWEEN = "\0"
_SAMPLED = 64
_KEYS_AT_ONCE = 250_000


def hashes_of(texts: pa.ChunkedArray) -> Hashes:
    """Hashes texts; null as the empty one."""
    values = pc.fill_null(texts, "").cast(pa.binary()).to_numpy(zero_copy_only=False)
    digests = b"".join([blake2b(value, digest_size=16).digest() for value in values])
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def joined(rows: pa.Table, columns: Sequence[str]) -> pa.ChunkedArray:
    """Columns as one text; null as the empty one."""
    parts = [pc.fill_null(rows[name].cast(pa.string()), "") for name in columns]
    return pc.binary_join_element_wise(*parts, _BETWEEN) if len(parts) > 1 else parts[0]


class KeySet:
    """A set of hashes, sorted.

    Args:
        hashes: With repeats.

    Attributes:
        codes: For each of `hashes`, its number in the set: equal for equal hashes, from 0 up without gaps.
        size: How many different ones.
    """

    def __init__(self, hashes: Hashes) -> None:
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        ordered = hashes[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        self._high = np.ascontiguousarray(ordered[is_first, 0])
        self._low = np.ascontiguousarray(ordered[is_first, 1])
        self.codes = np.empty(len(order), np.int32 if len(order) < 1 << 31 else np.int64)
        self.codes[order] = np.cumsum(is_first) - 1
        self.size = len(self._high)

    def find(self, wanted: Hashes) -> npt.NDArray[np.int64]:
        """The number of each hash in the set; -1 for one that is not there."""
        found = np.full(len(wanted), -1, np.int64)
        at = np.searchsorted(self._high, wanted[:, 0])
        open_ = np.arange(len(wanted))
        # More than one turn only where two hashes have their first half in common.
        while len(open_):
            open_ = open_[at[open_] < self.size]
            open_ = open_[self._high[at[open_]] == wanted[open_, 0]]
            same = self._low[at[open_]] == wanted[open_, 1]
            found[open_[same]] = at[open_[same]]
            open_ = open_[~same]
            at[open_] += 1
        return found

    def has(self, wanted: Hashes) -> Mask:
        """Which of the hashes are in the set."""
        return self.find(wanted) >= 0


class Words(NamedTuple):
    """A column of few different texts: their numbers, and the texts by number."""

    codes: npt.NDArray[np.int32]
    texts: list[str]

    def ranks(self) -> npt.NDArray[np.int32]:
        """For each row a number that sorts as its text does."""
        rank = np.empty(len(self.texts), np.int32)
        rank[np.argsort(np.array(self.texts, str))] = np.arange(len(self.texts))
        return rank[self.codes]


class _Growing:
    """Appends rows to one array: the arrays of a million small files, in a list, take more than their rows."""

    def __init__(self, kind: type, *shape: int) -> None:
        self._held: npt.NDArray[Any] = np.zeros((1024, *shape), kind)
        self._size = 0

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Appends rows."""
        end = self._size + len(rows)
        if end > len(self._held):
            self._held = np.concatenate(
                [self._held[: self._size], np.zeros_like(self._held, shape=(end, *self._held.shape[1:]))]
            )
        self._held[self._size : end] = rows
        self._size = end

    def rows(self) -> npt.NDArray[Any]:
        """All of them."""
        return self._held[: self._size]


class _GrowingWords:
    """Appends rows to a column of few different texts."""

    def __init__(self) -> None:
        self._codes = _Growing(np.int32)
        self._numbers: dict[str, int] = {}

    def add(self, texts: pa.ChunkedArray) -> None:
        """Appends texts; null as the empty one."""
        encoded = pc.fill_null(texts, "").combine_chunks().dictionary_encode()
        numbers = [self._numbers.setdefault(text, len(self._numbers)) for text in encoded.dictionary.to_pylist()]
        self._codes.add(np.array(numbers, np.int32)[np.asarray(encoded.indices)])

    def words(self) -> Words:
        """All of them."""
        return Words(self._codes.rows(), list(self._numbers))


@dataclass(frozen=True)
class Keys:
    """The keys of rows, in the order of their files and there of the rows.

    Attributes:
        identity: Rows that are equal in it are copies of one row.
        recording: Of rows of `recordings/`, which recording they are of (`recordings_of`); else empty.
        runs: Which wrote them.
        categories: The values of one more column.
        created_at: Microseconds since 1970 UTC.
        counts: Rows of each file.
        formats: Of each file.
        sampled: Rows of a random sample, about one in 64; and their `recording_id`.
        sampled_ids: See `sampled`.
    """

    identity: Hashes
    recording: Hashes
    runs: Words
    categories: Words
    created_at: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    formats: list[int]
    sampled: npt.NDArray[np.int64]
    sampled_ids: list[str]

    def __len__(self) -> int:
        return len(self.identity)

    @property
    def files(self) -> npt.NDArray[np.int64]:
        """For each row the index of its file."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def split(self, mask: Mask) -> list[Mask]:
        """A mask over all rows as one for each file."""
        return np.split(mask, np.cumsum(self.counts)[:-1]) if len(self.counts) else []

    def newest(self, codes: npt.NDArray[np.integer]) -> Mask:
        """Of the rows of each code, the one with the greatest (created_at, run_id)."""
        kept = np.ones(len(codes), bool)
        if len(codes) and codes.max() + 1 != len(codes):
            order = np.lexsort((self.runs.ranks(), self.created_at, codes))
            kept[order[:-1]] = np.diff(codes[order]) != 0
        return kept


def read_keys(files: Sequence[ObjectInfo], table: str, category: str = "run_id") -> Keys:
    """Reads the keys of a table's rows.

    Args:
        files: Of the table.
        table: Which.
        category: The column that `categories` are of.

    Raises:
        Rejected, NotATable: As of `reader.read_rows_of`.
    """
    is_recordings = table == "recordings"
    more = [*_SOURCE, "source_key"] if is_recordings else []
    columns = list(dict.fromkeys(["recording_id", *IDENTITY[table], "run_id", "created_at", category, *more]))
    identity, recordings, created_at = _Growing(np.uint64, 2), _Growing(np.uint64, 4), _Growing(np.int64)
    runs, categories = _GrowingWords(), _GrowingWords()
    sampled, sampled_ids = _Growing(np.int64), []
    counts, formats, total = np.zeros(len(files), np.int64), [FORMAT] * len(files), 0
    for number, _, rows in read_rows_of(files, table, columns):
        hashes = hashes_of(joined(rows, IDENTITY[table]))
        identity.add(hashes)
        if is_recordings:
            recordings.add(_hashes_of_recordings(rows))
        runs.add(rows["run_id"])
        categories.add(rows[category])
        created_at.add(np.asarray(pc.fill_null(rows["created_at"].cast(pa.int64()), 0)))
        chosen = np.flatnonzero(hashes[:, 1] % _SAMPLED == 0)
        sampled.add(chosen + total)
        sampled_ids += rows["recording_id"].take(pa.array(chosen)).to_pylist()
        counts[number] += len(rows)
        formats[number] = format_of(rows)
        total += len(rows)
    found = recordings.rows()
    return Keys(
        identity.rows(),
        recordings_of(found[:, :2], found[:, 2:]),
        runs.words(),
        categories.words(),
        created_at.rows(),
        counts,
        formats,
        sampled.rows(),
        sampled_ids,
    )


def _hashes_of_recordings(rows: pa.Table) -> Hashes:
    """Of each row, the hashes of id and place and of id and `source_key` side by side; the latter 0 without a key."""
    by_key = hashes_of(joined(rows, ["recording_id", "source_key"])).copy()
    by_key[np.asarray(rows["source_key"].is_null())] = 0
    return np.hstack([hashes_of(joined(rows, ["recording_id", *_SOURCE])), by_key])


def recordings_of(by_place: Hashes, by_key: Hashes) -> Hashes:
    """Tells recordings apart by id and source: an id that was given to two sources is two recordings.

    A row of format 1 has no `source_key`. It is of the recording of a newer row that has one, where the two agree in
    id, uri, offset, channel and stream; where there is none, these say which recording it is of.

    Args:
        by_place: Of each row, the hash of those columns.
        by_key: Of each row, the hash of its id and `source_key`; 0 where there is none.
    """
    keyed = by_key.any(axis=1)
    if not keyed.any():
        return by_place
    places = KeySet(by_place[keyed])
    of_place = np.empty((places.size, 2), np.uint64)
    of_place[places.codes] = by_key[keyed]
    at = places.find(by_place[~keyed])
    found = by_key.copy()
    found[~keyed] = np.where((at >= 0)[:, None], of_place[np.maximum(at, 0)], by_place[~keyed])
    return np.asarray(found)


class Named(NamedTuple):
    """Keys of answers or dead letters that rows of `recordings/` name.

    Attributes:
        hashes: As `identity` of their own rows.
        sources: For each key, the number of the row of `recordings/` that names it.
        texts: The keys themselves.
    """

    hashes: Hashes
    sources: npt.NDArray[np.int64]
    texts: pa.Array


def named_keys(files: Sequence[ObjectInfo], column: str, masks: Sequence[Mask] | None = None) -> Iterator[Named]:
    """Reads the keys that rows of `recordings/` name, some hundred thousand at a time.

    Args:
        files: Of that table.
        column: `answer_keys` or `dead_letter_keys`.
        masks: Which rows of each file to look at; all by default.

    Raises:
        Rejected, NotATable: As of `reader.read_rows_of`.
    """
    total, held = 0, 0
    pieces: list[tuple[pa.Table, npt.NDArray[np.int64]]] = []
    for number, first, rows in read_rows_of(files, "recordings", ["recording_id", column]):
        positions = np.arange(total, total + len(rows))
        total += len(rows)
        if masks is not None:
            mask = masks[number][first : first + len(rows)]
            rows, positions = rows.filter(pa.array(mask)), positions[mask]
        pieces.append((rows, positions))
        held += int(pc.sum(pc.list_value_length(rows[column])).as_py() or 0)
        if held >= _KEYS_AT_ONCE:
            yield _named(pieces, column)
            pieces, held = [], 0
    if held:
        yield _named(pieces, column)


def _named(pieces: Sequence[tuple[pa.Table, npt.NDArray[np.int64]]], column: str) -> Named:
    rows = pa.concat_tables([rows for rows, _ in pieces]).combine_chunks()
    lists = rows[column].combine_chunks()
    parents, keys = pc.list_parent_indices(lists), pc.list_flatten(lists)
    texts = pa.table({"id": rows["recording_id"].combine_chunks().take(parents), "key": keys})
    hashes = hashes_of(joined(texts, ["id", "key"] if column == "answer_keys" else ["key"]))
    return Named(hashes, np.concatenate([at for _, at in pieces])[np.asarray(parents)], keys)
