import copy
import json
import lzma
import os
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer

import rerail.zoo
from families import tiny
from rerail.errors import InputError
from rerail.evaluate import harness
from rerail.evaluate.harness import Harness, evenly_spaced, finite_or_none, task_scores
from rerail.evaluate.local_tasks import local_names

LOCAL = [
    *("local_arc_easy", "local_blimp", "local_blimp_full", "local_hellaswag"),
    *("local_lambada", "local_piqa", "local_sciq"),
]
PAIRS = [
    {
        "sentence_good": f"The {noun} that I saw is old.",
        "sentence_bad": f"The {noun} that I saw are old.",
    }
    for noun in ("house", "river", "letter", "garden", "window")
]
ANIMALS = ("cat", "dog", "horse", "bird", "fish")
QUESTIONS = [
    {
        "id": str(i),
        "question": f"Which of these is number {i}?",
        "choices": {"text": list(ANIMALS[:4]), "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCDA"[i],
    }
    for i in range(5)
]
LAMBADA = [{"text": f"I saw a {animal} and then another {animal}"} for animal in ANIMALS]
FILES = {
    "blimp_mini20.validation": PAIRS,
    "blimp.all67": PAIRS,
    "lambada_openai.test": LAMBADA,
    **{f"arc_easy.{split}": QUESTIONS for split in ("train", "validation", "test")},
}


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(rerail.zoo.__file__).parent / "tiny_fine")


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=128).model


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Set RERAIL_DATA to a folder with five documents of three tasks, and a cache of its own."""
    folder = tmp_path / "data" / "eval"
    folder.mkdir(parents=True)
    for name, records in FILES.items():
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (folder / f"{name}.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    monkeypatch.setenv("RERAIL_DATA", str(folder.parent))
    monkeypatch.setenv("RERAIL_CACHE", str(tmp_path / "cache"))
    return folder


def likelihood(model, tokens: list[int], count: int) -> float:
    """Return the log-likelihood of the last `count` tokens after all others."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logs = model(ids).logits.log_softmax(-1)[0, :-1]
    return float(logs.gather(1, ids[0, 1:, None])[-count:].sum())


def test_local_tasks_give_value_error_and_count_as_computed_by_hand(data, model, tokenizer):
    rows = Harness(("local_blimp", "local_lambada")).evaluate(model, tokenizer)
    scores = {(r["task"], r["metric"]): r for r in rows}
    assert set(scores) == {
        ("local_blimp", "acc"),
        ("local_lambada", "acc"),
        ("local_lambada", "perplexity"),
    }
    right = []
    for pair in PAIRS:
        sides = [tokenizer(pair[f"sentence_{side}"])["input_ids"] for side in ("good", "bad")]
        good, bad = (likelihood(model, [tokenizer.bos_token_id, *t], len(t)) for t in sides)
        right.append(good > bad)
    blimp = scores["local_blimp", "acc"]
    accuracy = sum(right) / 5
    assert blimp["value"] == pytest.approx(accuracy)
    assert blimp["se"] == pytest.approx((accuracy * (1 - accuracy) / 4) ** 0.5)
    last = []
    for record in LAMBADA:
        whole = tokenizer(record["text"])["input_ids"]
        context = tokenizer(record["text"].rsplit(" ", 1)[0])["input_ids"]
        last.append(likelihood(model, whole, len(whole) - len(context)))
    expected = torch.tensor(last).double().mean().neg().exp()
    perplexity = scores["local_lambada", "perplexity"]
    assert perplexity["value"] == pytest.approx(float(expected), rel=1e-4)
    assert perplexity["se"] > 0
    assert {r["n"] for r in rows} == {5}


def test_a_fingerprint_changes_with_settings_and_files_and_with_nothing_else(data):
    before = Harness(("local_blimp",)).fingerprint()
    assert Harness(("local_blimp",), include_defaults=True).fingerprint() == before
    assert Harness(("local_blimp",), limit=3).fingerprint() != before
    assert Harness(("local_blimp", "local_lambada")).fingerprint() != before
    path = data / "lambada_openai.test.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"text": "I saw a cat"}'))
    assert Harness(("local_blimp",)).fingerprint() == before
    path = data / "blimp_mini20.validation.jsonl.xz"
    path.write_bytes(lzma.compress(json.dumps(PAIRS[0]).encode()))
    assert Harness(("local_blimp",)).fingerprint() != before


def test_model_tokenizer_and_screen_are_left_as_they_were(data, model, tokenizer, capsys):
    model.train()
    model.model.layers[0].eval()
    parameter = next(model.parameters()).requires_grad_(True)
    before = [(m.training, m) for m in model.modules()]
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    capsys.readouterr()
    tasks = Harness(("local_arc_easy", "local_lambada"), limit=2, num_fewshot=1)
    try:
        rows = tasks.evaluate(model, bare)
        assert [(m.training, m) for m in model.modules()] == before
        assert parameter.requires_grad
    finally:
        model.eval().requires_grad_(False)
    assert {r["n"] for r in rows} == {2}
    assert bare.pad_token is None
    assert capsys.readouterr().out == ""
    assert "DISABLE_MULTIPROC" not in os.environ


def test_changed_weights_change_the_scores(data, model, tokenizer):
    tasks = Harness("local_lambada")
    scores = tasks.evaluate(model, tokenizer)
    other = tiny("qwen3_moe", 1, vocab_size=len(tokenizer), max_position_embeddings=128).model
    assert tasks.evaluate(other, tokenizer)[0]["value"] != scores[0]["value"]
    assert tasks.evaluate(model, tokenizer) == scores


