"""Beam's `--setup_file ./setup.py`: a package is made of the tree, sent, and installed by each worker."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.stager import Stager

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_package_that_is_sent_installs_all_that_is_in_the_tree(tmp_path):
    tree, sent, wheels = (tmp_path / name for name in ("tree", "sent", "wheels"))
    for folder in (tree, sent, wheels):
        folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):  # building leaves files behind
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "af3pipe", tree / "af3pipe", ignore=shutil.ignore_patterns("__pycache__"))
    wanted = {str(path.relative_to(tree)) for path in (tree / "af3pipe").rglob("*") if path.is_file()}
    assert "af3pipe/demo/checkpoint/model.safetensors" in wanted

    Stager.create_job_resources(PipelineOptions([f"--setup_file={tree / 'setup.py'}"]), str(sent))
    (package,) = sent.glob("*.tar.gz")
    install = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", wheels, package]
    subprocess.run(install, check=True, capture_output=True)
    (wheel,) = wheels.glob("af3pipe-*.whl")
    with zipfile.ZipFile(wheel) as installed:
        assert wanted <= set(installed.namelist())
