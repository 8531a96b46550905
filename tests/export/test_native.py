import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import CONFIGS, tiny, tokens
from rerail.errors import InputError
from rerail.export.checkpoint import is_whole, read_manifest
from rerail.export.native import check_native
from rerail.export.targets import as_written, export_student
from rerail.moe.families import WIDTH_NAMES
from rerail.moe.source import ModelSource
from rerail.plan.apply import apply_plan
from rerail.plan.plan import Plan
from stored_forms import (
    UNEVEN,
    aliased,
    factored,
    fused,
    lent,
    masked,
    merged,
    skipping,
    sliced,
    solved,
)


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def reload(path, **options):
    options = {"dtype": torch.float32, **options}
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def bits(model):
    named = [*model.model.named_parameters(), *model.model.named_buffers()]
    return {
        n: (id(t), t.dtype, hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).hexdigest())
        for n, t in named
    }


SECOND_NAMES = {
    "qwen3_moe": "num_local_experts",
    "mixtral": "num_experts",
    "olmoe": "num_local_experts",
    "deepseek_v2": "num_experts",
    "deepseek_v3": "num_local_experts",
    "gpt_oss": "num_experts",
    "ernie4_5_moe": "num_experts",
    "glm4_moe": "num_local_experts",
    "flex_olmo": "num_local_experts",
}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_sliced_student_of_every_family_reloads_bit_equal_under_every_name_of_its_count(
    family, tmp_path
):
    teacher = tiny(family)
    before, settings = bits(teacher), teacher.config.to_json_string()
    student = apply_plan(teacher, sliced())
    assert not torch.equal(logits(student.model), logits(teacher.model))
    own = bits(student), student.config.to_json_string()

    path = export_student(student, sliced(), tmp_path / "model")

    assert torch.equal(logits(reload(path)), logits(student.model))
    written = json.loads((path / "config.json").read_text())
    names = {n for n, value in CONFIGS[family].items() if value == 8 and n.endswith("_experts")}
    names |= {SECOND_NAMES[family]} if family in SECOND_NAMES else set()
    assert names
    assert {name: written.get(name) for name in names} == dict.fromkeys(names, 4)
    assert bits(teacher) == before
    assert teacher.config.to_json_string() == settings
    assert (bits(student), student.config.to_json_string()) == own
    assert not list(path.glob("*.bin"))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe", "gpt_oss"])
def test_a_float32_student_is_written_in_the_dtype_of_its_parent_and_equals_its_rounded_self(
    family, tmp_path
):
    student = apply_plan(tiny(family), sliced())
    path = export_student(student, sliced(), tmp_path / "model", dtype=torch.bfloat16)

    expected = as_written(student, torch.bfloat16)
    assert expected.model.dtype == torch.float32
    assert torch.equal(logits(reload(path)), logits(expected.model))
    assert not torch.equal(logits(expected.model), logits(student.model))
    torch.testing.assert_close(logits(expected.model), logits(student.model), atol=0.5, rtol=0.1)

    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(path / "model.safetensors")
    kept_wide = ("e_score_correction_bias", "moe_statics") + (
        ("gate.weight",) if "ernie" in family else ()
    )
    for name, tensor in tensors.items():
        wide = any(part in name for part in kept_wide)
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name


