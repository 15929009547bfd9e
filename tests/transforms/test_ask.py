"""AskAudioFlamingo on the real engine: what is asked, what comes back, and who holds the model."""

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Future

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that

from af3pipe.audio.levels import measure
from af3pipe.models import (
    ENGINES,
    EngineFailed,
    EngineOptions,
    acquire_engine,
    answer,
    caption,
    engine,
    release_engine,
    resolve,
)
from af3pipe.schemas import AudioInfo, Question, Reason, Recording, Reply, Request, Segment, Stage
from af3pipe.transforms import AskAudioFlamingo
from af3pipe.transforms.answer_rows import make_answer
from af3pipe.transforms.ask import Asker, _AskDoFn, check_tasks, request_seed

OPTIONS = EngineOptions("demo", device="cpu")
NOISE = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)


def segment(name, samples=NOISE, **changes):
    recording = Recording(name, f"{name}.wav", 1, None, "now", **changes)
    info = AudioInfo(len(samples) / 16000, 16000, 1, "pcm_16", "soundfile")
    return Segment(recording, info, 0, 0.0, len(samples) / 16000, True, 16000, samples, measure(samples))


@pytest.fixture
def asker():
    found = Asker(OPTIONS, [caption(), answer("Is there speech?")])
    found.setup()
    yield found
    found.close()


def test_a_question_asked_by_the_job_and_by_the_manifest_is_asked_once(asker):
    questions = (
        Question(None, "Is there speech?"),
        Question(None, "How many beeps?"),
        Question("own", "How many beeps?"),
    )
    tasks = asker.tasks_of(Recording("id", "a.wav", questions=questions))
    assert [(task.name, task.question) for task in tasks] == [
        ("caption", None),
        ("answer", "Is there speech?"),
        ("answer", "How many beeps?"),
        ("answer", "How many beeps?"),  # under an id of its own it is another question
    ]


def test_a_manifest_s_conversation_goes_on_from_the_job_s_own_question():
    worded = answer("Who speaks?", prompt="Who speaks? One word.", think=True)
    asker = Asker(OPTIONS, [worded])
    asker.setup()
    first = Question(worded.question_id, "Who speaks?")
    second = Question("how", "How can you tell?", after=first.question_id)
    third = Question("sure", "Sure?", prompt="Sure? Yes or no.", after="how")
    tasks = asker.tasks_of(Recording("id", "a.wav", questions=(first, second, third)))
    asker.close()
    check_tasks(tasks)
    assert [task.question_id for task in tasks] == [worded.question_id, "how", "sure"]
    assert tasks[1].history == tasks[0].turns
    assert tasks[1].history[0].prompt.startswith("Who speaks? One word.")
    assert (tasks[2].prompt, tasks[2].history) == ("Sure? Yes or no.", tasks[1].turns)


