"""Runners by name, and what is told of one that cannot be used: before anything is started or written."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest
from apache_beam.options.pipeline_options import FlinkRunnerOptions
from apache_beam.portability.api import beam_fn_api_pb2_grpc, beam_job_api_pb2, beam_job_api_pb2_grpc
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer

from af3pipe.pipelines import batch
from af3pipe.pipelines.beam_flags import beam_options, split_beam_flags
from af3pipe.pipelines.job import JobError, make_job
from af3pipe.runners import flink as flink_runner
from af3pipe.runners import job_server as servers
from af3pipe.runners.check import check_runner
from af3pipe.runners.flink_options import FlinkOptions
from af3pipe.runners.names import runner_name
from af3pipe.runners.runner import RunnerError
from tests.integration.servers import free_port

BASE = {"inputs": ["a.wav"], "output": "out", "model": "demo"}
POOL = ["--environment_type=EXTERNAL", "--environment_config=pool.example:50000"]


def options(*flags, **beam):
    _, spelt = split_beam_flags(flags)
    return beam_options(make_job(BASE | {"beam": beam}), spelt)


def problem(*flags, **beam):
    with pytest.raises(RunnerError) as error:
        check_runner(options(*flags, **beam))
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "beams"),
    [
        ("flink", "FlinkRunner"),
        ("Flink", "FlinkRunner"),
        ("FlinkRunner", "FlinkRunner"),
        ("flink-runner", "FlinkRunner"),
        ("dataflow", "DataflowRunner"),
        ("prism", "PrismRunner"),
        ("portable", "PortableRunner"),
        ("local", "FnApiRunner"),
        ("DirectRunner", "DirectRunner"),
        (
            "apache_beam.runners.direct.direct_runner.DirectRunner",
            "apache_beam.runners.direct.direct_runner.DirectRunner",
        ),
    ],
)
def test_runners_have_short_names(name, beams):
    assert runner_name(name) == beams
    assert options("--runner", name).get_all_options()["runner"] == beams
    assert options(runner=name).get_all_options()["runner"] == beams


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flnk", "did you mean flink? Choose from local, flink, prism, portable, dataflow"),
        ("DataflwRunner", "did you mean DataflowRunner?"),
        ("xyz", "'xyz', which is not known; Choose from local"),
        ("no.such.Runner", "cannot be imported: No module named 'no'"),
        ("apache_beam.NoRunner", "cannot be imported: module 'apache_beam' has no attribute 'NoRunner'"),
    ],
)
def test_an_unknown_runner(name, says):
    with pytest.raises(JobError) as error:
        options("--runner", name)
    assert says in str(error.value)


def test_options_of_beam_may_be_written_with_dashes():
    assert split_beam_flags(["a-b.wav", "--flink-master", "h:1", "--job-endpoint=h-1:2"]) == (
        ["a-b.wav"],
        ["--flink_master", "h:1", "--job_endpoint=h-1:2"],
    )
    assert options("--runner=flink", "--flink-master", "h:1").view_as(FlinkRunnerOptions).flink_master == "h:1"
    assert options(**{"runner": "flink", "flink-master": "h:1"}).view_as(FlinkRunnerOptions).flink_master == "h:1"
    with pytest.raises(JobError, match=r"--flink-mastr is neither.* did you mean --flink_master"):
        split_beam_flags(["--flink-mastr", "h:1"])
    with pytest.raises(JobError, match=r"beam.flink-mastr is neither"):
        options(**{"flink-mastr": "h:1"})


def test_flinks_own_options_are_known_and_unset_ones_have_no_value():
    given = options(
        "--checkpointing-interval=30000", "--max_bundle_time_millis", "500", runner="flink", operator_chaining=False
    )
    found = given.view_as(FlinkOptions)
    assert (found.checkpointing_interval, found.max_bundle_time_mills, found.operator_chaining) == (30000, 500, False)
    assert (found.object_reuse, found.savepoint_path, found.attached_mode) == (None, None, None)
    switched = options("--object-reuse", runner="flink", attached_mode=True, faster_copy=False).view_as(FlinkOptions)
    assert (switched.object_reuse, switched.attached_mode, switched.faster_copy) == (True, True, None)
    with pytest.raises(JobError, match=r"did you mean --checkpointing_interval"):
        split_beam_flags(["--checkpoint-interval=30000"])
    with pytest.raises(JobError, match=r"--operator_chaining: 'no' is neither true nor false"):
        split_beam_flags(["--operator-chaining=no"])


@pytest.fixture
def impatient(monkeypatch):
    """Waits for what will not answer a tenth of the usual time."""
    for module in (servers, flink_runner):
        monkeypatch.setattr(module, "TIMEOUT_S", module.TIMEOUT_S / 10)


class _JobServer(beam_job_api_pb2_grpc.JobServiceServicer):
    """Tells its options as Beam's Flink job server does, keeps what it is given, and runs nothing."""

    def __init__(self):
        self.given = {}

    def DescribePipelineOptions(self, request, context):  # noqa: N802
        kinds = beam_job_api_pb2.PipelineOptionType
        told = {
            "checkpointing_interval": (kinds.INTEGER, "-1"),
            "operator_chaining": (kinds.BOOLEAN, "true"),
            "savepoint_path": (kinds.STRING, ""),
            "flink_master": (kinds.STRING, "[auto]"),
        }
        described = [
            beam_job_api_pb2.PipelineOptionDescriptor(name=name, type=kind, default_value=default)
            for name, (kind, default) in told.items()
        ]
        return beam_job_api_pb2.DescribePipelineOptionsResponse(options=described)

    def Prepare(self, request, context):  # noqa: N802
        self.given = {key.split(":")[2]: value for key, value in dict(request.pipeline_options).items()}
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "this server runs nothing")


