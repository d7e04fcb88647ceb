"""A two-shard BF16 checkpoint of Llama's shape and its patched twin, built from struct and json alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

import swsurgery
from swsurgery.editing.check_options import CheckOptions

HIDDEN, WIDE, VOCABULARY = 4, 6, 8
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DOWN = "model.layers.0.mlp.down_proj.weight"
EDITED, SCALED, PROTECTED = (1, 2), (3, 5), (0, 4)

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDE,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-05,
}  # fmt: skip

MANIFEST = f"""version: 1
base: {{path: base}}
edits:
  - {{op: zero, tensor: {DOWN}, index: [1, 2]}}
  - {{op: scale, tensor: {DOWN}, index: [3, 5], factor: 2.0}}
  - {{op: protect, tensor: {DOWN}, index: [0, 4]}}
"""


def bfloat16(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers between 1 and 2, some negative, as the uint16 that BF16 stores: none of them is zero."""
    generator = np.random.default_rng(seed)
    sign = generator.integers(0, 2, shape, np.uint16) << 15
    return sign | np.uint16(0x3F80) | generator.integers(0, 128, shape, np.uint16)


def tensors() -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint, in the order in which it is stored."""
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        layer + "mlp.down_proj.weight": (HIDDEN, WIDE),
        layer + "mlp.gate_proj.weight": (WIDE, HIDDEN),
        layer + "mlp.up_proj.weight": (WIDE, HIDDEN),
        layer + "input_layernorm.weight": (HIDDEN,),
        layer + "post_attention_layernorm.weight": (HIDDEN,),
        **{f"{layer}self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"},
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    return {name: bfloat16(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def write_shard(path: Path, arrays: dict[str, np.ndarray], dtype: str = "BF16") -> None:
    """One safetensors file: length of the header, header, data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in arrays.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in arrays.values()))


def write_base(root: Path, arrays: dict[str, np.ndarray] | None = None, split: int = 4) -> Path:
    """A checkpoint whose first shard holds the first `split` tensors."""
    arrays = tensors() if arrays is None else arrays
    names = list(arrays)
    root.mkdir(parents=True)
    for file, part in ((FIRST, names[:split]), (SECOND, names[split:])):
        write_shard(root / file, {n: arrays[n] for n in part})
    weight_map = {n: FIRST if i < split else SECOND for i, n in enumerate(names)}
    total = sum(a.nbytes for a in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text(json.dumps(CONFIG))
    (root / "tokenizer.json").write_text('{"version": "1.0"}')
    return root


def apply_text(directory: Path, text: str, name: str, base: Path | None = None) -> Path:
    """Apply a manifest's text, without a check, into `directory/name`."""
    manifest = directory / f"{name}.yaml"
    manifest.write_text(text)
    output = directory / name
    swsurgery.apply(manifest, output=output, base=base and str(base), check=CheckOptions("off"))
    return output


def write_patched(directory: Path) -> Path:
    """`directory/base` and the checkpoint `directory/patched` that MANIFEST makes of it."""
    write_base(directory / "base")
    return apply_text(directory, MANIFEST, "patched")


def flip(path: Path, at: int) -> None:
    """Invert every bit of one byte; a negative `at` counts from the end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def place(path: Path, tensor: str, index: tuple[int, int]) -> int:
    """Offset of a scalar of a two-byte matrix in a safetensors file, computed from its header."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    entry = json.loads(data[8 : 8 + size])[tensor]
    return 8 + size + entry["data_offsets"][0] + 2 * (index[0] * entry["shape"][1] + index[1])


def contents(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in root.iterdir()}
