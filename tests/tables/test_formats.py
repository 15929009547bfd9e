"""Outputs that the code before format 2 wrote, and files of a newer format; format1/README.md says what there is."""

import json
import shutil
import tarfile
from datetime import datetime, timezone
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.pipelines.audit import audit
from af3pipe.tables import formats, write
from af3pipe.tables.audit import AuditError
from af3pipe.tables.compact import compact
from af3pipe.tables.compaction_record import open_compactions
from af3pipe.tables.formats import NewerFormat, normalised, timestamps, with_format
from af3pipe.tables.latest import export_latest, latest
from af3pipe.tables.layout import FORMAT_KEY, TABLE_SCHEMAS
from af3pipe.tables.reader import read_batches, rows_of_run, table_files
from tests import outputs
from tests.outputs import FIRST, SECOND, THIRD
from tests.read_tables import read_table

FOLDER = Path(__file__).parent / "format1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
NAMES = ("plain", "partitions", "compacted", "committed")
KEYS = {"captions": ["answer_key", "text"], "recordings": ["terminal_state"], "dead_letters": ["dead_letter_key"]}
SECOND_SOURCE = ["s3://archive/30.flac", "s3://archive/31.flac"]  # of the id 1


@pytest.fixture(params=NAMES)
def output(request, tmp_path):
    return unpacked(request.param, tmp_path)


def unpacked(name, folder):
    with tarfile.open(FOLDER / "outputs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for other in set(NAMES) - {name}:
        shutil.rmtree(folder / other)
    return folder / name


def view(output):
    """The latest view, as expected.json has it."""
    return {
        table: sorted(
            [*map(str, row.values())]
            for row in latest(str(output)).read(table, ["recording_id", "uri", *keys]).to_pylist()
        )
        for table, keys in KEYS.items()
    }


def expected(name):
    """What the code before said, and the answer of the first source of an id that was given to two: it lost that."""
    found = EXPECTED[name]["latest"]
    if name == "plain":
        number = outputs.answer_row(30)
        found = {
            **found,
            "captions": sorted([*found["captions"], ["1", number.uri, number.answer_key, number.text]]),
            "recordings": sorted([*found["recordings"], ["1", number.uri, "ok"]]),
        }
    return found


def test_the_latest_view_of_an_older_output_is_what_it_was(output):
    assert view(output) == expected(output.name)


def test_it_is_the_same_after_it_was_compacted_and_the_audit_finds_nothing(output):
    report = audit(str(output))
    assert report.right, report.problems
    assert report.rows == EXPECTED[output.name]["rows"]
    for only_latest in (False, True):
        compact(str(output), only_latest=only_latest)
        assert open_compactions(str(output)) == []
        assert view(output) == expected(output.name)
        report = audit(str(output))
        assert (report.problems, report.notes) == ([], [])
    for table, infos in table_files(str(output)).items():
        for info in infos:
            schema = pq.read_schema(info.uri)
            assert schema.metadata[FORMAT_KEY] == b"2"
            assert set(TABLE_SCHEMAS[table].names) <= set(schema.names)
            assert schema.field("metadata").type == pa.string()


def test_export_of_an_older_output_has_the_columns_of_the_current_format(output, tmp_path):
    export_latest(str(output), str(tmp_path / "clean"), ["captions", "recordings", "dead_letters"])
    for table in KEYS:
        path = tmp_path / "clean" / f"{table}.parquet"
        assert pq.read_schema(path).names == TABLE_SCHEMAS[table].names
        assert len(read_table(path)) == len(expected(output.name)[table])


def test_maps_are_json_texts_and_times_are_timestamps(tmp_path):
    output = unpacked("plain", tmp_path)
    rows = {row["uri"]: row for row in latest(str(output)).read("captions", ["uri", "metadata", "mtime"]).to_pylist()}
    found = {number: rows[f"s3://archive/{number}.flac"] for number in (4, 20, 21, 22)}
    assert json.loads(found[4]["metadata"]) == {"station": "K Q"}
    assert found[20]["metadata"] == "{}"
    assert json.loads(found[21]["metadata"]) == {"speaker": 'Ada "A" Ö\n', "row": "007", "empty": ""}
    assert found[20]["mtime"] == datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=timezone.utc)
    assert found[21]["mtime"] == datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    assert found[22]["mtime"] is None


