"""Runs real runners on this machine: Beam's job service and worker pool, as separate processes."""

import contextlib

from tests.integration.servers import free_port, python_module, serving
from tests.read_tables import read_table

ANSWER_TABLES = ("captions", "transcripts", "answers")
TABLES = (*ANSWER_TABLES, "recordings", "dead_letters")


@contextlib.contextmanager
def portable_runner(folder, *, workers=None, workers_folder=None):
    """Flags for a job service and an external pool of workers.

    Args:
        folder: For logs.
        workers: Variables of the pool's environment, beside this process's.
        workers_folder: The current one of the pool and its workers; the default is this process's.
    """
    job_port, pool_port = free_port(), free_port()
    with (
        serving(
            python_module("apache_beam.runners.portability.local_job_service_main", f"--port={job_port}"),
            job_port,
            log=folder / "job_service.log",
        ),
        serving(
            python_module("apache_beam.runners.worker.worker_pool_main", f"--service_port={pool_port}"),
            pool_port,
            log=folder / "worker_pool.log",
            environment=workers,
            folder=workers_folder,
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
    found = read_table(folder).to_pylist()
    kept = [{key: value for key, value in row.items() if key not in without} for row in found]
    return sorted(kept, key=str)


# A traceback names lines of the runner; the rest of a dead letter is ours.
OF_A_RUN = ("run_id", "created_at", "traceback")
# How a recording came to stand as it does, which a later run tells otherwise.
ON_THE_WAY = ("terminal_state", "answers", "kept_answers", "dead_letters", "kept_dead_letters")


def same_rows(left, right, *, without=OF_A_RUN):
    """Looks whether two outputs hold the same."""
    for table in TABLES:
        assert rows(right, table, without=without) == rows(left, table, without=without), table
