"""Where a model comes from. Building a source loads nothing."""

import functools
import importlib.resources
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from rerail.errors import InputError
from rerail.files import digest, file_digest
from rerail.moe.families import check_family
from rerail.moe.left_out import is_sense, left_out_of, not_carried, note_left_out, part_counts
from rerail.moe.model import MoEModel
from rerail.moe.number_format import (
    check_number_format,
    check_scales_are_used,
    forget_packing,
    is_packed,
    unpacking,
)
from rerail.moe.stored_tensors import main_dtype, stored_tensors
from rerail.moe.tokenizer import FILE, true_to_file

log = logging.getLogger(__name__)

_HASHED_WHOLE = 2**31
_DEEPEST = 10_000  # layers of a model whose weights are not here yet
_HASHED_KINDS = (".json", ".safetensors", ".bin", ".model", ".txt", ".py")
_NAME = re.compile(r"[^\W_][\w.-]{0,63}", re.ASCII)
_DTYPES = ("auto", "float32", "bfloat16", "float16")
# what stands beside the weights and does not change with them
_COMPANIONS = (
    "tokenizer*.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*.jin*",
    "chat_template*.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "*processor_config.json",
    "tokenization_*.py",
    "processing_*.py",
)


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint by folder, hub id or `zoo:<name>`.

    Attributes:
        path_or_id: what to load.
        revision: of a hub repository.
        dtype: `auto` is the checkpoint's own, except on a CPU, where it is float32.
        device: `auto` is the first GPU where there is one.
        device_map: for models larger than one GPU, `auto` or module -> device (transformers'
            words): statistics and evaluations run where it puts them. All weights must have a
            device: none may be left on the disk.
        experts_implementation: by default `eager` on a CPU, and the model's own elsewhere.
        remote_code: run the repository's own code; off unless asked for.
        refuse: a reason for which this model is not supported.
        name: in rows and folders; by default that of the preset, or made from the path.
    """

    path_or_id: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | Mapping[str, str | int] | None = None
    experts_implementation: str | None = None
    remote_code: bool = False
    refuse: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        """Check the words."""
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise InputError(
                f"model.name={self.name!r} names folders: allowed are 1 to 64 letters, digits and "
                "any of _ . -, of which the first is a letter or a digit"
            )
        if self.dtype not in _DTYPES:
            raise InputError(f"model.dtype={self.dtype!r} is not one of {', '.join(_DTYPES)}")

    @property
    def location(self) -> str:
        """The folder or hub id; a zoo name becomes the package's folder."""
        if self.path_or_id.startswith("zoo:"):
            return str(_zoo() / self.path_or_id.removeprefix("zoo:"))
        if self.path_or_id.startswith("~"):
            return str(Path(self.path_or_id).expanduser())
        return self.path_or_id

    def config(self) -> Any:
        """Return the transformers config.

        Raises:
            InputError: refused, not found, no network, remote code, a family outside the seam, or
                weights in a number format that cannot become plain floats.
        """
        if self.refuse:
            raise InputError(f"model {self.path_or_id!r} is not supported: {self.refuse}")
        config = self._from(AutoConfig)
        check_family(config.model_type)
        folder = self.folder()
        tensors = stored_tensors(folder) if folder else {}
        _check_depth(config, tensors, self.path_or_id)
        check_number_format(config, tensors, folder, self.path_or_id)
        return config

    def meta(self) -> MoEModel:
        """Return the model on the meta device: all shapes, no weights."""
        config = self.config()
        with torch.device("meta"):
            model = self._readable(AutoModelForCausalLM.from_config, config)
        return MoEModel(model)

    def tokenizer(self) -> Any:
        """Return the tokenizer; one without a padding token pads with end-of-text.

        Its ids are those of `tokenizer.json`, where the checkpoint has that file.

        Raises:
            InputError: not found, it has no vocabulary or no end-of-text token, or it gives other
                ids than its file.
        """
        tokenizer = self._from(AutoTokenizer)
        if (file := self._file(FILE)) is not None:
            tokenizer = self._readable(true_to_file, tokenizer, file, self.path_or_id)
        if len(tokenizer) < 2 or tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer of model {self.path_or_id!r} has {len(tokenizer)} entries and "
                f"end-of-text token {tokenizer.eos_token!r}; put the model's own tokenizer files "
                "beside its weights"
            )
        tokenizer.model_max_length = int(1e9)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self) -> MoEModel:
        """Return the frozen model in eval mode.

        Raises:
            InputError: as `config`; or weights are damaged, absent, or hold NaN or infinity.
        """
        config = self.config()
        device = self._device()
        dtype = self._running_dtype(device)
        implementation = self.experts_implementation or ("eager" if device == "cpu" else None)
        extra = {"experts_implementation": implementation} if implementation else {}
        extra |= unpacking(config)
        model, report = self._from(
            AutoModelForCausalLM,
            config=config,
            dtype=dtype,
            device_map=self.device_map,
            output_loading_info=True,
            **extra,
        )
        if absent := sorted(report["missing_keys"]):
            # transformers fills them with random numbers and only logs it
            raise InputError(
                f"model {self.path_or_id!r} lacks {len(absent)} of its tensors, {absent[0]} for "
                "one; load a complete checkpoint of this family"
            )
        unused = sorted(report["unexpected_keys"])
        if unused and getattr(config, "rerail", None):  # of a package every tensor has its place
            manifest = self._file("compression.json") or Path("compression.json")
            if strange := not_carried(model, unused, manifest):
                raise InputError(
                    f"model {self.path_or_id!r} holds {len(strange)} tensors for which its config "
                    f"has no place, {strange[0]} for one; fetch it again"
                )
        self._note_left_out(model, unused)
        if self.device_map is None:
            model.to(device)
        elif outside := [name for name, p in model.named_parameters() if p.is_meta]:
            raise InputError(
                f"model.device_map={self.device_map!r} leaves {len(outside)} tensors of "
                f"{self.path_or_id!r} on no device, {outside[0]} for one; use more or larger GPUs"
            )
        if is_packed(config):
            forget_packing(model, dtype)
        model.eval().requires_grad_(False)
        _check_finite(model, self.path_or_id)
        return MoEModel(model)

    def stored_dtype(self) -> torch.dtype:
        """Return the dtype of the checkpoint, not the one to load in: an export is written in it.

        Most of the stored numbers decide; the config does where they are packed or not there yet,
        and where it names none they load as float32.
        """
        config, folder = self.config(), self.folder()
        if folder and (dtype := main_dtype(stored_tensors(folder))) and not is_packed(config):
            return dtype
        for owner in (config, config.get_text_config()):
            if isinstance(dtype := getattr(owner, "dtype", None), torch.dtype):
                return dtype
        return torch.bfloat16 if is_packed(config) else torch.float32

    def itemsize(self) -> int:
        """Return the bytes of a number in the checkpoint's dtype."""
        return self.stored_dtype().itemsize

    def fingerprint(self) -> str:
        """Return a hash of the files of a folder, or of hub id and commit.

        Files that weigh more than 2 GiB together are told apart by name, size and time of change.
        """
        folder = Path(self.location)
        if not folder.is_dir():
            return digest([self.path_or_id, getattr(self.config(), "_commit_hash", self.revision)])
        return cast(str, self._readable(_fingerprint, folder))

    def folder(self) -> Path | None:
        """Return the folder of the checkpoint's files, also in the hub's cache; None for none."""
        path = self._file("config.json")
        return None if path is None else path.parent

    def companions(self) -> dict[str, Path]:
        """Return the files beside the weights that an export takes over, by their relative names.

        Those are the files of tokenizer, chat template, generation and processors.
        """
        folder = self.folder()
        if folder is None:
            return {}
        paths = sorted({p for pattern in _COMPANIONS for p in folder.glob(pattern)})
        return {p.relative_to(folder).as_posix(): p for p in paths if p.is_file()}

    def _running_dtype(self, device: str) -> torch.dtype:
        """Return the dtype to load in."""
        if self.dtype != "auto":
            return cast(torch.dtype, getattr(torch, self.dtype))
        if device == "cpu" and self.device_map is None:
            return torch.float32
        return self.stored_dtype()

    def _note_left_out(self, model: Any, unexpected: Iterable[str]) -> None:
        """Say which tensors of the checkpoint the model has no place for.

        Raises:
            InputError: one of them scales weights that were loaded without it.
        """
        folder = self.folder()
        note_left_out(model, stored_tensors(folder) if folder else {}, unexpected, folder)
        names = left_out_of(model).names
        if not names:
            return
        check_scales_are_used(names, self.path_or_id)
        log.warning(
            "model %r has %d tensors that its class %s has no place for: %s; they take no part in "
            "anything that is measured, and an export carries them over where they still fit",
            self.path_or_id,
            len(names),
            type(model).__name__,
            part_counts(names),
        )

    def _file(self, name: str) -> Path | None:
        """Return a file of the checkpoint, None where there is none."""
        path = Path(self.location)
        if path.is_dir():
            return path / name if (path / name).is_file() else None
        cached = cached_file(
            self.location,
            name,
            revision=self.revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if cached is None else Path(cached)

    def _device(self) -> str:
        gpu = torch.cuda.is_available()
        if self.device == "auto":
            return "cuda" if gpu else "cpu"
        if self.device.startswith("cuda") and not gpu:
            raise InputError(f"model.device={self.device!r}: no GPU is there; use auto or cpu")
        return self.device

    def _from(self, auto: Any, **options: Any) -> Any:
        folder = Path(self.location)
        zoo = self.path_or_id.startswith("zoo:")
        looks_local = zoo or self.location.startswith((".", "/"))
        if looks_local and not (folder / "config.json").exists():
            names = [p.parent.name for p in sorted(_zoo().glob("*/config.json"))]
            allowed = (
                f"the zoo has {', '.join(names)}" if zoo else "give a folder with a checkpoint"
            )
            raise InputError(
                f"model {self.path_or_id!r} does not exist: no {folder / 'config.json'}; {allowed}"
            )
        return self._readable(
            auto.from_pretrained,
            self.location,
            revision=self.revision,
            trust_remote_code=self.remote_code,
            **options,
        )

    def _readable(self, read: Any, *args: Any, **options: Any) -> Any:
        """Call `read`; what transformers has against the checkpoint becomes a sentence."""
        try:
            return read(*args, **options)
        except (InputError, MemoryError):
            raise
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            if "above report" not in str(error):
                raise InputError(f"model {self.path_or_id!r} {_complaint(error)}") from error
            raise InputError(
                f"model {self.path_or_id!r} does not fit its config: tensors are lacking or have "
                "other shapes (the load report above names them); load a complete checkpoint"
            ) from error
        except Exception as error:  # files of another shape than expected fail anywhere
            raise InputError(f"model {self.path_or_id!r} {_complaint(error)}") from error


def _check_depth(config: Any, tensors: Iterable[str], name: str) -> None:
    """Check that the checkpoint has layers as the config counts them: building them takes time."""
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    numbers = [int(n) for path in tensors for n in re.findall(r"\.(\d{1,9})\.", path)]
    most = max(numbers, default=_DEEPEST - 1) + 1  # layers, or experts of a layer
    if isinstance(count, int) and not 1 <= count <= most:
        raise InputError(
            f"model {name!r} has num_hidden_layers={str(count)[:20]} in its config.json, and its "
            f"weights count to {most}; fetch it again"
        )


def _complaint(error: Exception) -> str:
    """Return what a failure says about a model, and what to do."""
    reason = (str(error).strip() or "no reason was given").splitlines()[0]
    if isinstance(error, OSError | json.JSONDecodeError) and not isinstance(error, ImportError):
        return (
            f"could not be read ({reason}); give a local folder, or a hub id with a network or a "
            "filled cache"
        )
    if isinstance(error, SafetensorError):
        return f"has a damaged safetensors file ({reason}); fetch it again"
    if "Unrecognized configuration class" in reason:
        return (
            "is not supported: transformers has no causal language model of its family; name a "
            "decoder that writes text"
        )
    if isinstance(error, ValueError | ImportError):
        return f"cannot be used: {reason}"
    return (
        f"could not be read ({type(error).__name__}: {reason}); its files are damaged, or of "
        "another kind than this version of transformers reads"
    )


def _zoo() -> Path:
    return Path(str(importlib.resources.files("rerail.zoo")))


def _fingerprint(folder: Path) -> str:
    files = sorted(p for p in folder.iterdir() if p.suffix in _HASHED_KINDS and p.is_file())
    stats = [p.stat() for p in files]
    if sum(s.st_size for s in stats) >= _HASHED_WHOLE:
        marks = [f"{s.st_size}.{s.st_mtime_ns}" for s in stats]
    else:
        marks = [_hash_of(p, (s.st_size, s.st_mtime_ns)) for p, s in zip(files, stats, strict=True)]
    return digest([(p.name, mark) for p, mark in zip(files, marks, strict=True)])


@functools.cache
def _hash_of(path: Path, _: tuple[int, int]) -> str:
    """Return the hash of a file, read once as long as size and time of change stay the same."""
    return file_digest(path)


def _check_finite(model: torch.nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        # towers may clip at infinity
        if is_sense(key):
            continue
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor.sum()):
            if bool(torch.isfinite(tensor).all()):
                continue
            raise InputError(
                f"model {name!r} holds NaN or infinity in {key}; load a sound checkpoint"
            )