@pytest.mark.parametrize(
    ("total", "limit", "expected"),
    [(10, 5, [0, 2, 4, 6, 8]), (5, 5, [0, 1, 2, 3, 4]), (3, 9, [0, 1, 2]), (67, 2, [0, 33])],
)
def test_a_limit_takes_documents_from_all_over_the_file(total, limit, expected):
    assert evenly_spaced(total, limit) == expected


def test_no_task_costs_and_gives_nothing(model, tokenizer, monkeypatch):
    monkeypatch.delenv("RERAIL_DATA", raising=False)
    Harness().check()
    assert Harness().evaluate(model, tokenizer) == []


def test_the_local_tasks_are_the_promised_ones():
    assert local_names() == LOCAL


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"limit": 0}, "limit=0 is too small for the harness; use 1 or more"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"num_fewshot": -1}, "num_fewshot=-1 is too small .* use 0 or more"),
        ({"max_length": 1}, "max_length=1 is too small"),
        ({"tasks": ("local_blmp",)}, "local_blmp is unknown; the nearest are local_blimp"),
    ],
)
def test_bad_settings_are_found_before_a_model_is_loaded(data, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        Harness(**settings).check()


def test_without_data_a_local_task_says_what_to_set(data, monkeypatch, tmp_path):
    tasks = Harness("local_blimp")
    tasks.check()
    (data / "blimp_mini20.validation.jsonl.xz").unlink()
    with pytest.raises(InputError, match=r"needs .*/blimp_mini20.validation.jsonl.xz, which does"):
        tasks.check()
    monkeypatch.setenv("RERAIL_DATA", str(tmp_path))
    with pytest.raises(InputError, match=f"RERAIL_DATA={tmp_path} has no folder eval"):
        tasks.check()
    monkeypatch.delenv("RERAIL_DATA")
    with pytest.raises(InputError, match="RERAIL_DATA is not set"):
        tasks.check()


@pytest.mark.parametrize(
    "content",
    [
        b"not xz",
        lzma.compress(b"not json\n"),
        lzma.compress(b'{"a": "\xff"}\n'),
        lzma.compress(json.dumps(PAIRS).encode())[:-30],
    ],
)
def test_a_damaged_data_file_is_named(data, content):
    path = data / "blimp_mini20.validation.jsonl.xz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"local_blimp cannot read {path}"):
        Harness("local_blimp").check()


@pytest.fixture
def stock(monkeypatch):
    """Let lm-eval index one folder of its own tasks, because all of them take ten seconds."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent / "arc"
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(harness, "_stock_manager", lambda: manager)


def test_a_stock_task_is_read_from_the_hub_beside_local_ones(
    data, model, tokenizer, stock, monkeypatch
):
    asked = []
    load = datasets.load_dataset

    def hub(path, name=None, **options):
        if path == "json":
            return load(path, name, **options)
        asked.append((path, name))
        part = datasets.Dataset.from_list(QUESTIONS)
        return datasets.DatasetDict(train=part, validation=part, test=part)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    tasks = Harness(("arc_easy", "local_arc_easy"))
    tasks.check()
    rows = tasks.evaluate(model, tokenizer)
    assert set(asked) == {("allenai/ai2_arc", "ARC-Easy")}
    theirs = [r for r in rows if r["task"] == "arc_easy"]
    ours = [r for r in rows if r["task"] == "local_arc_easy"]
    assert [r["metric"] for r in theirs] == ["acc", "acc_norm"]
    assert [{**r, "task": "arc_easy"} for r in ours] == theirs


def test_a_stock_task_that_cannot_be_fetched_is_a_sentence(stock, monkeypatch):
    def down(*arguments, **named):
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", down)
    with pytest.raises(
        InputError, match=r"arc_easy cannot be loaded \(no route to the hub\); .*net"
    ):
        Harness("arc_easy").check()


def test_an_unknown_stock_task_lists_its_neighbours(stock):
    with pytest.raises(
        InputError, match=r"arc_esy is unknown; the nearest are arc_easy.*local_piqa"
    ):
        Harness("arc_esy").check()


def test_rows_hold_every_metric_with_its_error_and_its_own_count():
    results = {
        "one": {
            "alias": "one",
            "sample_len": 7,
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "exact,strict": 1,
            "exact_stderr,strict": "N/A",
        },
        "group": {"sample_len": 9, "sample_count": {"acc,none": 4}, "acc,none": 0.25},
    }
    assert task_scores(results) == [
        {"task": "one", "metric": "acc", "value": 0.5, "se": 0.1, "n": 7},
        {"task": "one", "metric": "exact,strict", "value": 1.0, "se": None, "n": 7},
        {"task": "group", "metric": "acc", "value": 0.25, "se": None, "n": 4},
    ]


@pytest.mark.parametrize(
    ("value", "expected"), [("N/A", None), (None, None), (float("nan"), None), (0, 0.0), (0.5, 0.5)]
)
def test_what_is_no_standard_error_is_none(value, expected):
    assert finite_or_none(value) == expected


@pytest.mark.slow
@pytest.mark.skipif("RERAIL_DATA" not in os.environ, reason="RERAIL_DATA is not set")
def test_every_local_task_reads_the_real_files(model, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("RERAIL_CACHE", str(tmp_path))
    names = tuple(name for name in LOCAL if name != "local_blimp_full")
    tasks = Harness(names, limit=5)
    tasks.check()
    rows = tasks.evaluate(model, tokenizer)
    assert {r["task"] for r in rows} == set(names)
    assert {r["n"] for r in rows} == {5}
    assert all(r["se"] is not None for r in rows)
