"""Reads a checkpoint's family, limits and licence from its JSON files, without torch and without weights."""

import hashlib
import importlib.resources
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from af3pipe.audio.segments import AudioLimits
from af3pipe.models.engine import ModelError

DEFAULT_MODEL = "nvidia/audio-flamingo-3-hf"

# config.json's model_type -> the class behind it. Audio Flamingo Next is a MusicFlamingo, too.
FAMILIES = {"audioflamingo3": "AudioFlamingo3", "musicflamingo": "MusicFlamingo"}

# Seconds, for a processor_config.json without max_audio_len: the defaults of the processors' own constructors
# (transformers 5.23, processing_audioflamingo3.py and processing_musicflamingo.py).
_DEFAULT_MAX_AUDIO_S = {"AudioFlamingo3": 600, "MusicFlamingo": 1200}

# The licence these model cards state; their front matter says `license: other`.
_NVIDIA_LICENCE = "NVIDIA OneWay Noncommercial License"
_NVIDIA_MODELS = ("nvidia/audio-flamingo-3", "nvidia/music-flamingo")

_CONFIG = "config.json"
_PROCESSOR = "processor_config.json"
_PREPROCESSOR = "preprocessor_config.json"
ADAPTER_CONFIG = "adapter_config.json"


class Checkpoint(NamedTuple):
    """A checkpoint as described by its JSON files.

    Attributes:
        model_id: Id as the user gave it: hub id, directory, or `demo`.
        revision: Commit on the hub; `sha256:` and 12 hex digits for a directory.
        path: The local directory; None for a checkpoint on the hub.
        family: `AudioFlamingo3` or `MusicFlamingo`.
        licence: Licence from the model card; `unknown` if it states none.
        limits: Shortest and longest audio of one segment.
        hop_length: Samples from one mel frame to the next.
    """

    model_id: str
    revision: str
    path: str | None
    family: str
    licence: str
    limits: AudioLimits
    hop_length: int

    @property
    def source(self) -> str:
        """The argument for `from_pretrained`."""
        return self.path or self.model_id

    def window_tokens(self, n_samples: int) -> tuple[int, ...]:
        """Returns the audio tokens of each window of a segment; a last one of a few samples gives none."""
        size = self.limits.window_samples
        lengths = (min(size, n_samples - start) for start in range(0, n_samples, size))
        return tuple(_tokens(length, self.hop_length) for length in lengths)

    def audio_tokens(self, n_samples: int) -> int:
        """Returns the number of audio placeholders in the prompt for a segment, as the processor computes it."""
        return sum(self.window_tokens(n_samples))


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Reads a checkpoint's description; from the hub it loads only the JSON files.

    Args:
        model: `demo`, a local directory, or a hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelError: It does not exist, is not reachable, or is not an Audio Flamingo; the message says what to do.
    """
    directory = _directory(model)
    files = _read_hub(model, revision) if directory is None else _read_directory(model, directory)
    config = files.json(_CONFIG)
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise ModelError(
            f"{model!r} is a {config.get('model_type')!r} checkpoint; "
            f"supported are those of model_type {', '.join(sorted(FAMILIES))}"
        )
    processor = files.json(_PROCESSOR)
    extractor = processor.get("feature_extractor") or files.json(_PREPROCESSOR)
    max_audio_s = processor.get("max_audio_len", extractor.get("max_audio_len", _DEFAULT_MAX_AUDIO_S[family]))
    return Checkpoint(
        model_id=model,
        revision=files.revision,
        path=None if directory is None else str(directory),
        family=family,
        licence=_licence(model, files),
        limits=_limits(model, extractor, max_audio_s),
        hop_length=int(_required(model, extractor, "hop_length")),
    )


def adapter_revision(directory: str) -> str:
    """Returns an id of an adapter directory's content, in the form of a checkpoint's: `sha256:` and 12 hex digits.

    Raises:
        ModelError: There is no adapter.
    """
    path = Path(directory).expanduser()
    if not (path / ADAPTER_CONFIG).is_file():
        found = "there is no such directory" if not path.is_dir() else f"it has no {ADAPTER_CONFIG}"
        raise ModelError(
            f"adapter {directory!r}: looked for a PEFT adapter in {path.absolute()}, but {found}; that of "
            f"{DEFAULT_MODEL} is the folder `think` of a downloaded copy"
        )
    return _directory_revision(path)


def model_revision(checkpoint: Checkpoint, adapter: str | None = None, quantize: str = "none") -> str:
    """Returns the revision of the weights, adapter and quantization included: other weights, another revision.

    Raises:
        ModelError: There is no such adapter.
    """
    added = [adapter_revision(adapter)] if adapter else []
    return "+".join([checkpoint.revision, *added, *([] if quantize == "none" else [quantize])])


class _Files(NamedTuple):
    """The small files of a checkpoint, by name; None for a missing one."""

    texts: dict[str, str | None]
    revision: str

    def json(self, name: str) -> dict[str, Any]:
        text = self.texts.get(name)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ModelError(f"{name} of the checkpoint is not JSON: {error}") from error
        return value if isinstance(value, dict) else {}


def _directory(model: str) -> Path | None:
    """Returns a checkpoint's local directory, or None for a name that can only be a hub id."""
    if model == "demo":
        return Path(str(importlib.resources.files("af3pipe.demo") / "checkpoint"))
    path = Path(model).expanduser()
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
    return path if path.is_dir() or looks_local else None


