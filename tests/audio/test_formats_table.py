"""docs/formats.md is held to what the code does: every row has a fixture, and probing says the same."""

import io
import re
from pathlib import Path

import pytest

from af3pipe.audio.headers import HEADERLESS
from af3pipe.audio.probe import probe
from af3pipe.storage import AUDIO_EXTENSIONS
from tests import fixtures_audio as make
from tests.audio.formats import FORMATS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
ROWS = {
    name: (extensions.split(), decoder, length)
    for name, extensions, decoder, length in re.findall(
        r"^\| ([^|]+) \| ([a-z0-9 ]+) \| (libsndfile|FFmpeg) \| (yes|no) \|", DOCUMENT, re.MULTILINE
    )
}


def test_every_row_has_a_fixture_and_every_fixture_a_row():
    assert len(ROWS) == DOCUMENT.count("\n| ") - 2  # the heading, and the line below it
    assert {found.row for found in FORMATS.values()} == set(ROWS)


@pytest.mark.parametrize("name", FORMATS)
def test_probing_says_what_the_row_says(name):
    found = FORMATS[name]
    if found.encoder and not make.program_encodes(found.encoder):
        pytest.skip(f"needs an ffmpeg program that encodes {found.encoder}")
    rate, channels = found.stored[0]
    data = found.encode(make.sound(2, rate, channels), rate)
    extensions, decoder, length = ROWS[found.row]
    assert found.extension in extensions
    for extension in extensions if found.extension not in HEADERLESS else [found.extension]:
        info = probe(io.BytesIO(data), extension=extension)
        assert info.decoder == {"libsndfile": "soundfile", "FFmpeg": "pyav"}[decoder]
        assert (info.duration_s is not None) == (length == "yes")


def test_folders_are_searched_for_all_of_them_and_for_nothing_else_that_is_not_named():
    in_rows = {extension for extensions, _, _ in ROWS.values() for extension in extensions}
    (untested,) = re.findall(r"no test here does: ([a-z0-9\s]+)\.", DOCUMENT)
    assert in_rows | set(untested.split()) == AUDIO_EXTENSIONS
    assert not in_rows & set(untested.split())
