"""Ids: what names a recording in all runs, and that no two rows are ever mixed."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.models import ENGINES, answer, caption
from af3pipe.schemas import (
    NO_METADATA,
    DeadLetter,
    Question,
    Reason,
    Recording,
    TerminalState,
    source_key,
    to_metadata,
)
from af3pipe.tables.existing import ExistingRecording
from af3pipe.transforms.inputs.identity import check_id, has_own_id, name_recordings
from benchmarks import constant_engine
from tests import fixtures_audio as make
from tests.counting_engine import CountingEngine
from tests.plain_runs import PlainRuns
from tests.read_tables import read_table

A, B = "s3://archive/a.wav", "s3://archive/b.wav"


def named(own_id, uri=A, questions=(), **metadata):
    return Recording(own_id, uri, questions=questions, metadata=to_metadata(metadata))


def unnamed(uri=A, questions=(), **metadata):
    return named(source_key(uri), uri, questions, **metadata)


def there(recording, metadata=None, created_at=1, state="ok", source=""):
    """The row that an earlier run wrote of a recording; with `source` None, in format 1."""
    return ExistingRecording(
        recording.uri,
        recording.recording_id,
        recording.source_key if source == "" else source,
        "work",
        state,
        ("key",) if state == "ok" else (),
        (),
        (),
        recording.metadata if metadata is None else metadata,
        recording.offset_s,
        recording.channel,
        recording.stream,
        None,
        1.0,
        -3.0,
        -20.0,
        0.0,
        False,
        created_at,
    )


def of_two_kinds(items):
    items = list(items)
    return (
        [one for one in items if isinstance(one, Recording)],
        [one for one in items if isinstance(one, DeadLetter)],
    )


# --- ids that a manifest gave


def test_an_id_that_is_the_source_key_of_other_audio_is_a_clash():
    """Copied from an output's recording_id to the wrong row, for example."""
    listed, named_so = unnamed(A, speaker="Ada"), named(source_key(A), B)
    for mentions in ([listed, named_so], [named_so, listed]):
        good, bad = of_two_kinds(check_id(mentions))
        assert good == [listed]
        assert A in bad[0].detail
        assert B in bad[0].detail


def test_an_id_for_two_sources_is_the_firsts_and_a_dead_letter_that_names_both():
    for order in ([named("7", A), named("7", B)], [named("7", B), named("7", A)]):
        (kept,), (letter,) = of_two_kinds(check_id(order))
        assert kept == named("7", A)
        assert (letter.uri, letter.reason) == (B, Reason.UNSUPPORTED_FORMAT)
        assert letter.detail == f"id '7' cannot be that of {B}: it also names {A}; ids must be unique"
        assert letter.recording_id not in ("7", source_key(B))


def test_an_id_that_an_earlier_run_gave_to_another_source_is_not_given_again():
    _, (letter,) = of_two_kinds(check_id([named("7", B)], [there(named("7", A))]))
    assert letter.uri == B
    assert f"id '7' cannot be that of {B}: an earlier run into this output gave it to {A}" in letter.detail
    # The one that has it keeps it, though the other is the first by name.
    (kept,), (letter,) = of_two_kinds(check_id([named("7", A), named("7", B)], [there(named("7", B))]))
    assert (kept.uri, letter.uri) == (B, A)


def test_an_id_for_two_parts_of_one_file_is_a_dead_letter_of_one():
    for changes, shown in (({"offset_s": 1.0, "duration_s": 2.0}, "from 1 s to 3 s"), ({"channel": "left"}, A)):
        part = named("7")._replace(**changes)
        kept, (letter,) = of_two_kinds(check_id([part, named("7")]))
        assert len(kept) == 1
        assert shown in letter.detail
    (kept,), (letter,) = of_two_kinds(check_id([named("7"), named("7")._replace(channel="left")]))
    assert {kept.channel, json.loads(letter.input)["recording"]["channel"]} == {"mix", "left"}
    _, (letter,) = of_two_kinds(check_id([named("7")], [there(named("7")._replace(offset_s=5.0))]))
    assert f"gave it to {A} from 5 s on" in letter.detail


def test_an_id_with_two_kinds_of_metadata_is_a_dead_letter_of_one():
    ada, bob = named("7", speaker="Ada"), named("7", speaker="Bob")
    (kept,), (letter,) = of_two_kinds(check_id([bob, ada]))
    assert kept == ada
    assert letter.metadata == bob.metadata
    assert ada.metadata in letter.detail
    assert bob.metadata in letter.detail
    # Whatever comes later, and is first by name: who has the id keeps it.
    (kept,), (letter,) = of_two_kinds(check_id([bob, ada], [there(bob)]))
    assert (kept, letter.metadata) == (bob, ada.metadata)


