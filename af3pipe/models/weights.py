"""Loads a checkpoint's weights onto a device, merges an adapter, and quantizes the language model."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from af3pipe.models.engine import ModelError
from af3pipe.models.family import ADAPTER_CONFIG, Checkpoint
from af3pipe.models.inputs import load_error, revision_options

hf: Any = transformers  # typed in parts only: strict mypy refuses to call the rest

_NON_LORA = "non_lora_trainables.bin"
_PEFT_PREFIX = "base_model.model."

# Weights are saved under the released checkpoint's names; transformers' modules have been called otherwise since,
# and it renames only what `from_pretrained` loads ("qwen2_audio" in its conversion_mapping.py).
_RENAMED = {
    "language_model.lm_head": "lm_head",
    "language_model.model": "model.language_model",
    "audio_tower": "model.audio_tower",
    "multi_modal_projector": "model.multi_modal_projector",
}


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    attention: str = "sdpa",
    adapter: str | None = None,
    quantize: str = "none",
) -> Any:
    """Loads the family's model class with all of its weights, on the device, for inference.

    Args:
        checkpoint: The checkpoint.
        device: Device of the weights.
        dtype: Dtype of everything that is not quantized.
        attention: Attention implementation of the audio encoder, by Hugging Face's name.
        adapter: Directory of a PEFT LoRA that is merged into the weights, with `non_lora_trainables.bin` if it has
            one.
        quantize: `none`, or `int8` or `fp8` for the weights of the language model's linear layers. The head, the
            audio encoder and the projector are not quantized.

    Raises:
        ModelError: The model cannot be loaded here, weights are missing, or the adapter does not fit this model.
    """
    hf.utils.logging.disable_progress_bar()  # it would draw over the run's own line, and fill a worker's log
    try:
        model_class = getattr(hf, f"{checkpoint.family}ForConditionalGeneration")
        model, report = model_class.from_pretrained(
            checkpoint.source,
            dtype=dtype,
            # The language model keeps the default: not every kernel takes the masks that it is decoded with here.
            attn_implementation={"audio_config": attention},
            output_loading_info=True,
            **revision_options(checkpoint),
        )
        model = model.to(device).eval()
    except Exception as error:
        part = "its weights" if attention == "sdpa" else f"its weights, with attention {attention!r},"
        raise load_error(checkpoint, part, error) from error
    # transformers fills in missing weights at random and only warns.
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {checkpoint.model_id!r}: {len(missing)} weights are missing from {checkpoint.source} "
            f"({_some(missing)})"
        )
    if adapter is not None:
        model = _with_adapter(
            model, Path(adapter).expanduser(), f"adapter {adapter!r} for model {checkpoint.model_id!r}"
        )
    if quantize != "none":
        _quantize(model, quantize, device)
    return model


def _with_adapter(model: Any, directory: Path, what: str) -> Any:
    """Merges a LoRA into the model's weights, and replaces those that were trained in full.

    This is the model card's recipe for think mode (`load_state_dict(..., strict=False)`, then
    `PeftModel.from_pretrained`), but strict: done literally it loads nothing of `non_lora_trainables.bin`, because
    the names have changed, without an error.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(f"{what} needs peft, which is not installed here: pip install 'af3pipe[adapter]'") from error
    if not (directory / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{what}: there is no {ADAPTER_CONFIG} in {directory.absolute()}")
    try:
        if (directory / _NON_LORA).is_file():
            _load_non_lora(model, torch.load(directory / _NON_LORA, map_location="cpu", weights_only=True), what)
        config: Any = peft.PeftConfig.from_pretrained(str(directory))
        if config.peft_type != peft.PeftType.LORA:
            raise ModelError(f"{what} is of type {config.peft_type!s}; only LoRA can be merged")
        weights = _renamed_lora(model, peft.load_peft_weights(str(directory), device="cpu"), what)
        # Exactly the modules there are weights for: `q_proj` alone would name the audio encoder's layers, too.
        config.target_modules = {name.rpartition(".lora_")[0] for name in weights if ".lora_" in name}
        for pattern in (config.rank_pattern, config.alpha_pattern):
            for name in list(pattern):
                pattern[_rename(name)] = pattern.pop(name)
        merged = peft.get_peft_model(model, config)
        found: Any = peft.set_peft_model_state_dict(
            merged, {_PEFT_PREFIX + key: value for key, value in weights.items()}
        )
        lost = [*found.unexpected_keys, *(key for key in found.missing_keys if ".lora_" in key)]
        if lost:
            raise ModelError(f"{what}: {len(lost)} of its weights have no counterpart ({_some(lost)})")
        return merged.merge_and_unload(safe_merge=True).eval()
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise ModelError(f"{what} cannot be merged ({type(error).__name__}: {reason})") from error


def _load_non_lora(model: Any, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Loads weights that were trained in full beside a LoRA; each must belong to the model."""
    names = model.state_dict().keys()
    state = {_name_in(names, key.removeprefix(_PEFT_PREFIX)): value for key, value in state.items()}
    if unknown := sorted(state.keys() - names):
        raise ModelError(
            f"{what}: {len(unknown)} of {len(state)} weights in {_NON_LORA} are none of this model's "
            f"({_some(unknown)}); was it trained on another model?"
        )
    model.load_state_dict(state, strict=False)


def _renamed_lora(model: Any, weights: Mapping[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """Renames LoRA weights to the model's names; each must belong to a module of it, and there must be some."""
    modules = dict(model.named_modules()).keys()
    renamed = {}
    for key, value in weights.items():
        module, lora, rest = key.removeprefix(_PEFT_PREFIX).partition(".lora_")
        renamed[_name_in(modules, module) + lora + rest] = value
    targets = {key.partition(".lora_")[0] for key in renamed if ".lora_" in key}
    if not targets or (unknown := sorted(targets - modules)):
        found = _some(unknown) if targets else "it has no LoRA weights"
        raise ModelError(f"{what} matches no module of the model ({found}); was it trained on another model?")
    return renamed


def _rename(name: str) -> str:
    """Converts the released checkpoint's names to those of transformers' modules."""
    for released, current in _RENAMED.items():
        if name == released or name.startswith(f"{released}."):
            return current + name[len(released) :]
    return name


def _name_in(names: Collection[str], name: str) -> str:
    return name if name in names else _rename(name)


def _quantize(model: Any, scheme: str, device: torch.device) -> None:
    """Quantizes the weights of the language model's linear layers, in place."""
    if scheme not in ("int8", "fp8"):
        raise ModelError(f"quantize is {scheme!r}, which is not known; choose from none, int8, fp8")
    # torchao would take any device, and convert float8 by slow emulation without saying so.
    if scheme == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ModelError(
            f"quantize is 'fp8', but device {str(device)!r} does not know float8; that takes a CUDA device of "
            "compute capability 8.9 or later (L4, L40S, H100). Use int8 or none"
        )
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelError(
            f"quantize is {scheme!r}, which needs torchao; it is not installed here: pip install 'af3pipe[quantize]'"
        ) from error
    config = Int8WeightOnlyConfig() if scheme == "int8" else Float8WeightOnlyConfig()
    quantize_(model.model.language_model, config, filter_fn=lambda module, name: isinstance(module, torch.nn.Linear))


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3])
