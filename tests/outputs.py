"""Builds outputs of runs row by row, of any size and with any faults."""

import hashlib
import json

from af3pipe import storage
from af3pipe.schemas import (
    Answer,
    DeadLetter,
    Reason,
    RecordingResult,
    RecordingRow,
    Stage,
    TerminalState,
    TimedText,
    source_key,
    to_metadata,
)
from af3pipe.tables import write

FIRST, SECOND, THIRD = (f"2026010{day}T030405Z-{letter * 6}" for day, letter in enumerate("abc", start=1))
_MOMENT = 1_767_323_045_000_000


def digest(*parts):
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def answer(number, task="caption"):
    return Answer(
        recording_id=f"id{number}",
        uri=f"s3://archive/Grüße {number}.flac",
        source_key=source_key(f"s3://archive/Grüße {number}.flac"),
        size_bytes=100 + number,
        etag=None,
        mtime="2026-01-02T03:04:05+00:00",
        segment_index=0,
        start_s=0.0,
        end_s=1.5,
        duration_s=1.5,
        sample_rate=44100,
        channels=2,
        codec="flac",
        peak_dbfs=-3.0,
        rms_dbfs=-21.5,
        clipped_share=0.0,
        silent=False,
        channel="mix",
        stream=None,
        task=task,
        prompt="Describe the audio in detail.",
        history=("What is heard?",),
        question_id=None,
        question=None,
        choices=("yes", "no"),
        text=f"text {number}",
        choice=None,
        segments=(TimedText(0.0, 1.5, f"text {number}"),),
        finish_reason="stop",
        audio_tokens=37,
        prompt_tokens=60,
        new_tokens=5,
        model_id="demo",
        model_revision="r",
        family="AudioFlamingo3",
        engine="transformers",
        dtype="float32",
        decoding="{}",
        answer_key=f"key{number}{task}",
        metadata=to_metadata({"speaker": 7}),
        run_id="",
        created_at=_MOMENT,
    )


def answer_row(number, version="", text=None, station="K Q", created_at=_MOMENT):
    return answer(number)._replace(
        recording_id=digest("recording", number)[:20],
        uri=f"s3://archive/{number}.flac",
        source_key=source_key(f"s3://archive/{number}.flac"),
        answer_key=digest("answer", number, version),
        text=text or f"heard {number} {version}",
        metadata=to_metadata({"station": station} if station else {}),
        created_at=created_at,
    )


def letter_row(number, created_at=_MOMENT):
    recording_id = digest("recording", number)[:20]
    return DeadLetter(
        recording_id=recording_id,
        uri=f"s3://archive/{number}.flac",
        stage=Stage.DECODE,
        reason=Reason.DECODE_ERROR,
        detail="broken",
        retryable=False,
        size_bytes=1,
        decoder="pyav",
        position_s=1.0,
        attempts=1,
        traceback=None,
        input=json.dumps({"recording": {}}),
        dead_letter_key=digest("letter", number),
        run_id="",
        created_at=created_at,
        metadata=to_metadata({"station": "K Q"}),
    )


def recording_row(number, answers=(), letters=(), *, kept=False, created_at=_MOMENT):
    """With `kept`, its answers and dead letters are those of an earlier run."""
    state = TerminalState.OK if not letters else TerminalState.OK_PARTIAL if answers else TerminalState.DEAD_LETTER
    keys = tuple(row.answer_key for row in answers)
    letter_keys = tuple(row.dead_letter_key for row in letters)
    return RecordingRow(
        recording_id=digest("recording", number)[:20],
        uri=f"s3://archive/{number}.flac",
        source_key=source_key(f"s3://archive/{number}.flac"),
        terminal_state=state,
        duration_s=1.5,
        covered_s=1.5,
        answers=0 if kept else len(keys),
        kept_answers=len(keys) if kept else 0,
        answer_keys=keys,
        dead_letters=0 if kept else len(letter_keys),
        kept_dead_letters=len(letter_keys) if kept else 0,
        dead_letter_keys=letter_keys,
        reasons=(),
        work_key="work",
        peak_dbfs=-3.0,
        rms_dbfs=-20.0,
        clipped_share=0.0,
        silent=False,
        size_bytes=100,
        etag=None,
        mtime="2026-01-02T03:04:05+00:00",
        offset_s=0.0,
        channel="mix",
        stream=None,
        metadata=to_metadata({"station": "K Q"}),
        run_id="",
        created_at=created_at,
    )


def result(number, mtime="2026-01-02T03:04:05+00:00", *, broken=False):
    """Of an answered recording; with `broken`, of one with a dead letter beside its answer."""
    answers = (answer_row(number),)
    letters = (letter_row(number),) if broken else ()
    return RecordingResult(recording_row(number, answers, letters)._replace(mtime=mtime), answers, letters)


def write_rows(output, run_id, row_format, rows, partition_by=(), in_files_of=7):
    """A few rows a file, as a run on many workers leaves them."""
    folder = write.Folder(row_format, run_id, partition_by)
    by_folder = {}
    for row in rows:
        by_folder.setdefault(folder(row), []).append(row)
    for name, found in by_folder.items():
        for start in range(0, len(found), in_files_of):
            list(write.write_rows(found[start : start + in_files_of], row_format, str(output), name, run_id))


def write_run(
    output, run_id, numbers, *, broken=(), version="", kept=False, finished=True, partition_by=(), later_s=0, **files
):
    """A whole run: an answer for each number, a dead letter for each that is broken; with `kept` an earlier run's."""
    at = _MOMENT + later_s * 1_000_000
    answers = {number: answer_row(number, version, created_at=at) for number in numbers}
    letters = {number: letter_row(number, created_at=at) for number in broken}
    how = {"kept": kept, "created_at": at}
    results = [recording_row(number, [row], **how) for number, row in answers.items()]
    results += [recording_row(number, (), [row], **how) for number, row in letters.items()]
    if not kept:
        write_rows(output, run_id, write.ANSWERS, answers.values(), partition_by, **files)
        write_rows(output, run_id, write.DEAD_LETTER_ROWS, letters.values(), partition_by, **files)
    write_rows(output, run_id, write.RECORDINGS, results, partition_by, **files)
    states = {"ok": len(answers), "dead_letter": len(letters)}
    record = {
        "run_id": run_id,
        "started_at": "2026-01-01T03:04:05+00:00",
        "host": "here",
        "pid": 1,
        "job": {"inputs": ["s3://archive/"]},
    }
    if finished:
        record |= {
            "recordings_found": len(results),
            "recordings": {state: number for state, number in states.items() if number},
            "answers": {"captions": len(answers)} if answers and not kept else {},
            "dead_letters": {"decode_error": len(letters)} if letters and not kept else {},
        }
    name = f"{run_id}.json" if finished else f"{run_id}.started.json"
    storage.write_atomic(storage.join(str(output), "_runs", name), json.dumps(record).encode())
