"""Many parts of one object in one pass: each ends as it does alone, and together they cost one decoding."""

import functools
import io
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.audio import recording as under_test
from af3pipe.audio.decode import decode, open_decoding
from af3pipe.audio.guard import DecoderPool
from af3pipe.audio.guarded import DecoderLimits
from af3pipe.audio.recording import read_parts, read_segments
from af3pipe.audio.segments import AudioLimits
from af3pipe.schemas import Reason, Recording, Rejected, Segment, Stage
from tests import fixtures_audio as make
from tests.audio.test_decode import FailingFile
from tests.audio.test_recording import CountingFile

RATE = 16000
LIMITS = AudioLimits(sample_rate=RATE, max_samples=4 * RATE, min_samples=480, window_samples=RATE)
LENGTH_S = 33.3


def part(offset_s=0.0, duration_s=None, channel="mix", stream=None, name="id"):
    return Recording(name, "file", offset_s=offset_s, duration_s=duration_s, channel=channel, stream=stream)


def ends(file, parts, over_length="split", **how):
    """Of each part its segments, and at last what ended it; each ended once, and in order of time."""
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    found = [[] for _ in parts]
    for index, outcome in read_parts(file, parts, limits=LIMITS, over_length=over_length, **how):
        before = found[index]
        assert not before or (not isinstance(before[-1], Rejected) and not before[-1].is_last)
        before.append(outcome)
    for wanted, outcomes in zip(parts, found, strict=True):
        assert isinstance(outcomes[-1], Rejected) or outcomes[-1].is_last
        segments = [outcome for outcome in outcomes if isinstance(outcome, Segment)]
        assert [segment.segment_index for segment in segments] == list(range(len(segments)))
        assert all(segment.recording is wanted for segment in segments)
    return found


def reasons(found):
    return [outcomes[-1].reason if isinstance(outcomes[-1], Rejected) else None for outcomes in found]


def described(outcome):
    """All there is to compare of an outcome; which words a decoder has for an error depends on where it began."""
    if isinstance(outcome, Segment):
        return outcome._replace(recording=None, samples=outcome.samples.tobytes())
    place = () if outcome.reason is Reason.DECODE_ERROR else (outcome.detail, outcome.position_s)
    return outcome.stage, outcome.reason, outcome.decoder, *place


def alone(data, wanted, **how):
    found = []
    try:
        for segment in read_segments(io.BytesIO(data), wanted, limits=LIMITS, **how):
            found.append(described(segment))
    except Rejected as rejected:
        found.append(described(rejected))
    return found


class Passes:
    """Counts the passes, and keeps which parts each was given."""

    def __init__(self, open_=open_decoding):
        self.parts = []
        self._open = open_

    @contextmanager
    def __call__(self, file, asked):
        with self._open(file, asked) as decoding:
            pieces = decoding.pieces
            decoding.pieces = lambda parts: self.parts.append(parts) or pieces(parts)
            yield decoding


def wav_float(samples, rate):
    return make.wav(samples, rate, "FLOAT")


def broken(data, share=0.5, count=300):
    data, start = bytearray(data), int(len(data) * share)
    data[start : start + count] = bytes(count)
    return bytes(data)


def with_nan():
    samples = make.sound(LENGTH_S, 22050, 2)
    samples[round(14.2 * 22050), 1] = np.nan
    return wav_float(samples, 22050)


def without_length(data):
    data = bytearray(data)
    data[40:44] = bytes(4)
    return bytes(data)


def changing_channels():
    return make.adts(make.sound(12, 44100, 2), 44100) + make.adts(make.sound(9, 44100, 1), 44100)


