"""Every method plans the same through Python and through the command line, byte by byte."""

from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from checkpoints import checkpoint
from rerail import api
from rerail.config.presets import config_root
from rerail.errors import InputError
from rerail.export.targets import check_method, check_student
from rerail.run.compose import to_cell
from rerail.run.pipeline import run_cell
from rerail.store import read

PRESETS = sorted(path.stem for path in (config_root() / "conf/compressor").glob("*.yaml"))
BUDGETS = {"Ratio": 0.5, "Bits": 4, "Skip": 0.25}
REACHED = {"mobe_paper": 0.125, "pmq": 2.25, "pmq_repo": 2.25}  # by so small a model
COST = ("seconds", "peak_memory")  # what the command line notes beside a plan
SHORTER = {"mobe": 20, "mobe_paper": 20, "rfid_moe": 20}  # steps of a fit


class Planned(Exception):
    """The runner has its plan, and the rest of the cell is not asked for."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def teacher(folder):
    return api.load(str(folder))


@pytest.fixture(scope="module")
def calibration(teacher, folder):
    source = {"_target_": "rerail.text.corpora.Files", "paths": [str(folder / "text.jsonl")]}
    return api.text(teacher, "files", sources=[source], samples=20, block=16)


@pytest.fixture(scope="module")
def cell(folder):
    """The choices of the command line, but for compressor and budget."""
    GlobalHydra.instance().clear()
    text = f"[{folder / 'text.jsonl'}]"
    words = ["model=local", f"model.path_or_id={folder}", "calibration=files", "evaluation=file"]
    words += [f"calibration.sources.0.paths={text}", "samples.count=20", "calibration.block=16"]
    words += [f"evaluation.texts.file.sources.0.paths={text}", "evaluation.texts.file.samples=2"]
    words += ["evaluation.texts.file.block=16", "distill=none"]
    with initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
        return to_cell(compose("config", words))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def refusal(check, *arguments) -> str:
    try:
        check(*arguments)
    except InputError as error:
        return str(error)
    return ""


def check_written_out(compressor, student):
    """What a method says of its form before it plans is what comes of its plan."""
    for form, densify in (("native", False), ("native", True), ("package", True)):
        early = refusal(check_method, compressor, form, densify)
        late = refusal(check_student, student, form, densify)
        assert not early or late, early
        # what the plan alone decides: counts and widths of layers, and constants that need biases
        told = ("width", "keeps", "novices", "'narrow'")
        assert early or not late or any(word in late for word in told), late
        words = late + early
        advised = "densify=true" in words and "densify=true cannot change" not in words
        assert not advised or "nothing is saved any more" in words


@pytest.mark.parametrize("name", PRESETS)
def test_a_plan_is_the_same_from_python_and_from_the_command_line(
    name, teacher, calibration, cell, cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("RERAIL_CACHE", str(cache))
    compressor = api.preset("compressor", name)
    if name in SHORTER:
        compressor = replace(compressor, steps=SHORTER[name])
    kind = compressor.budget
    number = REACHED.get(name, BUDGETS[kind.__name__])
    plan = api.plan(teacher, compressor, number, calibration)
    plan.save(tmp_path / "plan.json")
    check_written_out(compressor, api.apply(teacher, plan).model)

    def planned(_: object, plan: api.Plan, *__: object) -> None:
        assert plan.layers
        raise Planned

    monkeypatch.setattr(api, "apply", planned)
    choice = {"skip" if kind is api.Skip else "ratio": kind(number)}
    one = replace(cell, compressor=compressor, choices={}, **choice)
    with pytest.raises(Planned):
        run_cell(one, tmp_path / "out")
    files = sorted(tmp_path.glob("plan.*"))
    made = tmp_path / "out" / one.folder
    assert {path.name for path in files} == {path.name for path in made.glob("plan.*")}
    mine, theirs = read(tmp_path / "plan.json"), read(made / "plan.json")
    assert (
        mine.data.items()
        == {name: value for name, value in theirs.data.items() if name not in COST}.items()
    )
    for file in tmp_path.glob("plan.safetensors"):
        assert file.read_bytes() == (made / file.name).read_bytes()
