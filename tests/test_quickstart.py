"""The page for newcomers: every command composes or exists, and its Python runs."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from checkpoints import add_tokenizer
from families import tiny
from pages import ROOT, cell_commands, code_of, commands_of, first_cell
from rerail.run.compose import to_cell
from rerail.run.results import COLUMNS

PAGE = "docs/quickstart.md"


@pytest.mark.parametrize("command", cell_commands(PAGE))
def test_every_cell_of_the_page_composes(command):
    assert to_cell(first_cell(command))


@pytest.mark.parametrize("page", [PAGE, "CONTRIBUTING.md"])
def test_every_other_command_exists(page):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    others = [c.split() for c in commands_of(page) if c not in cell_commands(page)]
    assert others
    for program, *words in others:
        if program == "make":
            assert words[0] in targets
        elif program == "source":
            assert words == [".venv/bin/activate"]
        else:
            assert program in scripts


def test_additions_and_columns_that_the_page_names_are_there():
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    [additions] = re.findall(r"\| you want \| add \|\n(.*?)\n\n", text, re.S)
    for words in re.findall(r"`([^`]+)`", additions):
        if not words.startswith("rerail "):
            base = "rerail model=local model.path_or_id=x "
            assert to_cell(first_cell(base + re.sub(r"^rerail -m \.\.\. ", "", words)))
    [columns] = re.findall(r"\| column \| meaning \|\n(.*?)\n\n", text, re.S)
    named = re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in columns.splitlines()))
    assert len(named) >= 6
    assert set(named) <= COLUMNS.keys()


def test_the_links_of_the_pages_lead_to_files():
    for page in (PAGE, "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert ((ROOT / page).parent / target).exists(), target
    for name in re.findall(r"`((?:src|conf|tests|experiments)/[\w/.]+)`", page_text()):
        assert (ROOT / name).exists(), name


def page_text() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_runs_on_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "path" / "to" / "model"
    folder.mkdir(parents=True)
    tiny("qwen3_moe", vocab_size=4096).model.save_pretrained(folder)
    add_tokenizer(folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in code_of(PAGE, "python"):
        exec(block.replace("samples=64", "samples=16, block=16"), names)
    config = json.loads(Path("smaller", "config.json").read_text(encoding="utf-8"))
    assert config["num_experts"] == 6
    ids = torch.tensor([[1, 2, 3]])
    expected = names["repaired"].student.model.model(ids).logits
    assert torch.equal(names["model"](ids).logits, expected)
    shutil.rmtree("smaller")
