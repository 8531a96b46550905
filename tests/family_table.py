"""Take every MoE family of transformers the whole way, and write down how far each one comes.

`make families` runs this: a tiny random checkpoint of each model type is opened and compressed by
three methods of three forms, one student is repaired for five steps, and each is exported in one
of three targets and reloaded in a fresh process. The table goes to docs/families.md.
"""

import argparse
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import rerail.export.reload
from families import moe_types, random_model, tiny_config
from rerail import api
from rerail.errors import InputError
from rerail.export.reload import ReloadError, verdict, write_task
from rerail.export.targets import as_written
from rerail.language_model import LanguageModel
from rerail.moe.families import OUTSIDE_THE_SEAM
from rerail.moe.left_out import left_out_of
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource
from rerail.text.calibration import TokenBlocks

PAGE = Path(__file__).parents[1] / "docs/families.md"
# method, budget, and the target in which its student is exported
WAYS = (("reap", 0.5, "native"), ("hc_smoe", 0.5, "package"), ("rtn", 4, "remote"))
STEPS = 5
_SCRIPT = Path(rerail.export.reload.__file__).with_name("reload_script.py")


class Result(NamedTuple):
    """How far a family comes.

    Attributes:
        family: the model type.
        state: `whole`, `refused` or `broken`.
        note: of a whole one layers, experts and what lies beside the model; of others the reason.
    """

    family: str
    state: str
    note: str


class Fresh:
    """Fresh processes that reload checkpoints."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("fresh_process.py"))]
        self._process = subprocess.Popen(
            [*command, str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def reload(self, path: Path, model: MoEModel, form: str) -> float:
        """Return the largest difference of logits, as `check_reload` does in its own process."""
        with tempfile.TemporaryDirectory() as name:
            exchange = Path(name)
            write_task(exchange, ids(2, seed=7), model, form)
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(path, exchange, file=self._process.stdin, flush=True)
            if self._process.stdout.readline().strip() != "0":
                raise ReloadError((exchange / "error.txt").read_text().strip().splitlines()[-1])
            return verdict(path, exchange, model)

    def close(self) -> None:
        """End them."""
        with self._process:  # which closes its pipes and waits
            pass


@contextmanager
def fresh_processes() -> Iterator[Fresh]:
    fresh = Fresh()
    try:
        yield fresh
    finally:
        fresh.close()


def ids(count: int, length: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (count, length), generator=generator)


def text() -> TokenBlocks:
    blocks = ids(12)
    return TokenBlocks(blocks, torch.ones_like(blocks, dtype=torch.bool), "families")


def result_of(family: str, folder: Path, fresh: Fresh) -> Result:
    """Take one family the whole way below an empty folder."""
    try:
        source = checkpoint(family, folder / "parent")
    except InputError as error:
        return Result(family, "refused", str(error).replace(f"{folder}/parent", "..."))
    except Exception as error:
        return Result(family, "broken", _first_line(error))
    try:
        return Result(family, "whole", whole_way(source, folder, fresh))
    except Exception as error:
        logging.getLogger(__name__).debug("%s", family, exc_info=True)
        return Result(family, "broken", _first_line(error))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0]}"[:300]


def checkpoint(family: str, folder: Path) -> ModelSource:
    """Write a tiny random checkpoint with all that the family's widest class has.

    Raises:
        InputError: the family is refused by its config.
    """
    source = ModelSource(str(folder))
    # without a causal class a config is all that is read, and the family's own will do
    causal = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in OUTSIDE_THE_SEAM
    config = tiny_config(family) if causal else CONFIG_MAPPING[family]()
    config.save_pretrained(folder)
    source.meta()
    auto: Any = AutoModelForCausalLM
    if family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        auto = AutoModelForImageTextToText
    random_model(auto, config).save_pretrained(folder)
    return source


def whole_way(source: ModelSource, folder: Path, fresh: Fresh) -> str:
    """Open, count, compress, repair, export and reload; return what was there."""
    teacher = LanguageModel(source.load(), None, source)
    count = check_layers(teacher.model)
    for number, (method, budget, form) in enumerate(WAYS):
        student = api.compress(teacher, method, budget, text())
        if not number:
            student = repaired(student, teacher)
        path = api.save(student, folder / form, form)
        dtype = source.stored_dtype()
        fresh.reload(path, as_written(student.model, dtype, form=form), form)
        check_beside(teacher.model, path, folder / "parent", native=form == "native")
    beside = len(left_out_of(teacher.model.model).names)
    first = teacher.model.layers[0]
    shape = f"{count} layers of {first.num_experts} experts, top {first.top_k}"
    return shape + (f"; {beside} tensors beside the model, carried over" if beside else "")


def check_layers(model: MoEModel) -> int:
    """Return the number of MoE layers, which transformers' own modules must agree with."""
    stacks = [
        module
        for name, module in model.model.named_modules()
        if hasattr(module, "down_proj") and getattr(module.down_proj, "ndim", 0) == 3
        if not any(word in name for word in ("shared", "vision", "visual", "audio"))
    ]
    assert len(stacks) == len(model.layers), f"{len(stacks)} stacks, {len(model.layers)} layers"
    for module, layer in zip(stacks, model.layers, strict=True):
        assert len(module.down_proj) == layer.num_experts, f"{layer.name}: other experts"
    return len(stacks)


