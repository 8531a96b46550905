"""The functions for Python: the lines of the README, on a tiny model, for every kind of budget."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import rerail
from checkpoints import add_tokenizer
from families import tiny
from rerail import api
from rerail.errors import InputError, OutOfReach
from rerail.experts.skip_policy import SkipPolicy

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("qwen3_moe", vocab_size=4096).model.save_pretrained(folder)
    add_tokenizer(folder)
    lines = [
        json.dumps({"text": f"{i} green bottles hanging on the wall. " * 6}) for i in range(60)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return api.load(str(folder))


def text_of(teacher, split: str = "calibration"):
    source = {"_target_": "rerail.text.corpora.Files"}
    source["paths"] = [str(Path(teacher.source.path_or_id) / "text.jsonl")]
    return api.text(teacher, "files", sources=[source], samples=16, block=16, split=split)


@pytest.fixture(scope="module")
def text(teacher):
    return text_of(teacher)


def rows_of(student) -> list[torch.Tensor]:
    return [layer.router_rows.clone() for layer in student.model.layers]


def test_load_compress_repair_evaluate_save(teacher, text, tmp_path):
    heldout = text_of(teacher, "heldout")
    student = api.compress(teacher, "reap", 0.5, text)
    rows = rows_of(student)
    before = api.evaluate(student, teacher, heldout)
    repaired = api.repair(student, teacher, text, batch_size=4, epochs=1)
    after = api.evaluate(repaired.student, teacher, heldout)
    assert repaired.fit.kl_best <= repaired.fit.kl_first
    assert before.kl > 0
    assert before.tokens == after.tokens == 16 * 15
    assert student.sizes.bytes < teacher.sizes.bytes
    assert all(map(torch.equal, rows, rows_of(student))), "the student keeps its own router"
    assert not any(map(torch.equal, rows, rows_of(repaired.student)))
    path = api.save(repaired.student, tmp_path / "smaller")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.config.num_experts == 4


def test_statistics_may_be_handed_in_and_decide_the_same(teacher, text):
    collected = api.collect(teacher, text, "reap", "hc_smoe")
    for method in ("reap", "hc_smoe"):
        by_text = api.plan(teacher, method, 0.5, text)
        by_statistics = api.plan(teacher, method, api.Ratio(0.5), statistics=collected)
        assert by_text.to_json() == by_statistics.to_json()


def test_a_sequential_method_measures_the_prefix_that_is_compressed_already(teacher, text):
    """All at once, from the teacher's own statistics, camera keeps other channels of layer 1."""
    collected = api.collect(teacher, text, "camera")
    with pytest.raises(InputError, match="Camera measures the model on calibration text"):
        api.plan(teacher, "camera", 0.5, statistics=collected)
    plan = api.plan(teacher, "camera", 0.5, text, statistics=collected)
    from rerail.compress.base import make_plan
    from rerail.plan.allocation import Uniform

    camera = api.preset("compressor", "camera")
    at_once = make_plan(camera, teacher.model.layers, collected, api.Ratio(0.5), Uniform())
    assert plan.layers[0] == at_once.layers[0]
    assert plan.fingerprint() != at_once.fingerprint()


@pytest.mark.parametrize(("method", "budget"), [("rtn", 4), ("odp", 0.25), ("odp", None)])
def test_quantisers_and_skippers_take_a_number_too(teacher, text, method, budget):
    student = api.compress(teacher, method, budget, text)
    assert student.budget == (api.Bits(4) if method == "rtn" else api.Skip(budget))
    assert api.evaluate(student, teacher, text).kl > 0


class Moved(api.Recorder):
    """Knows of a fit that moved every row, whatever was fitted."""

    def fit(self, make):
        fit = make()
        return replace(fit, after={name: rows + 0.1 for name, rows in fit.before.items()})


def test_a_skippers_policies_are_fitted_anew_on_the_repaired_router(teacher, text):
    student = api.compress(teacher, "odp", 0.25, text)
    options = {"recorder": Moved(), "batch_size": 4, "epochs": 1}
    repaired = api.repair(student, teacher, text, **options)
    assert repaired.policies is not None
    for before, after in zip(student.model.layers, repaired.student.model.layers, strict=True):
        assert isinstance(after.experts, SkipPolicy)
        assert after.experts.spec.options["router"] == after.router_hash() != before.router_hash()
    unknown = api.apply(teacher, student.plan)
    with pytest.raises(InputError, match="fit it again"):
        api.repair(unknown, teacher, text, **options)