def test_the_same_row_twice_is_no_clash_and_a_clash_twice_is_one():
    kept, letters = of_two_kinds(check_id([named("7"), named("7"), named("7", B), named("7", B)]))
    assert kept == [named("7")] * 2
    assert len({letter.dead_letter_key for letter in letters}) == 1


def test_an_id_is_free_again_when_its_row_was_corrected():
    gone = there(named("7", A), state="skipped_done")
    kept, letters = of_two_kinds(check_id([named("7", B)], [gone, there(named("7", A), created_at=0)]))
    assert (len(kept), letters) == (1, [])


def test_rows_of_format_1_say_their_source_by_its_columns():
    old = there(named("7", A), source=None)
    assert of_two_kinds(check_id([named("7", A)], [old]))[1] == []
    for other in (named("7", B), named("7")._replace(offset_s=1.0), named("7")._replace(stream=1)):
        assert len(of_two_kinds(check_id([other], [old]))[1]) == 1


# --- recordings without an id of their own


def ids(found, existing=()):
    kept, letters = of_two_kinds(name_recordings(found, existing))
    assert letters == []
    assert len({one.recording_id for one in kept}) == len(kept)
    return {one.metadata: one.recording_id for one in kept}


ADA, BOB = unnamed(speaker="Ada"), unnamed(speaker="Bob", note="n")


def test_a_row_alone_has_the_id_of_its_audio():
    assert ids([ADA]) == {ADA.metadata: source_key(A)}
    assert ids([unnamed()]) == {"{}": source_key(A)}


def test_rows_of_one_audio_with_other_metadata_are_recordings_of_their_own():
    found = ids([ADA, BOB])
    assert set(found) == {ADA.metadata, BOB.metadata}
    assert source_key(A) not in found.values()
    assert ids([BOB, ADA]) == ids([BOB, ADA, BOB]) == found
    assert ids([unnamed(speaker="Carl"), ADA, BOB]).items() > found.items()


def test_what_has_an_id_keeps_it_whoever_comes_later():
    carl = unnamed(speaker="Carl")
    alone = there(ADA)
    first = ids([ADA, BOB], [alone])
    assert first[ADA.metadata] == source_key(A)
    assert ids([BOB, carl, ADA], [alone]).items() > first.items()
    rows = [there(ADA._replace(recording_id=ids([ADA, BOB])[ADA.metadata]))]
    assert ids([ADA], rows) == {ADA.metadata: rows[0].recording_id}


def test_a_row_that_was_corrected_has_its_id_and_one_that_comes_back_has_another():
    rows = [there(ADA)]
    assert ids([BOB], rows) == {BOB.metadata: source_key(A)}
    rows.append(there(BOB, created_at=2))
    found = ids([ADA, BOB], rows)
    assert found[BOB.metadata] == source_key(A)
    assert found[ADA.metadata] != source_key(A)
    assert ids([ADA, BOB], rows[::-1]) == found


def test_numbers_that_format_1_wrote_as_text_name_the_same_recording():
    old = there(ADA, to_metadata({"take": "1"}), source=None)
    number, text = unnamed(take=1), unnamed(take="1")
    assert ids([number], [old]) == {number.metadata: source_key(A)}
    both = ids([number, text], [old])
    assert both[text.metadata] == source_key(A)
    assert both[number.metadata] != source_key(A)
    new = there(ADA, to_metadata({"take": "1"}))
    assert ids([number], [new]) == {number.metadata: source_key(A)}
    assert ids([number, ADA], [new])[number.metadata] != source_key(A), "in format 2 text is another value"


def test_a_listed_file_is_the_recording_of_the_rows_about_it():
    listed = Recording(source_key(A), A, 10, None, "now")
    (found,) = name_recordings([ADA, listed])
    assert (found.metadata, found.recording_id, found.size_bytes) == (ADA.metadata, source_key(A), None)
    assert set(ids([listed, ADA, BOB])) == {ADA.metadata, BOB.metadata}
    assert set(ids([listed, named("7", speaker="Ada")])) == {ADA.metadata, NO_METADATA}, (
        "an id of its own is another's"
    )
    (found,) = name_recordings([listed, unnamed()])
    assert found == listed
    # But a row with a question and nothing else is one of its own.
    asked = unnamed(questions=(Question("q", "Who?"),))
    assert len(ids([asked, ADA])) == 2


def test_questions_of_rows_about_the_same_are_put_together():
    who, where = Question(None, "Who?"), Question("where", "Where?")
    first = unnamed(questions=(who,), speaker="Ada")
    again = unnamed(questions=(who, where), speaker="Ada")
    for order in ([first, again], [again, first]):
        (found,) = name_recordings(order)
        assert set(found.questions) == {who, where}
        assert len(found.questions) == 2
    assert [one.questions for one in name_recordings([first, unnamed(questions=(where,), speaker="Bob")])] == [
        (who,),
        (where,),
    ]


