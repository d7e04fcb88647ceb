"""Files that hold the weights once more are found, by name or by header, and files that do not are left alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkpoints import (
    EMBED,
    FIRST,
    HEAD,
    HIDDEN,
    INDEX,
    INNER,
    LAYERS,
    VOCABULARY,
    down,
    tensor,
    tree,
    write_llama,
    write_manifest,
    write_shard,
    write_sparse_shard,
)

from swsurgery.checkpoint.copies import LARGE, MAX_NOTED
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main
from swsurgery.storage.names import OWN_FILES

BY_NAME = [
    "X.GGUF", "model.pt", "model.ckpt", "model.bin", "Model.PTH", "pytorch_model.bin", "PyTorch_Model.ckpt",
    "consolidated.00.pth", "consolidated.pt", "sub/pytorch_model.bin", "sub/pytorch_model-00001-of-00002.bin",
    "Original/params.json", "4_bit/X.gguf", "metal/model.bin", "ct2/model.bin", "openvino_model.bin",
    "ggml-model-f16.bin",
    "openvino_model.xml", "int8/openvino_language_model.bin", "weights.npz", "weights.00.npz", "model_state.pdparams",
    "model-q4.litertlm", "gemma.task", "X.tflite", "X.mlmodel", "X.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
    "X.keras", "X.nemo", "model.llamafile", "last.ckpt", "runs/epoch=3.ckpt", "checkpoint-5/pytorch_model.bin",
    "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata",
    "checkpoint-5/pytorch_model_fsdp_0/.metadata", "step-9/__1_0.distcp", "global_step500/mp_rank_00_model_states.pt",
    "global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "iter_0000001/mp_rank_00/model_optim_rng.pt", "params_shard_0.bin", "flax_model.msgpack.index.json",
    "model.ckpt.data-00000-of-00001", "keras/model.weights.h5", "decoder/model_q4.onnx", "model_q4.onnx_data_1",
    "model.onnx.data",
    "saved/variables/variables.data-00000-of-00001", "8_bit/pytorch_model-00001-of-00002.bin",
    "0_Transformer/pytorch_model.bin",
]  # fmt: skip
NO_COPY_BY_NAME = [
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "optimizer.bin", "tokenizer.json",
    "sub/model.pt", "scheduler.bin", "random_states_0.pkl", "checkpoint-5/optimizer.pt", "optimizer_0/__0_0.distcp",
    "trainer_state.json", "scaler.pt", "openvino_tokenizer.bin", "openvino_config.json", "model.txt", "vocab.npz",
    "2_Dense/pytorch_model.bin", "2_Dense/config.json", "broken.safetensors", "sub/broken.safetensors",
]  # fmt: skip
SAME = {EMBED: tensor("F16", VOCABULARY, HIDDEN)}


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


def write(path: Path, tensors: dict | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
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
    assert "would not be edited: X.GGUF, llama-fp16.safetensors (set base.copies" in line


# --- safetensors, by the header alone

MTP = {"mtp.0.proj.weight": tensor("BF16", HIDDEN, 2 * HIDDEN), "mtp.0.down.weight": tensor("BF16", HIDDEN, INNER)}
NOT_COPIES = [
    "model-mtp.safetensors",
    "model_visual.safetensors",
    "consolidated-head.safetensors",
    "original/x.safetensors",
]


@pytest.mark.parametrize("name", NOT_COPIES)
def test_a_name_like_that_of_the_weights_makes_no_copy(base, name):
    write(base / name, MTP)
    assert open_checkpoint(base).copies == ()


def test_omit_keeps_weights_that_no_shard_holds(base, tmp_path):
    write(base / "model-mtp.safetensors", MTP)
    write(base / "model-old.safetensors", SAME)
    edit = {"op": "zero", "layer": 1, "row": 2, "col": 3}
    manifest = write_manifest(tmp_path / "m.json", {"path": str(base), "copies": "omit"}, edit)
    assert main(["apply", str(manifest), "-o", str(tmp_path / "out"), "--check", "weights", "--quiet"]) == 0
    kept = tree(tmp_path / "out")
    assert kept["model-mtp.safetensors"] == (base / "model-mtp.safetensors").read_bytes()
    assert "model-old.safetensors" not in kept


def test_tensors_that_no_shard_holds_are_noted(base):
    write(base / "model-mtp.safetensors", MTP)
    write(base / "adapter_model.safetensors", MTP)
    write(base / "draft/model.safetensors", MTP)
    write(base / "one.safetensors", {"x": tensor("F32", 3)})
    unread = "in no shard: loaders that follow the index or model.safetensors do not read it"
    assert open_checkpoint(base).notes == (
        f"model-mtp.safetensors holds 2 tensors that are {unread}",
        f"one.safetensors holds a tensor that is {unread}",
    )


def originals(count: int = LAYERS) -> dict:
    """The weights under Mistral's names."""
    layers = {f"layers.{n}.feed_forward.w2.weight": tensor("BF16", HIDDEN, INNER) for n in range(count)}
    return {**layers, "tok_embeddings.weight": tensor("BF16", VOCABULARY, HIDDEN)}


