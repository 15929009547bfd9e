"""Resolves device names, and ensures that no two processes use the same GPU.

A process claims a GPU by locking a file named after its UUID, in a folder of the user below the temporary folder. The
kernel releases the lock when the process ends, however it ends. Processes of other users or with another temporary
folder, such as other containers, are not seen.
"""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from af3pipe.models.engine import ModelError

try:
    import fcntl
except ImportError:  # Windows: there no GPU is claimed
    fcntl = None  # type: ignore[assignment]

_WAIT_S = 60.0  # the GPU of an engine that is being closed is soon free
_POLL_S = 0.2
_MEMORY_SHARE = 0.8  # of what is free on a GPU once the model is loaded, for slots; the rest for working
_CPU_MEMORY_SHARE = 0.25  # of all there is


class Claim:
    """A GPU claimed by this process: no other process of this user takes it.

    Attributes:
        gpu: Id of the GPU.
        fd: Descriptor of the locked file. A child process that inherits it keeps the GPU claimed while it lives.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.gpu = path.name
        self.fd = fd
        self._path = path
        self._released = False

    def release(self) -> None:
        """Releases the GPU. A second call does nothing."""
        with _lock:
            users = _claims.get(self._path, ())
            if self._released or self not in users:  # not there: this process is a fork, the claim its parent's
                return
            self._released = True
            _claims[self._path].remove(self)
            if not _claims[self._path]:
                del _claims[self._path]
                fcntl.flock(self.fd, fcntl.LOCK_UN)  # close() is not enough: a fork may have the file open
                os.close(self.fd)


_claims: dict[Path, list[Claim]] = {}  # of this process, whose engines share what they must
_lock = threading.Lock()


def _forget() -> None:
    """Clears the claims in a forked process: they are its parent's, and must end with the parent."""
    global _lock
    _lock = threading.Lock()
    for users in _claims.values():
        os.close(users[0].fd)
    _claims.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def claim(gpus: Sequence[str], folder: Path, *, most: int = 1, wait_s: float = _WAIT_S) -> list[Claim]:
    """Claims up to `most` free GPUs, at least one; if none is free, returns some that this process has already.

    So engines of one process share a GPU if they must, but engines of two processes never do.

    Args:
        gpus: Ids of the GPUs, each a valid file name; the first ones are preferred.
        folder: Folder of the lock files.
        most: Largest number of GPUs.
        wait_s: How long to wait for the first GPU, in seconds.

    Raises:
        ModelError: Other processes have them all.
    """
    paths = [folder / gpu for gpu in gpus]
    deadline = time.monotonic() + wait_s
    while True:
        with _lock:
            try:
                claims = _claim_free(paths, most) or _share_own(paths, most)
            except OSError as error:
                hint = "set TMPDIR to a local folder, or name the device yourself (cuda:0)"
                raise ModelError(f"no GPU can be claimed in {folder} ({error}); {hint}") from error
        if claims:
            return claims
        if time.monotonic() >= deadline:
            raise ModelError(_who_has_them(paths, wait_s))
        time.sleep(_POLL_S)


def _claim_free(paths: Sequence[Path], most: int) -> list[Claim]:
    claims: list[Claim] = []
    for path in paths:
        if len(claims) < most and path not in _claims and (fd := _try_lock(path)) is not None:
            claims.append(Claim(path, fd))
            _claims[path] = claims[-1:]
    return claims


def _share_own(paths: Sequence[Path], most: int) -> list[Claim]:
    own = sorted((path for path in paths if path in _claims), key=lambda path: len(_claims[path]))
    claims = [Claim(path, _claims[path][0].fd) for path in own[:most]]
    for path, claimed in zip(own, claims, strict=False):
        _claims[path].append(claimed)
    return claims


