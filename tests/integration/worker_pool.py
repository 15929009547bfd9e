"""Runs Beam's pool of external workers on one address: Beam's program listens on all, so two would share a port.

    python -m tests.integration.worker_pool 127.0.0.2:50000

As `python -m apache_beam.runners.worker.worker_pool_main --service_port=50000` beside a TaskManager in a pod.
"""

import sys

import grpc
from apache_beam.portability.api import beam_fn_api_pb2_grpc
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
from apache_beam.utils import thread_pool_executor


def serve(address: str, *, use_process: bool = True) -> None:
    """Serves until it is killed.

    Args:
        address: host:port.
        use_process: Whether a worker is a process of its own, and not a thread of this one.
    """
    server = grpc.server(thread_pool_executor.shared_unbounded_instance())
    pool = BeamFnExternalWorkerPoolServicer(use_process=use_process)
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    server.add_insecure_port(address)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    serve(sys.argv[1])
