"""Small Llama-shaped checkpoints, written byte by byte without torch and without the code under test.

No test lives here. `place` is the oracle for where a scalar lies: it reads the header with json and struct alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
HIDDEN, INNER, LAYERS, VOCABULARY = 6, 10, 3, 12
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1, "I64": 8, "I32": 4, "U32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element."""

Tensor = tuple[str, tuple[int, ...], bytes]
"""dtype, shape, little-endian data."""


def down(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj.weight"


def tensor(dtype: str, *shape: int, seed: int = 0, one: bool = False) -> Tensor:
    """Finite random values as stored bytes; with `one`, 1.0 everywhere (for the dtypes of numpy and BF16)."""
    count, random = math.prod(shape), np.random.default_rng(seed)
    if dtype in ("F64", "F32", "F16", "BF16"):
        values = np.ones(count) if one else random.normal(0, 1, count)
        if dtype == "BF16":
            data = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            data = values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    elif dtype == "BOOL":
        data = random.integers(0, 2, count, np.uint8).tobytes()
    else:  # patterns below 0x70 are finite in every 8-bit float
        data = random.integers(1, 0x70, count * SIZES[dtype], np.uint8).tobytes()
    return dtype, shape, data


def write_shard(path: Path, tensors: Mapping[str, Tensor], padding: int = 0) -> None:
    """`padding` spaces behind the header shift the data, to odd offsets where it is odd."""
    header, position = {"__metadata__": {"format": "pt", "écrit": "à la main"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8 + padding)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def write_sparse_shard(path: Path, name: str, dtype: str, *shape: int) -> None:
    """One tensor of zeros that takes no room on the disk."""
    size = SIZES[dtype] * math.prod(shape)
    text = json.dumps({name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)


def write_index(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
    total = sum(len(data) for tensors in shards.values() for _, _, data in tensors.values())
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def write_llama(folder: Path, extra: Mapping[str, Tensor] | None = None, config: Mapping | None = None) -> Path:
    """Three layers in three shards of BF16, F16 and F32, an index, config.json and files beside them.

    `extra` tensors go into the last shard.
    """
    shards = {
        FIRST: {EMBED: tensor("BF16", VOCABULARY, HIDDEN, seed=1), down(0): tensor("BF16", HIDDEN, INNER, seed=2)},
        SECOND: {down(1): tensor("F16", HIDDEN, INNER, seed=3), NORM: tensor("F32", HIDDEN, seed=4)},
        THIRD: {
            down(2): tensor("F32", HIDDEN, INNER, seed=5),
            HEAD: tensor("BF16", VOCABULARY, HIDDEN, seed=6),
            **(extra or {}),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        write_shard(folder / name, tensors)
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}, indent=1))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (folder / "README.md").write_bytes("# modèle\r\n".encode())
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets" / "empty").touch()
    return folder


def write_single(folder: Path, tensors: Mapping[str, Tensor], config: Mapping | None = None, padding: int = 0) -> Path:
    """One model.safetensors with a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "model.safetensors", tensors, padding)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    return folder


def write_manifest(path: Path, base: Mapping | Path, *edits: Mapping, **more: object) -> Path:
    """A manifest in JSON, which is YAML too; edits stand one a line, so that edits[n] is in line n + 4."""
    if isinstance(base, Path):
        base = {"path": str(base)}
    lines = ",\n".join(json.dumps(edit) for edit in edits)
    rest = "".join(f',\n"{key}": {json.dumps(value)}' for key, value in more.items())
    path.write_text(f'{{"version": 1,\n"base": {json.dumps(base)},\n"edits": [\n{lines}]{rest}}}\n')
    return path


def place(path: Path, name: str, index: tuple[int, ...]) -> tuple[int, int]:
    """(offset in the file, bytes) of one scalar, from the header by hand."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entry = json.loads(raw[8 : 8 + length])[name]
    flat = int(np.ravel_multi_index(index, entry["shape"])) if index else 0
    size = SIZES[entry["dtype"]]
    return 8 + length + entry["data_offsets"][0] + flat * size, size


def stored(path: Path, name: str, index: tuple[int, ...]) -> bytes:
    offset, size = place(path, name, index)
    return path.read_bytes()[offset : offset + size]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below the folder: relative name -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def age(folder: Path) -> Path:
    """Let the files look old: a digest of a file that was just written is not remembered."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (1_600_000_000, 1_600_000_000))
    return folder
