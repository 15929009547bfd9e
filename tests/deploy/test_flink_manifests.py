"""The manifests in deploy/flink/ are what Kubernetes and the Flink operator take, and fit one another."""

import copy
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import jsonschema
import pytest
import yaml

from af3pipe.pipelines.beam_flags import beam_options, split_beam_flags
from af3pipe.pipelines.job import make_job
from af3pipe.pipelines.job_file import load_job_values

kubernetes_validate = pytest.importorskip("kubernetes_validate")

FOLDER = Path(__file__).parents[2] / "deploy" / "flink"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
DATAFLOW = FOLDER.parent / "dataflow" / "worker.Dockerfile"
KUBERNETES = "1.29"  # the first whose sidecars need no switch
OPERATOR = "1.10.0"  # its FlinkDeployment; later ones added to it
MANIFESTS = {
    f"{document['kind']}/{document['metadata']['name']}": document
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "job.yaml"
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
}
CLUSTER = MANIFESTS["FlinkDeployment/af3pipe-flink"]
PODS = {
    "every pod of Flink": CLUSTER["spec"]["podTemplate"],
    "TaskManager": CLUSTER["spec"]["taskManager"]["podTemplate"],
}
OF_KUBERNETES = {name: found for name, found in MANIFESTS.items() if found is not CLUSTER} | PODS


def check(manifest):
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", OF_KUBERNETES)
def test_kubernetes_takes_it(name):
    check(OF_KUBERNETES[name])


def first(items, name):
    return next(item for item in items if item["name"] == name)


def worker_pool(pod=PODS["TaskManager"]):
    return first(pod["spec"]["initContainers"], "worker-pool")


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("TaskManager", lambda pod: worker_pool(pod)["resources"].update(limit={}), "'limit' was unexpected"),
        ("TaskManager", lambda pod: worker_pool(pod).update(command="python"), "is not of type 'array'"),
        ("TaskManager", lambda pod: worker_pool(pod)["env"][0].update(value=1), "1 is not of type"),
        ("TaskManager", lambda pod: pod["spec"]["tolerations"][0].update(operater="Exists"), "'operater' was unexp"),
        ("Service/beam-job-server", lambda service: service["spec"]["ports"][0].pop("port"), "'port' is a required"),
        ("Job/af3pipe-run", lambda job: job["spec"].update(backoffLimit="2"), "'2' is not of type"),
        ("Deployment/beam-job-server", lambda found: found["spec"].pop("selector"), "'selector' is a required"),
    ],
)
def test_what_is_wrong_is_found(name, spoil, told):
    spoiled = copy.deepcopy(OF_KUBERNETES[name])
    spoil(spoiled)
    with pytest.raises(kubernetes_validate.ValidationError, match=told):
        check(spoiled)


