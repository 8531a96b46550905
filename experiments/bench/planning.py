"""How long it takes to plan one layer, method by method; statistics are not counted."""

import time
from dataclasses import replace
from functools import partial

import torch
from models import Batch, Size, random_model, text
from timing import Row, row

from rerail.compress.base import Compressor, make_plan
from rerail.config.presets import config_root, preset
from rerail.moe.model import MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.budget import Bits, Budget, Ratio, Skip
from rerail.statistics.collect import collect
from rerail.statistics.statistic import Statistic, StatisticSet, join_sets

SHORT = (1, 32)  # sequences and tokens of the text for the passes that cost many forwards
BUDGETS: dict[type, Budget] = {Ratio: Ratio(0.5), Bits: Bits(3), Skip: Skip(0.25)}
WHOLE = ("reap", "svd")  # planned for all layers too
LINEAR = ("svd", "moe_svd", "d2_moe")  # whose time is linear in experts
LARGE = 4  # experts that an estimate of a large model is made from


def presets() -> tuple[str, ...]:
    return tuple(sorted(p.stem for p in (config_root() / "conf" / "compressor").glob("*.yaml")))


def measured(
    model: MoEModel, batch: Batch, wanted: tuple[Statistic, ...], first_only: bool
) -> StatisticSet:
    """Fill what planning reads; a forward ends after the first layer where only that one counts."""
    rows, length = SHORT
    short = (batch[0][:rows, :length], batch[1][:rows, :length])
    layers = [model.layers[0].index] if first_only else None
    slow = [s for s in wanted if s.pass_name in ("backward", "ablation")]
    quick = [s for s in wanted if s not in slow]
    parts = [collect(model, [b], s, layers=layers) for b, s in ((short, slow), (batch, quick)) if s]
    return join_sets(parts)


def seconds(compressor: Compressor, model: MoEModel, batch: Batch, first_only: bool) -> float:
    layers = model.layers[:1] if first_only else model.layers
    filled = measured(model, batch, compressor.requires, first_only)
    make = partial(make_plan, compressor, layers, filled, BUDGETS[compressor.budget], Uniform())
    began = time.process_time()
    with torch.no_grad():
        make()
    return time.process_time() - began


def planning_rows(
    name: str, model: MoEModel, size: Size, names: tuple[str, ...] | None = None
) -> list[Row]:
    """CPU seconds, once each: a layer of every preset, and all layers of a score and of SVD."""
    batch, rows = text(model, size), []
    for method in names or presets():
        compressor = preset("compressor", method)
        value = seconds(compressor, model, batch, first_only=True)
        rows.append(row(f"{name}: planning a layer, {method}", value, None, "s"))
        if method in WHOLE:
            value = seconds(compressor, model, batch, first_only=False)
            label = f"{name}: planning {len(model.layers)} layers, {method}"
            rows.append(row(label, value, None, "s"))
    return rows


def large_rows() -> list[Row]:
    """CPU seconds for all of Qwen3-30B-A3B (48 layers, 128 experts), by a few of its experts.

    Time is linear in experts and layers, and for MoBE in steps; what stops early is not counted.
    """
    whole = Size(2048, 768, 128, 8, 48, vocabulary=1024, batch=8, length=512)
    size = replace(whole, experts=LARGE, top_k=2, layers=1)
    model, rows = random_model(size), []
    batch, times = text(model, size), whole.layers * whole.experts / LARGE
    for name, fields, share in (*((n, {}, 1.0) for n in LINEAR), ("mobe", {"steps": 10}, 0.01)):
        value = seconds(preset("compressor", name, **fields), model, batch, first_only=True)
        label = f"shape of Qwen3-30B-A3B, estimate: planning 48 layers, {name}"
        rows.append(row(label, value * times / share, None, "s"))
    return rows