def test_the_process_holds_one_engine_and_lets_it_go(asker):
    others = [Asker(OPTIONS, [caption()]) for _ in range(4)]
    threads = [threading.Thread(target=other.setup) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {id(other.engine()) for other in others} == {id(asker.engine())}
    held = asker.engine()
    for other in others:
        other.close()
    assert held.submit  # still open: asker holds it
    assert engine._shared[OPTIONS].engine is held
    asker.close()
    assert engine._shared[OPTIONS].engine is None
    with pytest.raises(EngineFailed):
        held.submit(Request(NOISE, (caption(),)))
    asker.setup()  # a worker may come back after its bundle processor was thrown away


def test_an_engine_is_loaded_anew_after_it_was_let_go():
    first = acquire_engine(OPTIONS)
    release_engine(OPTIONS)
    second = acquire_engine(OPTIONS)
    assert second is not first
    release_engine(OPTIONS)


def opened_in_turn(keep_engine, **changes):
    """The engine of each of two users, the second of whom comes when the first is gone."""
    for _ in range(2):
        asker = Asker(OPTIONS._replace(**changes), [caption()], keep_engine=keep_engine)
        asker.setup()
        yield asker.engine()
        asker.close()


def test_a_kept_engine_outlives_its_users():
    first, second = opened_in_turn(True, slots=2)
    assert first is second
    assert first.is_open
    first.close()  # as when its device fails: one that is lost is not kept
    third, fourth = opened_in_turn(True, slots=2)
    assert third is fourth is not first
    assert third.is_open
    first, second = opened_in_turn(False, slots=3)
    assert first is not second
    assert not second.is_open


def test_a_kept_engine_is_closed_when_its_process_ends():
    code = """
        from af3pipe.models import ENGINES, EngineOptions, acquire_engine
        from af3pipe.models.engine import keep_engine

        class Told:
            is_open = True

            def __init__(self, options):
                print("opened")

            def close(self):
                print("closed")

        ENGINES["told"] = "__main__:Told"
        options = EngineOptions("demo", "told")
        for _ in range(2):
            keep_engine(options)
            acquire_engine(options)
        print("the end")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert (done.stdout.splitlines(), done.returncode) == (["opened", "the end", "closed"], 0), done.stderr


def test_an_engine_that_is_lost_is_replaced_for_the_next_try():
    lost = acquire_engine(OPTIONS)
    lost.close()  # as when its device fails: its users have not let it go yet
    replaced = acquire_engine(OPTIONS)
    assert replaced is not lost
    assert replaced.submit(Request(NOISE, (resolve(caption(max_new_tokens=2), "AudioFlamingo3"),))).result()
    release_engine(OPTIONS)
    release_engine(OPTIONS)
    assert not replaced.is_open


def test_answers_and_dead_letters_of_one_pipeline():
    task = answer("Is there speech in the audio?", choices=("yes", "no"))

    def check_good(answers):
        found = {(row.recording_id, row.task) for row in answers}
        assert ("a", "caption") in found
        assert ("b", "caption") in found
        for row in answers:
            assert row.model_id == "demo"
            assert row.family == "AudioFlamingo3"
            assert row.dtype == "float32"
            assert row.audio_tokens == 25
            assert row.prompt_tokens > 25
            assert (row.start_s, row.end_s) == (0.0, 1.0)

    def check_bad(letters):
        found = {(row.recording_id, row.stage.value, row.reason.value) for row in letters}
        assert ("short", "window", "too_short") in found

    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        short = segment("short", NOISE[:100])
        answers = (
            pipeline
            | beam.Create([segment("a"), segment("b"), short])
            | AskAudioFlamingo(model="demo", tasks=[caption(max_new_tokens=8), task], device="cpu")
        )
        assert_that(answers.good, check_good, "good")
        assert_that(answers.dead_letters, check_bad, "bad")


def test_an_engine_that_is_lost_ends_the_bundle_instead_of_making_dead_letters(asker):
    dofn = _AskDoFn(asker)
    dofn.start_bundle()
    found = list(dofn.process(segment("a"), 0, None))
    assert found == []
    asker.engine().close()
    with pytest.raises(EngineFailed):
        list(dofn.process(segment("b"), 0, None)) + list(dofn.finish_bundle())
    dofn.start_bundle()


def test_setting_up_opens_no_engine_and_nothing_to_ask_none(monkeypatch):
    monkeypatch.setitem(ENGINES, "closed", "tests.closed_engine:ClosedEngine")
    asker = Asker(OPTIONS._replace(engine="closed"), [caption()])
    asker.setup()
    assert asker.model[0] == "demo"
    assert asker.submit(segment("a"), ()).result() == []
    assert asker.replies(segment("a"), (), asker.submit(segment("a"), ())) == []
    asker.count()
    asker.close()


def test_a_reply_too_few_is_the_engines_fault(asker):
    tasks = asker.tasks_of(segment("a").recording)
    short: Future = Future()
    short.set_result([Reply("x", (1,), "stop", 1, 2)])
    with pytest.raises(EngineFailed, match="1 replies to 2 tasks"):
        asker.replies(segment("a"), tasks, short)


def test_a_reply_that_is_not_what_the_task_allows_is_a_dead_letter(asker):
    task = resolve(answer("Which?", ("cat", "dog")), "AudioFlamingo3")
    good, bad = (asker.answer(segment("a"), task, Reply(text, (1,), "stop", 1, 2)) for text in ("cat", "a bird"))
    assert (good.choice, good.recording_id) == ("cat", "a")
    assert (bad.stage, bad.reason) == (Stage.PARSE, Reason.OUTPUT_INVALID)
    assert '"Which?"' in bad.input


def test_what_may_be_pending_follows_the_engine_once_it_is_open():
    asker = Asker(OPTIONS._replace(slots=4, queue_audio_s=100.0), [caption()])
    asker.setup()
    assert asker.most_pending == (3, 200.0)
    asker.engine()
    assert asker.most_pending == (12, 200.0)
    asker.close()


def test_a_follow_up_needs_what_it_follows_before_it():
    who, where = answer("Who?", think=True), answer("Where?")
    why, why_there = answer("Why?", after=who), answer("Why?", after=where)
    sure = answer("Sure?", after=why)
    check_tasks([who, where, why, why_there, sure])
    resolved = [resolve(task, "AudioFlamingo3") for task in (who, why, sure)]
    check_tasks(resolved)
    for tasks in ([why], [why, who], [who, sure], [answer("Who?"), why]):
        with pytest.raises(ValueError, match="which is not asked before it"):
            check_tasks(tasks)
    with pytest.raises(ValueError, match=r"question 'Why\?' is asked twice"):
        check_tasks([who, where, why, answer("Why?", question_id=why.question_id, after=where)])


def test_the_row_of_a_follow_up_tells_what_was_asked_before():
    who = answer("Who?", think=True)
    tasks = [resolve(task, "AudioFlamingo3") for task in (who, answer("Why?", after=who))]
    info = engine.EngineInfo("m", "r", "AudioFlamingo3", "l", "transformers", "float32", "cpu")
    first, second = (make_answer(segment("a"), task, Reply("x", (1,), "stop", 1, 2), info) for task in tasks)
    assert (first.history, second.history) == ((), (first.prompt,))
    assert first.prompt.endswith("before you respond.")
    assert second.prompt == "Why?"
    assert first.answer_key != second.answer_key


def test_a_seed_is_the_audios_own_on_every_run_whatever_it_is_called():
    first = segment("a")
    assert request_seed(first) == request_seed(segment("a")) == 4290071324
    assert request_seed(first._replace(recording=first.recording._replace(recording_id="7"))) == 4290071324
    others = [segment("b"), first._replace(start_s=30.0)]
    assert len({request_seed(found) for found in [first, *others]}) == 3
    assert all(0 <= request_seed(found) < 2**32 for found in others)


def test_a_request_carries_its_seed(asker, monkeypatch):
    asked = []
    submit = asker.engine().submit
    monkeypatch.setattr(asker.engine(), "submit", lambda request: asked.append(request) or submit(request))
    asker.submit(segment("a"), asker.tasks_of(segment("a").recording)).result()
    assert [request.seed for request in asked] == [request_seed(segment("a"))]


def test_a_recordings_own_questions_think_where_the_job_does():
    thinking = Asker(OPTIONS, [caption()], question_think=True)
    thinking.setup()
    tasks = thinking.tasks_of(Recording("id", "a.wav", questions=(Question("q", "Who?"),)))
    thinking.close()
    assert [task.prompt.endswith("before you respond.") for task in tasks] == [False, True]
