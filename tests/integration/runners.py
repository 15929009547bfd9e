"""Real runners on this machine: Beam's job service and worker pool, as processes of their own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset as ds

ANSWER_TABLES = ("captions", "transcripts", "answers")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for_port(port, process, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"{process.args} did not listen on {port} in {seconds} s")


@contextlib.contextmanager
def serving(module, port, *arguments, log):
    """Runs a module as a server in a process group of its own, and ends the whole group afterwards."""
    # Beam's pool starts its workers as `python`, whichever comes first on the path.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PATH": path},
        )
        try:
            wait_for_port(port, process)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


@contextlib.contextmanager
def portable_runner(folder):
    """Flags for a job service and an external pool of workers."""
    job_port, pool_port = free_port(), free_port()
    with (
        serving(
            "apache_beam.runners.portability.local_job_service_main",
            job_port,
            f"--port={job_port}",
            log=folder / "job_service.log",
        ),
        serving(
            "apache_beam.runners.worker.worker_pool_main",
            pool_port,
            f"--service_port={pool_port}",
            log=folder / "worker_pool.log",
        ),
    ):
        yield [
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{job_port}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{pool_port}",
        ]


def rows(output, table, *, without=("run_id", "created_at")):
    """A table's rows, sorted, without what differs from run to run."""
    folder = output / table
    if not folder.exists():
        return []
    found = ds.dataset(folder, format="parquet").to_table().to_pylist()
    kept = [{key: value for key, value in row.items() if key not in without} for row in found]
    return sorted(kept, key=str)
