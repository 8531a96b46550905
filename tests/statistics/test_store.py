import json
import logging
from pathlib import Path

import pytest
import torch

from families import tiny
from measuring import batches, everything
from rerail.statistics.ablation import LossIncrease
from rerail.statistics.collect import collect
from rerail.statistics.gradients import Fisher
from rerail.statistics.routed import Count, GatedOutput, Moment
from rerail.statistics.rows import Rows
from rerail.statistics.statistic import StatisticSet
from rerail.statistics.store import StatisticStore, merge_sets

FILLED = StatisticSet(
    {
        i: {"count": torch.arange(8) + i, "moment_g1_n1": torch.rand(8, dtype=torch.float64)}
        for i in (0, 3)
    }
)


@pytest.fixture
def store(tmp_path: Path) -> StatisticStore:
    made = StatisticStore(tmp_path, "print")
    made.save(FILLED, [Count(), Moment(1, 1)])
    return made


def test_what_was_saved_is_loaded_and_the_rest_is_named(store: StatisticStore) -> None:
    held, missing = store.load([Count(), Moment(1, 1), Moment(1, 2), Moment(1, 2)])
    assert missing == [Moment(1, 2)]
    assert held.tensors.keys() == FILLED.tensors.keys()
    for index, tensors in FILLED.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(held.tensors[index][name], tensor)


def test_another_fingerprint_sees_nothing(store: StatisticStore, tmp_path: Path) -> None:
    assert StatisticStore(tmp_path, "other").load([Count()])[1] == [Count()]


@pytest.mark.parametrize("damage", ["flip", "truncate", "seal", "no seal", "not a seal"])
def test_a_damaged_file_is_reported_and_counts_as_absent(
    store: StatisticStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    [path] = [p for p in store.folder.glob("*.safetensors") if p.name.startswith("count")]
    seal = path.with_suffix(".json")
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "seal":
        seal.write_text(json.dumps({"sha256": "0"}))
    elif damage == "not a seal":
        seal.write_text("[]")
    else:
        seal.unlink()
    with caplog.at_level(logging.WARNING):
        held, missing = store.load([Count(), Moment(1, 1)])
    assert missing == [Count()]
    assert set(held.tensors[0]) == {"moment_g1_n1"}
    assert ("damaged" in caplog.text) is (damage != "no seal")
    store.save(FILLED, [Count()])
    assert store.load([Count()])[1] == []


def test_rows_of_any_number_and_large_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    wanted = [*everything("qwen3_moe"), Fisher(), LossIncrease()]
    filled = collect(tiny("qwen3_moe"), batches(2), wanted)
    short = StatisticSet({0: {"rows_5": Rows(5).empty(tiny("qwen3_moe").layers[0])}})
    store = StatisticStore(tmp_path, "print")
    store.save(filled, wanted)
    store.save(short, [Rows(5)])
    held, missing = store.load(wanted)
    assert missing == []
    for i, tensors in filled.tensors.items():
        assert held.tensors[i].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert held.tensors[i][name].dtype == tensor.dtype
            assert torch.equal(held.tensors[i][name], tensor)
    assert store.load([Rows(5)])[0].tensors[0]["rows_5"].shape == (0, 18)


def test_statistics_that_differ_have_files_that_differ(tmp_path: Path) -> None:
    wanted = [*everything("qwen3_moe"), Fisher(), LossIncrease(), Rows(21), GatedOutput(1)]
    filled = StatisticSet({0: {s.name: torch.zeros(1) for s in wanted}})
    StatisticStore(tmp_path, "print").save(filled, wanted)
    assert len(list(tmp_path.glob("**/*.safetensors"))) == len(wanted)


def test_sets_of_the_same_layers_join() -> None:
    a = StatisticSet({0: {"a": torch.ones(1)}, 1: {"a": torch.ones(1)}})
    b = StatisticSet({0: {"b": torch.zeros(1)}, 1: {"b": torch.zeros(1)}})
    assert {i: set(t) for i, t in merge_sets([a, b]).tensors.items()} == {
        0: {"a", "b"},
        1: {"a", "b"},
    }
