import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import rerail.auto  # noqa: F401
import stored_forms as forms
from families import tiny, tokens
from rerail.errors import InputError
from rerail.experts.encoded import EncodedExperts
from rerail.export.checkpoint import read_manifest
from rerail.export.package import check_packaged
from rerail.export.reload import check_reload, judge, write_task
from rerail.export.reload_script import compare
from rerail.export.targets import FORMS, as_written, check_student, export_student
from rerail.moe.source import ModelSource
from rerail.plan.apply import apply_plan
from rerail.plan.plan import Plan

PLANS = {
    "slice": lambda t: forms.sliced(),
    "counts by layer": lambda t: forms.sliced(forms.UNEVEN),
    "one layer": lambda t: dataclasses.replace(forms.sliced(), layers=forms.sliced().layers[:1]),
    "mask": lambda t: forms.masked(),
    "alias": lambda t: forms.aliased(),
    "merge": lambda t: forms.merged(),
    "lent": lambda t: forms.lent(),
    "lent by a whole layer": lambda t: dataclasses.replace(
        forms.lent(), layers=forms.lent().layers[1:]
    ),
    "fused": forms.fused,
    **{name: (lambda t, name=name: forms.solved(t, name)) for name in forms.KINDS},
    "skip": lambda t: forms.skipping(),
    "skip by attention": lambda t: forms.skipping("0.3"),
    "slice, then delta": lambda t: dataclasses.replace(
        forms.sliced(), then=forms.solved(apply_plan(t, forms.sliced()), "delta")
    ),
    "packed, then skip": lambda t: dataclasses.replace(
        forms.solved(t, "quantized"), then=forms.skipping()
    ),
    "novice, then skip": lambda t: dataclasses.replace(
        forms.solved(t, "novice"), then=forms.skipping()
    ),
}
ODD = ("mixtral", "gpt_oss", "deepseek_v3", "granitemoe")
CASES = [
    *[("qwen3_moe", plan) for plan in PLANS],
    *[
        ("gpt_oss", plan)
        for plan in ("narrow", "quantized", "novice", "fused", "puzzle", "packed_channels")
    ],
    *[(family, plan) for family in ODD for plan in ("mask", "packed, then skip")],
    ("ernie4_5_moe", "mask"),
]


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def student_of(family, plan):
    teacher = tiny(family)
    made = PLANS[plan](teacher)
    return apply_plan(teacher, made), made


def reloads(path, written, exchange):
    """Do what the fresh process does, in this one; return the difference of logits."""
    exchange.mkdir()
    write_task(exchange, tokens(), written, "package")
    return judge(path, compare(str(path), exchange), written.model.dtype)


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_every_form_reloads_from_what_it_stores_and_fails_under_the_family_s_own_class(
    family, plan, tmp_path, caplog
):
    student, made = student_of(family, plan)
    before = {n: (id(t), t._version) for n, t in student.model.state_dict(keep_vars=True).items()}
    path = export_student(student, made, tmp_path / "model", form="package", dtype=torch.bfloat16)
    written = as_written(student, torch.bfloat16, form="package")
    assert reloads(path, written, tmp_path / "exchange") <= 1e-6
    exact = as_written(student, form="package")
    torch.testing.assert_close(logits(exact.model), logits(student.model), atol=1e-6, rtol=1e-6)
    after = {n: (id(t), t._version) for n, t in student.model.state_dict(keep_vars=True).items()}
    assert after == before
    with pytest.raises(RuntimeError, match="mismatch"):
        type(student.model).from_pretrained(path)


@pytest.mark.parametrize("form", ["package", "remote"])
def test_the_auto_classes_without_our_code_do_not_know_the_model(form, tmp_path, monkeypatch):
    student, made = student_of("qwen3_moe", "merge")
    path = export_student(student, made, tmp_path / "model", form=form)
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    sentence = {"package": "does not recognize this architecture", "remote": "trust_remote_code"}
    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=sentence[form]):
            auto.from_pretrained(path)


HEAVY = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 32, "num_experts": 8}