# In CI the test is left out where there is no Maven, since there a skip is a failure.
if shutil.which("mvn") or not os.environ.get("AF3PIPE_REQUIRE_ALL"):

    @pytest.fixture(scope="module")
    def flink_deployment(tmp_path_factory):
        """The schema of a FlinkDeployment, of the operator's own definition."""
        if not shutil.which("mvn"):
            pytest.skip("Maven is not on the path, and brings the operator's definitions")
        folder = tmp_path_factory.mktemp("operator")
        jar = f"flink-kubernetes-operator-api-{OPERATOR}.jar"
        artifact = f"org.apache.flink:flink-kubernetes-operator-api:{OPERATOR}"
        fetch = ["mvn", "-q", "dependency:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={folder}"]
        subprocess.run(fetch, check=True, timeout=240, cwd=folder)
        with zipfile.ZipFile(folder / jar) as archive:
            text = archive.read("META-INF/fabric8/flinkdeployments.flink.apache.org-v1.yml")
        (version,) = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
        assert CLUSTER["apiVersion"] == f"flink.apache.org/{version['name']}"
        return closed(version["schema"]["openAPIV3Schema"]["properties"]["spec"])

    def closed(schema):
        """The schema without room for other keys: Kubernetes would drop them in silence."""
        if isinstance(schema, list):
            return [closed(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        found = {key: closed(value) for key, value in schema.items()}
        is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
        if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not is_open:
            found["additionalProperties"] = False
        if schema.get("x-kubernetes-int-or-string"):
            found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
            found.pop("type", None)
        return found

    @pytest.mark.slow
    def test_the_operator_takes_the_cluster(flink_deployment):
        jsonschema.validate(CLUSTER["spec"], flink_deployment)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("spoil", "told"),
        [
            (lambda spec: spec.update(flinkVersion="1.19"), "'1.19' is not one of"),
            (
                lambda spec: spec["flinkConfiguration"].update({"taskmanager.numberOfTaskSlots": 4}),
                "4 is not of type",
            ),
            (lambda spec: spec["taskManager"].update(resources={}), "'resources' was unexpected"),
            (lambda spec: spec["taskManager"]["podTemplate"]["spec"].update(volume=[]), "'volume' was unexpected"),
        ],
    )
    def test_what_is_wrong_with_the_cluster_is_found(flink_deployment, spoil, told):
        spoiled = copy.deepcopy(CLUSTER["spec"])
        spoil(spoiled)
        with pytest.raises(jsonschema.ValidationError, match=told):
            jsonschema.validate(spoiled, flink_deployment)


def container(name):
    return MANIFESTS[name]["spec"]["template"]["spec"]["containers"][0]


def arguments(found):
    return dict(argument.split("=", 1) for argument in found["args"] if "=" in argument)


def test_who_talks_to_whom():
    run, server, pool = (
        arguments(container("Job/af3pipe-run")),
        container("Deployment/beam-job-server"),
        worker_pool(),
    )
    served = arguments(server)
    service = MANIFESTS["Service/beam-job-server"]
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    named = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert named == ports == {"job": int(served["--job-port"]), "artifact": int(served["--artifact-port"])}
    assert run["--job_endpoint"] == f"{service['metadata']['name']}:{ports['job']}"
    assert run["--artifact_endpoint"] == f"{service['metadata']['name']}:{ports['artifact']}"
    assert served["--flink-master"] == f"{CLUSTER['metadata']['name']}-rest:8081"
    assert service["spec"]["selector"] == MANIFESTS["Deployment/beam-job-server"]["spec"]["selector"]["matchLabels"]
    (port,) = pool["ports"]
    assert run["--environment_config"] == f"localhost:{port['containerPort']}"
    assert arguments(pool) == {"--service_port": str(port["containerPort"])}
    slots = int(CLUSTER["spec"]["flinkConfiguration"]["taskmanager.numberOfTaskSlots"])
    assert int(run["--parallelism"]) % slots == 0


def test_versions_and_images_fit():
    (minor,) = re.findall(r"^flink:(1\.\d+)\.\d+-", CLUSTER["spec"]["image"])
    assert CLUSTER["spec"]["flinkVersion"] == f"v{minor.replace('.', '_')}"
    job_server = container("Deployment/beam-job-server")["image"]
    assert job_server.startswith(f"apache/beam_flink{minor}_job_server:")
    if DATAFLOW.exists():
        assert f"ARG BEAM_VERSION={job_server.rpartition(':')[2]}\n" in DATAFLOW.read_text(encoding="utf-8")
    workers = {container(f"Job/af3pipe-{name}")["image"] for name in ("run", "download")} | {worker_pool()["image"]}
    assert len(workers) == 1
    assert workers.pop() in README


def test_every_mount_has_its_volume():
    pods = [found["spec"]["template"]["spec"] for found in MANIFESTS.values() if "template" in found["spec"]]
    for pod in [*pods, *(found["spec"] for found in PODS.values())]:
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        containers = [*pod["containers"], *pod.get("initContainers", ())]
        assert volumes == {mount["name"] for found in containers for mount in found.get("volumeMounts", ())}
    assert {found["metadata"]["namespace"] for found in MANIFESTS.values()} == {"af3pipe"}


def test_the_run_is_one():
    command, path, *rest = container("Job/af3pipe-run")["args"]
    assert (command, Path(path).name) == ("run", "job.yaml")
    inputs, flags = split_beam_flags(rest)
    assert f"--flink_master={CLUSTER['metadata']['name']}-rest:8081" in flags  # to cancel the job there
    job = make_job(load_job_values(str(FOLDER / "job.yaml")))
    options = beam_options(job, flags).get_all_options()
    assert not inputs
    assert (options["runner"], options["parallelism"], options["sdk_worker_parallelism"]) == (
        "PortableRunner",
        8,
        "1",
    )
    (downloaded,) = [argument for argument in container("Job/af3pipe-download")["args"] if argument.startswith("/")]
    assert job.model == downloaded


def test_the_readme_tells_what_there_is():
    assert {path.name for path in FOLDER.glob("*.yaml")} <= {*re.findall(r"[\w-]+\.yaml", README)}
    secrets = {name for text in map(str, MANIFESTS.values()) for name in re.findall(r"'name': '(af3pipe-\w+)'", text)}
    assert [name for name in sorted(secrets) if name not in README] == []
