"""Stores the keys of millions of rows as 128-bit hashes in NumPy arrays, to compare, count and find them.

A key takes 16 bytes, however long its text. The probability that two of n different keys have the same hash is about
n^2 / 2^129: 10^-18 for ten billion keys. BLAKE2b is cryptographic, so collisions cannot be made on purpose.
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
"""By table, the columns that identify a row."""
_BETWEEN = "\0"
_SAMPLED = 64
_KEYS_AT_ONCE = 250_000


def hashes_of(texts: pa.ChunkedArray) -> Hashes:
    """Hashes texts; null is hashed like an empty text."""
    values = pc.fill_null(texts, "").cast(pa.binary()).to_numpy(zero_copy_only=False)
    digests = b"".join([blake2b(value, digest_size=16).digest() for value in values])
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def joined(rows: pa.Table, columns: Sequence[str]) -> pa.ChunkedArray:
    """Joins columns to one text per row; null becomes an empty text."""
    parts = [pc.fill_null(rows[name].cast(pa.string()), "") for name in columns]
    return pc.binary_join_element_wise(*parts, _BETWEEN) if len(parts) > 1 else parts[0]


class KeySet:
    """Stores a sorted set of hashes and finds hashes in it.

    Args:
        hashes: Hashes, of shape (n, 2), with duplicates.

    Attributes:
        codes: For each of `hashes`, its index in the set.
        size: Number of distinct hashes.
    """

    def __init__(self, hashes: Hashes) -> None:
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        self.codes = np.empty(len(order), np.int32 if len(order) < 1 << 31 else np.int64)
        high, low = hashes[order, 0], hashes[order, 1]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        self.codes[order] = np.cumsum(is_first, dtype=self.codes.dtype) - 1
        del order
        self._high, self._low = (high, low) if is_first.all() else (high[is_first], low[is_first])
        self.size = len(self._high)

    def find(self, wanted: Hashes) -> npt.NDArray[np.int64]:
        """Returns the index of each hash in the set; -1 for a hash that is not in it."""
        found = np.full(len(wanted), -1, np.int64)
        at = np.searchsorted(self._high, wanted[:, 0])
        open_ = np.arange(len(wanted))
        # More than one iteration only if two hashes have the same first half.
        while len(open_):
            open_ = open_[at[open_] < self.size]
            open_ = open_[self._high[at[open_]] == wanted[open_, 0]]
            same = self._low[at[open_]] == wanted[open_, 1]
            found[open_[same]] = at[open_[same]]
            open_ = open_[~same]
            at[open_] += 1
        return found

    def has(self, wanted: Hashes) -> Mask:
        """Returns a mask: which of the hashes are in the set."""
        return self.find(wanted) >= 0


class Words(NamedTuple):
    """Is a dictionary-encoded column: for each row a code, and the text of each code."""

    codes: npt.NDArray[np.int32]
    texts: list[str]

    def ranks(self) -> npt.NDArray[np.int32]:
        """Returns a number for each row; the numbers sort like the texts."""
        rank = np.empty(len(self.texts), np.int32)
        rank[np.argsort(np.array(self.texts, str))] = np.arange(len(self.texts))
        return rank[self.codes]


class _Growing:
    """Appends rows to one growing array; a list of a million small arrays would take more memory."""

    def __init__(self, kind: type, *shape: int) -> None:
        self._buffer: npt.NDArray[Any] = np.zeros((1024, *shape), kind)
        self._size = 0

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Appends rows."""
        end = self._size + len(rows)
        if end > len(self._buffer):
            # Its second half takes no memory before it is written.
            grown = np.zeros_like(self._buffer, shape=(2 * end, *self._buffer.shape[1:]))
            grown[: self._size] = self._buffer[: self._size]
            self._buffer = grown
        self._buffer[self._size : end] = rows
        self._size = end

    def rows(self) -> npt.NDArray[Any]:
        """Returns all rows."""
        return self._buffer[: self._size]


class _GrowingWords:
    """Appends texts to a growing dictionary-encoded column."""

    def __init__(self) -> None:
        self._codes = _Growing(np.int32)
        self._numbers: dict[str, int] = {}

    def add(self, texts: pa.ChunkedArray) -> None:
        """Appends texts; null becomes an empty text."""
        encoded = pc.fill_null(texts, "").combine_chunks().dictionary_encode()
        numbers = [self._numbers.setdefault(text, len(self._numbers)) for text in encoded.dictionary.to_pylist()]
        self._codes.add(np.array(numbers, np.int32)[np.asarray(encoded.indices)])

    def words(self) -> Words:
        """Returns the column."""
        return Words(self._codes.rows(), list(self._numbers))


