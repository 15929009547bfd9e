"""A launcher builds and submits the graph without torch; nothing of it is imported on the way."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import soundfile

from tests.integration.runners import rows

pytestmark = pytest.mark.integration

HIDE_TORCH = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def run_without_torch(code):
    return subprocess.run(
        [sys.executable, "-c", HIDE_TORCH + textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.representative
def test_the_graph_builds_without_torch(tmp_path):
    done = run_without_torch(f"""
        import apache_beam as beam
        from af3pipe.pipelines.batch import preflight
        from af3pipe.pipelines.graph import build
        from af3pipe.pipelines.job import make_job
        from af3pipe.models.family import open_checkpoint

        job = make_job(dict(inputs=["x.wav"], output={str(tmp_path)!r}, model="demo", tasks=["caption"]))
        pipeline = beam.Pipeline()
        build(pipeline, job, "run")
        proto = pipeline.to_runner_api()
        assert any("Answer" in t.unique_name for t in proto.components.transforms.values())
        assert open_checkpoint("demo").limits.max_s == 600
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        print("built")
    """)
    assert done.stdout.strip() == "built", done.stderr


def test_the_command_line_does_not_import_torch_where_it_is_installed():
    code = (
        "import sys, af3pipe.cli.running; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_hiding_hides():
    assert "No module named 'torch'" in run_without_torch("import torch").stderr


@pytest.mark.slow
def test_a_launcher_without_torch_submits_to_workers_that_have_it(job_service, tmp_path):
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(2 * np.pi * 440 / 16000 * np.arange(16000)), 16000)
    done = run_without_torch(f"""
        from af3pipe.pipelines.batch import run
        from af3pipe.pipelines.job import make_job

        if __name__ == "__main__":
            job = make_job(dict(inputs=[{str(tmp_path / "tone.wav")!r}], output={str(tmp_path / "out")!r},
                                model="demo", tasks=["caption"], device="cpu"))
            print(run(job, {job_service!r}).counts)
    """)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "out", "captions")) == 1


def test_without_torch_the_engine_says_what_is_missing():
    done = run_without_torch("""
        from af3pipe.models.engine import EngineOptions, ModelError, open_engine
        try:
            open_engine(EngineOptions("demo"))
        except ModelError as error:
            print(error)
    """)
    assert "needs torch, which is not installed on this worker" in done.stdout, done.stderr
