import gzip
import io
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from af3pipe.audio import guard
from af3pipe.audio.decode import decode
from af3pipe.audio.decoder_process import GuardError
from af3pipe.audio.decoding import Asked, Part
from af3pipe.audio.guard import DecoderError, DecoderPool
from af3pipe.audio.guarded import DecoderLimits
from af3pipe.audio.recording import read_segments
from af3pipe.audio.segments import AudioLimits
from af3pipe.schemas import Reason, Recording, Rejected, Stage
from tests import fixtures_audio as make
from tests.audio.test_decode import FailingFile, slow

RATE = 16000
ASKED = Asked(RATE)
WAV = make.wav(make.sound(25, 8000), 8000)
LIMITS = AudioLimits(sample_rate=RATE, max_samples=4 * RATE, min_samples=480, window_samples=RATE)
QUICK = DecoderLimits(timeout_s=1.0, memory_mib=256)
AT_OPEN = "tests.audio.hostile:at_open"
AT_BLOCK = "tests.audio.hostile:at_block"


@pytest.fixture(scope="module")
def pool():
    with DecoderPool() as pool:
        yield pool


@pytest.fixture
def hostile():
    with DecoderPool(QUICK, decoder=AT_OPEN) as pool:
        yield pool


def decoded(pool, file):
    with pool.open(file, ASKED) as decoding:
        blocks = [block.copy() for block in decoding.blocks()]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def rejection(pool, data):
    with pytest.raises(Rejected) as caught:
        decoded(pool, io.BytesIO(data))
    return caught.value


def command(name, data=WAV):
    return name.encode().ljust(32, b"\0") + data


def processes(pool):
    return [process._process.pid for process in pool._idle]


@pytest.mark.parametrize(
    "encode", [make.wav, make.mp3, *slow(make.flac, make.mp3_without_length, make.ogg, make.m4a, make.adts)]
)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_equals_decoding_in_process(pool, encode, where, tmp_path):
    data = make.encoded(encode, 33.3, 22050, 2)
    (tmp_path / "file").write_bytes(data)
    for asked in ({}, {"offset_s": 3.7, "duration_s": 21.5}):
        expected = list(decode(io.BytesIO(data), sample_rate=RATE, **asked))
        with (
            io.BytesIO(data) if where == "memory" else (tmp_path / "file").open("rb") as file,
            pool.open(file, ASKED) as decoding,
        ):
            found = [block.copy() for block in decoding.blocks(Part(**asked))]
            state = (decoding.ended, decoding.info.decoder)
        assert len(found) == len(expected)
        for block, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(block, other)
        assert state == (
            not asked,
            "pyav" if encode not in (make.wav, make.flac) else "soundfile",
        )


@pytest.mark.parametrize("policy", ["dead-letter", "truncate", "split"])
def test_gives_the_same_segments(pool, policy):
    recording = Recording("id", "file.wav", offset_s=1.0, duration_s=None if policy != "dead-letter" else 3.0)

    def segments(**how):
        found = read_segments(io.BytesIO(WAV), recording, limits=LIMITS, over_length=policy, **how)
        return [piece._replace(samples=piece.samples.tobytes()) for piece in found]

    assert segments(open_decoding=pool.open) == segments()


def test_one_process_serves_one_recording_after_another():
    with DecoderPool() as pool:
        for _ in range(3):
            assert len(decoded(pool, io.BytesIO(WAV))) == 25 * RATE
        with pool.open(io.BytesIO(WAV), ASKED) as decoding:
            assert decoding.info.sample_rate == 8000
        with pool.open(io.BytesIO(WAV), ASKED) as decoding:
            assert 0 < len(next(decoding.blocks())) < 11 * RATE
        with pytest.raises(Rejected):
            decoded(pool, io.BytesIO(b"no audio"))
        [process] = pool._idle
        assert process.recordings == 6


def test_each_open_recording_has_a_process_of_its_own():
    data = [make.wav(make.sound(25, 8000, seed=seed), 8000) for seed in range(6)]
    with DecoderPool() as pool, ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda one: decoded(pool, io.BytesIO(one)), data * 4))
        assert 1 <= len(pool._idle) <= 3
    for index, samples in enumerate(found):
        [*expected] = decode(io.BytesIO(data[index % 6]), sample_rate=RATE)
        np.testing.assert_array_equal(samples, np.concatenate(expected))


