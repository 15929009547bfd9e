"""An output with each fault that a store, a kill or a hand can leave in it: the audit finds them all."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from af3pipe.pipelines.audit import audit
from af3pipe.schemas import TerminalState
from af3pipe.tables import write
from af3pipe.tables.audit import AuditError
from af3pipe.tables.compact import compact
from af3pipe.transforms.inputs.read import list_recordings
from tests import outputs
from tests.outputs import FIRST, SECOND, THIRD, write_run
from tests.read_tables import read_table


@pytest.fixture
def output(tmp_path):
    write_run(tmp_path, FIRST, range(20), broken=range(20, 24))
    return tmp_path


def found(output, **more):
    return {problem.kind: problem for problem in audit(str(output), **more).problems}


def files(output, table):
    return sorted((output / table).glob("*.parquet"))


def test_a_whole_run_is_right(output):
    report = audit(str(output))
    assert report.right, report.problems
    assert report.rows == {"captions": 20, "transcripts": 0, "answers": 0, "recordings": 24, "dead_letters": 4}
    assert report.states == {"dead_letter": 4, "ok": 20}
    (run,) = report.runs
    assert (run.recordings, run.answers) == ({"dead_letter": 4, "ok": 20}, {"captions": 20})
    assert run.dead_letters == {"decode_error": 4}
    json.dumps(report.to_dict())


def test_runs_after_one_another_are_right(output):
    write_run(output, SECOND, range(20), broken=range(20, 24), kept=True, later_s=60)
    write_run(output, THIRD, range(5, 22), version="new model", later_s=120)
    report = audit(str(output))
    assert report.right, report.problems
    assert report.states == {"dead_letter": 2, "ok": 22}


@pytest.mark.parametrize(("table", "named"), [("captions", "answers"), ("dead_letters", "dead letters")])
def test_a_lost_file_of_rows_is_missing(output, table, named):
    victim = files(output, table)[0]
    lost = read_table(victim)
    victim.unlink()
    problems = found(output)
    assert set(problems) == {"missing", "miscounted"}
    assert problems["missing"].number == len(lost)
    assert problems["missing"].what.startswith(named)
    key, _, uri = problems["missing"].example.partition(" of ")
    assert key in set(lost["answer_key" if table == "captions" else "dead_letter_key"].to_pylist())
    assert uri in set(lost["uri"].to_pylist())
    assert "run the job again" in problems["missing"].advice


def test_a_lost_file_of_recordings_leaves_orphans(output):
    victim = files(output, "recordings")[0]
    lost = pq.read_metadata(victim).num_rows
    victim.unlink()
    problems = found(output)
    assert set(problems) == {"orphan", "miscounted"}
    assert problems["orphan"].number == lost
    assert FIRST in problems["orphan"].example


def test_a_copied_file_is_a_duplicate_and_compact_drops_it(output):
    victim = files(output, "captions")[0]
    copy = victim.with_name(f"{FIRST}-copy.parquet")
    shutil.copy(victim, copy)
    problems = found(output)
    assert set(problems) == {"duplicate"}
    assert problems["duplicate"].number == pq.read_metadata(victim).num_rows
    assert copy.name in problems["duplicate"].example
    assert "af3pipe compact" in problems["duplicate"].advice
    compact(str(output))
    assert audit(str(output)).right


@pytest.mark.parametrize("table", ["recordings", "dead_letters"])
def test_copies_are_found_in_every_table(output, table):
    shutil.copy(files(output, table)[0], output / table / f"{FIRST}-copy.parquet")
    assert set(found(output)) == {"duplicate"}


def test_two_runs_of_one_job_at_once_leave_duplicates_that_compact_drops(output):
    write_run(output, SECOND, range(20), broken=range(20, 24))
    problem = found(output)["duplicate"]
    assert FIRST in problem.example
    assert SECOND in problem.example
    compact(str(output))
    report = audit(str(output))
    assert report.right, report.problems
    assert report.rows["captions"] == 20
    assert report.rows["recordings"] == 48


def test_a_row_that_nobody_names_is_an_orphan(output):
    outputs.write_rows(output, FIRST, write.ANSWERS, [outputs.answer_row(99)])
    problems = found(output)
    assert set(problems) == {"orphan", "miscounted"}
    assert problems["orphan"].number == 1


def test_rows_of_a_killed_run_are_no_orphans_but_ask_for_another_run(output):
    outputs.write_rows(output, SECOND, write.ANSWERS, [outputs.answer_row(99)])
    write_run(output, SECOND, [], finished=False)
    report = audit(str(output))
    (problem,) = report.problems
    assert problem.kind == "unfinished"
    assert "if it is still running, wait" in problem.advice
    assert any(f"1 answers were written by run {SECOND}, which did not finish" in note for note in report.notes)
    write_run(output, THIRD, [99], later_s=60)
    assert not found(output).keys() - {"duplicate"}  # here the third wrote the row again; a real one takes it over


def test_a_killed_run_is_none_of_the_next_one_s_trouble(output):
    write_run(output, SECOND, [], finished=False)
    write_run(output, THIRD, range(24), version="3", later_s=60)
    report = audit(str(output))
    assert report.right, report.problems
    assert any(SECOND in note for note in report.notes)


def test_rows_without_a_record_or_marker_are_of_an_unknown_run(output):
    write_run(output, SECOND, range(3), version="2", later_s=60)
    (output / "_runs" / f"{SECOND}.json").unlink()
    problems = found(output)
    assert set(problems) == {"unknown_run"}
    assert problems["unknown_run"].number == 6
    assert SECOND in problems["unknown_run"].what


def test_a_record_that_counted_otherwise_is_told_until_a_later_run_is_whole(output):
    path = output / "_runs" / f"{FIRST}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recordings_found": 25}))
    problems = found(output)
    assert set(problems) == {"miscounted"}
    assert "25 recordings were found, and 24 ended in a state" in problems["miscounted"].example
    write_run(output, SECOND, range(25), version="2", later_s=60)
    assert found(output) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answers": 2}, "are not the number of answer_keys"),
        ({"kept_dead_letters": 1}, "are not the number of dead_letter_keys"),
        ({"terminal_state": TerminalState.SKIPPED_DONE}, "and yet wrote rows"),
        (
            {"terminal_state": TerminalState.DEAD_LETTER},
            "does not fit the keys",
        ),
    ],
)
def test_a_row_that_contradicts_itself_is_found(output, changes, says):
    answer = outputs.answer_row(50)
    row = outputs.recording_row(50, [answer])._replace(**changes)
    outputs.write_rows(output, FIRST, write.ANSWERS, [answer])
    outputs.write_rows(output, FIRST, write.RECORDINGS, [row])
    problem = next(problem for problem in audit(str(output)).problems if says in problem.what)
    assert problem.kind == "inconsistent"
    assert problem.example == row.uri


def test_a_cut_off_file_is_named_and_the_rest_is_audited(output):
    victim = files(output, "captions")[1]
    victim.write_bytes(victim.read_bytes()[:-9])
    problems = found(output)
    assert set(problems) == {"unreadable", "missing", "miscounted"}
    assert victim.name in problems["unreadable"].example


def test_history_that_lost_its_rows_is_no_error(output):
    write_run(output, SECOND, range(24), version="2", later_s=60)
    files(output, "captions")[0].unlink()
    run_of = {path.name.startswith(FIRST) for path in files(output, "captions")}
    assert run_of == {True, False}
    report = audit(str(output))
    assert report.right, report.problems
    assert any("that only older rows of recordings/ reference have no row" in note for note in report.notes)


def test_no_output_is_said_so(tmp_path):
    with pytest.raises(AuditError, match="no tables and no runs"):
        audit(str(tmp_path / "nowhere"))


@pytest.fixture
def archive(tmp_path):
    """Files, and an output in which each has a row."""
    folder = tmp_path / "archive"
    folder.mkdir()
    for name in ("a.wav", "b.wav", "c.wav"):
        (folder / name).write_bytes(name.encode())
    rows = []
    for number, recording in enumerate(list_recordings(str(folder))):
        row = outputs.recording_row(number, [outputs.answer_row(number)])
        rows.append(row._replace(**{name: getattr(recording, name) for name in SHARED}))
    out = tmp_path / "out"
    answers = [outputs.answer_row(number)._replace(recording_id=row.recording_id) for number, row in enumerate(rows)]
    outputs.write_rows(out, FIRST, write.RECORDINGS, rows)
    outputs.write_rows(out, FIRST, write.ANSWERS, answers)
    (out / "_runs").mkdir()
    record = {"run_id": FIRST, "recordings": {"ok": 3}, "answers": {"captions": 3}, "job": {"channel": "mix"}}
    (out / "_runs" / f"{FIRST}.json").write_text(json.dumps(record))
    return folder


SHARED = ("recording_id", "uri", "size_bytes", "etag", "mtime")


def test_a_listing_that_is_the_same_is_right(archive):
    report = audit(str(archive.parent / "out"), [str(archive)])
    assert report.right, report.problems
    assert report.listed == 3


def test_new_changed_and_gone_recordings_are_told(archive):
    (archive / "d.wav").write_bytes(b"new")
    (archive / "b.wav").write_bytes(b"changed")
    (archive / "c.wav").unlink()
    report = audit(str(archive.parent / "out"), [str(archive)])
    problems = {problem.kind: problem for problem in report.problems}
    assert set(problems) == {"never_processed", "changed"}
    assert (problems["never_processed"].number, problems["never_processed"].example) == (1, str(archive / "d.wav"))
    assert (problems["changed"].number, problems["changed"].example) == (1, str(archive / "b.wav"))
    assert any(
        f"1 recordings are not in the input any more, for example {archive / 'c.wav'}" in n for n in report.notes
    )


def test_where_only_one_side_has_an_etag_size_and_time_tell(archive):
    out = archive.parent / "out"
    (path,) = (out / "recordings").iterdir()
    rows = read_table(path)
    tagged = rows.set_column(rows.schema.get_field_index("etag"), "etag", pa.array(["tag"] * 3))
    pq.write_table(tagged, path)
    assert audit(str(out), [str(archive)]).right
    (archive / "b.wav").write_bytes(b"changed")
    assert [problem.kind for problem in audit(str(out), [str(archive)]).problems] == ["changed"]


def test_a_manifest_without_sizes_says_nothing_of_changes(archive, tmp_path):
    manifest = tmp_path / "list.csv"
    manifest.write_text("uri\n" + "".join(f"{archive / name}\n" for name in ("a.wav", "b.wav", "b.wav", "d.wav")))
    report = audit(str(archive.parent / "out"), [str(manifest)])
    assert [problem.kind for problem in report.problems] == ["never_processed"]
    assert report.listed == 3


def test_an_input_that_is_not_there_is_said_so(archive):
    with pytest.raises(AuditError, match=r"input .*nowhere: There is no object"):
        audit(str(archive.parent / "out"), [str(archive / "nowhere")])


def test_answers_that_were_written_again_with_other_metadata_are_no_copies(tmp_path):
    write_run(tmp_path, FIRST, range(3))
    rows = [outputs.answer_row(n, station="elsewhere", created_at=outputs._MOMENT + 60_000_000) for n in range(3)]
    at = outputs._MOMENT + 60_000_000
    outputs.write_rows(tmp_path, SECOND, write.ANSWERS, rows)
    results = [outputs.recording_row(n, [row], created_at=at) for n, row in enumerate(rows)]
    outputs.write_rows(tmp_path, SECOND, write.RECORDINGS, results)
    record = {"run_id": SECOND, "recordings": {"ok": 3}, "answers": {"captions": 3}, "dead_letters": {}}
    (tmp_path / "_runs" / f"{SECOND}.json").write_text(json.dumps(record | {"recordings_found": 3}))
    assert audit(str(tmp_path)).problems == []
    outputs.write_rows(tmp_path, SECOND, write.ANSWERS, rows[:1])  # the same names
    outputs.write_rows(tmp_path, SECOND, write.ANSWERS, rows[:2], in_files_of=1)
    assert [problem.kind for problem in audit(str(tmp_path)).problems] == ["duplicate"]
