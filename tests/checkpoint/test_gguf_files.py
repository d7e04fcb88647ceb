"""A GGUF file as a checkpoint: what opens it, what refuses it, and what the commands say."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import write_llama, write_manifest
from ggufs import make_blocks, open_file, write_gguf
from hub import fixture

from swsurgery.checkpoint.gguf_config import make_config
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.sizes import read_sizes
from swsurgery.cli import main
from swsurgery.errors import CheckpointError
from swsurgery.storage.gguf import SkippedArray

any_hub, hub = fixture.any_hub, fixture.hub
KIND = gguf.GGMLQuantizationType.Q4_0
DOWN = "blk.1.ffn_down.weight"


def write(path: Path) -> np.ndarray:
    """Write a model of two layers; return the down projection of layer 1, float32 [4, 64]."""
    layers = [make_blocks(KIND, 8, seed).reshape(4, -1) for seed in range(2)]
    tensors = {f"blk.{n}.ffn_down.weight": (layer, KIND) for n, layer in enumerate(layers)}
    tensors["blk.0.ffn_norm.weight"] = (np.arange(4, dtype=np.float32), gguf.GGMLQuantizationType.F32)
    write_gguf(path, tensors, block_count=2, embedding_length=4, feed_forward_length=64)
    return gguf.dequantize(layers[1], KIND)


def run(capsys, *words: object) -> tuple[int, dict, str]:
    """Exit code, the document on stdout, and the lines on stderr."""
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


# Reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["model.gguf", "."])
def test_a_file_and_its_directory_are_inspected(place, tmp_path, capsys):
    expected = write(tmp_path / "model.gguf")
    code, document, _ = run(capsys, "inspect", tmp_path / place)
    assert (code, document["model_type"]) == (0, "gguf")
    assert [(t["tensor"], t["dtype"], t["shape"]) for t in document["tensors"]] == [
        ("blk.0.ffn_down.weight", "Q4_0", [4, 64]),
        ("blk.1.ffn_down.weight", "Q4_0", [4, 64]),
        ("blk.0.ffn_norm.weight", "F32", [4]),
    ]
    code, found, _ = run(capsys, "inspect", tmp_path / place, "--tensor", DOWN, "--at", "3,52")
    assert code == 0 and found["value"] == expected[3, 52] and found["layout"] == "GGUF Q4_0"
    assert (found["layer"], found["row"], found["col"], found["expert"]) == (1, 3, 52, None)
    byte = (tmp_path / "model.gguf").read_bytes()[found["offset"]]
    assert found["code"] == byte >> 4  # elements 16 to 31 of a block are in the upper halves of its bytes
    assert found["step"] == pytest.approx(
        abs(expected[3, 52] / (found["code"] - 8)) if found["code"] != 8 else found["step"]
    )
    code, found, _ = run(capsys, "inspect", tmp_path / place, "--tensor", "blk.0.ffn_norm.weight", "--at", "3")
    assert code == 0 and (found["value"], found["bits"]) == (3.0, "0x40400000")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_matrix_without_blocks_is_plain(kind, tmp_path, capsys):
    values = np.array([[1.5, -2.0], [0.25, 5.875]], np.float32)
    number = gguf.GGMLQuantizationType[kind]
    tensors = {DOWN: (gguf.quantize(values, number), number)}
    write_gguf(tmp_path / "model.gguf", tensors, block_count=2, embedding_length=2)
    code, found, _ = run(capsys, "inspect", tmp_path / "model.gguf", "--tensor", DOWN, "--at", "1,1")
    assert code == 0 and (found["dtype"], found["value"], found["row"], found["col"]) == (kind, 5.875, 1, 1)
    assert "note" not in found and "layout" not in found


def test_files_beside_the_named_one_are_not_read(tmp_path, capsys):
    write(tmp_path / "model.gguf")
    (tmp_path / "other.gguf").write_bytes(b"damaged")
    (tmp_path / "swsurgery.json").write_text("damaged")
    (tmp_path / "link").symlink_to("nowhere")
    code, document, _ = run(capsys, "inspect", tmp_path / "model.gguf")
    assert code == 0 and [f["file"] for f in document["files"]] == ["model.gguf"]
    assert run(capsys, "verify", tmp_path / "model.gguf", "--finite")[0] == 0


def test_safetensors_come_before_a_gguf_file(tmp_path, capsys):
    write_llama(tmp_path)
    write(tmp_path / "model.gguf")
    code, document, _ = run(capsys, "inspect", tmp_path)
    assert code == 0 and document["copies"] == ["model.gguf"] and document["model_type"] != "gguf"


def test_a_file_on_the_hub_is_read_by_ranges(hub, tmp_path, capsys):
    expected = write(tmp_path / "model.gguf")
    write(tmp_path / "other.gguf")
    hub.add_repo("org/one", tmp_path)
    code, found, err = run(capsys, "inspect", "hf://org/one/model.gguf", "--tensor", DOWN, "--at", "0,5")
    assert code == 0 and found["value"] == expected[0, 5] and "range requests" in err
    code, _, err = run(capsys, "inspect", "hf://org/one")
    assert code == 2 and "there are 2 GGUF files, such as model.gguf" in err
    code, _, err = run(capsys, "inspect", "hf://org/one/missing.gguf")
    assert code == 2 and "the repository has no such file: hf://org/one/missing.gguf" in err


def test_an_element_on_the_hub_costs_the_header_and_one_piece(hub, tmp_path, capsys):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_token_list([f"token {n}" for n in range(250_000)])
    writer.add_tensor(DOWN, np.arange(1 << 21, dtype=np.float32).reshape(1024, 2048))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = open_file(tmp_path / "model.gguf").shards["model.gguf"].data_start
    hub.add_repo("org/one", tmp_path)
    hub.traffic.clear()
    code, found, _ = run(capsys, "inspect", "hf://org/one/model.gguf", "--tensor", DOWN, "--at", "1023,2047")
    assert code == 0 and found["value"] == (1 << 21) - 1
    moved = hub.traffic.sent(origin="store")
    assert 4 << 20 < header < moved < header + (1 << 20) + (256 << 10)


def test_sizes_are_those_of_the_metadata(tmp_path):
    write(tmp_path / "model.gguf")
    sizes = read_sizes(open_file(tmp_path / "model.gguf"))
    assert (sizes.layers, sizes.hidden, sizes.intermediate, sizes.vocabulary) == (2, 4, (64,), 3)


def test_a_config_has_what_the_metadata_states_validly():
    metadata = {
        "general.architecture": "deepseek2",
        "deepseek2.block_count": 62,
        "deepseek2.nextn_predict_layers": 1,
        "deepseek2.embedding_length": 7168,
        "deepseek2.feed_forward_length": (18432, 0, -1, 2048),
        "deepseek2.expert_feed_forward_length": 2048,
        "deepseek2.expert_count": 0,
        "deepseek2.vocab_size": "many",
        "tokenizer.ggml.tokens": SkippedArray(129280),
        "general.source.repo_url": "https://huggingface.co/org/model",
    }
    assert make_config(metadata) == {
        "model_type": "gguf",
        "gguf_architecture": "deepseek2",
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "intermediate_size": [18432, 2048],
        "moe_intermediate_size": 2048,
        "vocab_size": 129280,
        "_name_or_path": "org/model",
    }
    assert make_config({}) == {"model_type": "gguf"}


# Values that are not finite -----------------------------------------------------------------------------------------


def test_a_scale_that_is_not_finite_is_found(tmp_path, capsys):
    write(tmp_path / "model.gguf")
    code, _, _ = run(capsys, "verify", tmp_path / "model.gguf", "--finite")
    assert code == 0
    shard = open_file(tmp_path / "model.gguf").shards["model.gguf"]
    raw = bytearray((tmp_path / "model.gguf").read_bytes())
    block = shard.data_start + shard.tensors[DOWN].data_offsets[0] + 3 * 18
    raw[block : block + 2] = np.array([np.nan], np.float16).tobytes()
    (tmp_path / "model.gguf").write_bytes(raw)
    code, document, _ = run(capsys, "verify", tmp_path / "model.gguf", "--finite")
    [finding] = document["findings"]
    assert code == 1 and (finding["rule"], finding["tensor"], finding["index"]) == ("non-finite", DOWN, [1, 32])
    assert finding["message"] == "32 values of this matrix are NaN or infinite, because a stored scale is"


# Refusals -----------------------------------------------------------------------------------------------------------


def test_no_command_runs_a_gguf_file(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    model = folder / "model.gguf"
    write(model)
    manifest = write_manifest(tmp_path / "m.json", model, {"op": "zero", "layer": 1, "row": 0, "col": 0})
    commands: list[list[object]] = [
        ["scan", model],
        ["check", model],
        ["sweep", manifest, "--factors", "1"],
        ["compare", manifest],
        ["export", manifest, "--format", "sparse", "-o", tmp_path / "export"],
    ]
    before = model.read_bytes()
    for words in commands:
        code, _, err = run(capsys, *words)
        assert code == 2 and len(err.splitlines()) == 1, (words, err)
        assert (
            f"this command does not read GGUF files, because swsurgery can neither run nor export them: {model}" in err
        )
    assert model.read_bytes() == before and [*folder.iterdir()] == [model]


def test_several_files_are_not_chosen_from(tmp_path, capsys):
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2
    assert f"there are 2 GGUF files, such as a.gguf: {tmp_path} (choose one: give {tmp_path}/NAME.gguf)" in err


def write_parts(folder: Path, count: int = 2) -> np.ndarray:
    """Write one model in `count` parts, as llama.cpp names them; return all blocks of the tensors [count, 4, bytes]."""
    folder.mkdir(exist_ok=True)
    blocks = np.stack([make_blocks(KIND, 8, seed).reshape(4, -1) for seed in range(count)])
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=1)
    writer.add_uint32("llama.block_count", count)
    for number, layer in enumerate(blocks):
        writer.add_tensor(f"blk.{number}.ffn_down.weight", layer, raw_dtype=KIND)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return blocks


def test_the_parts_of_a_split_file_are_one_checkpoint(tmp_path, capsys):
    blocks = write_parts(tmp_path / "model", 3)
    code, document, _ = run(capsys, "inspect", tmp_path / "model")
    assert code == 0 and [f["file"] for f in document["files"]] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert [t["tensor"] for t in document["tensors"]] == [f"blk.{n}.ffn_down.weight" for n in range(3)]
    code, found, _ = run(capsys, "inspect", tmp_path / "model", "--tensor", "blk.2.ffn_down.weight", "--at", "3,52")
    assert code == 0 and found["value"] == gguf.dequantize(blocks[2], KIND)[3, 52]
    assert read_sizes(open_checkpoint(tmp_path / "model", gguf=True)).layers == 3


def test_a_part_of_a_model_is_refused(tmp_path, capsys):
    write_parts(tmp_path / "model")
    first, second = (tmp_path / "model" / f"m-0000{n}-of-00002.gguf" for n in (1, 2))
    code, _, err = run(capsys, "inspect", first)
    assert code == 2 and f"is one of 2 parts of a model: {first} (give the directory that contains all parts)" in err
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="states that it is part 1 of 2, but its name says part 1 of 1"):
        open_file(tmp_path / "renamed.gguf")
    code, _, err = run(capsys, "inspect", tmp_path / "model")
    assert code == 2 and "a part of the model is missing: m-00001-of-00002.gguf" in err
    second.rename(first)
    (tmp_path / "renamed.gguf").rename(second)
    code, _, err = run(capsys, "inspect", tmp_path / "model")
    assert code == 2 and "states that it is part 2 of 2, but its name says part 1 of 2" in err


def test_parts_with_the_same_tensor_are_refused(tmp_path, capsys):
    write_parts(tmp_path)
    raw = (tmp_path / "m-00002-of-00002.gguf").read_bytes()
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(raw.replace(b"blk.1.ffn_down", b"blk.0.ffn_down"))
    for words in (["inspect"], ["preflight"]):
        code, _, err = run(capsys, *words, tmp_path)
        assert code == 2 and "has the tensor 'blk.0.ffn_down.weight', which m-00001-of-00002.gguf has too" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tensor", DOWN, "--at", "4,0"], "index [4, 0] is out of range for shape [4, 64]"),
        (["--tensor", DOWN, "--at", "4"], "index [4] has 1 numbers, but shape [4, 64] has rank 2"),
        (["--tensor", "blk.9.ffn_down.weight", "--at", "0,0"], "no such tensor: blk.9.ffn_down.weight"),
    ],
)
def test_a_wrong_place_is_one_line(words, message, tmp_path, capsys):
    write(tmp_path / "model.gguf")
    code, _, err = run(capsys, "inspect", tmp_path / "model.gguf", *words)
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_a_damaged_file_is_one_line(tmp_path, capsys):
    write(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:700])
    for words in (["inspect", tmp_path / "model.gguf"], ["verify", tmp_path, "--known"]):
        code, _, err = run(capsys, *words)
        assert code == 2 and len(err.splitlines()) == 1 and "model.gguf" in err


def test_without_the_package_one_line_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    write(tmp_path / "model.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf.quants", None)
    code, _, err = run(capsys, "inspect", tmp_path / "model.gguf", "--tensor", DOWN, "--at", "0,0")
    assert code == 2 and len(err.splitlines()) == 1 and "run pip install 'swsurgery[gguf]'" in err
    assert run(capsys, "inspect", tmp_path / "model.gguf")[0] == 0
