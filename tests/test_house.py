"""House rules that a linter cannot hold."""

import ast
import re
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pages import cell_commands, composed, first_cell
from rerail.compress.base import Compressor
from rerail.config.presets import config_root
from rerail.moe.source import ModelSource
from rerail.run.compose import GROUPS, to_cell

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
CONF = ROOT / "conf"
# what a yaml leaves to the user: `???` values
GIVEN = {
    "model=local": ["model.path_or_id=zoo:tiny_fine"],
    "calibration=files": ["calibration.sources.0.paths=[x.txt]"],
    "calibration=hub": ["calibration.sources.0.dataset=some/dataset"],
    "evaluation=file": ["evaluation.texts.file.sources.0.paths=[x.txt]"],
    "allocation=per_layer": ["allocation.kept=[32,32,32,32]"],
}


def group_choices() -> list[str]:
    return [f"{p.parent.name}={p.stem}" for p in sorted(CONF.glob("*/*.yaml"))]


@pytest.mark.parametrize("choice", group_choices())
def test_every_yaml_of_conf_composes_and_builds_its_class(choice, monkeypatch, tmp_path):
    monkeypatch.setenv("RERAIL_DATA", str(tmp_path))
    cell = to_cell(composed(choice, *GIVEN.get(choice, [])))
    assert isinstance(cell.model, ModelSource)
    assert isinstance(cell.compressor, Compressor)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_claim_composes_and_says_what_it_asks(path, monkeypatch, tmp_path):
    monkeypatch.setenv("RERAIL_DATA", str(tmp_path))
    assert to_cell(composed(f"+experiments={path.stem}"))
    header = [
        line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    ]
    for word in ("Question:", "Command:", "Expected:", "Cost:"):
        assert any(word in line for line in header), f"the header of {path.name} lacks {word}"
    assert path.with_suffix(".md").exists(), f"{path.stem} has no page that says what came out"


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_launcher_profile_composes(path):
    config = composed(f"+slurm={path.stem}")
    assert all(group in config for group in GROUPS)


@pytest.mark.parametrize("path", sorted((CONF / "compressor").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_compressor_names_a_paper_and_a_paradigm(path):
    target = OmegaConf.load(path)["_target_"]
    module, _, name = target.rpartition(".")
    assert module.startswith("rerail.methods.")
    made = getattr(__import__(module, fromlist=[name]), name)
    assert re.search(r"\d{4}\.\d{5}|OpenReview|baseline", made.paper)
    assert made.paradigm


def lengths(folder: str = "") -> dict[str, int]:
    files = (ROOT / "src/rerail" / folder).rglob("*.py")
    return {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}


def test_files_stay_short():
    assert not {name: n for name, n in lengths().items() if n > 500}


@pytest.mark.parametrize(("folder", "most"), [("", 120), ("methods", 90)])
def test_the_median_file_is_short(folder, most, capsys):
    middle = statistics.median(n for name, n in lengths(folder).items() if "__" not in name)
    with capsys.disabled():
        print(f"\nmedian file of src/rerail/{folder}: {middle:g} lines", end=" ")  # noqa: T201
    assert middle <= most


def test_functions_stay_short():
    long = [
        f"{path.name}:{node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50
    ]
    assert not long


def test_nothing_is_left_unfinished():
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError")
    found = [p.name for p in SOURCES if marks.search(p.read_text())]
    assert not found


def test_weights_are_never_unpickled():
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"(pickle|joblib|dill)\.(load|Unpickler)", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path.name}: {call}"


def test_wandb_is_imported_behind_its_own_door_only():
    doors = [
        p.name for p in SOURCES if re.search(r"^\s*(import|from) wandb\b", p.read_text(), re.M)
    ]
    assert doors in ([], ["wandb.py"])


@pytest.mark.parametrize(
    "words", ["import rerail", "import rerail.cli.main", "from rerail.cli import suggestions"]
)
def test_importing_costs_nothing(words):
    code = f"import sys; {words}; bad = {{'torch', 'transformers', 'lightning', 'wandb'}}"
    code += "; sys.exit(str(bad & sys.modules.keys()) if bad & sys.modules.keys() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", cell_commands("README.md"))
def test_every_command_of_the_readme_composes(command, monkeypatch, tmp_path):
    monkeypatch.setenv("RERAIL_DATA", str(tmp_path))
    assert to_cell(first_cell(command))


def test_the_readme_begins_with_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 0 < text.index("make demo") < 900
    assert 0 < text.index("make test") < 1000


@pytest.mark.slow
def test_the_wheel_carries_configuration_and_zoo(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", tmp_path, "."], cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = ["rerail/conf/config.yaml", "rerail/conf/compressor/reap.yaml", "rerail/py.typed"]
    wanted += ["rerail/zoo/tiny_fine/model.safetensors", "rerail/evaluate/tasks/local_blimp.yaml"]
    wanted += ["rerail/report/page.css", "rerail/report/page.html.jinja"]
    wanted += ["rerail/report/paper_tables.json"]
    wanted += ["rerail/text/docs/documents.jsonl.xz", "rerail/text/docs/LICENSES.txt"]
    wanted += [f"rerail/experiments/{p.name}" for p in (ROOT / "experiments").glob("*.yaml")]
    wanted += [f"rerail/slurm/{p.name}" for p in (ROOT / "slurm").glob("*.yaml")]
    assert set(wanted) <= names


def test_configuration_is_found_from_the_checkout():
    assert config_root() == ROOT