def _try_lock(path: Path) -> int | None:
    """Locks the file and writes this process's id to it; returns its descriptor, or None if it is locked."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return fd


def _who_has_them(paths: Sequence[Path], wait_s: float) -> str:
    holders = ", ".join(sorted({path.read_text() for path in paths}))
    return (
        f"all {len(paths)} GPUs that this process sees are claimed by other processes (pid {holders}), and none was "
        f"given back in {wait_s:g} s. Run one worker process per GPU, end the others, or name a device yourself "
        "(cuda:0): that one is not claimed, and shared"
    )


class Device:
    """A device, and the claim on it if there is one.

    Attributes:
        torch: The torch device.
        claim: None for a device that the user named, and for a CPU.
    """

    def __init__(self, device: torch.device, claim: Claim | None = None) -> None:
        self.torch = device
        self.claim = claim

    def release(self) -> None:
        """Releases the claim, once the device's memory is free. A second call does nothing."""
        if self.claim is not None:
            self.claim.release()


def open_device(name: str) -> Device:
    """Opens the device for one engine; release it when that is closed.

    Args:
        name: `auto` for a claimed GPU, or the CPU if there is none; else torch's name of a device.

    Raises:
        ModelError: There is no such device, or other processes have claimed all GPUs.
    """
    if name != "auto":
        return Device(_named(name))
    return (_claimed(most=1) or [Device(_named("cuda" if torch.cuda.is_available() else "cpu"))])[0]


def open_devices(name: str) -> list[Device]:
    """Opens the devices of several engines; release each when its engine is closed.

    Args:
        name: `all` for every free GPU, or the CPU if there is none; else names for `open_device`, separated by
            commas.

    Raises:
        ModelError: As `open_device`.
    """
    if name == "all":
        return _claimed(most=torch.cuda.device_count()) or [open_device("auto")]
    with contextlib.ExitStack() as undo:
        devices = []
        for part in name.split(","):
            devices.append(open_device(part.strip()))
            undo.callback(devices[-1].release)
        undo.pop_all()
    return devices


def _claimed(most: int) -> list[Device]:
    """Claims up to `most` GPUs; none if there is none, or no way to claim one."""
    if fcntl is None or not torch.cuda.is_available():
        return []
    # By UUID, because CUDA_VISIBLE_DEVICES numbers them anew in every process.
    gpus = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    return [
        Device(torch.device("cuda", gpus.index(claimed.gpu)), claimed)
        for claimed in claim(gpus, claims_folder(), most=most)
    ]


def claims_folder() -> Path:
    """Returns the folder where this user's processes claim GPUs.

    Raises:
        ModelError: The folder belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"af3pipe-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise ModelError(f"no GPU can be claimed: {folder} belongs to another user; remove it, or set TMPDIR")
    return folder


def _named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is not known to torch; use auto, cpu, cuda, cuda:N or all") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise ModelError(f"device {name!r} was requested, but torch sees no CUDA device on this machine")
        if device.index is not None and device.index >= count:
            raise ModelError(f"device {name!r} was requested, but torch sees only cuda:0 to cuda:{count - 1} here")
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())  # torch takes none without a number for a thread
    return device


def free_bytes(device: torch.device) -> int:
    """Returns the memory available for slots, once the model is loaded."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _MEMORY_SHARE)
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        total = 8 << 30
    return int(total * _CPU_MEMORY_SHARE)


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error means that less work at once may succeed."""
    # On the CPU torch raises a plain RuntimeError. What CUDA's libraries allocate themselves fails as a CUDA error,
    # and so do kernels and graphs that are loaded late.
    signs = ("can't allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)


def first_line(error: Exception) -> str:
    """Returns an error's message without the pages of text that torch adds."""
    return str(error).strip().partition("\n")[0]


def is_device_lost(error: Exception) -> bool:
    """Returns whether every further call on the device would fail, so that this process cannot continue."""
    accelerator_error = getattr(torch, "AcceleratorError", ())  # torch 2.8 and later
    lost = isinstance(error, accelerator_error) or "CUDA error" in str(error)
    return lost and not is_out_of_memory(error)
