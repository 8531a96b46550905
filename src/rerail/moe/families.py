"""Every name that transformers and its families give to a part of a model; no other file has one.

Inside the seam (`experts(hidden, index, weights)` beside a router) families differ in names, and
a family that is odd gets a row here. Two sorts of words are not here, because they are ours too:
the fused tensors `gate_up_proj` and `down_proj`, which plans name, and the calls that every
`PreTrainedModel` answers, such as `save_pretrained`.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from rerail.errors import InputError

OUTSIDE_THE_SEAM = {
    "llama4": "its experts are called with routing already applied",
    "llama4_text": "its experts are called with routing already applied",
    "dbrx": "its experts hold two-dimensional fused matrices",
    "doge": "its experts are rows of an embedding",
    "jetmoe": "its attention is routed too",
    "longcat_flash": "its router has rows for identity experts",
    "nllb-moe": "it is an encoder-decoder with experts as a dictionary",
    "step3p7": "its experts take other arguments",
    "zaya": "its router has a row for no expert and reads the router of the layer before",
    "deepseek": "it needs remote code (deepseek-moe-16b-base is not in transformers 5.23)",
}


def check_family(model_type: str) -> None:
    """Check that a family is inside the seam.

    Raises:
        InputError: it is not; the sentence has the reason.
    """
    if model_type in OUTSIDE_THE_SEAM:
        reason = OUTSIDE_THE_SEAM[model_type]
        raise InputError(f"model family {model_type!r} is not supported: {reason}")


# ---- the MoE block: router and experts


@dataclass(frozen=True)
class Traits:
    """Where a family keeps its router.

    Attributes:
        router: the block's attribute.
        rows: the path from there to the rows (E, H).
        norm: of the block, where it is the decoder layer itself: experts read its output, and the
            router its input, of which only the direction counts.
        probabilities: whether the router returns a softmax in the place of logits.
    """

    router: str
    rows: str = "weight"
    norm: str = ""
    probabilities: bool = False


_ODD: dict[str, Traits] = {
    "AfmoeSparseMoeBlock": Traits("router", "gate.weight"),
    "HunYuanMoEV1Moe": Traits("gate", "wg.weight"),
    "Gemma4TextDecoderLayer": Traits("router", "proj.weight", "pre_feedforward_layernorm_2", True),
}
_ROUTERS = ("gate", "router")
# an integer on a module that is the number of router rows
_ROW_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
_TOP_K = ("num_experts_per_tok", "top_k_experts")
_CORRECTIONS = ("correction_bias", "expert_bias", "balancing_biases")


def _find_traits(block: nn.Module) -> Traits | None:
    if odd := _ODD.get(type(block).__name__):
        return odd
    for name in _ROUTERS:
        rows = getattr(getattr(block, name, None), "weight", None)
        if rows is not None and rows.dim() == 2:
            return Traits(name)
    return None


def rows_of_others(router: nn.Module) -> int:
    """Return how many of a router's last rows belong to shared experts, which are not chosen."""
    return int(cast(Any, router).n_shared_experts) if hasattr(router, "n_total_experts") else 0


def is_moe_block(module: nn.Module) -> bool:
    """Return whether a module owns both a router and experts."""
    return hasattr(module, "experts") and _find_traits(module) is not None


def traits_of(block: nn.Module) -> Traits:
    """Return where an MoE block keeps its router."""
    traits = _find_traits(block)
    assert traits is not None
    return traits


def experts_of(block: nn.Module) -> nn.Module:
    """Return the experts of an MoE block: the family's module, or what stands in its place."""
    return cast(nn.Module, block.experts)


def set_experts(block: nn.Module, experts: nn.Module) -> None:
    """Put a module in the place of a block's experts."""
    block.experts = experts


def top_k_of(block: nn.Module, router: nn.Module) -> int:
    """Return K: from the router, the block, or the config of the experts."""
    for owner in (router, block):
        if isinstance(k := getattr(owner, "top_k", None), int):
            return k
    config = cast(Any, experts_of(block)).config
    return next(int(k) for name in _TOP_K if (k := getattr(config, name, None)) is not None)


