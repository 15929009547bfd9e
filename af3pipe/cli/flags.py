"""Declares the options that `run` and `watch` share, and reads their values into keys of a job."""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from af3pipe.cli.console import EXIT_WRONG_JOB, stop


def _job_flags(
    output: Annotated[str | None, typer.Option(help="Folder or URL that the Parquet tables are written to.")] = None,
    partition_by: Annotated[
        list[str] | None,
        typer.Option(help="Hive partitions of each table: date, run, or a metadata column; may be repeated."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, local directory, or `demo`; the default is nvidia/audio-flamingo-3-hf. NVIDIA's released "
            "weights are for **non-commercial** use; so are adapters made from them."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder of a PEFT LoRA to merge, such as the released model's `think`.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="Quantize the language model's weights: int8 or fp8.")] = None,
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think", help="Prompt the model to reason first; needs an adapter that was trained to."
        ),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="caption or transcript; may be repeated.")] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(help="Question about every recording, optionally with choices: `Who? | cat`; may be repeated."),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="File of questions: one per line as for --question, or .jsonl objects (docs/tasks.md)."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Custom task with its prompt: `mood=What mood is this music in?`; may be repeated."),
    ] = None,
    over_length: Annotated[
        str | None,
        typer.Option(
            help="Recordings beyond the model's maximum duration: dead-letter (default), truncate or split."
        ),
    ] = None,
    split_at: Annotated[
        str | None,
        typer.Option(
            help="Where split cuts: at the maximum duration (cap, default), or in a pause before it (silence)."
        ),
    ] = None,
    split_tolerance_s: Annotated[
        float | None,
        typer.Option(help="How many seconds before the maximum duration that point may be; 15 by default."),
    ] = None,
    on_silent: Annotated[
        str | None,
        typer.Option(help="Silent audio: process and flag it (flag, default), or reject it (dead-letter)."),
    ] = None,
    silent_below: Annotated[
        float | None, typer.Option(help="Peak level in dBFS at or below which audio is silent; -60 by default.")
    ] = None,
    channel: Annotated[
        str | None, typer.Option(help="Audio channel: mix (default), left, right, or its index from 0.")
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option(help="Index of the audio stream in a container, from 0; the default is the main one."),
    ] = None,
    allow_prefix: Annotated[
        list[str] | None,
        typer.Option(
            help="URL prefix below which a manifest may reference audio, beside its own bucket or folder; may be "
            "repeated."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum tokens generated per reply, for every task.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Engine that runs the model: transformers.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, all, or cuda:0,cuda:1.")] = None,
    attention: Annotated[
        str | None, typer.Option(help="Attention of the audio encoder: sdpa, eager, flash_attention_2.")
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option("--cuda-graphs/--no-cuda-graphs", help="Capture decoding steps as CUDA graphs (default)."),
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Maximum number of requests decoded together.")] = None,
    queue_audio_s: Annotated[
        float | None, typer.Option(help="Maximum seconds of audio in the engine's queue.")
    ] = None,
    decode_threads: Annotated[int | None, typer.Option(help="Number of recordings decoded at the same time.")] = None,
    decode_guard: Annotated[
        bool | None,
        typer.Option(
            "--decode-guard/--no-decode-guard",
            help="Decode in separate processes (default), where a crash costs one recording, or in the worker.",
        ),
    ] = None,
    decode_timeout_s: Annotated[
        float | None, typer.Option(help="Timeout in seconds for decoding 10 s of audio; 60 by default.")
    ] = None,
    decode_memory_mib: Annotated[
        int | None, typer.Option(help="Memory limit of a decoder process in MiB; 1024 by default.")
    ] = None,
    accelerator: Annotated[str | None, typer.Option(help="Beam's accelerator hint for GPU workers.")] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Skip what earlier runs with the same --output have answered (default), or not.",
        ),
    ] = None,
    chunk_recordings: Annotated[
        int | None,
        typer.Option(help="Recordings that a worker processes before it writes their rows; 1000 by default."),
    ] = None,
    fail_on_dead_letters: Annotated[
        str | None,
        typer.Option(
            help="Exit with code 3 when there are more dead letters than this: a count, or a share such as 5%."
        ),
    ] = None,
    verify_sample: Annotated[
        int | None,
        typer.Option(
            help="Run a random sample of this many requests again with plain `generate`, one at a time. In float32 a "
            "reply that differs fails the run; in other dtypes the share of equal replies is reported."
        ),
    ] = None,
) -> dict[str, Any]:
    """Returns the flags that were given, by key of the job."""
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
    """Adds the flags of a job to a command, which receives them as `flags`: those given, by key of the job."""
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
