"""What there is to do about an object: given what inputs name of it, and what earlier runs wrote about it."""

import apache_beam as beam
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.models import ENGINES, EngineOptions, answer, caption, resolve, transcript
from af3pipe.pipelines.plan import Plan
from af3pipe.schemas import (
    Decoding,
    Existing,
    Reason,
    Recording,
    Rejected,
    Stage,
    Turn,
    answer_key,
    source_key,
    stitched_key,
    work_key,
)
from af3pipe.storage import ObjectInfo
from af3pipe.tables.existing import ExistingRows, existing_rows
from af3pipe.transforms import DecodeAudio, Outcome
from af3pipe.transforms.ask import Asker
from af3pipe.transforms.outcome import to_dead_letter
from af3pipe.transforms.plan import PlanObjects, WorkKeys, plan_object, stat_object
from benchmarks import constant_engine
from tests import fixtures_audio as make
from tests.collected import Collected
from tests.plain_runs import PlainRuns
from tests.rows import rows

BASE = Recording("id", "s3://b/a.flac", 10, "etag", "2026-01-01T00:00:00+00:00")
TASK = resolve(answer("Is there speech?", ("yes", "no")), "AudioFlamingo3")
STATED = ObjectInfo(BASE.uri, 10, "etag", BASE.mtime)
BARE = BASE._replace(size_bytes=None, etag=None, mtime=None)
NOTHING = ExistingRows()


def asker_of(*tasks):
    found = Asker(EngineOptions("demo", "closed"), tasks)
    found.setup()
    return found


def keys_of(*tasks, **policy):
    return WorkKeys(DecodeAudio(model="demo", **policy).decoder, asker_of(*tasks))


KEYS = keys_of(caption())


def letter_of(recording, reason=Reason.UNSUPPORTED_FORMAT, stage=Stage.LIST):
    return to_dead_letter(Rejected(stage, reason, "no"), recording, stage=stage)


# --- plan_object


def test_each_recording_has_what_the_store_states_and_the_key_of_its_work():
    part = BARE._replace(recording_id="part", offset_s=1.0)
    work, found, skipped, _ = plan_object(BASE.uri, [BARE, part], [], STATED, NOTHING, KEYS)
    assert work.recordings == (
        KEYS.add(BASE),
        KEYS.add(part._replace(**{name: getattr(STATED, name) for name in ("size_bytes", "etag", "mtime")})),
    )
    assert (found, skipped, work.dead_letters, work.copies) == (("id", "part"), (), (), ())
    without_keys = plan_object(BASE.uri, [BARE], [], STATED, NOTHING)
    assert without_keys.work.recordings == (BASE,)


def test_an_object_that_is_not_there_is_a_dead_letter_of_each_recording():
    gone = Rejected(Stage.READ, Reason.NOT_FOUND, "gone")
    work, found, _, _ = plan_object(BASE.uri, [BARE, BARE._replace(recording_id="2")], [], gone, NOTHING, KEYS)
    assert (work.recordings, found) == ((), ("id", "2"))
    assert [(one.recording_id, one.stage, one.reason) for one in work.dead_letters] == [
        ("id", Stage.READ, Reason.NOT_FOUND),
        ("2", Stage.READ, Reason.NOT_FOUND),
    ]


def test_a_row_that_was_rejected_goes_with_its_recording_and_changes_its_work():
    letter = letter_of(BASE)
    work, found, _, _ = plan_object(BASE.uri, [BARE], [letter, letter], STATED, NOTHING, KEYS)
    assert (len(work.dead_letters), found) == (1, ("id",))
    assert work.recordings == (KEYS.add(BASE, [letter]),)
    assert KEYS.add(BASE, [letter]).work_key != KEYS.add(BASE).work_key
    # Which run wrote it first is no difference.
    assert KEYS.add(BASE, [letter._replace(run_id="run 1", created_at=0)]) == KEYS.add(BASE, [letter])


def test_what_was_only_rejected_has_no_recording():
    letters = [letter_of(BASE), letter_of(BASE._replace(recording_id="2"))]
    work, found, skipped, _ = plan_object(BASE.uri, [], letters, None, NOTHING, KEYS)
    assert (work.recordings, len(work.dead_letters), found, skipped) == ((), 2, ("id", "2"), ())


def test_the_store_is_asked_only_where_no_mention_states_the_object(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"12345")
    bare = Recording("1", str(path))
    assert stat_object([bare]).size_bytes == 5
    listed = bare._replace(size_bytes=7, mtime="then")
    assert stat_object([bare, listed])[1:4] == (7, None, "then")
    path.unlink()
    assert stat_object([bare]).reason is Reason.NOT_FOUND


# --- keys


