"""A stream reconciles in its bundles: as a batch does with a shuffle."""

from datetime import datetime, timezone
from typing import Any

import apache_beam as beam
import pytest
from af3pipe.transforms.reconcile import covered_by
from af3pipe.transforms.settle import NotTogether, _Answered, _Decoded, _GatherDoFn, event_time, settle_letters

from af3pipe.models import ENGINES, answer, caption, transcript
from af3pipe.schemas import (
    DeadLetter,
    Earlier,
    Question,
    Reason,
    Recording,
    Rejected,
    Stage,
    TerminalState,
    source_key,
)
from af3pipe.transforms import (
    AnswerAndSettle,
    AnswerRecordings,
    AskAudioFlamingo,
    DecodeAudio,
    JoinRejected,
    Outcome,
    ReconcileRecordings,
    SettleRejected,
)
from af3pipe.transforms.ask import KEPT, KNOWN, PARTS, stitch_key
from af3pipe.transforms.outcome import DEAD_LETTERS, to_dead_letter
from tests import fixtures_audio as make
from tests.collected import Collected
from tests.echo_engine import FAILS_S

RATE = 8_000
TASKS = [caption(), transcript(), answer("Is it loud?")]
OWN = (Question("who", "Who speaks?"), Question("pet", "Which?", ("cat", "dog")))  # no reply is one of those
MODIFIED = "2026-01-02T03:04:05+00:00"


@pytest.fixture(autouse=True)
def echo_engine(monkeypatch):
    monkeypatch.setitem(ENGINES, "echo", "tests.echo_engine:EchoEngine")


