"""AnswerRecordings: from objects to results in one step, whatever becomes of a recording on the way."""

import itertools
import os
import threading
from concurrent.futures import Future
from datetime import datetime, timezone

import apache_beam as beam
import pytest
from apache_beam.pvalue import TaggedOutput

from af3pipe.models import ENGINES, EngineFailed, answer, caption, transcript
from af3pipe.schemas import (
    AudioObject,
    Existing,
    Question,
    Reason,
    Recording,
    RecordingResult,
    Rejected,
    Stage,
    TerminalState,
    source_key,
)
from af3pipe.transforms import AnswerRecordings, AskAudioFlamingo, DecodeAudio
from af3pipe.transforms.answer import AnswerDoFn, event_time
from af3pipe.transforms.outcome import to_dead_letter
from af3pipe.transforms.result import covered_by
from benchmarks import constant_engine
from tests import fixtures_audio as make
from tests.collected import Collected
from tests.counting_engine import CountingEngine
from tests.echo_engine import FAILS_S, EchoEngine
from tests.held_engine import HeldEngine
from tests.waiting import wait_until

RATE = 8_000
TASKS = [caption(), transcript(), answer("Is it loud?")]
OWN = (Question("who", "Who speaks?"), Question("pet", "Which?", ("cat", "dog")))  # no reply is one of those
MODIFIED = "2026-01-02T03:04:05+00:00"


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    monkeypatch.setitem(ENGINES, "echo", "tests.echo_engine:EchoEngine")
    monkeypatch.setitem(ENGINES, "counting", "tests.counting_engine:CountingEngine")
    monkeypatch.setitem(ENGINES, "held", "tests.held_engine:HeldEngine")
    monkeypatch.setitem(ENGINES, "closed", "tests.closed_engine:ClosedEngine")
    monkeypatch.setattr(constant_engine, "window_s", 0.0)
    monkeypatch.setattr(CountingEngine, "asked", [])
    monkeypatch.setattr(HeldEngine, "held", [])


def recording(path, **changes):
    uri = str(path)
    at_s = datetime.fromisoformat(MODIFIED).timestamp()
    os.utime(path, (at_s, at_s))  # the version that is listed is the one that is read
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
        "other": make.wav(make.sound(2.5, RATE), RATE),
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


def how(tasks=TASKS, engine="echo", *, threads=None, slots=None, queue_audio_s=600.0):
    decode = DecodeAudio(model="demo", over_length="split", on_silent="dead-letter", guard=None, threads=threads)
    ask = AskAudioFlamingo(model="demo", tasks=tasks, engine=engine, slots=slots, queue_audio_s=queue_audio_s)
    return {"decode": decode, "ask": ask}


def answered(given, tasks=TASKS, engine="echo"):
    """Results of a pipeline."""
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        objects = pipeline | beam.Create(list(given), reshuffle=False)
        _ = objects | AnswerRecordings(**how(tasks, engine)) | found.into("results")
    return found["results"]


def by_id(results):
    found = {one.row.recording_id: one for one in results}
    assert len(found) == len(results)
    return found


def timeless(results):
    """Without what differs from one run to the next, in an order."""
    return sorted(
        (
            one.row._replace(created_at=0),
            sorted((row._replace(created_at=0) for row in one.answers), key=lambda row: row.answer_key),
            sorted(
                (row._replace(created_at=0, traceback=None) for row in one.dead_letters),
                key=lambda row: row.dead_letter_key,
            ),
        )
        for one in results
    )


