"""Checkpoints whose weights are no plain floats: made floats where that is exact, or refused.

A student is saved as plain floats, so a parent in another number format must become plain before
anything reads its experts. What transformers turns into floats while it loads is taken (MXFP4 of
gpt-oss, block-wise FP8 of DeepSeek-V3 and its like); all else is refused before weights load.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from rerail.errors import InputError
from rerail.moe.families import always_float32
from rerail.moe.stored_tensors import StoredTensor

READABLE = ("mxfp4", "fp8")
# names under which a config says that its weights are packed
_ENTRIES = ("quantization_config", "compression_config", "quantization")
_MODELOPT = "hf_quant_config.json"
_PACKED_BYTES = ("_blocks", "_scales")  # of MXFP4; elsewhere such names may be floats
_SCALES = "_scale_inv"
_PACKED_NAMES = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    _SCALES,
    ".absmax",
    ".quant_map",
    ".SCB",
)
_ALL_SCALES = (".weight_scale", ".weight_scale_inv", ".input_scale", ".scales", ".qzeros")
_PACKED_DTYPES = ("F8", "F6_", "F4")


def check_number_format(
    config: Any, tensors: Mapping[str, StoredTensor], folder: Path | None, name: str
) -> None:
    """Check that the weights are plain floats, or become plain while they load.

    Args:
        config: of transformers.
        tensors: of the checkpoint, where its files are there already.
        folder: of its files, where it is known.
        name: of the model, for the error.

    Raises:
        InputError: they are not; the sentence names the format.
    """
    entry = _entry(config)
    packed = next((n for n, tensor in tensors.items() if is_packed_tensor(n, tensor)), None)
    if entry is None:
        if folder is not None and (folder / _MODELOPT).is_file():
            raise _refusal(name, f"{_MODELOPT} beside its weights says that they are packed")
        if packed is not None:
            raise InputError(
                f"model {name!r} holds {packed} in {tensors[packed].dtype}, which is packed, and "
                "its config has no quantization_config to unpack it by; fetch the whole checkpoint"
            )
        return
    method = _method(entry)
    if method not in READABLE:
        raise _refusal(name, f"its config names the number format {method!r}")
    if reason := _unreadable(config, method, entry) or _uneven(tensors, entry):
        raise _refusal(name, f"its config names the number format {method!r} with {reason}")
    if tensors and packed is None:
        raise InputError(
            f"model {name!r} holds plain floats, and its config names the number format "
            f"{method!r}; remove quantization_config from its config.json"
        )


def check_scales_are_used(left_out: Iterable[str], name: str) -> None:
    """Check that no weight was loaded without the numbers that scale it.

    Args:
        left_out: tensors of the checkpoint that the model does not have.
        name: of the model, for the error.

    Raises:
        InputError: one was.
    """
    names = set(left_out)
    for tensor in names:
        if tensor.endswith(_ALL_SCALES) and f"{tensor.rpartition('.')[0]}.weight" not in names:
            raise _refusal(name, f"transformers loads it without its scales, {tensor} for one")


def unpacking(config: Any) -> dict[str, Any]:
    """Return what `from_pretrained` must be told to turn packed weights into floats."""
    entry = _entry(config)
    if entry is None:
        return {}
    made: Any = Mxfp4Config if _method(entry) == "mxfp4" else FineGrainedFP8Config
    return {"quantization_config": made(dequantize=True)}


def forget_packing(model: Any, dtype: Any) -> None:
    """Make a model that was unpacked while it loaded one of plain floats, in place.

    Unpacked tensors come in bfloat16 and would be saved under the names of the packed ones.

    Args:
        model: of transformers.
        dtype: of all its parameters, but for those that the family keeps in float32.
    """
    model._weight_conversions = None
    always = always_float32(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in always):
            parameter.data = parameter.data.to(dtype)


def is_packed(config: Any) -> bool:
    """Return whether a config says that its weights are packed."""
    return _entry(config) is not None


def is_packed_tensor(name: str, tensor: StoredTensor) -> bool:
    """Return whether a stored tensor is packed, or belongs to one that is."""
    bytes_only = tensor.dtype == "U8" and name.endswith(_PACKED_BYTES)
    return bytes_only or name.endswith(_PACKED_NAMES) or tensor.dtype.startswith(_PACKED_DTYPES)


def _entry(config: Any) -> Any:
    """Return what a config, or the config of its text model, says of packing; None for nothing."""
    for owner in (config, config.get_text_config()):
        for name in _ENTRIES:
            entry = getattr(owner, name, None)
            if entry is not None:
                return entry if isinstance(entry, Mapping) else getattr(entry, "__dict__", {})
    return None


def _method(entry: Mapping[str, Any]) -> str:
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes"
    method = entry.get("quant_method")
    return "unnamed" if method is None else str(getattr(method, "value", method))


def _unreadable(config: Any, method: str, entry: Mapping[str, Any]) -> str:
    """Return the setting for which a format that is read elsewhere is not read here."""
    if method == "mxfp4":
        return "" if config.model_type == "gpt_oss" else f"model_type={config.model_type!r}"
    if entry.get("scale_fmt", "float") not in (None, "float"):
        return f"scale_fmt={entry['scale_fmt']!r}"
    if entry.get("expert_dtype", "fp8") != "fp8":
        return f"expert_dtype={entry['expert_dtype']!r}"
    return ""


def _uneven(tensors: Mapping[str, StoredTensor], entry: Mapping[str, Any]) -> str:
    """Return the weight whose last block is cut off, which transformers scales by wrong blocks.

    It takes the number of scales for the number of equal blocks.
    """
    for name, scales in tensors.items():
        weight = tensors.get(name.removesuffix(_SCALES))
        if weight is None or not name.endswith(_SCALES) or scales.numbers == 1:
            continue
        blocks = entry.get("weight_block_size") or (1, weight.shape[-1])
        for size, count, block in zip(weight.shape[-2:], scales.shape[-2:], blocks, strict=False):
            if size % count or (count > 1 and size // count != block):
                return f"{count} scales for {size} numbers of {name.removesuffix(_SCALES)}"
    return ""


def _refusal(name: str, reason: str) -> InputError:
    return InputError(
        f"model {name!r} cannot be read as plain floats: {reason}; give a checkpoint in bfloat16, "
        f"float16 or float32, or in {' or '.join(READABLE)}, or remove the entry where the weights "
        "are plain floats already"
    )
