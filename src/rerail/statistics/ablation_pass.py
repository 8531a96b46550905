"""The ablation pass: the true next-token loss with one slot never selected."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from rerail.errors import OutOfReach
from rerail.moe.model import MoELayer, MoEModel
from rerail.statistics.loss import summed_loss
from rerail.statistics.statistic import AblationStatistic, Filled


def ablation_pass(
    model: MoEModel,
    layers: Sequence[MoELayer],
    batches: Iterable[tuple[Tensor, Tensor]],
    filled: dict[int, Filled],
) -> None:
    """Fill the ablation statistics in `filled`: one forward for each slot of each layer and batch.

    Raises:
        OutOfReach: a layer has no slot to spare.
    """
    for layer in layers:
        least = layer.least_per_group * layer.num_groups
        if layer.num_experts - layer.num_groups < least:
            raise OutOfReach(
                f"the loss without one expert of layer {layer.index} cannot be measured: its "
                f"{layer.num_experts} experts are the fewest that its router can choose from; "
                f"allowed is a router with at least {least + layer.num_groups}"
            )
    device = next(model.model.parameters()).device
    for input_ids, mask in batches:
        ids, valid = input_ids.to(device), mask.to(device)
        # once a batch: the loss without a slot is compared with it for every slot and layer
        plain, tokens = summed_loss(model, ids, valid)
        for layer in layers:
            wanted = [s for s in filled[layer.index] if isinstance(s, AblationStatistic)]
            for e in range(layer.num_experts):
                others = tuple(slot for slot in range(layer.num_experts) if slot != e)
                # gate weights are normalised over the others, as if the slot had never been
                with layer.only(others):
                    without, _ = summed_loss(model, ids, valid)
                for s in wanted:
                    share = s.measure(float(plain), float(without), tokens)
                    tensor = filled[layer.index][s]
                    tensor[e] = s.merge(tensor[e], share)
