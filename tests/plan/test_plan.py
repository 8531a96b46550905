import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny
from rerail.errors import InputError
from rerail.experts.base import BankSpec
from rerail.plan.plan import LayerPlan, Plan
from rerail.store import Artefact, write

EVERYONE = tuple(range(8))
KEPT = (0, 2, 5, 7)
BASIS = BankSpec(
    "basis", 8, (), {"bases": 2, "rank": 3}, {"matrices": "gate+up", "activation": "silu"}
)


def own(experts: tuple[int, ...], layer: int = 0) -> BankSpec:
    return BankSpec("dense", len(experts), tuple(((layer, e, 1.0),) for e in experts))


def sliced(**changes: Any) -> LayerPlan:
    plain = LayerPlan(0, KEPT, (0, 1, 2, 3), "slice", own(KEPT))
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (sliced(layer=7), r"plan names layer 7; the MoE layers are \[0, 1\]"),
        (sliced(kept=(0, 2, 5, 8)), "must be distinct, ascending and below 8"),
        (sliced(kept=(0, 5, 2, 7)), "must be distinct, ascending and below 8"),
        (sliced(kept=(0, 2, 2, 7)), "must be distinct, ascending and below 8"),
        (sliced(kept=(3,), slots=(0,), bank=own((3,))), "1 selectable router rows are fewer"),
        (sliced(slots=(0, 1, 2)), "4 slots must map to stored experts below 4"),
        (sliced(slots=(0, 1, 2, 4)), "4 slots must map to stored experts below 4"),
        (sliced(router="mask"), "8 slots must map to stored experts below 4"),
        (sliced(router="drop"), "'drop' is not known; allowed: untouched, slice, mask"),
        (sliced(router="untouched"), "'untouched' keeps all 8 slots, not 4; use slice or mask"),
        (sliced(bank=BankSpec("dense", 4, ())), "has 0 entries of members; dense banks need one"),
        (sliced(bank=own((0, 2, 5, 9))), "member expert 9 of layer 0 does not exist"),
        (sliced(bank=own(KEPT, layer=4)), "member expert 0 of layer 4 does not exist"),
        (sliced(bank=BankSpec("dense", 4, (((0, 0, float("nan")),),) * 4)), "with finite weights"),
        (sliced(bank=BankSpec("dense", 4, ((),) * 4)), "must be some, with finite weights"),
        (sliced(bank=BankSpec("tensor", 4)), r"'tensor' is not known; allowed: \['basis', 'delta'"),
        (LayerPlan(0, EVERYONE, EVERYONE, "untouched", BASIS), "needs the tensors .*gate.A"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_a_sentence(
    part: LayerPlan, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        Plan((part,)).validate(tiny("qwen3_moe").layers)


def test_a_layer_named_twice_is_refused() -> None:
    with pytest.raises(InputError, match="names layer 0 2 times; once is allowed"):
        Plan((sliced(), sliced())).validate(tiny("qwen3_moe").layers)


def test_misshapen_tensors_are_refused() -> None:
    layers = tiny("qwen3_moe").layers
    part = LayerPlan(0, EVERYONE, EVERYONE, "untouched", BASIS)
    shapes = {"A": (8, 8, 3), "alpha": (8, 2), "B": (2, 3, 16)}
    tensors = {
        f"layers.0.{name}.{key}": torch.zeros(shape)
        for name in ("gate", "up")
        for key, shape in shapes.items()
    }
    Plan((part,), {}, tensors).validate(layers)
    with pytest.raises(InputError, match=r"'up.B': \(2, 3, 15\)"):
        Plan((part,), {}, tensors | {"layers.0.up.B": torch.zeros(2, 3, 15)}).validate(layers)


@pytest.mark.parametrize(
    ("kept", "router", "fits"),
    [
        ((0, 1, 4, 5), "slice", True),
        ((0, 1, 2, 4), "slice", False),
        ((0, 4), "slice", False),
        ((0, 1, 2, 4, 5), "mask", True),
        ((0, 1, 2, 4), "mask", False),
    ],
)
def test_grouped_routers_keep_two_in_every_group_and_equal_slices(
    kept: tuple[int, ...], router: str, fits: bool
) -> None:
    rows = len(kept) if router == "slice" else 8
    slots = tuple(min(i, len(kept) - 1) for i in range(rows))
    plan = Plan((LayerPlan(0, kept, slots, router, own(kept)),))
    layers = tiny("deepseek_v3").layers
    if fits:
        plan.validate(layers)
    else:
        with pytest.raises(InputError, match=r"same number|at least 2 a group"):
            plan.validate(layers)


def with_tensors() -> Plan:
    tensors = {"layers.0.gate.A": torch.randn(2, 3), "layers.10.gate.A": torch.ones(1)}
    return Plan((sliced(),), {"compressor": "x"}, tensors)


def test_tensors_of_a_layer_are_its_own() -> None:
    plan = with_tensors()
    assert list(plan.of_layer(0)) == list(plan.of_layer(10)) == ["gate.A"]
    assert torch.equal(plan.of_layer(10)["gate.A"], torch.ones(1))
    assert plan.of_layer(1) == {}


def test_fingerprints_follow_decisions_not_lineage() -> None:
    plan = Plan((sliced(),), {"compressor": "x"})
    assert dataclasses.replace(plan, lineage={}).fingerprint() == plan.fingerprint()
    moved = Plan((sliced(slots=(1, 0, 2, 3)),), {"compressor": "x"})
    assert moved.fingerprint() != plan.fingerprint()


@pytest.mark.parametrize("damage", ["json", "tensors", "no tensors", "other shape"])
def test_a_damaged_plan_is_reported_and_counts_as_absent(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "plan.json"
    with_tensors().save(path)
    beside = path.with_suffix(".safetensors")
    if damage == "json":
        path.write_text(path.read_text().replace('"slice"', '"masks"'))
    elif damage == "tensors":
        beside.write_bytes(beside.read_bytes()[:-1])
    elif damage == "no tensors":
        beside.unlink()
    else:
        write(path, Artefact({"layers": [{"bank": {"members": [[[0, 1.0]]]}}], "lineage": {}}))
    with caplog.at_level(logging.WARNING):
        assert Plan.load(path) is None
    assert "will be made again" in caplog.text


def test_an_absent_plan_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Plan.load(tmp_path / "plan.json") is None
    assert caplog.text == ""