@pytest.mark.representative
def test_each_recording_ends_in_one_state_with_its_rows(recordings):
    found = by_id(answered(recordings.values()))
    ended = {name: found[one.recording_id].row.terminal_state.value for name, one in recordings.items()}
    assert ended == {
        "short": "ok",
        "other": "ok",
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
    for one in found.values():
        assert (one.row.answers, one.row.kept_answers) == (len(one.answers), 0)
        assert (one.row.dead_letters, one.row.kept_dead_letters) == (len(one.dead_letters), 0)
        assert one.row.answer_keys == tuple(sorted(row.answer_key for row in one.answers))
        assert one.row.dead_letter_keys == tuple(sorted(row.dead_letter_key for row in one.dead_letters))
        rows = (*one.answers, *one.dead_letters)
        assert {row.recording_id for row in rows} == {one.row.recording_id}
    long = found[recordings["long"].recording_id]
    assert sorted((row.task, row.segment_index) for row in long.answers) == [
        *(("answer", number) for number in range(3)),
        *(("caption", number) for number in range(3)),
        ("transcript", 0),
    ]
    (merged,) = [row for row in long.answers if row.task == "transcript"]
    assert [piece.end_s for piece in merged.segments] == [600, 1200, 1300]
    assert long.row.covered_s == 1300
    gap = found[recordings["long with a silent gap"].recording_id]
    assert [row.position_s for row in gap.dead_letters] == [600.0]
    assert gap.row.reasons == ("silent",)
    assert {row.segment_index for row in gap.answers} == {0, 2}
    of_both = {row.stage for row in found["long, asked"].dead_letters}
    assert of_both == {Stage.DECODE, Stage.PARSE}
    (lost,) = found[recordings["too much for the engine"].recording_id].dead_letters
    assert (lost.stage, lost.reason) == (Stage.GENERATE, Reason.OUT_OF_MEMORY)
    assert '"transcript"' in lost.input, "one dead letter for all that was requested of the segment"


def test_a_request_that_fails_costs_no_other(recordings):
    bad, good = recordings["too much for the engine"], recordings["short"]
    found = by_id(answered([bad, good]))
    assert len(found[bad.recording_id].dead_letters) == 1
    assert found[good.recording_id].row.terminal_state is TerminalState.OK
    assert len(found[good.recording_id].answers) == len(TASKS)


def test_a_recording_that_stands_alone_is_its_object(recordings):
    one = recordings["short"]
    assert timeless(answered([one])) == timeless(answered([AudioObject(one.uri, (one,))]))


# --- one object, several recordings


def two_of(one):
    ada = one._replace(recording_id="ada", metadata='{"speaker": "Ada"}')
    bob = one._replace(recording_id="bob", metadata='{"note": "n", "speaker": "Bob"}')
    return ada, bob


class ChoosyEngine(EchoEngine):
    """Fails every request in which a question is about money."""

    def submit(self, request):
        if any("money" in (task.question or "") for task in request.tasks):
            failed = Future()
            failed.set_exception(Rejected(Stage.GENERATE, Reason.ENGINE_ERROR, "not about money"))
            return failed
        return super().submit(request)


def test_a_question_about_one_recording_costs_no_other_of_the_audio_its_answers(recordings, monkeypatch):
    monkeypatch.setitem(ENGINES, "choosy", f"{__name__}:ChoosyEngine")
    ada, bob = two_of(recordings["short"])
    ada, bob = ada._replace(questions=OWN[:1]), bob._replace(questions=(Question("q", "Is there money?"),))
    found = by_id(answered([AudioObject(ada.uri, (ada, bob))], engine="choosy"))
    assert (found["ada"].row.terminal_state, len(found["ada"].answers)) == (TerminalState.OK, 4)
    assert found["bob"].row.terminal_state is TerminalState.DEAD_LETTER
    (letter,) = found["bob"].dead_letters
    assert "Who speaks?" not in letter.input


def test_the_same_audio_is_asked_once_for_all_recordings_of_it(recordings):
    ada, bob = two_of(recordings["short"])
    found = by_id(answered([AudioObject(ada.uri, (ada, bob))], engine="counting"))
    assert len(CountingEngine.asked) == 1
    for one in (ada, bob):
        rows = found[one.recording_id].answers
        assert sorted(row.task for row in rows) == ["answer", "caption", "transcript"]
        assert {(row.recording_id, row.metadata, row.uri) for row in rows} == {
            (one.recording_id, one.metadata, one.uri)
        }
        assert found[one.recording_id].row.metadata == one.metadata
        assert found[one.recording_id].row.terminal_state is TerminalState.OK
    texts = [sorted(row.text for row in one.answers) for one in found.values()]
    assert texts[0] == texts[1]


def test_a_question_of_one_recording_is_no_row_of_the_other(recordings):
    ada, bob = two_of(recordings["short"])
    bob = bob._replace(questions=OWN[:1])
    found = by_id(answered([AudioObject(ada.uri, (ada, bob))], engine="counting"))
    assert CountingEngine.asked == [
        [("caption", None), ("transcript", None), ("answer", "Is it loud?"), ("answer", "Who speaks?")]
    ]
    assert [len(found[name].answers) for name in ("ada", "bob")] == [3, 4]
    assert "Who speaks?" not in {row.question for row in found["ada"].answers}


def test_a_failure_is_a_dead_letter_of_each_recording_of_the_audio(recordings):
    for name, stage in (("too much for the engine", Stage.GENERATE), ("silent", Stage.DECODE), ("empty", Stage.READ)):
        ada, bob = two_of(recordings[name])
        found = by_id(answered([AudioObject(ada.uri, (ada, bob))]))
        for one in (ada, bob):
            (letter,) = found[one.recording_id].dead_letters
            assert (letter.recording_id, letter.metadata) == (one.recording_id, one.metadata)
            assert letter.stage is stage or name == "empty"


def test_parts_of_an_object_are_requests_of_their_own(recordings):
    part, whole = recordings["a part"], recordings["short"]
    found = by_id(answered([AudioObject(part.uri, (whole, part))], engine="counting"))
    assert len(CountingEngine.asked) == 2
    assert [(row.start_s, row.end_s) for row in found["part"].answers] == [(0.5, 1.5)] * 3
    assert [(row.start_s, row.end_s) for row in found[whole.recording_id].answers] == [(0.0, 2.0)] * 3


# --- what was rejected


def rejected(one, detail="what", run_id=""):
    letter = to_dead_letter(Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, detail), one, stage=Stage.LIST)
    return letter._replace(run_id=run_id, dead_letter_key=f"{one.recording_id} {detail}")


