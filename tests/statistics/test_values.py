"""Every routed statistic against a plain loop over tokens and choices, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from families import CONFIGS, tiny
from measuring import Seen, batches, everything
from rerail.moe.model import MoELayer
from rerail.statistics.collect import collect


class Around(Seen):
    """Also the router's logits and what went into the norm before the block."""

    def __init__(self, model: Any, family: str):
        super().__init__(model)
        self.logits: dict[int, list[Tensor]] = {la.index: [] for la in model.layers}
        self.residual: dict[int, list[Tensor]] = {la.index: [] for la in model.layers}
        for layer, decoder in zip(model.layers, model.model.base_model.layers, strict=True):
            layer.router.register_forward_hook(
                lambda _, __, out, i=layer.index: self.logits[i].append(out[0].reshape(-1, 8))
            )
            if family == "flex_olmo":
                continue
            names = ("pre_mlp_layernorm", "ffn_norm", "post_attention_layernorm")
            norm = next(n for name in names if (n := getattr(decoder, name, None)) is not None)
            norm.register_forward_pre_hook(
                lambda _, args, i=layer.index: self.residual[i].append(args[0].reshape(-1, 16))
            )


def middle_of(layer: MoELayer, hidden: Tensor, slot: int) -> Tensor:
    """Return act(gate) * up (T, I) of one expert by the family's own gating."""
    experts: Any = layer.experts
    gate_up = experts.gate_up_proj[slot]
    mixed = hidden @ (gate_up if layer.layout.transposed else gate_up.T)
    if hasattr(experts, "gate_up_proj_bias"):
        mixed = mixed + experts.gate_up_proj_bias[slot]
    return experts._apply_gate(mixed)


def reference(layer: MoELayer, seen: Around) -> dict[str, Tensor]:
    """Add everything up, one token and choice at a time."""
    i = layer.intermediate_size
    sums = {
        "count": torch.zeros(8), "max_output": torch.zeros(8), "deviation": torch.zeros(8),
        "output_sum_routed": torch.zeros(8, 16), "output_squares": torch.zeros(8, 16),
        "gated_output_g2": torch.zeros(8, 16), "input_moment": torch.zeros(8, 16, 16),
        "middle_moment_g0": torch.zeros(8, i, i),
        "middle_moment_g2": torch.zeros(8, i, i), "middle_energy": torch.zeros(8, i),
        "layer_moment": torch.zeros(16, 16), "pooled_middle_moment": torch.zeros(i, i),
        "middle_peak": torch.zeros(8, i), "logit_gram": torch.zeros(8, 8),
        "input_squares": torch.zeros(8, 16), "middle_squares": torch.zeros(8, i),
        **{f"moment_g{a}_n{p}": torch.zeros(8) for a in range(3) for p in range(3)},
    }  # fmt: skip
    sums = {name: tensor.double() for name, tensor in sums.items()}
    residuals = seen.residual[layer.index] or [None] * 3
    parts = zip(
        seen.handed[layer.index], seen.logits[layer.index], residuals, batches(), strict=True
    )
    for (hidden, index, weights), logits, residual, (_, mask) in parts:
        ones = torch.ones(len(hidden), 1)
        outputs = [layer.experts.forward(hidden, torch.full((len(hidden), 1), e), ones).double() for e in range(8)]  # fmt: skip # noqa: E501
        middles = [middle_of(layer, hidden, e).double() for e in range(8)]
        for t in mask.flatten().nonzero().flatten().tolist():
            x, z = hidden[t].double(), logits[t].double()
            sums["logit_gram"] += torch.outer(z, z)
            sums["layer_moment"] += torch.outer(x, x)
            chosen = [(int(e), float(g)) for e, g in zip(index[t], weights[t], strict=True)]
            y = sum(g * outputs[e][t] for e, g in chosen)
            turned = 0.0
            if residual is not None:
                h = residual[t].double()
                turned = max(0.0, 1 - float(F.cosine_similarity(h, h + y, dim=0)))
            for e, g in chosen:
                f, m = outputs[e][t], middles[e][t]
                n = float(f.norm())
                sums["count"][e] += 1
                sums["deviation"][e] += g * n * turned
                sums["max_output"][e] = max(sums["max_output"][e], f.abs().max())
                sums["output_sum_routed"][e] += f
                sums["output_squares"][e] += f**2
                sums["gated_output_g2"][e] += g**2 * f
                sums["input_moment"][e] += torch.outer(x, x)
                sums["pooled_middle_moment"] += torch.outer(m, m)
                sums["middle_moment_g0"][e] += torch.outer(m, m)
                sums["middle_moment_g2"][e] += g**2 * torch.outer(m, m)
                sums["input_squares"][e] += x**2
                sums["middle_squares"][e] += m**2
                sums["middle_energy"][e] += (g * m) ** 2
                sums["middle_peak"][e] = torch.maximum(sums["middle_peak"][e], (g * m).abs())
                for a in range(3):
                    for p in range(3):
                        sums[f"moment_g{a}_n{p}"][e] += g**a * n**p
    return sums


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_values_are_those_of_a_loop_over_tokens(family: str, implementation: str) -> None:
    model, plain = tiny(family), tiny(family)
    model.model.set_experts_implementation(implementation)
    found = collect(model, batches(), everything(family))
    seen = Around(plain, family)
    for ids, mask in batches():
        plain.hidden(ids, mask)
    for layer in plain.layers:
        expected = reference(layer, seen)
        held = found.tensors[layer.index]
        assert {s.name for s in everything(family)} - set(expected) == {
            "output_sum", "token_count", "token_sample_20",
        }  # fmt: skip
        for name in expected.keys() & held.keys():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(
                held[name].double(), expected[name], atol=3e-5 * scale, rtol=1e-4, msg=name
            )
