"""Creates audio files with real encoders: libsndfile, FFmpeg through PyAV, and the `ffmpeg` program.

Every function returns the file's bytes. `samples` are float32 in [-1, 1], shape (n, channels).
"""

import functools
import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import soundfile

Samples = npt.NDArray[np.float32]

_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}
_PROGRAM = ["ffmpeg", "-hide_banner", "-loglevel", "error", "-nostdin", "-y"]


def sound(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> Samples:
    """A chord under noise that swells and fades: different in every channel, nowhere silent, never the same twice."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    chord = sum(np.sin(2 * np.pi * pitch * times) for pitch in (220.0, 277.2, 329.6))
    noise = rng.normal(size=(len(times), channels)) * (1 + np.sin(times))[:, None]
    gains = np.linspace(0.1, 0.05, channels)
    return (chord[:, None] * gains + 0.03 * noise).astype(np.float32)


@functools.lru_cache(maxsize=64)
def encoded(encode: Callable[[Samples, int], bytes], seconds: float, rate: int, channels: int = 1) -> bytes:
    """`sound` in a file by one of the functions below; made once in a process for all tests that use the same."""
    return encode(sound(seconds, rate, channels), rate)


def wav(samples: Samples, rate: int, subtype: str = "PCM_16") -> bytes:
    return by_libsndfile(samples, rate, "WAV", subtype)


def flac(samples: Samples, rate: int, subtype: str = "PCM_16") -> bytes:
    return by_libsndfile(samples, rate, "FLAC", subtype)


def ogg(samples: Samples, rate: int, subtype: str = "VORBIS") -> bytes:
    return by_libsndfile(samples, rate, "OGG", subtype)


def mp3(samples: Samples, rate: int) -> bytes:
    """Variable bit rate, with a Xing header that states the length."""
    return by_libsndfile(samples, rate, "MP3", "MPEG_LAYER_III")


def mp3_without_length(samples: Samples, rate: int) -> bytes:
    """Variable bit rate and no Xing header, as stream recorders leave it: nothing states the length."""
    return _by_ffmpeg(
        samples, rate, "mp3", "libmp3lame", options={"write_xing": "0", "id3v2_version": "0"}, quality=4
    )


def aiff(samples: Samples, rate: int) -> bytes:
    return by_libsndfile(samples, rate, "AIFF", "PCM_16")


def m4a(samples: Samples, rate: int) -> bytes:
    """AAC, with the index in front of the audio."""
    return _by_ffmpeg(samples, rate, "ipod", "aac", options={"movflags": "faststart"})


def alac(samples: Samples, rate: int, *, index_at_end: bool = False) -> bytes:
    """Lossless, in 16 bits."""
    return _by_ffmpeg(samples, rate, "ipod", "alac", options={} if index_at_end else {"movflags": "faststart"})


def id3(cover: bytes) -> bytes:
    """An ID3 tag with a cover, to be put in front of an MP3 as taggers do."""
    frame = b"\x00image/png\x00\x03\x00" + cover
    frame = b"APIC" + len(frame).to_bytes(4, "big") + b"\x00\x00" + frame
    return b"ID3\x03\x00\x00" + bytes(len(frame) >> shift & 0x7F for shift in (21, 14, 7, 0)) + frame


def two_streams(first: Samples, second: Samples, rate: int) -> bytes:
    """Matroska with two streams of FLAC; the second is the better one, having more channels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made"
        with av.open(str(path), "w", format="matroska") as output:
            made = [output.add_stream("flac", rate=rate, layout=_LAYOUTS[one.shape[1]]) for one in (first, second)]
            for stream, samples in zip(made, (first, second), strict=True):
                _encode_sound(output, stream, samples, rate)
        return path.read_bytes()


def adts(samples: Samples, rate: int) -> bytes:
    """Bare AAC frames: no container, no length."""
    return _by_ffmpeg(samples, rate, "adts", "aac")


def webm(samples: Samples, rate: int = 48000) -> bytes:
    """Opus."""
    return _by_ffmpeg(samples, rate, "webm", "libopus")


def amr(samples: Samples, rate: int = 8000) -> bytes:
    """AMR narrow band, as phones recorded."""
    return _by_ffmpeg(samples, rate, "amr", "libopencore_amrnb", bit_rate=12_200)


def mp4_video(samples: Samples | None, rate: int = 44100, *, video_s: float = 2.0) -> bytes:
    """Black video with AAC sound; without any sound where `samples` is None."""
    return _by_ffmpeg(samples, rate, "mp4", "aac", video_s=video_s)


def mkv_video(samples: Samples, rate: int = 44100, *, video_s: float = 2.0) -> bytes:
    return _by_ffmpeg(samples, rate, "matroska", "aac", video_s=video_s)


def by_program(samples: Samples, rate: int, suffix: str, *options: str) -> bytes:
    """Made by the `ffmpeg` program, with its own choice of codec for that suffix, or that of `options`.

    `-i PATH` among the options adds an input.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"made.{suffix}"
        # With a second input, ffmpeg sleeps 10 ms each time that its short queue of packets is empty.
        queue = ["-thread_queue_size", "8192"]
        stored = [*queue, "-f", "f32le", "-ar", str(rate), "-ac", str(samples.shape[1]), "-i", "pipe:0"]
        command = [*_PROGRAM, *stored, *options, str(path)]
        subprocess.run(command, input=np.ascontiguousarray(samples, np.float32).tobytes(), check=True)
        return path.read_bytes()


def repeated(data: bytes, suffix: str, times: int, *options: str) -> bytes:
    """A file as often as that in one of the same kind, without encoding it anew: long files, quickly."""
    with tempfile.TemporaryDirectory() as folder:
        path, long = Path(folder) / f"once.{suffix}", Path(folder) / f"long.{suffix}"
        path.write_bytes(data)
        loop = ["-stream_loop", str(times - 1), "-i", str(path)]
        subprocess.run([*_PROGRAM, *loop, "-map", "0", "-c", "copy", *options, str(long)], check=True)
        return long.read_bytes()


def heard_by_program(data: bytes, suffix: str, *options: str, stream: int = 0) -> Samples:
    """What the `ffmpeg` program decodes of a file: float32 at the rate it is stored at, shape (n, channels).

    `options` say what the file's name does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, heard = Path(folder) / f"given.{suffix}", Path(folder) / "heard.wav"
        path.write_bytes(data)
        chosen = ["-map", f"0:a:{stream}", "-c:a", "pcm_f32le", str(heard)]
        subprocess.run([*_PROGRAM, *options, "-i", str(path), *chosen], check=True)
        return soundfile.read(heard, dtype="float32", always_2d=True)[0]


def program_encodes(codec: str) -> bool:
    """Whether there is an `ffmpeg` program, and it has that encoder."""
    return f" {codec} " in _encoders()


@functools.cache
def _encoders() -> str:
    if shutil.which("ffmpeg") is None:
        return ""
    return subprocess.run([*_PROGRAM, "-encoders"], capture_output=True, check=True, text=True).stdout


@functools.cache
def picture(size: int) -> bytes:
    """A PNG of at least so many bytes: noise, which does not compress."""
    side = int((size / 3) ** 0.5) + 1
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cover.png"
        with av.open(str(path), "w", format="image2") as output:
            stream = output.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = side, side, "rgb24"
            output.mux(stream.encode(av.VideoFrame.from_ndarray(noise, "rgb24")))
            output.mux(stream.encode(None))
        return path.read_bytes()


def by_libsndfile(samples: Samples, rate: int, container: str, subtype: str) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, samples.shape[1], format=container, subtype=subtype) as output:
        for start in range(
            0, len(samples), rate
        ):  # libsndfile's Vorbis encoder overruns its stack on minutes at once
            output.write(samples[start : start + rate])
    return file.getvalue()


