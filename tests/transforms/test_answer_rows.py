"""Rows of replies, and which of them an earlier run has: what is left to request of a segment, without an engine."""

import json
from concurrent.futures import Future

import numpy as np
import pytest

from af3pipe.audio.levels import measure
from af3pipe.models import EngineOptions, answer, caption, transcript
from af3pipe.models.engine import EngineInfo
from af3pipe.schemas import AudioInfo, Existing, Reason, Recording, Rejected, Reply, Segment, Stage
from af3pipe.transforms.answer import AnswerDoFn
from af3pipe.transforms.answer_rows import wanted_of
from af3pipe.transforms.ask import Asker
from af3pipe.transforms.result import covered_by

BASE = Recording("id", "s3://b/a.flac", 10, "etag", "2026-01-01T00:00:00Z")
RATE = 16_000


class PromptAsker(Asker):
    """Replies the prompts at once; fails for segments that begin at one of these seconds."""

    fails = ()

    @property
    def info(self):
        return EngineInfo(*self.model, "AudioFlamingo3", "l", "closed", "float32", "cpu")

    def submit(self, segment, tasks):
        self.requests.append([(task.name, task.question) for task in tasks])
        future = Future()
        if segment.segment_index in self.fails:
            future.set_exception(Rejected(Stage.GENERATE, Reason.OUT_OF_MEMORY, "full"))
        else:
            future.set_result([Reply(f"{task.prompt}", (1,), "stop", 1, 2) for task in tasks])
        return future


def asker(*tasks):
    found = PromptAsker(EngineOptions("demo", "closed"), tasks)
    found.setup()
    return found


class Decoded:
    """A decoder of segments that are there."""

    threads = 1

    def __init__(self, segments):
        self._segments = segments

    def setup(self):
        """Needs nothing."""

    def close(self):
        """Has nothing."""

    def parts_of(self, recordings):
        return ((0, segment) for segment in self._segments)

    def silent(self, segment):
        return None


class Asked:
    """What became of one recording: the requests, and its rows."""

    def __init__(self, asker, segments, fails=()):
        asker.fails, asker.requests = fails, []
        step = AnswerDoFn(Decoded(segments), asker)
        step.setup()
        step.start_bundle()
        (result,) = [one.value for one in (*step.process(segments[0].recording), *step.finish_bundle())]
        step.teardown()
        self.tasks = asker.requests
        self.row, self.answers, self.letters = result

    @property
    def covered(self):
        return tuple(map(covered_by, self.answers))

    @property
    def kept_keys(self):
        return set(self.row.answer_keys) - {row.answer_key for row in self.answers}


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
    return [found._replace(recording=found.recording._replace(existing=Existing(covered))) for found in segments]


def test_an_answer_that_is_there_is_kept_and_not_asked():
    first = Asked(asker(caption()), segments_of())
    second = Asked(asker(caption(), transcript()), resumed(segments_of(), first.covered))
    assert second.tasks == [[("transcript", None)]]
    assert second.kept_keys == {first.answers[0].answer_key}
    assert [row.task for row in second.answers] == ["transcript"]
    third = Asked(asker(transcript(), caption()), resumed(segments_of(), first.covered + second.covered))
    assert (third.tasks, third.answers, len(third.kept_keys)) == ([], (), 2)


@pytest.mark.parametrize(
    "other", [caption(prompt="What is this?"), caption(max_new_tokens=3)], ids=["prompt", "decoding"]
)
def test_an_answer_to_something_else_is_not_kept(other):
    first = Asked(asker(caption()), segments_of())
    second = Asked(asker(other), resumed(segments_of(), first.covered))
    assert (second.tasks, second.kept_keys) == ([[("caption", None)]], set())


@pytest.mark.parametrize("changed", [{"etag": "new"}, {"channel": "left"}, {"uri": "s3://b/c.flac"}])
def test_an_answer_about_something_else_is_not_kept(changed):
    first = Asked(asker(caption()), segments_of())
    second = Asked(asker(caption()), resumed(segments_of(BASE._replace(**changed)), first.covered))
    assert (len(second.answers), second.kept_keys) == (1, set())


def conversation():
    who = answer("Who?")
    return [who, answer("Why?", after=who), answer("Where?")]


def test_the_turn_before_a_follow_up_is_asked_again_but_not_written_again():
    who, why, where = conversation()
    first = Asked(asker(who, where), segments_of())
    second = Asked(asker(who, why, where), resumed(segments_of(), first.covered))
    assert second.tasks == [[("answer", "Who?"), ("answer", "Why?")]]
    assert [row.question for row in second.answers] == ["Why?"]
    assert second.kept_keys == {row.answer_key for row in first.answers}


def test_every_turn_before_a_follow_up_is_asked_again():
    who, why, where = conversation()
    sure = answer("Sure?", after=why)
    first = Asked(asker(who, why, where), segments_of())
    second = Asked(asker(who, why, sure, where), resumed(segments_of(), first.covered))
    assert second.tasks == [[("answer", "Who?"), ("answer", "Why?"), ("answer", "Sure?")]]
    assert [row.question for row in second.answers] == ["Sure?"]
    # A follow-up that is there needs nothing of what is before it.
    third = Asked(asker(who, why), resumed(segments_of(), first.covered[1:2]))
    assert third.tasks == [[("answer", "Who?")]]


