"""Which classes a configuration may name: nothing of another package runs unless it is trusted."""

import os
import sys
from typing import get_args, get_type_hints

import pytest

from rerail.config import trust
from rerail.config.instantiate import build
from rerail.errors import InputError
from rerail.run import task
from rerail.run.cell import Cell

FOREIGN = (
    "os.system",
    "builtins.exec",
    "torch.load",
    "joblib.load",
    "sympy.sympify",
    "shutil.copy",
    "subprocess.Popen",
    "hydra.utils.instantiate",
    "lightning.pytorch.Trainer",
    "rerailed.methods.Method",
    "evil.touch",
    "rerail",
    "rerail.methods.reap.MomentScore;evil",
)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package on the path that leaves a file where it is imported, or where it is called."""
    text = "from pathlib import Path\nfrom dataclasses import dataclass\n"
    text += "from rerail.methods.reap import MomentScore\nfrom rerail.plan.budget import Ratio\n"
    text += f"(Path({str(tmp_path)!r}) / 'ran').touch()\n"
    text += "def touch(**_): return Ratio(0.5)\n"
    text += (
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(MomentScore):\n    sharp: float = 1.0\n"
    )
    (tmp_path / "evil.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "_trusted", [])
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return tmp_path / "ran"


@pytest.mark.parametrize("group", trust.BASES)
@pytest.mark.parametrize("target", FOREIGN)
def test_a_foreign_name_is_refused_before_it_is_imported(group, target, plugin):
    with pytest.raises(InputError, match="_target_="):
        build({"_target_": target, "file": "x"}, group)
    assert not plugin.exists()


@pytest.mark.parametrize(
    ("group", "node"),
    [
        ("calibration", {"_target_": "rerail.text.calibration.Calibration", "sources": ["?"]}),
        ("evaluation", {"_target_": "rerail.run.evaluation.Evaluation", "texts": {"a": "?"}}),
        (
            "evaluation",
            {"_target_": "rerail.run.evaluation.Evaluation", "texts": {}, "tasks": "?"},
        ),
        ("compressor", {"_target_": "rerail.methods.pmq.PMQ", "quantiser": "?"}),
        ("ratio", {"_target_": "rerail.plan.budget.Ratio", "removed": "?"}),
        ("model", {"_target_": "rerail.moe.source.ModelSource", "path_or_id": "?"}),
    ],
)
def test_at_every_depth(group, node, plugin):
    def put(value):
        if value == "?":
            return {"_target_": "evil.touch"}
        if isinstance(value, dict):
            return {name: put(inner) for name, inner in value.items()}
        return [put(inner) for inner in value] if isinstance(value, list) else value

    with pytest.raises(InputError, match=r"evil\.touch"):
        build(put(node), group)
    assert not plugin.exists()


@pytest.mark.parametrize(
    "target",
    [
        "rerail.files.write_json",  # a function
        "rerail.plan.budget.Bits",  # a class of another place
        "rerail.moe.source.Path",  # of another package, in a module of ours
        "rerail.files.os.system",
    ],
)
def test_a_name_of_this_package_must_be_what_its_place_asks_for(target):
    with pytest.raises(InputError, match=r"compressor takes Compressor|does not exist"):
        build({"_target_": target, "average": 4}, "compressor")


def test_a_package_is_trusted_by_hand_and_its_classes_must_fit_as_well(plugin):
    trust.trust(["evil"])
    assert os.environ[trust.VARIABLE] == "evil"
    made = build({"_target_": "evil.Mine", "sharp": 2}, "compressor")
    assert type(made).__name__ == "Mine"
    with pytest.raises(InputError, match="sharp='x' is not float"):
        build({"_target_": "evil.Mine", "sharp": "x"}, "compressor")
    with pytest.raises(InputError, match="does not fit"):
        build({"_target_": "evil.touch"}, "ratio")
    with pytest.raises(InputError, match="not the name of a package"):
        trust.trust(["no package"])


def test_a_stored_cell_of_a_sweep_runs_nothing_of_its_own(plugin, tmp_path):
    stored = {"out": str(tmp_path), "logger": {"_target_": "evil.touch"}, "trust": "evil"}
    names = [name for name in trust.BASES if name != "logger"]
    cell = task.SweepCell(
        str(tmp_path), "folder", "key", "rerail", {}, {n: {} for n in names} | stored
    )
    with pytest.raises(InputError):
        task.run(task.SweepCell.load(cell.save(tmp_path / "cell.yaml")))
    with pytest.raises(InputError, match=r"evil\.touch"):
        build(stored["logger"], "logger")
    assert not plugin.exists()


def test_the_bases_are_the_annotations_of_a_cell():
    hints = get_type_hints(Cell)
    for group in trust.BASES.keys() - {"logger"}:
        asked = get_args(hints[group]) or (hints[group],)
        assert trust.bases_of(group) == asked
