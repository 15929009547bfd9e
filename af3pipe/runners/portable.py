"""Beam's portable runner: a job server of any kind that is already running."""

from af3pipe.runners.flink import Flink
from af3pipe.runners.runner import RunnerError


class Portable(Flink):
    """Submits to a job server that may be Flink's. Beam cannot find out, so it is treated as Flink's."""

    def check_own_server(self) -> None:
        raise RunnerError(
            "the portable runner needs --job-endpoint HOST:PORT, the address of a running job server; or name the "
            "runner that is to start one: --runner flink, --runner prism"
        )
