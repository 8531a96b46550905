import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from families import tiny, tokens
from rerail.errors import InputError
from rerail.experts.base import BankSpec
from rerail.export.checkpoint import read_manifest
from rerail.export.targets import export_student
from rerail.language_model import LanguageModel
from rerail.moe.source import ModelSource
from rerail.plan.apply import apply_plan
from rerail.plan.plan import LayerPlan, Plan
from rerail.run import exporting
from rerail.run.cell import Export
from rerail.run.results import new_row
from rerail.store import read

ROWS = [{"stage": "teacher", "nll": 1.0}, {"stage": "repaired", "nll": 1.5, "recovery": 0.4}]


def kept(rows, layers=(0, 1)):
    specs = {i: BankSpec("dense", len(rows), tuple(((i, e, 1.0),) for e in rows)) for i in layers}
    slots = tuple(range(len(rows)))
    return Plan(tuple(LayerPlan(i, rows, slots, "slice", s) for i, s in specs.items()))


@dataclass
class FakeCell:
    """The few fields of a cell that an export reads."""

    model: ModelSource
    export: Export = field(default_factory=lambda: Export("native"))
    key: str = "k"
    choices: dict = field(default_factory=lambda: {"seed": 3})


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A bfloat16 parent on disk, read in float32, with its student; reload checks are counted."""
    parent = export_student(tiny("qwen3_moe"), Plan(), tmp_path / "parent", dtype=torch.bfloat16)
    cell = FakeCell(ModelSource(str(parent)))
    plan = kept((0, 2, 3))
    student = LanguageModel(apply_plan(cell.model.load(), plan), None, cell.model, plan)
    seen = []

    def check(path, ids, model, form):
        assert form == cell.export.form
        seen.append((path, ids, model))
        return 0.0

    monkeypatch.setattr(exporting, "check_reload", check)
    texts = {"held": SimpleNamespace(input_ids=tokens(5, 12))}

    def run(rows=ROWS):
        return exporting.export(cell, student, texts, tmp_path / "run", rows)

    return SimpleNamespace(run=run, seen=seen, cell=cell, student=student, folder=tmp_path / "run")


def test_the_model_goes_out_in_the_dtype_of_its_parent_and_is_proved_against_its_rounded_self(
    stage,
):
    path = stage.run()
    assert path == stage.folder / "model"
    tensors = load_file(path / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    ((checked, ids, model),) = stage.seen
    assert (checked, tuple(ids.shape)) == (path, (2, 12))
    assert model.model.dtype == torch.float32
    proof = read(stage.folder / "reload.json").data
    assert proof["max_logit_difference"] == 0
    assert proof["max_logit_rounding"] == 0, "all of it came from a bfloat16 checkpoint"
    manifest = read_manifest(path)
    assert manifest["parent"]["fingerprint"] == stage.cell.model.fingerprint()
    assert manifest["choices"] == {"seed": 3}
    assert [row["nll"] for row in manifest["evaluation"]] == [1.0, 1.5]
    assert manifest["evaluation"][1]["recovery"] == 0.4


def test_a_package_is_opened_again_as_a_model_like_any_other_by_command_line_and_api(stage):
    stage.cell.export = Export("package")
    path = stage.run()
    script = "import sys, importlib; importlib.import_module(sys.argv[1]); "
    script += "from rerail.moe.source import ModelSource; "
    script += "print(len(ModelSource(sys.argv[2]).meta().layers[0].router_rows))"
    for module in ("rerail.run.cell", "rerail.api"):
        command = [sys.executable, "-c", script, module, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "3", done.stderr


def test_bytes_on_disk_are_those_of_the_weights_files(stage):
    rows = [new_row(stage="teacher"), new_row(stage="repaired")]
    path = stage.run()
    exporting.add_disk_bytes(stage.cell, stage.folder, rows)
    parent = Path(stage.cell.model.location)
    assert [row["disk_bytes"] for row in rows] == [
        (folder / "model.safetensors").stat().st_size for folder in (parent, path)
    ]
    assert rows[1]["disk_bytes"] < rows[0]["disk_bytes"]


def test_a_trained_row_is_moved_by_rounding_and_the_record_says_so(stage):
    stage.student.model.layers[0].router_rows.add_(1e-3)
    stage.run()
    assert read(stage.folder / "reload.json").data["max_logit_rounding"] > 0


def test_a_proved_export_is_used_and_a_stale_or_broken_one_is_made_again(stage):
    path = stage.run()
    stage.run()
    assert len(stage.seen) == 1
    (path / "model.safetensors").write_bytes(b"cut")
    stage.run()
    assert len(stage.seen) == 2
    stage.run([ROWS[0], {**ROWS[1], "nll": 1.25}])
    assert len(stage.seen) == 3
    assert read_manifest(path)["evaluation"][1]["nll"] == 1.25


def test_a_form_that_cannot_be_exported_is_refused_when_the_student_is_made(stage):
    uneven = replace(stage.student, model=apply_plan(tiny("qwen3_moe"), kept((0, 2, 3), (0,))))
    with pytest.raises(InputError, match="layer 1: it keeps 8 experts and layer 0 keeps 3"):
        exporting.check_export(stage.cell, uneven)
    exporting.check_export(FakeCell(stage.cell.model, Export("none")), uneven)
    exporting.check_export(stage.cell, stage.student)


def test_counts_by_layer_go_out_as_a_package_or_with_their_own_code(stage):
    uneven = replace(stage.student, model=apply_plan(tiny("qwen3_moe"), kept((0, 2, 3), (0,))))
    for form in ("package", "remote"):
        exporting.check_export(FakeCell(stage.cell.model, Export(form)), uneven)
        exporting.check_export(FakeCell(stage.cell.model, Export(form, densify=True)), uneven)
    with pytest.raises(InputError, match="'gguf' is not one of none, native, package, remote"):
        Export("gguf")


@pytest.mark.parametrize("form", ["package", "remote"])
def test_the_chosen_form_is_written_and_proved(form, stage):
    stage.cell.export = Export(form)
    path = stage.run()
    assert len(stage.seen) == 1
    assert read_manifest(path)["target"] == form
    assert "model.layers.0.mlp.experts.slots" in load_file(path / "model.safetensors")
    assert bool(list(path.glob("modelling_*.py"))) == (form == "remote")