def check_beside(teacher: MoEModel, path: Path, parent: Path, native: bool) -> None:
    """Check that what lies beside the model was carried over, to the bit.

    Args:
        teacher: the parent as it was loaded.
        path: the export.
        parent: the checkpoint.
        native: whether the export has all other tensors under the same names, but for experts.
    """
    written = tensors_of(path)
    before = tensors_of(parent)
    for name in left_out_of(teacher.model).names:
        assert torch.equal(before[name], written[name]), f"{name} has changed"
    lost = [name for name in before if name not in written and "expert" not in name]
    assert not native or not lost, f"lost: {lost[:3]}"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def repaired(student: LanguageModel, teacher: LanguageModel) -> LanguageModel:
    """Return a student after five steps, which must have lowered the KL by its router rows only."""
    before = {n: t.clone() for n, t in student.model.model.state_dict().items()}
    done = api.repair(
        student,
        teacher,
        text(),
        batch_size=2,  # of the ten blocks that do not validate
        epochs=1,
        learning_rate=1e-3,
        warmup=0,
    )
    assert done.fit.steps == STEPS, f"{done.fit.steps} steps"
    assert done.fit.kl_best <= done.fit.kl_first, f"{done.fit.kl_first} to {done.fit.kl_best}"
    after = done.student.model.model.state_dict()
    changed = {n for n, t in after.items() if not torch.equal(t, before[n])}
    rows = [getattr(*la.rows_owner()) for la in done.student.model.layers]
    own = {n for n, p in done.student.model.model.named_parameters() if any(p is r for r in rows)}
    assert bool(changed) == (done.fit.best_step > 0), f"step {done.fit.best_step}: {changed}"
    assert changed <= own, f"moved: {sorted(changed - own)[:3]}"
    return done.student


def results(families: Sequence[str], report: Any = lambda *_: None) -> list[Result]:
    """Take families the whole way, one after the other."""
    done = []
    with fresh_processes() as fresh:
        for family in families:
            with tempfile.TemporaryDirectory() as folder:
                done.append(result_of(family, Path(folder), fresh))
            report(*done[-1])
    return done


_HEAD = """# Model families

Written by `make families` for transformers {version}. A tiny random checkpoint of every model type
whose config counts experts is opened, compressed by {methods}, repaired for {steps}
steps, exported as {forms}, and reloaded in a fresh process with equal logits.

*Whole* families come through all of it. *Refused* ones end with the sentence beside them, before
any weight is loaded. {counts}.

| model type | | |
|---|---|---|
"""


def page(done: Sequence[Result]) -> str:
    """Return the table."""
    states = ("whole", "refused", "broken")
    counts = [f"{sum(r.state == state for r in done)} are {state}" for state in states]
    head = _HEAD.format(
        version=transformers.__version__,
        methods=", ".join(way[0] for way in WAYS),
        steps=STEPS,
        forms=", ".join(way[2] for way in WAYS),
        counts=", ".join(counts),
    )
    rows = [f"| `{r.family}` | {r.state} | {r.note} |\n" for r in sorted(done)]
    return head + "".join(rows)


def families_in(path: Path) -> dict[str, str]:
    """Return state by model type of a written table."""
    lines = path.read_text(encoding="utf-8").splitlines()
    cells = [line.split("|") for line in lines if line.startswith("| `")]
    return {cell[1].strip(" `"): cell[2].strip() for cell in cells}


def _show(*cells: str) -> None:
    sys.stdout.write("\t".join(cells) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types; all, where none is named")
    parser.add_argument("--verbose", action="store_true", help="show where a family breaks")
    arguments = parser.parse_args()
    chosen = arguments.families
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger(__name__).setLevel(logging.DEBUG if arguments.verbose else logging.ERROR)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("rerail").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    done = results(chosen or moe_types(), _show)
    if not chosen:
        PAGE.write_text(page(done), encoding="utf-8")
    sys.exit(any(r.state == "broken" for r in done))


if __name__ == "__main__":
    main()
