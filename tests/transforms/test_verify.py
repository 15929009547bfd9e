"""Requests asked again: what counts as equal, what is told of a difference, and what cannot be asked again."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import resources

import pytest
from apache_beam.coders import registry
from apache_beam.pvalue import TaggedOutput
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.models import EngineFailed, answer, caption, transcript
from af3pipe.pipelines.report import RunReport
from af3pipe.schemas import Question, Recording, Reply
from af3pipe.tables.reconcile import RunCounts
from af3pipe.transforms import AskAudioFlamingo, DecodeAudio, VerifyAnswers
from af3pipe.transforms.answer import AnswerDoFn
from af3pipe.transforms.ask import AskedRequest
from af3pipe.transforms.coders import RowTupleCoder
from af3pipe.transforms.verify import Mismatch, NotAsked, Verified, VerifyDoFn, compare, total
from tests.rows import rows

SAID = Reply("A siren wailing up and down.", (5, 6, 7, 2), "stop", 25, 40)
TASKS = [caption(), answer("How many?", question_id="count")]
CLIPS = resources.files("af3pipe.demo") / "clips"


def asked(*replies, segment_index=3):
    return AskedRequest(Recording("id", "a.wav"), segment_index, 0, (), replies)


def test_the_same_replies_are_no_mismatch():
    assert compare(asked(SAID, SAID), TASKS, [SAID, SAID]) == ()


def test_a_mismatch_names_the_task_the_token_and_both_texts():
    other = SAID._replace(text="A siren wailing down.", tokens=(5, 6, 9, 2))
    (found,) = compare(asked(SAID, SAID), TASKS, [SAID, other])
    assert found == Mismatch(
        "id", "a.wav", 3, "answer", "count", ("text", "tokens"), 2, "A siren wailing up and down.", other.text
    )


def test_a_reply_that_ends_earlier_differs_where_it_ends():
    (found,) = compare(asked(SAID), TASKS[:1], [SAID._replace(tokens=(5, 6), finish_reason="length")])
    assert (found.first_token, found.fields) == (2, ("tokens", "finish_reason"))


def test_the_same_tokens_with_another_text_are_a_mismatch():
    (found,) = compare(asked(SAID), TASKS[:1], [SAID._replace(text="A siren.")])
    assert (found.first_token, found.fields) == (None, ("text",))
    assert "from text on: 'A siren wailing up" in Verified(1, 1, 1, 0, 1, mismatches=(found,)).problem


def test_long_texts_are_shown_where_they_differ():
    same = "la " * 300
    (found,) = compare(asked(SAID._replace(text=f"{same}cat {same}")), TASKS[:1], [SAID._replace(text=f"{same}dog")])
    assert "cat" in found.text
    assert found.alone.endswith("dog")
    assert found.text[:20] == found.alone[:20]
    assert len(found.text) < 140


def test_a_reply_too_few_is_the_engines_fault():
    with pytest.raises(EngineFailed, match="1 replies to 2 tasks, and 2 when they were repeated"):
        compare(asked(SAID), TASKS, [SAID, SAID])


def mismatch(segment_index):
    return Mismatch("id", "a.wav", segment_index, "caption", None, ("tokens",), 0, "a", "b")


def test_totals_add_up_whatever_the_order():
    parts = [
        Verified(1, 1, 2, 1, 1, ("float32",), (mismatch(number),), (NotAsked("id", "a.wav", number, "gone"),))
        for number in range(12)
    ]
    whole = total(parts)
    assert whole[:5] == (12, 12, 24, 12, 12)
    assert whole.dtypes == ("float32",)
    assert [found.segment_index for found in whole.mismatches] == list(range(10))
    assert total([total(parts[7:]), total(parts[:7])]) == whole
    assert total([]) == Verified()
    assert Verified.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


def test_only_float32_must_be_equal():
    told = {"mismatches": (mismatch(0),)}
    assert Verified(1, 1, 2, 1, wrong=0, dtypes=("bfloat16",), **told).problem is None
    problem = Verified(1, 1, 2, 1, wrong=1, dtypes=("float32",), **told).problem
    assert problem.startswith("1 of 2 replies differ from those of plain generate; for example a.wav (segment 0,")


def test_a_sample_of_which_nothing_could_be_asked_again_verifies_nothing():
    gone = (NotAsked("id", "a.wav", 0, "not_found: no such file"),)
    problem = Verified(2, not_asked=gone).problem
    assert "none of 2 sampled requests could be repeated, for example a.wav: not_found" in problem
    assert Verified(2, 1, 1, 1, not_asked=gone).problem is None
    assert Verified().problem is None  # a run in which nothing was answered


def test_a_sample_of_nothing_is_told_where_there_are_answers():
    """As where a runner begins a job again when all is asked."""
    counts = RunCounts(1, {"ok": 1}, {"captions": 3, "answers": 0}, {}, 0, 1.0, ())
    assert RunReport("run", counts, 1.0, {}, Verified(1, 1, 3, 3)).unverified is None
    assert RunReport("run", counts, 1.0, {}).unverified is None
    assert RunReport("run", counts._replace(answers={"captions": 0}), 1.0, {}, Verified()).unverified is None
    assert "no request was sampled" in RunReport("run", counts, 1.0, {}, Verified()).unverified
    assert (
        "none of 2" in RunReport("run", counts, 1.0, {}, Verified(2, not_asked=(NotAsked("", "", 0, ""),))).unverified
    )


@given(data=st.data())
def test_a_request_crosses_processes_without_its_audio(data):
    row = data.draw(rows(AskedRequest))
    coder = registry.get_coder(AskedRequest)
    assert isinstance(coder, RowTupleCoder)
    assert coder.decode(coder.encode(row)) == row


def test_a_sample_of_nothing_is_found_while_the_graph_is_built():
    ask = AskAudioFlamingo(model="demo", tasks=[caption()])
    with pytest.raises(ValueError, match="sample is 0; it must be at least 1"):
        VerifyAnswers(DecodeAudio(), ask, sample=0)


@pytest.fixture(scope="module")
def dofn():
    with opened() as found:
        yield found


@contextmanager
def opened():
    ask = AskAudioFlamingo(
        model="demo", device="cpu", tasks=[caption(max_new_tokens=8), transcript(max_new_tokens=8)]
    )
    found = VerifyDoFn(DecodeAudio(model="demo").decoder, ask.asker)
    found.setup()
    yield found
    found.teardown()


@pytest.fixture
def recording(tmp_path):
    shutil.copy(str(CLIPS / "siren.flac"), tmp_path / "a.flac")
    return Recording("id", str(tmp_path / "a.flac"), questions=(Question(None, "Is there speech?"),))


def answered(dofn, recording):
    """The recording's requests as a run leaves them."""
    step = AnswerDoFn(dofn._decoder, dofn._asker, verifiable=True)
    step._pool = ThreadPoolExecutor(1)
    step.start_bundle()
    outputs = [*step.process(recording), *step.finish_bundle()]
    step._pool.shutdown()
    return [one.value.value for one in outputs if isinstance(one, TaggedOutput)]