def test_the_same_weights_under_other_names_are_a_copy(base):
    write(base / "consolidated.safetensors", originals())
    assert open_checkpoint(base).copies == ("consolidated.safetensors",)


def test_a_copy_may_be_split(base):
    names = ("consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors")
    tensors = list(originals().items())
    for name, part in zip(names, (tensors[:2], tensors[2:]), strict=True):
        write(base / name, dict(part))
    assert open_checkpoint(base).copies == names
    (base / names[0]).unlink()
    assert open_checkpoint(base).copies == (), "less than half of the shards' elements"


def test_some_shapes_in_common_are_no_copy(base):
    write(base / "draft.safetensors", {"draft.down.weight": tensor("BF16", HIDDEN, INNER)})
    assert open_checkpoint(base).copies == ()


def test_an_index_goes_with_the_files_that_it_lists(base):
    for stem, tensors in (("mtp", MTP), ("old", SAME)):
        write(base / f"{stem}.safetensors", tensors)
        weight_map = dict.fromkeys(tensors, f"{stem}.safetensors")
        (base / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        write(base / stem / "a.safetensors", tensors)
        (base / stem / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    (base / "gone.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    (base / "bad.safetensors.index.json").write_text("{")
    assert open_checkpoint(base).copies == (
        "bad.safetensors.index.json", "gone.safetensors.index.json", "old.safetensors", "old.safetensors.index.json",
        "old/a.safetensors", f"old/{INDEX}",
    )  # fmt: skip


# --- files that belong together


@pytest.mark.parametrize("name", ["model.onnx_data", "model.onnx.data", "model_data", "weights.bin", "tensors.pb", HEAD,
                                  "onnx__MatMul_1234", "model.data"])  # fmt: skip
@pytest.mark.parametrize("folder", ["", "decoder/"])
def test_external_data_goes_with_its_onnx_file(base, tmp_path, folder, name):
    write(base / folder / "model.onnx")
    write(base / folder / name)
    assert open_checkpoint(base).copies == tuple(sorted((f"{folder}model.onnx", folder + name)))
    (base / folder / "model.onnx").unlink()
    alone = name in ("model.onnx_data", "model.onnx.data")
    assert open_checkpoint(base).copies == ((folder + name,) if alone else ())


def test_metadata_goes_with_the_files_of_its_folder(base):
    write(base / "a/__0_0.distcp")
    write(base / "a/.metadata")
    write(base / "b/.metadata")
    assert open_checkpoint(base).copies == ("a/.metadata", "a/__0_0.distcp")


# --- notes on large files


def sparse(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, size)


def test_a_large_file_of_an_unknown_kind_is_noted(base, capsys, tmp_path):
    sparse(base / "llm.blob", LARGE)
    sparse(base / "sub" / "damaged.safetensors", LARGE)
    for name in ("small.blob", "half/small.blob"):
        sparse(base / name, LARGE - 1)
    for name in ("optimizer.bin", "tokenizer.model", "corpus.txt", "model.gguf", "adapter_model.bin"):
        sparse(base / name, LARGE)
    expected = tuple(
        f"{name} is large ({LARGE} bytes) and swsurgery does not know what it holds: if these are the weights again, "
        "no edit reaches them" for name in ("llm.blob", "sub/damaged.safetensors")
    )  # fmt: skip
    assert open_checkpoint(base).notes == expected
    edit = {"op": "zero", "layer": 1, "row": 2, "col": 3}
    manifest = write_manifest(tmp_path / "m.json", {"path": str(base), "copies": "keep"}, edit)
    assert main(["apply", str(manifest), "-o", str(tmp_path / "out"), "--check", "weights"]) == 0
    assert f"swsurgery: {expected[0]}" in capsys.readouterr().err.splitlines()
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert f"note      {expected[0]}" in capsys.readouterr().out.splitlines()
    assert main(["verify", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == list(expected)


def test_no_note_is_made_of_swsurgerys_own_large_files(base):
    for name in OWN_FILES:
        sparse(base / name, LARGE)
        sparse(base / "elsewhere" / name, LARGE)
    assert [note.split()[0] for note in open_checkpoint(base).notes] == [
        "elsewhere/SHA256SUMS",
        "elsewhere/manifest.yaml",
    ]


def test_a_tenth_of_the_shards_is_large(base):
    sparse(base / FIRST, (base / FIRST).stat().st_size)
    write_sparse_shard(base / "big.safetensors", "x", "F32", 20 * LARGE // 4)
    (base / INDEX).write_text(json.dumps({"weight_map": {"x": "big.safetensors"}}))
    for name in list(tree(base)):
        if name not in ("big.safetensors", INDEX, "config.json"):
            (base / name).unlink()
    stored = open_checkpoint(base).shards["big.safetensors"].size
    sparse(base / "a.blob", stored // 10)
    sparse(base / "b.blob", stored // 10 + 1)
    [note] = open_checkpoint(base).notes
    assert note.startswith("b.blob is large")


def test_notes_are_bounded(base):
    for number in range(MAX_NOTED + 3):
        sparse(base / f"{number:02}.blob", LARGE)
    notes = open_checkpoint(base).notes
    assert (len(notes), notes[-1]) == (MAX_NOTED + 1, "and 3 more such files")
