"""Where a model comes from. Building a source loads nothing."""

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rerail.errors import InputError
from rerail.files import digest, file_digest
from rerail.moe.layer import MoEModel
from rerail.moe.traits import OUTSIDE_THE_SEAM

_HASHED_WHOLE = 2**31


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint by folder, hub id or `zoo:<name>`.

    Attributes:
        path_or_id: what to load.
        revision: of a hub repository.
        dtype: `auto` is the checkpoint's own, except on a CPU, where it is float32.
        device: `auto` is the first GPU where there is one.
        device_map: for models larger than one GPU; see transformers.
        experts_implementation: by default `eager` on a CPU, and the model's own elsewhere.
        remote_code: run the repository's own code; off unless asked for.
        refuse: a reason for which this model is not supported.
    """

    path_or_id: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    experts_implementation: str | None = None
    remote_code: bool = False
    refuse: str | None = None

    @property
    def location(self) -> str:
        """The folder or hub id; a zoo name becomes the package's folder."""
        if self.path_or_id.startswith("zoo:"):
            return str(
                importlib.resources.files("rerail.zoo") / self.path_or_id.removeprefix("zoo:")
            )
        return self.path_or_id

    def config(self) -> Any:
        """Return the transformers config.

        Raises:
            InputError: refused, not found, no network, remote code, or a family outside the seam.
        """
        if self.refuse:
            raise InputError(f"model {self.path_or_id!r} is not supported: {self.refuse}")
        config = self._from(AutoConfig)
        if config.model_type in OUTSIDE_THE_SEAM:
            reason = OUTSIDE_THE_SEAM[config.model_type]
            raise InputError(f"model family {config.model_type!r} is not supported: {reason}")
        return config

    def meta(self) -> MoEModel:
        """Return the model on the meta device: all shapes, no weights."""
        with torch.device("meta"):
            return MoEModel(AutoModelForCausalLM.from_config(self.config()))

    def tokenizer(self) -> Any:
        """Return the tokenizer; text without a padding token pads with end-of-text."""
        tokenizer = self._from(AutoTokenizer)
        tokenizer.model_max_length = int(1e9)
        return tokenizer

    def load(self) -> MoEModel:
        """Return the frozen model in eval mode.

        Raises:
            InputError: as `config`, or the weights hold NaN or infinity.
        """
        config = self.config()
        device = self._device()
        dtype: Any = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        if device == "cpu" and self.dtype == "auto" and self.device_map is None:
            dtype = torch.float32
        implementation = self.experts_implementation or ("eager" if device == "cpu" else None)
        extra = {"experts_implementation": implementation} if implementation else {}
        model = self._from(
            AutoModelForCausalLM, config=config, dtype=dtype, device_map=self.device_map, **extra
        )
        if self.device_map is None:
            model.to(device)
        model.eval().requires_grad_(False)
        _check_finite(model, self.path_or_id)
        return MoEModel(model)

    def itemsize(self) -> int:
        """Return the bytes of a number in the checkpoint's dtype; 2 where the config does not say."""
        dtype = getattr(self.config(), "dtype", None)
        return dtype.itemsize if isinstance(dtype, torch.dtype) else 2

    def fingerprint(self) -> str:
        """Return a hash of the weights' files, or of hub id and commit."""
        folder = Path(self.location)
        if not folder.is_dir():
            return digest([self.path_or_id, getattr(self.config(), "_commit_hash", self.revision)])
        files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
        whole = sum(p.stat().st_size for p in files) < _HASHED_WHOLE
        return digest([(p.name, file_digest(p) if whole else p.stat().st_size) for p in files])

    def _device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def _from(self, auto: Any, **options: Any) -> Any:
        folder = Path(self.location)
        looks_local = self.location.startswith((".", "/", "~")) or self.path_or_id.startswith(
            "zoo:"
        )
        if looks_local and not (folder / "config.json").exists():
            raise InputError(
                f"model {self.path_or_id!r} does not exist: there is no {folder / 'config.json'}"
            )
        try:
            return auto.from_pretrained(
                self.location, revision=self.revision, trust_remote_code=self.remote_code, **options
            )
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(
                f"model {self.path_or_id!r} could not be read ({str(error).splitlines()[0]}); give a local "
                "folder, or a hub id with a network or a filled cache"
            ) from error
        except ValueError as error:
            raise InputError(f"model {self.path_or_id!r}: {str(error).splitlines()[0]}") from error


def _check_finite(model: torch.nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor.sum()):
            if bool(torch.isfinite(tensor).all()):
                continue
            raise InputError(
                f"model {name!r} holds NaN or infinity in {key}; load a sound checkpoint"
            )