def test_a_parent_read_from_disk_goes_back_to_the_same_bytes(tmp_path):
    parent = apply_plan(tiny("mixtral"), Plan())
    first = export_student(parent, Plan(), tmp_path / "parent", dtype=torch.bfloat16)
    source = ModelSource(str(first))
    second = export_student(source.load(), Plan(), tmp_path / "again", dtype=source.config().dtype)
    saved, again = (load_file(p / "model.safetensors") for p in (first, second))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[n], again[n]) for n in saved)
    assert "model.layers.0.block_sparse_moe.experts.7.w1.weight" in saved


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3", "glm4_moe"]
)
def test_a_masked_router_is_written_as_a_sliced_one_that_chooses_the_same(family, tmp_path):
    teacher = tiny(family)
    student = apply_plan(teacher, masked())
    path = export_student(student, masked(), tmp_path / "model")
    loaded = reload(path)
    torch.testing.assert_close(logits(loaded), logits(student.model), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(loaded), logits(apply_plan(teacher, sliced()).model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("plan", [aliased, merged, lent, factored])
def test_densify_writes_one_whole_expert_for_each_router_row(family, plan, tmp_path):
    student = apply_plan(tiny(family), plan())
    path = export_student(student, plan(), tmp_path / "model", densify=True)
    loaded = reload(path)
    torch.testing.assert_close(logits(loaded), logits(student.model), atol=1e-5, rtol=1e-5)
    assert loaded.config.num_local_experts == 8
    assert read_manifest(path)["densified"] is True


LOPSIDED = ((0, 1, 4, 5, 6), (0, 1, 4, 5, 6))  # two of the first group, three of the second
SPACIOUS = {"qwen3_moe": {"moe_intermediate_size": 24, "intermediate_size": 32}}
WIDE = (13,) * 8  # of 24 channels; kernels want 16


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "olmoe"])
def test_experts_of_one_narrower_width_are_plain_experts(family, tmp_path):
    teacher = tiny(family, **SPACIOUS.get(family, {"intermediate_size": 24}))
    plan = solved(teacher, "narrow", widths=WIDE)
    student = apply_plan(teacher, plan)
    path = export_student(student, plan, tmp_path / "model")
    loaded = reload(path)
    torch.testing.assert_close(logits(loaded), logits(student.model), atol=1e-5, rtol=1e-5)
    widths = {name: getattr(loaded.config, name, None) for name in WIDTH_NAMES}
    own = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    assert [name for name, width in widths.items() if width == 16] == [own]
    dense = export_student(student, plan, tmp_path / "dense", densify=True)
    torch.testing.assert_close(logits(reload(dense)), logits(student.model), atol=1e-5, rtol=1e-5)


def test_merged_experts_with_a_router_row_each_are_plain_experts(tmp_path):
    teacher = tiny("qwen3_moe")
    plan = fused(teacher)
    parts = [replace(part, kept=(1, 4, 6), slots=(0, 1, 2), router="slice") for part in plan.layers]
    student = apply_plan(teacher, replace(plan, layers=tuple(parts)))
    path = export_student(student, plan, tmp_path / "model")
    assert torch.equal(logits(reload(path)), logits(student.model))


def widths_by_layer(teacher):
    """The second layer is narrower than the first."""
    first, second = (solved(teacher, "narrow", widths=(w,) * 8) for w in (13, 7))
    tensors = first.of_layer(0), second.of_layer(1)
    named = {f"layers.{i}.{n}": t for i, saved in enumerate(tensors) for n, t in saved.items()}
    return Plan((first.layers[0], second.layers[1]), {}, named)


def narrowed(*widths):
    return lambda teacher: solved(teacher, "narrow", widths=widths)


NARROW = {
    "widths by expert": ("qwen3_moe", narrowed(*WIDE[1:], 9), "form 'narrow'.*=package, or"),
    "widths by layer": ("qwen3_moe", widths_by_layer, "layer 1: .*width 8 .*layer 0 16.*=package"),
    "shared experts": ("deepseek_v3", narrowed(*WIDE), "no entry .*width 16; .*densify=true"),
    "skip_policy": ("qwen3_moe", lambda t: skipping(), "form 'skip_policy'.*=package$"),
}


@pytest.mark.parametrize("case", NARROW)
def test_what_a_stock_config_cannot_name_is_refused(case):
    family, plan, sentence = NARROW[case]
    teacher = tiny(family, moe_intermediate_size=24)
    with pytest.raises(InputError, match=sentence):
        check_native(apply_plan(teacher, plan(teacher)))


