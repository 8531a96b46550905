"""Synthetic rows like those of the demo: two models, three methods, three stages."""

import math
from typing import Any

from rerail.run.results import new_row

Row = dict[str, Any]  # as result.json has them

MODELS = {"tiny_fine": ("fine", 3.52), "tiny_coarse": ("coarse", 3.55)}
METHODS = {
    "reap": ("pruning", 0.81, 0.56, 0.18),
    "hc_smoe": ("merging", 0.42, 0.44, 0.21),
    "mobe": ("editing", 0.12, None, 0.09),
    "rtn": ("quantisation", 0.2, 0.12, 0.05),
    "odp": ("skipping", 0.15, 0.08, -0.04),
}
DEMO = ("reap", "hc_smoe", "mobe")


def cell(model: str = "tiny_fine", method: str = "reap", **known: Any) -> list[Row]:
    """Return the teacher's, the compressed and the repaired row of one cell."""
    grain, teacher = MODELS[model]
    paradigm, gap, *recoveries = METHODS[method]
    known = {"ratio": 0.5, "seed": 0, "samples": 256, "gap": gap, **known}
    gap = known.pop("gap")
    recovery = known.pop("recovery", recoveries[grain == "coarse"])
    texts = {"speeches": 16320, "docs": 16320}
    tokens = known.pop("texts", texts)
    marks = ("ratio", "seed", "samples", "calibration")
    known = {"calibration": "mix", **known}
    key = "-".join(str(known[n]) for n in marks if known[n] != "mix") + f"-{model}-{method}"
    names = {n: str(known[n]) for n in ("ratio", "calibration")}
    names |= {"model": model, "compressor": method}
    shared = {
        "key": key,
        "model": model,
        "granularity": grain,
        "compressor": method,
        "paradigm": paradigm,
        "paper": "2510.13999",
        "allocation": "uniform",
        "distill": "router_kd",
        "prompt": "The Congress of the United States",
        "host": "node-1",
        "time": "2026-01-02T03:04:05+00:00",
        "revision": "0123456789ab",
        "tokens": sum(tokens.values()),
        "active_parameters": 1_500_000,
        "peak_memory": 2**30,
        "choices": {
            "command": f"rerail model={model} compressor={method} seed={known['seed']}",
            "seed": known["seed"],
            "names": names,
            "model": {"path_or_id": f"zoo:{model}"},
            "compressor": {"_target_": f"rerail.methods.{method}"},
            "ratio": {"removed": known["ratio"]},
            "samples": {"count": known["samples"]},
            "calibration": {"samples": known["samples"], "seed": known["seed"]},
            "skip": {"share": known["ratio"] if paradigm == "skipping" else None},
            "evaluation": {"texts": {name: {"seed": 0} for name in tokens}},
        },
        **known,
    }
    won = 0.3 * gap if recovery is None else recovery * gap
    stages = {"teacher": teacher, "compressed": teacher + gap, "repaired": teacher + gap - won}
    return [
        dict(
            new_row(
                **shared, **_stage(stage, nll, teacher, tokens, recovery, known["ratio"], model)
            )
        )
        for stage, nll in stages.items()
    ]


def _stage(
    stage: str,
    nll: float,
    teacher: float,
    tokens: dict[str, int],
    recovery: float | None,
    ratio: float | None,
    model: str,
) -> dict[str, Any]:
    kl = 1.1 * (nll - teacher)
    left = 1.0 if stage == "teacher" else 1 - (ratio or 0.0)
    row: dict[str, Any] = {
        "stage": stage,
        "nll": nll,
        "nll_se": 0.031,
        "perplexity": math.exp(nll),
        "kl": kl,
        "kl_se": 0.02 * (stage != "teacher"),
        "esap": math.exp(-kl),
        "esap_se": 0.003,
        "agreement": 1.0 - kl / 3,
        "agreement_se": 0.004,
        "bytes": round(4e6 + 11.6e6 * left),
        "expert_bytes": round(11.6e6 * left),
        "nll_by": {
            name: {"nll": nll + 0.1 * i, "se": 0.04, "tokens": count}
            for i, (name, count) in enumerate(tokens.items())
        },
        "seconds": {"teacher": 9.4, "compressed": 8.1, "repaired": 41.7}[stage],
        "samples_text": f" met in {stage} session <b>&</b> said that the {model} of 1812 was good.",
    }
    moved = {} if stage == "teacher" else {"routing_changed": 0.3}
    row["layers"] = [
        {
            "layer": i,
            **{name: share + 0.15 * i for name, share in moved.items()},
            "load_entropy": 0.97 - 0.08 * i - kl / 5,
            "load": [0.5, 0.3, 0.2 if moved else 0.15, None if moved else 0.05],
        }
        for i in range(4)
    ]
    if stage == "teacher":
        return row
    if stage == "repaired":
        steps = range(0, 90, 9)
        row["curve"] = [
            {
                "step": step,
                "train_kl": None if step == 0 else kl,
                "val_kl": kl * (1 + 3 / (1 + step)),
            }
            for step in steps
        ]
        row |= {"kl_first": 4 * kl, "kl_best": kl, "kl_last": kl, "recovery": recovery}
        row["recovery_se"] = None if recovery is None else 0.034
        for entry in row["nll_by"].values():
            entry |= {"recovery": recovery, "recovery_se": row["recovery_se"]}
    return row


def demo_rows() -> list[Row]:
    """Return the 18 rows of the demo."""
    return [row for model in MODELS for method in DEMO for row in cell(model, method)]


def failed_cell(status: str = "failed", **known: Any) -> Row:
    """Return the row of a cell that did not finish."""
    reason = "ValueError: <script>alert('reason')</script> is not finite"
    row = {"model": "tiny_fine", "compressor": "reap", "ratio": 0.9, "seed": 0, "key": "bad0"}
    return dict(new_row(**{**row, "status": status, "reason": reason, **known}))


def every_kind() -> list[Row]:
    """Return rows of every kind that a sweep can have; more than are shown without folding."""
    both = [*MODELS]
    rows = [r for m in both for n in DEMO for q in (0.25, 0.5, 0.75) for r in cell(m, n, ratio=q)]
    rows += [
        r for m in both for b in (2.0, 3.0, 4.0) for r in cell(m, "rtn", ratio=1 - b / 16, bits=b)
    ]
    for m in both:
        for share, active in ((0.25, 1.5), (0.5, 1.0), (None, 1.2)):
            for row in cell(m, "odp", ratio=share):
                rows.append({**row, "active_experts": 2.0 if row["stage"] == "teacher" else active})
    rows += [
        r
        for m, gain in zip(both, (0.0, 0.1), strict=True)
        for s in range(1, 6)
        for r in cell(m, seed=s, ratio=0.5, recovery=0.5 + s / 100 - gain * (1 + s / 10))
    ]
    rows += [r for m in both for n in (16, 64, 1024) for r in cell(m, samples=n)]
    rows += [r for m in both for c in ("speeches", "docs") for r in cell(m, calibration=c)]
    return [*rows, failed_cell()]
