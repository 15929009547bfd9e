"""A write that fails ends a command with a sentence: which file, why, what to do; a traceback only with --verbose."""

import logging
import os
import resource
import subprocess

import pytest

from af3pipe.cli.log import _OneLine
from tests import fixtures_audio as make
from tests.integration.servers import python_module
from tests.outputs import FIRST, SECOND, write_run

pytestmark = pytest.mark.integration
LIMIT_BYTES = 9000  # of any file; smaller than a compacted one, and than the plan of a run


def command(*arguments, limited=False):
    """Runs the program; `limited` has every write beyond `LIMIT_BYTES` fail, as on a full disk."""
    limit = (LIMIT_BYTES, LIMIT_BYTES)
    done = subprocess.run(
        python_module("af3pipe", *map(str, arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)) if limited else None,
    )
    return done.returncode, done.stdout


@pytest.fixture
def silent(tmp_path):
    """A recording that no model is asked about, with the options that say so."""
    path = tmp_path / "silent.wav"
    path.write_bytes(make.wav(make.sound(2, 16000) * 0, 16000))
    return ["run", path, "--model", "demo", "--device", "cpu", "--on-silent", "dead-letter", "--no-decode-guard"]


@pytest.mark.parametrize("verbose", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_whose_table_cannot_be_written(silent, tmp_path, verbose):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dead_letters").write_text("not a folder")
    flags = ["--verbose"] if verbose else []
    code, printed = command(*flags, *silent, "--output", tmp_path / "out")
    assert code == 1, printed
    assert f"af3pipe: the run failed: {tmp_path}/out/dead_letters/" in printed
    assert printed.rstrip().endswith("Something else has that name: choose another folder.")
    assert ("Traceback" in printed) == verbose


@pytest.mark.slow
def test_an_output_that_is_a_file_stops_the_run_before_it_starts(silent, tmp_path):
    (tmp_path / "out").write_text("not a folder")
    code, printed = command(*silent, "--output", tmp_path / "out")
    assert code == 2, printed
    assert printed.startswith("af3pipe: output: The folder ")
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_full_folder_for_temporary_files(silent, tmp_path):
    code, printed = command(*silent, "--output", tmp_path / "out", limited=True)
    assert code == 1, printed
    assert "is the folder for temporary files full (" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compact", "export"])
def test_a_full_disk_under_a_command_on_an_output(name, tmp_path):
    write_run(tmp_path / "out", FIRST, range(60))
    write_run(tmp_path / "out", SECOND, range(60, 120))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    more = [tmp_path / "clean"] if name == "export" else []
    code, printed = command(name, tmp_path / "out", *more, limited=True)
    assert code == 1, printed
    assert "File too large" in printed
    assert "Traceback" not in printed
    assert len(printed.splitlines()) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def formatted(level, message, raised=None):
    exc_info = (type(raised), raised, raised.__traceback__) if raised else None
    record = logging.LogRecord("beam", logging.ERROR, "file", 1, message, (), exc_info)
    logger = logging.getLogger("af3pipe")
    before = logger.level
    logger.setLevel(level)
    try:
        return _OneLine("%(levelname)s %(message)s").format(record)
    finally:
        logger.setLevel(before)


BEGIN = "Traceback (most recent call last):\n"
TRACE = f'{BEGIN}  File "a.py", line 1, in f\nOSError: disk full\n\nDuring that, another one:\n\n'
TRACE += f'{BEGIN}  File "b.py", line 2, in g\naf3pipe.StorageError: x cannot be written\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ERROR bundle 7: af3pipe.StorageError: x cannot be written", f"bundle 7: {TRACE}"),
        ("ERROR x cannot be written", f"x cannot be written\n{TRACE}"),
        ("ERROR nothing else\nsecond line", "nothing else\nsecond line"),
    ],
)
def test_a_message_with_a_traceback_is_its_sentence(line, message):
    assert formatted(logging.INFO, message) == line
    assert formatted(logging.DEBUG, message) == f"ERROR {message}"


def test_an_exception_that_is_logged_is_its_sentence():
    with pytest.raises(OSError, match="disk full") as raised:
        raise OSError("disk full")
    assert formatted(logging.INFO, "it failed", raised.value) == "ERROR it failed OSError: disk full"
    assert formatted(logging.INFO, "disk full: it failed", raised.value) == "ERROR disk full: it failed"
    assert formatted(logging.DEBUG, "it failed", raised.value).startswith("ERROR it failed\nTraceback")
