"""Runs into an output that has rows of earlier runs: what is asked again, and what the tables hold in the end."""

import itertools
import json
import logging
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from af3pipe import storage
from af3pipe.models import ENGINES
from af3pipe.pipelines import batch
from af3pipe.pipelines.audit import audit
from af3pipe.pipelines.job import JobError, make_job
from af3pipe.schemas import Reason, Rejected, Stage, source_key
from benchmarks import constant_engine
from tests import fixtures_audio as make
from tests.integration.runners import ANSWER_TABLES, rows
from tests.integration.test_killed_runs import KILLED, run_killed
from tests.read_tables import read_table

pytestmark = pytest.mark.integration
RATE = 16_000
TABLES = (*ANSWER_TABLES, "recordings", "dead_letters")
BOTH = ["caption", "transcript"]


class WatchedEngine(constant_engine.ConstantEngine):
    """Answers at once, and tells what it was asked: (length in samples, task, question)."""

    asked: ClassVar[list] = []
    full_for: ClassVar[set] = set()
    """Lengths for which its memory does not do."""

    def submit(self, request):
        for task in request.tasks:
            self.asked.append((len(request.audios[0]), task.name, task.question))
        if len(request.audios[0]) not in self.full_for:
            return super().submit(request)
        failed = Future()
        failed.set_exception(Rejected(Stage.GENERATE, Reason.OUT_OF_MEMORY, "full"))
        return failed


@pytest.fixture(autouse=True)
def watched(engines, monkeypatch):
    monkeypatch.setitem(ENGINES, "watched", f"{__name__}:WatchedEngine")
    monkeypatch.setattr(WatchedEngine, "full_for", set())


# Its length tells which recording a request is of.
SAMPLES = {"a.wav": 4800, "b.wav": 6400, "c.wav": 8000}


def fill(folder):
    """Three recordings, one that is longer than the model's cap of 60 s, and one that is broken."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, samples) in enumerate(SAMPLES.items()):
        (folder / name).write_bytes(make.wav(make.sound(samples / RATE, RATE, 2, seed), RATE))
    long = make.sound(65, RATE)
    long[50 * RATE : 51 * RATE] = 0
    (folder / "long.flac").write_bytes(make.flac(long, RATE))
    (folder / "broken.wav").write_text("no audio at all")
    return folder


def manifest(folder, *lines):
    path = folder / f"list-{len(list(folder.iterdir()))}.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("archive"))


@pytest.fixture
def finish(model, tmp_path):
    """Runs a job to its end; the report, and what was asked."""

    def run(inputs, output=tmp_path / "out", flags=(), **changes):
        values = {
            "inputs": [str(name) for name in inputs],
            "output": str(output),
            "model": str(model),
            "tasks": ["caption"],
            "engine": "watched",
            "over_length": "split",
            "decode_guard": False,
            "max_new_tokens": 4,
            "device": "cpu",
        }
        WatchedEngine.asked.clear()
        report = batch.run(make_job(values | changes), flags)
        assert report.counts.reconciled, report.counts.problems
        return report, sorted(WatchedEngine.asked, key=str)

    return run


@pytest.fixture(scope="module")
def answered(archive, model, tmp_path_factory):
    """An output that the real engine has filled; its answers have the keys that every engine's have."""
    output = tmp_path_factory.mktemp("answered")
    values = {"inputs": [str(archive)], "output": str(output), "model": str(model), "tasks": BOTH, "device": "cpu"}
    job = make_job(values | {"over_length": "split", "max_new_tokens": 4, "decode_guard": False})
    report = batch.run(job)
    assert report.counts.states == {"ok": 4, "dead_letter": 1}
    return output


@pytest.fixture
def output(answered, tmp_path):
    return Path(shutil.copytree(answered, tmp_path / "out"))


def newest(output):
    """The newest row of each recording, by the name of its file and by its id."""
    found = {}
    for row in sorted(rows(output, "recordings", without=()), key=lambda row: row["created_at"]):
        found[Path(row["uri"]).name] = found[row["recording_id"]] = row
    return found


def count_rows(output):
    return {table: len(rows(output, table)) for table in (*ANSWER_TABLES, "dead_letters")}