def _read_directory(model: str, directory: Path) -> _Files:
    if not (directory / _CONFIG).is_file():
        found = "there is no such directory" if not directory.is_dir() else f"it has no {_CONFIG}"
        raise ModelError(
            f"model {model!r}: looked for a checkpoint in {directory.absolute()}, but {found}; "
            f"give a directory written by save_pretrained, or a hub id such as {DEFAULT_MODEL}"
        )
    names = (_CONFIG, _PROCESSOR, _PREPROCESSOR, "README.md", "NOTICE", "NOTICE.md")
    texts = {name: _text(directory / name) for name in names}
    return _Files(texts, _directory_revision(directory))


def _read_hub(model: str, revision: str | None) -> _Files:
    texts: dict[str, str | None] = {}
    commit = ""
    for name in (_CONFIG, _PROCESSOR, _PREPROCESSOR, "README.md"):
        try:
            # Once config.json has named the commit, the others are taken from the same one.
            path = Path(hf_hub_download(model, name, revision=commit or revision))
        except (EntryNotFoundError, LocalEntryNotFoundError) as error:
            # Only config.json must be there. A cache filled by from_pretrained has no README, for example.
            if name == _CONFIG:
                raise _unreachable(model, revision, error) from error
            texts[name] = None
            continue
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise _unreachable(model, revision, error) from error
        texts[name] = path.read_text(encoding="utf-8")
        commit = path.parent.name  # .../snapshots/<commit>/config.json
    return _Files(texts, commit)


def _unreachable(model: str, revision: str | None, error: Exception) -> ModelError:
    at = f" at revision {revision!r}" if revision else ""
    reason = str(error).strip().partition("\n")[0]
    return ModelError(
        f"model {model!r}{at}: no directory of that name here, and its {_CONFIG} is neither in the local Hugging "
        f"Face cache nor to be had from the hub ({type(error).__name__}: {reason}). Check the name, log in if the "
        f"model is gated, or run `hf download {model}` on a machine with access and give its directory."
    )


def _directory_revision(directory: Path) -> str:
    """Returns an id of a directory's content without reading all of it: configs, and sizes and samples of weights.

    Names and sizes alone would not change with fine-tuning, and a rerun would skip work it must do.
    """
    digest = hashlib.sha256()
    for name in (_CONFIG, _PROCESSOR, _PREPROCESSOR, "generation_config.json", ADAPTER_CONFIG):
        digest.update((_text(directory / name) or "").encode())
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for part in range(16):
                file.seek(size * part // 16)
                digest.update(file.read(4096))
    return f"sha256:{digest.hexdigest()[:12]}"


def _limits(model: str, extractor: dict[str, Any], max_audio_s: float) -> AudioLimits:
    rate = int(_required(model, extractor, "sampling_rate"))
    chunk_s = _required(model, extractor, "chunk_length")
    window = int(rate * chunk_s)
    hop = int(_required(model, extractor, "hop_length"))
    return AudioLimits(
        sample_rate=rate,
        max_samples=int(max_audio_s // chunk_s) * window,
        min_samples=next(n for n in range(1, window + 1) if _tokens(n, hop)),
        window_samples=window,
    )


def _tokens(n_samples: int, hop: int) -> int:
    """Returns the audio tokens of one window: mel frames, halved by the second convolution, halved by the pooling.

    It follows `_get_feat_extract_output_lengths` in transformers' modeling_audioflamingo3.py.
    """
    frames = -(-n_samples // hop)
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def _required(model: str, extractor: dict[str, Any], key: str) -> float:
    value = extractor.get(key)
    if not isinstance(value, int | float) or value <= 0:
        raise ModelError(
            f"model {model!r} states no {key}: looked in feature_extractor of {_PROCESSOR} and in "
            f"{_PREPROCESSOR}; save its processor beside the weights (processor.save_pretrained)"
        )
    return value


def _licence(model: str, files: _Files) -> str:
    card = _front_matter(files.texts.get("README.md") or "")
    stated = card.get("license_name") or card.get("license", "")
    if model == "demo":
        notice = _text(Path(str(importlib.resources.files("af3pipe.demo") / "NOTICE.md"))) or ""
        found = re.search(r"(?is)^#+ *licen[cs]e\b.*?\[([^\]]+)\]\(", notice, re.MULTILINE)  # the first one linked to
        return stated or (found[1] if found else "see af3pipe/demo/NOTICE.md")
    if stated and stated != "other":
        return stated
    return _NVIDIA_LICENCE if model.startswith(_NVIDIA_MODELS) else stated or "unknown"


def _front_matter(text: str) -> dict[str, str]:
    """Parses the plain `key: value` lines between a model card's first two `---`."""
    block = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
    if not block:
        return {}
    return {key: value.strip("\"' ") for key, value in re.findall(r"(?m)^(\w+):[ \t]*(\S.*)$", block[1])}


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
