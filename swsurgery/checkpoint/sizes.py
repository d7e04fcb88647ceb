"""Read the sizes of a checkpoint's language model: layers, hidden size, intermediate sizes and vocabulary.

config.json states most of them. A size that it does not state is taken from the shapes of the stored tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.model_config import find_number, list_sections, read_hidden_size, read_layer_limit
from swsurgery.checkpoint.projections import list_down_projections
from swsurgery.errors import ArchitectureError

_INTERMEDIATE_KEYS = (
    "intermediate_size", "moe_intermediate_size", "expert_intermediate_size", "shared_expert_intermediate_size",
    "ffn_hidden_size", "n_inner", "ffn_dim", "feed_forward_size",
)  # fmt: skip
"""Keys of config.json whose value is the number of intermediate neurons of an MLP or of one expert."""

TOKEN_EMBEDDING = re.compile(
    r"(?:.*\.)?(?:embed_tokens|tok_embeddings|wte|word_embeddings|embed_in|embeddings)\.weight", re.DOTALL
)
"""Names of token embeddings, whose first axis is the vocabulary."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a language model. A size that is neither stated nor visible in a stored shape is None.

    `intermediate` contains each size that an MLP or an expert of the model has, smallest first; it is empty if none is
    known.
    """

    layers: int | None
    hidden: int | None
    intermediate: tuple[int, ...]
    vocabulary: int | None = None

    def __str__(self) -> str:
        intermediate = " or ".join(map(str, self.intermediate)) or None
        parts = [f"{self.layers} layers" if self.layers else None]
        parts += [
            f"{name} {size}" if size else None
            for name, size in (
                ("hidden", self.hidden), ("intermediate", intermediate), ("vocabulary", self.vocabulary)
            )
        ]  # fmt: skip
        return ", ".join(filter(None, parts)) or "no known sizes"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON. A size that is not known is null."""
        return {
            "layers": self.layers,
            "hidden": self.hidden,
            "intermediate": list(self.intermediate),
            "vocabulary": self.vocabulary,
        }


def read_sizes(checkpoint: Checkpoint) -> ModelSizes:
    """Read the sizes of a checkpoint from config.json and, if it does not state one, from the stored shapes."""
    config = checkpoint.config
    layers, hidden, intermediate = read_layer_limit(config), read_hidden_size(config), _read_intermediate(config)
    if layers is None or hidden is None or not intermediate:
        stored = _measure_projections(checkpoint)
        layers, hidden = layers or stored.layers, hidden or stored.hidden
        intermediate = intermediate or stored.intermediate
    return ModelSizes(
        layers, hidden, intermediate, find_number(config, "vocab_size") or _measure_vocabulary(checkpoint)
    )


def _read_intermediate(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the intermediate sizes in the most specific section of config.json that states any."""
    for section in list_sections(config):
        values = [section.get(key) for key in _INTERMEDIATE_KEYS]
        listed = [each for value in values for each in (value if isinstance(value, list) else [value])]
        sizes = {each for each in listed if type(each) is int and each > 0}
        if sizes:
            return tuple(sorted(sizes))
    return ()


def _measure_projections(checkpoint: Checkpoint) -> ModelSizes:
    """Return the sizes that the shapes of the stored down projections show."""
    try:
        found = list(list_down_projections(checkpoint.config, checkpoint.shapes))
    except ArchitectureError:  # packed, or of a family that the tables do not contain
        return ModelSizes(None, None, ())
    hidden = {projection.rows for projection in found}
    layers = 1 + max(projection.layer for projection in found)
    intermediate = tuple(sorted({projection.cols for projection in found}))
    return ModelSizes(layers, hidden.pop() if len(hidden) == 1 else None, intermediate)


def _measure_vocabulary(checkpoint: Checkpoint) -> int | None:
    """Return the number of rows of the token embedding; None if no embedding or several embeddings are stored."""
    rows = {
        shape[0] for name, shape in checkpoint.shapes.items() if len(shape) == 2 and TOKEN_EMBEDDING.fullmatch(name)
    }
    return rows.pop() if len(rows) == 1 else None