def test_one_question_id_for_two_questions_of_a_recording_loses_neither():
    first = named("7", questions=(Question("q", "Who?"), Question("r", "Where?")))
    second = named("7", questions=(Question("q", "When?"),))
    (kept,), (letter,) = of_two_kinds(name_recordings([second, first]))
    assert {letter.recording_id, kept.recording_id} == {"7"}
    asked = {question.text for question in kept.questions}
    lost = {q["text"] for q in json.loads(letter.input)["recording"]["questions"]}
    assert asked | lost == {"Who?", "Where?", "When?"}
    assert "question id 'q'" in letter.detail
    # Of two recordings the same question id may be two questions.
    assert len(ids([first, second._replace(recording_id="8")._replace(metadata='{"n": 1}')])) == 2


# --- whole runs


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setitem(ENGINES, "counting", "tests.counting_engine:CountingEngine")
    monkeypatch.setattr(constant_engine, "window_s", 0.0)
    CountingEngine.asked.clear()
    return CountingEngine


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        (folder / f"{number}.wav").write_bytes(make.wav(make.sound(0.5 + number / 4, 8000), 8000))
    return [str(path) for path in sorted(folder.iterdir())]


def rows_by_id(output, table):
    return {row["recording_id"]: row for row in read_table(f"{output}/{table}").to_pylist()}


def test_two_speakers_of_one_audio_are_two_recordings_and_it_is_asked_once(tmp_path, engine, clips):
    manifest = [unnamed(clips[0], row=1, speaker="Ada"), unnamed(clips[0], row=2, speaker="Bob", note="n")]
    runs = PlainRuns(tmp_path, "counting", [caption()])
    results, _ = runs.run(manifest)
    assert engine.asked == [[("caption", None)]]
    assert {one.row.metadata for one in results} == {one.metadata for one in manifest}
    for one in results:
        assert one.row.terminal_state is TerminalState.OK
        assert [row.metadata for row in one.answers] == [one.row.metadata]
        assert json.loads(one.row.metadata).keys() == (
            {"row", "speaker"} if "Ada" in one.row.metadata else {"row", "speaker", "note"}
        )
    assert runs.run(manifest[::-1]) == ([], [one.row.recording_id for one in results][::-1])


def test_an_id_that_is_used_again_leaves_the_answer_of_an_earlier_run_as_it_is(tmp_path, engine, clips):
    runs = PlainRuns(tmp_path, "counting", [caption()])
    runs.run([named("7", clips[0])])
    before = rows_by_id(tmp_path, "captions")
    ((row, answers, (letter,)),), skipped = runs.run([named("7", clips[1])])
    assert (row.terminal_state, answers, skipped) == (TerminalState.DEAD_LETTER, (), [])
    assert clips[0] in letter.detail
    assert clips[1] in letter.detail
    assert rows_by_id(tmp_path, "captions") == before
    assert len(engine.asked) == 1
    assert runs.run([named("7", clips[1])]) == ([], [row.recording_id]), "the same clash is no news"
    assert runs.run([named("7", clips[0])]) == ([], ["7"])


def test_the_same_audio_under_another_id_is_copied(tmp_path, engine, clips):
    runs = PlainRuns(tmp_path, "counting", [caption()])
    ((_, (first,), _),), _ = runs.run([named("7", clips[0], speaker="Ada")])
    ((row, (copy,), letters),), _ = runs.run([named("8", clips[0], speaker="Bob")])
    assert (row.recording_id, row.answers, row.kept_answers, letters) == ("8", 1, 0, ())
    assert copy == first._replace(
        recording_id="8", metadata='{"speaker": "Bob"}', created_at=copy.created_at, run_id=""
    )
    assert len(engine.asked) == 1
    assert runs.run([named("7", clips[0], speaker="Ada"), named("8", clips[0], speaker="Bob")]) == ([], ["7", "8"])


def test_other_metadata_alone_is_written_without_asking(tmp_path, engine, clips):
    runs = PlainRuns(tmp_path, "counting", [caption()])
    ((first, (caption_row,), _),), _ = runs.run([unnamed(clips[0], speaker="Ada")])
    ((again, (rewritten,), _),), _ = runs.run([unnamed(clips[0], speaker="Ida")])
    assert (again.recording_id, again.work_key) == (first.recording_id, first.work_key)
    assert rewritten == caption_row._replace(metadata='{"speaker": "Ida"}', created_at=rewritten.created_at)
    assert len(engine.asked) == 1
    assert runs.run([unnamed(clips[0], speaker="Ida")]) == ([], [first.recording_id])
    # And back again: readers take the newest row of an answer.
    ((_, answers, _),), _ = runs.run([unnamed(clips[0], speaker="Ada")])
    assert [row.metadata for row in answers] == ['{"speaker": "Ada"}']
    assert runs.run([unnamed(clips[0], speaker="Ada")]) == ([], [first.recording_id])
    assert len(engine.asked) == 1


