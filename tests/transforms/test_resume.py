"""What is left to ask: recordings against rows of earlier runs, without a runner, and mostly without an engine."""

import json
import random
from concurrent.futures import Future

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from af3pipe.transforms.reconcile import covered_by, failed_by, settle
from af3pipe.transforms.settle import settle_letters
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.audio.levels import measure
from af3pipe.models import ENGINES, EngineOptions, answer, caption, resolve, transcript
from af3pipe.models.engine import EngineInfo
from af3pipe.pipelines.plan import Plan, Settlement
from af3pipe.schemas import (
    RECORDING_SCHEMA,
    Answer,
    AudioInfo,
    Covered,
    DeadLetter,
    Decoding,
    Earlier,
    Levels,
    Question,
    Reason,
    Recording,
    RecordingRow,
    Rejected,
    Reply,
    Segment,
    Stage,
    TerminalState,
    Turn,
    answer_key,
    stitched_key,
    work_key,
)
from af3pipe.storage import StorageError
from af3pipe.tables.write import ANSWERS, DEAD_LETTER_ROWS, RECORDINGS, write_rows
from af3pipe.transforms import AskAudioFlamingo, DecodeAudio, Outcome, ResumeRecordings
from af3pipe.transforms.ask import AskDoFn, make_answer, stitch_group
from af3pipe.transforms.inputs.clock import Ticks
from af3pipe.transforms.outcome import recording_of, to_dead_letter
from af3pipe.transforms.resume import Settled, Told, WorkKeys, read_earlier, resume
from tests.collected import Collected
from tests.rows import rows

LEVELS = Levels(-3.0, -20.0, 0.0, False)
BASE = Recording("id", "s3://b/a.flac", 10, "etag", "2026-01-01T00:00:00Z")
TASK = resolve(answer("Is there speech?", ("yes", "no")), "AudioFlamingo3")
RATE = 16_000


@pytest.fixture(autouse=True)
def closed_engine(monkeypatch):
    monkeypatch.setitem(ENGINES, "closed", "tests.closed_engine:ClosedEngine")


def asking(*tasks):
    dofn = AskDoFn(EngineOptions("demo", "closed"), tasks)
    dofn.setup()
    return dofn


def keys_of(*tasks, **policy):
    return WorkKeys(DecodeAudio(model="demo", **policy).dofn, asking(*tasks))


# --- resume()


def done(recording, *, answers=("k1", "k2"), letters=(), reasons=(), created_at=1, state=TerminalState.OK):
    """A row of `recordings/`."""
    return Settled(
        recording.work_key, state, 5.0, 5.0, answers, letters, reasons, -3.0, -20.0, 0.0, False, created_at
    )


def covered(*keys):
    return [Covered(key, "caption/", ((0.0, 5.0),), 5.0, LEVELS) for key in keys]


KEYED = keys_of(caption()).add(BASE)


def test_the_same_work_is_skipped_and_its_row_names_what_there_is():
    row = done(KEYED, letters=("l",), reasons=("too_long",), state=TerminalState.OK_PARTIAL)
    found = resume(KEYED, [row], covered("k1", "k2", "other"), [Told("l", "run 1")])
    assert isinstance(found, RecordingRow)
    assert (found.terminal_state, found.settled_state) == (TerminalState.SKIPPED_DONE, TerminalState.OK_PARTIAL)
    assert (found.answers, found.kept_answers, found.answer_keys) == (0, 2, ("k1", "k2"))
    assert (found.dead_letters, found.kept_dead_letters, found.dead_letter_keys) == (0, 1, ("l",))
    assert (found.work_key, found.covered_s, found.duration_s) == (KEYED.work_key, 5.0, 5.0)
    assert found.reasons == ("too_long",)


def test_what_nobody_can_tell_from_another_is_asked_again():
    nameless = KEYED._replace(etag=None, mtime=None)
    assert resume(nameless, [done(nameless)], covered("k1", "k2"), []) == nameless