@contextmanager
def served(add, servicer):
    server = grpc.server(ThreadPoolExecutor(4))
    add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@pytest.fixture
def job_server():
    servicer = _JobServer()
    with served(beam_job_api_pb2_grpc.add_JobServiceServicer_to_server, servicer) as endpoint:
        yield servicer, endpoint


def test_flinks_own_options_reach_the_job_server(job_server, tmp_path, caplog):
    servicer, endpoint = job_server
    (tmp_path / "a.wav").write_bytes(b"never read")
    job = make_job(
        BASE | {"inputs": str(tmp_path), "output": str(tmp_path / "out"), "beam": {"operator_chaining": False}}
    )
    flags = [
        "--runner=flink",
        f"--job_endpoint={endpoint}",
        "--environment_type=LOOPBACK",
        "--flink_master=flink.example:8081",
        "--checkpointing-interval=30000",
        "--max-bundle-size=7",
        "--parallelism=2",
        "--object-reuse",
    ]
    with pytest.raises(batch.RunFailed, match="this server runs nothing"):
        batch.run(job, flags)
    expected = {
        "flink_master": "flink.example:8081",
        "checkpointing_interval": "30000",  # as Beam sends whole numbers
        "max_bundle_size": "7",
        "parallelism": "2",
        "object_reuse": True,
        "operator_chaining": False,
    }
    assert {key: servicer.given.get(key) for key in expected} == expected
    assert not {"savepoint_path", "attached_mode", "max_bundle_time_mills"} & set(servicer.given)
    assert "unparseable" not in caplog.text


def test_a_job_server_that_is_there(job_server):
    _, endpoint = job_server
    check_runner(options("--runner=portable", "--job-endpoint", endpoint, *POOL))
    check_runner(options("--runner=flink", "--flink-master=nowhere.example:1", "--job-endpoint", endpoint, *POOL))
    assert "where do the workers run?" in problem("--runner=portable", "--job-endpoint", endpoint)


def test_no_job_server(impatient):
    port = free_port()
    told = problem("--runner=portable", f"--job-endpoint=localhost:{port}", *POOL)
    assert f"no job server answers at localhost:{port}" in told
    assert "--job-endpoint" in told
    assert "java -jar beam-runners-flink" in told
    assert "needs --job-endpoint HOST:PORT" in problem("--runner=portable")


