import pytest
import yaml

from af3pipe.models import resolve
from af3pipe.pipelines.beam_flags import beam_options, split_beam_flags
from af3pipe.pipelines.job import JobError, make_job
from af3pipe.pipelines.job_file import load_job_values, load_yaml
from af3pipe.schemas import Decoding

BASE = {"inputs": ["a.wav"], "output": "out"}


def problem(**changes):
    with pytest.raises(JobError) as error:
        make_job(BASE | changes, "job.yaml")
    return str(error.value)


def test_defaults_are_the_released_model_and_a_caption():
    job = make_job(BASE)
    assert job.model == "nvidia/audio-flamingo-3-hf"
    assert [task.name for task in job.all_tasks()] == ["caption"]
    assert not any(task.decoding.do_sample for task in job.all_tasks())


def test_one_input_may_stand_without_a_list():
    assert make_job(BASE | {"inputs": "a.wav"}).inputs == ("a.wav",)


def test_tasks_questions_and_own_prompts():
    job = make_job(
        BASE
        | {
            "tasks": ["caption", {"name": "mood", "prompt": "What mood?", "max_new_tokens": 9}],
            "questions": ["Who speaks?", {"question": "Which?", "choices": ["cat", "dog"], "id": "pet"}],
        }
    )
    caption, mood, who, pet = job.all_tasks()
    assert (caption.name, mood.name, mood.prompt, mood.decoding.max_new_tokens) == (
        "caption",
        "mood",
        "What mood?",
        9,
    )
    assert (who.question, pet.question_id, pet.choices) == ("Who speaks?", "pet", ("cat", "dog"))
    assert who.question_id != pet.question_id


def test_a_limit_for_all_tasks():
    job = make_job(BASE | {"tasks": ["caption", "transcript"], "max_new_tokens": 7})
    assert [task.decoding.max_new_tokens for task in job.all_tasks()] == [7, 7]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"partition_by": ["date", "uri"]}, ["partition_by names 'uri'", "a column of the tables"]),
        ({"over_length": "cut"}, ["over_length is 'cut'", "'dead-letter', 'truncate' or 'split'"]),
        ({"split_at": "pause"}, ["split_at is 'pause'", "'cap' or 'silence'"]),
        ({"split_at": "silence"}, ["split_at is 'silence'", "'dead-letter'", "set over_length to 'split'"]),
        (
            {"over_length": "split", "split_tolerance_s": 5},
            ["split_tolerance_s is 5, but split_at is 'cap'", "set split_at to 'silence'"],
        ),
        ({"split_tolerance_s": 0}, ["split_tolerance_s is 0", "greater than 0"]),
        ({"on_silent": "drop"}, ["on_silent is 'drop'", "'flag' or 'dead-letter'"]),
        ({"silent_below": 60}, ["silent_below is 60", "less than 0"]),
        ({"silent_below": -200}, ["silent_below is -200", "greater than or equal to -120"]),
        ({"channel": "middle"}, ["channel is 'middle'; it must be mix, left, right, or a number from 0"]),
        ({"stream": "first"}, ["stream is 'first'; it must be a number from 0"]),
        ({"ouput": "x"}, ["ouput is not a key of a job", "did you mean 'output'"]),
        ({"inputs": []}, ["inputs is missing; name a file"]),
        ({"slots": 0}, ["slots is 0", "greater than 0"]),
        ({"verify_sample": -1}, ["verify_sample is -1", "greater than or equal to 0"]),
        ({"tasks": ["captoin"]}, ["task 'captoin' is not known", "caption, transcript", "prompt"]),
        ({"tasks": [{"name": "caption", "promt": "x"}]}, ["tasks.0.promt", "did you mean 'prompt'"]),
        ({"tasks": ["caption", "caption"]}, ["task 'caption' is asked twice"]),
        ({"questions": ["Who?", "Who?"]}, ["question 'Who?' is asked twice"]),
        ({"questions": [{"question": "Who?", "choices": ["cat", "cat"]}]}, ["choices"]),
        ({"fail_on_dead_letters": 0.05}, ["fail_on_dead_letters is '0.05'"]),
        ({"tasks": 5}, ["tasks"]),
        ({"engine": "magic"}, ["engine is 'magic'", "transformers"]),
        ({"quantize": "int3"}, ["quantize is 'int3'", "'none', 'int8' or 'fp8'"]),
        ({"adapter": ""}, ["adapter is ''"]),
        ({"cuda_graphs": "often"}, ["cuda_graphs is 'often'"]),
        ({"questions": [{"question": "Q?", "constrained": True}]}, ["constrained needs choices"]),
        ({"questions": [{"question": "Q?", "json_schema": "{"}]}, ["json_schema is not JSON"]),
        (
            {"questions": [{"question": "Q?", "choices": ["a", "b"], "constrained": True, "json_schema": {}}]},
            ["either choices or a json_schema"],
        ),
        (
            {"questions": [{"question": "Q?", "choices": ["a", "b"], "constrained": True}], "think": True},
            ["no room to think"],
        ),
        (
            {"questions": [{"question": "Q?", "then": [{"question": "R?", "chioces": []}]}]},
            ["did you mean 'choices'"],
        ),
        ({"questions": [{"question": "Q?", "then": ["R?", "R?"]}]}, ["question 'R?' is asked twice"]),
        ({"tasks": [{"name": "caption", "json_schema": {}}]}, ["task 'caption' has no json_schema"]),
        ({"tasks": [{"name": "caption", "seed": -1}]}, ["tasks.0", "seed is -1"]),
        ({"tasks": [{"name": "caption", "stop": ""}]}, ["stop"]),
        (
            {"tasks": [{"name": "caption", "min_new_tokens": 9, "max_new_tokens": 8}]},
            ["min_new_tokens is 9", "max_new_tokens 8"],
        ),
        ({"dtype": "int3"}, ["dtype is 'int3'", "'float32'"]),
        ({"fail_on_dead_letters": "many"}, ["fail_on_dead_letters is 'many'"]),
        ({"storage_options": {"archive": {}}}, ["storage_options: 'archive' is no URL; name a store, a bucket"]),
        ({"storage_options": {"s3://a/": "x"}}, ["storage_options.s3://a/ is 'x': input should be a valid dict"]),
    ],
    ids=lambda found: next(iter(found)) if isinstance(found, dict) else "",
)
def test_a_wrong_key_is_named_with_its_value_and_what_is_allowed(changes, says):
    message = problem(**changes)
    assert message.startswith("job.yaml: ")
    for part in says:
        assert part in message


