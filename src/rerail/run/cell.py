"""One cell of a sweep: its choices as typed values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import rerail.auto  # noqa: F401  (package checkpoints load like any other)
from rerail.code_version import code_version
from rerail.compress.base import Compressor, make_plan
from rerail.compress.sequential import sequential
from rerail.distill.making import check_arguments
from rerail.distill.repair import repair
from rerail.distill.ridge import check_ridge
from rerail.distill.schedule import Schedule
from rerail.distill.settings import Ridge, RouterKD, Settings
from rerail.distill.trainable import check_router_gradients
from rerail.distill.trainer import check_strategy
from rerail.errors import InputError
from rerail.evaluate.fitness import plan_fitness
from rerail.evaluate.scores import score_texts
from rerail.export.targets import FORMS, check_method
from rerail.files import digest
from rerail.moe.families import experts_implementation
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource
from rerail.parallel import rank_and_size
from rerail.plan.allocation import Allocation
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Bits, Budget, Ratio, Skip
from rerail.run.evaluation import Evaluation
from rerail.statistics.collect import collect
from rerail.text.calibration import Calibration
from rerail.versions import package_version

# Choices by name: fields of `Cell`, and arguments of lightning.Trainer. Each is in one list.
IN_KEY = (
    *("model", "compressor", "ratio", "skip", "allocation", "calibration", "distill"),
    *("evaluation", "export", "seed", "prompt", "names"),
    *("trainer.accelerator", "trainer.strategy", "trainer.devices", "trainer.num_nodes"),
    *("trainer.precision", "trainer.callbacks", "trainer.plugins", "trainer.fast_dev_run"),
    *("trainer.max_epochs", "trainer.min_epochs", "trainer.max_steps", "trainer.min_steps"),
    *("trainer.max_time", "trainer.limit_train_batches", "trainer.limit_val_batches"),
    *("trainer.overfit_batches", "trainer.val_check_interval", "trainer.check_val_every_n_epoch"),
    *("trainer.num_sanity_val_steps", "trainer.accumulate_grad_batches"),
    *("trainer.gradient_clip_val", "trainer.gradient_clip_algorithm", "trainer.deterministic"),
    *("trainer.benchmark", "trainer.inference_mode", "trainer.use_distributed_sampler"),
    *("trainer.sync_batchnorm", "trainer.reload_dataloaders_every_n_epochs"),
)
NOT_IN_KEY = (
    "choices",  # what the key is made from
    *("trainer.logger", "trainer.log_every_n_steps", "trainer.enable_progress_bar"),
    *("trainer.enable_model_summary", "trainer.enable_checkpointing", "trainer.profiler"),
    *("trainer.enable_autolog_hparams", "trainer.default_root_dir", "trainer.model_registry"),
    *("trainer.detect_anomaly", "trainer.barebones"),
    *("trainer.limit_test_batches", "trainer.limit_predict_batches"),  # a fit has neither
)


@dataclass(frozen=True)
class Export:
    """Whether and how the repaired model is written.

    Attributes:
        form: `none`, `native` (a plain transformers checkpoint), `package` (what the form stores,
            after `import rerail.auto`) or `remote` (the same with a modelling file of its own).
        densify: turn every stored form into plain experts first.
    """

    form: str = "none"
    densify: bool = False

    def __post_init__(self) -> None:
        if self.form not in (forms := ("none", *FORMS)):
            raise InputError(f"export.form={self.form!r} is not one of {', '.join(forms)}")


@dataclass(frozen=True)
class Cell:
    """All choices of one run.

    Attributes:
        model, compressor, ratio, allocation, calibration, distill, evaluation, export: decisions.
        skip: what skippers are swept by, in the place of the ratio.
        trainer: further arguments of lightning.Trainer.
        seed: of sampling order and repair.
        prompt: what the models continue, for the eye.
        names: the group names that were chosen, for the columns.
        choices: every resolved choice, for the row.
    """

    model: ModelSource
    compressor: Compressor
    ratio: Ratio | Bits
    allocation: Allocation
    calibration: Calibration
    distill: Settings
    evaluation: Evaluation
    skip: Skip = field(default_factory=Skip)
    export: Export = field(default_factory=Export)
    trainer: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    prompt: str = "The"
    names: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)

    @property
    def budget(self) -> Budget:
        """What the compressor is swept by: `skip` for skippers, `ratio` for all others."""
        return self.skip if self.compressor.budget is Skip else self.ratio

    @property
    def key(self) -> str:
        """A hash of all choices that can change a number: those of `IN_KEY`."""
        trainer = {n: v for n, v in self.trainer.items() if f"trainer.{n}" not in NOT_IN_KEY}
        if self.choices:
            chosen = {n: v for n, v in self.choices.items() if n != "command"}
            return digest({**chosen, "trainer": trainer})
        fields = {n: repr(getattr(self, n)) for n in IN_KEY if not n.startswith("trainer.")}
        return digest({**fields, "trainer": repr(trainer)})

    @property
    def folder(self) -> str:
        """A readable, unique folder name."""
        names = [self.names.get(n, "custom") for n in ("model", "compressor")]
        asked = "rule" if self.budget.removed is None else f"{self.budget.removed:g}"
        numbers = (f"r{asked}", f"n{self.calibration.samples}", f"s{self.seed}")
        return "-".join([*names, *numbers, self.key[:8]])

    def inputs(self) -> dict[str, Any]:
        """Return fingerprints of what the choices only name: weights, texts, and this package.

        An artefact made from other inputs is not used again.
        """
        tokenizer = self.model.tokenizer()
        texts = {n: text.fingerprint(tokenizer) for n, text in self.evaluation.texts.items()}
        return {
            "model": self.model.fingerprint(),
            "calibration": self.calibration.fingerprint(tokenizer),
            "texts": texts,
            "rerail": package_version("rerail"),
            "code": code_version(
                type(self.compressor),
                type(self.allocation),
                collect,
                sequential,
                make_plan,
                plan_fitness,
                apply_plan,
                repair,
                score_texts,
            ),
        }

    def key_of(self, model: MoEModel, *what: Any) -> str:
        """Return a hash of the teacher as it runs here, and of what is measured on it.

        Dtype, kind of device and experts implementation all decide what comes out.
        """
        weight = next(model.model.parameters())
        experts = experts_implementation(model.config) or "eager"
        runs = [experts, str(weight.dtype), weight.device.type]
        return digest([self.model.fingerprint(), runs, *what])

    @property
    def schedule(self) -> Schedule:
        """The steps of the repair, for as many processes as were started.

        Raises:
            InputError: there is too little text for them.
        """
        assert isinstance(self.distill, RouterKD)
        return Schedule.of(self.calibration.samples, self.distill, rank_and_size()[1])

    def check(self) -> None:
        """Check everything against the model's config, before weights load (run step 2).

        Raises:
            InputError: a value cannot be used.
        """
        self.evaluation.check()
        check_strategy(self.trainer, self.distill)
        processes = rank_and_size()[1]
        if processes > 1 and self.model.device_map is not None:
            raise InputError(
                f"model.device_map={self.model.device_map!r} spreads the model of one process over "
                f"the GPUs, and {processes} processes were started; leave it out or start one"
            )
        meta = self.model.meta()
        for text in (self.calibration, *self.evaluation.texts.values()):
            text.check(meta.config)
        if self.budget.removed != 0:
            self.compressor.check(meta.layers, self.budget, self.allocation)
            if self.export.form != "none":
                check_method(self.compressor, self.export.form, self.export.densify)
        if self.distill.enabled:
            self._check_repair(meta, processes)

    def _check_repair(self, meta: MoEModel, processes: int) -> None:
        if isinstance(self.distill, Ridge):
            check_ridge(meta.layers, self.distill, self.calibration.samples)
        else:
            check_router_gradients(meta)
            check_arguments(self.trainer, self.schedule, self.distill)
