import json
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file

from families import tiny
from rerail.errors import InputError
from rerail.experts.base import BankSpec
from rerail.export.checkpoint import MANIFEST, is_whole, read_manifest
from rerail.export.targets import export_student
from rerail.plan.apply import apply_plan
from rerail.plan.plan import LayerPlan, Plan

KEPT = (1, 2, 6)


def exported(folder, **manifest):
    specs = [BankSpec("dense", 3, tuple(((i, e, 1.0),) for e in KEPT)) for i in range(2)]
    parts = [LayerPlan(i, KEPT, (0, 1, 2), "slice", spec) for i, spec in enumerate(specs)]
    plan = Plan(tuple(parts), {"compressor": "by hand", "removed": 0.625})
    student = apply_plan(tiny("qwen3_moe"), plan)
    path = export_student(student, plan, folder, manifest=manifest, dtype=torch.bfloat16)
    return plan, path


def test_the_plan_comes_back_from_the_manifest(tmp_path):
    plan, path = exported(tmp_path / "model")
    content = read_manifest(path)["plan"]
    back = Plan.from_json(content)
    assert back == plan
    assert back.fingerprint() == content["fingerprint"] == plan.fingerprint()
    assert content["layers"][1]["kept"] == list(KEPT)
    assert content["lineage"]["removed"] == 0.625


def test_the_manifest_counts_what_lies_on_disk(tmp_path):
    _, path = exported(tmp_path / "model")
    content = read_manifest(path)
    sizes = {p.name: p.stat().st_size for p in path.iterdir() if p.name != MANIFEST}
    assert content["files"] == sizes
    assert content["weight_bytes"] == sizes["model.safetensors"]
    tensors = load_file(path / "model.safetensors")
    assert content["sizes"]["bytes"] == sum(t.numel() * t.itemsize for t in tensors.values())
    routed = sum(t.numel() for n, t in tensors.items() if ".experts." in n)
    assert content["sizes"]["routed"] == routed == 2 * 3 * 3 * 8 * 16


def test_the_manifest_says_what_and_with_which_versions_and_keeps_the_caller_s_facts(tmp_path):
    facts = {"parent": {"fingerprint": "abc"}, "choices": {"seed": 1}, "evaluation": [{"nll": 1.5}]}
    _, path = exported(tmp_path / "model", **facts)
    content = json.loads((path / "compression.json").read_text())
    assert {name: content[name] for name in facts} == facts
    assert (content["target"], content["densified"], content["dtype"]) == (
        "native",
        False,
        "bfloat16",
    )
    assert content["versions"]["transformers"] == version("transformers")
    assert {"rerail", "torch", "safetensors", "python"} <= content["versions"].keys()


def test_a_folder_with_a_missing_or_cut_file_is_not_whole(tmp_path):
    _, path = exported(tmp_path / "model")
    assert is_whole(path)
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    assert not is_whole(path)
    weights.write_bytes(data)
    assert is_whole(path)
    (path / MANIFEST).unlink()
    assert not is_whole(path)
    with pytest.raises(InputError, match=r"compression\.json cannot be read"):
        read_manifest(path)
