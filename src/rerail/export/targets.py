"""The three targets of an export: what each builds, what it needs, and how it is written.

- `native`: plain experts under stock names; any reader of transformers checkpoints loads it.
- `package`: what the form stores; loads with stock `from_pretrained` after `import rerail.auto`.
- `remote`: the same, with its own modelling file; loads with `trust_remote_code=True`.

The last two have a model type of their own, so the Auto classes refuse them without their code, and
tensors that do not fit under the stock experts' names, so the family's own class refuses them too.
"""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rerail.compress.base import Compressor
from rerail.errors import InputError
from rerail.export.checkpoint import check_target, sizes_of, write_checkpoint
from rerail.export.classes import family_of
from rerail.export.native import WRITTEN_OUT, check_native, stock_model
from rerail.export.package import check_packaged, packaged_model
from rerail.export.remote import auto_map, modelling_file, module_name
from rerail.moe.families import always_float32
from rerail.moe.left_out import (
    LeftOut,
    left_out_of,
    misfits,
    part_counts,
    parts_of,
    withdraw_claims,
)
from rerail.moe.model import MoEModel
from rerail.plan.plan import Plan

log = logging.getLogger(__name__)

FORMS = ("native", "package", "remote")


def check_form(form: str) -> None:
    """Check the name of a target.

    Raises:
        InputError: there is none of that name.
    """
    if form not in FORMS:
        raise InputError(f"export.form={form!r} is not one of {', '.join(FORMS)}")


def check_method(method: Compressor, form: str = "native", densify: bool = False) -> None:
    """Check that a target can hold what a method leaves, as far as its choices tell: it costs none.

    Raises:
        InputError: it cannot.
    """
    check_form(form)
    stock, name = form == "native" or densify, type(method).__name__
    if stock and method.written_out == "never":
        raise InputError(
            f"export.form={form!r} with densify={densify} writes whole experts, and what {name} "
            "leaves is more than these can compute; use export.form=package without densify"
        )
    if form == "native" and not densify and method.written_out == "yes":
        raise InputError(
            f"export.form='native' cannot hold what {name} leaves: its experts are no whole "
            f"experts, one for each router row; {WRITTEN_OUT}"
        )


def check_student(student: MoEModel, form: str = "native", densify: bool = False) -> None:
    """Check that a target can hold a student; reads shapes only.

    Raises:
        InputError: it cannot.
    """
    check_form(form)
    if form == "native":
        check_native(student, densify)
    else:
        check_packaged(student, densify)


def built(student: MoEModel, form: str = "native", densify: bool = False) -> MoEModel:
    """Return the model that a target writes, in the dtype in which the student runs.

    Raises:
        InputError: as `check_student`.
    """
    check_form(form)
    if form == "native":
        return stock_model(student, densify)
    packaged = packaged_model(student, densify)
    if form == "remote":
        packaged.config.auto_map = auto_map(family_of(packaged.config))
    return packaged


def as_written(
    student: MoEModel,
    dtype: torch.dtype | None = None,
    densify: bool = False,
    form: str = "native",
) -> MoEModel:
    """Return the model that `export_student` writes, in the dtype in which the student runs.

    This is what a reload is compared with, and the rule is: the weights are rounded once to the
    written dtype, and both sides then compute in the student's running dtype. A bfloat16 checkpoint
    of a student that runs in float32 is therefore compared in float32 with the student whose
    weights went through bfloat16, and equal bits are expected. What the rounding itself changed is
    the difference between this model and the student: zero for weights that came from such a
    checkpoint, small for those that were made in float32 (trained router rows, merged or expanded
    experts).

    Raises:
        InputError: as `check_student`.
    """
    runs: torch.dtype = student.model.dtype
    return recast(recast(built(student, form, densify), dtype or runs), runs)