def test_ids_and_metadata_are_no_work():
    keys = keys_of(caption())
    same = keys.add(
        BASE._replace(recording_id="other", metadata='{"speaker": 7}', existing=Existing((), (("l", "r"),)))
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


# --- keys of answers and of all work

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


# --- plans of many objects: on disk, by a runner, and one after the other


@pytest.fixture
def echo_engine(monkeypatch):
    monkeypatch.setitem(ENGINES, "echo", "tests.echo_engine:EchoEngine")
    monkeypatch.setattr(constant_engine, "window_s", 0.0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2):
        (folder / f"{number}.wav").write_bytes(make.wav(make.sound(0.5 + number / 4, 8000), 8000))
    (folder / "broken.wav").write_bytes(b"fLaC" + bytes(2000))
    return [*(str(path) for path in sorted(folder.iterdir())), str(folder / "gone.wav")]


@st.composite
def mentions(draw, uris):
    uri = draw(st.sampled_from(uris))
    own_id = draw(st.sampled_from([source_key(uri), "1", "2", "d/\x00'\u2028é"]))
    metadata = draw(st.sampled_from(["{}", '{"speaker": "Ada"}', '{"speaker": "Bob"}']))
    found = Recording(own_id, uri, metadata=metadata)
    return letter_of(found) if draw(st.integers(0, 4)) == 0 else found


def timeless(objects):
    """Objects as they are, but for when their rows were made and the order of what is in them."""
    return sorted(
        (
            one.uri,
            sorted(one.recordings, key=repr),
            sorted((letter._replace(created_at=0) for letter in one.dead_letters), key=repr),
            sorted((copy._replace(created_at=0) for copy in one.copies), key=repr),
        )
        for one in objects
    )


def planned_on_disk(found, output, keys, chunk=2):
    with Plan() as plan:
        half = len(found) // 2
        for part in (found[:half], found[half:]):
            plan.add_found(part)
        plan.add_existing(output)
        assert list(plan.make(keys)) == []
        chunks = list(plan.chunks(chunk))
        assert plan.found == plan.skipped + plan.to_do
        assert all(sum(map(number_of, one)) >= chunk for one in chunks[:-1])
        return [one for each in chunks for one in each], (plan.found, plan.skipped)


def number_of(found):
    return len({one.recording_id for one in (*found.recordings, *found.dead_letters)})


def planned_by_runner(found, output, decoder, asker):
    collected = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        good = [one for one in found if isinstance(one, Recording)]
        letters = [one for one in found if not isinstance(one, Recording)]
        listed = Outcome(
            pipeline | "Good" >> beam.Create(good, reshuffle=False).with_output_types(Recording),
            pipeline | "Bad" >> beam.Create(letters, reshuffle=False),
        )
        existing = pipeline | "Existing" >> beam.Create(list(existing_rows(output)), reshuffle=False)
        planned = listed | PlanObjects(existing=existing, decoder=decoder, asker=asker, storage_options={})
        for name, items in planned._asdict().items():
            _ = items | name >> collected.into(name)
    return collected["objects"], (len(collected["found"]), len(collected["skipped"]))


def check_plans(clips, tmp_path_factory, data, *, by_runner=False):
    output = str(tmp_path_factory.mktemp("out"))
    runs = PlainRuns(output, "echo", [caption()])
    lists = st.lists(mentions(clips), min_size=1, max_size=8)
    runs.run(data.draw(lists))
    found = data.draw(lists)
    keys = WorkKeys(runs._decoder, runs._asker)
    one_by_one = runs._plan(found, retry=False)
    objects = [one.work for one in one_by_one if one.work is not None]
    numbers = sum(len(one.found) for one in one_by_one), sum(len(one.skipped) for one in one_by_one)
    others = [planned_on_disk(found, output, keys), planned_on_disk(found[::-1], output, keys)]
    if by_runner:
        others.append(planned_by_runner(found, output, runs._decoder, runs._asker))
    for other, other_numbers in others:
        assert timeless(other) == timeless(objects)
        assert other_numbers == numbers


@pytest.mark.parametrize("examples", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_plan_on_disk_is_that_of_each_object_whatever_the_order(echo_engine, clips, tmp_path_factory, examples):
    def check(data):
        check_plans(clips, tmp_path_factory, data)

    settings(max_examples=examples)(given(data=st.data())(check))()


@pytest.mark.slow
def test_a_runner_plans_what_a_plan_on_disk_does(echo_engine, clips, tmp_path_factory):
    def check_all(data):
        check_plans(clips, tmp_path_factory, data, by_runner=True)

    settings(max_examples=10)(given(data=st.data())(check_all))()


def test_what_is_done_is_skipped_by_a_runner_and_all_of_it_is_found(echo_engine, clips, tmp_path):
    runs = PlainRuns(tmp_path, "echo", [caption()])
    one, ada = Recording("1", clips[0]), Recording(source_key(clips[1]), clips[1], metadata='{"speaker": "Ada"}')
    runs.run([one, ada])
    found = [one, ada, Recording("new", clips[1])]
    objects, numbers = planned_by_runner(found, str(tmp_path), runs._decoder, runs._asker)
    assert numbers == (3, 2)
    ((new,),) = [one.recordings for one in objects]
    assert new.recording_id == "new"
    assert [copy.recording_id for copy in objects[0].copies] == ["new"]