def asked_of(names, task="caption", question=None):
    lengths = {**SAMPLES, "long.flac": (60 * RATE, 5 * RATE)}
    flat = itertools.chain.from_iterable(np.atleast_1d(lengths[name]).tolist() for name in names)
    return sorted(((length, task, question) for length in flat), key=str)


ALL = [*SAMPLES, "long.flac"]


def test_a_run_again_skips_all_and_opens_nothing(archive, output, finish):
    before = count_rows(output)
    old = newest(output)
    report, _ = finish([archive], tasks=BOTH, engine="closed")
    assert report.counts.states == {"skipped_done": 5}
    assert (report.counts.found, report.counts.answers, report.counts.dead_letters) == (5, {}, {})
    assert report.counts.audio_s == 0
    assert count_rows(output) == before
    assert newest(output) == old, "what is skipped gets no row"
    third, _ = finish([archive], tasks=BOTH, engine="closed")  # what was skipped is skipped again
    assert third.counts.states == {"skipped_done": 5}


def test_one_task_more_asks_only_that(archive, output, finish):
    report, asked = finish([archive], tasks=BOTH, questions=["Is it loud?"])
    assert asked == asked_of(ALL, "answer", "Is it loud?")
    assert report.counts.answers == {"answers": 5}
    assert report.counts.states == {"ok": 4, "dead_letter": 1}
    assert (newest(output)["a.wav"]["answers"], newest(output)["a.wav"]["kept_answers"]) == (1, 2)
    # A caption a segment, one transcript, and the answers to come.
    assert (newest(output)["long.flac"]["answers"], newest(output)["long.flac"]["kept_answers"]) == (2, 3)
    assert newest(output)["broken.wav"]["kept_dead_letters"] == 1
    assert count_rows(output)["dead_letters"] == 1


def test_one_task_less_opens_nothing_and_leaves_its_answers_out(archive, output, finish):
    report, _ = finish([archive], tasks=["transcript"], engine="closed")
    assert report.counts.answers == {}
    assert len(newest(output)["long.flac"]["answer_keys"]) == 1


def test_a_question_of_a_manifest_row_is_asked_of_that_recording_only(archive, output, finish):
    listed = manifest(archive, {"uri": "b.wav", "question": "Who speaks?"})
    report, asked = finish([archive, listed], tasks=BOTH)
    assert asked == asked_of(["b.wav"], "answer", "Who speaks?")
    assert report.counts.states == {"skipped_done": 4, "ok": 1}
    other = manifest(archive, {"uri": "b.wav", "question": "Who speaks now?"})
    assert finish([archive, other], tasks=BOTH)[1] == asked_of(["b.wav"], "answer", "Who speaks now?")
    report, _ = finish([archive, listed], tasks=BOTH, engine="closed")
    assert report.counts.states == {"skipped_done": 4, "ok": 1}, "its newest row is of another question"
    assert len(newest(output)["b.wav"]["answer_keys"]) == 3


def test_a_follow_up_is_written_and_what_it_follows_is_not_written_again(archive, output, finish):
    finish([archive], questions=["Who?"])
    before = count_rows(output)["answers"]
    _, asked = finish([archive], questions=[{"question": "Who?", "then": ["Why?"]}])
    assert asked == sorted(asked_of(ALL, "answer", "Who?") + asked_of(ALL, "answer", "Why?"), key=str)
    assert count_rows(output)["answers"] == 2 * before == 10


@pytest.mark.parametrize(
    "changes",
    [{"max_new_tokens": 5}, {"tasks": [{"name": "caption", "prompt": "What is heard?"}]}, {"think": True}],
    ids=["decoding", "prompt", "think"],
)
def test_another_wish_asks_again(archive, output, finish, changes):
    report, asked = finish([archive], **changes)
    assert asked == asked_of(ALL)
    assert report.counts.answers == {"captions": 5}
    assert newest(output)["a.wav"]["kept_answers"] == 0
    finish([archive], engine="closed")  # the first answers are there still


