"""Load a checkpoint as any user of transformers would, and compare its logits with given ones.

Run as a script in a process of its own: `python -P reload_script.py <checkpoint> <exchange>`.
It imports torch and transformers, never rerail.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def compare(checkpoint: str, exchange: Path) -> dict[str, Any]:
    """Return the largest logit difference, the largest logit and the keys that did not fit.

    Args:
        checkpoint: the folder.
        exchange: a folder with `task.json` (dtype, device, threads, loading options) and
            `given.safetensors` (ids (B, S) int64, logits (B, S, V)).
    """
    task = json.loads((exchange / "task.json").read_text(encoding="utf-8"))
    given = load_file(exchange / "given.safetensors")
    torch.set_num_threads(task["threads"])
    options = {"dtype": getattr(torch, task["dtype"]), **task["options"]}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, output_loading_info=True, **options
    )
    model, loading = loaded
    model.to(task["device"]).eval()
    with torch.no_grad():
        logits = model(input_ids=given["ids"].to(task["device"]), use_cache=False).logits.cpu()
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {
        "difference": float((logits.double() - given["logits"].double()).abs().max()),
        "largest": float(given["logits"].abs().max()),
        "misfits": {k: sorted(map(str, loading[k])) for k in keys if loading[k]},
    }


if __name__ == "__main__":
    report = compare(sys.argv[1], Path(sys.argv[2]))
    report["rerail_was_loaded"] = any(name.split(".")[0] == "rerail" for name in sys.modules)
    (Path(sys.argv[2]) / "report.json").write_text(json.dumps(report), encoding="utf-8")
