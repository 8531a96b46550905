import pytest
import torch
from torch.nn import functional as F

from families import tiny
from rerail.experts.base import BankSpec, build_bank
from rerail.experts.grouped_basis import GroupedBasisExperts, bucket_of
from rerail.moe.model import MoELayer

GROUPS = (1, 0, 0, 1, 1, 0, 1, 0)
RANKS = {"gate": (3, 2), "up": (1, 4)}
FORMS = {"one": (1, 9, "silu"), "two": (2, 0, "tanh"), "plain": (1, 0, "identity")}


def build(layer: MoELayer, form: str, **options: str) -> GroupedBasisExperts:
    m, s, activation = FORMS[form]
    integers = {**RANKS, "groups": GROUPS, "bases": m, "buckets": s, "seed": 4}
    spec = BankSpec("grouped_basis", 8, (), integers, {"activation": activation, **options})
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in GroupedBasisExperts.shapes(spec, layer.dims).items()
    }
    return build_bank(spec, range(8), layer.index, {layer.index: layer.stock()}, tensors)


def expected(bank: GroupedBasisExperts, form: str, name: str, e: int) -> torch.Tensor:
    m, s, activation = FORMS[form]
    ranks, a, b = RANKS[name], bank.solved(f"{name}.A"), bank.solved(f"{name}.B")
    at = sum(ranks[GROUPS[i]] for i in range(e))
    own = a[:, at : at + ranks[GROUPS[e]]]
    rows = b[m * (ranks[0] if GROUPS[e] else 0) :][: m * ranks[GROUPS[e]]]
    bases = rows.chunk(m)
    alpha = bank.solved(f"{name}.alpha")[e] if m > 1 else torch.ones(1)
    mixed = sum(float(w) * basis for w, basis in zip(alpha, bases, strict=True))
    bent = {"silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x}[activation](mixed)
    made = own @ bent
    if s:
        ids = bucket_of(made.numel(), s, 4).long()
        counts = torch.bincount(ids, minlength=s)
        eta = bank.solved(f"{name}.eta")[e]
        made = made + (eta[ids] / counts[ids].sqrt()).view_as(made)
    return made


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("form", FORMS)
def test_every_expert_is_made_of_its_group_s_bases(family: str, form: str) -> None:
    layer = tiny(family).layers[0]
    bank = build(layer, form)
    for e in range(8):
        made = bank.materialise(e)
        for name in ("gate", "up"):
            torch.testing.assert_close(getattr(made, name), expected(bank, form, name, e))
        assert torch.equal(made.down, layer.stack().down[e])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", FORMS)
def test_what_runs_answers_as_whole_experts_and_is_what_is_counted(family: str, form: str) -> None:
    layer = tiny(family).layers[0]
    bank, whole = build(layer, form), build(layer, form, run="materialised")
    x, index, weights = torch.randn(9, 16), torch.randint(0, 8, (9, 2)), torch.rand(9, 2)
    made = whole(x, index, weights)
    scale = float(made.abs().max())
    torch.testing.assert_close(bank(x, index, weights), made, atol=1e-5 * scale, rtol=1e-4)
    counted = sum(p.numel() for p in bank.parameters())
    assert counted == sum(bank.stored().values()) == sum(whole.stored().values())
    assert bank.stored() == GroupedBasisExperts.predicted(bank.spec, layer.index, layer.dims)


@pytest.mark.parametrize("form", FORMS)
def test_few_tokens_take_factors_and_many_the_matrix(form: str) -> None:
    bank = build(tiny("qwen3_moe").layers[0], form)
    ready, taken = bank.prepared([0, 3, 4, 5]), set()
    for tokens in (1, 2, 64):
        x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1))
        for name, e in ready:
            bank.ready = ready
            made = bank.product(name, e, x, None)
            taken.add((tokens, made is not None))
            bank.ready = {}
            matrix = bank.matrix(name, e)
            if made is not None:
                torch.testing.assert_close(made, x @ matrix.mT, atol=1e-4, rtol=1e-4)
            bank.ready = ready
            assert torch.equal(bank.matrix(name, e), matrix)
            bank.ready = {k: v + 1 for k, v in ready.items()}
            assert not torch.equal(bank.matrix(name, e), matrix), "what is ready is what is used"
    assert bank.product("down", 0, x, None) is None
    assert (1, True) in taken
    if FORMS[form][1]:
        assert (64, False) in taken, "a residual has the size of the matrix"
