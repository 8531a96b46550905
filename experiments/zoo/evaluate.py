"""Evidence for the zoo: `RERAIL_DATA=../shared/data python experiments/zoo/evaluate.py DIR`.

`DIR` is what prepare.py wrote. Writes zoo.md, zoo.csv and curves.svg beside this file: sizes,
FLOPs, held-out NLL of both models and of two count models on the same targets, BLiMP, curves.
"""

import argparse
import csv
import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot
from ngrams import ADDED, DISCOUNTS, Bigram, Unigram, tuned
from torch.utils.flop_counter import FlopCounterMode
from train import BLOCK, SEED

from rerail.evaluate.estimates import mean_and_se, paired_difference
from rerail.evaluate.harness import Harness
from rerail.evaluate.perplexity import score_blocks
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource

HERE = Path(__file__).parent
KINDS = ("fine", "coarse")
TRAINED_BLOCKS = 3328 * 16
LIMIT = 0.03


@dataclass(frozen=True)
class Scores:
    """NLL summed over each block's targets: domain -> (B,)."""

    name: str
    sums: dict[str, np.ndarray]

    def row(self, domain: str) -> dict[str, object]:
        """Return one line of zoo.csv; the domain `all` pools the tokens of all others."""
        sums = np.concatenate(list(self.sums.values())) if domain == "all" else self.sums[domain]
        tokens = np.full(len(sums), BLOCK - 1)
        mean, se = mean_and_se(sums, tokens)
        row = {"model": self.name, "domain": domain, "blocks": len(sums), "tokens": tokens.sum()}
        return {**row, "nll": round(mean, 4), "nll_se": round(se, 4)}


def read(path: Path, limit: int | None = None) -> np.ndarray:
    ids = np.fromfile(path, dtype=np.uint16)
    return ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK)[:limit].astype(np.int64)


def trained_blocks(folder: Path, count: int = TRAINED_BLOCKS) -> np.ndarray:
    blocks = read(folder / "train.bin")
    order = np.random.default_rng(SEED).permutation(len(blocks))
    return blocks[order[np.arange(count) % len(order)]]


def scored_model(name: str, model: MoEModel, held: dict[str, np.ndarray]) -> Scores:
    sums = {}
    for domain, blocks in held.items():
        ids = torch.from_numpy(blocks)
        batches = [(x, torch.ones_like(x, dtype=torch.bool)) for x in ids.split(16)]
        sums[domain] = score_blocks(model, batches).nll.numpy()
    return Scores(name, sums)


def flops(model: MoEModel) -> int:
    """Return the matrix-product FLOPs of one block, as torch counts them (of eager attention)."""
    model.model.set_attn_implementation("eager")
    ids = torch.randint(0, model.vocab_size, (1, BLOCK), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids, use_cache=False)
    model.model.set_attn_implementation("sdpa")
    return counter.get_total_flops()


def size_table(models: dict[str, MoEModel]) -> list[str]:
    router = {n: sum(layer.router_rows.numel() for layer in m.layers) for n, m in models.items()}
    routers = {n: 2 * r * BLOCK for n, r in router.items()}
    counted = {
        "parameters": {n: m.parameters_total() for n, m in models.items()},
        "of them router rows": router,
        "active for one token": {n: m.parameters_active() for n, m in models.items()},
        "FLOPs of one block": {n: flops(m) for n, m in models.items()},
        "of them in routers": routers,
        "bytes of model.safetensors": {
            n: (Path(ModelSource(f"zoo:{n}").location) / "model.safetensors").stat().st_size
            for n in models
        },
    }
    lines = ["| | tiny_fine | tiny_coarse | fine / coarse |", "|---|---|---|---|"]
    for what, of in counted.items():
        a, b = of["tiny_fine"], of["tiny_coarse"]
        lines.append(f"| {what} | {a:,} | {b:,} | {a / b:.4f} |")
    rest = [counted["FLOPs of one block"][n] - routers[n] for n in models]
    lines.append(f"| FLOPs without routers | {rest[0]:,} | {rest[1]:,} | {rest[0] / rest[1]:.4f} |")
    return lines


