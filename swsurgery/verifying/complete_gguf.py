"""Check whether a GGUF file contains what its metadata declares: the tensors of each block, and their shapes.

complete_layers.py compares the blocks with one another. For the architectures in `ARCHITECTURES` this module also
knows the tensors of a block and their shapes. The names are those of gguf-py (constants.py, TENSOR_NAMES), and the keys
of the metadata those of docs/gguf.md of ggml.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from swsurgery.checkpoint.declared import MAX_COUNT
from swsurgery.checkpoint.gguf_config import make_config
from swsurgery.errors import escape_control
from swsurgery.storage.gguf import MetadataValue, SkippedArray
from swsurgery.verifying.complete_layers import Lack
from swsurgery.verifying.complete_names import LayerList, Shape, Sorted

Metadata = Mapping[str, MetadataValue]

_SEPARATE = ("attn_q", "attn_k", "attn_v")
_ATTENTION = ("attn_norm", *_SEPARATE, "attn_output", "ffn_norm")
_GATED = (*_ATTENTION, "ffn_gate", "ffn_up", "ffn_down")
_PLAIN = (*_ATTENTION, "ffn_up", "ffn_down")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_OF_EXPERTS = (*_ATTENTION, "ffn_gate_inp", *_EXPERTS)

ARCHITECTURES = {
    **dict.fromkeys(
        (
            "llama", "mistral3", "minicpm", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "gemma", "gemma2", "gemma3",
            "granite", "internlm2", "smollm3", "exaone", "ernie4_5", "hunyuan-dense", "baichuan", "orion", "xverse",
        ),
        _GATED,
    ),
    **dict.fromkeys(("starcoder2", "arcee", "phi3", "gpt2"), _PLAIN),
    **dict.fromkeys(("qwen2moe", "qwen3moe"), _OF_EXPERTS),
}  # fmt: skip
"""The tensors that every block has, without ".weight", by the name of the architecture.

Three tensors attn_q, attn_k and attn_v may be one, attn_qkv. If the metadata states a number of experts, the MLP has
the tensors of experts.
"""

_KINDS = {
    "leading_dense_block_count": "first_k_dense_replace",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
    "full_attention_interval": "full_attention_interval",
    "attention.shared_kv_layers": "num_kv_shared_layers",
}
"""Keys of the metadata, after the name of the architecture, that divide the blocks into kinds, with the keys of
config.json that mean the same."""


@dataclass(frozen=True)
class GgufHeader:
    """The metadata of a GGUF file, and the tensors of its blocks and outside of them, sorted."""

    metadata: Metadata
    found: Sorted

    @property
    def architecture(self) -> str:
        """The name of the architecture, such as "llama"; "" if the metadata states none."""
        name = self.metadata.get("general.architecture")
        return name if isinstance(name, str) else ""

    def read(self, key: str, block: int = 0) -> int | None:
        """Return a size of the architecture for a block; None if the metadata states none, or 0.

        Some files state one number for each block.
        """
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, tuple):
            value = value[block] if block < len(value) else None
        return value if type(value) is int and value > 0 else None


def make_declared_config(metadata: Metadata) -> dict[str, object]:
    """Return the config of a GGUF file with the keys that divide its blocks into kinds."""
    config = make_config(metadata)
    start = f"{metadata.get('general.architecture')}."
    layers = config.get("num_hidden_layers")
    for key, value in metadata.items():
        name = key.removeprefix(start)
        if isinstance(value, tuple) and key.startswith(start) and type(layers) is int and len(value) >= layers:
            config[name.replace(".", "_")] = list(value[:layers])
        elif key.startswith(start) and name in _KINDS and type(value) is int:
            config[_KINDS[name]] = value
    return config


def explain_undecided(metadata: Metadata) -> str | None:
    """Explain why the metadata does not declare which blocks a file has; None if it does."""
    if not metadata:
        return "the metadata of the GGUF file could not be read"
    kind, architecture = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if not isinstance(architecture, str):
        return "the metadata does not state general.architecture"
    if kind != "model":
        return f"general.type is {escape_control(str(kind))}, not model"
    blocks = metadata.get(f"{architecture}.block_count")
    if type(blocks) is not int or blocks < 1:
        return f"the metadata does not state {escape_control(architecture)}.block_count"
    if blocks > MAX_COUNT:
        return f"the metadata declares {blocks} blocks, and at most {MAX_COUNT} are examined"
    return None


def find_depths(metadata: Metadata, depth: int) -> dict[str, int]:
    """Return the number of blocks by the part of the names that precedes them, as `Declared.depths` contains them."""
    architecture = metadata.get("general.architecture")
    if architecture != "t5":
        return {"": depth}
    decoder = metadata.get("t5.decoder_block_count")
    return {"enc": depth, "dec": decoder if type(decoder) is int and 0 < decoder <= depth else depth}


def list_unexamined(header: GgufHeader, depth: int) -> list[str]:
    """List what was not compared with the metadata, with the reasons."""
    notes = []
    if header.architecture not in ARCHITECTURES:
        what = "the blocks were only compared with each other, and shapes not with the metadata"
        notes.append(f"{what}: the architecture {escape_control(header.architecture)} is not in swsurgery's table")
    blocks = header.metadata.get(f"{header.architecture}.block_count")
    if type(blocks) is int and blocks > depth:
        notes.append(f"blocks {depth} to {blocks - 1}, which predict further tokens")
    return notes


def check_gguf(header: GgufHeader, blocks: LayerList | None, depth: int) -> Iterator[Lack]:
    """Yield what a file of a known architecture lacks in all its blocks, and shapes that the metadata contradicts.

    `blocks` is the list of its blocks, of which `depth` are examined.
    """
    yield from _check_outside(header)
    required = ARCHITECTURES.get(header.architecture)
    if required is None or blocks is None:
        return
    for number, block in sorted(blocks.layers.items()):
        if number >= depth:
            continue
        shapes = {pattern.removesuffix(".weight"): members[0].shape for pattern, members in block.items()}
        prefix = f"{blocks.prefix}{number}."
        near = next(iter(block.values()))[0].name
        for name in _list_absent(shapes, required, header):
            yield Lack(
                "tensor-missing", f"{prefix}{name}.weight", f"is not stored, but {header.architecture} needs it", near
            )
        for name, expected in _compute_shapes(header, number, shapes).items():
            found = shapes.get(name)
            if found is not None and found != expected:
                what = f"is stored as {list(found)}, but the metadata declares {list(expected)}"
                yield Lack("shape-mismatch", f"{prefix}{name}.weight", what, near)


def _list_absent(shapes: Mapping[str, Shape | None], required: tuple[str, ...], header: GgufHeader) -> list[str]:
    """List the names of a block's tensors that are not stored."""
    names = dict.fromkeys(required)
    if header.read("expert_count") and "ffn_gate_inp" not in names:
        names = dict.fromkeys(_OF_EXPERTS)
    if any(name.startswith("ffn_gate.") for name in shapes):  # earlier converters stored each expert as a matrix
        names = {name: None for name in names if name not in _EXPERTS}
    if "attn_qkv" in shapes:
        names = {name: None for name in names if name not in _SEPARATE}
    return [name for name in names if name not in shapes]


