"""verify --complete and preflight of GGUF files: the blocks and tensors that the metadata declares."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import CheckpointError, SwsurgeryError
from swsurgery.verifying.complete_gguf import ARCHITECTURES

SIZES = {
    "block_count": 3, "embedding_length": 8, "feed_forward_length": 12, "attention.head_count": 4,
    "attention.head_count_kv": 2, "vocab_size": 6,
}  # fmt: skip
BLOCK = {
    "attn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8), "ffn_norm": (8,),
    "ffn_gate": (12, 8), "ffn_up": (12, 8), "ffn_down": (8, 12),
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


def list_shapes(block: Mapping[str, tuple[int, ...]] = BLOCK, count: int = 3) -> Shapes:
    blocks = {f"blk.{n}.{name}.weight": shape for n in range(count) for name, shape in block.items()}
    return {"token_embd.weight": (6, 8), "output_norm.weight": (8,), **blocks}


def write(path: Path, shapes: Shapes, architecture: str = "llama", tokens: int = 6, **more: object) -> Path:
    """A file with the metadata SIZES, of which `more` replaces single keys; None leaves a key out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**SIZES, **more}.items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_token_list([f"t{n}" for n in range(tokens)])
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def errors(path: Path) -> list[tuple[str, str | None]]:
    """The findings of preflight, which verify --complete must share."""
    report = swsurgery.preflight(path)
    assert swsurgery.verify(path, complete=True).findings == report.findings
    assert report.exit_code == (1 if report.findings else 0)
    return [(finding.rule, finding.tensor) for finding in report.findings]


def without(*parts: str) -> Callable[[Shapes], Shapes]:
    return lambda shapes: {name: shape for name, shape in shapes.items() if not any(part in name for part in parts)}


def with_shape(name: str, shape: tuple[int, ...]) -> Callable[[Shapes], Shapes]:
    return lambda shapes: {**shapes, name: shape}


def test_a_whole_file_is_complete_and_needs_neither_torch_nor_gguf(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "model.gguf", list_shapes())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert main(["preflight", str(path)]) == 0
    assert capsys.readouterr().out.startswith("complete: 3 layers, 29 tensors in 1 shard, ")
    assert errors(tmp_path) == []
    assert main(["verify", str(path), "--complete", "--json"]) == 0
    complete = json.loads(capsys.readouterr().out)["complete"]
    assert (complete["complete"], complete["layers"], complete["not_examined"]) == (True, 3, [])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without("blk.1."), [("layer-missing", "blk.1")]),
        (without("blk.2."), [("layer-missing", "blk.2")]),
        (without("blk.1.attn_k.weight"), [("tensor-missing", "blk.1.attn_k.weight")]),
        (without("blk.1.attn_norm"), [("tensor-missing", "blk.1.attn_norm.weight")]),
        (without("ffn_gate"), [("tensor-missing", f"blk.{n}.ffn_gate.weight") for n in range(3)]),
        (without("output_norm"), [("tensor-missing", "output_norm.weight")]),
        (without("token_embd"), [("tensor-missing", "token_embd.weight")]),
        (with_shape("blk.2.ffn_up.weight", (12, 9)), [("shape-mismatch", "blk.2.ffn_up.weight")]),
        (lambda s: {n: (6, 8) if "attn_q" in n else x for n, x in s.items()},
         [("shape-mismatch", f"blk.{n}.attn_q.weight") for n in range(3)]),
        (with_shape("token_embd.weight", (5, 8)), [("vocabulary", "token_embd.weight")]),
        (with_shape("output.weight", (6, 4)), [("shape-mismatch", "output.weight")]),
        (with_shape("output_norm.weight", (9,)), [("shape-mismatch", "output_norm.weight")]),
    ],
)  # fmt: skip
def test_what_the_metadata_declares_and_the_file_lacks_is_a_finding(tmp_path, change, expected):
    assert errors(write(tmp_path / "m.gguf", change(list_shapes()))) == expected


@pytest.mark.parametrize(("architecture", "complete"), [("qwen2moe", True), ("llama", False)])
def test_experts_of_an_unstated_width_are_compared_only_where_it_is_known(tmp_path, architecture, complete):
    experts = {"ffn_gate_inp": (2, 8), "ffn_gate_exps": (2, 5, 8), "ffn_up_exps": (2, 5, 8), "ffn_down_exps": (2, 8, 5)}
    block = {name: shape for name, shape in BLOCK.items() if name not in ("ffn_gate", "ffn_up", "ffn_down")} | experts
    path = write(tmp_path / "m.gguf", list_shapes(block), architecture, expert_count=2)
    assert swsurgery.preflight(path).ok == complete


