import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from families import tiny
from measuring import batches, everything
from rerail import code_version
from rerail.methods.d2_moe import Fisher
from rerail.methods.moe_i2 import LossIncrease
from rerail.statistics.cached import cached_statistics
from rerail.statistics.collect import collect
from rerail.statistics.routed import Count, GatedOutput, Moment
from rerail.statistics.statistic import Statistic, StatisticSet, join_sets
from rerail.statistics.token_sample import TokenSample

STORED = [Count(), Moment(1, 1)]
FILLED = StatisticSet(
    {
        i: {"count": torch.arange(8) + i, "moment_g1_n1": torch.rand(8, dtype=torch.float64)}
        for i in (0, 3)
    }
)


def never(missing: list[Statistic]) -> StatisticSet:
    pytest.fail(f"measured again: {missing}")


def missing(folder: Path, wanted: list[Statistic]) -> list[Statistic]:
    """Return what would be measured, and store nothing."""

    class Enough(Exception):
        pass

    asked: list[Statistic] = []

    def note(missing: list[Statistic]) -> StatisticSet:
        asked.extend(missing)
        raise Enough

    with contextlib.suppress(Enough):
        cached_statistics(folder, wanted, note)
    return asked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cached_statistics(tmp_path / "print", STORED, lambda _: FILLED)
    return tmp_path / "print"


def test_what_is_stored_is_read_and_the_rest_is_measured_in_one_go(folder: Path) -> None:
    new = {i: {s.name: torch.ones(8) * i for s in (Moment(1, 2), Moment(2, 0))} for i in (0, 3)}
    asked = []

    def measure(missing: list[Statistic]) -> StatisticSet:
        asked.append(missing)
        return StatisticSet(new)

    wanted = [Moment(1, 2), *STORED, Moment(2, 0), Moment(1, 2)]
    found = cached_statistics(folder, wanted, measure)
    assert asked == [[Moment(1, 2), Moment(2, 0)]]
    again = cached_statistics(folder, wanted, never)
    for i in FILLED.tensors:
        expected = {**FILLED.tensors[i], **new[i]}
        for sets in (found, again):
            assert sets.tensors[i].keys() == expected.keys()
            assert all(torch.equal(sets.tensors[i][n], t) for n, t in expected.items())


def test_another_text_or_model_sees_nothing(folder: Path) -> None:
    assert missing(folder, STORED) == []
    assert missing(folder.parent / "other", STORED) == STORED


@pytest.mark.parametrize("damage", ["flip", "truncate", "seal", "no seal", "not a seal"])
def test_a_damaged_file_is_reported_and_counts_as_absent(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    [path] = folder.glob("count*.safetensors")
    seal = path.with_suffix(".json")
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "seal":
        seal.write_text(seal.read_text().replace('"sha256": "', '"sha256": "0'))
    elif damage == "not a seal":
        seal.write_text("[]")
    else:
        seal.unlink()
    with caplog.at_level(logging.WARNING):
        assert missing(folder, STORED) == [Count()]
    assert ("damaged" in caplog.text) is (damage != "no seal")
    cached_statistics(folder, STORED, lambda _: FILLED)
    assert missing(folder, STORED) == []


def test_tensors_of_any_shape_and_type_come_back_as_they_were(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    wanted = [*everything("qwen3_moe"), Fisher(), LossIncrease()]
    filled = cached_statistics(tmp_path, wanted, lambda them: collect(model, batches(2), them))
    empty = StatisticSet({0: {"token_sample_5": TokenSample(5).empty(model.layers[0])}})
    cached_statistics(tmp_path, [TokenSample(5)], lambda _: empty)
    found = cached_statistics(tmp_path, wanted, never)
    for i, tensors in filled.tensors.items():
        assert found.tensors[i].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found.tensors[i][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[i][name], tensor)
    found = cached_statistics(tmp_path, [TokenSample(5)], never)
    assert found.tensors[0]["token_sample_5"].shape == (0, 18)


def test_statistics_that_differ_have_files_that_differ(tmp_path: Path) -> None:
    wanted = [*everything("qwen3_moe"), Fisher(), LossIncrease(), TokenSample(21), GatedOutput(1)]
    filled = StatisticSet({0: {s.name: torch.zeros(1) for s in wanted}})
    cached_statistics(tmp_path, wanted, lambda _: filled)
    assert len(list(tmp_path.glob("**/*.safetensors"))) == len(wanted)


SOURCE = '''
from dataclasses import dataclass

import torch

from rerail.statistics.statistic import RoutedStatistic


@dataclass(frozen=True)
class {name}(RoutedStatistic):
    """What {name} measures."""

    @property
    def name(self):
        return "{name}"

    def empty(self, layer):
        return torch.zeros(layer.num_experts, dtype=torch.float64)

    def measure(self, tokens):
        return tokens.sum_by_expert(tokens.gates.float() ** {power})
'''


class TwoFiles:
    """Two statistics in two files, imported anew at every look."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, name: str, power: int) -> None:
        text = SOURCE.format(name=name, power=power)
        (self.folder / f"edited_{name.lower()}.py").write_text(text)

    def statistics(self) -> list[Statistic]:
        self.forget()
        names = ("First", "Second")
        modules = [importlib.import_module(f"edited_{name.lower()}") for name in names]
        return [getattr(m, n)() for m, n in zip(modules, names, strict=True)]

    def forget(self) -> None:
        for name in [n for n in sys.modules if n.startswith("edited_")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        code_version._source.cache_clear()


@pytest.fixture
def two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoFiles]:
    (tmp_path / "source").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "source"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    files = TwoFiles(tmp_path / "source")
    yield files
    files.forget()


def test_a_mended_formula_never_meets_its_old_tensors_and_others_stay(
    two_files: TwoFiles, tmp_path: Path
) -> None:
    model, measured = tiny("qwen3_moe"), []

    def measure(missing: list[Statistic]) -> StatisticSet:
        measured.append([s.name for s in missing])
        return collect(model, batches(2), missing)

    def look() -> dict[str, torch.Tensor]:
        wanted = [*two_files.statistics(), Moment(1, 0), Moment(2, 0)]
        found = cached_statistics(tmp_path / "cache", wanted, measure).tensors[0]
        return dict(found)

    two_files.write("First", 1)
    two_files.write("Second", 2)
    before = look()
    two_files.write("First", 2)
    after = look()
    look()
    assert measured == [["First", "Second", "moment_g1_n0", "moment_g2_n0"], ["First"]]
    assert torch.equal(before["First"], before["moment_g1_n0"])
    assert torch.equal(after["First"], after["moment_g2_n0"])
    assert torch.equal(after["Second"], before["Second"])


def test_sets_of_the_same_layers_join() -> None:
    a = StatisticSet({0: {"a": torch.ones(1)}, 1: {"a": torch.ones(1)}})
    b = StatisticSet({0: {"b": torch.zeros(1)}, 1: {"b": torch.zeros(1)}})
    assert {i: set(t) for i, t in join_sets([a, b]).tensors.items()} == {
        0: {"a", "b"},
        1: {"a", "b"},
    }