def test_another_model_asks_again(archive, output, model, finish, tmp_path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": "trained further"}))
    _, asked = finish([archive], model=str(other))
    assert asked == asked_of(ALL)


def test_only_a_changed_file_is_asked_again(finish, tmp_path):
    archive = fill(tmp_path / "archive")
    finish([archive])
    (archive / "b.wav").write_bytes(make.wav(make.sound(6400 / RATE, RATE, 2, seed=9), RATE))  # as long as before
    report, asked = finish([archive])
    assert asked == asked_of(["b.wav"])
    assert report.counts.states == {"skipped_done": 4, "ok": 1}
    assert newest(tmp_path / "out")["b.wav"]["kept_answers"] == 0


def test_a_broken_file_is_not_read_again_until_it_changes(finish, tmp_path):
    archive = fill(tmp_path / "archive")
    broken, whole = archive / "broken.wav", (archive / "a.wav").read_bytes()
    broken.write_bytes(b"\0" * len(whole))
    finish([archive])
    times = broken.stat()
    broken.write_bytes(whole)
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    report, _ = finish([archive], engine="closed")  # whoever reads it finds that it is whole
    assert report.counts.states == {"skipped_done": 5}
    broken.touch()
    assert finish([archive])[1] == asked_of(["a.wav"])
    row = newest(tmp_path / "out")["broken.wav"]
    assert (row["terminal_state"], row["dead_letter_keys"]) == ("ok", [])
    assert count_rows(tmp_path / "out")["dead_letters"] == 1  # what was stays readable


def test_what_may_turn_out_otherwise_is_tried_again_and_told_once(archive, finish, tmp_path):
    WatchedEngine.full_for.add(SAMPLES["b.wav"])
    report, _ = finish([archive])
    assert report.counts.dead_letters == {"out_of_memory": 1, "unsupported_format": 1}
    report, asked = finish([archive])
    assert asked == asked_of(["b.wav"])
    assert report.counts.states == {"skipped_done": 4, "dead_letter": 1}
    assert report.counts.dead_letters == {}
    assert newest(tmp_path / "out")["b.wav"]["kept_dead_letters"] == 1
    WatchedEngine.full_for.clear()
    assert finish([archive])[1] == asked_of(["b.wav"])
    row = newest(tmp_path / "out")["b.wav"]
    assert (row["terminal_state"], row["dead_letter_keys"], row["reasons"]) == ("ok", [], [])
    assert finish([archive], engine="closed")[0].counts.states == {"skipped_done": 5}
    assert count_rows(tmp_path / "out")["dead_letters"] == 2


def test_a_part_that_failed_is_asked_again_and_the_transcript_is_whole(archive, finish, tmp_path):
    for failed in (60 * RATE, 5 * RATE):
        output = tmp_path / str(failed)
        WatchedEngine.full_for = {failed}
        finish([archive / "long.flac"], output, tasks=BOTH)
        WatchedEngine.full_for = set()
        _, asked = finish([archive / "long.flac"], output, tasks=BOTH)
        # The caption that is there is not asked again; a transcript is of all its parts.
        assert asked == sorted([(failed, "caption", None), *asked_of(["long.flac"], "transcript")], key=str)
        row = newest(output)["long.flac"]
        assert (row["terminal_state"], row["covered_s"], len(row["answer_keys"])) == ("ok", 65.0, 3)
        assert sorted(len(found["segments"]) for found in rows(output, "transcripts")) == [1, 2]


def test_too_long_ones_are_asked_when_they_may_be_split(archive, finish, tmp_path):
    report, asked = finish([archive], over_length="dead-letter")
    assert asked == asked_of(SAMPLES)
    assert report.counts.dead_letters == {"too_long": 1, "unsupported_format": 1}
    assert finish([archive], over_length="dead-letter", engine="closed")[0].counts.states == {"skipped_done": 5}
    report, asked = finish([archive])
    assert asked == asked_of(["long.flac"])
    row = newest(tmp_path / "out")["long.flac"]
    assert (row["terminal_state"], row["dead_letter_keys"], row["answers"]) == ("ok", [], 2)
    # And back: what is too long now is told by the row that is there.
    report, asked = finish([archive], over_length="dead-letter")
    assert (asked, report.counts.dead_letters) == ([], {})
    assert newest(tmp_path / "out")["long.flac"]["terminal_state"] == "dead_letter"


def test_a_long_recording_keeps_its_transcript_until_it_is_cut_otherwise(archive, output, finish):
    _, asked = finish([archive / "long.flac"], tasks=["transcript"], questions=["Is it loud?"])
    assert {task for _, task, _ in asked} == {"answer"}
    report, asked = finish([archive / "long.flac"], tasks=["transcript"], split_at="silence")
    assert [task for _, task, _ in asked] == ["transcript"] * 2
    assert report.counts.answers == {"transcripts": 1}
    pieces = {len(row["segments"]): row for row in rows(output, "transcripts")}
    assert set(pieces) == {1, 2}
    report, asked = finish([archive], tasks=BOTH, split_at="silence")
    assert asked != []  # captions of the long one: it has other segments; the short ones are as they were
    assert {length for length, *_ in asked}.isdisjoint(SAMPLES.values())
    assert {task for _, task, _ in asked} == {"caption"}


def test_silence_inside_a_long_recording_is_settled_too(finish, tmp_path):
    tape = np.concatenate([make.sound(60, RATE), np.zeros((60 * RATE, 1), np.float32), make.sound(2, RATE)])
    (tmp_path / "tape.flac").write_bytes(make.flac(tape, RATE))
    tape_only = [tmp_path / "tape.flac"]
    report, _ = finish(tape_only, tasks=BOTH, on_silent="dead-letter")
    assert report.counts.states == {"ok_partial": 1}
    report, _ = finish(tape_only, tasks=BOTH, on_silent="dead-letter", engine="closed")
    assert report.counts.states == {"skipped_done": 1}
    # When silence is to be heard, only that is asked of it; of the transcript, which has a gap, every part.
    report, asked = finish(tape_only, tasks=BOTH)
    assert [task for _, task, _ in asked].count("caption") == 1
    assert [task for _, task, _ in asked].count("transcript") == 3
    assert report.counts.states == {"ok": 1}


def test_no_resume_asks_everything(archive, output, finish):
    before = count_rows(output)
    report, asked = finish([archive], tasks=BOTH, resume=False)
    assert asked == sorted(asked_of(ALL) + asked_of(ALL, "transcript"), key=str)
    assert report.counts.states == {"ok": 4, "dead_letter": 1}
    assert count_rows(output) == {table: 2 * number for table, number in before.items()}
    # The same work, there twice: each key counts once.
    report, _ = finish([archive], tasks=BOTH, engine="closed")
    assert report.counts.states == {"skipped_done": 5}


def test_two_inputs_that_name_the_same_file_are_one_recording(archive, output, finish):
    listed = manifest(archive, {"uri": "a.wav"}, {"uri": "a.wav"})
    report, _ = finish([archive, archive, archive / "a.wav", f"{archive}/*.wav", listed], tasks=BOTH, engine="closed")
    assert (report.counts.found, report.counts.states) == (5, {"skipped_done": 5})


def test_a_manifest_that_names_what_a_folder_named_finds_it_done(archive, output, finish):
    """Only a listing states size and time: what a manifest names is looked at before it is read."""
    listed = manifest(archive, {"uri": "a.wav"}, {"uri": "gone.wav"})
    before = newest(output)["a.wav"]
    report, _ = finish([listed], tasks=BOTH, engine="closed")
    assert report.counts.states == {"skipped_done": 1, "dead_letter": 1}
    assert newest(output)["a.wav"] == before
    report, _ = finish([listed], tasks=BOTH, engine="closed")
    assert (report.counts.states, report.counts.dead_letters) == ({"skipped_done": 1, "dead_letter": 1}, {})
    assert newest(output)["gone.wav"]["kept_dead_letters"] == 1


ODD = ["a/b", "q\"u'ote", "é\u2028", "nul\x00l", "%s {0}", " ", "A", "a", "x" * 500]


def test_ids_may_hold_anything_and_the_same_audio_may_have_several(archive, finish, tmp_path):
    listed = manifest(archive, *({"uri": "a.wav", "id": odd} for odd in ODD))
    report, asked = finish([listed], chunk_recordings=4)
    assert report.counts.states == {"ok": len(ODD)}
    assert asked == asked_of(["a.wav"]), "the same audio is asked once, whatever it is called"
    assert len({row["answer_key"] for row in rows(tmp_path / "out", "captions")}) == 1  # it is the same work
    assert {row["recording_id"] for row in rows(tmp_path / "out", "captions")} == set(ODD)
    assert finish([listed], engine="closed")[0].counts.states == {"skipped_done": len(ODD)}
    more = manifest(archive, *({"uri": "a.wav", "id": odd} for odd in [*ODD, "new"]))
    report, asked = finish([more], tasks=BOTH)
    assert asked == asked_of(["a.wav"], "transcript")
    assert {row["recording_id"] for row in rows(tmp_path / "out", "captions")} == {*ODD, "new"}


def spellings(folder):
    """The same file by other names, as inputs and manifests have them."""
    (folder / "linked").symlink_to(folder / "archive", target_is_directory=True)
    (folder / "link.wav").symlink_to(folder / "archive" / "a.wav")
    return {
        "relative": os.path.relpath(folder / "archive" / "a.wav"),
        "dots": f"{folder}/archive/../archive/./a.wav",
        "file://": f"file://{folder}/archive/a.wav",
        "local://": f"local://{folder}/archive/a.wav",
        "slashes": f"{folder}//archive//a.wav",
        "through a linked folder": f"{folder}/linked/a.wav",
        "a linked file": f"{folder}/link.wav",
    }


@pytest.mark.representative
def test_the_same_file_by_another_name_is_not_asked_again(finish, tmp_path):
    fill(tmp_path / "archive")
    output = tmp_path / "out"
    finish([tmp_path / "archive" / "a.wav"], output)
    for name, spelling in spellings(tmp_path).items():
        # A manifest's relative names start from its own folder.
        named = "archive/a.wav" if name == "relative" else spelling
        for given in (spelling, manifest(tmp_path, {"uri": named})):
            report, asked = finish([given], output, engine="closed")
            assert (asked, report.counts.states) == ([], {"skipped_done": 1}), name
        report, asked = finish([manifest(tmp_path, {"uri": named, "id": name, "how": name})], output)
        assert (asked, report.counts.states) == ([], {"ok": 1}), name
    found = rows(output, "captions", without=())
    assert {row["uri"] for row in found} == {str(tmp_path / "archive" / "a.wav")}
    assert {row["metadata"] for row in found} == {"{}", *(f'{{"how": "{name}"}}' for name in SPELLINGS)}
    assert audit(str(output)).right


SPELLINGS = ("relative", "dots", "file://", "local://", "slashes", "through a linked folder", "a linked file")


def test_a_folder_and_links_to_it_are_listed_once(finish, tmp_path):
    fill(tmp_path / "archive")
    spellings(tmp_path)
    (tmp_path / "archive" / "deeper").mkdir()
    (tmp_path / "archive" / "deeper" / "back").symlink_to(tmp_path / "archive", target_is_directory=True)
    report, asked = finish([tmp_path, tmp_path / "linked"], tmp_path / "out")
    assert report.counts.states == {"ok": 4, "dead_letter": 1}
    assert asked == asked_of(ALL)


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["made readable", "put back"])
def test_what_the_world_did_is_tried_again_by_every_run(repair, finish, tmp_path, monkeypatch):
    archive = fill(tmp_path / "archive")
    names = ["a.wav", "b.wav", "c.wav"]
    listed = manifest(tmp_path, *({"uri": f"archive/{name}"} for name in names))
    if repair == "put back":
        for name in names:
            (archive / name).rename(archive / f"{name}.gone")
    else:
        opened = storage.open_version

        def refused(info):
            raise Rejected(Stage.READ, Reason.PERMISSION_DENIED, f"{info.uri} may not be read")

        monkeypatch.setattr(storage, "open_version", refused)
    for _ in range(2):
        report, asked = finish([listed])
        assert (asked, report.counts.states) == ([], {"dead_letter": 3})
    if repair == "put back":
        for name in names:
            (archive / f"{name}.gone").rename(archive / name)
    else:
        monkeypatch.setattr(storage, "open_version", opened)
    report, asked = finish([listed])
    assert (asked, report.counts.states) == (asked_of(names), {"ok": 3})
    assert finish([listed], engine="closed")[0].counts.states == {"skipped_done": 3}


