"""Lists every supported format, with the encoder of its fixture: the rows of docs/formats.md."""

from collections.abc import Callable
from typing import NamedTuple

from tests import fixtures_audio as make
from tests.fixtures_audio import Samples

TELEPHONE = ((8000, 1),)
ANY = ((8000, 1), (16000, 2), (44100, 6), (192000, 1))
STUDIO = ((44100, 2), (48000, 1))


class Format(NamedTuple):
    """One kind of file.

    Attributes:
        row: The row of the table in docs/formats.md.
        extension: Its file name's.
        encode: (samples, rate) to bytes.
        stored: Pairs of rate and channels to make.
        encoder: The `ffmpeg` program's, where that makes it.
        raw: Options that tell the `ffmpeg` program what a file without a header is.
        padded: Whether FFmpeg gives out what the encoder added to fill its last frame, which is dropped here.
    """

    row: str
    extension: str
    encode: Callable[[Samples, int], bytes]
    stored: tuple[tuple[int, int], ...] = ANY
    encoder: str = ""
    raw: tuple[str, ...] = ()
    padded: bool = False


def _written(
    row: str, extension: str, container: str, subtype: str, stored: tuple[tuple[int, int], ...] = ANY
) -> Format:
    return Format(row, extension, lambda samples, rate: make.by_libsndfile(samples, rate, container, subtype), stored)


def _coded(
    row: str,
    suffix: str,
    encoder: str,
    *options: str,
    stored: tuple[tuple[int, int], ...] = STUDIO,
    raw: tuple[str, ...] = (),
    padded: bool = False,
) -> Format:
    def encode(samples: Samples, rate: int) -> bytes:
        return make.by_program(samples, rate, suffix, *options, "-c:a", encoder)

    return Format(row, suffix, encode, stored, encoder, raw, padded)


def _raw(encoding: str, rate: int = 8000) -> tuple[str, ...]:
    return ("-f", encoding, "-ar", str(rate), "-ac", "1")


_VIDEO = ("-f", "lavfi", "-i", "testsrc=size=64x64:rate=5:duration=3", "-c:v", "mpeg4")
_NO_LENGTH = ("-write_xing", "0", "-id3v2_version", "0")

