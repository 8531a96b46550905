"""A parent that asks for its auxiliary loss is pruned to a student that runs."""

import dataclasses

import pytest
import torch
from parents import parent

from families import tokens
from rerail import api
from rerail.plan.plan import Plan

FAMILIES = {
    "qwen3_moe": {},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_runs_with_its_auxiliary_loss(tmp_path, family):
    folder = parent(tmp_path / "model", family, output_router_logits=True, **FAMILIES[family])
    teacher = api.load(str(folder))
    ids = tokens()
    full = teacher.model.model(ids)
    assert full.aux_loss is not None
    student = api.compress(teacher, "aimer", 0.5)
    out = student.model.model(ids)
    assert torch.isfinite(out.aux_loss)
    assert student.model.model.num_experts == student.model.layers[0].num_experts == 4
    assert teacher.model.model.num_experts == 8
    assert torch.equal(teacher.model.model(ids).aux_loss, full.aux_loss)


@pytest.mark.parametrize("form", ["package", "remote"])
def test_layers_of_different_counts_run_without_it(tmp_path, form):
    folder = parent(tmp_path / "model", output_router_logits=True)
    teacher = api.load(str(folder))
    half = api.compress(teacher, "aimer", 0.5).plan
    plan = dataclasses.replace(Plan(), layers=half.layers[:1])
    student = api.apply(teacher, plan)
    ids = tokens()
    logits = student.model.model(ids).logits
    saved = api.save(student, tmp_path / "saved", form)
    again = api.load(str(saved), remote_code=form == "remote")
    torch.testing.assert_close(again.model.model(ids).logits, logits)
    assert teacher.model.config.output_router_logits


def test_a_mask_that_is_sliced_for_export_runs_with_it(tmp_path):
    folder = parent(tmp_path / "model", output_router_logits=True)
    teacher = api.load(str(folder))
    student = api.compress(teacher, api.preset("compressor", "aimer", router="mask"), 0.5)
    ids = tokens()
    assert torch.isfinite(student.model.model(ids).aux_loss)
    again = api.load(str(api.save(student, tmp_path / "saved")))
    torch.testing.assert_close(again.model.model(ids).logits, student.model.model(ids).logits)
