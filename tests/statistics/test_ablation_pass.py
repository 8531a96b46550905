import pytest
import torch
from torch.nn import functional as F

from families import CONFIGS, tiny
from measuring import batches
from rerail.errors import OutOfReach
from rerail.methods.moe_i2 import LossIncrease
from rerail.moe.model import MoEModel
from rerail.statistics.collect import collect


@torch.no_grad()
def loss(model: MoEModel) -> float:
    """Summed over the true targets, each sequence alone and without its padding."""
    total = 0.0
    for input_ids, mask in batches(3, 8):
        for ids, valid in zip(input_ids, mask, strict=True):
            logits = model.model(input_ids=ids[valid][None], use_cache=False).logits[0]
            total += float(F.cross_entropy(logits[:-1], ids[valid][1:], reduction="sum"))
    return total


@pytest.mark.parametrize("family", CONFIGS)
def test_increases_are_those_of_a_model_without_the_slot(family: str) -> None:
    model = tiny(family)
    routers = [layer.router for layer in model.layers]
    found = collect(model, batches(3, 8), [LossIncrease()])
    assert [layer.router for layer in model.layers] == routers
    plain = loss(model)
    for i in (0, 1):
        for slot in (0, 5):
            without = model.with_shared_parameters()
            without.layers[i].mask_rows(tuple(e for e in range(8) if e != slot))
            expected = loss(without) - plain
            held = float(found.tensors[i]["loss_increase"][slot])
            assert held == pytest.approx(expected, abs=2e-3), (i, slot)
            assert abs(expected) > 2e-3 or slot not in _chosen(model, i), (i, slot)


def _chosen(model: MoEModel, layer: int) -> set[int]:
    chosen: set[int] = set()
    hook = model.layers[layer].experts.register_forward_pre_hook(
        lambda _, args: chosen.update(args[1].flatten().tolist())
    )
    loss(model)
    hook.remove()
    return chosen


def test_shards_add() -> None:
    model, statistic = tiny("qwen3_moe"), LossIncrease()
    whole = collect(model, batches(4, 8), [statistic])
    first, second = (collect(model, [b], [statistic]) for b in batches(4, 8))
    merged = first.merge(second, [statistic])
    for i, held in whole.tensors.items():
        torch.testing.assert_close(
            merged.tensors[i]["loss_increase"], held["loss_increase"], atol=1e-12, rtol=1e-12
        )


def test_slots_that_are_never_chosen_cost_nothing() -> None:
    model = tiny("qwen3_moe")
    for layer in model.layers:
        layer.mask_rows((0, 1, 2, 4, 5, 6))
    found = collect(model, batches(2, 8), [LossIncrease()])
    for held in found.tensors.values():
        assert not held["loss_increase"][[3, 7]].any()
        assert held["loss_increase"].any()


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen3_moe", {"num_experts_per_tok": 8}), ("deepseek_v3", {"n_group": 4, "topk_group": 2})],
)
def test_a_router_with_no_slot_to_spare_is_refused(family: str, changes: dict[str, int]) -> None:
    with pytest.raises(OutOfReach, match="its 8 experts are the fewest that its router"):
        collect(tiny(family, **changes), batches(2, 8), [LossIncrease()])