def test_missing_output_is_named():
    with pytest.raises(JobError, match="output is missing"):
        make_job({"inputs": ["a.wav"]})


def test_all_problems_are_told_at_once():
    assert len(problem(over_length="cut", slots=0).splitlines()) == 2


@pytest.mark.parametrize(("limit", "recordings", "allowed"), [("0", 9, 0), (3, 9, 3), ("5%", 200, 10)])
def test_dead_letters_allowed(limit, recordings, allowed):
    assert make_job(BASE | {"fail_on_dead_letters": limit}).dead_letters_allowed(recordings) == allowed


def test_any_number_of_dead_letters_is_allowed_unless_said():
    assert make_job(BASE).dead_letters_allowed(1) == float("inf")


def test_channel_and_stream_may_be_written_as_numbers():
    job = make_job(BASE | {"channel": 1, "stream": "2"})
    assert (job.channel, job.stream) == ("1", 2)


def test_job_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("inputs: archive/\noutput: out\nbeam: {runner: FlinkRunner}\n")
    assert make_job(load_job_values(str(path))).beam == {"runner": "FlinkRunner"}


@pytest.mark.parametrize(("text", "says"), [("- a\n", "keys and values"), ("a: [", "is not YAML")])
def test_job_file_that_is_none(tmp_path, text, says):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(JobError, match=says):
        load_job_values(str(path))
    path.write_bytes(b"inputs: caf\xe9.wav")
    with pytest.raises(JobError, match="is not UTF-8"):
        load_job_values(str(path))
    with pytest.raises(JobError, match="cannot be read"):
        load_job_values(str(tmp_path / "none.yaml"))


