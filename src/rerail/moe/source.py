"""Where a model comes from. Building a source loads nothing."""

import functools
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rerail.errors import InputError
from rerail.files import digest, file_digest
from rerail.moe.families import check_family
from rerail.moe.model import MoEModel

_HASHED_WHOLE = 2**31
_HASHED_KINDS = (".json", ".safetensors", ".bin", ".model", ".txt", ".py")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


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
    """

    path_or_id: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | Mapping[str, str | int] | None = None
    experts_implementation: str | None = None
    remote_code: bool = False
    refuse: str | None = None

    def __post_init__(self) -> None:
        """Check the words."""
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
            InputError: refused, not found, no network, remote code, or a family outside the seam.
        """
        if self.refuse:
            raise InputError(f"model {self.path_or_id!r} is not supported: {self.refuse}")
        config = self._from(AutoConfig)
        check_family(config.model_type)
        return config

    def meta(self) -> MoEModel:
        """Return the model on the meta device: all shapes, no weights."""
        config = self.config()
        with torch.device("meta"):
            model = self._readable(AutoModelForCausalLM.from_config, config)
        return MoEModel(model)

    def tokenizer(self) -> Any:
        """Return the tokenizer; one without a padding token pads with end-of-text.

        Raises:
            InputError: not found, or it has no vocabulary or no end-of-text token.
        """
        tokenizer = self._from(AutoTokenizer)
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
        dtype: Any = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        if device == "cpu" and self.dtype == "auto" and self.device_map is None:
            dtype = torch.float32
        implementation = self.experts_implementation or ("eager" if device == "cpu" else None)
        extra = {"experts_implementation": implementation} if implementation else {}
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
        if self.device_map is None:
            model.to(device)
        elif outside := [name for name, p in model.named_parameters() if p.is_meta]:
            raise InputError(
                f"model.device_map={self.device_map!r} leaves {len(outside)} tensors of "
                f"{self.path_or_id!r} on no device, {outside[0]} for one; use more or larger GPUs"
            )
        model.eval().requires_grad_(False)
        _check_finite(model, self.path_or_id)
        return MoEModel(model)

    def stored_dtype(self) -> torch.dtype | None:
        """Return the dtype of the checkpoint, not the one to load in; None where it names none."""
        dtype = getattr(self.config(), "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else None

    def itemsize(self) -> int:
        """Return the bytes of a number in the checkpoint's dtype; 2 where no dtype is stated."""
        dtype = self.stored_dtype()
        return 2 if dtype is None else dtype.itemsize

    def fingerprint(self) -> str:
        """Return a hash of the files of a folder, or of hub id and commit.

        Files that weigh more than 2 GiB together are told apart by name, size and time of change.
        """
        folder = Path(self.location)
        if not folder.is_dir():
            return digest([self.path_or_id, getattr(self.config(), "_commit_hash", self.revision)])
        files = sorted(p for p in folder.iterdir() if p.suffix in _HASHED_KINDS)
        stats = [p.stat() for p in files]
        if sum(s.st_size for s in stats) >= _HASHED_WHOLE:
            marks = [f"{s.st_size}.{s.st_mtime_ns}" for s in stats]
        else:
            marks = [
                _hash_of(p, (s.st_size, s.st_mtime_ns)) for p, s in zip(files, stats, strict=True)
            ]
        return digest([(p.name, mark) for p, mark in zip(files, marks, strict=True)])

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
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(
                f"model {self.path_or_id!r} could not be read ({_first_line(error)}); give a local "
                "folder, or a hub id with a network or a filled cache"
            ) from error
        except SafetensorError as error:
            raise InputError(
                f"model {self.path_or_id!r} has a damaged safetensors file ({_first_line(error)}); "
                "fetch it again"
            ) from error
        except ValueError as error:
            raise InputError(f"model {self.path_or_id!r}: {_first_line(error)}") from error
        except RuntimeError as error:
            if "above report" not in str(error):
                raise
            raise InputError(
                f"model {self.path_or_id!r} does not fit its config: tensors are lacking or have "
                "other shapes (the load report above names them); load a complete checkpoint"
            ) from error


def _zoo() -> Path:
    return Path(str(importlib.resources.files("rerail.zoo")))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


@functools.cache
def _hash_of(path: Path, _: tuple[int, int]) -> str:
    """Return the hash of a file, read once as long as size and time of change stay the same."""
    return file_digest(path)


def _check_finite(model: torch.nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor.sum()):
            if bool(torch.isfinite(tensor).all()):
                continue
            raise InputError(
                f"model {name!r} holds NaN or infinity in {key}; load a sound checkpoint"
            )
