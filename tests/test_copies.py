"""Files that hold the weights once more are found, by name or by header, and files that do not are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import EMBED, HIDDEN, VOCABULARY, down, tensor, write_llama, write_manifest, write_shard

from swsurgery.checkpoint import open_checkpoint
from swsurgery.cli import main

BY_NAME = [
    "X.GGUF", "model.pt", "model.ckpt", "model.bin", "Model.PTH", "pytorch_model.bin", "PyTorch_Model.ckpt",
    "consolidated.00.pth", "consolidated.pt", "sub/pytorch_model.bin", "sub/pytorch_model-00001-of-00002.bin",
    "Original/params.json", "4_bit/X.gguf", "8_bit/pytorch_model-00001-of-00002.bin", "0_Transformer/pytorch_model.bin",
]  # fmt: skip
NO_COPY_BY_NAME = [
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "optimizer.bin", "tokenizer.json",
    "sub/model.pt", "2_Dense/pytorch_model.bin", "2_Dense/config.json", "broken.safetensors", "sub/broken.safetensors",
]  # fmt: skip
SAME = {EMBED: tensor("F16", VOCABULARY, HIDDEN)}


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


def write(path: Path, tensors: dict | None = None) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"weights") if tensors is None else write_shard(path, tensors)
    return path.name


@pytest.mark.parametrize("name", BY_NAME)
def test_a_copy_is_known_by_its_name_whatever_its_case(base, name):
    write(base / name)
    assert open_checkpoint(base).copies == (name,)


@pytest.mark.parametrize("name", NO_COPY_BY_NAME)
def test_other_names_are_no_copies(base, name):
    write(base / name)
    assert open_checkpoint(base).copies == ()


@pytest.mark.parametrize("name", ["llama-fp16.safetensors", "fp16/model.safetensors", "a/B.SAFETENSORS"])
def test_a_safetensors_file_with_one_of_the_tensors_is_a_copy(base, name):
    write(base / name, {"other.weight": tensor("F16", 2, 2), **SAME})
    assert open_checkpoint(base).copies == (name,)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "2_Dense/model.safetensors", "draft/model.safetensors"])
@pytest.mark.parametrize("other", [{"linear.weight": tensor("F16", 2, 2)}, {down(0): tensor("F16", 2, 2)}, {}])
def test_one_with_other_tensors_or_other_shapes_is_none(base, name, other):
    write(base / name, other)
    assert open_checkpoint(base).copies == ()


def test_an_edit_that_would_not_reach_it_is_refused(base, tmp_path, capsys):
    write(base / "llama-fp16.safetensors", SAME)
    write(base / "X.GGUF")
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "layer": 1, "row": 2, "col": 3})
    assert main(["apply", str(manifest), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "would not reach further copies of the weights: X.GGUF, llama-fp16.safetensors (say base.copies" in line