FORMATS = {
    "wav 8 bit": _written("WAV, PCM", "wav", "WAV", "PCM_U8"),
    "wav 16 bit": _written("WAV, PCM", "wav", "WAV", "PCM_16"),
    "wav 24 bit": _written("WAV, PCM", "wav", "WAV", "PCM_24"),
    "wav 32 bit": _written("WAV, PCM", "wav", "WAV", "PCM_32"),
    "wav float": _written("WAV, PCM", "wav", "WAV", "FLOAT"),
    "wav double": _written("WAV, PCM", "wav", "WAV", "DOUBLE"),
    "wav extensible": _written("WAV, PCM", "wav", "WAVEX", "PCM_24"),
    "rf64": _written("WAV, PCM", "rf64", "RF64", "PCM_16"),
    "bwf": _coded("WAV, PCM", "wav", "pcm_s24le", "-write_bext", "1", "-metadata", "description=news"),
    "w64": _written("WAV, PCM", "w64", "W64", "PCM_16"),
    "wav mu-law": _written("WAV, mu-law and A-law", "wav", "WAV", "ULAW", TELEPHONE),
    "wav A-law": _written("WAV, mu-law and A-law", "wav", "WAV", "ALAW", ((8000, 2),)),
    "wav IMA": _written("WAV, ADPCM", "wav", "WAV", "IMA_ADPCM", ((8000, 1), (22050, 2))),
    "wav MS": _written("WAV, ADPCM", "wav", "WAV", "MS_ADPCM", ((8000, 1), (22050, 2))),
    "wav GSM": _written("WAV, GSM 6.10", "wav", "WAV", "GSM610", TELEPHONE),
    "wav mp3": _coded("WAV, MP3 or G.722", "wav", "libmp3lame", stored=((8000, 1), (44100, 2))),
    "wav G.722": _coded("WAV, MP3 or G.722", "wav", "g722", stored=((16000, 1),)),
    "aiff": _written("AIFF and AIFC", "aiff", "AIFF", "PCM_16"),
    "aiff 24 bit": _written("AIFF and AIFC", "aif", "AIFF", "PCM_24"),
    "aifc float": _written("AIFF and AIFC", "aifc", "AIFF", "FLOAT"),
    "aifc mu-law": _written("AIFF and AIFC", "aifc", "AIFF", "ULAW", TELEPHONE),
    "caf": _written("CAF, PCM", "caf", "CAF", "PCM_24"),
    "caf float": _written("CAF, PCM", "caf", "CAF", "FLOAT"),
    "caf alac": _coded("CAF, ALAC", "caf", "alac"),
    "au": _written("AU", "au", "AU", "PCM_16"),
    "au mu-law": _written("AU", "snd", "AU", "ULAW", TELEPHONE),
    "sphere": _written("NIST SPHERE and VOC", "sph", "NIST", "PCM_16", ((8000, 1), (16000, 2))),
    "voc": _written("NIST SPHERE and VOC", "voc", "VOC", "PCM_16", ((8000, 1), (44100, 2))),
    "flac": _written("FLAC", "flac", "FLAC", "PCM_16"),
    "flac 24 bit": _written("FLAC", "flac", "FLAC", "PCM_24"),
    "ogg vorbis": _written("Ogg Vorbis", "ogg", "OGG", "VORBIS", ((8000, 1), (44100, 6), (48000, 2))),
    "ogg opus": _written("Ogg Opus", "opus", "OGG", "OPUS", ((48000, 1), (48000, 2), (16000, 2))),
    "ogg opus 5.1": _coded("Ogg Opus", "opus", "libopus", stored=((48000, 6),)),
    "ogg flac": _coded("Ogg FLAC and Speex", "oga", "flac"),
    "ogg speex": _coded("Ogg FLAC and Speex", "spx", "libspeex", stored=((8000, 1), (16000, 1))),
    "mp3 cbr": _coded("MP3 with a length", "mp3", "libmp3lame", "-b:a", "128k", stored=((44100, 2), (22050, 1))),
    "mp3 vbr": _coded("MP3 with a length", "mp3", "libmp3lame", "-q:a", "4", stored=((44100, 2), (8000, 1))),
    "mp3 cbr bare": _coded("MP3 without a length", "mp3", "libmp3lame", "-b:a", "128k", *_NO_LENGTH),
    "mp3 vbr bare": _coded("MP3 without a length", "mp3", "libmp3lame", "-q:a", "4", *_NO_LENGTH),
    "mp2": _coded("MP3 without a length", "mp2", "mp2"),
    "m4a": _coded("M4A and MP4, AAC", "m4a", "aac", stored=(*STUDIO, (16000, 1), (48000, 8)), padded=True),
    "m4a fragmented": _coded("M4A and MP4, AAC", "m4a", "aac", "-movflags", "frag_keyframe+empty_moov", padded=True),
    "mp4": _coded("M4A and MP4, AAC", "mp4", "aac", *_VIDEO, padded=True),
    "alac": _coded("M4A, ALAC", "m4a", "alac", stored=(*STUDIO, (96000, 2))),
    "adts": _coded("AAC, bare (ADTS)", "aac", "aac", stored=(*STUDIO, (16000, 1))),
    "webm": _coded("WebM", "webm", "libopus", stored=((48000, 2), (48000, 1))),
    "webm vorbis": _coded("WebM", "webm", "libvorbis"),
    "mkv aac": _coded("Matroska", "mkv", "aac", *_VIDEO, padded=True),
    "mkv ac3": _coded("Matroska", "mkv", "ac3", *_VIDEO, stored=((48000, 6),)),
    "mkv pcm": _coded("Matroska", "mkv", "pcm_s16le", *_VIDEO),
    "mka": _coded("Matroska", "mka", "flac"),
    "avi": _coded("AVI and MPEG-TS", "avi", "libmp3lame", *_VIDEO),
    "ts": _coded("AVI and MPEG-TS", "ts", "aac"),
    "ac3": _coded("AC-3 and E-AC-3", "ac3", "ac3", stored=((48000, 6), (44100, 2))),
    "eac3": _coded("AC-3 and E-AC-3", "eac3", "eac3"),
    "wma": _coded("WMA", "wma", "wmav2"),
    "wavpack": _coded("WavPack and TTA", "wv", "wavpack"),
    "tta": _coded("WavPack and TTA", "tta", "tta"),
    "amr": Format("AMR, narrow and wide band", "amr", make.amr, TELEPHONE),
    "awb": _coded("AMR, narrow and wide band", "awb", "libvo_amrwbenc", "-f", "amr", stored=((16000, 1),)),
    "g722": _coded("G.722, bare", "g722", "g722", stored=((16000, 1),), raw=("-f", "g722")),
    "gsm": _coded("GSM 6.10, bare", "gsm", "libgsm", stored=TELEPHONE, raw=("-f", "gsm")),
    "ulaw": _coded("mu-law and A-law, bare", "ulaw", "pcm_mulaw", "-f", "mulaw", stored=TELEPHONE, raw=_raw("mulaw")),
    "alaw": _coded("mu-law and A-law, bare", "alaw", "pcm_alaw", "-f", "alaw", stored=TELEPHONE, raw=_raw("alaw")),
    "sln": _coded("16-bit samples, bare", "sln", "pcm_s16le", "-f", "s16le", stored=TELEPHONE, raw=_raw("s16le")),
    "sln44": _coded(
        "16-bit samples, bare", "sln44", "pcm_s16le", "-f", "s16le", stored=((44100, 1),), raw=_raw("s16le", 44100)
    ),
}