def test_a_request_is_asked_again_with_the_recordings_own_question(dofn, recording):
    assert total(dofn.process(answered(dofn, recording))) == Verified(1, 1, 3, 3, 0, ("float32",))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.unlink(), "not_found: "),
        (lambda path: path.write_text("no audio"), "unsupported_format: "),
        (lambda path: shutil.copy(str(CLIPS / "ticking.flac"), path), "its audio differs from that of the run"),
    ],
    ids=["gone", "broken", "replaced"],
)
def test_what_cannot_be_asked_again_is_counted_with_its_reason(dofn, recording, tmp_path, change, says):
    requests = answered(dofn, recording)
    change(tmp_path / "a.flac")
    found = total(dofn.process(requests))
    assert found[:5] == (1, 0, 0, 0, 0)
    assert found.not_asked[0].detail.startswith(says)


def test_a_segment_that_is_no_longer_there_is_counted(dofn, recording):
    (request,) = answered(dofn, recording)
    found = total(dofn.process([request, request._replace(segment_index=7)]))
    assert found[:4] == (2, 1, 3, 3)
    assert "no longer has this segment" in found.not_asked[0].detail


def test_a_lost_engine_ends_the_bundle(recording):
    with opened() as dofn:
        requests = answered(dofn, recording)
        dofn._asker.engine().close()
        with pytest.raises(EngineFailed):
            list(dofn.process(requests))
