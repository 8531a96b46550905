"""A checkpoint has one dtype: what is read, written, claimed and counted agree on it."""

import json

import pytest
import torch
from parents import edit, parent
from safetensors.torch import load_file, save_file
from test_dropped_tensors import with_sight

from rerail import api
from rerail.export.checkpoint import read_manifest
from rerail.moe.source import ModelSource

UNSAID = ("dtype", "torch_dtype")


def flat(folder, **changes):
    parent(folder)
    edit(folder, **changes)


def composite(folder, top=(), inner=()):
    with_sight(folder)
    config = json.loads((folder / "config.json").read_text())
    for owner, said in ((config, top), (config["text_config"], inner)):
        for name in UNSAID:
            owner.pop(name, None)
        owner.update(said)
    (folder / "config.json").write_text(json.dumps(config))


def pickled(folder, **changes):
    flat(folder, **changes)
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


def stored_in(folder, dtype):
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("make", "declared", "stored"),
    [
        (flat, {}, torch.bfloat16),
        (flat, {"drop": UNSAID}, torch.bfloat16),
        (flat, {"drop": UNSAID}, torch.float32),
        (flat, {"drop": UNSAID, "torch_dtype": "float16"}, torch.float16),
        (flat, {"dtype": "bfloat16"}, torch.float32),
        (flat, {"dtype": "float32"}, torch.bfloat16),
        (flat, {"dtype": "float64"}, torch.float64),
        (composite, {}, torch.bfloat16),
        (composite, {"inner": {"dtype": "bfloat16"}}, torch.bfloat16),
        (composite, {"top": {"torch_dtype": "float32"}}, torch.bfloat16),
        (composite, {"top": {"dtype": "bfloat16"}, "inner": {"dtype": "float32"}}, torch.float16),
        (pickled, {"dtype": "bfloat16"}, None),
        (pickled, {"drop": UNSAID}, None),
    ],
)
def test_one_dtype_is_read_written_claimed_and_counted(tmp_path, make, declared, stored):
    folder = tmp_path / "parent"
    make(folder, **declared)
    if stored is None:  # not to be told without unpickling: the config decides
        stored = torch.bfloat16 if "dtype" in declared else torch.float32
    else:
        stored_in(folder, stored)
    source = ModelSource(str(folder))
    assert source.stored_dtype() == stored
    assert source.itemsize() == stored.itemsize
    teacher = api.load(source)
    assert teacher.model.model.dtype == torch.float32  # on a CPU
    student = api.compress(teacher, "aimer", 0.5)
    for form in ("native", "package"):
        saved = api.save(student, tmp_path / form, form)
        tensors, manifest = load_file(saved / "model.safetensors"), read_manifest(saved)
        beside = manifest.get("carried", {}).get("names", ())  # a tower is no part of the model
        own = [tensor for name, tensor in tensors.items() if name not in beside]
        floats = [tensor for tensor in own if tensor.is_floating_point()]
        assert {tensor.dtype for tensor in floats} == {stored}
        assert manifest["dtype"] == str(stored).removeprefix("torch.")
        written = sum(tensor.nbytes for tensor in floats)
        assert manifest["sizes"]["bytes"] == student.sizes.bytes == written
        config = json.loads((saved / "config.json").read_text())
        owners = [config, config.get("text_config", {})]
        claimed = {owner[name] for owner in owners for name in UNSAID if owner.get(name)}
        assert claimed == {manifest["dtype"]}
        assert ModelSource(str(saved)).stored_dtype() == stored
    whole = sum(p.numel() for p in teacher.model.model.parameters()) * stored.itemsize
    assert teacher.sizes.bytes == whole