def test_an_output_below_its_input_does_not_grow(finish, tmp_path):
    """Its Parquet would be taken for manifests, with rows that ask what was asked."""
    archive = fill(tmp_path / "archive")
    output = archive / "labels" / "out"
    listed = manifest(archive, {"uri": "a.wav", "question": "Who?", "note": "mine"})
    inputs = [archive, f"{archive}/**/*.parquet", f"{archive}/**/*.jsonl"]
    report, _ = finish(inputs, output, tasks=BOTH)
    assert report.counts.dead_letters == {"unsupported_format": 1}, "of broken.wav alone"
    before = count_rows(output)
    for night in range(3):
        report, _ = finish(inputs, output, tasks=BOTH, engine="closed")
        assert report.counts.states == {"skipped_done": report.counts.found}, night
        assert count_rows(output) == before
    with pytest.raises(JobError, match="belongs to an output of af3pipe"):
        finish(list((output / "captions").iterdir()), tmp_path / "other")
    assert Path(listed).exists()


@pytest.mark.slow
def test_free_text_as_partitions(finish, tmp_path, caplog):
    archive = fill(tmp_path / "archive")
    texts = ["あ" * 28, "あ" * 28 + "い", "x" * 300, "a/b", "7", ""]
    listed = manifest(archive, *({"uri": "a.wav", "id": f"{n}", "note": text} for n, text in enumerate(texts)))
    report, _ = finish([listed], partition_by=["note"])
    assert report.counts.states == {"ok": len(texts)}
    folders = {path.parent.name for path in (tmp_path / "out" / "captions").rglob("*.parquet")}
    assert len(folders) == len(texts)
    assert max(len(name.encode()) for name in folders) < 200
    assert finish([listed], partition_by=["note"], engine="closed")[0].counts.states == {"skipped_done": len(texts)}
    many = manifest(archive, *({"uri": "a.wav", "id": f"m{n}", "note": f"{n}"} for n in range(1001)))
    with caplog.at_level(logging.WARNING):
        finish([many], tmp_path / "many", partition_by=["note"])
    assert "more than 1000 folders" in caplog.text