@dataclass(frozen=True)
class Keys:
    """Has the keys of a table's rows, in the order of the files and of the rows in them.

    Attributes:
        identity: Hash of the row's identity; rows with equal hashes are copies of one row.
        recording: For rows of `recordings/`, the hash of the recording (`recordings_of`); else empty.
        runs: The run that wrote each row.
        categories: The values of one more column.
        created_at: Microseconds since 1970 UTC.
        counts: Number of rows of each file.
        formats: Format version of each file.
        sampled: Indices of a random sample of rows, about one in 64.
        sampled_ids: The `recording_id` of each row in `sampled`.
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
        """The index of the file of each row."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def split(self, mask: Mask) -> list[Mask]:
        """Splits a mask over all rows into one mask for each file."""
        return np.split(mask, np.cumsum(self.counts)[:-1]) if len(self.counts) else []

    def newest(self, codes: npt.NDArray[np.integer]) -> Mask:
        """Returns a mask of the newest row of each code: the one with the greatest (created_at, run_id)."""
        kept = np.ones(len(codes), bool)
        if len(codes) and codes.max() + 1 != len(codes):
            order = np.lexsort((self.runs.ranks(), self.created_at, codes))
            kept[order[:-1]] = np.diff(codes[order]) != 0
        return kept


def read_keys(files: Sequence[ObjectInfo], table: str, category: str = "run_id") -> Keys:
    """Reads the keys of a table's rows.

    Args:
        files: Files of the table.
        table: That table.
        category: Column to read into `categories`.

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
    """Returns two hashes per row, shape (n, 4): of id and place, and of id and `source_key` (0 if there is none)."""
    by_key = hashes_of(joined(rows, ["recording_id", "source_key"])).copy()
    by_key[np.asarray(rows["source_key"].is_null())] = 0
    return np.hstack([hashes_of(joined(rows, ["recording_id", *_SOURCE])), by_key])


def recordings_of(by_place: Hashes, by_key: Hashes) -> Hashes:
    """Returns a hash of each row's recording: its id and source, as an id may have been given to two sources.

    A row of format 1 has no `source_key`. It belongs to the recording of a newer row with the same id, uri, offset,
    channel and stream; if there is no such row, these columns identify its recording.

    Args:
        by_place: For each row, the hash of those columns.
        by_key: For each row, the hash of its id and `source_key`; 0 if it has none.
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
    """Has keys of answers or dead letters that rows of `recordings/` reference.

    Attributes:
        hashes: Hash of each key, comparable with `Keys.identity` of the referenced rows.
        sources: For each key, the index of the row of `recordings/` that references it.
        texts: The keys.
    """

    hashes: Hashes
    sources: npt.NDArray[np.int64]
    texts: pa.Array


def named_keys(files: Sequence[ObjectInfo], column: str, masks: Sequence[Mask] | None = None) -> Iterator[Named]:
    """Reads the keys that rows of `recordings/` reference, in batches of about 250,000.

    Args:
        files: Files of `recordings/`.
        column: `answer_keys` or `dead_letter_keys`.
        masks: For each file, which rows to read; all by default.

    Raises:
        Rejected, NotATable: As of `reader.read_rows_of`.
    """
    total, pending = 0, 0
    pieces: list[tuple[pa.Table, npt.NDArray[np.int64]]] = []
    for number, first, rows in read_rows_of(files, "recordings", ["recording_id", column]):
        positions = np.arange(total, total + len(rows))
        total += len(rows)
        if masks is not None:
            mask = masks[number][first : first + len(rows)]
            rows, positions = rows.filter(pa.array(mask)), positions[mask]
        pieces.append((rows, positions))
        pending += int(pc.sum(pc.list_value_length(rows[column])).as_py() or 0)
        if pending >= _KEYS_AT_ONCE:
            yield _named(pieces, column)
            pieces, pending = [], 0
    if pending:
        yield _named(pieces, column)


def _named(pieces: Sequence[tuple[pa.Table, npt.NDArray[np.int64]]], column: str) -> Named:
    rows = pa.concat_tables([rows for rows, _ in pieces]).combine_chunks()
    lists = rows[column].combine_chunks()
    parents, keys = pc.list_parent_indices(lists), pc.list_flatten(lists)
    texts = pa.table({"id": rows["recording_id"].combine_chunks().take(parents), "key": keys})
    hashes = hashes_of(joined(texts, ["id", "key"] if column == "answer_keys" else ["key"]))
    return Named(hashes, np.concatenate([at for _, at in pieces])[np.asarray(parents)], keys)
