"""Declares the options of a job that `run` and `watch` share, and reads their values."""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from af3pipe.cli.console import EXIT_WRONG_JOB, stop


def _job_flags(
    output: Annotated[str | None, typer.Option(help="Folder or URL for the Parquet.")] = None,
    partition_by: Annotated[
        list[str] | None,
        typer.Option(help="Hive folders below each table: date, run, or a metadata column; may be given again."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, local directory, or `demo`; the default is nvidia/audio-flamingo-3-hf. NVIDIA's released "
            "weights are for **non-commercial** use; an adapter made from them inherits that."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder of a PEFT LoRA to merge, such as the released model's `think`.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8 or fp8: the language model's weights in fewer bits.")
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Ask the model to reason first; needs the adapter trained to."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="caption or transcript; more than one may be given.")] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Asked of every recording; choices follow: `Who? | cat | dog`.")
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="File of questions: a line each, or .jsonl with question, choices, id.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A task of your own: `mood=What mood is this music in?`")
    ] = None,
    over_length: Annotated[
        str | None,
        typer.Option(help="Longer than the model takes: dead-letter (default), truncate or split."),
    ] = None,
    split_at: Annotated[
        str | None,
        typer.Option(help="Where split cuts: at the cap (default), or at the quietest point before it: silence."),
    ] = None,
    split_tolerance_s: Annotated[
        float | None, typer.Option(help="How many seconds before the cap that point may be; 15 by default.")
    ] = None,
    on_silent: Annotated[
        str | None, typer.Option(help="Silent audio: flag it and ask (default), or dead-letter it unasked.")
    ] = None,
    silent_below: Annotated[
        float | None, typer.Option(help="Silent is what peaks at or below this, in dBFS; -60 by default.")
    ] = None,
    channel: Annotated[
        str | None, typer.Option(help="What is heard: mix (default), left, right, or a channel's number from 0.")
    ] = None,
    stream: Annotated[
        str | None, typer.Option(help="Which audio stream of a video, from 0; the default is its main one.")
    ] = None,
    allow_prefix: Annotated[
        list[str] | None,
        typer.Option(
            help="URL below which a manifest from elsewhere may name audio, beside its own bucket or folder."
        ),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest reply, for every task.")] = None,
    engine: Annotated[str | None, typer.Option(help="What runs the model: transformers.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, all, or cuda:0,cuda:1.")] = None,
    attention: Annotated[
        str | None, typer.Option(help="Of the audio encoder: sdpa, eager, flash_attention_2.")
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option("--cuda-graphs/--no-cuda-graphs", help="Capture decoding steps as CUDA graphs (default)."),
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Most prompts decoded together.")] = None,
    queue_audio_s: Annotated[float | None, typer.Option(help="Most seconds of audio that wait.")] = None,
    decode_threads: Annotated[int | None, typer.Option(help="Recordings decoded at once.")] = None,
    decode_guard: Annotated[
        bool | None,
        typer.Option(
            "--decode-guard/--no-decode-guard",
            help="Decode in processes of their own (default), where a crash costs one recording, or in the worker's.",
        ),
    ] = None,
    decode_timeout_s: Annotated[
        float | None, typer.Option(help="Longest that a decoder may take for 10 s of audio; 60 by default.")
    ] = None,
    decode_memory_mib: Annotated[
        int | None, typer.Option(help="Most memory that a decoder may take; 1024 by default.")
    ] = None,
    accelerator: Annotated[str | None, typer.Option(help="Beam's accelerator hint for GPU workers.")] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Ask only what earlier runs into the same output have not answered (default), or everything anew.",
        ),
    ] = None,
    chunk_recordings: Annotated[
        int | None,
        typer.Option(help="Recordings that a worker asks before their rows land; 1000 by default."),
    ] = None,
    fail_on_dead_letters: Annotated[
        str | None, typer.Option(help="Fail when there are more than this: a count, or a share such as 5%.")
    ] = None,
    verify_sample: Annotated[
        int | None,
        typer.Option(
            help="Ask so many requests, drawn at random, again by plain generate, one at a time: in float32 the run "
            "fails where a reply differs, else it is told how many agree."
        ),
    ] = None,
) -> dict[str, Any]:
    """What a job's flags say, by key of the job."""
    flags = {
        "output": output,
        "partition_by": partition_by,
        "model": model,
        "revision": revision,
        "adapter": adapter,
        "quantize": quantize,
        "think": think,
        "tasks": [*(task or []), *map(_own_task, prompt or [])] or None,
        "questions": [*(question or []), *(_question_file(questions) if questions else [])] or None,
        "over_length": over_length,
        "split_at": split_at,
        "split_tolerance_s": split_tolerance_s,
        "on_silent": on_silent,
        "silent_below": silent_below,
        "channel": channel,
        "stream": stream,
        "allow_prefixes": allow_prefix,
        "max_new_tokens": max_new_tokens,
        "engine": engine,
        "dtype": dtype,
        "device": device,
        "attention": attention,
        "cuda_graphs": cuda_graphs,
        "slots": slots,
        "queue_audio_s": queue_audio_s,
        "decode_threads": decode_threads,
        "decode_guard": decode_guard,
        "decode_timeout_s": decode_timeout_s,
        "decode_memory_mib": decode_memory_mib,
        "accelerator": accelerator,
        "resume": resume,
        "chunk_recordings": chunk_recordings,
        "fail_on_dead_letters": fail_on_dead_letters,
        "verify_sample": verify_sample,
    }
    return {key: value for key, value in flags.items() if value is not None}


def takes_job_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags of a job beside its own; it gets them as `flags`, as `_job_flags` gives them."""
    own = [found for found in inspect.signature(command).parameters.values() if found.name != "flags"]
    shared = list(inspect.signature(_job_flags).parameters.values())

    @functools.wraps(command)
    def with_flags(**values: Any) -> None:
        command(**{found.name: values.pop(found.name) for found in own}, flags=_job_flags(**values))

    vars(with_flags)["__signature__"] = inspect.Signature([*own, *shared])
    with_flags.__annotations__ = {found.name: found.annotation for found in (*own, *shared)}
    return with_flags


def _own_task(text: str) -> dict[str, str]:
    name, found, prompt = text.partition("=")
    if not found:
        stop(f"--prompt is {text!r}; it must be NAME=TEXT", EXIT_WRONG_JOB)
    return {"name": name.strip(), "prompt": prompt.strip()}


def _question_file(name: str) -> list[Any]:
    from af3pipe import storage
    from af3pipe.schemas import Rejected

    try:
        lines = [line for line in storage.read_bytes(name).decode("utf-8-sig").split("\n") if line.strip()]
        return [json.loads(line) if name.endswith(".jsonl") else line for line in lines]
    except (Rejected, storage.StorageError, ValueError) as error:
        stop(f"--questions {name}: {error}", EXIT_WRONG_JOB)
