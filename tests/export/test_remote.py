import ast
import importlib.util
import os
import pkgutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import rerail.experts
import stored_forms as forms
from families import tiny, tokens
from rerail.export import remote
from rerail.export.reload import check_reload
from rerail.export.remote import modelling_file, module_name
from rerail.export.targets import as_written, export_student
from rerail.plan.apply import apply_plan

KINDS = sorted(
    {m.name for m in pkgutil.iter_modules(rerail.experts.__path__)} - {"base", "encoded"}
)
ALLOWED = {"torch", "transformers"}


def imported(source):
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    return modules


def run_file(path):
    """Import a file by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}_{id(path)}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_file_of_all_forms_needs_torch_and_transformers_only(family, tmp_path):
    source = modelling_file(family, KINDS)
    assert imported(source) - set(sys.stdlib_module_names) == ALLOWED
    (tmp_path / "alone.py").write_text(source)
    module = run_file(tmp_path / "alone.py")
    assert sorted(module.BANKS) == KINDS
    bases = {b for bank in module.BANKS.values() for b in bank.__mro__}
    assert module.ExpertBank in bases
    assert not [b for b in bases if b.__module__.startswith("rerail")]


def test_a_file_holds_the_forms_that_are_stored_and_no_others():
    source = modelling_file("qwen3_moe", ["narrow"])
    assert "class NarrowExperts" in source
    assert "class DenseExperts" in source, "untouched whole experts may stand beside it"
    assert "class QuantizedExperts" not in source


def test_two_files_that_define_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(remote, "_REPLACED", set())
    with pytest.raises(RuntimeError, match=r"two files .* define 'bank_class'"):
        modelling_file("qwen3_moe", ["basis"])


PLANS = {
    "counts": lambda t: forms.sliced(forms.UNEVEN),
    "mask": lambda t: forms.masked(),
    "lent": lambda t: forms.lent(),
    "quantized": lambda t: forms.solved(t, "quantized"),
    "puzzle": lambda t: forms.solved(t, "puzzle"),
    "skip by attention": lambda t: forms.skipping("0.3"),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_written_file_alone_computes_what_the_student_computes(family, plan, tmp_path):
    teacher = tiny(family)
    made = PLANS[plan](teacher)
    student = apply_plan(teacher, made)
    path = export_student(student, made, tmp_path / "model", form="remote")
    module = run_file(path / f"{module_name(family)}.py")
    name = f"Rerail{type(student.model).__name__}"
    loaded, info = getattr(module, name).from_pretrained(path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded), logits(student.model), atol=1e-6, rtol=1e-6)
    with pytest.raises(RuntimeError, match="mismatch"):
        type(student.model).from_pretrained(path)


def test_a_fresh_process_where_rerail_cannot_be_imported_finds_the_rounded_student(tmp_path):
    teacher = tiny("gpt_oss")
    made = forms.solved(teacher, "narrow")
    student = apply_plan(teacher, made)
    path = export_student(student, made, tmp_path / "model", form="remote", dtype=torch.bfloat16)
    written = as_written(student, torch.bfloat16, form="remote")
    assert check_reload(path, tokens(), written, "remote") <= 1e-6


FRESH = """
import sys
sys.modules["rerail"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
path, ids, out = sys.argv[1], load_file(sys.argv[2])["ids"], {}
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
model.set_experts_implementation("eager")
assert model.config._experts_implementation == "eager"
model.set_experts_implementation("grouped_mm")
out["logits"] = model(input_ids=ids, use_cache=False).logits.detach()
out["written"] = model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)
model.save_pretrained(path + "-again")
again = AutoModelForCausalLM.from_pretrained(path + "-again", trust_remote_code=True)
out["again"] = again(input_ids=ids, use_cache=False).logits.detach()
body = AutoModel.from_pretrained(path, trust_remote_code=True)
out["hidden"] = body(input_ids=ids).last_hidden_state.detach()
save_file(out, sys.argv[3])
"""


def test_a_stranger_loads_generates_and_saves_with_the_auto_classes(tmp_path):
    teacher = tiny("qwen3_moe")
    made = forms.solved(teacher, "basis")
    student = apply_plan(teacher, made)
    path = export_student(student, made, tmp_path / "model", form="remote")
    save_file({"ids": tokens()}, tmp_path / "ids")
    command = [sys.executable, "-P", "-c", FRESH, path, tmp_path / "ids", tmp_path / "out"]
    own = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr
    actual = load_file(tmp_path / "out")
    torch.testing.assert_close(actual["logits"], logits(student.model), atol=1e-6, rtol=0)
    assert torch.equal(actual["again"], actual["logits"])
    torch.testing.assert_close(actual["hidden"], student.hidden(tokens()), atol=1e-6, rtol=1e-6)
    expected = student.model.generate(tokens()[:1, :4], max_new_tokens=3, do_sample=False)
    assert torch.equal(actual["written"], expected)
    assert (tmp_path / "model-again" / f"{module_name('qwen3_moe')}.py").exists()