def keys_twice(depth, style):
    """YAML in which the innermost of nested mappings has a key twice; the line of the second."""
    if style == "flow":
        return "inputs: [a.wav]\n" + "x: " + "{y: " * depth + "{model: a, model: b}" + "}" * depth + "\n", 2
    lines = ["inputs: [a.wav]", *("  " * level + f"k{level}:" for level in range(depth))]
    indent = "  " * depth
    if style == "list":
        lines += [f"{indent}tasks:", f"{indent}- model: a", f"{indent}  'model': b"]
    else:
        lines += [f"{indent}model: a", f"{indent}output: out", f'{indent}"model": b']
    return "\n".join(lines) + "\n", len(lines)


@pytest.mark.parametrize("style", ["block", "list", "flow"])
@pytest.mark.parametrize("depth", range(4))
def test_a_key_given_twice_is_an_error_that_names_key_and_line(tmp_path, depth, style):
    text, line = keys_twice(depth, style)
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(JobError, match=rf"job.yaml: line {line}: the key 'model' is given twice, first in line \d"):
        load_job_values(str(tmp_path / "job.yaml"))


def test_a_key_may_replace_one_that_is_merged_in(tmp_path):
    """Also where what is merged in merges something in itself, whatever is read first."""
    text = "base: &b {x: 1, z: 1}\nmiddle: &m {<<: *b, x: 2}\ntop: {<<: *m, x: 3}\nsame: [{x: 1}, {x: 1}]\n"
    (tmp_path / "job.yaml").write_text(text)
    assert load_job_values(str(tmp_path / "job.yaml")) == yaml.safe_load(text)


def test_a_question_has_each_key_once_on_the_command_line_too():
    with pytest.raises(yaml.YAMLError, match="line 1: the key 'id' is given twice"):
        load_yaml("[{question: Who, id: a, id: b}]")


def runner(job, *flags):
    return beam_options(job, flags).get_all_options()["runner"]


def test_the_in_process_runner_is_the_default_and_flags_win_over_the_file():
    assert runner(make_job(BASE)) == "FnApiRunner"
    flink = make_job(BASE | {"beam": {"runner": "FlinkRunner", "experiments": ["a", "b"]}})
    assert runner(flink) == "FlinkRunner"
    assert runner(flink, "--runner=PrismRunner") == "PrismRunner"
    assert beam_options(flink).get_all_options()["experiments"] == ["a", "b"]


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_that_lose_elements_are_refused(workers):
    with pytest.raises(JobError, match="multi_processing"):
        beam_options(make_job(BASE), ["--direct_running_mode=multi_threading", f"--direct_num_workers={workers}"])


def test_a_misspelt_key_for_beam_does_not_run_the_job_here():
    with pytest.raises(JobError, match=r"beam.runer .*did you mean --runner"):
        beam_options(make_job(BASE | {"beam": {"runer": "FlinkRunner"}}))


def test_empty_lists_in_yaml_are_empty():
    job = make_job(BASE | {"tasks": None, "questions": None})
    assert [task.name for task in job.all_tasks()] == ["caption"]


def test_a_task_keeps_its_own_limit_under_the_jobs():
    job = make_job(BASE | {"tasks": ["caption", {"name": "transcript", "max_new_tokens": 90}], "max_new_tokens": 7})
    assert [task.decoding.max_new_tokens for task in job.all_tasks()] == [7, 90]


@pytest.mark.parametrize(
    "flags",
    [
        ["--runner", "FlinkRunner"],
        ["--runner=FlinkRunner", "--direct_num_workers", "2"],
        ["--save_main_session"],
        ["--experiments=a", "--experiments", "b"],
    ],
    ids=" ".join,
)
def test_options_of_beam_are_told_from_inputs(flags):
    assert split_beam_flags(["a.wav", *flags, "b c.wav"]) == (["a.wav", "b c.wav"], flags)


def test_a_misspelt_option_is_not_taken_for_an_input():
    with pytest.raises(JobError, match=r"--runer .*did you mean --runner"):
        split_beam_flags(["a.wav", "--runer", "FlinkRunner"])
    with pytest.raises(JobError, match=r"--tasks .*did you mean --task"):
        split_beam_flags(["a.wav", "--tasks", "caption"])
    with pytest.raises(JobError, match="-o is neither"):
        split_beam_flags(["a.wav", "-o", "out"])
    with pytest.raises(JobError, match="expected one argument"):
        split_beam_flags(["a.wav", "--runner"])