def test_a_request_that_fails_is_a_dead_letter_of_what_was_missing_only():
    who, why, _ = conversation()
    first = Asked(asker(who), segments_of())
    second = Asked(asker(who, why), resumed(segments_of(), first.covered), fails={0})
    (letter,) = second.letters
    assert [task["question"] for task in json.loads(letter.input)["tasks"]] == ["Why?"]
    assert len(second.kept_keys) == 1


ENDS = (60.0, 120.0, 150.0)


def test_a_whole_transcript_is_kept_when_something_else_is_asked():
    first = Asked(asker(transcript()), segments_of(ends=ENDS, whole_s=150.0))
    second = Asked(asker(transcript(), caption()), resumed(segments_of(ends=ENDS, whole_s=150.0), first.covered))
    assert second.tasks == [[("caption", None)]] * 3
    assert second.kept_keys == {first.answers[0].answer_key}
    assert {row.task for row in second.answers} == {"caption"}


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize(
    "whole_s", [150.0, None, 30.0, 400.0], ids=["stated", "unknown", "understated", "overstated"]
)
def test_a_transcript_with_a_gap_is_asked_again_and_then_whole(missing, whole_s):
    segments = segments_of(ends=ENDS, whole_s=whole_s)
    first = Asked(asker(transcript()), segments, fails={missing})
    assert len(first.answers[0].segments) == 2
    second = Asked(asker(transcript()), resumed(segments, first.covered))
    assert second.tasks == [[("transcript", None)]] * 3
    assert (second.kept_keys, len(second.answers), len(second.answers[0].segments)) == (set(), 1, 3)
    third = Asked(asker(transcript()), resumed(segments, first.covered + second.covered))
    assert (third.tasks, third.kept_keys) == ([], {second.answers[0].answer_key})


def test_a_transcript_that_fails_at_the_same_place_again_is_not_written_again():
    segments = segments_of(ends=ENDS, whole_s=150.0)
    first = Asked(asker(transcript()), segments, fails={1})
    second = Asked(asker(transcript()), resumed(segments, first.covered), fails={1})
    assert (second.answers, second.kept_keys) == ((), {first.answers[0].answer_key})


def test_a_range_of_a_recording_keeps_its_transcript():
    recording = BASE._replace(offset_s=20.0, duration_s=100.0)
    segments = segments_of(recording, ends=(80.0, 120.0), whole_s=900.0, offset_s=20.0)
    segments[-1] = segments[-1]._replace(info=segments[-1].info._replace(duration_s=900.0))
    first = Asked(asker(transcript()), segments)
    second = Asked(asker(transcript(), caption()), resumed(segments, first.covered))
    assert second.tasks == [[("caption", None)]] * 2
    short = Asked(asker(transcript()), segments, fails={0})
    assert len(Asked(asker(transcript()), resumed(segments, short.covered)).answers) == 1


def test_another_cut_is_another_transcript():
    first = Asked(asker(transcript()), segments_of(ends=ENDS, whole_s=150.0))
    other = segments_of(ends=(58.0, 110.0, 150.0), whole_s=150.0, cut_at="silence:15.0")
    second = Asked(asker(transcript()), resumed(other, first.covered))
    assert (second.tasks, second.kept_keys) == ([[("transcript", None)]] * 3, set())
    # Even where both cut at the same places: each is whole in its own way only.
    same = segments_of(ends=ENDS, whole_s=150.0, cut_at="silence:15.0")
    assert Asked(asker(transcript()), resumed(same, first.covered)).kept_keys == set()


def test_what_fits_one_segment_is_the_same_work_however_long_ones_are_cut():
    first = Asked(asker(transcript()), segments_of())
    second = Asked(asker(transcript()), resumed(segments_of(cut_at="silence:15.0"), first.covered))
    assert (second.tasks, len(second.kept_keys)) == ([], 1)


def test_a_transcript_of_another_prompt_is_not_taken_for_whole():
    first = Asked(asker(transcript()), segments_of(ends=ENDS, whole_s=150.0))
    other = asker(transcript(prompt="Write down what is said."))
    assert Asked(other, resumed(segments_of(ends=ENDS, whole_s=150.0), first.covered)).kept_keys == set()


def test_another_model_s_answers_are_not_kept():
    first = Asked(asker(caption(), transcript()), segments_of())
    other = PromptAsker(EngineOptions("demo", "closed", quantize="int8"), [caption(), transcript()])
    assert len(Asked(other, resumed(segments_of(), first.covered)).answers) == 2


def test_what_is_wanted_is_all_where_there_is_nothing_yet():
    (segment,) = segments_of()
    tasks = asker(caption(), transcript()).tasks_of(BASE)
    assert wanted_of(segment, tasks, ("demo", "r")) == (tasks, {})
    assert wanted_of(segment, tasks, ("demo", "r")).new == tasks