def test_a_rejection_is_what_it_is_in_process(pool):
    for data in (b"", b"no audio at all", WAV[:90_000], make.mp4_video(None)):
        with pytest.raises(Rejected) as expected:
            list(decode(io.BytesIO(data), sample_rate=RATE))
        found = rejection(pool, data)
        assert vars(found) == vars(expected.value)


CRASHES = {
    "segfault": "died of SIGSEGV",
    "take_memory_natively": "died of SIGSEGV",
    "exit_quietly": "ended with exit status 3",
}
HANGS = ["loop_in_c", *slow("loop", "ignore_signals", "read_for_ever")]


@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_costs_one_recording(hostile, name):
    rejected = rejection(hostile, command(name))
    assert (rejected.stage, rejected.reason) == (Stage.PROBE, Reason.DECODER_CRASHED)
    assert rejected.detail == f"The decoder process {CRASHES[name]} while it opened the file."
    assert rejected.reason.retryable
    assert len(decoded(hostile, io.BytesIO(WAV))) == 25 * RATE


@pytest.mark.parametrize("name", HANGS)
def test_a_hang_costs_one_recording(hostile, name):
    rejected = rejection(hostile, command(name))
    assert (rejected.stage, rejected.reason) == (Stage.PROBE, Reason.DECODE_TIMEOUT)
    assert "took longer than 1 s" in rejected.detail
    assert len(decoded(hostile, io.BytesIO(WAV))) == 25 * RATE


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("segfault", Reason.DECODER_CRASHED),
        pytest.param("loop", Reason.DECODE_TIMEOUT, marks=pytest.mark.slow),
        ("take_memory", Reason.OUT_OF_MEMORY),
    ],
)
def test_in_the_middle_of_a_recording_the_place_is_told(name, reason):
    with DecoderPool(QUICK, decoder=AT_BLOCK) as pool:
        rejected = rejection(pool, command(name))
        assert (rejected.stage, rejected.reason, rejected.decoder) == (Stage.DECODE, reason, "soundfile")
        assert rejected.position_s == pytest.approx(10, abs=10)
        assert len(decoded(pool, io.BytesIO(command("")))) == 25 * RATE


def test_a_decoder_that_wants_too_much_memory_is_ended_and_says_so(hostile):
    rejected = rejection(hostile, command("take_memory"))
    assert rejected.reason is Reason.OUT_OF_MEMORY
    assert "256 MiB" in rejected.detail
    assert len(decoded(hostile, io.BytesIO(WAV))) == 25 * RATE


def test_a_tiny_file_that_unfolds_to_much_takes_no_more_than_its_share():
    bomb = make.flac(np.zeros((20 * 192_000, 8), np.float32), 192_000)
    assert len(bomb) < 100_000
    with DecoderPool(DecoderLimits(memory_mib=64)) as pool:
        rejected = rejection(pool, bomb)
        assert rejected.reason is Reason.OUT_OF_MEMORY
        assert "64 MiB" in rejected.detail
        assert len(decoded(pool, io.BytesIO(WAV))) == 25 * RATE
    with DecoderPool() as pool:
        assert len(decoded(pool, io.BytesIO(bomb))) == 20 * RATE


def test_who_was_there_before_is_not_blamed_on_the_next(hostile):
    decoded(hostile, io.BytesIO(WAV))
    before = processes(hostile)
    # Dies because the process was used; in a new one it decodes.
    assert rejection(hostile, command("crash_when_used", b"")).reason is Reason.UNSUPPORTED_FORMAT
    assert processes(hostile) != before


@pytest.mark.parametrize(
    ("name", "reason", "whole"),
    [
        ("segfault", Reason.DECODER_CRASHED, True),
        ("segfault", Reason.DECODER_CRASHED, False),
        pytest.param("loop", Reason.DECODE_TIMEOUT, True, marks=pytest.mark.slow),
        pytest.param("loop", Reason.DECODE_TIMEOUT, False, marks=pytest.mark.slow),
    ],
)
def test_what_happens_while_a_recording_is_closed_is_not_the_next_one_s(name, reason, whole):
    with DecoderPool(QUICK, decoder="tests.audio.hostile:at_close") as pool:
        decoded(pool, io.BytesIO(command("")))
        if whole:
            assert rejection(pool, command(name)).reason is reason
        else:
            with pool.open(io.BytesIO(command(name)), ASKED) as decoding:
                next(decoding.blocks())
        for _ in range(3):
            assert len(decoded(pool, io.BytesIO(command("")))) == 25 * RATE