@pytest.mark.parametrize(
    "plan",
    [
        *("counts by layer", "alias", "lent", "basis", "low_rank", "narrow", "quantized", "novice"),
        *("puzzle", "puzzle of codes", "packed_channels"),
    ],
)
def test_bytes_on_disk_are_the_sizes_that_were_counted(plan, tmp_path):
    teacher = tiny("qwen3_moe", **HEAVY)
    made = PLANS[plan](teacher)
    student = apply_plan(teacher, made)
    path = export_student(student, made, tmp_path / "model", form="package", dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    saved = sum(t.numel() * t.itemsize for t in tensors.values())
    counted = read_manifest(path)["sizes"]["bytes"]
    whole = sum(p.numel() * 2 for p in teacher.model.parameters())
    assert saved == pytest.approx(counted, rel=0.01)
    assert saved < 0.95 * whole


def test_whole_experts_lie_on_disk_once_and_per_layer(tmp_path):
    student, made = student_of("qwen3_moe", "counts by layer")
    path = export_student(student, made, tmp_path / "model", form="package")
    shapes = {n: tuple(t.shape) for n, t in load_file(path / "model.safetensors").items()}
    shell = "model.layers.{}.mlp.experts.shell.gate_up_proj"
    assert [shapes[shell.format(i)][0] for i in range(2)] == [3, 4]
    assert [shapes[f"model.layers.{i}.mlp.gate.weight"][0] for i in range(2)] == [3, 4]
    assert shapes["model.layers.1.mlp.experts.down_proj"] == (1,), "misshapen on purpose"


@pytest.mark.parametrize("plan", ["lent", "lent by a whole layer"])
def test_experts_that_two_layers_share_lie_on_disk_once(plan, tmp_path):
    student, made = student_of("qwen3_moe", plan)
    path = export_student(student, made, tmp_path / "lent", form="package")
    shell = "model.layers.{}.mlp.experts.shell.gate_up_proj"
    tensors = load_file(path / "model.safetensors")
    assert tensors[shell.format(0)].shape[0] == 8
    assert shell.format(1) not in tensors
    loaded = AutoModelForCausalLM.from_pretrained(path)
    first, second = (layer.mlp.experts.shell for layer in loaded.model.layers)
    assert first.gate_up_proj is second.gate_up_proj


def test_codes_stay_integers_and_numbers_take_the_written_dtype(tmp_path):
    student, made = student_of("qwen3_moe", "quantized")
    path = export_student(student, made, tmp_path / "model", form="package", dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    codes = [t for n, t in tensors.items() if n.endswith("_codes")]
    scales = [t for n, t in tensors.items() if n.endswith("_scale")]
    assert {t.dtype for t in codes} == {torch.uint8}
    assert {t.dtype for t in scales} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(path)
    bank = loaded.model.layers[0].mlp.experts
    assert bank.solved("gate.b2.codes").dtype == torch.uint8
    assert bank.solved("gate.b2.scale").dtype == torch.bfloat16
    assert "gate_up_proj" not in dict(bank.shell.named_parameters()), "not held expanded"


def test_a_tensor_with_a_dtype_of_its_own_keeps_it(tmp_path, monkeypatch):
    def keep(tensor, like):
        return tensor.to(like) if tensor.dtype == torch.float32 else tensor.to(like.device)

    monkeypatch.setattr(EncodedExperts, "cast", staticmethod(keep))
    teacher = tiny("qwen3_moe")
    made = PLANS["quantized"](teacher)
    halved = {n: t.half() if n.endswith("b2.zero") else t for n, t in made.tensors.items()}
    student = apply_plan(teacher, dataclasses.replace(made, tensors=halved))
    path = export_student(student, made, tmp_path / "model", form="package", dtype=torch.bfloat16)
    bank = AutoModelForCausalLM.from_pretrained(path).model.layers[1].mlp.experts
    assert bank.solved("gate.b2.zero").dtype == torch.float16
    assert torch.equal(bank.solved("gate.b2.zero"), halved["layers.1.gate.b2.zero"])
    assert bank.solved("gate.b3.zero").dtype == torch.bfloat16


def test_a_masked_router_that_the_family_keeps_in_float32_stays_so_and_runs(tmp_path):
    student, made = student_of("ernie4_5_moe", "mask")
    path = export_student(student, made, tmp_path / "model", form="package", dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.dtype == torch.bfloat16
    tensors = load_file(path / "model.safetensors")
    assert tensors["model.layers.0.mlp.gate.inner.weight"].dtype == torch.float32
    assert loaded.model.layers[0].mlp.gate.inner.weight.dtype == torch.float32
    assert torch.isfinite(logits(loaded)).all()


def test_the_bank_of_a_reloaded_model_knows_its_slots_and_how_to_run(tmp_path):
    student, made = student_of("qwen3_moe", "skip")
    path = export_student(student, made, tmp_path / "model", form="package")
    loaded = AutoModelForCausalLM.from_pretrained(path, experts_implementation="batched_mm")
    bank = loaded.model.layers[0].mlp.experts
    assert bank.slots.tolist() == list(forms.ALL)
    own = student.layers[0].experts.materialise(3)
    assert all(torch.equal(a, b) for a, b in zip(bank.materialise(3), own, strict=True))
    assert bank.inner.shell.config._experts_implementation == "batched_mm"
    loaded.set_experts_implementation("eager")
    assert bank.inner.shell.config._experts_implementation == "eager"


@pytest.mark.parametrize("plan", ["merge", "basis", "packed, then skip", "lent", "mask"])
def test_a_reloaded_model_generates_and_saves_itself_in_shards(plan, tmp_path):
    student, made = student_of("qwen3_moe", plan)
    path = export_student(student, made, tmp_path / "model", form="package")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    expected = logits(loaded)
    ids = loaded.generate(tokens(1, 4), max_new_tokens=3, do_sample=False)
    assert torch.equal(ids, student.model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False))

    loaded.save_pretrained(tmp_path / "again", max_shard_size="8KB")
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert {p.suffix for p in (tmp_path / "again").iterdir()} == {".json", ".safetensors"}
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(again), expected, atol=1e-6, rtol=1e-6)


def test_the_body_alone_loads_and_rerail_can_read_what_it_wrote(tmp_path):
    student, made = student_of("qwen3_moe", "low_rank")
    path = export_student(student, made, tmp_path / "model", form="package")
    with torch.no_grad():
        actual = AutoModel.from_pretrained(path)(input_ids=tokens()).last_hidden_state
    torch.testing.assert_close(actual, student.hidden(tokens()), atol=1e-6, rtol=1e-6)

    source = ModelSource(str(path))
    read = source.load()
    assert [type(layer.experts).__module__ for layer in read.layers] == [
        "rerail.experts.low_rank"
    ] * 2
    torch.testing.assert_close(logits(read.model), logits(student.model), atol=1e-6, rtol=1e-6)
    assert source.meta().parameters_total() == read.parameters_total()
    with pytest.raises(InputError, match="read from a package"):
        check_student(read, "native", densify=True)
    once_more = export_student(read, Plan(), tmp_path / "more", form="package")
    assert torch.equal(logits(ModelSource(str(once_more)).load().model), logits(read.model))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plan", ["merge", "lent", "quantized", "basis of all"])
def test_densify_turns_any_form_into_plain_experts_for_every_target(form, plan, tmp_path):
    student, made = student_of("qwen3_moe", plan)
    path = export_student(student, made, tmp_path / "model", form=form, densify=True)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    torch.testing.assert_close(logits(loaded), logits(student.model), atol=1e-5, rtol=1e-5)
    with safe_open(path / "model.safetensors", "pt") as saved:
        assert not [n for n in saved.keys() if "codes" in n or "alpha" in n]  # noqa: SIM118


def test_densify_keeps_counts_by_layer_in_a_package(tmp_path):
    student, made = student_of("mixtral", "counts by layer")
    path = export_student(student, made, tmp_path / "model", form="package", densify=True)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(path)), logits(student.model)
    )