def test_a_follow_up_asks_again_only_what_is_before_it(tmp_path, engine, clips):
    who = answer("Who?")
    runs = PlainRuns(tmp_path, "counting", [caption(), who])
    runs.run([named("7", clips[0])])
    runs.requesting(caption(), who, answer("Why?", after=who))
    ((row, answers, _),), _ = runs.run([named("8", clips[0])])
    assert engine.asked[1:] == [[("answer", "Who?"), ("answer", "Why?")]]
    assert {(one.task, one.question) for one in answers} == {
        ("caption", None),
        ("answer", "Who?"),
        ("answer", "Why?"),
    }
    assert {one.recording_id for one in answers} == {"8"}
    assert row.answers == 3


def test_a_recording_that_was_deleted_meanwhile_is_a_dead_letter_of_each_row(tmp_path, engine):
    gone = str(tmp_path / "gone.wav")
    runs = PlainRuns(tmp_path / "out", "counting", [caption()])
    results, _ = runs.run([unnamed(gone, speaker="Ada"), unnamed(gone, speaker="Bob")])
    assert [one.row.reasons for one in results] == [("not_found",)] * 2
    assert len({one.row.recording_id for one in results}) == 2
    assert {one.row.metadata for one in results} == {'{"speaker": "Ada"}', '{"speaker": "Bob"}'}


@st.composite
def manifest_rows(draw, uris):
    uri = draw(st.sampled_from(uris))
    own_id = draw(st.sampled_from([None, None, "1", "2"]))
    offset = draw(st.sampled_from([0.0, 0.0, 0.125]))
    metadata = draw(st.sampled_from([{}, {"speaker": "Ada"}, {"speaker": "Bob", "n": 1}, {"n": "1"}, {"n": 1}]))
    found = Recording("", uri, offset_s=offset, metadata=to_metadata(metadata))
    return found._replace(recording_id=own_id or found.source_key)


def latest_answer(output, recording_id):
    rows = [row for row in read_table(output / "captions").to_pylist() if row["recording_id"] == recording_id]
    return max(rows, key=lambda row: row["created_at"])


def check_any_runs(clips, tmp_path_factory, data):
    output = tmp_path_factory.mktemp("out")
    runs = PlainRuns(output, "counting", [caption()])
    CountingEngine.asked.clear()
    sources = {}
    heard = set()
    for _ in range(data.draw(st.integers(1, 3))):
        manifest = data.draw(st.lists(manifest_rows(clips[:2]), min_size=1, max_size=5))
        results, skipped = runs.run(manifest)
        heard |= {one.row.source_key for one in results if one.answers}
        assert Counter(runs.found) == Counter([*(one.row.recording_id for one in results), *skipped])
        assert len(set(runs.found)) == len(runs.found), "each in one state"
        wanted = {(one.source_key, one.metadata) for one in manifest}
        for one in results:
            assert (one.row.source_key, one.row.metadata) in wanted, "metadata is of one row, all of it"
            for row in one.answers:
                assert (row.source_key, row.metadata) == (one.row.source_key, one.row.metadata)
            known = sources.setdefault(one.row.recording_id, one.row.source_key)
            assert known == one.row.source_key, "an id names one source"
        # Every row of the manifest, but one that says nothing where another one says something, has its recording.
        latest = {}
        for row in read_table(output / "recordings").to_pylist():
            if row["recording_id"] not in latest or latest[row["recording_id"]]["created_at"] < row["created_at"]:
                latest[row["recording_id"]] = row
        ended = {(latest[one]["source_key"], latest[one]["metadata"]) for one in runs.found}
        for one in runs.found:
            if latest[one]["answer_keys"]:
                assert latest_answer(output, one)["metadata"] == latest[one]["metadata"], "as a reader sees them"
        for one in manifest:
            is_bare = one.metadata == "{}" and not has_own_id(one)
            assert (one.source_key, one.metadata) in ended or is_bare
        # The next run has nothing to do, in whatever order its rows come.
        again, _ = runs.run(random.sample(manifest, len(manifest)))
        assert again == []
    assert len(CountingEngine.asked) == len(heard), "each source is asked once, whatever it is called"


@pytest.mark.parametrize("examples", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_over_any_runs_no_metadata_is_mixed_and_no_id_names_two_sources(engine, clips, tmp_path_factory, examples):
    check = settings(max_examples=examples)(given(data=st.data())(check_any_runs))
    check(clips, tmp_path_factory)
