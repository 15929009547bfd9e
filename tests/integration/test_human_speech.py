"""Human studio prompts, recorded for a telephone exchange: what the model has never heard, and was not made for."""

import re
from pathlib import Path

import pytest

from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from tests.integration.runners import rows

pytestmark = pytest.mark.integration
DIGITS = Path("/usr/share/asterisk/sounds/en_US_f_Allison/digits")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.mark.skipif(not DIGITS.exists(), reason="needs Debian's asterisk-core-sounds-en-wav")
def test_digits_are_mostly_heard(tmp_path):
    job = make_job(
        {
            "inputs": [str(DIGITS / "[0-9].wav")],
            "output": str(tmp_path),
            "model": "demo",
            "tasks": ["transcript"],
            "max_new_tokens": 16,
            "device": "cpu",
            "decode_guard": False,
        }
    )
    report = batch.run(job)
    assert report.counts.states == {"ok": 10}
    heard = {int(Path(row["uri"]).stem): row["text"] for row in rows(tmp_path, "transcripts")}
    right = [digit for digit, text in heard.items() if re.sub("[^a-z ]", "", text.lower()).split() == [WORDS[digit]]]
    assert len(right) >= 6, heard
