"""A recording to the segments that the over-length policy allows."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

from af3pipe.audio.decode import Asked, Decoding, OpenDecoding, open_decoding
from af3pipe.audio.levels import SILENT_BELOW_DBFS, measure
from af3pipe.audio.mp4 import stated_by_large_index
from af3pipe.audio.probe import Reader
from af3pipe.audio.segments import AudioLimits, Cut, cut, is_over_length
from af3pipe.schemas import Levels, Reason, Recording, Rejected, Segment, Stage

OverLength: TypeAlias = Literal["dead-letter", "truncate", "split"]


def read_segments(
    file: BinaryIO,
    recording: Recording,
    *,
    limits: AudioLimits,
    over_length: OverLength,
    split_tolerance_s: float = 0.0,
    silent_below_dbfs: float = SILENT_BELOW_DBFS,
    open_decoding: OpenDecoding = open_decoding,
) -> Iterator[Segment]:
    """Decodes a recording, or the range of it that is asked for, into the segments the policy allows.

    Over-length is known from the header before the body is read, or at the cap where the header lies or states
    nothing. `dead-letter` rejects it, `truncate` gives one segment of exactly the cap, `split` gives consecutive
    ones, each of which ends at the quietest point of the last `split_tolerance_s` before the cap (0: at the cap).
    At the cap exactly, give or take `limits.min_samples`, a recording is not over-length.

    The last segment's `info.duration_s` is what decoding found the object to last. Where decoding stopped before
    the object's end it is what the header states, or at least what was decoded, so that a truncated segment is seen
    to end before it; for a range that was asked for it may be None.

    Raises:
        Rejected: As `decode`; too_long under `dead-letter`; too_short for less than `limits.min_samples`.
    """
    if over_length == "dead-letter":
        _check_large_index(file, recording, limits)
    with open_decoding(file, _asked(recording, limits)) as decoding:
        if over_length == "dead-letter":
            _check_stated_length(decoding, limits)
        index = 0
        cut_at = f"silence:{split_tolerance_s}" if split_tolerance_s else "cap"
        tolerance_s = min(split_tolerance_s, limits.max_s) if over_length == "split" else 0.0
        for piece in cut(decoding.blocks(), limits, tolerance_samples=round(tolerance_s * limits.sample_rate)):
            if over_length == "dead-letter" and not piece.is_last:
                raise _too_long_decoded(decoding, limits)
            levels = measure(piece.samples, silent_below_dbfs=silent_below_dbfs)
            truncated = over_length == "truncate"
            yield _segment(recording, decoding, piece, index, levels, truncated=truncated, cut_at=cut_at)
            if over_length == "truncate":
                return
            index += 1
            del piece  # or it is held while the next one is gathered; enumerate() would hold it, too
        if not index:
            raise _too_short(decoding, limits)


def _asked(recording: Recording, limits: AudioLimits) -> Asked:
    extension = Path(recording.uri).suffix
    # Plain numbers: they go to another process, and NumPy's do not.
    duration_s = None if recording.duration_s is None else float(recording.duration_s)
    stream = None if recording.stream is None else int(recording.stream)
    return Asked(limits.sample_rate, float(recording.offset_s), duration_s, extension, recording.channel, stream)


def _check_large_index(file: BinaryIO, recording: Recording, limits: AudioLimits) -> None:
    """Rejects a long MP4 before the decoder reads all of its index; `_check_stated_length` has the last word."""
    reader = Reader(file)
    whole_s = stated_by_large_index(reader, reader.size_bytes, recording.stream)
    reader.raise_error()
    if whole_s is None:
        return
    available_s = max(whole_s - recording.offset_s, 0.0)
    wanted_s = available_s if recording.duration_s is None else min(available_s, recording.duration_s)
    _check_length(round(wanted_s * limits.sample_rate), whole_s, limits, "pyav")


def _check_stated_length(decoding: Decoding, limits: AudioLimits) -> None:
    if decoding.stated_samples is not None:
        whole_s = (decoding.stated_frames or 0) / decoding.rate
        _check_length(decoding.stated_samples, whole_s, limits, decoding.info.decoder)


def _check_length(wanted: int, whole_s: float, limits: AudioLimits, decoder: str) -> None:
    if not is_over_length(wanted, limits):
        return
    wanted_s = wanted / limits.sample_rate
    lasts = f"The recording lasts {whole_s:.1f} s by its header"
    if whole_s - wanted_s > 0.5 / limits.sample_rate:
        lasts = f"{wanted_s:.1f} s are asked for of a recording that lasts {whole_s:.1f} s"
    advice = f"the model takes {limits.max_s:g} s; choose --over-length truncate or split."
    raise Rejected(Stage.PROBE, Reason.TOO_LONG, f"{lasts}; {advice}", decoder=decoder)


def _too_long_decoded(decoding: Decoding, limits: AudioLimits) -> Rejected:
    stated = decoding.info.duration_s
    header = "states no length" if stated is None else f"states {stated:.1f} s"
    detail = (
        f"The header {header}, but more than {limits.max_s:g} s were decoded, which is all the model takes; "
        "choose --over-length truncate or split."
    )
    return decoding.rejected(Reason.TOO_LONG, detail)


def _too_short(decoding: Decoding, limits: AudioLimits) -> Rejected:
    rate = limits.sample_rate
    detail = (
        f"{decoding.samples} samples at {rate} Hz ({decoding.samples / rate:.3f} s) were decoded; "
        f"the model needs {limits.min_samples} ({limits.min_samples / rate:.3f} s)."
    )
    return decoding.rejected(Reason.TOO_SHORT, detail)


def _segment(
    recording: Recording, decoding: Decoding, piece: Cut, index: int, levels: Levels, *, truncated: bool, cut_at: str
) -> Segment:
    info = decoding.info
    if decoding.ended and piece.is_last:
        info = info._replace(duration_s=decoding.position_s)
    elif truncated and not piece.is_last:
        info = info._replace(duration_s=max(info.duration_s or 0.0, decoding.position_s))
    start_s = recording.offset_s + piece.start / decoding.sample_rate
    return Segment(
        recording=recording,
        info=info,
        segment_index=index,
        start_s=start_s,
        end_s=recording.offset_s + (piece.start + len(piece.samples)) / decoding.sample_rate,
        is_last=piece.is_last or truncated,
        sample_rate=decoding.sample_rate,
        samples=piece.samples,
        levels=levels,
        cut_at=cut_at,
    )
