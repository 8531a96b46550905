import torch

from families import tiny
from measuring import DENSE, ROUTED
from rerail.moe.model import MoEModel
from rerail.statistics import places
from rerail.statistics.moments import InputMoment
from rerail.statistics.places import empty_statistics
from rerail.statistics.routed import Count, Moment


def test_without_a_gpu_all_statistics_lie_on_the_cpu_and_are_the_empty_ones():
    layers = tiny("qwen3_moe").layers
    found = empty_statistics(layers, (*ROUTED, *DENSE))
    assert [*found] == [0, 1]
    for layer in layers:
        assert tuple(found[layer.index]) == (*ROUTED, *DENSE)
        for statistic, tensor in found[layer.index].items():
            assert torch.equal(tensor, statistic.empty(layer))
            assert tensor.device.type == "cpu"


def test_what_fits_lies_beside_its_layer_and_the_smallest_come_first(monkeypatch):
    model = MoEModel(tiny("qwen3_moe").model.to("meta"))  # stands for a GPU
    moment, small = 8 * 16 * 16 * 8, 2 * 8 * 8
    free = 2 * (2 * small + moment)  # half of it holds both layers' numbers and one moment
    monkeypatch.setattr(places, "free_bytes", lambda device: free)
    found = empty_statistics(model.layers, (InputMoment(), Count(), Moment(1, 1)))
    where = {(i, s.name): t.device.type for i, h in found.items() for s, t in h.items()}
    assert where == {
        (0, "input_moment"): "meta",
        (0, "count"): "meta",
        (0, "moment_g1_n1"): "meta",
        (1, "input_moment"): "cpu",
        (1, "count"): "meta",
        (1, "moment_g1_n1"): "meta",
    }