FILES = {
    "wav": lambda: make.encoded(make.wav, LENGTH_S, 44100, 2),
    "wav at the rate": lambda: make.encoded(make.wav, LENGTH_S, RATE, 1),
    "wav cut": lambda: FILES["wav"]()[:-700_000],
    "wav without a length": lambda: without_length(make.encoded(make.wav, LENGTH_S, 8000, 1)),
    "wav with a NaN": with_nan,
    "flac": lambda: make.encoded(make.flac, LENGTH_S, 22050, 2),
    "flac broken": lambda: broken(FILES["flac"]()),
    "flac broken near its end": lambda: broken(FILES["flac"](), 0.999, 100),
    "flac cut": lambda: FILES["flac"]()[: int(0.6 * len(FILES["flac"]()))],
    "mp3": lambda: make.encoded(make.mp3, LENGTH_S, 44100, 2),
    "mp3 cut": lambda: FILES["mp3"]()[: int(0.7 * len(FILES["mp3"]()))],
    "mp3 broken": lambda: broken(FILES["mp3"](), 0.4, 20_000),
    "mp3 without a length": lambda: make.encoded(make.mp3_without_length, LENGTH_S, 16000, 1),
    "m4a": lambda: make.encoded(make.m4a, LENGTH_S, 44100, 2),
    "m4a cut": lambda: FILES["m4a"]()[: int(0.8 * len(FILES["m4a"]()))],
    "ogg cut": lambda: make.encoded(make.ogg, LENGTH_S, 48000, 1)[:-5000],
    "adts changing": changing_channels,
    "two streams": lambda: make.two_streams(make.sound(14, RATE, 1), make.sound(14, RATE, 2), RATE),
    "no audio": lambda: b"nothing that any decoder knows" * 9,
    "empty": lambda: b"",
}


@functools.cache
def made(name):
    return FILES[name]()


@functools.cache
def expected(name, wanted, over_length, tolerance_s):
    return alone(made(name), wanted, over_length=over_length, split_tolerance_s=tolerance_s)


# On a grid, so that parts are equal, nest and touch, and so that what a part alone gives is worked out once.
offsets = st.one_of(
    st.just(0.0), st.integers(0, 80).map(lambda half: half / 2), st.sampled_from([14.19, 33.29, 60.0])
)
durations = st.sampled_from([None, 0.0, 0.02, 0.5, 3.0, 4.0, 4.01, 7.3, 20.0])
wanted_parts = st.builds(
    part,
    offsets,
    durations,
    st.sampled_from(["mix", "mix", "left", "right", "0", "7"]),
    st.sampled_from([None, None, None, 0, 1, 5]),
)
policies = st.sampled_from([("dead-letter", 0.0), ("truncate", 0.0), ("split", 0.0), ("split", 1.5)])


def check_each(name, parts, policy):
    over_length, tolerance_s = policy
    found = ends(made(name), parts, over_length, split_tolerance_s=tolerance_s)
    for wanted, outcomes in zip(parts, found, strict=True):
        assert [described(outcome) for outcome in outcomes] == expected(name, wanted, *policy), wanted


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.lists(wanted_parts, min_size=1, max_size=9), policies)
def test_each_part_ends_as_it_does_alone(name, parts, policy):
    check_each(name, parts, policy)


@pytest.mark.parametrize(
    ("name", "parts", "over_length"),
    [
        (
            "wav",
            [part(0, 20), part(3, 4), part(3, 4), part(3, 4, "left"), part(40), part(33.29), part(5, 0)],
            "split",
        ),
        ("flac broken", [part(10, 10), part(16, 0.5), part(20, 3), part(0, 3), part(16.5, None)], "split"),
        ("flac cut", [part(10), part(19.5), part(20, 3), part(30, 3), part(0, 3)], "dead-letter"),
        ("wav with a NaN", [part(14.19, 3), part(14.19, 0), part(14.5, 3), part(0, 20)], "split"),
        ("adts changing", [part(), part(1, 2, "left"), part(10, 5, "right"), part(15, 3)], "split"),
        ("two streams", [part(stream=0), part(stream=1, channel="right"), part(stream=5)], "truncate"),
    ],
)
def test_each_of_these_ends_as_it_does_alone(name, parts, over_length):
    check_each(name, parts, (over_length, 0.0))


