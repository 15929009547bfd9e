"""Rejects parts of a recording that are too long or too short for the model."""

from typing import BinaryIO

from af3pipe.audio.decoding import Decoding, Part
from af3pipe.audio.mp4 import stated_by_large_index
from af3pipe.audio.reader import Reader
from af3pipe.audio.segments import AudioLimits, is_over_length
from af3pipe.schemas import Reason, Rejected, Stage


def read_large_index(file: BinaryIO, stream: int | None) -> float | None:
    """Returns the duration in seconds of an MP4 with a large index, which FFmpeg would read whole; else None."""
    reader = Reader(file)
    whole_s = stated_by_large_index(reader, reader.size_bytes, stream)
    reader.raise_error()
    return whole_s


def check_large_index(whole_s: float, part: Part, limits: AudioLimits) -> None:
    """Raises Rejected for a part that is too long by `read_large_index`; `check_stated` checks it again later."""
    available_s = max(whole_s - part.offset_s, 0.0)
    wanted_s = available_s if part.duration_s is None else min(available_s, part.duration_s)
    _check(round(wanted_s * limits.sample_rate), whole_s, limits, "pyav")


def check_stated(decoding: Decoding, part: Part, limits: AudioLimits) -> None:
    """Raises Rejected for a part that is too long by the header."""
    stated = decoding.stated_samples(part)
    if stated is not None:
        _check(stated, (decoding.stated_frames or 0) / decoding.rate, limits, decoding.info.decoder)


def _check(wanted: int, whole_s: float, limits: AudioLimits, decoder: str) -> None:
    if not is_over_length(wanted, limits):
        return
    wanted_s = wanted / limits.sample_rate
    lasts = f"The recording lasts {whole_s:.1f} s by its header"
    if whole_s - wanted_s > 0.5 / limits.sample_rate:
        lasts = f"{wanted_s:.1f} s are requested of a recording that lasts {whole_s:.1f} s"
    advice = f"the model takes {limits.max_s:g} s; choose --over-length truncate or split."
    raise Rejected(Stage.PROBE, Reason.TOO_LONG, f"{lasts}; {advice}", decoder=decoder)


def too_long(decoding: Decoding, limits: AudioLimits, position_s: float) -> Rejected:
    """Returns the error for a part that is longer than the cap although the header states less or nothing."""
    stated = decoding.info.duration_s
    header = "states no length" if stated is None else f"states {stated:.1f} s"
    detail = (
        f"The header {header}, but more than {limits.max_s:g} s were decoded, which is all the model takes; "
        "choose --over-length truncate or split."
    )
    return decoding.rejected(Reason.TOO_LONG, detail, position_s)


def too_short(decoding: Decoding, limits: AudioLimits, samples: int, position_s: float) -> Rejected:
    """Returns the error for a part that is too short for one audio token."""
    rate = limits.sample_rate
    detail = (
        f"{samples} samples at {rate} Hz ({samples / rate:.3f} s) were decoded; "
        f"the model needs {limits.min_samples} ({limits.min_samples / rate:.3f} s)."
    )
    return decoding.rejected(Reason.TOO_SHORT, detail, position_s)
