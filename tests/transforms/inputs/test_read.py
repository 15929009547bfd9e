import json
import os
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.util import assert_that, equal_to

from af3pipe.schemas import DeadLetter, Question, Recording
from af3pipe.transforms import ReadRecordings
from af3pipe.transforms.inputs.manifest import is_manifest, read_manifest
from af3pipe.transforms.inputs.read import list_recordings, merge


def read(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_manifest(str(path)))


ROW = {
    "uri": "s3://b/a.flac",
    "offset": 1.5,
    "duration": "2",
    "question": "Who?",
    "choices": "cat | dog",
    "speaker": 7,
}


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("m.jsonl", json.dumps(ROW) + "\n\n"),
        ("m.csv", ",".join(ROW) + "\n" + ",".join(map(str, ROW.values()))),
        ("m.tsv", "\t".join(ROW) + "\n" + "\t".join(map(str, ROW.values()))),
        ("m.parquet", parquet([ROW])),
    ],
    ids=lambda found: found if isinstance(found, str) and found.startswith("m.") else "",
)
def test_every_kind_of_manifest_gives_the_same_recording(tmp_path, name, data):
    assert is_manifest(name)
    (found,) = read(tmp_path, name, data)
    assert (found.uri, found.offset_s, found.duration_s) == ("s3://b/a.flac", 1.5, 2.0)
    (question,) = found.questions
    assert (question.text, question.choices) == ("Who?", ("cat", "dog"))
    assert found.metadata == (("speaker", "7"),)


def test_nemo_manifests_and_relative_names(tmp_path):
    (found,) = read(tmp_path, "m.jsonl", json.dumps({"audio_filepath": "clips/a.wav", "duration": 3.2, "text": "hi"}))
    assert found.uri == str(tmp_path / "clips" / "a.wav")
    assert found.metadata == (("text", "hi"),)


def test_what_a_csv_says_is_kept_as_it_is_written(tmp_path):
    (found,) = read(tmp_path, "m.csv", "uri,id,speaker,day\n/a.wav,007,0012,2024-01-02\n")
    assert found.recording_id == "007"
    assert found.metadata == (("day", "2024-01-02"), ("speaker", "0012"))


def test_a_separator_that_json_allows_in_a_string_splits_no_row(tmp_path):
    (found,) = read(tmp_path, "m.jsonl", '{"uri": "/a.wav", "text": "one\u2028two"}')
    assert found.metadata == (("text", "one\u2028two"),)


def test_a_glob_of_manifests_is_all_of_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"uri": "/{name}.wav"}}')
    assert {found.uri for found in list_recordings(str(tmp_path / "*.jsonl"))} == {"/a.wav", "/b.wav"}


def test_a_name_in_another_encoding_costs_no_other(tmp_path):
    for name in (b"a.flac", b"m\xe4dchen.flac", b"z.flac"):
        (Path(os.fsdecode(bytes(tmp_path) + b"/" + name))).write_text("x")
    first, bad, last = sorted(list_recordings(str(tmp_path)), key=lambda found: found.uri)
    assert (first.uri[-6:], last.uri[-6:]) == ("a.flac", "z.flac")
    assert "m\\xe4dchen.flac is not UTF-8" in bad.detail
    assert bad.uri.endswith("m\\xe4dchen.flac")


def test_an_id_of_its_own_is_kept(tmp_path):
    (found,) = read(tmp_path, "m.jsonl", json.dumps({"id": 17, "uri": "/a.wav"}))
    assert found.recording_id == "17"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not an object"),
        ('{"name": "a"}', "names no audio"),
        ('{"uri": 5}', "names no audio"),
        ('{"uri": "a", "offset": "soon"}', "offset is 'soon'"),
        ('{"uri": "a", "duration": -1}', "duration is -1"),
        ('{"uri": "a", "offset": Infinity}', "offset is inf"),
        ('{"uri": "a", "question": "Who?", "choices": ["same", "same"]}', "choices"),
        ('{"uri": "a", "question": "Who?", "choices": 5}', "choices is 5"),
        ('{"uri": "a", "channel": "A"}', "channel is 'A'; it must be mix, left, right, or a number"),
        ('{"uri": "a", "stream": -1}', "stream is -1; it must be a number from 0"),
        ('{"uri": "a", "note": "\\ud83d"}', "not valid Unicode"),
        ('{"uri": "\\ud83d.wav"}', "not valid Unicode"),
    ],
)
def test_a_bad_row_says_which_and_why_and_the_next_is_read(tmp_path, line, says):
    first, bad, last = read(tmp_path, "m.jsonl", f'{{"uri": "/a"}}\n{line}\n{{"uri": "/b"}}')
    assert (first.uri, last.uri) == ("/a", "/b")
    assert isinstance(bad, DeadLetter)
    assert bad.uri.endswith("m.jsonl#line=2")
    assert bad.detail.startswith("line 2 of ")
    assert says in bad.detail


