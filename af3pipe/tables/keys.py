"""Temporary."""

from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Mask = npt.NDArray[np.bool_]
Hashes = npt.NDArray[np.uint64]


def hashes_of(texts: pa.ChunkedArray) -> Hashes:
    """Hashes texts; null as the empty one."""
    values = pc.fill_null(texts, "").cast(pa.binary()).to_numpy(zero_copy_only=False)
    digests = b"".join([blake2b(value, digest_size=16).digest() for value in values])
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


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
