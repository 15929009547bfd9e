"""A slice of `python -m benchmarks.fuzz`: broken files in the real pipeline; and that the harness would notice."""

import os
import signal
import subprocess
import time
import uuid

import pytest

from benchmarks import fuzz, fuzz_worker
from tests import mutations
from tests.mutations import case
from tests.originals import FORMATS, missing_encoders, original

pytestmark = pytest.mark.integration
FILES = 500


@pytest.fixture(scope="module", autouse=True)
def encoders():
    """For all formats; looked for here, since every run of tests imports this file."""
    if missing := missing_encoders():
        pytest.skip(f"needs an ffmpeg program that encodes {', '.join(missing)}")


@pytest.mark.representative
def test_a_file_of_each_format_ends_in_one_state_and_all_kinds_of_damage_are_met(tmp_path):
    """Each format once, damaged in the next way: one worker process, one policy."""
    step = len(FORMATS)
    cases = [case(number + step * (number % len(mutations.KINDS))) for number in range(step)]
    assert {found.format for found in cases} == set(FORMATS)
    assert {found.kind for found in cases} == set(mutations.KINDS)
    broken = []
    model = fuzz.small_model(tmp_path / "model")
    fates = fuzz._run_chunk(cases, tmp_path / "chunk", model, "truncate", broken, [])
    assert broken == []
    assert sorted(fate.case.number for fate in fates) == sorted(found.number for found in cases)
    assert {fate.state for fate in fates} == {"ok", "ok_partial", "dead_letter"}
    assert [(fate.case.number, fate.surprise) for fate in fates if fate.surprise] == []


@pytest.fixture(scope="module")
def result():
    return fuzz.fuzz(FILES, seed=0, chunk=-(-FILES // len(fuzz.POLICIES)))


@pytest.mark.slow
def test_every_broken_file_ends_in_one_state_and_takes_nothing_with_it(result):
    assert result.broken == []
    assert [fate.state for fate in result.fates if fate.state not in ("ok", "ok_partial", "dead_letter")] == []
    assert len({fate.case.number for fate in result.fates}) == FILES


@pytest.mark.slow
def test_nothing_surprises_the_decoders(result):
    assert [(fate.case.number, fate.surprise) for fate in result.surprises] == []


@pytest.mark.slow
def test_the_slice_has_all_formats_and_nearly_all_kinds(result):
    assert {fate.case.format for fate in result.fates} == set(FORMATS)
    assert {fate.case.kind for fate in result.fates} >= set(list(mutations.KINDS)[: FILES // len(FORMATS)])
    assert {fate.state for fate in result.fates} == {"ok", "ok_partial", "dead_letter"}


# Of those whose encoders put a number by chance or the time of day into the file.
BY_CHANCE = ("wav float", "ogg vorbis", "ogg opus", "webm", "mka")


@pytest.mark.parametrize("names", [BY_CHANCE, pytest.param(tuple(FORMATS), marks=pytest.mark.slow)], ids=len)
def test_a_file_is_the_same_every_time(names, monkeypatch):
    numbers = [list(FORMATS).index(name) for name in names]
    before = [case(number) for number in numbers]
    monkeypatch.setattr(mutations, "original", original.__wrapped__)  # so that it is encoded once more
    assert [case(number) for number in numbers] == before
    assert case(3, seed=1) != case(3)


def row(number, state, **others):
    return {"uri": f"/folder/{case(number).name}", "terminal_state": state, "covered_s": 1.0} | others


def letter(number, **others):
    return {"uri": f"/folder/{case(number).name}", "reason": "decode_error", "detail": "", "traceback": None} | others


def test_a_file_without_a_state_or_with_two_is_noticed():
    broken = []
    fates = list(fuzz.fates_of([case(0), case(1)], [row(0, "ok"), row(0, "ok")], [], broken))
    assert [fate.state for fate in fates] == ["no state", "no state"]
    assert len(broken) == 2


def test_a_dead_letter_that_was_not_written_is_noticed():
    broken = []
    list(fuzz.fates_of([case(0)], [row(0, "dead_letter")], [], broken))
    assert "0 dead letters" in broken[0]


def test_a_row_of_no_file_is_noticed():
    broken = []
    list(fuzz.fates_of([case(0)], [row(0, "ok"), row(1, "ok")], [letter(2)], broken))
    assert len(broken) == 2


def test_an_exception_nobody_foresaw_is_noticed():
    found = letter(0, detail="KeyError: 7", traceback="Traceback ...")
    (fate,) = fuzz.fates_of([case(0)], [row(0, "dead_letter")], [found], [])
    assert fate.surprise == "KeyError: 7"


def test_a_whole_file_that_is_not_answered_whole_is_noticed():
    whole = case(0)
    assert whole.kind == "unchanged"
    good = fuzz.Fate(whole, "ok", covered_s=whole.original_s)
    assert not list(fuzz.wrong_about(good, "split"))
    assert list(fuzz.wrong_about(good._replace(covered_s=whole.original_s / 2), "split"))
    assert list(fuzz.wrong_about(fuzz.Fate(whole, "dead_letter", "decode_error"), "split"))


@pytest.mark.slow
def test_a_worker_that_fails_is_noticed(tmp_path):
    run = fuzz_worker.work("run", str(tmp_path / "nothing"), str(tmp_path / "out"), "demo", "split")
    assert run.told is None
    assert run.died.startswith("ended with 1: ")
    assert "no input matched" in run.died
    assert run.left == []


@pytest.mark.slow
def test_the_file_that_hangs_a_worker_is_found_and_the_others_are_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_worker, "FILE_LIMIT_S", 6.0)
    for name in ("a.wav", "c.wav"):
        (tmp_path / name).write_bytes(original("wav 16 bit", 0).content)
    os.mkfifo(tmp_path / "b.wav")  # opening it blocks until somebody writes
    model = fuzz.small_model(tmp_path.with_name("model"))
    assert fuzz_worker.culprits(tmp_path, model) == {"b.wav": "hung for 6 s"}


def test_a_process_that_is_left_is_named_and_ended():
    mark = uuid.uuid4().hex
    process = subprocess.Popen(["sleep", "600"], env=os.environ | {"AF3PIPE_FUZZ_RUN": mark}, start_new_session=True)
    while not fuzz_worker._marked(mark):  # a process has no environment yet while it is being started
        time.sleep(0.01)
    assert fuzz_worker._end_what_is_left(mark, grace_s=0.2) == ["sleep 600"]
    assert process.wait() == -signal.SIGKILL