def test_a_worker_pool_is_no_job_server():
    add = beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server
    with served(add, BeamFnExternalWorkerPoolServicer()) as endpoint:
        assert "something else: UNIMPLEMENTED" in problem("--runner=portable", f"--job-endpoint={endpoint}", *POOL)


@contextmanager
def rest_server(reply):
    """Answers every GET as Flink's REST server would answer /config."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/config" else 404)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def flink(version):
    return rest_server(json.dumps({"refresh-interval": 3000, "flink-version": version}).encode())


@pytest.fixture
def java(tmp_path, monkeypatch):
    """A java on the path: Beam looks for it by its name."""
    (tmp_path / "java").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_a_flink_cluster_that_is_there(java, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # the job server's Java would not use it either
    with flink("1.19.1") as master:
        check_runner(options("--runner=flink", "--flink-master", master, "--flink-version=1.19", *POOL))
        check_runner(options("--runner=flink", f"--flink-master=http://{master}/", "--flink-version=1.19", *POOL))


def test_no_flink_cluster(java):
    told = problem("--runner=flink", f"--flink-master=localhost:{free_port()}", *POOL)
    assert told.startswith("no Flink cluster answers at http://localhost:")
    assert "(Connection refused)" in told
    assert "start-cluster.sh" in told
    with rest_server(b"hello") as master:
        assert f"no Flink cluster answers at http://{master}" in problem("--runner=flink", f"--flink-master={master}")


def test_a_cluster_that_never_answers_is_given_up(java, impatient):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert "(timed out)" in problem("--runner=flink", f"--flink-master=127.0.0.1:{port}", *POOL)


def test_a_flink_of_another_version_than_the_job_server(java):
    with flink("1.19.1") as master:
        told = problem("--runner=flink", f"--flink-master={master}", "--flink-version=2.0", *POOL)
        assert "is 1.19.1, and the job server would be for 2.0: add --flink-version 1.19" in told
    with flink("1.12.0") as master:
        assert "Beam has one for ['1.19'" in problem("--runner=flink", f"--flink-master={master}", *POOL)


def test_without_java(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    told = problem("--runner=flink")
    assert "needs 'java', and that is not on the path" in told
    assert "--job-endpoint" in told


def test_where_workers_run_is_asked_before_they_have_no_af3pipe(java):
    with flink("1.19.1") as master:
        cluster = ["--runner=flink", f"--flink-master={master}", "--flink-version=1.19"]
        told = problem(*cluster)
        assert "which has no af3pipe" in told
        assert "worker_pool_main" in told
        check_runner(options(*cluster, "--environment-type=LOOPBACK"))
        check_runner(options(*cluster, "--sdk_container_image=registry.example/af3pipe"))
    check_runner(options("--runner=flink"))  # a cluster of its own, with workers here


def test_a_pool_that_does_not_answer_here_is_only_warned_of(job_server, caplog):
    _, endpoint = job_server
    port = free_port()
    external = ["--environment_type=EXTERNAL", f"--environment_config=localhost:{port}"]
    check_runner(options("--runner=portable", f"--job_endpoint={endpoint}", *external))
    assert f"no worker pool answers at localhost:{port} from here (Connection refused)" in caplog.text
    assert f"worker_pool_main --service_port {port}" in caplog.text


def test_a_pool_beside_task_managers_elsewhere_is_not_looked_for_here(java, caplog):
    external = ["--environment_type=EXTERNAL", f"--environment_config=localhost:{free_port()}"]
    with flink("1.19.1") as master:
        elsewhere = master.replace("127.0.0.1", "0.0.0.0")  # this machine, but by no name of loopback
        check_runner(options("--runner=flink", f"--flink-master={elsewhere}", "--flink-version=1.19", *external))
    assert caplog.text == ""


OWN_FLAGS = {
    "--dry-run=true": ("dataflow",),
    "--region=r": ("dataflow",),
    "--temp-location=gs://b/t": ("dataflow",),
    "--num-workers=3": ("dataflow",),
    "--flink-master=h:8081": ("flink", "portable"),
    "--checkpointing-interval=500": ("flink", "portable"),
    "--object-reuse": ("flink", "portable"),
    "--max-bundle-time-millis=5": ("flink", "portable"),
    "--job-endpoint=h:1": ("flink", "portable", "prism", "spark"),
    "--environment-type=LOOPBACK": ("flink", "portable", "prism", "spark"),
    "--prism-location=/opt/prism": ("prism",),
    "--direct-num-workers=2": ("local",),
    "--direct-running-mode=multi_processing": ("local",),
    "--spark-version=3": ("spark",),
    "--sdk-container-image=i": ("dataflow", "flink", "portable", "prism", "spark"),
}
FOR_ALL = ["--job-name=n", "--experiments=e", "--save-main-session", "--sdk-harness-log-level-overrides={}"]


@pytest.mark.parametrize("runner", ["local", "DirectRunner", "flink", "portable", "prism", "dataflow", "spark"])
@pytest.mark.parametrize("flag", [*OWN_FLAGS, *FOR_ALL])
def test_an_option_of_another_runner_is_refused(flag, runner):
    """On the command line and as a key of the job; the message names the option and the runner that reads it."""
    readers = OWN_FLAGS.get(flag)
    name, _, value = flag[2:].partition("=")
    as_key = {"runner": runner, name: value or True}
    if readers is None or ("local" if runner == "DirectRunner" else runner) in readers:
        options(f"--runner={runner}", flag)
        options(**as_key)
        return
    says = rf"is an option of the {readers[0]}\b.* runner, which the .* runner ignores: .* add --runner {readers[0]}"
    with pytest.raises(JobError, match=f"^--{name.replace('-', '_')} {says}"):
        options(f"--runner={runner}", flag)
    with pytest.raises(JobError, match=f"^beam.{name} {says}"):
        options(**as_key)


def test_each_option_of_another_runner_is_named():
    with pytest.raises(JobError) as error:
        options("--dry_run=true", "--flink_master=h:1")
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["--dry_run", "--flink_master"]


def test_a_flag_that_changes_the_runner_leaves_out_what_only_the_jobs_runner_reads(caplog):
    of_dataflow = {"runner": "dataflow", "project": "p", "region": "r", "job_name": "mine"}
    found = options("--runner=local", **of_dataflow).get_all_options()
    assert (found["runner"], found["project"], found["region"], found["job_name"]) == (
        "FnApiRunner",
        None,
        None,
        "mine",
    )
    assert "the local runner does not read it: beam.project, beam.region" in caplog.text
    assert options(**of_dataflow).get_all_options()["project"] == "p"


def test_what_is_not_set_belongs_to_no_runner():
    options(dry_run=False, flink_master=None)
    with pytest.raises(JobError, match=r"^beam.operator_chaining"):
        options(operator_chaining=False)  # on by default, so that this sets it


def test_a_runner_of_ones_own_may_read_any_option():
    options("--runner=apache_beam.runners.direct.direct_runner.DirectRunner", "--dry-run=true", "--flink-master=h:1")


def test_dataflow_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no gcloud, which may know a region
    monkeypatch.delenv("CLOUDSDK_COMPUTE_REGION", raising=False)
    told = problem("--runner=dataflow", project="p")
    assert "needs --temp-location gs://BUCKET/FOLDER and --region REGION" in told
    assert "--project" not in told
    told = problem("--runner=dataflow", project="p", region="r", temp_location="/tmp")
    assert "temp_location is '/tmp'; Dataflow needs a folder on Google Cloud Storage" in told


def test_the_runner_is_looked_for_before_anything_is_written(tmp_path, impatient):
    (tmp_path / "a.wav").write_bytes(b"never read")
    job = make_job(BASE | {"inputs": str(tmp_path / "a.wav"), "output": str(tmp_path / "out")})
    with pytest.raises(JobError, match="no job server answers"):
        batch.run(job, ["--runner=portable", f"--job_endpoint=localhost:{free_port()}", *POOL])
    assert not (tmp_path / "out").exists()
