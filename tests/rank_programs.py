"""What processes run together in tests; each gives plain data and tensors."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch

import stored_forms
from families import tiny
from measuring import batches, everything
from rerail.compress.templates.skipper import GateTails
from rerail.distill.repair import Repair, repair
from rerail.distill.settings import RouterKD
from rerail.evaluate.perplexity import score_blocks
from rerail.methods.d2_moe import Fisher
from rerail.methods.moe_i2 import LossIncrease
from rerail.moe.model import MoEModel
from rerail.parallel import broadcast_from_first, group_rank_and_size, is_first, join
from rerail.plan.apply import apply_plan
from rerail.statistics.collect import collect
from rerail.statistics.segments import Segments
from rerail.teacher.hidden_states import CachedTeacher, final_hidden_states
from students import blocks, merged

# 18 of 24 blocks train; the last optimiser step has one batch only
SETTINGS = RouterKD(
    learning_rate=3e-3, batch_size=4, accumulate=2, epochs=2, evaluations=3, validation=0.25
)
UNEVEN = replace(SETTINGS, batch_size=3, accumulate=1, average="token")
STATISTICS = (*everything("qwen3_moe"), Fisher(), LossIncrease(), GateTails(), Segments(3, 4))


def give(program: Callable[[Path], Any], folder: str) -> None:
    """Run a program and leave what it returns."""
    torch.set_num_threads(1)
    given = program(Path(folder))
    torch.save(given, Path(folder) / f"{program.__name__}-{os.environ['RANK']}.pt")


def fitted(
    strategy: str,
    make: Callable[[MoEModel], MoEModel] = merged,
    settings: RouterKD = SETTINGS,
    folder: Path | None = None,
    callbacks: Any = (),
) -> dict[str, Any]:
    """Return what a repair did."""
    teacher, text = tiny("qwen3_moe"), blocks()
    before = [p.clone() for p in teacher.model.parameters()]
    states = CachedTeacher(hidden_states_alone(teacher, text))
    student = make(teacher)
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "strategy": strategy}
    trainer["callbacks"] = list(callbacks)
    done: Repair = repair(student, states, text, settings, trainer, 0, folder)
    for layer in student.layers:
        rows = done.after[f"layers.{layer.index}.router.weight"]
        assert torch.equal(layer.router_rows, rows)
    assert all(type(p) is torch.nn.Parameter for p in student.model.parameters())
    for old, new in zip(before, teacher.model.parameters(), strict=True):
        assert torch.equal(old, new)
    return {"curve": done.curve, "best_step": done.best_step, "after": done.after}


def hidden_states_alone(teacher: MoEModel, text: Any) -> torch.Tensor:
    """Return all states, computed by this process."""
    with torch.no_grad():
        return torch.cat([teacher.hidden(ids, mask) for ids, mask in text.batches(6)])


def form(name: str) -> Callable[[MoEModel], MoEModel]:
    """Return what makes a student of a stored form."""
    if name in stored_forms.KINDS:
        return lambda teacher: apply_plan(teacher, stored_forms.solved(teacher, name))
    return lambda teacher: apply_plan(teacher, getattr(stored_forms, name)())


FORMS = ("lent", "masked", "skipping", "basis", "low_rank", "quantized", "novice")


class Preempted(BaseException):
    """A job is requeued."""


def _requeue(signum: int, frame: Any) -> None:
    raise Preempted


class OneIsTold(lightning.Callback):
    """Only the last process gets the signal, in the middle of a round."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2 and not is_first():
            os.kill(os.getpid(), signal.SIGUSR2)


def interrupted(strategy: str, folder: Path) -> dict[str, Any]:
    """Return what a repair did that was preempted and begun again."""
    settings = replace(SETTINGS, evaluations=1)
    before = signal.signal(signal.SIGUSR2, _requeue)
    try:
        fitted(strategy, settings=settings, folder=folder, callbacks=[OneIsTold()])
    except Preempted:
        broadcast_from_first(lambda: None)  # the first process may still be writing
        [held] = folder.glob("*.ckpt")
        assert torch.load(held, weights_only=True)["global_step"] == 3
    else:
        raise AssertionError("nobody was preempted")
    finally:
        signal.signal(signal.SIGUSR2, before)
    return fitted(strategy, settings=settings, folder=folder)