def router_input(block: nn.Module, hidden: Tensor) -> Tensor | None:
    """Return what the router reads (T, H) when the experts read `hidden`, up to a positive factor.

    None where the block is called with one input for both.
    """
    if not (name := traits_of(block).norm):
        return None
    # the norm of the router has no weights, so its input may have any length
    weight = cast(Tensor, block.get_submodule(name).weight)
    return (hidden / weight).nan_to_num(0, 0, 0)


def reads_residual(block: nn.Module) -> bool:
    """Return whether the router reads the residual stream itself."""
    return bool(traits_of(block).norm)


def returns_probabilities(block: nn.Module) -> bool:
    """Return whether the router returns a softmax in the place of logits."""
    return traits_of(block).probabilities


def groups_of(router: nn.Module) -> int:
    """Return the groups of a group-limited router; 1 where routing is not grouped."""
    # DeepSeek-V2 names its method, and has group counts that `greedy` does not use
    method = getattr(router, "topk_method", "group_limited_greedy")
    groups = getattr(router, "num_group", None) or getattr(router, "n_group", None)
    return int(groups) if groups and method != "greedy" else 1


def top_groups_of(router: nn.Module) -> int:
    """Return the groups chosen for a token; 1 where routing is not grouped."""
    return int(getattr(router, "topk_group", None) or 1)


def set_row_count(module: nn.Module, before: int, after: int) -> None:
    """Change a module's own counts of router rows, where it has some."""
    for name in _ROW_COUNTS:
        if getattr(module, name, None) == before:
            setattr(module, name, after)


def is_correction_bias(name: str) -> bool:
    """Return whether a tensor of a router moves the choice of experts, but not their weights."""
    return name.endswith(_CORRECTIONS)


def is_transposed(experts: nn.Module) -> bool:
    """Return whether fused tensors are (in, out); transformers flags it on every module."""
    return bool(getattr(experts, "is_transposed", False))


def is_concatenated(experts: nn.Module) -> bool:
    """Return whether gate and up lie one below the other, not row by row in turn."""
    return bool(getattr(experts, "is_concatenated", True))


def has_norm_after(experts: nn.Module) -> bool:
    """Return whether experts norm their outputs before the gate weights."""
    return bool(getattr(experts, "has_post_expert_norm", False))


def norm_after(experts: nn.Module) -> nn.Module | None:
    """Return the norm of experts' outputs before the gate weights, None where there is none."""
    return cast(nn.Module, experts.post_expert_norm) if has_norm_after(experts) else None


def middle_of(experts: nn.Module, gate_up: Tensor) -> Tensor:
    """Return the middle activations (n, I) of gate and up outputs (n, 2I) in the family's order.

    Activation, clamps and scales are the family's own.
    """
    return cast(Tensor, cast(Any, experts)._apply_gate(gate_up))


# ---- around the block: decoder layers, attention, body and head


def decoder_layer(model: nn.Module, block_path: str) -> nn.Module:
    """Return the decoder layer around an MoE block, or the block where it is one itself."""
    block = model.get_submodule(block_path)
    is_decoder = is_moe_block(block) and reads_residual(block)
    return block if is_decoder else model.get_submodule(block_path.rpartition(".")[0])


def decoder_layers(model: nn.Module, block_path: str) -> list[nn.Module]:
    """Return all decoder layers, dense ones too; `block_path` names the block of one of them."""
    path = block_path.split(".")
    depth = next(i for i, part in enumerate(path) if part.isdigit())
    return list(model.get_submodule(".".join(path[:depth])).children())


def layer_number(block_path: str) -> int | None:
    """Return the position of a block's decoder layer, None where its path has no number."""
    return next((int(part) for part in block_path.split(".") if part.isdigit()), None)


def attention_of(decoder: nn.Module) -> nn.Module | None:
    """Return the attention module of a decoder layer, None where it has none."""
    return cast(nn.Module | None, getattr(decoder, "self_attn", None))


def body_of(model: nn.Module) -> Any:
    """Return the model without its head."""
    return model.base_model


def path_in_body(model: nn.Module, path: str) -> str:
    """Return the path of a module below the body."""
    return path.removeprefix(f"{model.base_model_prefix}.")


@contextlib.contextmanager
def router_logits_off(config: Any) -> Iterator[None]:
    """Compute no auxiliary loss for a while."""
    before = config.__dict__.get("output_router_logits")
    if before:
        config.output_router_logits = False
    try:
        yield
    finally:
        if before:
            config.output_router_logits = before


