"""The table of model families: it lists what transformers offers, and a sample of it is true."""

import pytest

import family_table
from families import moe_types, tiny
from family_table import PAGE, Result, families_in, fresh_processes, page, result_of
from rerail.export.reload import ReloadError
from rerail.export.targets import export_student
from rerail.plan.plan import Plan

WHOLE = ("gemma4_text", "qwen3_5_moe")


@pytest.fixture(scope="module")
def fresh():
    with fresh_processes() as processes:
        yield processes


@pytest.mark.slow
def test_the_table_has_every_family_of_this_transformers_and_none_is_broken():
    states = families_in(PAGE)
    assert tuple(sorted(states)) == moe_types()
    assert set(states.values()) == {"whole", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("family", WHOLE)
def test_a_whole_family_comes_all_the_way(family, tmp_path, fresh):
    result = result_of(family, tmp_path, fresh)
    assert result.state == "whole", result.note
    assert result.note.startswith("2 layers of 8 experts, top 2")
    assert ("carried over" in result.note) == (family == "qwen3_5_moe")
    assert families_in(PAGE)[family] == "whole"


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("dbrx", "model family 'dbrx' is not supported: its experts hold two-dimensional"),
        ("switch_transformers", "model '...' is not supported: transformers has no causal"),
    ],
)
def test_a_refused_family_has_its_sentence(family, reason, tmp_path, fresh):
    result = result_of(family, tmp_path, fresh)
    assert (result.state, result.note.startswith(reason)) == ("refused", True)
    assert families_in(PAGE)[family] == "refused"


def test_what_fails_after_the_model_is_open_is_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(family_table, "checkpoint", lambda *_: None)
    result = result_of("qwen3_moe", tmp_path, None)
    assert result == Result("qwen3_moe", "broken", result.note)
    assert result.note.startswith("AttributeError: ")


def test_a_checkpoint_that_reloads_as_another_is_broken(tmp_path, fresh):
    path = export_student(tiny("qwen3_moe"), Plan(), tmp_path / "model")
    assert fresh.reload(path, tiny("qwen3_moe"), "native") == 0
    with pytest.raises(ReloadError, match="logits that differ"):
        fresh.reload(path, tiny("qwen3_moe", seed=1), "native")


def test_the_page_is_read_as_it_is_written(tmp_path):
    done = [Result("b", "refused", "its reason"), Result("a", "whole", "2 layers")]
    (tmp_path / "page.md").write_text(page(done), encoding="utf-8")
    assert families_in(tmp_path / "page.md") == {"a": "whole", "b": "refused"}
    assert "1 are whole, 1 are refused, 0 are broken" in page(done)
