"""Device names, and GPUs claimed between real processes; a claim needs no GPU, only its id."""

import fcntl
import os
import subprocess
import sys
import tempfile
import threading

import pytest
import torch

from af3pipe.models import ModelError
from af3pipe.models.devices import claim, is_device_lost, is_out_of_memory, open_device, open_devices

CLAIM = """
import os, subprocess, sys, time, types
from pathlib import Path
sys.modules["torch"] = types.SimpleNamespace(device=object)  # takes seconds to import, and a claim needs none of it
from af3pipe.models.devices import claim
print("ready", flush=True)
sys.stdin.readline()
claimed, = claim(["gpu-a", "gpu-b"], Path(sys.argv[1]), wait_s=30)
heir = 0
if sys.argv[2] == "inherited":
    heir = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, pass_fds=[claimed.fd]).pid
if sys.argv[2] == "forked":
    begun, begin = os.pipe()
    heir = os.fork()
    if heir == 0:
        os.write(begin, b"x")
        os.close(1)
        time.sleep(60)
    os.read(begun, 1)
print(claimed.gpu, heir, flush=True)
sys.stdin.read()
"""
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def is_claimed(path):
    """Whether the kernel says so to somebody new."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
def start(tmp_path):
    """Starts a process that claims once it is told to, and then holds."""
    processes = []

    def start_(kind="plain"):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", CLAIM, str(tmp_path), kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
        )
        return processes[-1]

    yield start_
    for process in processes:
        process.kill()
        process.communicate()


def claimed_by(*processes):
    """Lets processes claim at the same moment; their GPUs, and the processes that got the claim from them."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.stdout.readline().split() for process in processes]
    return [gpu for gpu, _ in told], [int(heir) for _, heir in told]


@pytest.mark.integration
def test_processes_that_race_get_gpus_of_their_own_and_a_third_waits_for_one_to_end(start, tmp_path):
    first, second = start(), start()
    gpus, _ = claimed_by(first, second)
    assert sorted(gpus) == ["gpu-a", "gpu-b"]
    said = r"all 2 GPUs .* claimed by other processes .* one worker process per GPU"
    with pytest.raises(ModelError, match=said) as caught:
        claim(["gpu-a", "gpu-b"], tmp_path, wait_s=0.3)
    assert str(first.pid) in str(caught.value)
    assert str(second.pid) in str(caught.value)
    threading.Timer(0.5, second.kill).start()  # SIGKILL: it can give back nothing itself
    (got,) = claim(["gpu-a", "gpu-b"], tmp_path, wait_s=30)
    assert got.gpu == gpus[1]
    assert (tmp_path / got.gpu).read_text() == str(os.getpid())
    got.release()
    assert not is_claimed(tmp_path / got.gpu)
    assert is_claimed(tmp_path / gpus[0])


@pytest.mark.integration
@pytest.mark.parametrize(("kind", "lives_on"), [("inherited", True), ("forked", False)])
def test_a_claim_lives_on_in_an_engine_process_but_not_in_a_fork(start, tmp_path, kind, lives_on):
    holder = start(kind)
    (gpu,), (heir,) = claimed_by(holder)
    try:
        holder.kill()
        holder.wait()
        os.kill(heir, 0)
        assert is_claimed(tmp_path / gpu) == lives_on
    finally:
        os.kill(heir, 9)
    (got,) = claim([gpu], tmp_path, wait_s=30)
    got.release()


def test_as_many_as_are_free_are_claimed_and_released_once(tmp_path):
    with (tmp_path / "b").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        claims = claim(["a", "b", "c", "d"], tmp_path, most=4, wait_s=0)
        assert [claimed.gpu for claimed in claims] == ["a", "c", "d"]
    claims[1].release()
    again = claim(["c"], tmp_path, wait_s=0)
    claims[1].release()  # a second time: it is somebody else's by now
    assert is_claimed(tmp_path / "c")
    for claimed in claims + again:
        claimed.release()
    assert not any(is_claimed(tmp_path / name) for name in "acd")


def test_engines_of_one_process_share_a_gpu_where_no_other_is_free(tmp_path):
    first, second, third = (claim(["a", "b"], tmp_path, wait_s=0)[0] for _ in range(3))
    assert [first.gpu, second.gpu, third.gpu] == ["a", "b", "a"]
    first.release()
    assert is_claimed(tmp_path / "a")
    third.release()
    assert not is_claimed(tmp_path / "a")
    second.release()


@no_gpu
def test_names_without_a_gpu():
    assert (open_device("auto").torch.type, open_device("auto").claim) == ("cpu", None)
    assert [str(device.torch) for device in open_devices("all")] == ["cpu"]
    assert [str(device.torch) for device in open_devices("cpu, cpu")] == ["cpu", "cpu"]
    with pytest.raises(ModelError, match="'cuda:1' was requested, but torch sees no CUDA device"):
        open_devices("cpu,cuda:1")


@pytest.mark.parametrize("name", ["gpu0", "", "cpu,", "cpu,all"])
def test_names_that_torch_does_not_know(name):
    with pytest.raises(ModelError, match="is not known to torch; use auto, cpu, cuda, cuda:N or all"):
        open_devices(name)


def test_a_folder_of_somebody_else_is_not_trusted(tmp_path, monkeypatch):
    from af3pipe.models.devices import claims_folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert claims_folder().stat().st_mode & 0o777 == 0o700
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    (tmp_path / f"af3pipe-{me + 1}").mkdir()
    with pytest.raises(ModelError, match="belongs to another user"):
        claims_folder()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),  # cudaErrorMemoryAllocation: the device is well
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    ],
)
def test_too_little_memory_is_no_lost_device(error):
    assert is_out_of_memory(error)
    assert not is_device_lost(error)


def test_a_lost_device_is_not_too_little_memory():
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert is_device_lost(error)
    assert not is_out_of_memory(error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_claims_a_gpu_by_its_uuid(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    device = open_device("auto")
    assert (device.torch.type, device.torch.index) == ("cuda", 0)
    lock = tmp_path / f"af3pipe-{os.getuid()}" / str(torch.cuda.get_device_properties(0).uuid)
    assert is_claimed(lock)
    device.release()
    assert not is_claimed(lock)
    assert open_device("cuda").torch == torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(ModelError, match="torch sees only cuda:0 to cuda:"):
        open_device("cuda:99")


@pytest.mark.gpu
@pytest.mark.integration
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_auto_in_two_processes_claims_two_gpus(tmp_path):
    code = """
import sys
from af3pipe.models.devices import open_device
device = open_device("auto")
print(device.claim.gpu, flush=True)
sys.stdin.read()
"""
    settings = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=env, **settings) for _ in range(2)]
    gpus = {process.stdout.readline() for process in processes}
    for process in processes:
        process.communicate()
    assert len(gpus - {""}) == 2
