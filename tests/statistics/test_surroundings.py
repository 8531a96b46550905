import pytest
import torch

from families import tiny
from measuring import batches
from rerail.errors import OutOfReach
from rerail.methods.easy_ep import Deviation
from rerail.statistics.collect import collect
from rerail.statistics.moments import LogitGram


def test_a_family_that_norms_after_its_block_has_no_residual_to_find() -> None:
    with pytest.raises(OutOfReach, match=r"residual stream before model\.layers\.0\.mlp"):
        collect(tiny("flex_olmo"), batches(), [Deviation()])


def test_a_router_that_hides_its_logits_is_refused() -> None:
    model = tiny("qwen3_moe")
    router = model.layers[1].router
    forward = router.forward
    router.forward = lambda hidden: (None, *forward(hidden)[1:])
    with pytest.raises(OutOfReach, match=r"logits of model\.layers\.1\.mlp cannot be measured"):
        collect(model, batches(), [LogitGram()])


def test_silenced_slots_have_logit_zero() -> None:
    model = tiny("qwen3_moe")
    plain = collect(model, batches(), [LogitGram()]).tensors[0]["logit_gram"]
    model.layers[0].mask_rows((0, 1, 2, 4, 5, 6))
    masked = collect(model, batches(), [LogitGram()]).tensors[0]["logit_gram"]
    kept = [0, 1, 2, 4, 5, 6]
    assert not masked[[3, 7]].any()
    assert torch.equal(masked[kept][:, kept], plain[kept][:, kept])