def test_one_block_alone_is_compared_with_the_table(tmp_path):
    path = write(tmp_path / "m.gguf", without("attn_v")(list_shapes(count=1)), block_count=1)
    assert errors(path) == [("tensor-missing", "blk.0.attn_v.weight")]


@pytest.mark.parametrize(
    ("changes", "block", "sizes"),
    [
        ({}, {"attn_qkv": (16, 8)}, {}),
        ({"attn_q": (12, 8), "attn_k": (6, 8), "attn_v": (10, 8), "attn_output": (8, 20)}, {},
         {"attention.key_length": 3, "attention.value_length": 5}),
        ({}, {"ffn_gate_inp": (2, 8), "ffn_gate_exps": (2, 5, 8), "ffn_up_exps": (2, 5, 8), "ffn_down_exps": (2, 8, 5)},
         {"expert_count": 2, "expert_feed_forward_length": 5}),
        ({}, {"ffn_gate_inp": (2, 8), **{f"ffn_{part}.{n}": (12, 8) for part in ("gate", "up") for n in range(2)}},
         {"expert_count": 2}),
        ({}, {}, {"feed_forward_length": [12, 12, 12], "attention.head_count_kv": [2, 2, 2]}),
        ({}, {"attn_q_norm": (2,)}, {}),
    ],
)  # fmt: skip
def test_other_forms_of_a_block_are_complete(tmp_path, changes, block, sizes):
    parts = {
        name: shape
        for name, shape in BLOCK.items()
        if not ("attn_qkv" in block and name in ARCHITECTURES["llama"][1:4])
    }
    parts = {
        n: x for n, x in parts.items() if not ("expert_count" in sizes and n in ("ffn_gate", "ffn_up", "ffn_down"))
    }
    assert errors(write(tmp_path / "m.gguf", list_shapes({**parts, **changes, **block}), **sizes)) == []


def test_blocks_of_two_kinds_and_other_architectures_are_compared_with_each_other(tmp_path, capsys):
    recurrent = {"attn_norm": (8,), "shortconv.conv": (8, 3), "shortconv.in_proj": (24, 8), "ffn_norm": (8,)}
    attention = {"attn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "ffn_norm": (8,)}
    kinds = [recurrent, recurrent, attention, recurrent, attention]
    shapes = list_shapes({}) | {f"blk.{n}.{x}.weight": y for n, kind in enumerate(kinds) for x, y in kind.items()}
    options = {"architecture": "lfm2", "block_count": 5, "attention.head_count_kv": [0, 0, 2, 0, 2]}
    path = write(tmp_path / "m.gguf", shapes, **options)
    assert errors(path) == []
    assert main(["preflight", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("complete: ") and "not examined: the blocks were only compared with each other" in out
    lacking = without("blk.3.shortconv.conv")(shapes)
    assert errors(write(tmp_path / "n.gguf", lacking, **options)) == [("tensor-missing", "blk.3.shortconv.conv.weight")]


def test_layers_that_predict_further_tokens_are_not_examined(tmp_path):
    path = write(tmp_path / "m.gguf", list_shapes(count=2), nextn_predict_layers=1)
    report = swsurgery.preflight(path)
    assert report.ok and report.complete.unexamined == ("blocks 2 to 2, which predict further tokens",)


def test_encoder_and_decoder_have_blocks_of_their_own(tmp_path):
    block = {"attn_q": (8, 8), "ffn_up": (12, 8)}
    shapes = {f"{side}.blk.{n}.{x}.weight": y for side in ("enc", "dec") for n in range(3) for x, y in block.items()}
    assert errors(write(tmp_path / "t5.gguf", shapes, "t5")) == []
    assert errors(write(tmp_path / "u.gguf", without("dec.blk.1.")(shapes), "t5")) == [("layer-missing", "dec.blk.1")]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"block_count": None}, "the metadata does not state llama.block_count"),
        ({"general.type": "adapter"}, "general.type is adapter, not model"),
        ({"general.architecture": "clip"}, "clip.block_count"),
    ],
)
def test_what_cannot_be_decided_is_said(tmp_path, capsys, more, reason):
    if "general.architecture" in more:
        path = write(tmp_path / "m.gguf", list_shapes(), "clip", block_count=None)
    else:
        path = write(tmp_path / "m.gguf", list_shapes(), **more)
    assert main(["preflight", str(path)]) == 2
    assert reason in capsys.readouterr().out
    assert main(["verify", str(path), "--complete", "--strict"]) == 1