def test_a_recording_that_a_run_skipped_is_in_the_state_that_it_had(tmp_path):
    output = unpacked("plain", tmp_path)
    for _ in range(2):
        rows = latest(str(output)).read("recordings").to_pylist()
        states = {row["uri"]: row["terminal_state"] for row in rows}
        assert states["s3://archive/4.flac"] == "ok"
        assert states["s3://archive/8.flac"] == "dead_letter"
        assert states["s3://archive/9.flac"] == "skipped_done"  # its row of the manifest was corrected
        assert audit(str(output)).states == {"dead_letter": 1, "ok": 11, "skipped_done": 1}
        compact(str(output), only_latest=True)


def test_an_id_of_two_sources_keeps_both_paid_answers(tmp_path):
    output = unpacked("plain", tmp_path)
    compact(str(output), only_latest=True)
    for table in ("captions", "recordings"):
        rows = latest(str(output)).read(table, ["recording_id", "uri"]).to_pylist()
        assert [row["uri"] for row in sorted(rows, key=str) if row["recording_id"] == "1"] == SECOND_SOURCE
    raw = read_table(output / "captions", ["recording_id"])["recording_id"].to_pylist()
    assert raw.count("1") == 2


def second_format(output, run_id, numbers, *, text="new", later_s=600, **changes):
    """A run of format 2 that answers recordings of format 1 again."""
    at = outputs._MOMENT + later_s * 1_000_000
    answers = [outputs.answer_row(number, text, created_at=at) for number in numbers]
    rows = [outputs.recording_row(number, [row], created_at=at) for number, row in zip(numbers, answers, strict=True)]
    for row_format, found in ((write.ANSWERS, answers), (write.RECORDINGS, rows)):
        for table in {row_format.table(row) for row in found}:
            old = write.to_table([row._replace(run_id=run_id) for row in found], row_format.schema)
            new = normalised(old, table, TABLE_SCHEMAS[table].names)
            if table == "recordings":
                at_key = new.schema.get_field_index("source_key")
                keys = pa.array([f"source {number}" for number in numbers])
                new = new.set_column(at_key, "source_key", keys)
            path = output / table / f"{run_id}-{'0' * 16}.parquet"
            pq.write_table(new.cast(with_format(TABLE_SCHEMAS[table])), path)
    record = {"run_id": run_id, "recordings_found": len(rows) + 5, "answers": {"captions": len(answers)}}
    record |= {"recordings": {"ok": len(rows), "skipped_done": 5}, "dead_letters": {}} | changes
    (output / "_runs" / f"{run_id}.json").write_text(json.dumps(record))


def test_files_of_both_formats_are_one_table(tmp_path):
    output = unpacked("plain", tmp_path)
    second_format(output, THIRD, [0, 2, 50])
    wanted = expected("plain")
    new = [outputs.answer_row(number, "new") for number in (0, 2, 50)]
    uris = {row.uri for row in new}
    wanted["captions"] = sorted(
        [row for row in wanted["captions"] if row[1] not in uris]
        + [[row.recording_id, row.uri, row.answer_key, row.text] for row in new]
    )
    wanted["recordings"] = sorted([*wanted["recordings"], [new[2].recording_id, new[2].uri, "ok"]])
    for only_latest in (False, False, True):
        assert view(output) == wanted
        report = audit(str(output))
        assert report.right, report.problems
        third = next(run for run in report.runs if run.run_id == THIRD)
        assert third.recordings == {"ok": 3, "skipped_done": 5}  # no rows of these, and the record counts them
        compact(str(output), only_latest=only_latest)


def test_a_run_of_the_current_format_whose_rows_were_lost_is_miscounted(tmp_path):
    output = unpacked("plain", tmp_path)
    second_format(output, THIRD, [0, 2], recordings={"ok": 3, "skipped_done": 5}, recordings_found=8)
    (problem,) = audit(str(output)).problems
    assert problem.kind == "miscounted"
    assert problem.example == "recordings are 2 ok, and the record says 3 ok"