OTHER_AUDIO = {
    "another file": {"uri": "b.wav"},
    "a part of it": {"uri": "a.wav", "offset": 0.1, "duration": 0.2},
    "a part of it from the beginning": {"uri": "a.wav", "duration": 0.1},
    "a channel of it": {"uri": "a.wav", "channel": "left"},
}


@pytest.mark.parametrize("other", OTHER_AUDIO.values(), ids=OTHER_AUDIO)
def test_an_id_names_one_audio_in_all_runs(other, archive, finish, tmp_path):
    """Row numbers as ids of daily manifests would replace yesterday's answers by today's."""
    finish([manifest(archive, {"uri": "a.wav", "id": "x"})])
    before = newest(tmp_path / "out")["x"]
    for _ in range(2):
        report, asked = finish([manifest(archive, {**other, "id": "x"}, {"uri": "b.wav", "id": "y"})])
        assert asked in ([], asked_of(["b.wav"]))
        assert newest(tmp_path / "out")["x"] == before
    assert report.counts.states == {"skipped_done": 2}
    (letter,) = rows(tmp_path / "out", "dead_letters")
    assert letter["reason"] == "unsupported_format"
    assert "'x'" in letter["detail"]
    assert "a.wav" in letter["detail"]
    assert other["uri"] in letter["detail"]
    assert audit(str(tmp_path / "out")).right


