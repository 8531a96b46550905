"""The ids in use and the exported tokenizer are those of the parent's `tokenizer.json`."""

import json

import pytest
from parents import edit, parent, pruned
from tokenizers import Tokenizer

from rerail import api
from rerail.errors import InputError
from rerail.moe.source import ModelSource

TEXT = "In 2023 the 650841823 words; x=12345 end"


@pytest.fixture
def digits(tmp_path):
    """A parent whose tokenizer cuts numbers into digits."""
    folder = parent(tmp_path / "digits")
    digits = {"type": "Digits", "individual_digits": True}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts = [digits, {**whole, "use_regex": True}]
    edit(folder, "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": parts})
    return folder


def ids_of_file(folder) -> list[int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids


@pytest.mark.parametrize(
    "kind",
    ["PreTrainedTokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizerFast", "CohereTokenizer"],
)
def test_the_ids_in_use_and_of_an_export_are_those_of_the_file(digits, tmp_path, kind):
    edit(digits, "tokenizer_config.json", drop=("backend",), tokenizer_class=kind)
    teacher = api.load(str(digits))
    student = api.compress(teacher, "aimer", 0.5)
    assert ids_of_file(api.save(student, tmp_path / "saved")) == ids_of_file(digits)
    tokenizer = student.tokenizer
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids_of_file(digits)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


def test_a_normaliser_of_the_file_is_obeyed(tmp_path):
    folder = parent(tmp_path / "model")
    edit(folder, "tokenizer.json", normalizer={"type": "Lowercase"})
    edit(folder, "tokenizer_config.json", drop=("backend",), tokenizer_class="GPT2Tokenizer")
    tokenizer = ModelSource(str(folder)).tokenizer()
    assert tokenizer("THE")["input_ids"] == tokenizer("the")["input_ids"]


def test_a_tokenizer_file_that_cannot_be_read_is_a_sentence(tmp_path):
    folder = parent(tmp_path / "model")
    edit(folder, "tokenizer.json", model={"type": "BPE"})
    with pytest.raises(InputError, match=r"could not be read \(Exception: Missing vocab"):
        ModelSource(str(folder)).tokenizer()


@pytest.mark.parametrize("form", ["native", "package"])
def test_an_export_has_the_files_of_its_parent_byte_for_byte(digits, tmp_path, form):
    edit(digits, "tokenizer_config.json", drop=("backend",), tokenizer_class="GPT2Tokenizer")
    edit(digits, "generation_config.json", min_p=0.9, do_sample=False)
    edit(digits, "preprocessor_config.json", size=3)
    (digits / "chat_template.jinja").write_text("{{ messages }}")
    (digits / "additional_chat_templates").mkdir()
    (digits / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    _, student, _ = pruned(digits)
    saved = api.save(student, tmp_path / "saved", form)
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    names += ["preprocessor_config.json", "chat_template.jinja"]
    for name in [*names, "additional_chat_templates/tool.jinja"]:
        assert (saved / name).read_bytes() == (digits / name).read_bytes(), name
    other = {p.name for p in saved.iterdir()} - {p.name for p in digits.iterdir()}
    assert other == {"compression.json"}
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_adds_no_file_that_its_parent_lacks(tmp_path):
    folder = parent(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    _, student, _ = pruned(folder)
    saved = api.save(student, tmp_path / "saved")
    assert not (saved / "generation_config.json").exists()
    assert not (saved / "chat_template.jinja").exists()
