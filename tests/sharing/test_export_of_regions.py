"""LoRA adapters of rows, columns and neurons: PEFT merges them into exactly the patched weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from checkpoints import HIDDEN, INNER, write_llama, write_manifest
from safetensors.torch import load_file, save_file
from test_export import adapted, logits
from tiny_checkpoint import DOWN, load, write_pair

import swsurgery
from swsurgery.cli import main
from swsurgery.sharing import export

# PEFT's own use of transformers: it asks for a property that is renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
MATRICES = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in range(2) for part in ("gate", "up", "down")]
EDITS = {
    "row": {"op": "zero", "layer": 1, "row": 3},
    "column": {"op": "scale", "layer": 0, "col": 5, "factor": 0.5},
    "neuron": {"op": "zero", "layer": 1, "neuron": 7},
    "slice": {"op": "zero", "tensor": DOWN, "slice": "2:4, 1:5"},
}
RANKS = {"row": [1], "column": [1], "neuron": [1, 1, 1], "slice": [2]}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def make(folder: Path, base: Path, *edits: dict) -> Path:
    manifest = write_manifest(folder / "m.json", base, *edits)
    swsurgery.apply(manifest, output=folder / "edited", check="off")
    return manifest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EDITS)
def test_peft_merges_an_adapter_into_the_patched_weights(tmp_path, name, dtype):
    base = write_pair(tmp_path, dtype=dtype).base
    manifest = make(tmp_path, base, EDITS[name])
    for number, source in enumerate((manifest, tmp_path / "edited")):
        export.export(source, tmp_path / f"adapter{number}", format="peft")
    first, second = ((tmp_path / f"adapter{n}" / "adapter_model.safetensors").read_bytes() for n in (0, 1))
    assert first == second
    arrays = load_file(tmp_path / "adapter0" / "adapter_model.safetensors")
    assert sorted(len(a) for key, a in arrays.items() if "lora_A" in key) == RANKS[name]
    wanted = load_file(tmp_path / "edited" / "model.safetensors")
    plain = load(base)
    before = {n: bits(plain.get_parameter(n)).clone() for n in MATRICES}
    merged = adapted(plain, tmp_path / "adapter0").merge_and_unload()
    assert any(not torch.equal(bits(wanted[n]), before[n]) for n in MATRICES), "the edit matters"
    for each in MATRICES:
        assert torch.equal(bits(merged.get_parameter(each)), bits(wanted[each])), each
    assert torch.equal(logits(merged), logits(load(tmp_path / "edited")))


@pytest.mark.parametrize("family", ["gpt2", "phi3", "opt", "qwen2"])
@pytest.mark.parametrize("target", ["row", "col"])
def test_a_row_or_column_of_other_families(tmp_path, family, target):
    """GPT-2's layers are transposed: a row of its down projection is a column of the stored tensor."""
    if family not in tiny_models.TEXT_MODELS:
        pytest.skip("not among the tiny models")
    base = tmp_path / "base"
    tiny_models.write(family, base)
    manifest = make(tmp_path, base, {"op": "zero", "layer": 1, target: 3})
    export.export(manifest, tmp_path / "adapter", format="peft")
    plain, wanted = (tiny_models.load(family, folder) for folder in (base, tmp_path / "edited"))
    unedited = {name: bits(tensor).clone() for name, tensor in plain.named_parameters()}
    merged = adapted(plain, tmp_path / "adapter").merge_and_unload()
    patched = dict(wanted.named_parameters())
    assert any(not torch.equal(bits(tensor), unedited[name]) for name, tensor in patched.items())
    for name, tensor in merged.named_parameters():
        assert torch.equal(bits(tensor), bits(patched[name])), name


def refused(capsys, source: Path, output: Path) -> str:
    capsys.readouterr()
    assert main(["export", str(source), "--format", "peft", "-o", str(output)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert not output.exists()
    return line


def test_a_negative_zero_that_would_change_is_refused(tmp_path, capsys):
    """PEFT adds 0.0 to every scalar of the tensor, and -0.0 + 0.0 is 0.0."""
    base = write_pair(tmp_path, dtype=torch.bfloat16).base
    tensors = load_file(base / "model.safetensors")
    tensors[DOWN][0, 0] = -0.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    manifest = make(tmp_path, base, EDITS["row"])
    for source in (manifest, tmp_path / "edited"):
        line = refused(capsys, source, tmp_path / "adapter")
        assert f"1 scalar of {DOWN} would change from -0.0 to 0.0" in line and "--format sparse" in line
    # The oracle: with the scalar moved into the row that is zeroed, the edit changes it to 0.0 and PEFT does too.
    tensors[DOWN][0, 0], tensors[DOWN][3, 0] = 1.0, -0.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    export.export(manifest, tmp_path / "adapter", format="peft")
    merged = adapted(load(base), tmp_path / "adapter").merge_and_unload().get_parameter(DOWN)
    assert not bits(merged)[3].any()


def test_a_new_negative_zero_is_refused(tmp_path, capsys):
    base = write_pair(tmp_path).base
    manifest = make(tmp_path, base, {"op": "set", "layer": 1, "row": 3, "value": -0.0})
    line = refused(capsys, manifest, tmp_path / "adapter")
    assert f"{DOWN}[3, 0] becomes -0.0, which a sum never is" in line and "and 23 more of this tensor" in line


def test_a_difference_that_float32_cannot_hold_is_refused(tmp_path, capsys):
    data = np.full((HIDDEN, INNER), 5.875, "<f4")
    base = write_llama(tmp_path / "base", {"model.layers.2.mlp.up_proj.weight": ("F32", data.shape, data.tobytes())})
    target = {"tensor": "model.layers.2.mlp.up_proj.weight", "slice": "1"}
    manifest = make(tmp_path, base, {"op": "set", **target, "value": 1e-7})
    line = refused(capsys, manifest, tmp_path / "adapter")
    assert "becomes 0, not 1.0000000116860974e-07" in line and "does not fit into float32" in line
    assert "and 9 more of this tensor" in line
    single = np.float32(1e-7)
    assert data[0, 0] + np.float32(single - data[0, 0]) != single, "the oracle"
    zeroed = write_manifest(tmp_path / "zeroed.json", base, {"op": "zero", **target})
    assert export.export(zeroed, tmp_path / "fits", format="peft").notes == ()


def test_what_is_no_linear_layer_is_one_line_for_a_whole_region(tmp_path, capsys):
    base = tmp_path / "base"
    tiny_models.write("mixtral", base)
    manifest = make(tmp_path, base, {"op": "zero", "layer": 1, "row": 3, "expert": 2})
    line = refused(capsys, manifest, tmp_path / "adapter")
    assert "is the weight of an expert" in line and "more of this tensor" in line
    embedding = write_pair(tmp_path / "tied").base
    manifest = make(tmp_path / "tied", embedding, {"op": "zero", "tensor": "model.embed_tokens.weight", "slice": "3"})
    assert "is not known to be the weight of a linear layer" in refused(capsys, manifest, tmp_path / "adapter")


def test_a_row_of_zeros_is_nothing_to_export(tmp_path, capsys):
    base = write_pair(tmp_path).base
    make(tmp_path, base, EDITS["row"])
    manifest = write_manifest(tmp_path / "again.json", tmp_path / "edited", EDITS["row"])
    assert "nothing is changed" in refused(capsys, manifest, tmp_path / "adapter")
