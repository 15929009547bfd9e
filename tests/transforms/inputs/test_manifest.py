"""What rows ask, rows that are wrong, and manifests that are read as they are taken."""

import gzip
import json
import subprocess
import sys

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from af3pipe.models.tasks import answer
from af3pipe.schemas import DeadLetter, Question, Reason, Recording
from af3pipe.transforms.inputs.read import list_recordings


def read(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(list_recordings(str(path)))


def one(tmp_path, **columns):
    (found,) = read(tmp_path, "m.jsonl", json.dumps({"uri": "/a.wav"} | columns))
    assert isinstance(found, Recording), found.detail
    return found


def refused(tmp_path, **columns):
    (found,) = read(tmp_path, "m.jsonl", json.dumps({"uri": "/a.wav"} | columns))
    assert isinstance(found, DeadLetter)
    return found.detail


def test_a_question_may_have_an_id(tmp_path):
    assert one(tmp_path, question="Who?", question_id="who").questions == (Question("who", "Who?"),)
    assert one(tmp_path, question="Who?", question_id=3).questions == (Question("3", "Who?"),)
    assert one(tmp_path, question_id="x").metadata == '{"question_id": "x"}'


def test_questions_may_be_objects(tmp_path):
    found = one(
        tmp_path,
        choices=["yes", "no"],
        questions=["Loud?", {"question": "Who?", "choices": ["cat", "dog"], "id": "who"}, {"question": "Is it?"}],
    )
    assert [(q.text, q.choices) for q in found.questions] == [
        ("Loud?", ("yes", "no")),
        ("Who?", ("cat", "dog")),
        ("Is it?", ("yes", "no")),
    ]
    assert found.questions[1].question_id == "who"
    assert found.metadata == "{}"


def test_what_questions_say_beside_what_is_asked_rides_along(tmp_path):
    asked = [{"question": "Who?", "answer": "a cat"}]
    found = one(tmp_path, questions=asked)
    assert json.loads(found.metadata)["questions"] == asked


def test_a_prompt_goes_to_the_model_as_it_stands(tmp_path):
    (alone,) = one(tmp_path, prompt=" Say it. \n", question_id="p").questions
    assert answer(alone.text, alone.choices, prompt=alone.prompt).prompt == " Say it. \n"
    assert alone.question_id == "p"
    (chosen,) = one(tmp_path, prompt="Cat or dog? One word.", choices=["cat", "dog"]).questions
    task = answer(chosen.text, chosen.choices, prompt=chosen.prompt)
    assert (task.prompt, task.parser) == ("Cat or dog? One word.", "choice")
    (asked,) = one(tmp_path, prompt="Who?\nOne word.", question="Who?").questions
    assert (asked.text, asked.prompt) == ("Who?", "Who?\nOne word.")
    both = one(tmp_path, prompt="Say it.", questions=["Who?", {"question": "Is it?", "prompt": "Tell me."}]).questions
    assert [(q.text, q.prompt) for q in both] == [("Say it.", None), ("Who?", None), ("Is it?", "Tell me.")]


CONVERSATIONS = {
    "plain": ["Who?", "Where?", "Who?"],
    "llava": [
        {"from": "human", "value": "<sound>\nWho?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "Here."},
        {"from": "human", "value": "Who?"},
    ],
    "chat": [
        {"role": "user", "content": [{"type": "audio", "path": "x"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Where?"},
        {"role": "user", "content": "Who?"},
    ],
}


@pytest.mark.parametrize("column", ["conversation", "conversations"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_the_turns_of_a_conversation_follow_each_other_up(tmp_path, kind, column):
    found = one(tmp_path, **{column: CONVERSATIONS[kind]})
    first = answer("Who?")
    second = answer("Where?", after=first)
    third = answer("Who?", after=second)
    ids = [task.question_id for task in (first, second, third)]
    assert [q.text for q in found.questions] == ["Who?", "Where?", "Who?"]
    assert [q.question_id for q in found.questions] == ids
    assert [q.after for q in found.questions] == [None, *ids[:2]]
    # What somebody else replied is not asked, and not lost.
    assert (column in json.loads(found.metadata)) == (kind != "plain")


def test_lists_in_a_csv_are_json(tmp_path):
    turns = json.dumps(["Who?", "Where?"]).replace('"', '""')
    asked = json.dumps([{"question": "Loud?", "id": "l"}]).replace('"', '""')
    data = f'uri,conversation,questions\n/a.wav,"{turns}","{asked}"\n/b.wav,Who?,Loud?\n'
    listed, plain = read(tmp_path, "m.csv", data)
    assert [q.text for q in listed.questions] == ["Loud?", "Who?", "Where?"]
    assert [q.text for q in plain.questions] == ["Loud?", "Who?"]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"conversation": [{"from": "system", "value": "Be kind."}]}, "a turn of 'system'"),
        ({"conversation": [{"value": "Be kind."}]}, "a turn of ''"),
        ({"conversation": [{"from": "gpt", "value": "I am."}]}, "no turn of the user"),
        ({"conversation": [5]}, "a turn of conversation is 5"),
        ({"conversation": [{"role": "user", "content": [{"type": "text"}]}]}, "text is None"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": "  "}, "prompt is '  '"),
        ({"questions": [{"id": "who"}]}, "question is None"),
        (
            {"questions": [{"question": "a", "id": "x"}, {"question": "b", "id": "x"}]},
            "one id for different questions: x",
        ),
        ({"questions": "[1"}, "Expecting"),
    ],
)
def test_what_cannot_be_asked_says_why(tmp_path, columns, says):
    detail = refused(tmp_path, **columns)
    assert detail.startswith("line 1 of ")
    assert says in detail


def test_lines_are_counted_as_an_editor_does(tmp_path):
    found = read(tmp_path, "m.jsonl", '\ufeff{"uri": "/a"}\n\n  \nnot json\n{"uri": "/b"}\nneither')
    assert [row.uri.rpartition("/")[2] for row in found] == ["a", "m.jsonl#line=4", "b", "m.jsonl#line=6"]
    assert found[1].detail.startswith(f"line 4 of {tmp_path}")


def test_a_ragged_row_of_a_csv_costs_no_other(tmp_path):
    data = 'uri,note\n/a,x\n/b\n\n/c,"two\nlines"\n/d,1,2\n/e,"odd"quote\n/f,\n'
    found = read(tmp_path, "m.csv", data)
    assert [row.uri for row in found if isinstance(row, Recording)] == ["/a", "/c", "/f"]
    ragged, long, odd = (row.detail for row in found if isinstance(row, DeadLetter))
    assert ragged == f"row 2 (line 3) of {tmp_path}/m.csv has 1 columns, and the first line has 2"
    assert long.startswith("row 4 (line 7) of ")
    assert odd.startswith("row 5 (line 8) of ")
    assert {row.uri for row in found if isinstance(row, DeadLetter)} == {
        f"{tmp_path}/m.csv#row={n}" for n in (2, 4, 5)
    }


def test_a_quote_that_is_never_closed_says_from_where_to_where(tmp_path):
    *_, bad = read(tmp_path, "m.csv", 'uri,note\n/a,x\n/b,"open\n/c,x\n/d,x\n')
    assert bad.detail.startswith("row 2 (lines 3 to 5) of ")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("m.csv", "name,text\na,b\n", "needs one of the columns uri, audio_filepath, path, and has name, text"),
        ("m.csv", "uri,text,text\na,b,c\n", "has a column twice: text"),
        ("m.csv", "", "names no audio"),
        ("m.csv", b"\x00\x01\xff\xfe", "names no audio"),
        ("m.csv.gz", b"not gzip", "gzip"),
        ("m.jsonl.gz", gzip.compress(b'{"uri": "/a"}\n' * 1000, mtime=0)[:-20], "m.jsonl.gz: "),
    ],
)
def test_a_manifest_that_is_none_is_one_dead_letter(tmp_path, name, data, says):
    *rows, bad = read(tmp_path, name, data)
    assert all(isinstance(row, Recording) for row in rows)
    assert (bad.uri, bad.stage.value) == (str(tmp_path / name), "list")
    assert says in bad.detail


@pytest.mark.parametrize("name", ["m.jsonl.gz", "m.ndjson.gz", "m.csv.gz", "m.tsv.gz"])
def test_manifests_may_be_compressed(tmp_path, name):
    data = {
        "jsonl": '{"uri": "/a", "n": "1"}',
        "ndjson": '{"uri": "/a", "n": "1"}',
        "csv": "uri,n\n/a,1",
        "tsv": "uri\tn\n/a\t1",
    }
    (found,) = read(tmp_path, name, gzip.compress(data[name.split(".")[1]].encode()))
    assert (found.uri, found.metadata) == ("/a", '{"n": "1"}')


def test_a_parquet_manifest_that_is_damaged_midway_keeps_what_was_before(tmp_path):
    path = tmp_path / "m.parquet"
    rows = [{"uri": f"/{index:05}.wav", "speaker": index, "picture": b"\xff" * 5} for index in range(4000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000, compression="none", use_dictionary=False)
    whole = [row.uri for row in list_recordings(str(path))]
    assert whole == [row["uri"] for row in rows]
    assert next(list_recordings(str(path))).metadata == '{"speaker": 0}'  # bytes do not ride along
    data = bytearray(path.read_bytes())
    place = data.index(b"/02000.wav")
    data[place - 60 : place] = b"\xff" * 60
    path.write_bytes(data)
    *kept, bad = list_recordings(str(path))
    assert [row.uri for row in kept] == whole[:2000]
    assert isinstance(bad, DeadLetter)
    assert bad.uri == str(path)
    assert "cannot be read beyond row 2000" in bad.detail


# In a process of its own: what the threads of other tests' runners allocate here would count, too.
MEASURE = """
import sys, tracemalloc
import pyarrow as pa
from af3pipe.transforms.inputs.manifest import read_manifest

next(read_manifest(sys.argv[1]))  # what is imported and cached counts once
before = pa.total_allocated_bytes()
tracemalloc.start()
most = 0
for found, _ in enumerate(read_manifest(sys.argv[1]), start=1):
    if found % 1000 == 0:
        most = max(most, pa.total_allocated_bytes() - before)
print(found, tracemalloc.get_traced_memory()[1] + most)
"""


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("jsonl", marks=pytest.mark.representative),
        pytest.param("csv", marks=pytest.mark.slow),
        pytest.param("parquet", marks=pytest.mark.slow),
    ],
)
def test_a_manifest_is_not_held_in_memory(tmp_path, kind):
    path, rows = tmp_path / f"m.{kind}", 15_000
    note = "n" * 4000
    if kind == "parquet":
        table = pa.table({"uri": [f"/{i}.wav" for i in range(rows)], "note": [f"{i} {note}" for i in range(rows)]})
        pq.write_table(table, path, row_group_size=rows, compression="none", use_dictionary=False)
        del table
    else:
        with path.open("w") as file:
            file.write("uri,note\n" if kind == "csv" else "")
            for i in range(rows):
                row = (
                    f"/{i}.wav,{i} {note}"
                    if kind == "csv"
                    else json.dumps({"uri": f"/{i}.wav", "note": f"{i} {note}"})
                )
                file.write(row + "\n")
    assert path.stat().st_size > 56 << 20
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    found, most_bytes = map(int, done.stdout.split())
    assert found == rows
    assert most_bytes < 28 << 20  # it reads ahead, and takes a thousand rows of Parquet at a time


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def test_a_manifest_from_elsewhere_names_what_is_its_own(memory):
    rows = [
        "a.wav",
        "memory://lists/deep/b.wav",
        "/etc/c.wav",
        "file:///etc/d.wav",
        "memory://other/e.wav",
        "../f.wav",
    ]
    memory.pipe_file("/lists/m.jsonl", "\n".join(json.dumps({"uri": row}) for row in rows).encode())
    good, bad = [], []
    for found in list_recordings("memory://lists/m.jsonl"):
        (bad if isinstance(found, DeadLetter) else good).append(found)
    assert [row.uri for row in good] == ["memory:///lists/a.wav", "memory:///lists/deep/b.wav"]
    assert {row.reason for row in bad} == {Reason.NOT_ALLOWED}
    assert [row.uri for row in bad] == [f"memory:///lists/m.jsonl#line={number}" for number in (3, 4, 5, 6)]
    assert "line 5 of memory:///lists/m.jsonl names memory://other/e.wav" in bad[2].detail
    assert "--allow-prefix memory://other" in bad[2].detail
    allowed = list_recordings("memory://lists/m.jsonl", allow_prefixes=["memory://other"])
    assert [row.uri for row in allowed if isinstance(row, Recording)][-1] == "memory:///other/e.wav"