@pytest.mark.parametrize("form", ["native", "package"])
@pytest.mark.parametrize(("plan", "sentence"), [("novice", "novices"), ("skip", "by a policy")])
def test_a_form_without_plain_experts_is_refused_before_anything_is_written(form, plan, sentence):
    student, _ = student_of("qwen3_moe", plan)
    with pytest.raises(InputError, match=f"{sentence}.*export.form=package"):
        check_student(student, form, densify=True)
    check_student(student, "package")


def test_a_model_of_an_unknown_class_is_refused():
    student, _ = student_of("qwen3_moe", "slice")

    class Other(type(student.model)):
        pass

    student.model.__class__ = Other
    with pytest.raises(InputError, match=r"Qwen3MoeForCausalLM, .*not on Other"):
        check_packaged(student)
    with pytest.raises(InputError, match=r"export.form='gguf' is not one of native, package, rem"):
        check_student(student, "gguf")


def test_a_fresh_process_loads_a_package_after_one_import(tmp_path):
    student, made = student_of("qwen3_moe", "packed, then skip")
    path = export_student(student, made, tmp_path / "model", form="package", dtype=torch.bfloat16)
    written = as_written(student, torch.bfloat16, form="package")
    assert check_reload(path, tokens(), written, "package") <= 1e-6
