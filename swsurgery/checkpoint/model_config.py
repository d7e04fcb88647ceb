"""Read the sizes and the model type of a language model from config.json, and choose its families.

config.json is not trusted: a value of another type counts as not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swsurgery.checkpoint.architectures import FAMILIES
from swsurgery.checkpoint.family import Family

_SECTIONS = ("text_config", "llm_config", "thinker_config")
"""Keys of config.json whose values describe the language model of a multimodal model."""


def get_families(config: Mapping[str, Any]) -> tuple[Family, ...]:
    """Return the families of the model type in config.json, or all families if the model type is unknown.

    If all families are returned, the names of the tensors decide between them. An encoder-decoder of unknown type has
    no family, because "layer 3" may be a layer of the encoder or of the decoder.
    """
    if known := find_known_families(config):
        return known
    if config.get("is_encoder_decoder") is True:
        return ()
    # The model type decides which tensors transformers transposes while loading. If the type is unknown, we assume that
    # transformers transposes no tensor.
    return tuple(
        Family(f.name, f.model_types, f.trunks, tuple(template for template in f.templates if not template.stored_only))
        for f in FAMILIES
    )


def find_known_families(config: Mapping[str, Any]) -> tuple[Family, ...]:
    """Return the families that have the model type in config.json; an empty tuple if no family has it."""
    for section in list_sections(config):
        known = tuple(family for family in FAMILIES if section.get("model_type") in family.model_types)
        if known:
            return known
    return ()


def list_sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parts of config.json that may describe the language model, the most specific first."""
    nested = [config.get(key) for key in _SECTIONS]
    return [inner for section in nested if isinstance(section, Mapping) for inner in list_sections(section)] + [config]


def find_number(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first positive integer that config.json has under one of the keys; None if it has none.

    The most specific section is searched first, and in each section the keys in the given order.
    """
    values = (section.get(key) for section in list_sections(config) for key in keys)
    return next((value for value in values if type(value) is int and value > 0), None)


def read_model_type(config: Mapping[str, Any]) -> str:
    """Return the model type of the language model in config.json, for messages; "not given" if there is none."""
    types = [section["model_type"] for section in list_sections(config) if "model_type" in section]
    return str(types[0]) if types else "not given"


def read_layer_limit(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers that config.json states; None if it states no number."""
    return find_number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")


def read_hidden_size(config: Mapping[str, Any]) -> int | None:
    """Return the hidden size that config.json states; None if it states none."""
    return find_number(config, "hidden_size", "n_embd", "n_embed", "d_model")