def test_an_id_may_not_be_that_of_other_audio_without_one(archive, finish, tmp_path):
    other = source_key(str(archive / "a.wav"))
    report, _ = finish([manifest(archive, {"uri": "a.wav"}, {"uri": "b.wav", "id": other})])
    assert report.counts.states == {"ok": 1, "dead_letter": 1}
    assert report.counts.reconciled, report.counts.problems
    assert newest(tmp_path / "out")[other]["uri"].endswith("a.wav")


def test_a_clash_of_ids_that_is_mended_is_told_no_more(archive, finish, tmp_path):
    questions = [{"uri": "a.wav", "id": "x", "question": text, "question_id": "q"} for text in ("Who?", "What?")]
    report, _ = finish([manifest(archive, *questions)])
    assert report.counts.states == {"ok_partial": 1}
    clashing = newest(tmp_path / "out")["x"]
    heard = next(row["question"] for row in rows(tmp_path / "out", "answers"))
    mended = manifest(archive, next(row for row in questions if row["question"] == heard))
    report, asked = finish([mended])
    assert (asked, report.counts.states) == ([], {"ok": 1})
    assert newest(tmp_path / "out")["x"]["dead_letter_keys"] == []
    report, asked = finish([manifest(archive, *questions)], engine="closed")  # and told again when it is back
    assert newest(tmp_path / "out")["x"]["dead_letter_keys"] == clashing["dead_letter_keys"]
    assert newest(tmp_path / "out")["x"]["terminal_state"] == "ok_partial"