@pytest.mark.parametrize("lost", [1, 500])
def test_a_truncated_file_is_short_by_the_missing_bytes(tmp_path, lost):
    path = write(tmp_path / "m.gguf", list_shapes())
    data = path.read_bytes()
    path.write_bytes(data[:-lost])
    [finding] = swsurgery.preflight(path).findings
    assert finding.rule == "shard-truncated" and f"its header needs {len(data)}" in finding.message
    assert "hf download" in finding.message
    path.write_bytes(data[:300])
    [finding] = swsurgery.preflight(path).findings
    assert finding.rule == "shard-truncated" and "truncated in its header" in finding.message
    path.write_bytes(b"GGUX" + data[4:])
    [finding] = swsurgery.preflight(path).findings
    assert finding.rule == "structure" and "begins with" in finding.message


def split(folder: Path, shapes: Shapes, parts: int, **stated: int) -> Path:
    """A split model, as llama-gguf-split writes it: only the first part has the metadata."""
    folder.mkdir()
    names = list(shapes)
    for number in range(parts):
        path = folder / f"m-{number + 1:05}-of-{parts:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if not number:
            for key, value in SIZES.items():
                writer.add_uint32(f"llama.{key}", value)
        writer.add_uint16("split.no", stated.get("no", number))
        writer.add_uint16("split.count", stated.get("count", parts))
        writer.add_int32("split.tensors.count", stated.get("tensors", len(names)))
        for name in names[number::parts]:
            writer.add_tensor(name, np.ones(shapes[name], np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder


def test_the_parts_of_a_split_file_are_one_model(tmp_path):
    report = swsurgery.preflight(split(tmp_path / "whole", list_shapes(), 3))
    assert report.ok and "29 tensors in 3 shards" in report.headline
    assert errors(split(tmp_path / "lacking", without("blk.1.attn_k")(list_shapes()), 3)) == [
        ("tensor-missing", "blk.1.attn_k.weight")
    ]


def test_missing_and_wrong_parts_are_findings(tmp_path):
    folder = split(tmp_path / "m", list_shapes(), 3)
    (folder / "m-00002-of-00003.gguf").unlink()
    [finding] = swsurgery.preflight(folder).findings
    assert (finding.rule, finding.file) == ("shard-missing", "m-00002-of-00003.gguf")
    (folder / "m-00001-of-00003.gguf").unlink()
    assert {f.rule for f in swsurgery.preflight(folder).findings} == {"shard-missing"}
    for number, (stated, words) in enumerate(
        (({"no": 0}, "says part 2 of 3"), ({"count": 4}, "part 1 of 4"), ({"tensors": 30}, "have 30 tensors"))
    ):
        found = swsurgery.preflight(split(tmp_path / str(number), list_shapes(), 3, **stated)).findings
        assert {f.rule for f in found} == {"structure"} and any(words in f.message for f in found)
    with pytest.raises(CheckpointError, match="is one of 3 parts"):
        swsurgery.preflight(folder / "m-00003-of-00003.gguf")


def test_questions_that_a_gguf_file_cannot_answer_are_refused(tmp_path):
    write(tmp_path / "a.gguf", list_shapes())
    with pytest.raises(SwsurgeryError, match="leave --transformers out"):
        swsurgery.verify(tmp_path, complete=True, transformers=True)
    write(tmp_path / "b.gguf", list_shapes())
    with pytest.raises(CheckpointError, match="there are 2 GGUF files"):
        swsurgery.preflight(tmp_path)


def test_the_table_names_only_tensors_of_llama_cpp():
    known = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    for architecture, required in ARCHITECTURES.items():
        names = {TENSOR_NAMES[each].removeprefix("blk.{bid}.") for each in MODEL_TENSORS[known[architecture]]}
        fused = {"attn_q", "attn_k", "attn_v"} if "attn_qkv" in names else set()
        assert set(required) - fused <= names, architecture


@pytest.mark.parametrize("size", [0, 4, 1 << 31, (1 << 32) - 1])
def test_a_hostile_number_of_blocks_ends_in_few_lines(tmp_path, size):
    report = swsurgery.preflight(write(tmp_path / "m.gguf", list_shapes(), block_count=size))
    assert not report.ok and len(report.findings) <= 30