def recording(path, **changes):
    uri = str(path)
    return Recording(source_key(uri), uri, path.stat().st_size, "etag", MODIFIED)._replace(**changes)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """One of each kind of end that a recording may come to; by name."""
    folder = tmp_path_factory.mktemp("archive")
    long = make.sound(1300, RATE)  # three segments of 600 s at most
    gap, end = long.copy(), long.copy()
    gap[599 * RATE : 1201 * RATE] = 0  # a little more: sound before and after rings on
    end[1199 * RATE :] = 0
    flac = make.flac(make.sound(20, RATE), RATE)
    files = {
        "short": make.wav(make.sound(2, RATE), RATE),
        "long": make.wav(long, RATE),
        "long with a silent gap": make.wav(gap, RATE),
        "long with a silent end": make.wav(end, RATE),
        "silent": make.wav(make.sound(2, RATE) * 0, RATE),
        "corrupt": b"fLaC" + bytes(2000),
        "cut off": flac[: len(flac) // 2],
        "too much for the engine": make.wav(make.sound(FAILS_S, RATE), RATE),
        "empty": b"",
    }
    found = {}
    for name, data in files.items():
        path = folder / f"{name}.wav"
        path.write_bytes(data)
        found[name] = recording(path)
    found["asked more"] = found["short"]._replace(recording_id="asked more", questions=OWN)
    found["long and asked more"] = found["long with a silent gap"]._replace(recording_id="long, asked", questions=OWN)
    found["a part"] = found["short"]._replace(recording_id="part", offset_s=0.5, duration_s=1.0)
    found["gone"] = found["short"]._replace(recording_id="gone", uri=str(folder / "gone.wav"))
    return found


def how(tasks):
    decode = DecodeAudio(model="demo", over_length="split", on_silent="dead-letter", guard=None)
    return decode, AskAudioFlamingo(model="demo", tasks=tasks, engine="echo")


def in_batch(recordings, tasks=TASKS):
    """(results, answers, new dead letters) as a batch has them, without when."""
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        given = pipeline | beam.Create(recordings, reshuffle=False).with_output_types(Recording)
        answers = given | AnswerRecordings(*how(tasks))
        results = {
            "recordings": given,
            "answers": answers.good,
            "dead_letters": answers.dead_letters,
            "kept": answers.kept,
        } | ReconcileRecordings(tasks)
        for name, rows in (("results", results), ("answers", answers.good), ("letters", answers.dead_letters)):
            _ = rows | name >> found.into(name)
    return timeless(found["results"], found["answers"], [one for one in found["letters"] if not one.run_id])


def in_stream(recordings, tasks=TASKS):
    """The same from a stream's transform."""
    return timeless(*apart(settled(recordings, tasks)))


def settled(recordings, tasks=TASKS):
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        given = pipeline | beam.Create(recordings, reshuffle=False).with_output_types(Recording)
        _ = given | AnswerAndSettle(*how(tasks), tasks) | found.into("settled")
    return found["settled"]


def apart(all_settled):
    return (
        [one.result for one in all_settled],
        [row for one in all_settled for row in one.answers],
        [row for one in all_settled for row in one.dead_letters],
    )


def timeless(results, answers, letters):
    """Without what differs from one run to the next, in an order."""
    return (
        sorted(row._replace(created_at=0) for row in results),
        sorted((row._replace(created_at=0) for row in answers), key=lambda row: (row.recording_id, row.answer_key)),
        sorted((row._replace(created_at=0, traceback=None) for row in letters), key=lambda row: row.dead_letter_key),
    )


def same(batch, stream):
    for one, other in zip(batch, stream, strict=True):
        assert one == other
    return batch


@pytest.mark.representative
def test_a_stream_settles_recordings_as_a_batch_does(recordings):
    results, answers, letters = same(in_batch(recordings.values()), in_stream(recordings.values()))
    states = {row.recording_id: row.terminal_state for row in results}
    ended = {name: states[found.recording_id].value for name, found in recordings.items()}
    assert ended == {
        "short": "ok",
        "long": "ok",
        "long with a silent gap": "ok_partial",
        "long with a silent end": "ok_partial",
        "silent": "dead_letter",
        "corrupt": "dead_letter",
        "cut off": ended["cut off"],
        "too much for the engine": "dead_letter",
        "empty": "dead_letter",
        "asked more": "ok_partial",
        "long and asked more": "ok_partial",
        "a part": "ok",
        "gone": "dead_letter",
    }
    long = [row for row in answers if row.recording_id == recordings["long"].recording_id]
    assert sorted((row.task, row.segment_index) for row in long) == [
        *(("answer", number) for number in range(3)),
        *(("caption", number) for number in range(3)),
        ("transcript", 0),
    ]
    (stitched,) = [row for row in long if row.task == "transcript"]
    assert [piece.end_s for piece in stitched.segments] == [600, 1200, 1300]
    of_both = {row.stage for row in letters if row.recording_id == "long, asked"}
    assert of_both == {Stage.DECODE, Stage.PARSE}
    assert {row.reason for row in letters} >= {Reason.SILENT, Reason.OUTPUT_INVALID, Reason.OUT_OF_MEMORY}


def earlier_of(batch, recording_id):
    """What a run left of a recording, as resuming it gives it."""
    _, answers, letters = batch
    return Earlier(
        tuple(covered_by(row) for row in answers if row.recording_id == recording_id),
        tuple((row.dead_letter_key, "an earlier run") for row in letters if row.recording_id == recording_id),
    )


def test_what_earlier_runs_left_counts_as_in_a_batch(recordings):
    names = ["short", "long", "long with a silent gap", "long with a silent end", "silent", "asked more"]
    given = [recordings[name] for name in names]
    first = in_batch(given, TASKS[:2])
    again = [one._replace(earlier=earlier_of(first, one.recording_id)) for one in given]
    results, answers, letters = same(in_batch(again), in_stream(again))
    by_id = {row.recording_id: row for row in results}
    kept = {name: by_id[recordings[name].recording_id].kept_answers for name in names}
    # The transcript of the one with a silent end may be less than there is: it is heard again, and is the same.
    assert kept == {
        "short": 2,
        "long": 4,
        "long with a silent gap": 3,
        "long with a silent end": 3,
        "silent": 0,
        "asked more": 3,
    }
    assert {row.task for row in answers} == {"answer"}
    assert letters == []
    assert by_id[recordings["silent"].recording_id].kept_dead_letters == 1


NOTHING = Earlier()


def versions(recordings, earlier=NOTHING):
    """A file that was written over: another sound, another etag, the same name."""
    old = recordings["short"]._replace(earlier=earlier)
    new = recordings["a part"]._replace(recording_id=old.recording_id, etag="new", earlier=earlier)
    return old, new


def test_two_versions_of_a_recording_in_a_bundle_stay_apart(recordings):
    old, new = versions(recordings)
    both = settled([old, new])
    assert sorted(one.result.etag for one in both) == ["etag", "new"]
    for one, version in ((one, old if one.result.etag == "etag" else new) for one in both):
        same(in_batch([version]), timeless(*apart([one])))


def test_what_was_kept_of_one_version_is_not_kept_of_another(recordings):
    old, _ = versions(recordings)
    kept = earlier_of(in_batch([old], TASKS[:1]), old.recording_id)
    old, new = versions(recordings, kept)
    both = {one.result.etag: one for one in settled([old, new])}
    assert (both["etag"].result.kept_answers, both["new"].result.kept_answers) == (1, 0)
    for version in (old, new):
        same(in_batch([version]), timeless(*apart([both[version.etag]])))


VERSION = "id", "etag"


def decoded(recording, segments=1, letters=(), version=VERSION):
    return "decoded", _Decoded(version, recording, segments, tuple(letters))


def answered(*outputs, index=0, version=VERSION):
    return "answered", _Answered(version, index, outputs)


def gathered(*items: tuple[str, Any], tasks=TASKS[:1]):
    """What comes of a bundle, in the order in which it comes."""
    dofn = _GatherDoFn(frozenset(f"{task.name}/" for task in tasks))
    dofn.start_bundle()
    found = [one for item in items for one in dofn.process(item)]
    dofn.finish_bundle()
    return found


def test_what_is_not_in_one_bundle_is_an_error_and_no_row(recordings):
    one = recordings["short"]
    _, (row,), _ = in_batch([one], TASKS[:1])
    (whole,) = gathered(decoded(one), answered(("", row)))
    assert whole.value.result.terminal_state is TerminalState.OK
    with pytest.raises(NotTogether, match="a recording that is not in their bundle"):
        gathered(answered(("", row)))
    with pytest.raises(NotTogether, match=r"1 of 2 segments of .*short\.wav were answered"):
        gathered(decoded(one, segments=2), answered(("", row)))
    with pytest.raises(NotTogether, match=r"short\.wav came to an end without an answer to each task"):
        gathered(decoded(one), answered(("", row)), tasks=TASKS[:2])
    with pytest.raises(NotTogether, match="without an answer to each task"):
        gathered(decoded(one), answered())
    letter = to_dead_letter(Rejected(Stage.GENERATE, Reason.OUT_OF_MEMORY, "full"), one, stage=Stage.GENERATE)
    with pytest.raises(NotTogether, match="not in their bundle"):
        gathered(answered((DEAD_LETTERS, letter)))


def test_nothing_is_left_of_a_bundle_that_failed(recordings):
    one = recordings["short"]
    dofn = _GatherDoFn(frozenset())
    dofn.start_bundle()
    assert list(dofn.process(decoded(one))) == []
    dofn.start_bundle()
    dofn.finish_bundle()


def test_a_recording_that_is_in_a_bundle_twice_is_settled_once(recordings):
    one = recordings["long"]
    _, rows, _ = in_batch([one], TASKS[:1])
    assert len(rows) == 3
    segments = [answered(("", row), index=row.segment_index) for row in rows]
    once = [decoded(one, 3), *segments]
    expected = [found.value for found in gathered(*once)]
    in_turn = [*once, *once]
    for order in (in_turn, [*segments, *segments[:2], decoded(one, 3), decoded(one, 3), segments[2]]):
        ((result, answers, letters),) = [found.value for found in gathered(*order)]
        assert sorted(answers) == sorted(expected[0].answers)
        assert result._replace(created_at=0) == expected[0].result._replace(created_at=0)
        assert letters == ()


def test_a_recording_is_settled_before_its_bundle_ends(recordings):
    """A worker may have but one bundle, of all that it has to do."""
    one, other = recordings["short"], recordings["a part"]
    _, rows, _ = in_batch([one, other], TASKS[:1])
    row, other_row = (next(row for row in rows if row.recording_id == each.recording_id) for each in (one, other))
    dofn = _GatherDoFn(frozenset({"caption/"}))
    dofn.start_bundle()
    came = [
        [found.value.result.recording_id for found in dofn.process(item)]
        for item in (
            decoded(one),
            decoded(other, version=("other", "")),
            answered(("", other_row), version=("other", "")),
            answered(("", row)),
        )
    ]
    assert came == [[], [], [other.recording_id], [one.recording_id]]


def test_parts_may_come_in_any_order(recordings):
    tasks = [transcript()]
    one = recordings["long"]
    _, (whole,), _ = in_batch([one], tasks)
    parts = [
        whole._replace(
            segment_index=number,
            start_s=piece.start_s,
            end_s=piece.end_s,
            segments=(piece,),
            text=piece.text,
            answer_key=f"part {number}",
        )
        for number, piece in enumerate(whole.segments)
    ]
    items = [decoded(one, len(parts)), *(answered((PARTS, part), index=part.segment_index) for part in parts)]
    (forwards,) = gathered(*items, tasks=tasks)
    (backwards,) = gathered(*items[::-1], tasks=tasks)
    assert forwards.value.answers == backwards.value.answers
    (found,) = forwards.value.answers
    assert found.segments == whole.segments
    known = covered_by(found)
    kept = ((KNOWN, (stitch_key(one.recording_id, "transcript", None), known)), (KEPT, (one.recording_id, known)))
    for again in kept[:1], kept:  # it may be told twice
        (met,) = gathered(decoded(one, len(parts) + 1), answered(*again, index=9), *items[1:], tasks=tasks)
        assert met.value.answers == ()
        assert met.value.result.kept_answers == 1


def test_a_recording_that_was_named_well_and_badly_is_settled_once(recordings):
    """As `ReconcileRecordings` does; a dead letter that an earlier run wrote is not written again."""
    one, gone = recordings["short"], recordings["gone"]
    bad = [
        to_dead_letter(Rejected(Stage.LIST, Reason.UNREADABLE, detail), found, stage=Stage.LIST)._replace(
            run_id=run_id, dead_letter_key=detail
        )
        for found, detail, run_id in (
            (one, "new", ""),
            (one, "told", "run 1"),
            (gone, "only bad", ""),
            (gone, "told before", "run 1"),
        )
    ]
    found, batch = Collected(), Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        given = pipeline | "Good" >> beam.Create([one], reshuffle=False).with_output_types(Recording)
        letters = pipeline | "Bad" >> beam.Create(bad, reshuffle=False).with_output_types(DeadLetter)
        joined = Outcome(given, letters) | JoinRejected()
        _ = joined.planned | AnswerAndSettle(*how(TASKS), TASKS) | "A" >> found.into("asked")
        _ = joined.settled | "B" >> found.into("rejected")
        answers = given | AnswerRecordings(*how(TASKS))
        results = {
            "recordings": given,
            "answers": answers.good,
            "dead_letters": (answers.dead_letters, letters) | beam.Flatten(),
            "kept": answers.kept,
        } | ReconcileRecordings(TASKS)
        _ = results | "C" >> batch.into("results")
    results, answers, letters = timeless(*apart([*found["asked"], *found["rejected"]]))
    assert results == timeless(batch["results"], [], [])[0]
    assert [(row.terminal_state.value, row.dead_letters, row.kept_dead_letters) for row in found_rows(results)] == [
        ("dead_letter", 1, 1),
        ("ok_partial", 1, 1),
    ]
    assert [letter.dead_letter_key for letter in letters] == ["new", "only bad"]
    assert len(answers) == len(TASKS)


def found_rows(results):
    return sorted(results, key=lambda row: row.terminal_state.value)


def test_each_is_settled_when_its_object_was_modified(recordings):
    found = Collected()
    given = [recordings["short"], recordings["corrupt"]._replace(mtime="1970-01-01T00:00:00+00:00")]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        at_work = (
            pipeline
            | beam.Create(given, reshuffle=False).with_output_types(Recording)
            | beam.Map(lambda one: beam.window.TimestampedValue(one, 12345)).with_output_types(Recording)
        )
        _ = at_work | AnswerAndSettle(*how(TASKS), TASKS) | found.into("settled")
    times = {one.result.etag and one.result.uri: at.to_utc_datetime() for at, one in found.timed("settled")}
    modified = datetime.fromisoformat(MODIFIED).astimezone(timezone.utc).replace(tzinfo=None)
    assert times == {recordings["short"].uri: modified, recordings["corrupt"].uri: datetime(1970, 1, 1)}


def test_where_nobody_knows_when_an_object_was_modified_it_is_when_it_was_asked():
    letter = to_dead_letter(
        Rejected(Stage.READ, Reason.NOT_FOUND, "gone"), Recording("id", "a.wav"), stage=Stage.READ
    )
    settled_letter = settle_letters([letter])
    assert event_time(settled_letter).micros == settled_letter.result.created_at


def test_what_is_rejected_keeps_an_id_that_looks_like_a_secret():
    """Its dead letter's input masks it; who waits for it knows it by its id."""
    one = Recording("a?token=abcdef", "s3://archive/gone.wav")
    letter = to_dead_letter(Rejected(Stage.LIST, Reason.NOT_FOUND, "gone"), one, stage=Stage.LIST)
    assert "abcdef" not in letter.input
    assert settle_letters([letter]).result.recording_id == letter.recording_id == one.recording_id


def test_what_is_rejected_before_it_is_asked_is_settled():
    found = Collected()
    one = Recording("id", "a.wav", 1, None, MODIFIED)
    letter = to_dead_letter(Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, "what"), one, stage=Stage.LIST)
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | beam.Create([letter]) | SettleRejected() | found.into("settled")
    ((at, rejected),) = found.timed("settled")
    assert at == event_time(rejected)
    assert at.to_utc_datetime().isoformat() == "2026-01-02T03:04:05"
    assert (rejected.answers, rejected.dead_letters) == ((), (letter,))
    assert rejected.result.terminal_state is TerminalState.DEAD_LETTER
    assert (rejected.result.recording_id, rejected.result.dead_letters) == ("id", 1)
