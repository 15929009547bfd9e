"""Runs a real Flink session cluster on this machine, and Beam's job server for it, as processes that can be killed.

A JobManager, TaskManagers, a pool of external Beam workers beside each TaskManager, and Beam's job server. In a
deployment the pool is a sidecar, and `localhost:50000` is another one in every TaskManager's pod. Here all share a
machine, so each TaskManager has a hosts file of its own, in which the one name `worker-pool` is its own pool.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import urllib.request
from pathlib import Path

import pytest

from tests.integration.fetch_flink import flink_home
from tests.integration.servers import free_port, python_module, serving
from tests.waiting import wait_until

_POOL = "worker-pool"
# Of Flink's own configuration for Java 17.
_JAVA_OPENS = [
    f"--add-{kind}={name}=ALL-UNNAMED"
    for kind, names in {
        "exports": [
            "java.base/sun.net.util",
            "java.rmi/sun.rmi.registry",
            "jdk.compiler/com.sun.tools.javac.api",
            "jdk.compiler/com.sun.tools.javac.file",
            "jdk.compiler/com.sun.tools.javac.parser",
            "jdk.compiler/com.sun.tools.javac.tree",
            "jdk.compiler/com.sun.tools.javac.util",
            "java.security.jgss/sun.security.krb5",
        ],
        "opens": [
            f"java.base/java.{package}"
            for package in (
                "lang",
                "net",
                "io",
                "nio",
                "lang.reflect",
                "text",
                "time",
                "util",
                "util.concurrent",
                "util.concurrent.atomic",
                "util.concurrent.locks",
            )
        ]
        + ["java.base/sun.nio.ch"],
    }.items()
    for name in names
]
# What Flink's start scripts would work out from the machine's size.
_TASK_MANAGER = {
    "taskmanager.cpu.cores": "1.0",
    "taskmanager.memory.framework.heap.size": "128m",
    "taskmanager.memory.framework.off-heap.size": "128m",
    "taskmanager.memory.task.heap.size": "256m",
    "taskmanager.memory.task.off-heap.size": "0",
    "taskmanager.memory.network.min": "96m",
    "taskmanager.memory.network.max": "96m",
    # Each exchange that waits for all of its input holds 512 of 32 KiB otherwise, in every slot.
    "taskmanager.network.sort-shuffle.min-buffers": "64",
    "taskmanager.memory.managed.size": "128m",
    "taskmanager.memory.jvm-metaspace.size": "256m",
    "taskmanager.memory.jvm-overhead.min": "192m",
    "taskmanager.memory.jvm-overhead.max": "192m",
}
_CLUSTER = {
    "jobmanager.rpc.address": "127.0.0.1",
    "jobmanager.bind-host": "127.0.0.1",
    "jobmanager.memory.process.size": "1g",
    "rest.address": "127.0.0.1",
    "rest.bind-address": "127.0.0.1",
    "taskmanager.host": "127.0.0.1",
    "taskmanager.bind-host": "127.0.0.1",
    # A worker that is gone is noticed soon, and what it did is done again.
    "heartbeat.interval": "1000",
    "heartbeat.timeout": "8000",
    "restart-strategy.type": "fixed-delay",
    "restart-strategy.fixed-delay.attempts": "20",
    "restart-strategy.fixed-delay.delay": "1 s",
}

# They start several times as fast, and run for a minute.
_JAVA = ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
# To the console, which is each server's log.
_LOGGING = """rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
appender.console.name = console
appender.console.type = CONSOLE
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss,SSS} %-5p %c{1} - %m%n
"""


def missing():
    """Why no cluster can be started here; empty where one can."""
    if shutil.which("java") is None:
        return "java is not on the path: install a JRE, 11 or 17"
    if not all((flink_home() / name).is_dir() for name in ("lib", "job_server")):
        return f"Flink is not in {flink_home()}: python -m tests.integration.fetch_flink"
    return ""


class Server:
    """A server that can be killed, and started again where it was."""

    def __init__(self, command, port, *, log, environment=None):
        self._arguments = (command, port)
        self._settings = {"log": log, "environment": environment}
        self._running = contextlib.ExitStack()
        self.port = port
        self.log = log
        self.pid = None

    def start(self):
        process = self._running.enter_context(serving(*self._arguments, **self._settings))
        self.pid = process.pid

    def kill(self):
        """With SIGKILL, and all that it started."""
        os.killpg(self.pid, signal.SIGKILL)
        self.stop()

    def stop(self):
        self._running.close()


class Cluster:
    """What runs: `job_manager`, `job_server`, and lists of `task_managers` and their `pools`."""

    def __init__(self, folder, task_managers, slots, pool_module):
        self._folder = folder
        self._slots = slots
        self._rest, rpc_port = free_port(), free_port()
        self._pool_port = free_port()
        self._config = {
            **_CLUSTER,
            "jobmanager.rpc.port": rpc_port,
            "rest.port": self._rest,
            "rest.bind-port": self._rest,
            "taskmanager.numberOfTaskSlots": slots,
            "io.tmp.dirs": folder / "tmp",
        }
        (folder / "tmp").mkdir()
        lines = [f"{name}: {value}\n" for name, value in self._config.items()]
        (folder / "config.yaml").write_text("".join(lines))
        (folder / "log4j.properties").write_text(_LOGGING)
        self.job_manager = self._flink(
            "job_manager", "runtime.entrypoint.StandaloneSessionClusterEntrypoint", self._rest, java=["-Xmx512m"]
        )
        self.job_server = self._job_server()
        self.pools = [self._pool(number, pool_module) for number in range(task_managers)]
        self.task_managers = [self._task_manager(number) for number in range(task_managers)]

    @property
    def servers(self):
        return [self.job_manager, *self.pools, *self.task_managers, self.job_server]

    @property
    def flags(self):
        """For a job that takes all slots."""
        return [
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{self.job_server.port}",
            f"--flink_master=127.0.0.1:{self._rest}",
            "--environment_type=EXTERNAL",
            f"--environment_config={_POOL}:{self._pool_port}",
            f"--parallelism={self._slots * len(self.task_managers)}",
            # Else one task that fails has all of them begin again.
            "--execution_mode_for_batch=BATCH_FORCED",
        ]

    def ask(self, path):
        """What the JobManager answers over REST: `ask("/jobs/overview")`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._rest}{path}", timeout=20) as answer:
            return json.load(answer)

    def jobs(self):
        """All jobs, the newest first."""
        return sorted(self.ask("/jobs/overview")["jobs"], key=lambda job: -job["start-time"])

    def wait_for_task_managers(self, number):
        wait_until(lambda: len(self.ask("/taskmanagers")["taskmanagers"]) == number, f"{number} TaskManagers")

    def records_read(self, job_id):
        """By TaskManager and step, how many records of a job it was given."""
        found = {}
        for vertex in self.ask(f"/jobs/{job_id}")["vertices"]:
            for row in self.ask(f"/jobs/{job_id}/vertices/{vertex['id']}/taskmanagers")["taskmanagers"]:
                found.setdefault(row["taskmanager-id"], {})[vertex["name"]] = row["metrics"]["read-records"]
        return found

    def _flink(self, name, entry_point, port, *, java=(), settings=None):
        log = self._folder / f"{name}.log"
        command = [*_JAVA, *java, *_JAVA_OPENS, f"-Dlog4j.configurationFile={self._folder / 'log4j.properties'}"]
        command += ["-cp", f"{flink_home() / 'lib'}/*", f"org.apache.flink.{entry_point}"]
        command += ["--configDir", str(self._folder)]
        for key, value in (settings or {}).items():
            command += ["-D", f"{key}={value}"]
        return Server(command, port, log=log)

    def _pool_address(self, number):
        return f"127.0.0.{2 + number}"

    def _pool(self, number, module):
        command = python_module(module, f"{self._pool_address(number)}:{self._pool_port}")
        log = self._folder / f"pool_{number}.log"
        # As many threads as there are cores, in each of the pools, would be in each other's way.
        settings = {"OMP_NUM_THREADS": "1"}
        return Server(command, (self._pool_address(number), self._pool_port), log=log, environment=settings)

    def _task_manager(self, number):
        hosts = self._folder / f"hosts_{number}"
        hosts.write_text(f"127.0.0.1 localhost {socket.gethostname()}\n{self._pool_address(number)} {_POOL}\n")
        port = free_port()
        return self._flink(
            f"task_manager_{number}",
            "runtime.taskexecutor.TaskManagerRunner",
            port,
            java=["-Xmx384m", f"-Djdk.net.hosts.file={hosts}"],
            settings={**_TASK_MANAGER, "taskmanager.rpc.port": port},
        )

    def _job_server(self):
        port = free_port()
        command = [*_JAVA, "-Xmx512m", "-cp", f"{flink_home() / 'job_server'}/*"]
        command += ["org.apache.beam.runners.flink.FlinkJobServerDriver", f"--flink-master=127.0.0.1:{self._rest}"]
        command += [f"--job-port={port}", "--artifact-port=0", "--expansion-port=0"]
        command += [f"--artifacts-dir={self._folder / 'artifacts'}"]
        return Server(command, port, log=self._folder / "job_server.log")


@contextlib.contextmanager
def flink_cluster(folder, *, task_managers=2, slots=1, pool_module="tests.integration.worker_pool"):
    """Starts all of a `Cluster`, or skips the test where Flink is not there."""
    if why := missing():
        pytest.skip(why)
    folder.mkdir(exist_ok=True)
    cluster = Cluster(folder, task_managers, slots, pool_module)
    with contextlib.ExitStack() as running:
        for server in cluster.servers:
            running.callback(server.stop)
            server.start()
        cluster.wait_for_task_managers(task_managers)
        yield cluster


def children(pid):
    """Processes that a process started."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