def test_questions_that_follow_up():
    job = make_job(
        BASE
        | {
            "questions": [
                {
                    "question": "Who speaks?",
                    "think": True,
                    "then": ["How old?", {"question": "Where?", "then": "Why there?", "max_new_tokens": 9}],
                },
                "Why there?",
            ],
            "max_new_tokens": 7,
        }
    )
    who, old, where, why, other = job.all_tasks()
    assert [len(task.history) for task in (who, old, where, why, other)] == [0, 1, 1, 2, 0]
    assert old.history == where.history == resolve(who, "AudioFlamingo3").turns
    assert why.history == where.turns
    assert why.question_id != other.question_id
    assert [task.decoding.max_new_tokens for task in (who, old, where, why)] == [7, 7, 9, 7]
    assert [task.think for task in (who, old, where, why)] == [True, False, False, False]


def test_all_of_a_job_may_think_but_what_says_otherwise():
    job = make_job(
        BASE
        | {
            "think": True,
            "tasks": ["caption", {"name": "transcript", "think": False}],
            "questions": [{"question": "Q?", "choices": ["a", "b"], "constrained": True, "think": False}, "R?"],
        }
    )
    assert [task.think for task in job.all_tasks()] == [True, False, False, True]


def test_how_a_reply_is_chosen():
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    sampled = {"do_sample": True, "temperature": 0.7, "seed": 5, "stop": "###", "min_new_tokens": 3}
    job = make_job(
        BASE
        | {
            "tasks": [{"name": "facts", "prompt": "Give.", "json_schema": schema, **sampled}],
            "questions": [
                {"question": "Q?", "choices": ["a", "b"], "constrained": True, "stop": ["x", "y"]},
                {"question": "R?", "prompt": "Really?", **sampled},
            ],
        }
    )
    facts, choice, really = job.all_tasks()
    assert facts.decoding == really.decoding._replace(json_schema='{"type":"object","properties":{"z":{},"a":{}}}')
    assert really.decoding == Decoding(
        do_sample=True, temperature=0.7, seed=5, stop=("###",), min_new_tokens=3, max_new_tokens=256
    )
    assert facts.parser == "json"
    assert choice.decoding == Decoding(stop=("x", "y"), one_of=("(A) a", "a", "(B) b", "b"))
    assert (really.prompt, really.question) == ("Really?", "R?")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30s", 30), ("5m", 300), ("1h", 3600), ("2d", 172_800), (45, 45), ("45", 45), ("1.5m", 90), (" 0.5 s ", 0.5)],
)
def test_times_of_a_watch_are_written_as_people_do(written, seconds):
    job = make_job(BASE | {"watch": dict.fromkeys(("every", "window", "pane_every", "stop_after"), written)})
    assert job.watch.model_dump() == {
        "every": seconds,
        "window": seconds,
        "pane_every": seconds,
        "stop_after": seconds,
        "shards": 1,
    }


def test_a_watch_looks_twice_a_minute_unless_it_is_told():
    assert make_job(BASE).watch.model_dump() == {
        "every": 30.0,
        "window": 300.0,
        "pane_every": 60.0,
        "stop_after": None,
        "shards": 1,
    }


@pytest.mark.parametrize(
    ("watch", "says"),
    [
        ({"every": "often"}, ["watch.every: it must be a time such as 30s, 5m or 1h"]),
        ({"every": "1h30m"}, ["watch.every: it must be a time"]),
        ({"window": "5 minutes"}, ["watch.window: it must be a time"]),
        ({"window": True}, ["watch.window: it must be a time"]),
        ({"pane_every": "-1s"}, ["watch.pane_every: it must be a time"]),
        ({"every": 0}, ["watch.every is 0", "greater than 0"]),
        ({"stop_after": "0s"}, ["watch.stop_after is '0s'", "greater than 0"]),
        ({"every": "nan"}, ["watch.every: it must be a time"]),
        ({"shards": 0}, ["watch.shards is 0", "greater than 0"]),
        ({"evry": "5s"}, ["watch.evry is not a key of a job; did you mean 'every'"]),
    ],
    ids=str,
)
def test_a_wrong_time_is_named(watch, says):
    message = problem(watch=watch)
    assert message.startswith("job.yaml: ")
    assert "\n" not in message
    for part in says:
        assert part in message
