"""Train one model of the zoo: `python train.py fine|coarse --data DIR --out DIR [--device cuda]`.

Needs torch and transformers only. `DIR/train.bin` and `DIR/val.<domain>.bin` hold uint16 token ids
(written by prepare.py). Block i of the training file is block i of a seeded permutation, so both
models see the same tokens in the same order. A checkpoint is written every five minutes (and at
`--stop`), and a run that is started again continues from it with the same numbers.

Matrices are trained by Muon (momentum, then a Newton-Schulz step towards the nearest orthogonal
matrix, one expert at a time), everything else by Adam.
"""

import argparse
import csv
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

BLOCK = 256
SEED = 0


def config_of(kind: str) -> Qwen3MoeConfig:
    """64 experts of width 32, top 16, or 8 of width 256, top 2: equal but for the router."""
    fine = kind == "fine"
    return Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=512,
        moe_intermediate_size=32 if fine else 256,
        num_experts=64 if fine else 8,
        num_experts_per_tok=16 if fine else 2,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        router_aux_loss_coef=0.01,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def orthogonalised(g: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps on a stack of matrices (..., m, n)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for stacks of matrices; a group says how many lie one above another in each tensor."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum, "stacked": 1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                parts = update.chunk(group["stacked"], dim=-2)
                scaled = [orthogonalised(u) * 0.2 * math.sqrt(max(u.shape[-2:])) for u in parts]
                p.add_(torch.cat(scaled, dim=-2), alpha=-group["lr"])


def optimisers(model, lr: float):
    named = list(model.named_parameters())
    fused = [p for n, p in named if "gate_up_proj" in n]
    single = [p for n, p in named if "proj" in n and "gate_up_proj" not in n]
    others = [p for n, p in named if "proj" not in n]
    muon = Muon([{"params": fused, "stacked": 2}, {"params": single}], lr)
    return muon, torch.optim.Adam(others, lr=lr, betas=(0.9, 0.95))


def rate(step: int, steps: int) -> float:
    """Warm up over 100 steps, hold, then fall linearly to zero over the last 60 %."""
    return min((step + 1) / 100, 1.0, (steps - step) / (0.6 * steps))


@torch.no_grad()
def validate(model, folder: Path, device: str, blocks: int = 48) -> dict[str, float]:
    model.eval()
    nll = {}
    for path in sorted(folder.glob("val.*.bin")):
        ids = np.fromfile(path, dtype=np.uint16).astype(np.int64)
        whole = ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK)[:blocks]
        parts = torch.from_numpy(whole).to(device).split(16)
        losses = [model(b, labels=b, use_cache=False).loss.item() for b in parts]
        nll[path.name.split(".")[1]] = float(np.average(losses, weights=[len(b) for b in parts]))
    model.train()
    return nll


def save(out: Path, name: str, value) -> None:
    torch.save(value, out / f"{name}.tmp")
    (out / f"{name}.tmp").replace(out / name)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["fine", "coarse"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3328)
    parser.add_argument("--stop", type=int, help="stop after this step, for a trial")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    a = arguments(argv)
    settings = {k: str(v) for k, v in vars(a).items() if k in ("kind", "steps", "batch", "lr")}
    a.out.mkdir(parents=True, exist_ok=True)
    if a.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config_of(a.kind)).to(a.device)
    model.set_experts_implementation("eager" if a.device == "cpu" else "grouped_mm")
    model.train()
    opts = optimisers(model, a.lr)
    ids = np.memmap(a.data / "train.bin", dtype=np.uint16, mode="r")
    order = np.random.default_rng(SEED).permutation(len(ids) // BLOCK)
    step, seconds, rows, ema = 0, 0.0, [], None
    if (a.out / "checkpoint.pt").exists():
        held = torch.load(a.out / "checkpoint.pt", weights_only=True, map_location=a.device)
        model.load_state_dict(held["model"])
        [o.load_state_dict(s) for o, s in zip(opts, held["optimisers"], strict=True)]
        if held["settings"] != settings:
            raise SystemExit(f"{a.out} holds a run of {held['settings']}, not of {settings}")
        step, seconds, rows, ema = held["step"], held["seconds"], held["rows"], held["ema"]
    started, saved, last = time.time() - seconds, time.time(), a.stop or a.steps
    while step < last:
        picked = [order[i % len(order)] for i in range(step * a.batch, (step + 1) * a.batch)]
        x = np.stack([ids[i * BLOCK : (i + 1) * BLOCK] for i in picked]).astype(np.int64)
        x = torch.from_numpy(x).to(a.device)
        out = model(x, labels=x, use_cache=False, output_router_logits=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            for group in o.param_groups:
                group["lr"] = a.lr * rate(step, a.steps)
            o.step()
            o.zero_grad()
        nll = out.loss.item() - 0.01 * out.aux_loss.item()
        ema = nll if ema is None else 0.98 * ema + 0.02 * nll
        step += 1
        if step % 256 == 0 or step == a.steps:
            row = {"step": step, "tokens": step * a.batch * BLOCK, "train_nll": round(ema, 4)}
            row |= {k: round(v, 4) for k, v in validate(model, a.data, a.device).items()}
            row |= {
                "balance_loss": round(out.aux_loss.item(), 4),
                "seconds": round(time.time() - started),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        if time.time() - saved > 300 or step == last:
            saved = time.time()
            held = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in opts]}
            held |= {"step": step, "seconds": saved - started, "rows": rows, "ema": ema}
            held["settings"] = settings
            save(a.out, "checkpoint.pt", held)
    with (a.out / "log.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0].keys() if rows else ["step"])
        writer.writeheader()
        writer.writerows(rows)
    if step == a.steps:
        model.to(torch.bfloat16).save_pretrained(a.out / "model")


if __name__ == "__main__":
    main()
