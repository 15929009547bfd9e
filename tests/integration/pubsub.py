"""Runs Google's Pub/Sub emulator and Beam's Prism as separate processes."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from af3pipe.transforms.inputs.pubsub import subscriber
from tests.integration.servers import free_port, serving

_WITH_SDK = "platform/pubsub-emulator/lib"
# Where Debian's and Google's packages, and Google's own installer, put the SDK.
_SDKS = ("/usr/lib/google-cloud-sdk", "/usr/share/google-cloud-sdk", "/opt/google-cloud-sdk", "~/google-cloud-sdk")


def emulator_jar():
    """The emulator's jar below the Cloud SDK; None where it is not installed."""
    on_path = shutil.which("gcloud")
    roots = [os.environ.get("CLOUDSDK_ROOT_DIR"), on_path and Path(on_path).resolve().parents[1], *_SDKS]
    for root in filter(None, roots):
        for jar in Path(root).expanduser().glob(f"{_WITH_SDK}/cloud-pubsub-emulator-*.jar"):
            return jar
    return None


def is_missing():
    """Whether something is not on this machine that these tests run."""
    return emulator_jar() is None or not shutil.which("java") or not shutil.which("prism")


@contextlib.contextmanager
def pubsub_emulator(folder):
    """Starts it, and has clients in this process and in those it starts find it; yields its `host:port`."""
    java, jar = shutil.which("java"), emulator_jar()
    if java is None or jar is None:
        pytest.skip(
            "Google's Pub/Sub emulator is not here: apt-get install google-cloud-cli-pubsub-emulator and Java"
        )
    port = free_port()
    command = [java, "-jar", str(jar), "--host=127.0.0.1", f"--port={port}"]
    with pytest.MonkeyPatch.context() as patch, serving(command, port, log=folder / "pubsub.log"):
        patch.setenv("PUBSUB_EMULATOR_HOST", f"127.0.0.1:{port}")
        subscriber.cache_clear()  # the client of an emulator that an earlier test had
        yield f"127.0.0.1:{port}"
        subscriber.cache_clear()


@contextlib.contextmanager
def prism(folder):
    """Starts Beam's local streaming runner; yields flags that submit to it, with workers in this process."""
    binary = shutil.which("prism")
    if binary is None:
        pytest.skip("prism is not on the path: go install github.com/apache/beam/sdks/v2/go/cmd/prism@v2.77.0")
    port = free_port()
    command = [binary, f"--job_port={port}", "--serve_http=false", "--idle_shutdown_timeout=-1s"]
    with serving(command, port, log=folder / "prism.log"):
        yield ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}", "--environment_type=LOOPBACK"]