def test_a_manifest_that_is_none_is_one_dead_letter(tmp_path):
    path = tmp_path / "m.parquet"
    damaged = bytearray(parquet([ROW]))
    footer = len(damaged) - 8 - int.from_bytes(damaged[-8:-4], "little")
    damaged[footer : footer + 30] = b"\xff" * 30
    for data in (b"not parquet", bytes(damaged)):
        path.write_bytes(data)
        (found,) = list_recordings(str(path))
        assert isinstance(found, DeadLetter)
        assert "manifest" in found.detail


def test_one_recording_named_twice_is_one_with_all_questions():
    plain = Recording("id", "a", 10, None, "now")
    asked = Recording("id", "a", questions=(Question(None, "Who?"),), metadata=(("speaker", "7"),))
    again = Recording("id", "a", questions=(Question(None, "Who?"), Question(None, "Where?")))
    (merged,) = merge([asked, plain, again])
    assert [merged] == list(merge([again, asked, plain]))
    assert merged.size_bytes == 10
    assert set(merged.questions) == {Question(None, "Who?"), Question(None, "Where?")}
    assert merged.metadata == (("speaker", "7"),)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("m.csv", "uri,channel,stream\n/a.wav,left,\n/a.wav,Right,1\n/a.wav,,\n/a.wav,0,0\n"),
        (
            "m.parquet",
            parquet([{"uri": "/a.wav", "channel": c, "stream": s} for c, s in (("left", None), ("right", 1.0))]),
        ),
    ],
    ids=["csv", "parquet"],
)
def test_channels_of_one_file_are_recordings_of_their_own(tmp_path, name, data):
    found = read(tmp_path, name, data)
    assert [(row.channel, row.stream) for row in found[:2]] == [("left", None), ("right", 1)]
    assert len({row.recording_id for row in found}) == len(found)
    assert all(row.metadata == () for row in found)
    assert [(row.channel, row.stream) for row in found[2:]] == [("mix", None), ("0", 0)][: len(found) - 2]


def test_a_manifest_s_channel_goes_before_the_job_s(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"uri": "/a.wav"}\n{"uri": "/a.wav", "channel": "mix", "stream": 0}')
    found = list_recordings(str(tmp_path / "m.jsonl"), channel="left", stream=2)
    assert [(row.channel, row.stream) for row in found] == [("left", 2), ("mix", 0)]


def test_the_channel_is_part_of_what_is_listed(tmp_path):
    (tmp_path / "a.wav").write_text("x")
    (mixed,) = list_recordings(str(tmp_path))
    (left,) = list_recordings(str(tmp_path), channel="left")
    assert (mixed.channel, left.channel) == ("mix", "left")
    assert mixed.recording_id != left.recording_id
    with pytest.raises(ValueError, match="channel is 'middle'"):
        ReadRecordings(str(tmp_path), channel="middle")


def test_one_id_for_two_channels_loses_neither():
    first, second = Recording("7", "a.wav", channel="left"), Recording("7", "a.wav", channel="right")
    kept, letter = merge([second, first])
    assert kept == first
    assert json.loads(letter.input)["recording"]["channel"] == "right"


def test_an_id_given_to_two_recordings_loses_neither():
    first, second = Recording("7", "a.wav"), Recording("7", "b.wav")
    kept, letter = merge([second, first])
    assert kept == first
    assert (letter.uri, letter.reason.value) == ("b.wav", "unsupported_format")
    assert "id '7' also names a.wav" in letter.detail
    assert letter.recording_id != "7"


def test_one_question_id_for_two_questions_of_a_recording_loses_neither():
    first = Recording("7", "a.wav", questions=(Question("q", "Who?"), Question("r", "Where?")))
    second = Recording("7", "a.wav", questions=(Question("q", "When?"),))
    letter, kept = merge([second, first])
    assert {letter.recording_id, kept.recording_id} == {"7"}
    asked = {question.text for question in kept.questions}
    assert asked | {q["text"] for q in json.loads(letter.input)["recording"]["questions"]} == {
        "Who?",
        "Where?",
        "When?",
    }
    assert "question id 'q'" in letter.detail


def test_listing_in_a_pipeline_gives_each_recording_once(tmp_path):
    for name in ("a.wav", "ä b.flac", "notes.txt"):
        (tmp_path / name).write_text("x")
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        found = pipeline | ReadRecordings([str(tmp_path), str(tmp_path / "*.wav")])
        assert_that(
            found.good | beam.Map(lambda recording: recording.uri),
            equal_to([str(tmp_path / "a.wav"), str(tmp_path / "ä b.flac")]),
        )


def test_names_may_come_from_a_pipeline(tmp_path):
    (tmp_path / "a.wav").write_text("x")
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        found = pipeline | beam.Create([str(tmp_path / "a.wav"), str(tmp_path / "none.wav")]) | ReadRecordings()
        assert_that(found.good | beam.Map(lambda found: found.size_bytes), equal_to([1]))
        assert_that(found.dead_letters | beam.Map(lambda letter: letter.reason.value), equal_to(["not_found"]), "bad")
