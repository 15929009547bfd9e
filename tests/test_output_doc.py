"""The SQL and Python of docs/output.md, word for word but for the folder, agree with our own view."""

import re
from pathlib import Path

import duckdb
import pytest

from af3pipe.tables import write
from af3pipe.tables.compact import compact
from af3pipe.tables.latest import latest
from tests import outputs
from tests.outputs import FIRST, SECOND, THIRD, write_run

DOC = (Path(__file__).parent.parent / "docs" / "output.md").read_text()
CODE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [code for found, code in CODE.findall(DOC) if found == language]


@pytest.fixture
def output(tmp_path):
    by = ("date", "station")
    write_run(tmp_path, FIRST, range(30), broken=range(30, 40), partition_by=by)
    write_run(tmp_path, SECOND, range(20, 33), version="better", later_s=60, partition_by=by)
    write_run(tmp_path, THIRD, range(5), kept=True, later_s=120, partition_by=by)
    twice = [outputs.answer_row(number, text="newer", created_at=1_900_000_000_000_000) for number in range(3)]
    outputs.write_rows(tmp_path, THIRD, write.ANSWERS, twice, by)
    return tmp_path


def compare(output):
    views, stations = (code.replace("OUT", str(output)) for code in blocks("sql"))
    with duckdb.connect() as database:
        database.execute(views)
        for table, column in (("captions", "text"), ("recordings", "run_id"), ("dead_letters", "dead_letter_key")):
            query = f"SELECT recording_id, {column} FROM {table}"
            ours = latest(str(output)).read(table, ["recording_id", column]).to_pylist()
            rows = [tuple(row.values()) for row in ours]
            assert sorted(database.execute(query).fetchall()) == sorted(rows)
            assert len(rows) == {"captions": 33, "recordings": 40, "dead_letters": 7}[table]
        return database.execute(stations).fetchall()


def test_the_latest_view_in_sql_is_ours(output):
    assert compare(output) == [("K Q", 46)]
    compact(str(output))
    assert compare(output) == [("K Q", 43)]  # the copies were in partitions of different days
    compact(str(output), only_latest=True)
    assert compare(output) == [("K Q", 33)]


def test_the_python_runs(output):
    first, second = (code.replace("OUT", str(output)) for code in blocks("python"))
    found = {}
    exec(first, found)
    assert found["table"].num_rows == 33
    exec(second, {})


def test_every_kind_of_problem_is_in_the_table():
    folder = Path(__file__).parent.parent / "af3pipe" / "tables"
    source = "".join((folder / name).read_text() for name in ("audit.py", "audit_checks.py"))
    kinds = set(re.findall(r'(?:_report|Problem)\(\s*"(\w+)"', source)) | {"never_processed", "changed"}
    assert set(re.findall(r"^\| `(\w+)` \|", DOC, re.MULTILINE)) == kinds
    assert len(kinds) == 10