def test_what_is_no_message_costs_the_recording_of_a_new_process_only(hostile):
    rejected = rejection(hostile, command("scribble"))
    assert rejected.reason is Reason.DECODER_CRASHED
    assert "sent an invalid message" in rejected.detail
    assert len(decoded(hostile, io.BytesIO(WAV))) == 25 * RATE


def test_a_process_killed_from_outside_costs_nothing():
    expected = np.concatenate(list(decode(io.BytesIO(WAV), sample_rate=RATE)))
    with DecoderPool() as pool, pool.open(io.BytesIO(WAV), ASKED) as decoding:
        found = []
        for block in decoding.blocks():
            found.append(block.copy())
            if len(found) == 2:  # as the system does where memory is short
                os.kill(decoding._session._process._process.pid, signal.SIGKILL)
        assert decoding.ended
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_a_recording_is_decoded_once(pool):
    with pool.open(io.BytesIO(WAV), ASKED) as decoding:
        for _ in decoding.blocks():
            pass
        with pytest.raises(RuntimeError, match="open it again"):
            next(decoding.blocks())


@pytest.mark.parametrize("limits", [(0, 1024), (float("inf"), 1024), (float("nan"), 1024), (60, 1), (60, 1 << 44)])
def test_limits_that_no_process_can_be_given(limits):
    with pytest.raises(ValueError, match="it must be"):
        DecoderPool(DecoderLimits(*limits))


def test_a_slow_disk_is_no_slow_decoder(tmp_path):
    (tmp_path / "made.wav").write_bytes(WAV)
    slow = DecoderPool(QUICK, decoder="tests.audio.hostile:on_a_slow_disk")
    with slow as pool, (tmp_path / "made.wav").open("rb") as file:
        assert len(decoded(pool, file)) == 25 * RATE


def test_where_imports_come_from_oddly_it_starts_all_the_same(monkeypatch, tmp_path):
    (tmp_path / "json.py").write_text("raise ImportError('not this one')")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path / "with: colon", ""])
    monkeypatch.chdir(tmp_path)
    with DecoderPool() as pool:
        assert len(decoded(pool, io.BytesIO(WAV))) == 25 * RATE
    monkeypatch.chdir(gone)
    gone.rmdir()
    with DecoderPool() as pool:
        assert len(decoded(pool, io.BytesIO(WAV))) == 25 * RATE


@pytest.mark.parametrize("missing", ["memfd_create", "TMPDIR"])
def test_it_takes_a_temporary_file_or_memory(monkeypatch, missing):
    if missing == "TMPDIR":
        monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    else:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    with DecoderPool() as pool:
        assert len(decoded(pool, io.BytesIO(WAV))) == 25 * RATE