def test_a_recording_that_was_named_well_and_badly_has_both(recordings):
    one = recordings["short"]
    letters = rejected(one, "new"), rejected(one, "written before", "run 1")
    ((row, answers, new),) = answered([AudioObject(one.uri, (one,), letters)])
    assert row.terminal_state is TerminalState.OK_PARTIAL
    assert (row.dead_letters, row.kept_dead_letters) == (1, 1)
    assert [letter.detail for letter in new] == ["new"]
    assert len(answers) == len(TASKS)


def test_what_is_rejected_before_it_is_opened_has_a_result(recordings):
    ada, bob = two_of(Recording("id", "a.wav", 1, None, MODIFIED))
    letters = rejected(ada), rejected(bob), rejected(bob, "and more")
    found = by_id(answered([AudioObject("a.wav", (), letters)], engine="closed"))
    assert found["ada"].dead_letters == letters[:1]
    assert set(found["bob"].dead_letters) == set(letters[1:])
    for one in (ada, bob):
        row = found[one.recording_id].row
        assert (row.terminal_state, row.metadata, row.mtime) == (TerminalState.DEAD_LETTER, one.metadata, MODIFIED)


# --- what earlier runs have


def existing_of(result):
    """What a run left of a recording, as resuming it gives it."""
    letters = tuple((row.dead_letter_key, "an earlier run") for row in result.dead_letters)
    return Existing(tuple(map(covered_by, result.answers)), letters)


@pytest.mark.representative
def test_what_earlier_runs_wrote_is_kept(recordings):
    names = ["short", "long", "long with a silent gap", "long with a silent end", "silent", "asked more"]
    given = [recordings[name] for name in names]
    first = by_id(answered(given, TASKS[:2]))
    found = by_id(answered([one._replace(existing=existing_of(first[one.recording_id])) for one in given]))
    kept = {name: found[recordings[name].recording_id].row.kept_answers for name in names}
    # The transcript of the one with a silent end may be less than there is: it is heard again, and is the same.
    assert kept == {
        "short": 2,
        "long": 4,
        "long with a silent gap": 3,
        "long with a silent end": 3,
        "silent": 0,
        "asked more": 3,
    }
    assert {row.task for one in found.values() for row in one.answers} == {"answer"}
    assert [letter for one in found.values() for letter in one.dead_letters] == []
    assert found[recordings["silent"].recording_id].row.kept_dead_letters == 1
    states = {name: first[one.recording_id].row.terminal_state for name, one in zip(names, given, strict=True)}
    again = {name: found[one.recording_id].row.terminal_state for name, one in zip(names, given, strict=True)}
    assert states == again


