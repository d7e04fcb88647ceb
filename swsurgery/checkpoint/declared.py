"""Read from config.json what a checkpoint must contain: how many layers and experts, and which layers are of one kind.

The keys are those of the configurations of transformers and of published checkpoints. This module reads no tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from swsurgery.checkpoint.tying import list_sections

Config = Mapping[str, object]
Part = Literal["attention", "mlp", "any"]
"""The part of a layer that a key of config.json concerns."""

DEPTHS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "num_layers_per_stack", "layers",
)  # fmt: skip
"""Keys that state the number of layers of a model with one list of layers."""

LAYER_TYPES = ("layers_block_type", "layer_types", "hybrid_override_pattern")
"""Keys with one entry per layer. They state the number of layers if no key of DEPTHS does."""

ENCODER_DEPTHS, DECODER_DEPTHS = ("encoder_layers", "num_layers"), ("decoder_layers", "num_decoder_layers")
"""Keys that state the numbers of layers of an encoder-decoder."""

EXPERTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts", "num_routed_experts",
    "moe_num_routed_experts",
)  # fmt: skip
"""Keys that state the number of routed experts in a layer."""

WIDTHS = ("hidden_size", "n_embd", "d_model", "model_dim", "dim")
"""Keys that state the number of residual channels. Multimodal models may omit it, because it has a default."""

VOCABULARY = ("vocab_size", "padded_vocab_size")

_FIRST = ("first_k_dense_replace", "num_dense_layers", "n_dense_layers", "moe_layer_start_index", "num_hash_layers")
"""Keys K with the meaning: the first K layers differ from the others."""

_LAST = ("num_kv_shared_layers",)
"""Keys K with the meaning: the last K layers differ from the others."""

_PERIODS = (
    "decoder_sparse_step", "moe_layer_freq", "moe_layer_interval", "interleave_moe_layer_step", "expert_layer_period",
    "attn_layer_period", "full_attention_interval", "sliding_window_pattern", "cla_share_factor", "moe_every_n_layers",
    "global_attn_every_n_layers", "hybrid_layer_period",
)  # fmt: skip
"""Keys K with the meaning: every K-th layer differs from the others."""

_INDICES = re.compile(r"layer|block|idx|ids|indices|indexes|attn|attention|moe|mlp")
"""The pattern of keys whose value may be a list of the layers that differ. Each number is below the number of
layers.
"""

_ATTENTIONS = ("full_attention", "sliding_attention", "chunked_attention")
"""Values of `layer_types` that name layers with the same modules. Only the attention may have other shapes."""

_OF_MLP = re.compile(r"moe|dense|sparse|expert|mlp|ffn|intermediate|hash")
_OF_ATTENTION = re.compile(r"attn|attention|kv|key_value|sliding|heads|rope|cla_")

MAX_COUNT, MAX_KINDS = 10_000, 64
"""Maximum number of layers or experts, and of keys that divide the layers. A larger number of layers or experts is
ignored: no published model has so many, and config.json may be hostile.
"""

MAX_SIZE = 1 << 40
"""Maximum number of tokens or channels. A larger number is ignored."""

_NESTED = re.compile(r"(?!.*(vision|audio|text|quant)).*_config")
"""The pattern of keys whose object may contain keys that divide the layers, such as "linear_attn_config"."""


@dataclass(frozen=True)
class LayerKinds:
    """A division of the layers into kinds, from one key of config.json.

    `kinds` maps the number of a layer to the name of its kind. `part` is the part of a layer that the key concerns.
    """

    key: str
    part: Part
    kinds: tuple[object, ...]


@dataclass(frozen=True)
class Declared:
    """What config.json declares about the language model.

    `depths` maps a part of the names of tensors to the number of layers whose names have this part: "" for a model with
    one list of layers, "encoder" and "decoder" for an encoder-decoder. `experts` are the numbers of routed experts that
    the sections state; if there are several, one of them counts something else. `zero_experts` is the number of further
    experts without a computation of their own, for which a stack may store matrices (LongCat). `numbers` are all
    integers of the sections, and `has_width` is True if one of them is the number of residual channels. `vocabulary` is
    the number of tokens, or None. `kinds` are the divisions of the layers into kinds. `source` names what was
    read, for messages.
    """

    depths: dict[str, int]
    experts: frozenset[int]
    zero_experts: int
    vocabulary: int | None
    numbers: frozenset[int]
    has_width: bool
    kinds: tuple[LayerKinds, ...] = field(repr=False)
    source: str = "config.json"


def read_declared(config: Config) -> Declared:
    """Read the declarations of config.json. The innermost section that describes the language model comes first."""
    sections = list(list_sections(config))
    depths = _read_depths(sections)
    layers = depths.get("", 0)
    return Declared(
        depths=depths,
        experts=frozenset(number for section in sections for key in EXPERTS if (number := _read_count(section, key))),
        zero_experts=_read_first(sections, ("zero_expert_num",)) or 0,
        vocabulary=_read_first(sections, VOCABULARY, MAX_SIZE),
        numbers=frozenset(_list_numbers(sections)),
        has_width=_read_first(sections, WIDTHS, MAX_SIZE) is not None,
        kinds=tuple(islice((kinds for section in sections for kinds in _list_kinds(section, layers)), MAX_KINDS)),
    )


def _read_depths(sections: list[Config]) -> dict[str, int]:
    """Return the numbers of layers, as `Declared.depths` contains them; empty if no section states them."""
    if any(section.get("is_encoder_decoder") is True for section in sections):
        encoder, decoder = (_read_first(sections, keys) for keys in (ENCODER_DEPTHS, DECODER_DEPTHS))
        both = {"encoder": encoder, "decoder": decoder or encoder}
        return {side: depth for side, depth in both.items() if depth}
    kinds = (section.get(key) for section in sections for key in LAYER_TYPES)
    # LongCat counts two attentions in each layer for num_hidden_layers, and HRM the layers of all passes through its
    # stacks. So the smaller number is the one of layers.
    stated = ([n for key in DEPTHS if (n := _read_count(section, key))] for section in sections)
    depth = next((min(numbers) for numbers in stated if numbers), 0)
    depth = depth or next((len(k) for k in kinds if isinstance(k, list | str)), 0)
    return {"": depth} if 0 < depth <= MAX_COUNT else {}


def _read_first(sections: list[Config], keys: tuple[str, ...], limit: int = MAX_COUNT) -> int | None:
    """Return the first positive number that a section states under one of `keys`, up to `limit`; None if none does."""
    return next((n for section in sections for key in keys if (n := _read_count(section, key, limit))), None)


def _read_count(section: Config, key: str, limit: int = MAX_COUNT) -> int | None:
    """Return a positive number of a section; None if it has none, or one above `limit`."""
    value = section.get(key)
    return value if type(value) is int and 0 < value <= limit else None


def _list_numbers(sections: list[Config]) -> Iterator[int]:
    """Yield all integers of the sections, including those in lists."""
    for section in sections:
        for value in section.values():
            yield from (n for n in (value if isinstance(value, list) else [value]) if type(n) is int)


def _list_kinds(section: Config, layers: int) -> Iterator[LayerKinds]:
    """Yield the divisions of the layers that the keys of one section make, including the keys of nested objects."""
    if not layers:
        return
    for key, value in section.items():
        if isinstance(value, Mapping):
            if _NESTED.fullmatch(key):
                yield from _list_kinds(value, layers)
            continue
        part: Part = "mlp" if _OF_MLP.search(key) else "attention" if _OF_ATTENTION.search(key) else "any"
        if isinstance(value, list) and all(isinstance(each, str) and each in _ATTENTIONS for each in value):
            part = "attention"
        kinds = _divide(key, value, layers)
        if kinds is not None and len(kinds) == layers and len(set(kinds)) > 1:
            yield LayerKinds(key, part, kinds)


def _divide(key: str, value: object, layers: int) -> tuple[object, ...] | None:
    """Return the kind of each layer by one key, or None if the key does not divide the layers."""
    if isinstance(value, str):
        return tuple(value) if len(value) == layers and "pattern" in key else None
    if isinstance(value, list):
        if len(value) == layers:
            return tuple(each if isinstance(each, str) else json.dumps(each, sort_keys=True) for each in value)
        indices = {n for n in value if type(n) is int and 0 <= n <= layers}
        if indices and len(indices) == len(value) and _INDICES.search(key):
            # Kimi-Linear counts layers from 1, so layers before a listed one are kept apart too.
            return tuple((i in indices, i + 1 in indices) for i in range(layers))
        return None
    if type(value) is not int or value < 1:
        return None
    if key in _FIRST:
        return tuple(i < value for i in range(layers))
    if key in _LAST:
        return tuple(i >= layers - value for i in range(layers))
    return tuple(i % value for i in range(layers)) if key in _PERIODS else None