@pytest.fixture(scope="module")
def pool():
    with DecoderPool() as pool:
        yield pool


PARTS = [
    *(part(second * 1.7, 3.4) for second in range(22)),
    part(2, 9, "left"),
    part(2, 9, "right"),
    part(3, None),
    part(70, 2),
    part(1, 0),
    part(1, 1, "7"),
    *(part(0.01 * index, 20) for index in range(9)),
]


@pytest.mark.parametrize("name", ["wav", "flac broken", "flac cut", "mp3", "m4a cut", "wav with a NaN", "no audio"])
@pytest.mark.parametrize("over_length", ["dead-letter", "truncate", "split"])
def test_in_another_process_it_is_the_same(pool, name, over_length):
    here = ends(made(name), PARTS, over_length)
    there = ends(made(name), PARTS, over_length, open_decoding=pool.open)
    assert [list(map(described, outcomes)) for outcomes in there] == [
        list(map(described, outcomes)) for outcomes in here
    ]


@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "m4a"])
def test_many_parts_are_one_pass_over_the_file(name):
    file, passes = CountingFile(made(name)), Passes()
    parts = [part(index / 10, 0.2) for index in range(333)]
    found = ends(file, parts, open_decoding=passes)
    assert reasons(found) == [None] * 333
    assert len(passes.parts) == 1
    assert file.bytes_read < 1.05 * len(made(name)) + 100_000


@pytest.mark.parametrize(("name", "passes"), [("flac", 1), ("mp3", 2)])
def test_channels_share_a_pass(name, passes):
    counted = Passes()
    parts = [part(0, 3), part(0, 3, "left"), part(0, 3, "right"), part(0, 3, "1")]
    mix, left, right, second = (outcomes[-1].samples for outcomes in ends(made(name), parts, open_decoding=counted))
    assert len(counted.parts) == passes
    np.testing.assert_array_equal(right, second)
    assert np.abs(left - right).max() > 0.01
    np.testing.assert_allclose((left + right) / 2, mix, rtol=0, atol=1e-5)


def test_one_part_that_several_recordings_are_is_decoded_for_all_of_them():
    passes = Passes()
    parts = [part(1, 5, name=str(index)) for index in range(3)]
    found = ends(made("wav"), parts, open_decoding=passes)
    assert list(map(len, passes.parts)) == [1]
    assert [[segment.recording.recording_id for segment in outcomes] for outcomes in found] == [
        ["0", "0"],
        ["1", "1"],
        ["2", "2"],
    ]


def test_a_long_gap_is_skipped_and_what_follows_the_last_part_is_not_decoded():
    data = make.encoded(make.wav, 300, 8000)
    file = CountingFile(data)
    assert reasons(ends(file, [part(200, 3), part(5, 3)])) == [None, None]
    assert file.bytes_read < 0.15 * len(data)
    file = CountingFile(make.encoded(make.mp3, 120, 16000))
    assert reasons(ends(file, [part(40, 3), part(5, 3)])) == [None, None]
    assert 0.3 < file.bytes_read / len(file.getvalue()) < 0.6


