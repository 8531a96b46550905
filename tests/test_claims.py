"""Every claim is a file whose every choice can be composed."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from rerail.config.presets import config_root
from rerail.config.search_path import register

FOLDER = Path(__file__).parents[1] / "experiments"
CLAIMS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
NAMED = (
    "fine_vs_coarse",
    "ratio_curve",
    "calibration_size",
    "calibration_source",
    "seeds",
    "methods",
)


@pytest.fixture(scope="module")
def composed():
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
        yield lambda *words: compose("config", list(words), return_hydra_config=True)


def test_the_claims_that_were_promised_are_there():
    assert set(NAMED) <= set(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_choice_of_a_claim_exists_and_its_cells_have_a_folder_of_their_own(
    claim, composed, monkeypatch
):
    monkeypatch.setenv("RERAIL_DATA", "data")
    grid = composed(f"+experiments={claim}").hydra.sweeper.params
    assert "compressor" in grid
    for name, values in grid.items():
        if re.match(r"(glob|range)\(", str(values)):
            continue
        for value in str(values).split(","):
            assert composed(f"+experiments={claim}", f"{name}={value.strip()}").out != "outputs"


def test_a_claim_that_does_not_exist_is_refused(composed):
    with pytest.raises(Exception, match="experiments/no_such_claim"):
        composed("+experiments=no_such_claim")