def test_text_may_be_plain_strings(teacher):
    strings = [f"{i} green bottles hanging on the wall. " * 4 for i in range(16)]
    blocks = api.text(teacher, strings)
    assert len(blocks) == 16
    assert blocks.mask[0].sum() == len(teacher.tokenizer(strings[0])["input_ids"])
    assert api.plan(teacher, "reap", 0.5, strings) == api.plan(teacher, "reap", 0.5, blocks)
    with pytest.raises(InputError, match="has 2 tokens"):
        api.text(teacher, [""])
    with pytest.raises(InputError, match="'mix' is one string"):
        api.plan(teacher, "reap", 0.5, "mix")


def test_what_cannot_be_used_is_a_sentence_for_python(teacher, text):
    for call, error, sentence in (
        (lambda: api.plan(teacher, "reap", 0.5), InputError, "there is none; give text, e.g. api"),
        (lambda: api.plan(teacher, "rtn", api.Ratio(0.5)), OutOfReach, r"give Bits\(4\), or 4"),
        (lambda: api.plan(teacher, "reap", api.Bits(4)), OutOfReach, r"give Ratio\(0.5\), or 0.5"),
        (lambda: api.plan(teacher, "reap", None), OutOfReach, "swept by Ratio, not by None"),
        (lambda: api.plan(teacher, "reap", 4), InputError, r"4 is outside \[0, 1\)"),
        (lambda: api.plan(teacher, "rtn", 0.5), InputError, r"0.5 bits is outside \[1, 16\]"),
        (
            lambda: api.plan(teacher, "reap", 0.5, statistics=api.collect(teacher, text, "ean")),
            InputError,
            "of layer 0; collect what MomentScore needs",
        ),
        (lambda: api.repair(teacher, teacher, text, "none"), InputError, "repairs nothing"),
    ):
        with pytest.raises(error, match=sentence):
            call()


def test_unknown_presets_list_those_that_exist(teacher, text):
    with pytest.raises(InputError, match=r"compressor='reapp' does not exist; allowed: .*reap"):
        api.compress(teacher, "reapp", 0.5)
    with pytest.raises(InputError, match="did you mean epochs"):
        api.repair(teacher, teacher, text, epoch=1)


def test_the_functions_are_reached_from_the_package_but_for_those_named_like_a_room():
    names = set(rerail.__all__) - {"api"}
    assert names <= set(api.__all__)
    assert all(getattr(rerail, name) is getattr(api, name) for name in names)
    rooms = {path.name for path in (ROOT / "src/rerail").iterdir() if path.is_dir()}
    assert set(api.__all__) - names == set(api.__all__) & rooms
    lazily = "import sys, rerail; assert 'torch' not in sys.modules; rerail.load; rerail.Bits(4)"
    subprocess.run([sys.executable, "-c", lazily], check=True)


def test_the_readme_uses_what_there_is():
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    used = set(re.findall(r"api\.(\w+)\(", example))
    assert used == {"load", "text", "compress", "repair", "evaluate", "save"}
    compile(example, "README.md", "exec")
    assert len([line for line in example.splitlines() if line.strip()]) <= 8


@pytest.mark.parametrize("method", ["reap", "hc_smoe"])
def test_a_router_is_solved_for_by_name_also_where_its_rows_are_pooled(teacher, text, method):
    named = api.preset("compressor", method)
    pooled = replace(named, router="pooled") if method == "hc_smoe" else named
    student = api.compress(teacher, pooled, 0.5, text)
    rows = rows_of(student)
    repaired = api.repair(student, teacher, text, distill="ridge", ridge=0.1)
    assert repaired.fit.steps == 1
    assert all(map(torch.equal, rows, rows_of(student))), "the student keeps its own router"
    changed = [not torch.equal(a, b) for a, b in zip(rows, rows_of(repaired.student), strict=True)]
    # what enters the first router is what it was
    assert changed == [False, repaired.fit.best_step == 1]
    with pytest.raises(InputError, match=r"distill\.ridge=-1"):
        api.repair(student, teacher, text, distill="ridge", ridge=-1)
