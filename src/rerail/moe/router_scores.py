"""The scores by which a router weighs experts, read off its own forward."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def router_scores(router: nn.Module, args: Any, named: Any, experts: int) -> Tensor | None:
    """Return a router's scores before top-k, without bias or scaling, float32 (T, E).

    They are what gate weights are gathered from, or what top-k is taken of where nothing is
    gathered. A router that takes top-k of its logits (gpt_oss, granitemoe) scores only the chosen
    experts; what its softmax would be over all of them stands for the scores then.

    Args:
        router: a family's router, or a mask around one; it runs once more.
        args: what its forward is given.
        named: what its forward is given by name.
        experts: E.

    Returns:
        the scores, None where nothing in the forward has a column for each expert.
    """
    with _Watch(experts) as watch:
        router.forward(*args, **named)
    source = watch.gathered if watch.gathered is not None else watch.ranked
    if source is None or watch.logits is None:
        return None
    scores = source.float()
    # a mask has put -inf into the logits that were ranked
    are_logits = ((scores == watch.logits.float()) | scores.isneginf()).all()
    return F.softmax(scores, dim=-1) if are_logits else scores


def router_product(
    router: nn.Module, args: Any, named: Any, experts: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return what a router multiplies its rows with (T, H), and the product (T, E) without a mask.

    Both are None where it has no logits (T, E). Arguments are those of `router_scores`.
    """
    with _Watch(experts) as watch:
        router.forward(*args, **named)
    return watch.inputs, watch.logits


class _Watch(TorchFunctionMode):
    """Remembers the first logits and their input, and what was gathered or ranked, of E columns."""

    def __init__(self, experts: int):
        super().__init__()
        self.experts = experts
        self.logits: Tensor | None = None
        self.inputs: Tensor | None = None
        self.gathered: Tensor | None = None
        self.ranked: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        out = func(*args, **named)
        name = getattr(func, "__name__", "")
        if name in ("linear", "matmul", "mm") and self.logits is None and self._fits(out):
            self.logits, self.inputs = out, args[0] if args else named["input"]
        elif name in ("gather", "topk"):
            source = args[0] if args else named["input"]
            # copied, since a router may scale it in place afterwards
            if self._fits(source) and name == "topk":
                self.ranked = source.clone()
            elif self._fits(source) and self.gathered is None:
                self.gathered = source.clone()
        return out

    def _fits(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == self.experts
