"""Nothing is measured at positions that the model was never made for."""

import pytest
import torch
from parents import cell_of, parent

from rerail import api
from rerail.errors import InputError
from rerail.text.calibration import Calibration, TokenBlocks
from rerail.text.corpora import SelfText
from rerail.text.tokens import check_block

BEYOND = "blocks of 1024 tokens are longer than the 512 positions .*set block to that or less"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parent(tmp_path_factory.mktemp("long") / "model")


@pytest.mark.parametrize(
    "choices",
    [
        ["calibration.block=1024"],
        ["evaluation.texts.docs.block=1024"],
        ["calibration=self", "calibration.sources.0.length=1024"],
    ],
)
def test_a_cell_refuses_before_weights_load(folder, choices):
    cell = cell_of(folder, *choices)
    with pytest.raises(InputError, match=BEYOND):
        cell.check()


def test_the_functions_refuse_too(folder):
    teacher = api.load(str(folder))
    with pytest.raises(InputError, match=BEYOND):
        api.text(teacher, "docs", samples=1, block=1024)
    with pytest.raises(InputError, match=BEYOND):
        api.text(teacher, Calibration([SelfText(length=1024)]))
    ids = torch.ones(1, 1024, dtype=torch.int64)
    blocks = TokenBlocks(ids, ids.bool(), "long")
    with pytest.raises(InputError, match=BEYOND):
        api.collect(teacher, blocks, "reap")
    with pytest.raises(InputError, match=BEYOND):
        api.evaluate(teacher, teacher, {"long": blocks})


def test_scaled_rotary_embeddings_reach_further(folder):
    config = api.load(str(folder)).model.config
    config.rope_parameters |= {"factor": 4.0, "original_max_position_embeddings": 256}
    check_block(1024, config)
    with pytest.raises(InputError, match="longer than the 1024 positions"):
        check_block(1025, config)