@pytest.mark.slow
def test_what_does_not_fit_into_memory_at_once_is_decoded_again(monkeypatch):
    monkeypatch.setattr(under_test, "BUFFERED_S", 120.0)
    data = make.encoded(make.wav, LENGTH_S, 8000, 1)
    passes = Passes()
    parts = [part(index / 1000, 10) for index in range(2000)]  # all of them want the seconds from 2 to 10
    assert reasons(ends(data, parts, "truncate", open_decoding=passes)) == [None] * 2000
    assert len(passes.parts) == -(-2000 // 30)  # each gathers 4 s, the cap
    assert max(map(len, passes.parts)) == 30


def test_parts_that_never_overlap_all_fit(monkeypatch):
    monkeypatch.setattr(under_test, "BUFFERED_S", 5.0)
    passes = Passes()
    ends(made("wav"), [part(index, 1) for index in range(33)], open_decoding=passes)
    assert len(passes.parts) == 1
    ends(made("wav"), [part(index * 4.5, None) for index in range(7)], "truncate", open_decoding=(passes := Passes()))
    assert len(passes.parts) == 1  # each ends at the cap of 4 s
    ends(made("wav"), [part(0, None), part(0.5, 1), part(1, 1)], open_decoding=(passes := Passes()))
    assert list(map(len, passes.parts)) == [2, 1]


MEMORY = """
import tracemalloc
from af3pipe.audio import recording
from tests.audio.test_parts import *

recording.BUFFERED_S = 30.0
data = make.encoded(make.wav, 60, 8000, 1)
parts = [part(index / 100, 20) for index in range(1000)]
list(read_parts(io.BytesIO(data), parts[:1], limits=LIMITS, over_length="split"))
tracemalloc.start()
for _, outcome in read_parts(io.BytesIO(data), parts, limits=LIMITS, over_length="split"):
    assert isinstance(outcome, Segment)
    del outcome
print(tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.slow
def test_memory_is_bounded_however_many_overlap():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    # 30 s, and what a pass needs whatever it reads: a block of 10 s in two shapes, its resampled form, the parts.
    assert int(done.stdout) < 4 * RATE * 30 + 8_000_000


@pytest.mark.parametrize("duration_s", [0.01, 0.1, pytest.param(12, marks=pytest.mark.slow)])
def test_a_decoder_process_needs_little_memory_however_many_parts_there_are(duration_s):
    parts = [part(index / 50, duration_s) for index in range(1000)]
    with DecoderPool(DecoderLimits(memory_mib=64)) as pool:
        found = ends(made("wav"), parts, "truncate", open_decoding=pool.open)
    assert reasons(found) == [Reason.TOO_SHORT if duration_s < 0.03 else None] * 1000


def test_the_parts_in_front_of_a_break_and_behind_it_are_unharmed():
    found = ends(made("flac broken"), [part(0, 5), part(14, 4), part(16, 9), part(20, 5), part(21, 5)])
    assert reasons(found) == [None, Reason.DECODE_ERROR, Reason.DECODE_ERROR, None, None]
    for rejected in (found[1][-1], found[2][-1]):
        assert rejected.position_s == pytest.approx(16.6, abs=0.5)
    found = ends(made("mp3 cut"), [part(0, 5), part(20, 2), part(22, 9), part(30, 2)])
    assert reasons(found) == [None, None, Reason.DECODE_SHORT, Reason.DECODE_SHORT]


@pytest.mark.parametrize("name", ["wav", "mp3"])
def test_an_error_of_the_store_ends_the_parts_that_have_not_ended(name):
    parts = [part(2, 4), part(3, None), part(30, 2)]
    gone = Rejected(Stage.READ, Reason.UNREADABLE, "gone")
    found = ends(FailingFile(made(name), 0.8, gone), parts, "truncate")
    assert reasons(found) == [None, None, Reason.UNREADABLE]
    assert found[2][-1] is gone
    reading = read_parts(FailingFile(made(name), 0.8, OSError("gone")), parts, limits=LIMITS, over_length="split")
    given = []
    with pytest.raises(OSError, match="gone"):
        given += ((index, outcome.is_last) for index, outcome in reading)
    assert (0, True) in given
    assert (1, True) not in given


def command(name, data):
    return name.encode().ljust(32, b"\0") + data


QUICK = DecoderLimits(timeout_s=1.0, memory_mib=256)
SPREAD = [part(1, 3), part(8, 1), part(8, 9), part(15, 3), part(25, 3)]


@pytest.mark.parametrize(
    ("name", "reason"), [("segfault", Reason.DECODER_CRASHED), ("take_memory", Reason.OUT_OF_MEMORY)]
)
def test_a_decoder_that_dies_costs_the_parts_that_have_not_ended(name, reason):
    with DecoderPool(QUICK, decoder="tests.audio.hostile:at_block") as pool:
        found = ends(command(name, made("wav")), SPREAD, open_decoding=pool.open)
        assert reasons(found) == [None, None, reason, reason, reason]
        for outcomes in found[2:]:
            assert outcomes[-1].stage is Stage.DECODE
            assert outcomes[-1].position_s == pytest.approx(10, abs=1)
        # Another file's turn before: the process may be to blame, so it is decoded again in a new one.
        assert reasons(ends(command("", made("wav")), SPREAD, open_decoding=pool.open)) == [None] * 5
        found = ends(command("crash_when_used", made("wav")), SPREAD, open_decoding=pool.open)
        assert reasons(found) == [None] * 5
    alone_ = ends(made("wav"), SPREAD)
    assert [list(map(described, outcomes)) for outcomes in found] == [
        list(map(described, outcomes)) for outcomes in alone_
    ]


def test_a_process_killed_from_outside_costs_nothing(pool):
    reading = read_parts(
        io.BytesIO(made("mp3")),
        PARTS,
        limits=LIMITS,
        over_length="split",
        open_decoding=(passes := Passes(pool.open)),
    )
    found = [[] for _ in PARTS]
    killed = 0
    for number, (index, outcome) in enumerate(reading):
        found[index].append(described(outcome))
        if number == 9:
            [process] = [process for process in pool._processes if process._process.poll() is None]
            os.kill(process._process.pid, signal.SIGKILL)
            killed += 1
    assert killed
    assert len(passes.parts) == 2
    assert found == [list(map(described, outcomes)) for outcomes in ends(made("mp3"), PARTS)]


def test_a_step_of_a_decoder_is_short_however_far_away_the_first_part_is():
    data = make.encoded(make.mp3, 80, 16000)
    with DecoderPool(QUICK, decoder="tests.audio.hostile:at_block") as pool:  # 0.2 s a block, 1 s a step
        assert reasons(ends(command("doze", data), [part(75, 2)], open_decoding=pool.open)) == [None]


def test_many_parts_take_no_more_messages_than_one(pool):
    def messages(parts):
        sent = []
        with pool.open(io.BytesIO(made("wav")), under_test.Asked(RATE)) as decoding:
            ask = decoding._session._ask
            decoding._session._ask = lambda process, kind: sent.append(kind) or ask(process, kind)
            for _ in decoding.pieces([under_test._part(one, POLICY) for one in parts]):
                pass
        return len(sent)

    assert messages([part(index / 10, 0.1) for index in range(333)]) <= messages([part()]) + 1


POLICY = under_test._Policy(LIMITS, "split", 0.0, -60.0)


@pytest.mark.parametrize("wrong", [part(-1), part(float("nan")), part(0, float("inf"))])
def test_a_part_that_is_no_range_is_a_mistake_of_the_caller(wrong):
    with pytest.raises(ValueError, match="must be finite"):
        next(read_parts(io.BytesIO(made("wav")), [part(), wrong], limits=LIMITS, over_length="split"))


def test_no_parts_are_none():
    assert list(read_parts(io.BytesIO(b""), [], limits=LIMITS, over_length="split")) == []


def test_the_samples_are_those_of_decoding_the_range():
    found = ends(made("flac"), [part(3.3, 8.8), part(7.7, 3.1)])
    for outcomes, asked in zip(found, ((3.3, 8.8), (7.7, 3.1)), strict=True):
        range_ = decode(io.BytesIO(made("flac")), sample_rate=RATE, offset_s=asked[0], duration_s=asked[1])
        np.testing.assert_array_equal(
            np.concatenate([segment.samples for segment in outcomes]), np.concatenate(list(range_))
        )


def test_planning_loads_no_decoder():
    code = (
        "import sys, af3pipe.audio.recording, af3pipe.audio.guard; "
        "print({'av', 'soundfile', 'soxr'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