def test_a_source_that_both_formats_know_is_one_recording(tmp_path):
    output = unpacked("plain", tmp_path)
    second_format(output, THIRD, [0, 1])
    ids = latest(str(output)).read("recordings")["recording_id"].to_pylist()
    assert [ids.count(outputs.digest("recording", number)[:20]) for number in (0, 1)] == [1, 1]
    assert ids.count("1") == 2


def test_duckdb_reads_the_same_view_from_files_of_both_formats(tmp_path):
    output = unpacked("plain", tmp_path)
    second_format(output, THIRD, [0, 2, 50])
    query = f"""
        WITH newest AS (
            SELECT * FROM read_parquet('{output}/recordings/**/*.parquet', union_by_name = true)
            QUALIFY row_number() OVER (
                PARTITION BY recording_id, uri, offset_s, channel, stream ORDER BY created_at DESC, run_id DESC
            ) = 1
        )
        SELECT recording_id, uri, answer_key, text
        FROM read_parquet('{output}/captions/**/*.parquet', union_by_name = true)
        WHERE (recording_id, answer_key) IN (SELECT (recording_id, unnest(answer_keys)) FROM newest)
    """
    for only_latest in (False, False, True):
        found = sorted([*map(list, duckdb.sql(query).fetchall())])
        assert found == view(output)["captions"]
        compact(str(output), only_latest=only_latest)


def test_columns_that_only_a_file_has_survive_compaction(tmp_path):
    output = unpacked("plain", tmp_path)
    path = next((output / "captions").glob(f"{FIRST}*.parquet"))
    rows = read_table(path)
    pq.write_table(rows.append_column("mine", pa.array(range(len(rows)))), path)
    compact(str(output))
    found = read_table(output / "captions")["mine"].drop_null().to_pylist()
    assert sorted(found) == list(range(len(rows)))
    assert "mine" not in latest(str(output)).read("captions").schema.names


def test_a_newer_format_is_refused_in_a_sentence(tmp_path):
    output = unpacked("plain", tmp_path)
    path = next((output / "captions").glob("*.parquet"))
    schema = TABLE_SCHEMAS["captions"].with_metadata({FORMAT_KEY: b"3"})
    pq.write_table(schema.empty_table(), path)
    says = rf"{path.name} has format 3, and this version of af3pipe reads up to 2: install a newer af3pipe"
    with pytest.raises(NewerFormat, match=says):
        latest(str(output)).read("captions")
    with pytest.raises(NewerFormat, match=says):
        compact(str(output))
    with pytest.raises(AuditError, match=says):
        audit(str(output))
    assert open_compactions(str(output)) == []


def test_rows_of_a_run_are_found_wherever_compactions_put_them(output):
    def count(run_id):
        return {t: sum(map(len, rows_of_run(str(output), t, run_id, ["recording_id"]))) for t in KEYS}

    runs = {FIRST, SECOND}
    before = {run_id: count(run_id) for run_id in runs}
    total = {table: EXPECTED[output.name]["rows"][table] for table in KEYS}
    assert {table: sum(before[run_id][table] for run_id in runs) for table in KEYS} == total
    compact(str(output))
    assert {run_id: count(run_id) for run_id in runs} == before


@given(st.lists(st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3), max_size=5))
def test_any_map_becomes_its_json_text(values):
    maps = pa.array(
        [None if value is None else list(value.items()) for value in values], pa.map_(pa.string(), pa.string())
    )
    found = formats._json_of(pa.concat_arrays([maps, maps]).slice(len(values))).to_pylist()
    assert [None if text is None else json.loads(text) for text in found] == values


def test_times_that_arrow_cannot_read_are_read_one_by_one():
    found = timestamps(pa.chunked_array([["2026-01-02T03:04:05", "2026-01-02T03:04:05.1234567Z", "yesterday", None]]))
    first = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    assert found.to_pylist() == [first, first.replace(microsecond=123456), None, None]


def test_a_column_that_no_format_has_is_an_error(tmp_path):
    output = unpacked("plain", tmp_path)
    with pytest.raises(KeyError, match="captions has no column 'txt'; it has recording_id, uri"):
        list(read_batches(str(output), "captions", ["txt"]))