def test_a_channel_of_a_file_is_another_recording(archive, output, finish):
    report, asked = finish([archive / "a.wav"], channel="left")
    assert (asked, report.counts.states) == (asked_of(["a.wav"]), {"ok": 1})
    assert finish([archive / "a.wav"], channel="right")[1] == asked_of(["a.wav"])
    assert finish([archive / "a.wav"], channel="left", engine="closed")[0].counts.states == {"skipped_done": 1}
    assert len({row["recording_id"] for row in rows(output, "captions") if row["uri"].endswith("a.wav")}) == 3


def test_what_vanishes_and_comes_back_is_still_done(finish, tmp_path):
    archive = fill(tmp_path / "archive")
    listed = manifest(archive, {"uri": "a.wav"}, {"uri": "b.wav"})
    finish([listed])
    (archive / "a.wav").rename(archive / "a.hidden")
    report, _ = finish([listed], engine="closed")
    assert report.counts.states == {"skipped_done": 1, "dead_letter": 1}
    assert newest(tmp_path / "out")["a.wav"]["terminal_state"] == "dead_letter"
    (archive / "a.hidden").rename(archive / "a.wav")
    report, _ = finish([listed], engine="closed")
    assert report.counts.states == {"skipped_done": 1, "ok": 1}, "its newest row is not the one that counts again"
    row = newest(tmp_path / "out")["a.wav"]
    assert (row["terminal_state"], len(row["answer_keys"]), row["dead_letter_keys"]) == ("ok", 1, [])


def test_a_run_in_which_all_is_dead_runs_again(finish, tmp_path):
    folder = tmp_path / "dead"
    folder.mkdir()
    (folder / "broken.wav").write_text("no audio")
    listed = manifest(folder, {"uri": "missing.wav"}, "no json\n", {"nothing": 1})
    for states in ({"dead_letter": 4}, {"dead_letter": 1, "skipped_done": 3}):
        report, _ = finish([folder, listed], engine="closed")
        assert report.counts.states == states
        assert count_rows(tmp_path / "out") == {"captions": 0, "transcripts": 0, "answers": 0, "dead_letters": 4}


def test_an_answer_that_is_lost_is_asked_again(archive, output, finish):
    for path in (output / "captions").glob("*.parquet"):
        path.unlink()
    report, asked = finish([archive], tasks=BOTH)
    assert asked == asked_of(ALL)
    assert report.counts.states == {"ok": 4, "skipped_done": 1}


def test_chunks_give_the_rows_of_one(archive, finish, tmp_path):
    listed = manifest(archive, {"uri": "a.wav", "id": "again", "question": "Who?"}, {"uri": "no.wav"}, "no json\n")
    for size, output in ((1000, tmp_path / "one"), (2, tmp_path / "chunks")):
        finish([archive, listed], output, tasks=BOTH, chunk_recordings=size)
    for table in TABLES:
        without = ("run_id", "created_at", "traceback")
        assert rows(tmp_path / "chunks", table, without=without) == rows(tmp_path / "one", table, without=without)
    assert len(list((tmp_path / "chunks" / "captions").iterdir())) > 1
    assert len(list((tmp_path / "one" / "captions").iterdir())) == 1
    report, _ = finish([archive, listed], tmp_path / "chunks", tasks=BOTH, engine="closed")
    assert report.counts.states == {"skipped_done": 7, "dead_letter": 1}


def test_a_sample_is_spread_over_the_chunks(archive, finish, tmp_path):
    parts = ({"uri": "a.wav", "id": f"{number}", "offset": number / 100} for number in range(7))
    listed = manifest(archive, *parts)
    report, _ = finish([listed], chunk_recordings=3, verify_sample=5)
    assert report.verified.requests == report.verified.equal == 5
    assert [path.name for path in (tmp_path / "out" / "_runs").iterdir()] == [f"{report.run_id}.json"]
    report, _ = finish([listed], verify_sample=5, engine="closed")
    assert report.verified.requests == 0