def nll_table(scores: list[Scores], rows: list[dict[str, object]]) -> list[str]:
    names = [s.name for s in scores]
    found = {(r["model"], r["domain"]): r for r in rows}
    lines = ["| domain | tokens | " + " | ".join(names) + " | fine - coarse |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for domain in [*scores[0].sums, "all"]:
        cells = [found[n, domain] for n in names]
        a, b = (np.concatenate([v for d, v in s.sums.items() if domain in (d, "all")])
                for s in scores[:2])  # fmt: skip
        gap, se = paired_difference(a, b, np.full(len(a), BLOCK - 1))
        share = gap / float(found[names[1], domain]["nll"])
        numbers = " | ".join(f"{c['nll']:.3f} ± {c['nll_se']:.3f}" for c in cells)
        paired = f"{gap:+.4f} ± {se:.4f} ({share:+.1%})"
        lines.append(f"| {domain} | {cells[0]['tokens']:,} | {numbers} | {paired} |")
    return lines


def verdict(scores: list[Scores], rows: list[dict[str, object]]) -> str:
    """Say in words what the table shows, from its numbers."""
    found = {(r["model"], r["domain"]): float(r["nll"]) for r in rows}
    domains = [*scores[0].sums, "all"]
    apart = {d: found["tiny_fine", d] / found["tiny_coarse", d] - 1 for d in domains}
    outside = [f"{d} ({share:+.1%})" for d, share in apart.items() if abs(share) > LIMIT]
    margin = min(found["bigram", d] - found[f"tiny_{k}", d] for d in domains for k in KINDS)
    return (
        f"Over all domains the two models differ by {apart['all']:+.1%}; beyond {LIMIT:.0%} of "
        f"each other: {', '.join(outside) or 'no domain'}. The smallest lead over the bigram model "
        f"in any domain is {margin:.2f} nats."
    )


def blimp(models: dict[str, MoEModel], task: str, limit: int | None) -> list[str]:
    lines = ["| model | pairs | accuracy | standard error |", "|---|---|---|---|"]
    for name, model in models.items():
        harness = Harness((task,), limit=limit, batch_size=128)
        rows = harness.evaluate(model.model, ModelSource(f"zoo:{name}").tokenizer())
        [row] = [r for r in rows if r["metric"] == "acc"]
        lines.append(f"| {name} | {row['n']:,} | {row['value']:.4f} | {row['se']:.4f} |")
    return lines


def curves(path: Path) -> None:
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rerail"})
    figure, axes = pyplot.subplots(figsize=(5, 3), layout="constrained")
    for kind, colour in zip(KINDS, ("C0", "C1"), strict=True):
        with (HERE / f"log_{kind}.csv").open() as handle:
            log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(handle)]
        others = {"step", "tokens", "train_nll", "balance_loss", "seconds"}
        x = [row["tokens"] / 1e6 for row in log]
        held = [np.mean([v for k, v in row.items() if k not in others]) for row in log]
        axes.plot(x, [row["train_nll"] for row in log], colour, ls="--", label=f"{kind}, training")
        axes.plot(x, held, colour, label=f"{kind}, held-out (mean of domains)")
    axes.set(xlabel="million tokens", ylabel="NLL a token")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def same_tokenizer(folder: Path) -> str:
    files = [folder / "tokenizer/tokenizer.json"]
    files += [Path(ModelSource(f"zoo:tiny_{k}").location) / "tokenizer.json" for k in KINDS]
    made, *shipped = (hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files)
    if set(shipped) != {made}:
        raise SystemExit(f"{files[0]} ({made}) is not the shipped tokenizer ({shipped})")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--blocks", type=int, default=400, help="held-out blocks of a domain")
    parser.add_argument("--blimp", default="local_blimp_full")
    parser.add_argument("--limit", type=int, help="pairs of BLiMP, for a trial")
    a = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = same_tokenizer(a.data)
    models = {f"tiny_{k}": ModelSource(f"zoo:tiny_{k}").load() for k in KINDS}
    held = {p.name.split(".")[1]: read(p, a.blocks) for p in sorted(a.data.glob("val.*.bin"))}
    scores = [scored_model(name, model, held) for name, model in models.items()]
    seen = trained_blocks(a.data)
    constants = []
    for kind, choices in ((Bigram, DISCOUNTS), (Unigram, ADDED)):
        counted, constant = tuned(kind, choices, seen, 4096)
        sums = {d: counted.nll(b).sum(axis=1) for d, b in held.items()}
        scores.append(Scores(kind.__name__.lower(), sums))
        constants.append(constant)
    rows = [s.row(domain) for s in scores for domain in [*held, "all"]]
    with (a.out / "zoo.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    curves(a.out / "curves.svg")
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    text = PAGE.format(
        sizes="\n".join(size_table(models)),
        nll="\n".join(nll_table(scores, rows)), verdict=verdict(scores, rows),
        blimp="\n".join(blimp(models, a.blimp, a.limit)),
        task=a.blimp, discount=constants[0], added=constants[1], tokenizer=tokenizer,
        revision=revision, seed=SEED, trained=TRAINED_BLOCKS * BLOCK, torch=torch.__version__,
    )  # fmt: skip
    (a.out / "zoo.md").write_text(text, encoding="utf-8")


PAGE = """# The zoo: a matched pair

`tiny_fine` (64 experts of width 32, top 16) and `tiny_coarse` (8 experts of width 256, top 2) are
meant to differ in granularity only: the same size but for router rows, the same FLOPs, the same
tokens in the same order, held-out NLL within 3 % of each other, well below count models.

    RERAIL_DATA=../shared/data python experiments/zoo/prepare.py DIR
    python experiments/zoo/train.py fine --data DIR --out OUT      # and coarse; logs: log_*.csv
    RERAIL_DATA=../shared/data python experiments/zoo/evaluate.py DIR

This page and zoo.csv were written by the last command at revision {revision} (torch {torch}, one
thread, float32). Seed {seed}; {trained:,} training tokens a model. The
tokenizer that prepare.py makes is the shipped one (sha256 {tokenizer}).

## Sizes

{sizes}

## Held-out NLL

Nats a token, ± one standard error clustered by block of 256 tokens. speeches and docs are the
held-out split of the embedded corpora, the others are documents that were held out. The count
models were fitted on the training tokens and tuned on the last 2 % of those (interpolated
Kneser-Ney, discount {discount}; unigram, added count {added}); they predict the same targets.

{nll}

{verdict}

On books_a the shipped models are further apart than elsewhere. In its first 64 blocks (one play,
with carriage returns and bold marks) three tokens make up 62 % of the gap: the end of the name
`Cecily`, the carriage return and `**`, all repeated within a block: there the coarse model is worse
at repetition. The other blocks, also apart (0.13 nats), were not taken to pieces.

## BLiMP

`{task}`, by lm-eval; chance is 0.5. The error counts pairs as independent, though
they come from 67 paradigms.

{blimp}

## Training

![NLL while training](curves.svg)
"""


if __name__ == "__main__":
    main()
