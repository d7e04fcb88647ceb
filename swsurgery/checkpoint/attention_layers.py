"""Read from config.json which layers of a hybrid model have full attention.

A hybrid model mixes tokens by full attention in some layers, and by linear attention, a state space (Mamba), a
convolution or a recurrence in the others. config.json is not trusted: a value of another type counts as not given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from swsurgery.checkpoint.architectures import Shapes
from swsurgery.checkpoint.declared import MAX_COUNT
from swsurgery.checkpoint.model_config import list_sections
from swsurgery.storage.strict_json import quote

FULL_ATTENTION = frozenset(
    {"attention", "full_attention", "hybrid", "indexed_attention", "deepseek_sparse_attention"}
    | {"qwen_sparse_attention", "compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse"}
)
"""Names of layers with attention to all earlier tokens, or to a choice of them. A "hybrid" layer of Zamba contains the
shared attention and a Mamba mixer."""

LOCAL_ATTENTION = frozenset(
    {"sliding_attention", "chunked_attention", "window_attention", "hybrid_sliding", "reference_sliding_attention"}
)
"""Names of layers with attention to the last tokens. They count if a hybrid model has no layer with full attention."""

OTHER_MIXERS = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "gated_deltanet", "kda", "rwkv"})
"""Names of layers that mix tokens without softmax attention. Only a model with such a layer is a hybrid."""

NO_MIXERS = frozenset({"mlp", "moe", "dense", "sparse"})
"""Names of layers that do not mix tokens (Nemotron-H)."""

PARALLEL = frozenset({"falcon_h1"})
"""Model types in which every layer has full attention and a state space side by side."""

_LISTS = ("layer_types", "layers_block_type", "block_types")
"""Keys with the names of the layers. RecurrentGemma's `block_types` is repeated until every layer has a name."""

_INDICES = ("attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids")
"""Keys with the numbers of the layers that have full attention (Bamba, LFM2, Zamba 2)."""

_INTERVALS = ("full_attention_interval", "layer_group_size")
"""Keys with a number N: every Nth layer has full attention (Qwen3-Next, Ling)."""

_LAYER = re.compile(r"(?P<trunk>(?:.+\.)?(?:layers|h|blocks))\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<module>[^.]+)\..+")
_ATTENTION = re.compile(r"(self_)?attn|(self_)?attention|shared_transf(ormer)?|temporal_block", re.IGNORECASE)
_MIXER = re.compile(r"(mamba|recurrent|rwkv|time_mix|linear_attn)\w*|ssm|s6|(short_?)?conv|kda|gdn|deltanet|lru")
"""Match the names of modules that contain attention, and of other modules that mix tokens."""


def find_attention_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Return the numbers of the layers with full attention in a hybrid model with `layers` layers.

    These are all layers if each has attention and another mixer side by side (`PARALLEL`). The result is empty if the
    model is no hybrid, or if config.json does not state the kinds of its layers.
    """
    if not 0 < layers <= MAX_COUNT:
        return ()
    sections = list(list_sections(config))
    if any(str(section.get("model_type")) in PARALLEL for section in sections):
        return tuple(range(layers))
    found = (each for section in sections for each in _list_divisions(section, layers))
    return next((each for each in found if 0 < len(each) < layers), ())


def explain_unknown_layers(config: Mapping[str, Any], shapes: Shapes, layers: int) -> str | None:
    """Explain why the layers with full attention of a hybrid model are unknown; None if they are known.

    The result is also None if the model is no hybrid.

    A model counts as a hybrid if config.json names a kind of layer that is not known, or if some stored layers have
    attention and others have another mixer. `shapes` contains the shapes of the stored tensors by name.
    """
    if find_attention_layers(config, layers):
        return None
    consequence = "activations that recur before layers with full attention are not looked for"
    known = FULL_ATTENTION | LOCAL_ATTENTION | OTHER_MIXERS | NO_MIXERS
    for names in (names for section in list_sections(config) for names in _list_names(section)):
        unknown = sorted(set(names) - known)
        if unknown and len(set(names)) > 1:
            return f"config.json names a kind of layer that is not known, {quote(unknown[0])}: {consequence}"
    mixed: dict[str, tuple[set[str], set[str]]] = {}
    for match in filter(None, map(_LAYER.fullmatch, shapes)):
        attention, others = mixed.setdefault(match["trunk"], (set(), set()))
        if _ATTENTION.fullmatch(match["module"]):
            attention.add(match["layer"])
        elif _MIXER.fullmatch(match["module"]):
            others.add(match["layer"])
    if any(attention and others - attention for attention, others in mixed.values()):
        return f"config.json does not state which layers have full attention: {consequence}"
    return None


def _list_names(section: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the lists with the names of the layers in one section of config.json."""
    for key in _LISTS:
        names = section.get(key)
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            yield names


def _list_divisions(section: Mapping[str, Any], layers: int) -> Iterator[tuple[int, ...]]:
    """Yield the layers with full attention by each key of one section, the most explicit key first."""
    for names in _list_names(section):
        yield _choose_named(names, layers)
    pattern = section.get("hybrid_override_pattern")  # Nemotron-H: "M-M*-", one character for each layer
    if isinstance(pattern, str) and len(pattern) == layers and "M" in pattern:
        yield tuple(number for number, kind in enumerate(pattern) if kind == "*")
    kinds = section.get("attn_type_list")  # MiniMax-Text-01: 1 stands for full attention, 0 for linear attention
    if isinstance(kinds, list) and len(kinds) == layers:
        yield tuple(number for number, kind in enumerate(kinds) if type(kind) is int and kind == 1)
    for key in _INDICES:
        yield _choose_numbered(section.get(key), layers, 0)
    nested = section.get("linear_attn_config")  # Kimi-Linear counts the layers from 1
    if isinstance(nested, Mapping):
        yield _choose_numbered(nested.get("full_attn_layers"), layers, 1)
    period, offset = section.get("attn_layer_period"), section.get("attn_layer_offset")  # Jamba
    if type(period) is int and type(offset) is int and period > 1 and 0 <= offset < period:
        yield tuple(range(offset, layers, period))
    for key in _INTERVALS:
        interval = section.get(key)
        if type(interval) is int and interval > 1:
            yield tuple(range(interval - 1, layers, interval))


def _choose_named(names: Sequence[str], layers: int) -> tuple[int, ...]:
    """Return the layers whose names stand for attention, or no layers if no name stands for another mixer."""
    if not OTHER_MIXERS.intersection(names):
        return ()
    wanted = FULL_ATTENTION if FULL_ATTENTION.intersection(names) else LOCAL_ATTENTION
    return tuple(number for number in range(layers) if names[number % len(names)] in wanted)


def _choose_numbered(numbers: object, layers: int, first: int) -> tuple[int, ...]:
    """Return the layers in a list that counts them from `first`; none if it contains anything else."""
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        return ()
    chosen = sorted({number - first for number in numbers})
    return tuple(chosen) if all(0 <= number < layers for number in chosen) else ()