@pytest.fixture(scope="module")
def several_processes():
    return ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def two_more_runs(archive, model, output, flags=()):
    """More to ask, and then nothing more: the counts and the tables of each."""
    listed = archive / "more.jsonl"
    lines = [
        {"uri": "a.wav", "question": "Who?"},
        *({"uri": uri, "id": "twice"} for uri in ("b.wav", "c.wav")),
        {"uri": "no.wav"},
    ]
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"inputs": [str(archive), str(listed)], "output": str(output), "model": str(model), "tasks": BOTH}
    job = make_job(values | {"over_length": "split", "max_new_tokens": 4, "device": "cpu", "decode_guard": False})
    for _ in range(2):
        counts = batch.run(job, flags).counts
        assert counts.reconciled, counts.problems
        tables = {name: rows(output, name, without=("run_id", "created_at", "traceback")) for name in TABLES}
        yield counts.states, counts.answers, counts.dead_letters, tables


@pytest.fixture(scope="module")
def here(archive, answered, model, tmp_path_factory):
    output = Path(shutil.copytree(answered, tmp_path_factory.mktemp("here") / "out"))
    return list(two_more_runs(archive, model, output))


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["several_processes", "job_service"])
def test_elsewhere_runs_resume_as_here(archive, answered, model, here, tmp_path, runner, request):
    (states, answers, letters, _), (again, nothing, no_letters, _) = here
    assert states == {"ok": 2, "dead_letter": 2, "skipped_done": 4}
    assert answers == {"captions": 1, "transcripts": 1, "answers": 1}
    assert letters == {"unsupported_format": 1, "not_found": 1}
    assert (again, nothing, no_letters) == ({"dead_letter": 1, "skipped_done": 7}, {}, {})
    output = Path(shutil.copytree(answered, tmp_path / "out"))
    there = two_more_runs(archive, model, output, request.getfixturevalue(runner))
    for number, (mine, theirs) in enumerate(zip(here, there, strict=True)):
        assert theirs == mine, number


@pytest.mark.representative
def test_a_killed_run_leaves_word_that_it_began(archive, finish, model, tmp_path, caplog):
    output = tmp_path / "out"
    job = {"inputs": [str(archive)], "output": str(output), "model": str(model), "decode_guard": False}
    (killed,) = run_killed(tmp_path, job | {"tasks": ["caption"], "device": "cpu"}, [{"step": 7}])
    assert killed["status"] == KILLED
    (left,) = (output / "_runs").iterdir()
    started = json.loads(left.read_text())
    assert left.name == f"{started['run_id']}.started.json"
    assert started["job"]["inputs"] == [str(archive)]
    with caplog.at_level(logging.WARNING):
        report, _ = finish([archive])
    (told,) = [found.message for found in caplog.records if "has not finished" in found.message]
    assert told.startswith(f"run {started['run_id']}, started at {started['started_at']} on ")
    assert "its answers are reused" in told
    record = json.loads((output / "_runs" / f"{report.run_id}.json").read_text())
    assert record["started_at"] <= record["finished_at"]
    assert not (output / "_runs" / f"{report.run_id}.started.json").exists()


def test_a_run_that_ends_while_it_is_looked_for_is_no_error(archive, output, finish, caplog):
    """Two runs at once: the other deletes its word that it began when it has written its record."""
    (record,) = (output / "_runs").glob("*.json")
    began = record.with_name(f"{record.stem}.started.json")
    began.write_text(json.dumps({"run_id": "x", "started_at": "now", "host": "h", "pid": 1}))
    with caplog.at_level(logging.WARNING):
        finish([archive], tasks=BOTH, engine="closed")
    assert "has not finished" not in caplog.text


def test_a_file_among_the_earlier_rows_that_cannot_be_read_is_named(archive, output, finish):
    (path,) = (output / "captions").glob("*.parquet")
    body = path.read_bytes()
    path.write_bytes(body[: len(body) // 2])
    with pytest.raises(batch.RunFailed, match=rf"^{path}, with rows of earlier runs, cannot be used: .*[Mm]ove"):
        finish([archive], tasks=BOTH, engine="closed")
    path.write_bytes(body)
    older = output / "recordings" / "older.parquet"
    table = read_table(next((output / "recordings").glob("*.parquet")))
    pq.write_table(table.drop_columns(["answer_keys", "work_key"]), older)  # of a version that had no such columns
    assert finish([archive], tasks=BOTH)[0].counts.states == {"skipped_done": 5}
    assert finish([archive], tasks=BOTH, resume=False)[0].counts.states == {"ok": 4, "dead_letter": 1}
