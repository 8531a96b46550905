"""The shipped models are a matched pair of real language models, and their trainer resumes."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rerail.evaluate.perplexity import score_blocks
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource
from rerail.text.corpora import Speeches

RECIPE = Path(__file__).parents[1] / "experiments" / "zoo"
NAMES = ("tiny_fine", "tiny_coarse")


def folder(name: str) -> Path:
    return Path(ModelSource(f"zoo:{name}").location)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"zoo_{name}", RECIPE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair() -> dict[str, MoEModel]:
    return {name: ModelSource(f"zoo:{name}").load() for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_loads_whole_by_stock_transformers(name: str) -> None:
    model, told = AutoModelForCausalLM.from_pretrained(folder(name), output_loading_info=True)
    assert {key: list(found) for key, found in told.items() if found} == {}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(AutoTokenizer.from_pretrained(folder(name))) == model.config.vocab_size


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_takes_at_most_16_megabytes(name: str) -> None:
    size = sum(path.stat().st_size for path in folder(name).iterdir())
    assert 7_000_000 < size <= 16_000_000


def test_the_pair_is_equal_up_to_router_rows(pair: dict[str, MoEModel]) -> None:
    rows = {n: sum(layer.router_rows.numel() for layer in m.layers) for n, m in pair.items()}
    total = {n: m.parameters_total() for n, m in pair.items()}
    active = {n: m.parameters_active() for n, m in pair.items()}
    assert total["tiny_fine"] == pytest.approx(total["tiny_coarse"], rel=0.01)
    assert rows["tiny_fine"] == 8 * rows["tiny_coarse"]
    for counted in (total, active):
        without = [counted[n] - rows[n] for n in NAMES]
        assert without[0] == without[1]


def test_the_pair_differs_in_granularity(pair: dict[str, MoEModel]) -> None:
    shapes = {n: [(x.num_experts, x.top_k, x.intermediate_size) for x in m.layers]
              for n, m in pair.items()}  # fmt: skip
    assert shapes == {"tiny_fine": [(64, 16, 32)] * 4, "tiny_coarse": [(8, 2, 256)] * 4}
    assert [pair[n].fine_grained for n in NAMES] == [True, False]


def test_the_pair_has_one_tokenizer() -> None:
    first, second = ((folder(n) / "tokenizer.json").read_bytes() for n in NAMES)
    assert first == second
    tokenizer = ModelSource("zoo:tiny_fine").tokenizer()
    text = "The Congress shall assemble; naïve 漢字\n\tdef f(x):"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    tokenizer = ModelSource("zoo:tiny_fine").tokenizer()
    texts = [d.text for d in Speeches().documents("heldout")]
    ids = [i for text in texts for i in tokenizer(text[:4000])["input_ids"]]
    return torch.tensor(ids[: 16 * 256]).view(16, 256)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_beats_the_best_unigram_of_the_very_text(
    name: str, pair: dict[str, MoEModel], held_out: torch.Tensor
) -> None:
    scores = score_blocks(pair[name], [(held_out, torch.ones_like(held_out, dtype=torch.bool))])
    share = torch.bincount(held_out[:, 1:].flatten()) / held_out[:, 1:].numel()
    best_unigram = torch.special.entr(share).sum()
    assert scores.nll.sum() / scores.tokens.sum() < best_unigram - 1.5


def test_the_committed_table_supports_the_claim() -> None:
    with (RECIPE / "zoo.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    nll = {(r["model"], r["domain"]): float(r["nll"]) for r in rows}
    domains = {r["domain"] for r in rows}
    assert {"speeches", "docs", "all"} < domains
    assert nll["tiny_fine", "all"] == pytest.approx(nll["tiny_coarse", "all"], rel=0.03)
    for domain in domains:
        best = max(nll[n, domain] for n in NAMES)
        assert best < nll["bigram", domain] - 0.5 < nll["unigram", domain] - 1


@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_the_committed_log_reaches_ten_million_tokens(kind: str) -> None:
    with (RECIPE / f"log_{kind}.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert int(rows[-1]["tokens"]) >= 10_000_000
    assert float(rows[-1]["train_nll"]) < float(rows[0]["train_nll"]) - 1


def test_count_models_are_distributions() -> None:
    ngrams = script("ngrams")
    blocks = np.random.default_rng(0).integers(0, 6, (20, 12))
    every = np.array([[v, w] for v in range(8) for w in range(8)])  # 6 and 7 are never seen
    for model in (ngrams.Unigram(blocks, 8, 0.5), ngrams.Bigram(blocks, 8, 0.6)):
        mass = np.exp(-model.nll(every)).reshape(8, 8).sum(axis=1)
        np.testing.assert_allclose(mass, 1, rtol=1e-6)


def test_a_bigram_model_learns_what_follows_what() -> None:
    ngrams = script("ngrams")
    blocks = np.tile(np.arange(4), (50, 6))
    bigram, _ = ngrams.tuned(ngrams.Bigram, ngrams.DISCOUNTS, blocks, 4)
    unigram, _ = ngrams.tuned(ngrams.Unigram, ngrams.ADDED, blocks, 4)
    assert bigram.nll(blocks).mean() < 0.1 < 1.3 < unigram.nll(blocks).mean()


@pytest.mark.slow
def test_a_training_run_that_was_stopped_continues_with_the_same_numbers(tmp_path: Path) -> None:
    train, data = script("train"), tmp_path / "data"
    data.mkdir()
    ids = np.random.default_rng(0).integers(0, 4096, 16 * train.BLOCK, dtype=np.uint16)
    ids.tofile(data / "train.bin")
    ids[: 2 * train.BLOCK].tofile(data / "val.any.bin")

    def arguments(out: str, *more: str) -> list[str]:
        sizes = ["--steps", "3", "--batch", "1"]
        return ["coarse", "--data", str(data), "--out", str(tmp_path / out), *sizes, *more]

    train.main(arguments("straight"))
    train.main(arguments("stopped", "--stop", "2"))
    half = torch.load(tmp_path / "stopped/checkpoint.pt")
    assert half["step"] == 2
    again = [sys.executable, RECIPE / "train.py", *arguments("stopped")]
    subprocess.run(again, check=True, capture_output=True)
    straight, resumed = (
        torch.load(tmp_path / n / "checkpoint.pt") for n in ("straight", "stopped")
    )
    for key in ("model", "optimisers", "step", "ema"):
        torch.testing.assert_close(straight[key], resumed[key], rtol=0, atol=0)
    moved = [not torch.equal(t, half["model"][n]) for n, t in straight["model"].items()]
    assert all(moved)
    first, second = ((tmp_path / n / "model/model.safetensors") for n in ("straight", "stopped"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(SystemExit, match="not of"):
        train.main(arguments("stopped", "--lr", "1"))