REFUSED = {
    "alias": (aliased(), "mixtral", False, r"layer 0: .*'alias' 3 stored .*8 rou.*densify=true"),
    "merge": (merged(), "mixtral", False, r"layer 0: .*'merged' 4 stored .*8 rou.*densify=true"),
    "lent": (lent(), "mixtral", False, r"layer 1: .*'alias' .*shares .*layer 0, .*densify=true"),
    "basis": (factored(), "qwen3_moe", False, r"layer 0: .*form 'basis'.*densify=true"),
    "counts": (sliced(UNEVEN), "mixtral", True, r"layer 1: .* 4 .*layer 0 keeps 3.*=uniform"),
    "one layer": (Plan(sliced().layers[:1]), "mixtral", True, r"layer 1: .* 8 .*layer 0 keeps 4"),
    "mask": (masked(UNEVEN), "mixtral", True, r"layer 1: .* 4 .*layer 0 keeps 3.*=uniform"),
    "grouped mask": (
        masked(LOPSIDED), "deepseek_v3", True, r"layer 0: .*\[2, 3\] rows in its 2.*router=slice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_form_that_stock_transformers_cannot_hold_is_refused_before_anything_is_written(
    case, tmp_path
):
    plan, family, densify, sentence = REFUSED[case]
    student = apply_plan(tiny(family), plan)
    with pytest.raises(InputError, match=sentence):
        check_native(student, densify)
    with pytest.raises(InputError, match=sentence):
        export_student(student, plan, tmp_path / "model", densify=densify)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_an_export_is_never_replaced(tmp_path):
    student = apply_plan(tiny("qwen3_moe"), sliced())
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(InputError, match="is not an earlier export; name a new or empty folder"):
        export_student(student, sliced(), tmp_path)
    with pytest.raises(InputError, match="is not an earlier export"):
        export_student(student, sliced(), tmp_path / "diary.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["diary.txt"]


FULL = {
    "from Python": OSError(28, "No space left on device"),
    "from safetensors": SafetensorError("I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_leaves_the_earlier_export_and_nothing_half_written(
    error, tmp_path, monkeypatch
):
    student = apply_plan(tiny("qwen3_moe"), sliced())
    export_student(student, sliced(), tmp_path / "model", manifest={"which": "first"})

    def fill(self, folder, **_):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise FULL[error]

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fill)
    for name in ("model", "other"):
        with pytest.raises(InputError, match="no space left on the device"):
            export_student(student, sliced(), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert read_manifest(tmp_path / "model")["which"] == "first"
    assert is_whole(tmp_path / "model")


def test_generation_config_tied_head_and_tokenizer_go_with_the_weights(tmp_path):
    student = apply_plan(tiny("qwen3_moe"), sliced())
    student.model.generation_config.max_new_tokens = 7
    tokenizer = ModelSource("zoo:tiny_fine").tokenizer()
    path = export_student(student, sliced(), tmp_path / "model", tokenizer=tokenizer)
    loaded = reload(path)
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with safe_open(path / "model.safetensors", "pt") as saved:
        assert "lm_head.weight" not in saved.keys()  # noqa: SIM118
    assert json.loads((path / "tokenizer_config.json").read_text())["model_max_length"] == 512
    assert tokenizer.model_max_length > 512


FRESH = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
out = model(input_ids=load_file(sys.argv[2])["ids"], use_cache=False).logits.detach()
assert not [n for n in sys.modules if n.split(".")[0] == "rerail"]
save_file({"logits": out}, sys.argv[3])
"""


def test_a_process_that_knows_only_torch_and_transformers_computes_the_same_bits(tmp_path):
    student = apply_plan(tiny("qwen3_moe"), sliced())
    path = export_student(student, sliced(), tmp_path / "model")
    save_file({"ids": tokens()}, tmp_path / "ids")
    command = [sys.executable, "-P", "-c", FRESH, path, tmp_path / "ids", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    actual = load_file(tmp_path / "out")["logits"]
    torch.testing.assert_close(actual, logits(student.model), atol=1e-6, rtol=0)
