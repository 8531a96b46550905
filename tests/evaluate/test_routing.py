import pytest
import torch

from families import CONFIGS, tiny
from rerail.evaluate.perplexity import score_blocks
from rerail.evaluate.routing import Routing, load_by_expert, record_routing, routing_changed
from students import blocks, kept_of, masked, merged, sliced


def choices(model, text):
    """What the routers answer at every real token, as sets, layer by layer."""
    outputs = {layer.index: [] for layer in model.layers}
    hooks = [
        layer.router.register_forward_hook(
            lambda _, inputs, out, index=layer.index: outputs[index].append(out[-1])
        )
        for layer in model.layers
    ]
    model.hidden(text.input_ids, text.mask)
    for hook in hooks:
        hook.remove()
    real = text.mask.flatten()
    return {i: [set(row.tolist()) for row in out[0][real]] for i, out in outputs.items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_changed_share_of_a_sliced_router_is_counted_in_the_teachers_slots(family):
    teacher, text = tiny(family), blocks(6, 11)
    student, kept = sliced(teacher), kept_of(teacher)
    before, after = (score_blocks(m, list(text.batches(2))).routing for m in (teacher, student))
    mapping = {layer.index: kept for layer in student.layers}
    shares = routing_changed(before, after, mapping)
    theirs, mine = choices(teacher, text), choices(student, text)
    for layer, share in shares.items():
        moved = [
            a != {kept[row] for row in b} for a, b in zip(theirs[layer], mine[layer], strict=True)
        ]
        assert len(moved) == int(text.mask.sum())
        assert share == pytest.approx(sum(moved) / len(moved))
    assert set(shares) == {layer.index for layer in teacher.layers}
    assert 0 < sum(shares.values()) < len(shares)


@pytest.mark.parametrize("make", [masked, merged])
def test_routers_that_keep_their_rows_are_compared_row_by_row(make):
    teacher, text = tiny("qwen3_moe"), blocks(6, 11)
    student = make(teacher)
    before, after = (score_blocks(m, list(text.batches(2))).routing for m in (teacher, student))
    mapping = {} if make is merged else {layer.index: kept_of(teacher) for layer in teacher.layers}
    shares = routing_changed(before, after, mapping)
    theirs, mine = choices(teacher, text), choices(student, text)
    for layer, share in shares.items():
        moved = [a != b for a, b in zip(theirs[layer], mine[layer], strict=True)]
        assert share == pytest.approx(sum(moved) / len(moved))
    # only what lies below the first router can move a router that kept its rows
    assert (shares[teacher.layers[0].index] == 0) == (make is merged)


def test_a_model_routes_as_it_did():
    teacher, text = tiny("deepseek_v3"), blocks(4, 9)
    twice = [score_blocks(teacher, list(text.batches(n))).routing for n in (1, 4)]
    assert routing_changed(*twice, {}) == {layer.index: 0.0 for layer in teacher.layers}


def test_padding_is_not_recorded_and_nothing_is_recorded_afterwards():
    model, text = tiny("qwen3_moe"), blocks(4, 9)
    stock = [layer.experts for layer in model.layers]
    with record_routing(model) as routing:
        routing.mask = text.mask
        model.hidden(text.input_ids, text.mask)
        assert [layer.experts for layer in model.layers] == stock
    model.hidden(text.input_ids, text.mask)
    assert routing.slots(0).shape == (int(text.mask.sum()), 2)
    assert int(text.mask.sum()) < text.mask.numel()
    assert bool((routing.slots(0)[:, 0] < routing.slots(0)[:, 1]).all())


def test_recording_ends_when_the_forward_fails():
    model = tiny("qwen3_moe")
    with pytest.raises(IndexError), record_routing(model):
        model.hidden(torch.tensor([[1000, 2]]))
    assert not any(layer.experts._forward_pre_hooks for layer in model.layers)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([[0, 1], [2, 3]], 1.0),
        ([[0, 0], [0, 0]], 0.0),
        ([[0, 1], [0, 1]], 0.5),
        ([[0, 1], [0, 2]], 0.75),
    ],
)
def test_load_entropy_is_1_for_an_even_load_and_0_for_one_slot(chosen, expected):
    routing = Routing({3: [torch.tensor(chosen, dtype=torch.int16)]}, {3: 4})
    assert routing.load_entropy(3) == pytest.approx(expected)


def test_load_entropy_counts_rows_that_no_token_chose():
    routing = Routing({0: [torch.tensor([[0, 1]], dtype=torch.int16)]}, {0: 16})
    assert routing.load_entropy(0) == pytest.approx(0.25)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_load_by_expert_stands_in_the_teachers_places(family):
    teacher, text = tiny(family), blocks(6, 11)
    student, kept = sliced(teacher), kept_of(teacher)
    routing = score_blocks(student, list(text.batches(2))).routing
    mapping = {layer.index: kept for layer in student.layers}
    mine = choices(student, text)
    for layer in teacher.layers:
        load = load_by_expert(routing, layer.index, mapping, layer.num_experts)
        assert [slot for slot, share in enumerate(load) if share is not None] == sorted(kept)
        chosen = [kept[row] for token in mine[layer.index] for row in token]
        for slot in kept:
            assert load[slot] == pytest.approx(chosen.count(slot) / len(chosen), abs=1e-6)


def test_a_router_that_keeps_its_rows_has_a_load_for_each():
    routing = Routing({0: [torch.tensor([[0, 1], [0, 3]], dtype=torch.int16)]}, {0: 4})
    assert load_by_expert(routing, 0, {0: (1, 2)}, 4) == [0.5, 0.25, 0.0, 0.25]
