"""How good the student of a plan is on a text, for an allocation that searches."""

from collections.abc import Callable

from rerail.evaluate.perplexity import score_blocks
from rerail.moe.model import MoEModel
from rerail.plan.apply import apply_plan
from rerail.plan.plan import Plan
from rerail.statistics.collect import Progress
from rerail.text.calibration import TokenBlocks


def plan_fitness(
    teacher: MoEModel, text: TokenBlocks, measure: str, batch_size: int, progress: Progress
) -> Callable[[Plan], float]:
    """Return what judges a plan: its student's mean ESAP to the teacher, or minus its mean KL.

    In a group of processes all must call what is returned, and each scores its part of the text.

    Args:
        teacher: the original model.
        text: calibration blocks.
        measure: `esap` or `kl`.
        batch_size: blocks a forward.
        progress: wraps the batches of every forward of the text, to show a bar.
    """
    batches = list(text.batches(batch_size))
    states = score_blocks(teacher, batches, progress=progress).hidden
    assert states is not None

    def fitness(plan: Plan) -> float:
        scores = score_blocks(apply_plan(teacher, plan), batches, states, progress)
        mean = float((scores.kl if measure == "kl" else scores.esap).sum() / scores.tokens.sum())
        return -mean if measure == "kl" else mean

    return fitness