def recast(model: MoEModel, dtype: torch.dtype) -> MoEModel:
    """Return a copy whose parameters are in `dtype`; those that are in it stay the same objects.

    Never `.to(dtype)`, which would change shared Parameters in place. Parameters that the family
    keeps in float32 whatever the dtype (correction biases, say) are float32; buffers stay as they
    are, and so do solved tensors that have a dtype of their own.
    """
    inner = cast(Any, model.model)
    always = always_float32(inner, dtype)
    memo: dict[int, Any] = {id(b): b for b in inner.buffers()}
    banks = [bank for layer in model.layers for bank in layer.bank.nested()]
    solved = [p for bank in banks for p in bank.parameters(recurse=False)]
    memo |= {id(p): p for p in solved if p.dtype != inner.dtype}
    for name, parameter in inner.named_parameters():
        wide = any(part in name for part in always)
        memo.setdefault(id(parameter), _cast(parameter, torch.float32 if wide else dtype))
    return MoEModel(copy.deepcopy(inner, memo))


def _cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if parameter.dtype == dtype or not parameter.is_floating_point():
        return parameter
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


def export_student(  # noqa: PLR0913
    student: MoEModel,
    plan: Plan,
    path: Path,
    *,
    form: str = "native",
    tokenizer: Any = None,
    manifest: Mapping[str, Any] | None = None,
    densify: bool = False,
    dtype: torch.dtype | None = None,
    companions: Mapping[str, Path] | None = None,
) -> Path:
    """Write a checkpoint and return its path.

    The folder appears whole or not at all, and the student is not touched. A native checkpoint has
    the number of experts under every name that the family gives it; `num_experts_per_tok` needs no
    change, since no valid plan leaves fewer selectable rows.

    Args:
        student: what `apply_plan` returned, repaired or not.
        plan: the plan it came from, for the manifest.
        path: a new or empty folder, or an earlier export, which is replaced.
        form: `native`, `package` or `remote`.
        tokenizer: is written beside the weights, unless there are companions.
        manifest: further facts for `compression.json` (parent, choices, evaluation).
        densify: turn every stored form into one whole expert for each router row.
        dtype: of the parent's checkpoint; by default the one in which the student runs.
        companions: the parent's own files of tokenizer, generation and processors by name, which
            are copied byte for byte in the place of what transformers would write.

    Raises:
        InputError: the target cannot hold the student, `path` holds something else, or no space is
            left.
    """
    check_target(path)
    dtype = dtype or student.model.dtype
    written = recast(built(student, form, densify), dtype)
    facts = {
        **(manifest or {}),
        "target": form,
        "densified": densify,
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": sizes_of(written, dtype),
    }
    carried = _carried(student, written, facts)
    code = _code(written) if form == "remote" else {}
    return write_checkpoint(written.model, path, tokenizer, plan, facts, code, companions, carried)


def _carried(student: MoEModel, written: MoEModel, facts: dict[str, Any]) -> LeftOut:
    """Return what the parent has beside the model and the export takes over.

    The written config loses its claims to the rest, and the facts name both.
    """
    left_out = left_out_of(student.model)
    reasons = misfits(left_out, written.config)
    tensors = {n: t for n, t in left_out.tensors.items() if n not in reasons}
    if tensors:
        names = sorted(tensors)
        facts["carried"] = {"tensors": len(names), "parts": parts_of(names), "names": names}
    if reasons:
        withdraw_claims(written.config, reasons)
        why = sorted(set(reasons.values()))
        facts["left_out"] = {"tensors": len(reasons), "parts": parts_of(reasons), "reasons": why}
        log.warning(
            "%d tensors of the parent are left out of the export, %s: %s",
            len(reasons),
            part_counts(reasons),
            "; ".join(why),
        )
    return LeftOut(tuple(tensors), tensors, left_out.folder)


def _code(written: MoEModel) -> dict[str, str]:
    """Return the modelling file by its name."""
    family = family_of(written.config)
    layers = written.config.rerail["layers"]
    kinds = [bank["kind"] for entry in layers for bank in entry["banks"]]
    return {f"{module_name(family)}.py": modelling_file(family, kinds)}
