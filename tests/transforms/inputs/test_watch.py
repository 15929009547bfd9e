"""What a stream finds in folders: what is new or has changed, once."""

from pathlib import Path

import apache_beam as beam
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.schemas import DeadLetter, Reason, Recording, Rejected, Stage
from af3pipe.storage import StorageError
from af3pipe.transforms import Outcome, WatchRecordings
from af3pipe.transforms.inputs.watch import (
    _EMITTED_AT_FIRST,
    _REPEATED_EVERY,
    NewRecordings,
    _ListDoFn,
    _ListingFilter,
    check_watched,
)
from af3pipe.transforms.outcome import to_dead_letter
from tests import fixtures_audio as make
from tests.collected import Collected

SETTLE_S = 10.0


def stored(name, etag):
    """An object of a store that tells a tag."""
    return Recording(name, f"s3://archive/{name}", 10, etag, "2026-01-01T00:00:00+00:00")


def written(name, size_bytes, mtime="2026-01-01T00:00:00+00:00"):
    """A file, of which nobody knows whether it is whole."""
    return Recording(name, f"/archive/{name}", size_bytes, None, mtime)


def letter(name, detail="what"):
    rejected = Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, detail)
    return to_dead_letter(rejected, stored(name, None), stage=Stage.LIST)


# --- NewRecordings


def passed(*listed):
    """(recording or dead letter, when it was listed) in this order: what passes, by id, in its order."""
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        items = [(item.recording_id, (item, at)) for item, at in listed]
        new = pipeline | beam.Create(items, reshuffle=False) | NewRecordings(SETTLE_S)
        assert isinstance(new, Outcome)
        _ = new.good | found.into("good")
        _ = new.dead_letters | found.into("letters")
    assert all(isinstance(item, DeadLetter) for item in found["letters"])
    by_id = {}
    for item in [*found["good"], *found["letters"]]:
        by_id.setdefault(item.recording_id, []).append(item)
    return by_id


def test_each_version_of_an_object_passes_once_and_at_once():
    first, second, other = stored("a", "1"), stored("a", "2"), stored("b", "1")
    told = [(first, 0.0), (other, 0.0), (first, 1.0), (other, 1.0), (second, 2.0), (other, 2.0), (second, 3.0)]
    assert passed(*told) == {"a": [first, second], "b": [other]}


def test_a_file_passes_when_it_stayed_the_same_for_long_enough():
    growing, whole, later = written("a", 5), written("a", 10), written("a", 10, "2026-01-02T00:00:00+00:00")
    assert passed((growing, 0.0)) == {}
    assert passed((growing, 0.0), (growing, 9.9)) == {}
    assert passed((growing, 0.0), (growing, 10.0)) == {"a": [growing]}
    assert passed((growing, 0.0), (whole, 10.0), (whole, 19.0), (whole, 20.0), (whole, 30.0)) == {"a": [whole]}
    assert passed((whole, 0.0), (whole, 10.0), (later, 20.0), (later, 30.0)) == {"a": [whole, later]}
    assert passed((growing, 0.0), (whole, 10.0), (growing, 20.0)) == {}


def test_a_dead_letter_passes_once():
    assert passed((letter("a"), 0.0), (letter("a"), 1.0)) == {"a": [LetterOf(letter("a"))]}


class LetterOf:
    """Equal to a dead letter made at another time."""

    def __init__(self, expected):
        self._expected = expected

    def __eq__(self, other):
        return other._replace(created_at=0) == self._expected._replace(created_at=0)


def expected(history):
    """Numbers of the versions that pass, in their order; one below 0 has no etag."""
    gone, first = [], None  # (version, since when) of the file that is waited for
    for version, at in history:
        if gone[-1:] == [version]:
            continue
        if version < 0 and (first is None or first[0] != version):
            first = version, at
        elif version >= 0 or at - first[1] >= SETTLE_S:
            gone.append(version)
            first = first if version >= 0 else None
    return gone