def _check_outside(header: GgufHeader) -> Iterator[Lack]:
    """Check the embedding, the head and the last norm."""
    outside, width, known = header.found.outside, header.read("embedding_length"), header.architecture in ARCHITECTURES
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    count = tokens.count if isinstance(tokens, SkippedArray) else header.read("vocab_size")
    for name, axes in (("token_embd.weight", 2), ("output.weight", 2), ("output_norm.weight", 1)):
        shape = outside.get(name)
        if shape is None or len(shape) != axes:
            continue
        if axes == 2 and count is not None and shape[0] < count:
            yield Lack("vocabulary", name, f"has {shape[0]} rows, but the tokenizer has {count} tokens", name)
        elif known and width is not None and shape[-1] != width:
            what = f"is stored as {list(shape)}, but the metadata declares an embedding_length of {width}"
            yield Lack("shape-mismatch", name, what, name)
    for name in ("token_embd.weight", "output_norm.weight") if known else ():
        if name not in outside:
            yield Lack("tensor-missing", name, f"is not stored, but {header.architecture} needs it")


def _compute_shapes(header: GgufHeader, block: int, stored: Mapping[str, object]) -> dict[str, Shape]:
    """Return the shapes that the metadata declares for tensors of a block, by name."""
    width, inner = header.read("embedding_length"), header.read("feed_forward_length", block)
    shapes: dict[str, Shape] = {}
    if width is None:
        return shapes
    shapes |= dict.fromkeys(("attn_norm", "ffn_norm"), (width,))
    if inner is not None:
        shapes |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
        if header.architecture == "phi3":  # gate and up are one matrix
            shapes["ffn_up"] = (2 * inner, width)
    experts, of_expert = header.read("expert_count"), header.read("expert_feed_forward_length", block)
    if of_expert is None and "ffn_gate" in ARCHITECTURES[header.architecture]:  # llama: experts as wide as a dense MLP
        of_expert = inner
    if experts is not None:
        shapes["ffn_gate_inp"] = (experts, width)
        if of_expert is not None:
            shapes |= dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (experts, of_expert, width))
            shapes["ffn_down_exps"] = (experts, width, of_expert)
    return shapes | _compute_attention(header, block, width)


def _compute_attention(header: GgufHeader, block: int, width: int) -> dict[str, Shape]:
    """Return the shapes of the projections of the attention that the metadata declares for a block, by name."""
    heads = header.read("attention.head_count", block)
    if heads is None:
        return {}
    groups = header.read("attention.head_count_kv", block) or heads
    key = header.read("attention.key_length") or width // heads
    value = header.read("attention.value_length") or width // heads
    return {
        "attn_q": (heads * key, width),
        "attn_k": (groups * key, width),
        "attn_v": (groups * value, width),
        "attn_qkv": (heads * key + groups * (key + value), width),
        "attn_output": (width, heads * value),
    }
