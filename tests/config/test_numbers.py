"""A number may stand where a preset is named."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from rerail.config import numbers
from rerail.config.presets import config_root, model_name
from rerail.config.search_path import register
from rerail.errors import InputError
from rerail.moe.source import ModelSource
from rerail.run.compose import to_cell
from rerail.run.task import _chosen


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("ratio=0.5", "ratio='0.5'"),
        ("ratio=half,0.3,4,bits3", "ratio=half,'0.3','4',bits3"),
        ("samples=64,16", "samples='64','16'"),
        ("skip=.25", "skip='.25'"),
        ("seed=1", "seed=1"),
        ("ratio.removed=0.5", "ratio.removed=0.5"),
    ],
)
def test_numbers_are_quoted_for_hydra(word, read):
    assert numbers.quoted(word) == read
    assert numbers.unquoted(read) == word


@pytest.mark.parametrize(
    ("word", "field", "value", "name"),
    [
        ("ratio=0.5", "ratio.removed", 0.5, "half"),
        ("ratio=0", "ratio.removed", 0.0, "none"),
        ("ratio=0.3", "ratio.removed", 0.3, "0.3"),
        ("ratio=4", "ratio.average", 4.0, "bits4"),
        ("ratio=4bit", "ratio.average", 4.0, "bits4"),
        ("ratio=3.5-bits", "ratio.average", 3.5, "3.5-bits"),
        ("ratio=bits2.5", "ratio.average", 2.5, "bits2.5"),
        ("skip=0.5", "skip.share", 0.5, "half"),
        ("samples=64", "calibration.samples", 64, "n64"),
        ("samples=12", "calibration.samples", 12, "12"),
    ],
)
def test_a_number_is_the_preset_of_that_value(word, field, value, name):
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
        config = compose("config", [numbers.quoted(word)], return_hydra_config=True)
    group, _, attribute = field.partition(".")
    names, _ = _chosen(config.hydra)
    assert names[word.partition("=")[0]] == name
    del config.hydra
    cell = to_cell(config, "", names)
    assert getattr(getattr(cell, group), attribute) == value


def test_other_words_are_no_numbers():
    assert numbers.node("ratio/halff") is None
    assert numbers.node("seed/3") is None
    assert numbers.node("skip/4bit") is None


def test_a_model_is_named_by_what_is_loaded():
    assert model_name("tiny_fine", {"path_or_id": "zoo:tiny_fine"}) == "tiny_fine"
    first = model_name("tiny_fine", {"path_or_id": "/data/one/olmoe/"})
    second = model_name("local", {"path_or_id": "/data/two/olmoe"})
    assert first.startswith("olmoe_")
    assert second.startswith("olmoe_")
    assert first != second
    other = model_name("tiny_fine", {"path_or_id": "zoo:tiny_fine", "revision": "x"})
    assert other != "tiny_fine"


def test_a_folder_has_one_name_however_its_path_is_written(tmp_path, monkeypatch):
    (tmp_path / "a" / "olmoe").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "a" / "olmoe")
    paths = (
        str(tmp_path / "a" / "olmoe"),
        f"{tmp_path}/a/../a/olmoe/",
        "~/a/olmoe",
        ".",
        "../olmoe",
    )
    [name] = {model_name("local", {"path_or_id": path}) for path in paths}
    assert name.startswith("olmoe_")


def test_a_name_that_is_set_wins_and_is_fit_for_a_folder():
    node = {"path_or_id": "zoo:tiny_fine", "name": "mine"}
    assert model_name("tiny_fine", node) == "mine"
    assert ModelSource("zoo:tiny_fine", name="olmoe-1b_v2.0").name == "olmoe-1b_v2.0"
    for name in ("", "../up", "a b", ".hidden", "-x", "x" * 65, "a/b"):
        with pytest.raises(InputError, match=r"model\.name=.* names folders"):
            ModelSource("zoo:tiny_fine", name=name)


@pytest.mark.parametrize("name", sorted(p.stem for p in (config_root() / "conf/model").glob("*")))
def test_every_model_can_be_named(name):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
        config = compose("config", [f"model={name}", "model.path_or_id=x", "model.name=mine"])
    assert model_name(name, config.model) == "mine"