# ---- the config

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# the width of an expert, the name that is the experts' alone first
WIDTH_NAMES = ("moe_intermediate_size", "intermediate_size")
_IMPLEMENTATIONS = ("experts_implementation", "attn_implementation")


def config_owners(config: Any) -> list[Any]:
    """Return a config and, where that is another one, the config of its text model."""
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def count_names() -> tuple[str, ...]:
    """Return the names that configs give to the number of experts."""
    return _EXPERT_COUNTS


def set_expert_count(config: Any, count: int) -> None:
    """Write the number of experts under each name that a config has for it."""
    for owner in config_owners(config):
        for name in _EXPERT_COUNTS:
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, count)


def expert_entries(config: Any) -> dict[str, int]:
    """Return what a config says of the number and the width of experts."""
    values = {n: getattr(config.get_text_config(), n, None) for n in _EXPERT_COUNTS + WIDTH_NAMES}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def match_row_counts(model: Any) -> None:
    """Let a model's own copies of the expert count agree with its routers, in place.

    The auxiliary loss reads them. Where layers differ it cannot be computed, and is off.
    """
    counts = {_row_count(module) for module in model.modules() if is_moe_block(module)}
    if len(counts) > 1:
        if getattr(model.config, "output_router_logits", False):
            model.config.output_router_logits = False
        return
    for count in counts:
        for name in _ROW_COUNTS:
            if isinstance(getattr(model, name, None), int):
                setattr(model, name, count)


def _row_count(block: nn.Module) -> int:
    traits = traits_of(block)
    rows: Any = getattr(block, traits.router)
    for part in traits.rows.split("."):
        rows = getattr(rows, part)
    return int(rows.shape[0]) - rows_of_others(getattr(block, traits.router))


def expert_count_aliases(config: Any, written: Mapping[str, Any]) -> dict[str, int]:
    """Return the expert count of a written config under the other names that the family reads.

    transformers 5.23 writes `num_local_experts` for Qwen3-MoE, and readers before 5.16 look for
    `num_experts`; other families have the like. Which names mean the same says `attribute_map`.
    """
    names = type(config).attribute_map.items()
    counts = {alias: written[n] for alias, n in names if n in _EXPERT_COUNTS and n in written}
    return {alias: count for alias, count in counts.items() if alias in _EXPERT_COUNTS}


def implementations(config: Any) -> dict[str, Any]:
    """Return the chosen implementations by the names under which `from_pretrained` takes them.

    Each is a word, or where the config has parts the words by part (the whole is `""`): a tower may
    have fewer implementations than its text model.
    """
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    owners = {"": config, **{name: part for name, part in parts.items() if part is not None}}
    chosen: dict[str, Any] = {}
    for name in _IMPLEMENTATIONS:
        words = {part: getattr(owner, f"_{name}", None) for part, owner in owners.items()}
        known = {part: word for part, word in words.items() if word is not None}
        chosen[name] = known if len(owners) > 1 and known else words[""]
    return chosen


def set_implementations(config: Any, chosen: Mapping[str, Any]) -> None:
    """Choose implementations, as `implementations` returned them."""
    for name, value in chosen.items():
        setattr(config, f"_{name}", value)


def experts_implementation(config: Any) -> str | None:
    """Return how experts compute (`eager`, `grouped_mm`, ...); None where nobody chose."""
    word: str | None = getattr(config, "_experts_implementation", None)
    return word


def is_eager(experts: nn.Module) -> bool:
    """Return whether experts run as a loop over experts."""
    return experts_implementation(experts.config) in (None, "eager")


def own_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return the name that a loaded model has for each stored tensor, by the stored name.

    Several stored tensors may become one of the model (experts are stacked).
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    own = model.state_dict()
    prefix = model.base_model_prefix
    return {n: rename_source_key(n, renamings, converters, prefix, own)[0] for n in stored}


def float32_patterns(model: Any) -> list[set[str]]:
    """Return the sets of name patterns that a family keeps in float32; they may be added to."""
    return [model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict]


def always_float32(model: Any, dtype: Any) -> list[str]:
    """Return parts of the names of parameters that stay float32 when the model is in `dtype`."""
    return list(model._get_dtype_plan(dtype))