def test_nothing_to_ask_opens_no_engine(recordings):
    one = recordings["short"]
    (first,) = answered([one])
    (again,) = answered([one._replace(existing=existing_of(first))], engine="closed")
    assert (again.answers, again.dead_letters) == ((), ())
    assert (again.row.kept_answers, again.row.answer_keys) == (3, first.row.answer_keys)
    broken = [recordings[name] for name in ("silent", "corrupt", "empty", "gone")]
    assert {one.row.answers for one in answered(broken, engine="closed")} == {0}


def test_an_answer_of_another_recording_of_the_audio_is_copied_and_not_asked_again(recordings):
    ada, bob = two_of(recordings["short"])
    (first,) = answered([ada], TASKS[:2])
    copies = tuple(row._replace(recording_id="bob", metadata=bob.metadata) for row in first.answers)
    there = Existing(tuple(map(covered_by, first.answers)))
    given = AudioObject(bob.uri, (bob._replace(existing=there),), (), copies)
    (found,) = answered([given], engine="counting")
    assert CountingEngine.asked == [[("answer", "Is it loud?")]]
    assert {(row.task, row.recording_id, row.metadata) for row in found.answers} == {
        (task, "bob", bob.metadata) for task in ("caption", "transcript", "answer")
    }
    assert (found.row.answers, found.row.kept_answers) == (3, 0)
    assert {row.text for row in first.answers} < {row.text for row in found.answers}


def test_a_copy_that_nothing_requests_is_not_written(recordings):
    ada, bob = two_of(recordings["short"])
    (first,) = answered([ada], TASKS)
    copies = tuple(row._replace(recording_id="bob", metadata=bob.metadata) for row in first.answers)
    there = Existing(tuple(map(covered_by, first.answers)))
    (found,) = answered([AudioObject(bob.uri, (bob._replace(existing=there),), (), copies)], TASKS[:1], "closed")
    assert [row.task for row in found.answers] == ["caption"]


def test_a_merged_transcript_is_copied_whole(recordings):
    ada, bob = two_of(recordings["long"])
    (first,) = answered([ada], [transcript()])
    (row,) = first.answers
    there = Existing((covered_by(row),))
    copy = row._replace(recording_id="bob", metadata=bob.metadata, created_at=1)
    given = AudioObject(bob.uri, (bob._replace(existing=there),), (), (copy,))
    (found,) = answered([given], [transcript()], "closed")
    assert [one._replace(created_at=1) for one in found.answers] == [copy]
    assert found.answers[0].created_at > 1


NOTHING = Existing()


def versions(recordings, existing=NOTHING):
    """A file that was written over: another sound, another etag, the same name."""
    old = recordings["short"]._replace(existing=existing)
    new = recordings["a part"]._replace(recording_id=old.recording_id, etag="new", existing=existing)
    return old, new


def test_two_versions_of_a_recording_in_a_bundle_stay_apart(recordings):
    old, new = versions(recordings)
    both = answered([old, new])
    assert sorted(one.row.etag for one in both) == ["etag", "new"]
    for one in both:
        assert timeless([one]) == timeless(answered([old if one.row.etag == "etag" else new]))


def test_what_was_kept_of_one_version_is_not_kept_of_another(recordings):
    old, _ = versions(recordings)
    old, new = versions(recordings, existing_of(*answered([old], TASKS[:1])))
    both = {one.row.etag: one for one in answered([old, new])}
    assert (both["etag"].row.kept_answers, both["new"].row.kept_answers) == (1, 0)


# --- when


def test_a_result_is_of_the_time_when_its_object_was_modified(recordings):
    found = Collected()
    epoch = recordings["gone"]._replace(mtime="1970-01-01T00:00:00+00:00")
    given = [recordings["short"], epoch]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        at_work = (
            pipeline
            | beam.Create(given, reshuffle=False).with_output_types(Recording)
            | beam.Map(lambda one: beam.window.TimestampedValue(one, 12345)).with_output_types(Recording)
        )
        _ = at_work | AnswerRecordings(**how()) | found.into("results")
    times = {one.row.uri: at.to_utc_datetime() for at, one in found.timed("results")}
    modified = datetime.fromisoformat(MODIFIED).astimezone(timezone.utc).replace(tzinfo=None)
    assert times == {recordings["short"].uri: modified, epoch.uri: datetime(1970, 1, 1)}


