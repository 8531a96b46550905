"""Speed and memory as ratios measured in one run: `python experiments/bench/bench.py --out FILE`.

Writes a list of {name, value, limit, unit}; limit is null where there is none. Times are CPU
seconds on one thread, float32, eager experts: what ModelSource chooses on a CPU.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import torch
from forms import form_rows
from memory import memory_rows
from models import Size, random_model
from overhead import overhead_rows
from planning import large_rows, planning_rows
from speed import kl_rows, other_passes_rows, router_kd_rows, statistics_rows, union_rows
from timing import Row, row

from rerail.moe.source import ModelSource


def settings_rows(size: Size) -> list[Row]:
    with torch.device("meta"):
        parameters = random_model(size).parameters_total()
    counted = {
        "parameters": parameters,
        "vocabulary": size.vocabulary,
        "tokens of a forward": size.batch * size.length,
        "bytes of a number (float32)": 4,
    }
    rows = [row(f"random model: {name}", value, None, "count") for name, value in counted.items()]
    return [*rows, row("threads", torch.get_num_threads(), None, "count")]


def show(rows: list[Row], began: float) -> list[Row]:
    for r in rows:
        limit = "" if r["limit"] is None else f"at most {r['limit']:g}"
        missed = "  MISSED" if r["limit"] is not None and r["value"] > r["limit"] else ""
        value = f"{r['value']:,}" if r["unit"] == "count" else f"{r['value']:.4g}"
        print(f"{r['name']:<78} {value:>12} {r['unit']:<6} {limit}{missed}", flush=True)
    print(f"  ({time.time() - began:.0f} s)", flush=True)
    return rows


def measure(size: Size, rounds: int, zoo: tuple[str, ...]) -> list[Row]:
    began = time.time()
    rows = show(settings_rows(size), began)
    rows += show(overhead_rows(rounds), began)
    rows += show(memory_rows(size), began)
    rows += show(kl_rows(size, rounds), began)
    rows += show(form_rows(size, (rounds + 1) // 2), began)
    rows += show(planning_rows("random model", random_model(size), size), began)
    for name in ("random model", *zoo):
        model = ModelSource(f"zoo:{name}").load() if name in zoo else random_model(size)
        for measured in (statistics_rows, union_rows, other_passes_rows, router_kd_rows):
            rows += show(measured(name, model, size, rounds, name not in zoo), began)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = measure(Size(), a.rounds, ("tiny_fine", "tiny_coarse"))
    rows += show(large_rows(), time.time())
    a.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