def _by_ffmpeg(
    samples: Samples | None,
    rate: int,
    container: str,
    codec: str,
    *,
    options: dict[str, str] | None = None,
    video_s: float = 0.0,
    quality: int | None = None,
    bit_rate: int | None = None,
) -> bytes:
    # On disk, because the MP4 muxer opens its file a second time to move the index.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made"
        with av.open(str(path), "w", format=container, options=options or {}) as output:
            if video_s:
                picture = output.add_stream("mpeg4", rate=5)
                picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
            if samples is not None:
                audio = output.add_stream(codec, rate=rate, layout=_LAYOUTS[samples.shape[1]])
                if bit_rate is not None:
                    audio.bit_rate = bit_rate
                if quality is not None:
                    audio.codec_context.flags |= av.codec.context.Flags.qscale
                    audio.codec_context.global_quality = quality * 118  # FF_QP2LAMBDA
            if video_s:
                _encode_black(output, picture, round(video_s * 5))
            if samples is not None:
                _encode_sound(output, audio, samples, rate)
        return path.read_bytes()


def _encode_black(output: av.container.OutputContainer, stream: av.VideoStream, count: int) -> None:
    for _ in range(count):
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")))
    output.mux(stream.encode(None))


def _encode_sound(output: av.container.OutputContainer, stream: av.AudioStream, samples: Samples, rate: int) -> None:
    for start in range(0, len(samples), 1024):
        planes = np.ascontiguousarray(samples[start : start + 1024].T)
        frame = av.AudioFrame.from_ndarray(planes, "fltp", layout=_LAYOUTS[samples.shape[1]])
        frame.sample_rate, frame.pts = rate, start
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))