def test_where_the_store_does_not_say_it_is_when_the_row_was_made(recordings):
    (found,) = answered([recordings["gone"]._replace(mtime=None, etag=None)])
    assert event_time(found).micros == found.row.created_at
    old = found._replace(row=found.row._replace(mtime="1601-01-01T00:00:00+00:00"))
    assert event_time(old).micros == 0


# --- the step itself


def step(tasks=TASKS[:1], engine="held", *, verifiable=False, **changes):
    parts = how(tasks, engine, **changes)
    return AnswerDoFn(parts["decode"].decoder, parts["ask"].asker, verifiable=verifiable)


@pytest.fixture
def opened():
    """Opens steps, and closes them."""
    there = []

    def open_step(**changes):
        there.append(step(**changes))
        there[-1].setup()
        there[-1].start_bundle()
        return there[-1]

    yield open_step
    for one in there:
        one.teardown()


def results_in(outputs):
    values = [getattr(one, "value", one) for one in outputs if not isinstance(one, TaggedOutput)]
    assert all(isinstance(one, RecordingResult) for one in values)
    return values


class Feeding:
    """Feeds a step from a thread of its own, as a runner does."""

    def __init__(self, dofn, given):
        self.results = []
        self.outputs = []
        self.error = None
        self.taken = 0
        self._dofn, self._given = dofn, list(given)
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    @property
    def is_alive(self):
        return self._thread.is_alive()

    def _feed(self):
        try:
            for one in self._given:
                self._keep(self._dofn.process(one))
                self.taken += 1
            self._keep(self._dofn.finish_bundle())
        except Exception as error:  # noqa: BLE001 - for the test to look at
            self.error = error

    def _keep(self, outputs):
        for one in outputs:
            self.outputs.append(one)
            self.results += results_in([one])

    def join(self):
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error
        return self.results


def many(one, number):
    return [one._replace(recording_id=f"{n}") for n in range(number)]


def waiting():
    return [held for held in HeldEngine.held if not held.future.done()]


def reply_to_all(feeding):
    """Replies to whatever comes, until all is done; gives the results."""
    while feeding.is_alive:
        wait_until(lambda: waiting() or not feeding.is_alive)
        for held in waiting():
            held.reply()
    return feeding.join()


def test_others_are_decoded_while_the_engine_works(recordings, opened):
    feeding = Feeding(opened(threads=2, slots=4), many(recordings["short"], 10))
    wait_until(lambda: len(HeldEngine.held) == 4)  # as many objects are open as two threads need
    assert (feeding.results, feeding.taken) == ([], 4)
    HeldEngine.held[2].reply()
    wait_until(lambda: len(HeldEngine.held) == 5)
    wait_until(lambda: feeding.results)
    assert len(by_id(reply_to_all(feeding))) == 10


def test_a_recording_is_given_before_its_bundle_ends(recordings, opened):
    """A worker may have but one bundle, of all that it has to do."""
    feeding = Feeding(opened(threads=2), many(recordings["short"], 5))
    wait_until(lambda: len(HeldEngine.held) >= 3)
    HeldEngine.held[1].reply()
    wait_until(lambda: feeding.results)
    assert len(feeding.results) == 1
    assert len(reply_to_all(feeding)) == 5


@pytest.mark.parametrize(
    ("changes", "most"),
    [({"slots": 1}, 3), ({"slots": 2}, 6), ({"slots": 8, "queue_audio_s": 4.0}, 4)],
    ids=["one slot", "two slots", "seconds"],
)
def test_what_is_pending_is_bounded(recordings, opened, changes, most):
    threads = 4
    dofn = opened(threads=threads, **changes)
    decoded, parts_of = itertools.count(1), dofn._decoder.parts_of
    number = 0

    def counted(given):
        nonlocal number
        for part in parts_of(given):
            number = next(decoded)
            yield part

    dofn._decoder.parts_of = counted
    feeding = Feeding(dofn, many(recordings["short"], 40))
    wait_until(lambda: len(HeldEngine.held) == most)
    while feeding.is_alive:
        wait_until(lambda: waiting() or not feeding.is_alive)
        assert len(waiting()) <= most
        assert number - (len(HeldEngine.held) - len(waiting())) <= most + 2 * threads
        for held in waiting()[:1]:
            held.reply()
    assert len(feeding.join()) == len(HeldEngine.held) == 40