def test_where_there_is_neither_no_recording_is_blamed(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with DecoderPool() as pool, pytest.raises(GuardError, match="/nowhere"):
        decoded(pool, io.BytesIO(WAV))


def test_a_fork_leaves_the_processes_to_the_one_that_started_them():
    with DecoderPool() as pool:
        decoded(pool, io.BytesIO(WAV))
        child = os.fork()
        if not child:
            os._exit(0 if not pool._idle and len(decoded(pool, io.BytesIO(WAV))) == 25 * RATE else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert len(decoded(pool, io.BytesIO(WAV))) == 25 * RATE
        assert len(pool._idle) == 1


def test_a_process_that_died_while_idle_is_replaced(hostile):
    decoded(hostile, io.BytesIO(WAV))
    [before] = processes(hostile)
    os.kill(before, signal.SIGKILL)
    assert len(decoded(hostile, io.BytesIO(WAV))) == 25 * RATE
    assert processes(hostile) != [before]


def test_what_a_decoder_prints_goes_nowhere(hostile, capfd):
    rejection(hostile, command("talk"))
    assert capfd.readouterr() == ("", "")


def test_an_unexpected_error_brings_its_traceback(hostile):
    with pytest.raises(DecoderError, match="KeyError: 'no such luck'") as caught:
        decoded(hostile, io.BytesIO(command("raise_error")))
    assert "hostile.py" in str(caught.value.__cause__)
    assert len(decoded(hostile, io.BytesIO(WAV))) == 25 * RATE


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_error_of_the_store_is_raised_as_it_is(pool, share):
    error = Rejected(Stage.READ, Reason.UNREADABLE, "gone")
    file = FailingFile(make.encoded(make.wav, 40, 44100), share, error)
    with pytest.raises(Rejected) as caught:
        decoded(pool, file)
    assert caught.value is error


def test_a_slow_store_is_no_slow_decoder(hostile):
    class SlowFile(io.BytesIO):
        def read(self, size=-1):
            time.sleep(0.4)
            return super().read(size)

    assert len(decoded(hostile, SlowFile(WAV))) == 25 * RATE  # 4 reads: more than the second that a step may take


def test_a_consumer_may_take_its_time(hostile):
    with hostile.open(io.BytesIO(WAV), ASKED) as decoding:
        for number, _ in enumerate(decoding.blocks()):
            if number == 1:
                time.sleep(1.2)  # more than a step may take


def test_a_gzip_file_is_read_as_what_it_holds(pool, tmp_path):
    with gzip.open(tmp_path / "made.wav.gz", "wb") as file:
        file.write(WAV)
    with gzip.open(tmp_path / "made.wav.gz", "rb") as file:
        assert len(decoded(pool, file)) == 25 * RATE


def test_a_pool_that_is_closed_leaves_no_process():
    pool = DecoderPool()
    with pool.open(io.BytesIO(WAV), ASKED) as decoding:
        decoded(pool, io.BytesIO(WAV))
        ended = processes(pool)
        pool.close()
        running = decoding._session._process._process
        assert running.poll() is None
    assert running.poll() is not None
    for pid in ended:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_where_no_process_can_be_started_nobody_else_is_blamed(monkeypatch):
    with DecoderPool(decoder="tests.audio.hostile:no_such") as pool, pytest.raises(GuardError, match="no_such"):
        decoded(pool, io.BytesIO(WAV))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with DecoderPool() as pool, pytest.raises(GuardError, match="/nowhere/python"):
        decoded(pool, io.BytesIO(WAV))


@pytest.mark.parametrize("name", ["", *slow("loop")])
def test_a_decoder_process_does_not_outlive_its_parent(name, tmp_path):
    script = f"""
        import io, os, threading, time
        from af3pipe.audio.decoding import Asked
        from af3pipe.audio.guard import DecoderPool
        from af3pipe.audio.guarded import DecoderLimits
        pool = DecoderPool(DecoderLimits(timeout_s=1), decoder={AT_OPEN!r})
        data = open({str(tmp_path / "good")!r}, "rb").read()
        with pool.open(io.BytesIO(data), Asked(16000)) as decoding:
            list(decoding.blocks())
        print(pool._idle[0]._process.pid, flush=True)
        process = pool._idle[0]._process
        used = lambda: int(open(f"/proc/{{process.pid}}/stat").read().rpartition(")")[2].split()[11])
        before = used()
        hostile = io.BytesIO({name!r}.encode().ljust(32, b"\\0") + data)
        opening = threading.Thread(target=lambda: pool.open(hostile, Asked(16000)).__enter__(), daemon=True)
        opening.start()
        while opening.is_alive() and used() < before + 20:  # it is open, or in the loop for 0.2 s
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    """
    (tmp_path / "good").write_bytes(WAV)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, env=env, check=False
    )
    pid = int(run.stdout)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists() or not _is_running(pid)


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_thread_that_ends_leaves_its_process_to_the_others(pool):
    thread = threading.Thread(target=decoded, args=(pool, io.BytesIO(WAV)))
    thread.start()
    thread.join()
    assert len(decoded(pool, io.BytesIO(WAV))) == 25 * RATE


def test_of_many_that_were_open_at_once_a_few_are_kept(monkeypatch):
    monkeypatch.setattr(guard, "_MOST_IDLE", 2)
    with DecoderPool() as pool:
        taken = [pool.take(new=True) for _ in range(guard._MOST_IDLE + 1)]
        for process in taken:
            pool.give_back(process)
        assert len(pool._idle) == guard._MOST_IDLE
        assert [process._process.poll() is None for process in taken].count(True) == guard._MOST_IDLE
