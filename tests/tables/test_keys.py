import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.tables import keys as module
from af3pipe.tables.keys import KeySet, hashes_of, recordings_of

# Few values, so that many hashes share their first half.
HASHES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30)


def array(pairs):
    return np.array(pairs, np.uint64).reshape(-1, 2)


@given(HASHES, HASHES)
def test_a_set_of_hashes_is_a_set(members, wanted):
    found = KeySet(array(members))
    assert found.size == len(set(members))
    assert [sorted(set(members))[code] for code in found.codes] == members
    assert found.has(array(wanted)).tolist() == [pair in members for pair in wanted]
    at = found.find(array(wanted)).tolist()
    assert [None if number < 0 else sorted(set(members))[number] for number in at] == [
        pair if pair in members else None for pair in wanted
    ]


@given(st.lists(st.none() | st.text(max_size=3), max_size=20))
def test_equal_texts_have_equal_hashes_and_others_do_not(texts):
    hashes = hashes_of(pa.chunked_array([texts, texts], pa.string())).tolist()
    assert hashes[: len(texts)] == hashes[len(texts) :]
    assert len(set(map(tuple, hashes))) == len({text or "" for text in texts})


def test_rows_of_format_1_are_of_the_recording_that_newer_rows_of_their_place_are_of():
    by_place = array([(1, 1), (1, 1), (2, 2), (3, 3), (1, 1)])
    by_key = array([(0, 0), (7, 7), (8, 8), (0, 0), (0, 0)])
    assert recordings_of(by_place, by_key).tolist() == [[7, 7], [7, 7], [8, 8], [3, 3], [7, 7]]
    assert recordings_of(by_place, by_key * 0).tolist() == by_place.tolist()


@given(st.lists(st.lists(st.sampled_from(["a", "b", None, "c"]), max_size=4), max_size=6))
def test_columns_that_grow_hold_what_was_added(pieces):
    words, numbers = module._GrowingWords(), module._Growing(np.int64, 2)
    for piece in pieces:
        words.add(pa.chunked_array([piece], pa.string()))
        numbers.add(np.arange(2 * len(piece)).reshape(-1, 2))
    found = words.words()
    flat = [text or "" for piece in pieces for text in piece]
    assert [found.texts[code] for code in found.codes] == flat
    ranks = found.ranks().tolist()
    assert [ranks[a] < ranks[b] for a in range(len(flat)) for b in range(len(flat))] == [
        x < y for x in flat for y in flat
    ]
    assert len(numbers.rows()) == len(flat)


def test_an_array_grows_past_what_it_begins_with():
    grown = module._Growing(np.int64)
    for start in range(0, 10_000, 700):
        grown.add(np.arange(start, start + 700))
    assert grown.rows().tolist() == list(range(10_500))
