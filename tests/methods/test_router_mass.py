import torch

from families import tiny, tokens
from rerail.methods.pmq import RouterMass
from rerail.statistics.collect import collect


def test_mass_is_the_softmax_share_before_the_model_normalises_it() -> None:
    model, ids, seen = tiny("qwen3_moe"), tokens(3, 8), []
    layer = model.layers[0]
    layer.router.register_forward_hook(lambda m, a, out: seen.append((out[0], out[2])))
    valid = torch.ones_like(ids, dtype=torch.bool)
    found = collect(model, [(ids, valid)], [RouterMass()]).tensors[0][RouterMass().name]
    [(logits, index)] = seen
    share, expected = logits.softmax(-1), torch.zeros(8, dtype=torch.float64)
    for t in range(len(index)):
        for e in index[t].tolist():
            expected[e] += share[t, e].double()
    torch.testing.assert_close(found, expected)
    assert found.sum() < len(index)  # gates of this family sum to one a token


def test_mass_does_not_depend_on_batches() -> None:
    model, ids = tiny("mixtral"), tokens(4, 8)
    valid = torch.ones_like(ids, dtype=torch.bool)
    whole = collect(model, [(ids, valid)], [RouterMass()]).tensors[0]["router_mass"]
    parts = list(zip(ids.split(1), valid.split(1), strict=True))
    torch.testing.assert_close(
        collect(model, parts, [RouterMass()]).tensors[0]["router_mass"], whole
    )
