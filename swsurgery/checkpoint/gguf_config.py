"""Describe the model of a GGUF file as a config: the sizes in its metadata, under the keys that config.json uses."""

from __future__ import annotations

from collections.abc import Mapping

from swsurgery.checkpoint.architectures import GGUF_TYPE
from swsurgery.storage.gguf import MetadataValue, SkippedArray

_SIZES = (
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ("expert_count", "num_local_experts"),
    ("vocab_size", "vocab_size"),
)
"""Keys of the metadata after the name of the architecture, such as "llama.", with the keys of config.json."""

_HUB = "https://huggingface.co/"


def make_config(metadata: Mapping[str, MetadataValue]) -> dict[str, object]:
    """Return a config with the sizes that the metadata states, and the architecture as "gguf_architecture".

    A size that is missing or not a positive integer is left out. `num_hidden_layers` does not count the layers that
    predict further tokens, as in config.json. If the metadata names the repository of the model, it is `_name_or_path`.
    """
    config: dict[str, object] = {"model_type": GGUF_TYPE}
    architecture = metadata.get("general.architecture")
    if isinstance(architecture, str):
        config["gguf_architecture"] = architecture
    for key, name in _SIZES:
        if (size := _read_size(metadata.get(f"{architecture}.{key}"))) is not None:
            config[name] = size
    layers, further = (metadata.get(f"{architecture}.{key}") for key in ("block_count", "nextn_predict_layers"))
    if type(layers) is int and layers > 0:
        config["num_hidden_layers"] = layers - (further if type(further) is int and 0 < further < layers else 0)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, SkippedArray) and tokens.count:
        config.setdefault("vocab_size", tokens.count)
    source = metadata.get("general.source.repo_url")
    if isinstance(source, str) and source.startswith(_HUB):
        config["_name_or_path"] = source.removeprefix(_HUB).strip("/")
    return config


def _read_size(value: MetadataValue | None) -> int | list[int] | None:
    """Return a size as in config.json: a positive integer, or a list with one for each layer; None for other values."""
    if type(value) is int:
        return value if value > 0 else None
    if isinstance(value, tuple):
        return [size for size in value if type(size) is int and size > 0]
    return None