def test_a_recording_longer_than_the_bound_passes(recordings, opened):
    dofn = opened(tasks=[transcript()], threads=1, slots=1, queue_audio_s=1.0)
    ((row, answers, _),) = reply_to_all(Feeding(dofn, [recordings["long"]]))
    assert row.terminal_state is TerminalState.OK
    assert [piece.end_s for piece in answers[0].segments] == [600, 1200, 1300]


def test_replies_to_segments_may_come_in_any_order(recordings, opened):
    found = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        HeldEngine.held.clear()
        dofn = opened(tasks=[transcript()], slots=4, queue_audio_s=1000.0)
        feeding = Feeding(dofn, [recordings["long"]])
        wait_until(lambda: len(HeldEngine.held) == 3)
        for number in order:
            HeldEngine.held[number].reply()
        found.append(timeless(feeding.join()))
    assert all(one == found[0] for one in found)
    assert len(found[0][0][1]) == 1


def test_an_engine_that_is_lost_ends_the_bundle_and_makes_no_dead_letter(recordings, opened):
    dofn = opened(threads=2)
    feeding = Feeding(dofn, many(recordings["short"], 3))
    wait_until(lambda: len(HeldEngine.held) == 3)
    HeldEngine.held[1].future.set_exception(EngineFailed("the GPU is gone"))
    with pytest.raises(EngineFailed, match="the GPU is gone"):
        feeding.join()
    assert feeding.results == []


def test_a_store_that_fails_ends_the_bundle(recordings, opened, monkeypatch):
    from af3pipe.storage import StorageError

    dofn = opened(engine="closed")

    def fails(_):
        raise StorageError("no access")
        yield

    monkeypatch.setattr(dofn._decoder, "parts_of", fails)
    with pytest.raises(StorageError, match="no access"):
        Feeding(dofn, [recordings["short"]]).join()


def test_a_bundle_that_failed_is_given_up_and_done_when_it_comes_again(recordings, opened):
    dofn = opened(threads=2, slots=4)
    feeding = Feeding(dofn, many(recordings["short"], 4))
    wait_until(lambda: len(HeldEngine.held) == 4)
    before = list(HeldEngine.held)
    before[0].future.set_exception(EngineFailed("the GPU is gone"))
    with pytest.raises(EngineFailed):
        feeding.join()
    HeldEngine.held.clear()
    dofn.start_bundle()
    assert all(held.future.cancelled() for held in before[1:])
    assert len(by_id(reply_to_all(Feeding(dofn, many(recordings["short"], 4))))) == 4
    assert len(HeldEngine.held) == 4


def test_nothing_is_left_of_a_bundle_that_was_not_finished(recordings, opened):
    dofn = opened(threads=2)
    given = results_in(dofn.process(recordings["short"]))
    dofn.start_bundle()
    assert given == results_in(dofn.finish_bundle()) == []


def test_the_last_of_a_bundle_whose_decoding_threads_wait_for_room_is_given_up(recordings, opened):
    """Else they would hold their segments, and the pool its threads, for ever."""
    dofn = opened(threads=1, slots=1)
    list(dofn.process(recordings["long"]))
    wait_until(lambda: not dofn._events.empty())
    dofn.start_bundle()
    assert len(reply_to_all(Feeding(dofn, [recordings["short"]]))) == 1


def test_what_is_verified_is_the_request_as_it_was(recordings, opened):
    ada, bob = two_of(recordings["short"])
    bob = bob._replace(questions=OWN[:1])
    dofn = opened(tasks=TASKS, engine="echo", verifiable=True)
    feeding = Feeding(dofn, [AudioObject(ada.uri, (ada, bob)), recordings["silent"]])
    assert len(feeding.join()) == 3
    (asked,) = [one.value.value for one in feeding.outputs if isinstance(one, TaggedOutput)]
    assert asked.recording == ada
    assert [task.question for task in asked.tasks] == [None, None, "Is it loud?", "Who speaks?"]
    assert [reply.text.partition(":")[0] for reply in asked.replies] == ["caption", "transcript", "answer", "answer"]


def test_what_cannot_be_asked_is_found_while_the_graph_is_built():
    with pytest.raises(ValueError, match="tasks is empty"):
        AnswerRecordings(model="demo")
    with pytest.raises(ValueError, match="asked twice"):
        AnswerRecordings(model="demo", tasks=[caption(), caption()])
