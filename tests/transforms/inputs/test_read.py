import json
import os
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from af3pipe.schemas import DeadLetter
from af3pipe.transforms import ReadRecordings
from af3pipe.transforms.inputs.manifest import is_manifest, read_manifest
from af3pipe.transforms.inputs.read import list_recordings
from tests.collected import Collected


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
    # Text files know no numbers.
    assert json.loads(found.metadata) == {"speaker": "7" if name.endswith(("csv", "tsv")) else 7}


def test_nemo_manifests_and_relative_names(tmp_path):
    (found,) = read(tmp_path, "m.jsonl", json.dumps({"audio_filepath": "clips/a.wav", "duration": 3.2, "text": "hi"}))
    assert found.uri == str(tmp_path / "clips" / "a.wav")
    assert found.metadata == '{"text": "hi"}'


def test_what_a_csv_says_is_kept_as_it_is_written(tmp_path):
    (found,) = read(tmp_path, "m.csv", "uri,id,speaker,day\n/a.wav,007,0012,2024-01-02\n")
    assert found.recording_id == "007"
    assert found.metadata == '{"day": "2024-01-02", "speaker": "0012"}'


def test_a_separator_that_json_allows_in_a_string_splits_no_row(tmp_path):
    (found,) = read(tmp_path, "m.jsonl", '{"uri": "/a.wav", "text": "one\u2028two"}')
    assert json.loads(found.metadata) == {"text": "one\u2028two"}


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
    assert all(row.metadata == "{}" for row in found)
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


def objects_of(read):
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | read | found.into("objects")
    return {one.uri: one for one in found["objects"]}


def test_listing_in_a_pipeline_gives_each_object_once(tmp_path):
    for name in ("a.wav", "ä b.flac", "notes.txt"):
        (tmp_path / name).write_text("x")
    found = objects_of(ReadRecordings([str(tmp_path), str(tmp_path / "*.wav")]))
    assert set(found) == {str(tmp_path / "a.wav"), str(tmp_path / "ä b.flac")}
    for uri, one in found.items():
        assert [(recording.uri, recording.size_bytes) for recording in one.recordings] == [(uri, 1)]
        assert (one.dead_letters, one.copies) == ((), ())


def test_an_object_comes_with_all_recordings_of_it_and_what_was_rejected(tmp_path):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_text("x")
    lines = [
        {"uri": "a.wav", "speaker": "Ada", "row": 1},
        {"uri": "a.wav", "speaker": "Bob", "note": "n", "row": 2},
        {"uri": "a.wav", "id": "7", "offset": 1.0},
        {"uri": "b.wav", "id": "7"},
        {"uri": "gone.wav", "speaker": "Eve"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join([*map(json.dumps, lines), "{"]))
    found = objects_of(ReadRecordings([str(tmp_path / "m.jsonl"), str(tmp_path / "*.wav")]))
    assert set(found) == {
        *(str(tmp_path / name) for name in ("a.wav", "b.wav", "gone.wav")),
        f"{tmp_path / 'm.jsonl'}#line=6",
    }
    of_a = found[str(tmp_path / "a.wav")].recordings
    assert sorted(one.metadata for one in of_a) == [
        '{"note": "n", "row": 2, "speaker": "Bob"}',
        '{"row": 1, "speaker": "Ada"}',
        "{}",
    ]
    assert len({one.recording_id for one in of_a}) == 3
    assert {one.size_bytes for one in of_a} == {1}
    of_b = found[str(tmp_path / "b.wav")]
    assert [one.recording_id for one in of_b.recordings] == [of_b.recordings[0].source_key]
    (clash,) = of_b.dead_letters
    assert "id '7' cannot be that of" in clash.detail
    gone = found[str(tmp_path / "gone.wav")]
    assert (gone.recordings, [letter.reason.value for letter in gone.dead_letters]) == ((), ["not_found"])
    assert gone.dead_letters[0].metadata == '{"speaker": "Eve"}'


def test_names_may_come_from_a_pipeline(tmp_path):
    (tmp_path / "a.wav").write_text("x")
    names = [str(tmp_path / "a.wav"), str(tmp_path / "none.wav")]
    found = objects_of("Names" >> beam.Create(names) | ReadRecordings())
    assert [one.size_bytes for one in found[names[0]].recordings] == [1]
    (letter,) = found[names[1]].dead_letters
    assert letter.reason.value == "not_found"
