"""Closed-form router baselines: least squares in the place of distillation.

At the same tokens let x_S be what the student's router multiplies its rows with in one layer, x_T
what the teacher's does, and z(x) = W_0 x + b_0 the logits before their score (softmax, sigmoid):

    W = argmin_W  sum_t ||W x_S,t + b_0 - z(x_T,t)||^2 + lambda ||W - W_0||^2
      = W_0 + W_0 D (G + lambda 1)^-1,     G = sum_t x_S x_S^T,   D = sum_t (x_T - x_S) x_S^T

Of a router that was sliced, W_0 are the kept rows, so z(x_T) are the teacher's logits of the kept
slots; a masked router's dropped rows stay as they are; pooled rows are asked for what they would
answer on the teacher's inputs. Rows and bias together are the same with (x, 1) in the place of the
last x of D and of both of G; the bias alone is b = b_0 + mean_t W_0 (x_T - x_S) as lambda -> 0.
Correction biases, which choose experts and are no logit, stay as they are.

Layers are solved in their order, each on the inputs that the layers repaired before it leave
(`sequential`, one pass of both models a layer up to it), or all of them in one pass. Both match
logits where Router KD matches what the model says; the KL on held-out calibration blocks decides
whether the rows are kept, as it chooses the best step there. Ours: closed-form calibration is
common (arXiv 2606.03391 for merged models), and this form of it is the plainest.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rerail.compress.solvers.least_squares import ridge_solution
from rerail.distill.repair import Repair, set_router_rows
from rerail.distill.settings import Ridge
from rerail.distill.trainable import select_parameters
from rerail.errors import InputError, OutOfReach
from rerail.evaluate.perplexity import score_blocks
from rerail.moe.model import MoELayer, MoEModel
from rerail.moe.router_scores import router_product
from rerail.parallel import is_first, my_share, reduce_in_rank_order
from rerail.statistics.collect import Batch
from rerail.text.calibration import TokenBlocks

if TYPE_CHECKING:  # its module imports Lightning, which takes seconds
    from rerail.distill.curve import Report

log = logging.getLogger(__name__)

Sums = dict[int, tuple[Tensor, Tensor]]


def check_ridge(layers: Sequence[MoELayer], settings: Ridge, blocks: int) -> None:
    """Check what can be checked before weights load; layers may lie on the meta device.

    Raises:
        InputError: there is too little text.
        OutOfReach: a bias is to be fitted, and a router adds none to its logits.
    """
    if settings.train_blocks(blocks) < 1:
        raise InputError(
            f"{blocks} calibration block leaves none to fit on beside the one that validates; ask "
            "for more samples"
        )
    for layer in layers:
        if "bias" in settings.trains and len(select_parameters(layer, "router_rows+bias")) == 1:
            raise OutOfReach(
                f"distill.trains={settings.trains!r} fits a bias, and the router of layer "
                f"{layer.index} adds none to its logits (a correction bias only chooses experts); "
                "use distill=ridge with distill.trains=router_rows"
            )


def ridge_repair(
    student: MoEModel,
    teacher: MoEModel,
    blocks: TokenBlocks,
    settings: Ridge,
    report: "Report | None" = None,
) -> Repair:
    """Solve for the student's routers in place on the leading calibration blocks.

    In a group of processes all must call it, and each reads its part of the text.

    Args:
        student: the compressed model.
        teacher: the original one.
        blocks: calibration text; its last share validates.
        settings: of the fit.
        report: called with the points before (step 0) and after (step 1).

    Raises:
        InputError: as `check_ridge`, or a router has no logits.
    """
    check_ridge(student.layers, settings, len(blocks))
    batches = list(blocks.batches(settings.batch_size))
    states = score_blocks(teacher, batches).hidden
    assert states is not None
    before = {n: r for la in student.layers for n, r in _rows(la, settings.trains).items()}
    curve = [_point(0, student, states, batches, settings)]
    fitted = list(blocks.first(settings.train_blocks(len(blocks))).batches(settings.batch_size))
    after = solve(student, teacher, fitted, settings)
    curve.append(_point(1, student, states, batches, settings))
    best = int(curve[1]["val_kl"] < curve[0]["val_kl"])
    # tensors of their own, as a file of both must have
    kept = after if best else {n: row.clone() for n, row in before.items()}
    set_router_rows(student, kept)
    if report is not None and is_first():
        for point in curve:
            report(point, 1)
    kls = [point["val_kl"] for point in curve]
    return Repair(kls[0], kls[best], kls[1], best, 1, curve, before, kept)


def solve(
    student: MoEModel,
    teacher: MoEModel,
    batches: Sequence[Batch],
    settings: Ridge,
) -> dict[str, Tensor]:
    """Put the solved rows into a student layer by layer, and return them as in `Repair.after`."""
    layers, rows = student.layers, dict[str, Tensor]()
    for group in [[la] for la in layers] if settings.sequential else [layers]:
        sums = input_moments(student, teacher, [la.index for la in group], batches)
        for layer in group:
            rows |= solved_rows(layer, *sums[layer.index], settings)
        set_router_rows(student, rows)
        log.info("solved the routers of layers %d-%d", group[0].index, group[-1].index)
    return rows


def solved_rows(layer: MoELayer, gram: Tensor, moved: Tensor, settings: Ridge) -> dict[str, Tensor]:
    """Return the solved rows (E, H) (and bias (E,)) by name, as in `Repair.after`, float32.

    Args:
        layer: of the student, with the rows W_0.
        gram: G of (x_S, 1), float64 (H + 1, H + 1).
        moved: sum over tokens of (x_T - x_S) (x_S, 1)^T, float64 (H, H + 1).
        settings: of the fit.
    """
    rows = layer.router_rows.detach().double().to(gram.device)
    width = rows.shape[1]
    columns = slice(0 if "rows" in settings.trains else width, width + ("bias" in settings.trains))
    cross = (rows @ moved)[:, columns]
    step = ridge_solution(gram[columns, columns], cross, torch.zeros_like(cross), settings.ridge)
    fixed = torch.ones(len(rows), dtype=torch.bool, device=step.device)
    fixed[list(layer.selectable_rows)] = False
    step[fixed] = 0
    parts = {False: step[:, :width], True: step[:, -1]}  # of rows, of a bias
    old = _rows(layer, settings.trains)
    return {n: (r.double() + parts[r.dim() == 1].cpu()).float() for n, r in old.items()}


@torch.no_grad()
def input_moments(
    student: MoEModel,
    teacher: MoEModel,
    layers: Sequence[int],
    batches: Sequence[Batch],
) -> Sums:
    """Return, for each layer, the sums over real tokens that `solved_rows` reads, float64."""
    sums: Sums = {}
    for ids, mask in my_share(batches)[1]:
        inputs, targets = (router_inputs_of(m, layers, ids, mask) for m in (student, teacher))
        for i, x in inputs.items():
            # a column of ones at the end stands for the bias
            one = torch.cat([x.double(), x.new_ones(len(x), 1).double()], dim=1)
            moved = (targets[i].to(x.device).double() - x.double()).mT @ one
            gram, cross = sums.get(i, (0, 0))
            sums[i] = gram + one.mT @ one, cross + moved
    return {i: _over_processes(sums.get(i, (torch.zeros(()),) * 2)) for i in layers}


def _over_processes(sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    gram, moved = (reduce_in_rank_order(total.cpu(), torch.add) for total in sums)
    return gram, moved


def router_inputs_of(
    model: MoEModel, layers: Sequence[int], ids: Tensor, mask: Tensor
) -> dict[int, Tensor]:
    """Return what the routers of some layers multiply their rows with, (T, H) of real tokens.

    Raises:
        InputError: a router has no logits with one column for each of its rows.
    """
    device = next(model.model.parameters()).device
    real, caught = mask.flatten(), dict[int, Tensor]()
    with _catching([la for la in model.layers if la.index in layers], caught):
        model.hidden(ids.to(device), mask.to(device))
    return {i: x[real.to(x.device)] for i, x in caught.items()}


class _Enough(Exception):
    """The last layer that is asked for has routed."""


@contextlib.contextmanager
def _catching(layers: Sequence[MoELayer], caught: dict[int, Tensor]) -> Iterator[None]:
    def catch(layer: MoELayer) -> Callable[..., None]:
        def hook(_router: object, args: object, named: object, _output: object) -> None:
            inputs, _ = router_product(layer.router, args, named, layer.num_experts)
            if inputs is None:
                raise InputError(
                    f"the router of layer {layer.index} makes no logits with one column for each "
                    f"of its {layer.num_experts} rows, so it has no closed form; use "
                    "distill=router_kd"
                )
            caught[layer.index] = inputs
            if layer is layers[-1]:
                raise _Enough

        return hook

    hooks = [la.router.register_forward_hook(catch(la), with_kwargs=True) for la in layers]
    try:
        with contextlib.suppress(_Enough):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _rows(layer: MoELayer, trains: str) -> dict[str, Tensor]:
    """Return what is solved for, float32 on the CPU, named as in `Repair.before`."""
    chosen = select_parameters(layer, "router_rows+bias")
    chosen = chosen[not trains.startswith("router_rows") :][: 1 + trains.endswith("+bias")]
    return {
        f"layers.{layer.index}.router.{name}": getattr(owner, name).detach().float().cpu().clone()
        for owner, name in chosen
    }


def _point(
    step: int, student: MoEModel, states: Tensor, batches: Sequence[Batch], settings: Ridge
) -> dict[str, float]:
    """Return the KL a token of the blocks that are fitted on, and of those that validate."""
    scores = score_blocks(student, batches, states)
    cut = settings.train_blocks(len(scores.kl))
    parts = {"train_kl": slice(None, cut), "val_kl": slice(cut, None)}
    means = {n: float(scores.kl[p].sum() / scores.tokens[p].sum()) for n, p in parts.items()}
    return {"step": step, **means}