@pytest.mark.parametrize(
    ("settled", "answers", "told"),
    [
        ([], ("k1", "k2"), []),
        ([done(KEYED)], ("k1",), []),
        ([done(KEYED, letters=("l",), reasons=("too_long",))], ("k1", "k2"), []),
        ([done(KEYED._replace(work_key="another"))], ("k1", "k2"), []),
        ([done(KEYED._replace(work_key=None))], ("k1", "k2"), []),
        *(
            ([done(KEYED, letters=("l",), reasons=("too_long", reason.value))], ("k1", "k2"), [Told("l", "run 1")])
            for reason in Reason
            if reason.retryable
        ),
    ],
)
def test_what_is_not_done_is_left_with_what_there_is(settled, answers, told):
    left = resume(KEYED, settled, covered(*answers), told)
    assert isinstance(left, Recording)
    assert [found.answer_key for found in left.earlier.answers] == sorted(answers)
    assert dict(left.earlier.dead_letters) == dict(told)
    assert left._replace(earlier=Earlier()) == KEYED


def test_only_what_may_turn_out_otherwise_is_tried_again():
    for reason in Reason:
        row = done(KEYED, answers=(), letters=("l",), reasons=(reason.value,), state=TerminalState.DEAD_LETTER)
        skipped = isinstance(resume(KEYED, [row], [], [Told("l", "r")]), RecordingRow)
        assert skipped == (not reason.retryable), reason
        assert isinstance(resume(KEYED, [row], [], [Told("l", "r")], retry=True), Recording)


def test_retry_leaves_alone_what_has_no_dead_letter():
    assert isinstance(resume(KEYED, [done(KEYED)], covered("k1", "k2"), [], retry=True), RecordingRow)


def test_of_several_rows_of_the_same_work_the_newest_that_holds_counts():
    old = done(KEYED, created_at=1, answers=("k1",))
    new = done(KEYED, created_at=2, answers=("k2",))
    other = done(KEYED._replace(work_key="another"), created_at=3, answers=("k3",))
    for order in ([old, new, other], [other, new, old], [new, other, old]):
        assert resume(KEYED, order, covered("k1", "k2", "k3"), []).answer_keys == ("k2",)
        assert resume(KEYED, order, covered("k1", "k3"), []).answer_keys == ("k1",)


def test_a_key_that_is_there_twice_counts_once_and_the_first_to_tell_wins():
    left = resume(KEYED, [], covered("k1", "k1"), [Told("l", "run 2"), Told("l", "run 1")])
    assert len(left.earlier.answers) == 1
    assert left.earlier.dead_letters == (("l", "run 1"),)