def fits(folder: Path) -> dict[str, Any]:
    """Repair by DDP and FSDP2, evenly and not, with and without an interruption."""
    join()
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        found[f"{strategy} even"] = fitted(strategy)
        found[f"{strategy} uneven"] = fitted(strategy, settings=UNEVEN)
        found[f"{strategy} clipped"] = fitted(strategy, settings=replace(SETTINGS, clip=1e-3))
        settings = replace(SETTINGS, evaluations=1)
        found[f"{strategy} whole"] = fitted(strategy, settings=settings)
        held = folder / f"{strategy}-checkpoint"
        if is_first():
            held.mkdir()
        broadcast_from_first(lambda: None)
        found[f"{strategy} interrupted"] = interrupted(strategy, held)
    for name in FORMS:
        found[f"fsdp2 {name}"] = fitted("fsdp2", form(name))
    return found


def measures(folder: Path) -> dict[str, Any]:
    """Collect statistics, score a text and final_hidden_states, each process on its part."""
    join()
    model, text = tiny("qwen3_moe"), batches(5, size=2)
    filled = collect(model, text, STATISTICS)
    one_batch = collect(model, text[:1], STATISTICS)
    scores = score_blocks(model, text)
    student = score_blocks(merged(model), text, scores.hidden)
    return {
        "rank": group_rank_and_size()[0],
        "statistics": dict(filled.tensors),
        "one batch": dict(one_batch.tensors),
        "states": final_hidden_states(model, text),
        "nll": student.nll,
        "kl": student.kl,
        "esap": student.esap,
        "agree": student.agree,
        "tokens": student.tokens,
        "hidden": scores.hidden,
        "chosen": {i: student.routing.slots(i) for i in student.routing.chosen},
        "active": student.routing.mean_active_experts,
    }


def talks(folder: Path) -> dict[str, Any]:
    """Say who is first, and hand an exception on."""
    from rerail.errors import InputError, OutOfReach
    from rerail.parallel import (
        barrier,
        gather,
        gather_on_first,
        my_share,
        read_or_make,
        reduce_in_rank_order,
        run_on_first,
    )

    join()
    rank, size = group_rank_and_size()
    said = {}

    def refuse() -> None:
        raise OutOfReach("a sentence")

    def break_down() -> None:
        raise ZeroDivisionError("nothing")

    for name, make in (("refused", refuse), ("broken", break_down)):
        try:
            broadcast_from_first(make)
        except InputError as error:
            said[name] = [type(error).__name__, str(error)]
        except (RuntimeError, ZeroDivisionError) as error:
            said[name] = ["other", str(error)]
    path = folder / "kept.txt"

    def read() -> str | None:
        return path.read_text() if path.exists() else None

    def write(text: str) -> str:
        path.write_text(text)
        return text

    made: list[int] = []
    twice = [read_or_make(read, lambda: (made.append(1), f"of {rank}")[1], write) for _ in range(2)]
    barrier()
    return {
        **said,
        "joined": [rank, size],
        "first": broadcast_from_first(lambda: rank + 10),
        "alone": run_on_first(lambda: 5),
        "gathered": gather(rank),
        "gathered first": gather_on_first(rank),
        "folded": reduce_in_rank_order([rank], lambda a, b: a + b),
        "part": [[begin, list(items)] for begin, items in (my_share(range(5)), my_share([]))],
        "kept": twice,
        "made": len(made),
    }


def cell(folder: Path) -> list[dict[str, Any]]:
    """Run the cell of `words.json` twice; give the rows, as plain data."""
    import json

    from hydra import compose, initialize_config_dir

    from rerail.config.presets import config_root
    from rerail.run import pipeline as runner
    from rerail.run.compose import to_cell

    words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    with initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
        made = to_cell(compose("config", words), "rerail test", {})

    def rows() -> list[dict[str, Any]]:
        plain: list[dict[str, Any]] = json.loads(
            json.dumps([dict(row) for row in runner.run_cell(made, folder / "out")])
        )
        return plain

    first = rows()
    assert rows() == first
    return first
