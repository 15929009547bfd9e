"""What docs/inputs.md shows works as it stands."""

import re
from pathlib import Path

import yaml

from af3pipe.pipelines.job import make_job
from af3pipe.schemas import Recording
from af3pipe.storage.members import parse
from af3pipe.transforms.inputs.manifest import read_manifest

TEXT = (Path(__file__).parents[1] / "docs" / "inputs.md").read_text(encoding="utf-8")


def test_the_manifests_shown_are_manifests(tmp_path):
    rows, asking = re.findall(r"```jsonl\n(.*?)```", TEXT, re.DOTALL)
    for lines, least in ((rows, 0), (asking, 1)):
        (tmp_path / "m.jsonl").write_text(lines)
        found = list(read_manifest(str(tmp_path / "m.jsonl")))
        assert len(found) == lines.count("\n")
        assert all(isinstance(row, Recording) and len(row.questions) >= least for row in found)


def test_the_uris_shown_are_members():
    found = [parse(line.strip()) for line in TEXT.split("\n") if line.startswith("    ")]
    assert [member.name for member in found] == ["clip 1.flac", "clip.flac"]


def test_the_job_shown_is_one():
    (job,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert make_job(yaml.safe_load(job)).allow_prefixes == ("s3://archive/public",)