@pytest.mark.parametrize(
    "changed",
    [
        {"etag": "new"},
        {"etag": None},
        {"uri": "s3://b/b.flac"},
        {"offset_s": 1.0},
        {"duration_s": 1.0},
        {"channel": "left"},
        {"stream": 0},
        {"questions": (Question(None, "Who?"),)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_recording_under_the_same_id_is_not_skipped(changed):
    keys = keys_of(caption())
    row = done(keys.add(BASE))
    assert isinstance(resume(keys.add(BASE._replace(**changed)), [row], covered("k1", "k2"), []), Recording)


def test_without_an_etag_another_size_or_time_is_another_recording():
    keys = keys_of(caption())
    local = BASE._replace(etag=None)
    assert isinstance(resume(keys.add(local), [done(keys.add(local))], covered("k1", "k2"), []), RecordingRow)
    for changed in ({"size_bytes": 11}, {"mtime": "2026-01-02T00:00:00Z"}):
        other = keys.add(local._replace(**changed))
        assert isinstance(resume(other, [done(keys.add(local))], covered("k1", "k2"), []), Recording)


def test_ids_and_metadata_are_no_work():
    keys = keys_of(caption())
    same = keys.add(
        BASE._replace(recording_id="other", metadata=(("speaker", "7"),), earlier=Earlier((), (("l", "r"),)))
    )
    assert same.work_key == keys.add(BASE).work_key


def test_every_policy_and_every_task_is_in_the_work_key():
    others = [
        keys_of(caption(), over_length="truncate"),
        keys_of(caption(), over_length="split"),
        keys_of(caption(), over_length="split", split_at="silence"),
        keys_of(caption(), over_length="split", split_at="silence", split_tolerance_s=3.0),
        keys_of(caption(), on_silent="dead-letter"),
        keys_of(caption(), silent_below_dbfs=-50.0),
        keys_of(caption(), transcript()),
        keys_of(caption(max_new_tokens=9)),
        keys_of(caption(prompt="What?")),
        keys_of(transcript()),
    ]
    assert len({found.add(BASE).work_key for found in [*others, keys_of(caption())]}) == len(others) + 1
    assert keys_of(transcript(), caption()).add(BASE) == keys_of(caption(), transcript()).add(BASE)


def test_a_mention_that_is_rejected_is_in_the_work_key():
    """Else a clash that was mended would be told for ever, and one that is new not at all."""
    keys = keys_of(caption())
    letter = to_dead_letter(Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, "twice"), BASE, stage=Stage.LIST)
    assert keys.add(BASE, [letter]).work_key != keys.add(BASE).work_key
    told = letter._replace(run_id="run 1", created_at=0)
    assert keys.add(BASE, [told]) == keys.add(BASE, [letter])


# --- keys

DECIDES = ["name", "question_id", "prompt", "choices", "decoding", "parser", "history", "audios"]
"""Of a task. The others name what is known from these: the question, how it is stitched, what the prompt says."""
OTHERS = {
    "name": "caption",
    "question_id": "q2",
    "prompt": "Other?",
    "choices": ("no", "yes"),
    "decoding": Decoding(max_new_tokens=3),
    "parser": "text",
    "history": (Turn("Before?"),),
    "audios": (0,),
}


@pytest.mark.parametrize("field", DECIDES)
def test_what_decides_a_reply_is_in_both_keys(field):
    other = TASK._replace(**{field: OTHERS[field]})
    assert answer_key(BASE, 0.0, 1.0, other, "m", "r") != answer_key(BASE, 0.0, 1.0, TASK, "m", "r")
    assert work_key(BASE, [other], "m", "r", ()) != work_key(BASE, [TASK], "m", "r", ())


def test_choices_of_a_question_with_a_prompt_of_its_own_are_in_its_key():
    tasks = [answer("Who?", names, "who", prompt="Name the speaker.") for names in (("Ann", "Bo"), ("Bo", "Ann"))]
    assert len({answer_key(BASE, 0.0, 1.0, task, "m", "r") for task in tasks}) == 2


@given(rows(Decoding), rows(Decoding))
def test_decodings_have_the_same_key_only_when_they_are_the_same(one, other):
    keys = {answer_key(BASE, 0.0, 1.0, TASK._replace(decoding=decoding), "m", "r") for decoding in (one, other)}
    assert (len(keys) == 1) == (one == other)


@settings(max_examples=150)
@given(rows(Recording), st.data())
def test_a_work_key_changes_with_what_is_heard_and_with_nothing_else(recording, data):
    field = data.draw(st.sampled_from(Recording._fields))
    other = recording._replace(**{field: getattr(data.draw(rows(Recording)), field)})
    one, two = (work_key(found, [TASK], "m", "r", ()) for found in (recording, other))
    heard = ("uri", "content_identity", "offset_s", "duration_s", "channel", "stream")
    assert (one == two) == all(getattr(recording, name) == getattr(other, name) for name in heard)


@given(st.permutations([caption(prompt="a"), transcript(prompt="b"), TASK]), st.integers(0, 2))
def test_a_work_key_is_of_the_set_of_tasks(tasks, left_out):
    same = work_key(BASE, tasks, "m", "r", (1,))
    assert same == work_key(BASE, sorted(tasks, key=str), "m", "r", (1,))
    fewer = [task for number, task in enumerate(tasks) if number != left_out]
    others = [work_key(BASE, fewer, "m", "r", (1,)), work_key(BASE, tasks, "m2", "r", (1,))]
    others += [work_key(BASE, tasks, "m", "r2", (1,)), work_key(BASE, tasks, "m", "r", (2,))]
    assert len({same, *others}) == 5


@given(st.lists(st.text("0123456789abcdef", min_size=64, max_size=64), min_size=1, max_size=4, unique=True))
def test_a_stitched_key_is_of_its_parts_in_order(keys):
    assert stitched_key(keys[:1]) == keys[0]
    assert stitched_key(keys) == stitched_key(list(keys))
    if len(keys) > 1:
        assert len({stitched_key(keys), stitched_key(keys[::-1]), stitched_key(keys[1:]), *keys}) > len(keys)


# --- what a dead letter says of its recording


@given(rows(Recording))
def test_a_dead_letter_gives_its_recording_back(recording):
    recording = recording._replace(
        uri=f"s3://bucket/{recording.uri.encode().hex()}", work_key=None, earlier=Earlier()
    )
    recording = recording._replace(metadata=(), questions=tuple(q for q in recording.questions))
    letter = to_dead_letter(Rejected(Stage.READ, Reason.NOT_FOUND, "gone"), recording, stage=Stage.READ)
    assert recording_of(letter.input) == recording


def test_a_dead_letter_knows_its_recording_in_every_field():
    recording = Recording(
        'i"d/\u2028\x00',
        "/a b.wav",
        1,
        None,
        "now",
        1.5,
        None,
        (Question("q", "Who?", ("a", "b"), None, "p"), Question(None, "What?")),
        (("k", "v"), ("", "")),
        "left",
        2,
    )
    letter = to_dead_letter(ValueError("x"), recording._replace(work_key="w"), stage=Stage.DECODE)
    assert recording_of(letter.input) == recording
    again = recording._replace(work_key="w2", earlier=Earlier((), ((letter.dead_letter_key, "run 1"),)))
    assert to_dead_letter(ValueError("y"), again, stage=Stage.DECODE).run_id == "run 1"
    assert to_dead_letter(ValueError("y"), again._replace(etag="new"), stage=Stage.DECODE).run_id == ""


# --- AskDoFn


class Asked:
    """What an AskDoFn made of one recording: what was asked, and what came out, by tag."""

    def __init__(self, dofn, segments, fails=()):
        self.tasks, self.answers, self.letters, self.kept, self.parts, known = [], [], [], [], [], []
        model_id, revision = dofn.model
        dofn._info = EngineInfo(model_id, revision, "AudioFlamingo3", "l", "closed", "float32", "cpu")
        for segment in segments:
            future = Future()
            left = dofn._left(segment).asked
            self.tasks.append([(task.name, task.question) for task in left])
            if segment.segment_index in fails:
                future.set_exception(Rejected(Stage.GENERATE, Reason.OUT_OF_MEMORY, "full"))
            elif left:
                future.set_result([Reply(f"{task.prompt}", (1,), "stop", 1, 2) for task in left])
            else:
                future = dofn.submit(segment)  # which opens no engine
            for item in dofn.emit(segment, future):
                tag = item.tag if isinstance(item, beam.pvalue.TaggedOutput) else "answers"
                value = getattr(item, "value", item)
                {"answers": self.answers, "dead_letters": self.letters, "kept": self.kept, "parts": self.parts}.get(
                    tag, known
                ).append(value)
        if self.parts:
            found = {"parts": random.sample(self.parts, len(self.parts)), "known": [found for _, found in known]}
            for item in stitch_group("", found):
                if isinstance(item, beam.pvalue.TaggedOutput):
                    self.kept.append(item.value)
                else:
                    self.answers.append(item)

    @property
    def covered(self):
        return tuple(map(covered_by, self.answers))

    @property
    def kept_keys(self):
        return {found.answer_key for _, found in self.kept}


def segments_of(recording=BASE, ends=(1.0,), *, cut_at="cap", whole_s=None, offset_s=0.0):
    """Segments that end there, of which only the last knows how long the recording is."""
    samples = np.full(8, 0.5, np.float32)
    begins = (offset_s, *ends[:-1])
    found = []
    for index, (start_s, end_s) in enumerate(zip(begins, ends, strict=True)):
        is_last = index == len(ends) - 1
        info = AudioInfo(ends[-1] if is_last else whole_s, RATE, 1, "pcm_16", "soundfile")
        found.append(
            Segment(recording, info, index, start_s, end_s, is_last, RATE, samples, measure(samples), cut_at)
        )
    return found


def resumed(segments, covered):
    return [found._replace(recording=found.recording._replace(earlier=Earlier(covered))) for found in segments]


def test_an_answer_that_is_there_is_kept_and_not_asked():
    first = Asked(asking(caption()), segments_of())
    second = Asked(asking(caption(), transcript()), resumed(segments_of(), first.covered))
    assert second.tasks == [[("transcript", None)]]
    assert second.kept_keys == {first.answers[0].answer_key}
    assert [row.task for row in second.answers] == ["transcript"]
    third = Asked(asking(transcript(), caption()), resumed(segments_of(), first.covered + second.covered))
    assert (third.tasks, third.answers, len(third.kept_keys)) == ([[]], [], 2)


@pytest.mark.parametrize(
    "other", [caption(prompt="What is this?"), caption(max_new_tokens=3)], ids=["prompt", "decoding"]
)
def test_an_answer_to_something_else_is_not_kept(other):
    first = Asked(asking(caption()), segments_of())
    second = Asked(asking(other), resumed(segments_of(), first.covered))
    assert (second.tasks, second.kept) == ([[("caption", None)]], [])


@pytest.mark.parametrize("changed", [{"etag": "new"}, {"channel": "left"}, {"uri": "s3://b/c.flac"}])
def test_an_answer_about_something_else_is_not_kept(changed):
    first = Asked(asking(caption()), segments_of())
    second = Asked(asking(caption()), resumed(segments_of(BASE._replace(**changed)), first.covered))
    assert (len(second.answers), second.kept) == (1, [])


def conversation():
    who = answer("Who?")
    return [who, answer("Why?", after=who), answer("Where?")]


def test_the_turn_before_a_follow_up_is_asked_again_but_not_written_again():
    who, why, where = conversation()
    first = Asked(asking(who, where), segments_of())
    second = Asked(asking(who, why, where), resumed(segments_of(), first.covered))
    assert second.tasks == [[("answer", "Who?"), ("answer", "Why?")]]
    assert [row.question for row in second.answers] == ["Why?"]
    assert second.kept_keys == {row.answer_key for row in first.answers}


def test_every_turn_before_a_follow_up_is_asked_again():
    who, why, where = conversation()
    sure = answer("Sure?", after=why)
    first = Asked(asking(who, why, where), segments_of())
    second = Asked(asking(who, why, sure, where), resumed(segments_of(), first.covered))
    assert second.tasks == [[("answer", "Who?"), ("answer", "Why?"), ("answer", "Sure?")]]
    assert [row.question for row in second.answers] == ["Sure?"]
    # A follow-up that is there needs nothing of what is before it.
    third = Asked(asking(who, why), resumed(segments_of(), first.covered[1:2]))
    assert third.tasks == [[("answer", "Who?")]]


def test_a_request_that_fails_is_a_dead_letter_of_what_was_missing_only():
    who, why, _ = conversation()
    first = Asked(asking(who), segments_of())
    second = Asked(asking(who, why), resumed(segments_of(), first.covered), fails={0})
    (letter,) = second.letters
    assert [task["question"] for task in json.loads(letter.input)["tasks"]] == ["Why?"]
    assert len(second.kept) == 1


ENDS = (60.0, 120.0, 150.0)


def test_a_whole_transcript_is_kept_when_something_else_is_asked():
    first = Asked(asking(transcript()), segments_of(ends=ENDS, whole_s=150.0))
    second = Asked(asking(transcript(), caption()), resumed(segments_of(ends=ENDS, whole_s=150.0), first.covered))
    assert second.tasks == [[("caption", None)]] * 3
    assert second.kept_keys == {first.answers[0].answer_key}
    assert {row.task for row in second.answers} == {"caption"}


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize(
    "whole_s", [150.0, None, 30.0, 400.0], ids=["stated", "unknown", "understated", "overstated"]
)
def test_a_transcript_with_a_gap_is_asked_again_and_then_whole(missing, whole_s):
    segments = segments_of(ends=ENDS, whole_s=whole_s)
    first = Asked(asking(transcript()), segments, fails={missing})
    assert len(first.answers[0].segments) == 2
    second = Asked(asking(transcript()), resumed(segments, first.covered))
    assert second.tasks == [[("transcript", None)]] * 3
    assert (second.kept, len(second.answers), len(second.answers[0].segments)) == ([], 1, 3)
    third = Asked(asking(transcript()), resumed(segments, first.covered + second.covered))
    assert (third.tasks, third.kept_keys) == ([[]] * 3, {second.answers[0].answer_key})


def test_a_transcript_that_fails_at_the_same_place_again_is_not_written_again():
    segments = segments_of(ends=ENDS, whole_s=150.0)
    first = Asked(asking(transcript()), segments, fails={1})
    second = Asked(asking(transcript()), resumed(segments, first.covered), fails={1})
    assert (second.answers, second.kept_keys) == ([], {first.answers[0].answer_key})


def test_a_range_of_a_recording_keeps_its_transcript():
    recording = BASE._replace(offset_s=20.0, duration_s=100.0)
    segments = segments_of(recording, ends=(80.0, 120.0), whole_s=900.0, offset_s=20.0)
    segments[-1] = segments[-1]._replace(info=segments[-1].info._replace(duration_s=900.0))
    first = Asked(asking(transcript()), segments)
    second = Asked(asking(transcript(), caption()), resumed(segments, first.covered))
    assert second.tasks == [[("caption", None)]] * 2
    short = Asked(asking(transcript()), segments, fails={0})
    assert len(Asked(asking(transcript()), resumed(segments, short.covered)).answers) == 1


def test_another_cut_is_another_transcript():
    first = Asked(asking(transcript()), segments_of(ends=ENDS, whole_s=150.0))
    other = segments_of(ends=(58.0, 110.0, 150.0), whole_s=150.0, cut_at="silence:15.0")
    second = Asked(asking(transcript()), resumed(other, first.covered))
    assert (second.tasks, second.kept) == ([[("transcript", None)]] * 3, [])
    # Even where both cut at the same places: each is whole in its own way only.
    same = segments_of(ends=ENDS, whole_s=150.0, cut_at="silence:15.0")
    assert Asked(asking(transcript()), resumed(same, first.covered)).kept == []


def test_what_fits_one_segment_is_the_same_work_however_long_ones_are_cut():
    first = Asked(asking(transcript()), segments_of())
    second = Asked(asking(transcript()), resumed(segments_of(cut_at="silence:15.0"), first.covered))
    assert (second.tasks, len(second.kept)) == ([[]], 1)


def test_a_transcript_of_another_prompt_is_not_taken_for_whole():
    first = Asked(asking(transcript()), segments_of(ends=ENDS, whole_s=150.0))
    other = asking(transcript(prompt="Write down what is said."))
    assert Asked(other, resumed(segments_of(ends=ENDS, whole_s=150.0), first.covered)).kept == []


def test_another_model_s_answers_are_not_kept():
    first = Asked(asking(caption(), transcript()), segments_of())
    dofn = asking(caption(), transcript())
    dofn._model = dofn.model[0], "another"
    assert len(Asked(dofn, resumed(segments_of(), first.covered)).answers) == 2


# --- reading what is there


def written(tmp_path, answers=(), letters=(), results=()):
    for made, row_format, table in (
        (answers, ANSWERS, "captions"),
        (letters, DEAD_LETTER_ROWS, "dead_letters"),
        (results, RECORDINGS, "recordings"),
    ):
        if made:
            list(write_rows(made, row_format, str(tmp_path), table, f"run-{table}"))


@settings(max_examples=25)
@given(
    st.lists(rows(Answer), max_size=3),
    st.lists(rows(DeadLetter), max_size=3),
    st.lists(rows(RecordingRow), max_size=3),
)
def test_rows_are_read_as_they_were_written(tmp_path_factory, answers, letters, results):
    folder = tmp_path_factory.mktemp("out")
    results = [row._replace(created_at=row.created_at * 10**6) for row in results]
    written(folder, answers, letters, results)

    def read(table):
        return {found for path in (folder / table).glob("*") for found in read_earlier(table, str(path))}

    by_key = {ANSWERS.key(row): row for row in answers}
    assert read("captions") == {(row.recording_id, covered_by(row)) for row in by_key.values()}
    told = {row.dead_letter_key: row for row in letters}
    assert read("dead_letters") == {
        (row.recording_id, Told(row.dead_letter_key, "run-dead_letters")) for row in told.values()
    }
    by_id = {RECORDINGS.key(row): row for row in results}
    assert read("recordings") == {
        (row.recording_id, Settled(*(getattr(row, name) for name in Settled._fields))) for row in by_id.values()
    }


def test_a_table_of_another_version_is_told_with_what_to_do(tmp_path):
    older = RECORDING_SCHEMA.remove(RECORDING_SCHEMA.get_field_index("answer_keys"))
    pq.write_table(older.empty_table(), tmp_path / "a.parquet")
    with pytest.raises(StorageError, match=r"a\.parquet, of .* no column answer_keys, as rows of recordings .* move"):
        list(read_earlier("recordings", str(tmp_path / "a.parquet")))


def test_a_file_that_is_no_parquet_or_is_cut_off_is_told(tmp_path):
    path = tmp_path / "a.parquet"
    whole = pa.BufferOutputStream()
    pq.write_table(RECORDING_SCHEMA.empty_table(), whole)
    for body in (b"", b"no Parquet", whole.getvalue().to_pybytes()[:-9]):
        path.write_bytes(body)
        with pytest.raises(StorageError, match=r"a\.parquet, of earlier runs' rows, cannot be used: \S"):
            list(read_earlier("recordings", str(path)))
    path.unlink()
    with pytest.raises(StorageError, match=r"Start the run again where another program"):
        list(read_earlier("recordings", str(path)))


# --- Plan, against plain dicts

IDS = st.sampled_from(["a", "b", "c", "d/\x00'\u2028é", "ALL", "all"])
KEYS = keys_of(caption())


@st.composite
def mentions(draw):
    kind = draw(st.sampled_from(["recording", "recording", "letter", "result"]))
    found_id = draw(IDS)
    recording = Recording(found_id, f"/{draw(st.sampled_from('xy'))}.wav", 1, draw(st.sampled_from(["e1", "e2"])))
    if kind == "recording":
        return recording
    if kind == "letter":
        rejected = Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, "no")
        return to_dead_letter(rejected, recording._replace(uri=draw(st.sampled_from("pq"))), stage=Stage.LIST)
    return settle(Recording(f"result {found_id}", "/x.wav", 1, "e1"), covered("k1"), [])


def done_rows(recording, reasons=()):
    letters = [
        to_dead_letter(Rejected(Stage.DECODE, reason, "no"), recording, stage=Stage.DECODE)._replace(run_id="run 0")
        for reason in reasons
    ]
    answers = [] if reasons else covered(f"key of {recording.recording_id}")
    return answers, letters, settle(KEYS.add(recording), answers, map(failed_by, letters))


def outcomes_of(found, output, order):
    """By id: what a Plan makes of it, with all that tells runs apart taken out."""
    settled, asked = {}, {}
    with Plan() as plan:
        for part in (order[: len(order) // 2], order[len(order) // 2 :]):
            plan.add_found(found[number] for number in part)
        plan.add_earlier(str(output))
        for one in plan.settle(KEYS):
            assert isinstance(one, Settlement)
            assert one.result.recording_id not in settled
            letters = {letter.dead_letter_key: letter.run_id for letter in one.dead_letters}
            settled[one.result.recording_id] = (one.result._replace(created_at=0), letters)
        chunks = list(plan.chunks(2))
        for chunk in chunks:
            assert 1 <= len(chunk) <= 2
            for recording, letters in chunk:
                assert recording.recording_id not in asked
                assert {letter.recording_id for letter in letters} <= {recording.recording_id}
                asked[recording.recording_id] = recording, {one.dead_letter_key: one.run_id for one in letters}
        assert plan.found == len(settled) + len(asked)
        assert plan.to_ask == len(asked) == sum(map(len, chunks))
    assert not settled.keys() & asked.keys()
    return settled, asked


@settings(max_examples=40)
@given(
    st.lists(mentions(), max_size=12),
    st.dictionaries(IDS, st.sampled_from([(), (Reason.TOO_LONG,), (Reason.UNREADABLE,)]), max_size=4),
    st.randoms(use_true_random=False),
)
def test_every_id_ends_in_one_outcome_whatever_the_order(tmp_path_factory, found, earlier, rng):
    output = tmp_path_factory.mktemp("out")
    answers, letters, results = [], [], []
    for found_id, reasons in earlier.items():
        recording = Recording(found_id, "/x.wav", 1, "e1")
        made, dead, result = done_rows(recording, reasons)
        answers += [blank_answer(recording, one) for one in made]
        letters, results = letters + dead, [*results, result]
    written(output, answers, letters, results)
    order = list(range(len(found)))
    first = outcomes_of(found, output, order)
    shuffled = rng.sample(order, len(order))
    results_of = {item.recording_id for item in found if isinstance(item, RecordingRow)}
    again = outcomes_of(found, output, shuffled)
    assert first == again
    settled, asked = first
    by_id = {}
    for item in found:
        by_id.setdefault(item.recording_id, []).append(item)
    ended = settled.keys() | asked.keys()
    assert by_id.keys() <= ended
    for found_id, items in by_id.items():
        recordings = {item for item in items if isinstance(item, Recording)}
        own_letters = {item.dead_letter_key for item in items if isinstance(item, DeadLetter)}
        if found_id in results_of:
            assert settled[found_id][0].terminal_state is TerminalState.OK
        elif not recordings:
            assert settled[found_id][0].terminal_state is TerminalState.DEAD_LETTER
            assert settled[found_id][1] == dict.fromkeys(own_letters, "")
        else:
            # Of mentions of other audio the first by name is heard; the others have ids of their own.
            heard = min(recordings, key=lambda item: (item.uri, repr(item)))
            same = (heard.uri, heard.etag) == ("/x.wav", "e1") and not own_letters
            is_skipped = same and found_id in earlier and Reason.UNREADABLE not in earlier[found_id]
            assert (found_id in settled) == is_skipped
            if is_skipped:
                assert settled[found_id][0].terminal_state is TerminalState.SKIPPED_DONE
            else:
                recording, told = asked[found_id]
                assert recording.uri == heard.uri
                assert told == dict.fromkeys(own_letters, "")
                assert len(recording.earlier.answers) == (earlier.get(found_id) == ())
                assert len(recording.earlier.dead_letters) == len(earlier.get(found_id, ()))
    clashes = sum(len({item.uri for item in items if isinstance(item, Recording)}) == 2 for items in by_id.values())
    assert len(ended) == len(by_id) + clashes


def blank_answer(recording, found):
    segment = segments_of(recording)[0]
    info = EngineInfo("m", "r", "f", "l", "e", "float32", "cpu")
    task = resolve(caption(), "AudioFlamingo3")
    return make_answer(segment, task, Reply("x", (1,), "stop", 1, 2), info)._replace(
        answer_key=found.answer_key, segments=()
    )


# --- a stream, one recording at a time


def resumed_in_stream(output, *found):
    """What `ResumeRecordings` gives of an unbounded collection, by output."""
    ask = AskAudioFlamingo(model="demo", engine="closed", tasks=[caption()])
    collected = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        given_ = pipeline | Ticks(3600.0, stop_uri=str(output / "stop"))  # already there: no tick, but a stream
        recordings = (
            (given_ | beam.FlatMap(lambda _: []), pipeline | beam.Create([one for one in found if is_recording(one)]))
            | "Recordings" >> beam.Flatten()
            | "Typed" >> beam.Map(lambda one: one).with_output_types(Recording)
        )
        letters = pipeline | "Letters" >> beam.Create([one for one in found if not is_recording(one)])
        assert not recordings.is_bounded
        resumes = ResumeRecordings(str(output), DecodeAudio(model="demo"), ask)
        left = Outcome(recordings, letters) | resumes
        for name, items in left._asdict().items():
            _ = items | name >> collected.into(name)
    return {name: collected[name] for name in ("good", "dead_letters", "skipped")}


def is_recording(found):
    return isinstance(found, Recording)


def test_a_stream_is_held_against_what_there_is_when_it_starts(tmp_path):
    (tmp_path / "stop").touch()
    keyed = keys_of(caption()).add(BASE)
    new = BASE._replace(recording_id="new")
    rejected = Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, "no name")
    told, untold, cut_short = (
        to_dead_letter(rejected, Recording(name, name), stage=Stage.LIST) for name in ("told", "untold", "cut_short")
    )
    result = settle(keyed, [], [failed_by(told._replace(run_id=""))])._replace(settled_state=TerminalState.OK)
    list(write_rows([result, settle_letters([told]).result], RECORDINGS, str(tmp_path), "recordings", "run 1"))
    # Of the second, the run was killed before it wrote the row that names it.
    list(write_rows([told, cut_short], DEAD_LETTER_ROWS, str(tmp_path), "dead_letters", "run 1"))
    own = told._replace(recording_id=BASE.recording_id, dead_letter_key=result.dead_letter_keys[0])
    list(write_rows([own], DEAD_LETTER_ROWS, str(tmp_path), "dead_letters", "run 2"))
    left = resumed_in_stream(tmp_path, BASE, new, told, untold, cut_short)
    assert [one.recording_id for one in left["skipped"]] == [BASE.recording_id]
    assert left["skipped"][0].terminal_state is TerminalState.SKIPPED_DONE
    (asked,) = left["good"]
    assert asked == keys_of(caption()).add(new)
    assert {one.recording_id: one.run_id for one in left["dead_letters"]} == {
        "told": "run 1",
        "untold": "",
        "cut_short": "",
    }


def test_a_stream_asks_of_another_version_and_knows_what_there_was(tmp_path):
    (tmp_path / "stop").touch()
    keyed = keys_of(caption()).add(BASE)
    letter = to_dead_letter(Rejected(Stage.DECODE, Reason.TOO_LONG, "long"), keyed, stage=Stage.DECODE)
    list(write_rows([letter], DEAD_LETTER_ROWS, str(tmp_path), "dead_letters", "run 1"))
    list(write_rows([settle(keyed, [], [failed_by(letter)])], RECORDINGS, str(tmp_path), "recordings", "run 1"))
    changed = BASE._replace(etag="another")
    left = resumed_in_stream(tmp_path, BASE, changed)
    assert len(left["skipped"]) == 1
    (asked,) = left["good"]
    assert asked.etag == "another"
    assert asked.earlier.dead_letters == ((letter.dead_letter_key, "run 1"),)
