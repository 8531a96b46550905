import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import tiny, tokens
from rerail.export.reload import ReloadError, check_reload, judge, write_task
from rerail.export.reload_script import compare
from rerail.export.targets import as_written, export_student
from rerail.plan.plan import Plan


@pytest.fixture
def exported(tmp_path):
    student = tiny("qwen3_moe", num_hidden_layers=1)
    path = export_student(student, Plan(), tmp_path / "model", dtype=torch.bfloat16)
    return path, as_written(student, torch.bfloat16), student


def in_process(path, model, exchange):
    """Do what the fresh process does, without its seconds of imports."""
    exchange.mkdir()
    write_task(exchange, tokens(), model)
    threads = torch.get_num_threads()
    report = compare(str(path), exchange)
    assert torch.get_num_threads() == threads
    return judge(path, report, model.model.dtype)


def change(path, name, how):
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    chosen = next(n for n in tensors if name in n)
    how(tensors, chosen)
    save_file(tensors, weights, metadata={"format": "pt"})


def test_a_fresh_process_without_rerail_finds_the_rounded_student(exported):
    path, written, _ = exported
    assert check_reload(path, tokens(), written) <= 1e-6


def test_a_process_that_fails_is_an_error_that_quotes_its_last_line(
    exported, tmp_path, monkeypatch
):
    path, written, _ = exported
    script = tmp_path / "script.py"
    script.write_text("raise ValueError('no tensor fits')")
    monkeypatch.setattr("rerail.export.reload._SCRIPT", script)
    sentence = "does not load with stock transformers: ValueError: no tensor fits"
    with pytest.raises(ReloadError, match=sentence):
        check_reload(path, tokens(), written)


def test_the_student_before_rounding_is_not_what_was_written(exported, tmp_path):
    path, written, student = exported
    assert in_process(path, written, tmp_path / "a") == 0
    with pytest.raises(ReloadError, match="logits that differ by"):
        in_process(path, student, tmp_path / "b")


DAMAGES = {
    "one number": (
        "experts.3.down_proj", lambda t, n: t[n].mul_(1.5), "logits that differ by",
    ),
    "a NaN": ("embed_tokens", lambda t, n: t[n].fill_(torch.nan), "logits that differ by nan"),
    "a lost tensor": ("k_proj", lambda t, n: t.pop(n), "do not fit: .*missing_keys.*k_proj"),
    "a tensor too many": (
        "k_proj", lambda t, n: t.update({"model.extra": t[n].clone()}), "unexpected_keys.*extra",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_does_not_pass(damage, exported, tmp_path):
    path, written, _ = exported
    name, how, sentence = DAMAGES[damage]
    change(path, name, how)
    with pytest.raises(ReloadError, match=sentence):
        in_process(path, written, tmp_path / "exchange")


def test_a_process_that_had_rerail_proves_nothing(exported):
    path, _, _ = exported
    report = {"difference": 0.0, "largest": 1.0, "misfits": {}, "rerail_was_loaded": True}
    with pytest.raises(ReloadError, match="had imported rerail"):
        judge(path, report, torch.float32)


def test_the_fresh_process_runs_as_the_model_does(tmp_path):
    model = tiny("qwen3_moe")
    model.config._experts_implementation = "eager"
    write_task(tmp_path, tokens(), model)
    task = json.loads((tmp_path / "task.json").read_text())
    assert (task["dtype"], task["device"]) == ("float32", "cpu")
    assert task["options"]["experts_implementation"] == "eager"
    assert task["threads"] == torch.get_num_threads()
