"""What a cell is measured on; the dataclass is its config."""

from collections.abc import Mapping
from dataclasses import dataclass

from rerail.errors import InputError
from rerail.evaluate.harness import Harness
from rerail.text.calibration import BATCH_SIZE, Calibration


@dataclass(frozen=True)
class Evaluation:
    """Held-out texts, lm-eval tasks and the continuation of a prompt.

    Attributes:
        texts: name -> text; each is scored on its own, and together they give the row's NLL.
        batch_size: sequences a forward.
        new_tokens: length of the continuation; 0 for none.
        tasks: lm-eval, or nothing.
    """

    texts: Mapping[str, Calibration]
    batch_size: int = BATCH_SIZE
    new_tokens: int = 48
    tasks: Harness | None = None

    def check(self) -> None:
        """Check what can be checked before a model is loaded.

        Raises:
            InputError: a value cannot be used.
        """
        if not self.texts:
            raise InputError("evaluation.texts is empty; name at least one held-out text")
        if self.batch_size < 1 or self.new_tokens < 0:
            raise InputError(
                "evaluation.batch_size must be at least 1 and evaluation.new_tokens at least 0"
            )
        for name, text in self.texts.items():
            if text.split != "heldout":
                raise InputError(f"evaluation.texts.{name}.split={text.split!r} must be 'heldout'")
            if text.batch_size != BATCH_SIZE:
                raise InputError(
                    f"evaluation.texts.{name}.batch_size={text.batch_size} is not read: held-out "
                    "texts share evaluation.batch_size"
                )
        if self.tasks is not None:
            self.tasks.check()