HISTORIES = st.lists(
    st.lists(st.tuples(st.integers(-3, 2), st.integers(0, 12)), max_size=12).map(
        lambda steps: [
            (version, float(sum(step for _, step in steps[: number + 1])))
            for number, (version, _) in enumerate(steps)
        ]
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=12)
@given(HISTORIES)
def test_any_history_passes_as_it_should(histories):
    listed = [
        (stored(f"{name}", f"{version}") if version >= 0 else written(f"{name}", -version), at)
        for name, history in enumerate(histories)
        for version, at in history
    ]
    found = passed(*listed)
    numbers = {
        name: [int(one.etag) if one.etag else -one.size_bytes for one in found.get(f"{name}", [])]
        for name in range(len(histories))
    }
    assert numbers == {name: expected(history) for name, history in enumerate(histories)}


# --- _ListingFilter


def emitted(known, *listed):
    return list(known.to_emit(iter(listed)))


def test_what_is_new_is_told_in_the_first_listings_and_then_now_and_again():
    known = _ListingFilter()
    one = stored("a", "1")
    listings = [emitted(known, one) == [one] for _ in range(_EMITTED_AT_FIRST + 3 * _REPEATED_EVERY)]
    assert all(listings[:_EMITTED_AT_FIRST])
    assert sum(listings[_EMITTED_AT_FIRST:]) == 3


def test_what_was_gone_or_has_changed_is_new():
    known = _ListingFilter()
    one, other = stored("a", "1"), stored("a", "2")
    for _ in range(_EMITTED_AT_FIRST):
        emitted(known, one)
    assert [] in (emitted(known, one), emitted(known, one))  # of two in a row, one is no reminder
    assert [emitted(known, other) for _ in range(_EMITTED_AT_FIRST)] == [[other]] * _EMITTED_AT_FIRST
    emitted(known)
    assert [emitted(known, other) for _ in range(_EMITTED_AT_FIRST)] == [[other]] * _EMITTED_AT_FIRST


def test_dead_letters_are_told_as_recordings_are():
    known = _ListingFilter()
    found = [len(emitted(known, letter("a"))) for _ in range(_EMITTED_AT_FIRST + _REPEATED_EVERY)]
    assert found[:_EMITTED_AT_FIRST] == [1] * _EMITTED_AT_FIRST
    assert sum(found) == _EMITTED_AT_FIRST + 1


VERSIONS = [(name, version) for name in range(6) for version in range(2)]


@settings(max_examples=40)
@given(st.lists(st.frozensets(st.sampled_from(VERSIONS), max_size=1), min_size=30, max_size=70))
def test_whatever_comes_and_goes_nothing_is_left_out_for_long(changes):
    listings = [set(VERSIONS)]
    for changed in changes:
        listings.append(listings[-1] ^ changed)
    known = _ListingFilter()
    in_a_row, silent = {}, {}
    for listing in listings:
        given_ = [stored(f"{name}", f"{version}") for name, version in sorted(listing)]
        found = emitted(known, *given_)
        assert set(found) <= set(given_)
        assert len(found) == len(set(found))
        in_a_row = {one: in_a_row.get(one, 0) + 1 for one in given_}
        silent = {one: 0 if one in found else silent.get(one, 0) + 1 for one in given_}
        for one in given_:
            assert one in found or in_a_row[one] > _EMITTED_AT_FIRST
            assert silent[one] < _REPEATED_EVERY
    assert len(known._times) == len(listings[-1])  # it grows with what there is, and not with what there was


# --- _ListDoFn and WatchRecordings


@pytest.fixture
def archive(tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    for name in ("a.wav", "b.wav"):
        (folder / name).write_bytes(make.wav(make.sound(0.1, 8000), 8000))
    return folder


def listing(dofn, name):
    return [(key, Path(found.uri).name) for key, (found, _) in dofn.process((0.0, str(name)))]


def test_folders_that_are_not_there_yet_are_looked_for_again(tmp_path, caplog):
    dofn = _ListDoFn("mix", None, (), {})
    assert listing(dofn, tmp_path / "soon") == []
    assert listing(dofn, tmp_path / "soon") == []
    assert caplog.text.count(f"input {tmp_path / 'soon'} cannot be listed, will retry: ") == 1
    (tmp_path / "soon").mkdir()
    (tmp_path / "soon" / "a.wav").write_bytes(make.wav(make.sound(0.1, 8000), 8000))
    assert [name for _, name in listing(dofn, tmp_path / "soon")] == ["a.wav"]


def test_a_store_that_is_down_ends_a_listing_and_no_more(caplog):
    dofn = _ListDoFn("mix", None, (), {})

    def down(name):
        yield stored("a", "1")
        raise StorageError("no route to the store")

    dofn._list = down
    assert [name for _, name in listing(dofn, "s3://archive/")] == ["a"]
    assert "input s3://archive/ cannot be listed, will retry: no route to the store" in caplog.text


def test_two_that_watch_the_same_do_not_take_from_each_other(archive):
    one, other = _ListDoFn("mix", None, (), {}), _ListDoFn("mix", None, (), {})
    for _ in range(_EMITTED_AT_FIRST + 2):
        listing(one, archive)
    assert len(listing(other, archive)) == 2


def test_what_several_inputs_find_again_and_again_passes_once(archive):
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        looked = [(float(tick), name) for tick in range(5) for name in (str(archive), f"{archive}/*.wav")]
        listed = pipeline | beam.Create(looked, reshuffle=False) | beam.ParDo(_ListDoFn("left", 1, (), {}))
        new = listed | NewRecordings(0.0)
        _ = new.good | found.into("good")
        _ = new.dead_letters | found.into("letters")
    assert sorted((Path(one.uri).name, one.channel, one.stream) for one in found["good"]) == [
        ("a.wav", "left", 1),
        ("b.wav", "left", 1),
    ]
    assert found["letters"] == []


@pytest.mark.parametrize(
    "name", ["a.csv", "s3://b/a.jsonl", "a.parquet", "x/*.tar", "data-00000.arrow", "list.tsv", "m/*.csv"]
)
def test_what_is_read_from_its_beginning_each_time_cannot_be_watched(name):
    with pytest.raises(ValueError, match="a container; only folders and globs of audio can be watched"):
        check_watched(name)
    with pytest.raises(ValueError, match="af3pipe run"):
        WatchRecordings(["folder/", name])


@pytest.mark.parametrize("name", ["folder/", "folder", "s3://b/**/*.flac", "a.wav", "calls.csv/"])
def test_folders_and_globs_and_files_can_be_watched(name):
    check_watched(name)


def test_nothing_to_watch_is_a_mistake():
    with pytest.raises(ValueError, match="inputs is empty"):
        WatchRecordings([])
