"""What decides a cell's key, and what is only shown."""

import dataclasses
import inspect

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lightning import Trainer

from rerail.config.presets import config_root
from rerail.errors import InputError
from rerail.run.cell import IN_KEY, NOT_IN_KEY, Cell
from rerail.run.compose import to_cell


def cell(*words: str) -> Cell:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
        return to_cell(compose("config", list(words)))


def test_every_choice_is_said_to_be_in_the_key_or_not():
    """A new field of a cell, or a new argument of the trainer, must be put into one list."""
    fields = {field.name for field in dataclasses.fields(Cell)} - {"trainer"}
    arguments = {f"trainer.{name}" for name in inspect.signature(Trainer).parameters}
    assert set(IN_KEY) | set(NOT_IN_KEY) == fields | arguments
    assert len(IN_KEY) + len(NOT_IN_KEY) == len(fields | arguments)


@pytest.mark.parametrize(
    "word", ["trainer.enable_progress_bar=false", "++trainer.log_every_n_steps=5", "out=there"]
)
def test_what_cannot_change_a_number_is_not_in_the_key(word):
    assert cell(word).key == cell().key


@pytest.mark.parametrize(
    "word",
    [
        *("ratio=quarter", "compressor=ean", "calibration.block=128", "seed=1", "prompt=Once"),
        *("++calibration.batch_size=8", "evaluation.batch_size=8", "++trainer.precision=bf16"),
    ],
)
def test_what_can_change_a_number_is_in_the_key(word):
    assert cell(word).key != cell().key


def test_a_cell_that_was_made_in_python_has_a_key_by_the_same_lists():
    plain = dataclasses.replace(cell(), choices={})
    bar = dataclasses.replace(plain, trainer={**plain.trainer, "enable_progress_bar": False})
    assert bar.key == plain.key
    assert dataclasses.replace(plain, seed=1).key != plain.key


def test_a_held_out_text_has_no_batch_size_of_its_own():
    with pytest.raises(InputError, match=r"evaluation.texts.docs.batch_size=8 is not read"):
        cell("++evaluation.texts.docs.batch_size=8").evaluation.check()
