import pytest
import torch

from families import ROUTERS, tiny, tokens
from rerail.moe.model import MoELayer, MoEModel
from rerail.moe.router import rows_of

KEPT = (0, 2, 3, 4, 5, 7)


def routed(model: MoEModel, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Return what each layer's experts are handed: slots and gate weights, by ascending slot."""
    inputs, hooks = {}, []
    for layer in model.layers:

        def record(_: object, args: tuple[torch.Tensor, ...], i: int = layer.index) -> None:
            index, order = args[1].sort(dim=1)
            inputs[i] = (index, args[2].gather(1, order))

        hooks.append(layer.experts.register_forward_pre_hook(record))
    model.hidden(ids)
    for hook in hooks:
        hook.remove()
    return inputs


def lift_dropped(layer: MoELayer) -> None:
    """Give the dropped experts huge biases, so that only a mask can hold them back."""
    for owner, recurse in ((layer.router, True), (layer.block, False)):
        for _, name, tensor, _ in rows_of(owner, 8, recurse=recurse):
            if name.endswith("bias"):
                tensor.data.view(-1)[[1, 6]] = 100.0


@pytest.mark.parametrize("family", ROUTERS)
def test_a_masked_router_never_selects_a_dropped_expert(family: str) -> None:
    model = tiny(family)
    for layer in model.layers:
        lift_dropped(layer)
    with torch.no_grad():
        before = routed(model, tokens(16, 32))
        for layer in model.layers:
            layer.mask_rows(KEPT)
        after = routed(model, tokens(16, 32))
    for i in (0, 1):
        assert set(before[i][0].flatten().tolist()) & {1, 6}
        assert set(after[i][0].flatten().tolist()) <= set(KEPT)
        assert torch.isfinite(after[i][1]).all()


@pytest.mark.parametrize("family", ROUTERS)
def test_a_masked_router_equals_a_sliced_one(family: str) -> None:
    masked, sliced = tiny(family), tiny(family)
    layer = masked.layers[0]
    layer.mask_rows(KEPT)
    sliced.layers[0].keep_rows(KEPT)
    assert sliced.layers[0].num_experts == 6
    assert layer.num_experts == 8
    with torch.no_grad():
        expected, actual = routed(sliced, tokens(4, 32))[0], routed(masked, tokens(4, 32))[0]
    assert torch.equal(torch.tensor(KEPT)[expected[0]], actual[0])
    torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ROUTERS)
def test_a_mask_that_drops_nothing_changes_no_bit(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        before = model.hidden(tokens())
        for layer in model.layers:
            layer.mask_rows(tuple(range(8)))
        assert torch.equal(model.hidden(tokens()), before)


def test_without_renormalisation_the_gates_of_kept_experts_grow() -> None:
    model = tiny("olmoe", norm_topk_prob=False)
    with torch.no_grad():
        before = routed(model, tokens(4, 32))[0]
        model.layers[0].mask_rows(KEPT)
        after = routed(model, tokens(4, 32))[0]
    same = (before[0] == after[0]).all(dim=1)
    assert same.any()
    assert (after[1][same] > before[1][same]).all()


@pytest.mark.parametrize("family", ROUTERS)
def test_only_kept_rows_get_gradients_through_a_mask(family: str) -> None:
    model = tiny(family)
    layer = model.layers[0]
    layer.mask_rows(KEPT)
    owner, name = layer.rows_owner()
    rows = getattr(owner, name).requires_grad_(True)
    model.hidden(tokens(8, 16)).square().sum().backward()
    gradient = rows.grad
    assert torch.isfinite(gradient).all()
    assert (gradient[[1, 6]] == 0).all()
    assert (gradient[list(KEPT)].abs().sum(dim=1) > 0).any()


@pytest.mark.parametrize("family", ROUTERS)
@pytest.mark.parametrize("form", ["keep_rows", "mask_rows"])
def test_neither_form_touches_what_a_teacher_shares(family: str, form: str) -> None:
    teacher = tiny(family)
    before = {name: t.clone() for name, t in teacher.model.state_dict().items()}
    student = teacher.with_shared_parameters()
    for layer in student.layers:
        getattr(layer, form)(KEPT)
    after = teacher.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("family", ROUTERS)
def test_sliced_rows_and_biases_are_the_kept_ones(family: str) -> None:
    teacher, student = tiny(family), tiny(family)
    size = teacher.layers[0].row_size
    student.layers[0].keep_rows(KEPT)
    pairs = [
        (owner(teacher.layers[0]), owner(student.layers[0]), recurse)
        for owner, recurse in ((lambda la: la.router, True), (lambda la: la.block, False))
    ]
    numbers = 0
    for old, new, recurse in pairs:
        full = {name: t for _, name, t, _ in rows_of(old, 8, recurse=recurse)}
        part = {name: (t, axis) for _, name, t, axis in rows_of(new, 6, recurse=recurse)}
        assert part.keys() == full.keys()
        for name, (tensor, axis) in part.items():
            others = range(8, full[name].shape[axis])  # of shared experts, which stay
            kept = torch.tensor([*KEPT, *others])
            assert torch.equal(tensor, full[name].index_select(axis, kept))
            numbers += tensor.numel() * 6 // tensor.shape[axis]
    assert numbers == 6 * size
