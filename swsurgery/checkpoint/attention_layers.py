"""Read from config.json which layers of a hybrid model have full attention.

A hybrid model mixes tokens by full attention in some layers, and by linear attention, a state space (Mamba), a
convolution or a recurrence in the others. config.json is not trusted: a value of another type counts as not given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from swsurgery.checkpoint.declared import MAX_COUNT
from swsurgery.checkpoint.model_config import list_sections

FULL_ATTENTION = frozenset({"attention", "full_attention", "hybrid"})
"""Names of layers with full attention. A "hybrid" layer of Zamba contains the shared attention and a Mamba mixer."""

OTHER_MIXERS = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "gated_deltanet", "kda", "rwkv"})
"""Names of layers that mix tokens without softmax attention. Only a model with such a layer is a hybrid."""

_LISTS = ("layer_types", "layers_block_type", "block_types")
"""Keys with the names of the layers. RecurrentGemma's `block_types` is repeated until every layer has a name."""

_INDICES = ("attn_layer_indices", "full_attn_idxs")
"""Keys with the numbers of the layers that have full attention (Bamba, LFM2)."""


def find_attention_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Return the numbers of the layers with full attention in a hybrid model with `layers` layers.

    The result is empty if the model is no hybrid, or if config.json does not state the kinds of its layers. A model in
    which every layer has attention and another mixer side by side (Falcon-H1) is no hybrid in this sense.
    """
    if not 0 < layers <= MAX_COUNT:
        return ()
    found = (each for section in list_sections(config) for each in _list_divisions(section, layers))
    return next((each for each in found if 0 < len(each) < layers), ())


def _list_divisions(section: Mapping[str, Any], layers: int) -> Iterator[tuple[int, ...]]:
    """Yield the layers with full attention by each key of one section, the most explicit key first."""
    for key in _LISTS:
        names = section.get(key)
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            yield _choose_named(names, layers)
    pattern = section.get("hybrid_override_pattern")  # Nemotron-H: "M-M*-", one character for each layer
    if isinstance(pattern, str) and len(pattern) == layers and "M" in pattern:
        yield tuple(number for number, kind in enumerate(pattern) if kind == "*")
    for key in _INDICES:
        yield _choose_numbered(section.get(key), layers, 0)
    nested = section.get("linear_attn_config")  # Kimi-Linear counts the layers from 1
    if isinstance(nested, Mapping):
        yield _choose_numbered(nested.get("full_attn_layers"), layers, 1)
    period, offset = section.get("attn_layer_period"), section.get("attn_layer_offset")  # Jamba
    if type(period) is int and type(offset) is int and period > 1 and 0 <= offset < period:
        yield tuple(range(offset, layers, period))
    interval = section.get("full_attention_interval")  # Qwen3-Next
    if type(interval) is int and interval > 1:
        yield tuple(range(interval - 1, layers, interval))


def _choose_named(names: Sequence[str], layers: int) -> tuple[int, ...]:
    """Return the layers whose name stands for full attention; none if no name stands for another mixer."""
    if not OTHER_MIXERS.intersection(names):
        return ()
    return tuple(number for number in range(layers) if names[number % len(names)] in FULL_ATTENTION)


def _choose_numbered(numbers: object, layers: int, first: int) -> tuple[int, ...]:
    """Return the layers in a list that counts them from `first`; none if it contains anything else."""
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        return ()
    chosen = sorted({number - first for number in numbers})
    return tuple(chosen) if all(0 <= number < layers for number in chosen) else ()
