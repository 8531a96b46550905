"""Load a checkpoint as any user of transformers would, and compare its logits.

Run as a script in a process of its own: `python -P reload_script.py <checkpoint> <exchange>`.
It imports torch and transformers; rerail cannot be imported, but for a checkpoint of the package
form, which asks for `import rerail.auto`.
"""

import importlib
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
        exchange: a folder with `task.json` (dtype, device, threads, loading options, and the
            modules to import first) and `expected.safetensors` (ids (B, S) int64, logits
            (B, S, V)).
    """
    task = json.loads((exchange / "task.json").read_text(encoding="utf-8"))
    expected = load_file(exchange / "expected.safetensors")
    torch.set_num_threads(task["threads"])
    for module in task["imports"]:
        importlib.import_module(module)
    options = {"dtype": getattr(torch, task["dtype"]), **task["options"]}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, output_loading_info=True, **options
    )
    model, loading = loaded
    model.to(task["device"]).eval()
    with torch.no_grad():
        logits = model(input_ids=expected["ids"].to(task["device"]), use_cache=False).logits.cpu()
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {
        "difference": float((logits.double() - expected["logits"].double()).abs().max()),
        "largest": float(expected["logits"].abs().max()),
        "misfits": {k: sorted(map(str, loading[k])) for k in keys if loading[k]},
    }


def main(checkpoint: str, exchange: Path) -> None:
    """Write the report of `compare` into the exchange folder."""
    imports = json.loads((exchange / "task.json").read_text(encoding="utf-8"))["imports"]
    if not imports:
        blocked: Any = None
        sys.modules["rerail"] = blocked
    report = compare(checkpoint, exchange)
    loaded = [name for name, module in sys.modules.items() if module is not None]
    own = any(name.split(".")[0] == "rerail" for name in loaded)
    report["rerail_was_loaded"] = own and not imports
    (exchange / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
