import itertools

import pytest
import torch

from families import tiny
from rerail.compress.solvers.alignment import (
    barycentre,
    channel_features,
    ordered,
    permuted,
    weight_matching,
)
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss"]


def expert(layer: MoELayer, slot: int) -> dict[str, torch.Tensor]:
    return {n: p.detach()[slot].clone() for n, p in expert_parameters(layer.experts).items()}


def shuffled(layer: MoELayer, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(layer.intermediate_size, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permuted_copy_is_recovered_to_the_bit(family: str) -> None:
    layer = tiny(family).layers[0]
    original, order = expert(layer, 3), shuffled(layer)
    moved = permuted(original, layer.layout, order)
    assert not torch.equal(moved["gate_up_proj"], original["gate_up_proj"])
    reference, other = (channel_features(e, layer.layout) for e in (original, moved))
    found = weight_matching(reference, other)
    assert torch.equal(order[found], torch.arange(layer.intermediate_size))
    for name, tensor in permuted(moved, layer.layout, found).items():
        assert torch.equal(tensor, original[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permutation_changes_no_function(family: str) -> None:
    model = tiny(family)
    model.model.set_experts_implementation("eager")
    layer = model.layers[0]
    original = {n: t.double() for n, t in expert(layer, 2).items()}
    moved = permuted(original, layer.layout, shuffled(layer))
    x = torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    index, one = torch.zeros(7, 1, dtype=torch.int64), torch.ones(7, 1, dtype=torch.float64)
    before, after = (
        layer.run(x, index, one, **{n: t.unsqueeze(0) for n, t in e.items()})
        for e in (original, moved)
    )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_hold_all_that_belongs_to_a_channel(family: str) -> None:
    layer = tiny(family).layers[0]
    found = channel_features(expert(layer, 1), layer.layout)
    gate, up, down = layer.expert(1)
    assert torch.equal(found[:, :48], torch.cat([gate, up, down.mT], dim=1))
    assert found.shape[1] == (50 if family == "gpt_oss" else 48)
    if family == "gpt_oss":
        bias = layer.experts.gate_up_proj_bias[1]
        assert torch.equal(found[:, 48:], torch.stack([bias[::2], bias[1::2]], dim=1))


def test_the_match_is_the_best_of_all_bijections_and_stays_when_repeated() -> None:
    generator = torch.Generator().manual_seed(1)
    reference, other = torch.randn(2, 6, 9, generator=generator)
    found = weight_matching(reference, other)
    assert sorted(found.tolist()) == list(range(6))

    def cost(order: torch.Tensor) -> float:
        return float((reference - other[order]).square().sum())

    everything = [torch.tensor(p) for p in itertools.permutations(range(6))]
    assert cost(found) == pytest.approx(min(map(cost, everything)))
    assert cost(found) < cost(torch.arange(6))
    assert torch.equal(weight_matching(reference, other[found]), torch.arange(6))


def clouds(seed: int = 0, noise: float = 0.6) -> torch.Tensor:
    """Return (6, 9, 5): noisy copies of the same channels, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    same = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    copies = [same[torch.randperm(9, generator=generator)] for _ in range(6)]
    return torch.stack(copies) + noise * torch.randn(6, 9, 5, generator=generator).double()


def test_every_round_brings_the_centre_nearer_until_nothing_changes() -> None:
    features, distances = clouds(noise=1.5), []
    for rounds in range(12):
        centre, orders = barycentre(features, rounds)
        distances.append(float((ordered(features, orders) - centre).square().sum()))
        torch.testing.assert_close(centre, ordered(features, orders).mean(dim=0))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(distances[1:]))
    assert distances[-1] == distances[-2] < distances[1]
    matched = torch.stack([weight_matching(centre, f) for f in features])
    assert torch.equal(matched, orders)


def test_copies_in_any_order_have_one_centre() -> None:
    centre, orders = barycentre(clouds(noise=0.0), 100)
    same = ordered(clouds(noise=0.0), orders)
    torch.testing.assert_close(same, centre.expand(6, 9, 5), atol=1e-12, rtol=0)
    torch.testing.assert_close(centre, clouds(noise=0.0)[0], atol=1e-12, rtol=0)


def test_no_round_is_the_mean_of_channels_as_they_lie() -> None:
    centre, orders = barycentre(clouds(), 0)
    torch.testing.assert_close(centre, clouds().mean(dim=0))
    assert torch.equal(orders, torch.arange(9).expand(6, 9))
