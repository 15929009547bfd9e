"""Malicious decoders, for `guard.DecoderPool(decoder="tests.audio.hostile:...")`.

Each does what the first bytes of the file say, and decodes anything else as `decode.open_decoding` does.
"""

import ctypes
import io
import os
import signal
import stat
import time
from contextlib import contextmanager, suppress

from af3pipe.audio.decode import open_decoding
from af3pipe.audio.decoding import Decoding

opened = []


def segfault():
    ctypes.string_at(0)


def loop():
    while True:
        pass


def loop_in_c():
    """Holds the interpreter's lock, so that no thread and no signal handler of Python gets its turn."""
    sum(range(1 << 62))


def ignore_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    while True:
        time.sleep(60)


def doze():
    time.sleep(0.2)


def take_memory():
    bytearray(64 << 30)


def take_memory_natively():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    taken = libc.malloc(ctypes.c_size_t(64 << 30))
    ctypes.memset(taken, 1, 1)  # as code does that never looks at what malloc gave


def exit_quietly():
    os._exit(3)


def talk():
    os.write(1, b"talking\n" * 100_000)
    os.write(2, b"talking\n" * 100_000)


def raise_error():
    raise KeyError("no such luck")


def crash_when_used():
    if len(opened) > 1:
        segfault()


def read_for_ever(file):
    while True:
        file.seek(0)
        file.read(1)
        file.seek(1 << 20)
        file.read(1)


def scribble():
    """Onto whatever sockets this process has."""
    for descriptor in range(3, 256):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.write(descriptor, b"mpg123: warning\n")


@contextmanager
def at_open(file, asked):
    opened.append(file)
    _do(file)
    with open_decoding(file, asked) as decoding:
        yield decoding


@contextmanager
def at_close(file, asked):
    """For a WAV file behind the name of what is to be done when all of it is decoded."""
    file.seek(0)
    name = file.read(32)
    with open_decoding(io.BytesIO(_all(file)[32:]), asked) as decoding:
        yield decoding
    _run(name, file)


@contextmanager
def at_block(file, asked):
    """Gives the first block of a WAV file behind the name of what is to be done then."""
    opened.append(file)
    file.seek(0)
    name = file.read(32)
    with open_decoding(io.BytesIO(_all(file)[32:]), asked) as decoding:
        yield _AtSecondBlock(decoding, asked, name, file)


class _AtSecondBlock(Decoding):
    def __init__(self, decoding, asked, name, file):
        super().__init__(decoding.info, decoding.stated_frames, asked.sample_rate)
        self._decoding, self._name, self._file = decoding, name, file

    def pieces(self, parts):
        for piece in self._decoding.pieces(parts):
            self.frames_read = self._decoding.frames_read
            yield piece
            if piece is None:
                _run(self._name, self._file)


def _do(file):
    file.seek(0)
    _run(file.read(32), file)
    file.seek(0)


def _run(name, file):
    action = globals().get(name.rstrip(b"\0").decode(errors="replace"))
    if action is read_for_ever:
        action(file)
    elif action is not None:
        action()


def _all(file):
    file.seek(0)
    data = b""
    while part := file.read(1 << 20):
        data += part
    return data


def on_a_slow_disk(file, asked):
    read = os.pread

    def slow(*arguments):
        time.sleep(0.4)
        return read(*arguments)

    os.pread = slow
    return open_decoding(file, asked)
