"""Check the tensors outside the layers: the embedding, the language-modelling head and the last norm."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from swsurgery.checkpoint.declared import Declared
from swsurgery.checkpoint.model_config import find_known_families
from swsurgery.checkpoint.tying import EMBEDDINGS, HEADS, is_tied_by_config
from swsurgery.verifying.complete_layers import Lack
from swsurgery.verifying.complete_names import LayerList, Shape, is_other_tower

_WITH_HEAD = re.compile(r".*(ForCausalLM|LMHeadModel|ForConditionalGeneration)", re.DOTALL)
"""The pattern of names of model classes that have a language-modelling head."""

_LAST_NORMS = (
    "norm.weight", "norm_f.weight", "ln_f.weight", "final_layernorm.weight", "final_layer_norm.weight",
    "final_norm.weight", "embedding_norm.weight", "layer_norm.weight",
)  # fmt: skip
"""Names of the norm after the last layer, without their prefixes."""

_NORM = re.compile(r"norm\d*\.weight$")
"""The pattern of names of norms in layers. A model of unknown type whose layers have norms has one after them."""

_WITHOUT_NORM = ("olmo", "opt")
"""Model types of known families whose last norm has no weight, or does not always exist."""


def check_outside(
    outside: Mapping[str, Shape | None],
    declared: Declared,
    config: Mapping[str, object],
    usual: Collection[LayerList],
) -> list[Lack]:
    """Check the tensors outside the layers. `outside` maps their names to their shapes, or None if unknown.

    `usual` are the lists of layers whose names begin with "model.layers.", as in most models of unknown type.
    """
    own = {name: shape for name, shape in outside.items() if not is_other_tower(name)}
    heads, embedding = _find_heads(own), _find_embedding(own)
    lacks = [*_check_head(heads, embedding, config)]
    known = bool(find_known_families(config))
    if embedding is None and (known or usual) and not (heads and is_tied_by_config(config)):
        lacks.append(
            Lack("tensor-missing", "", "no embedding is stored under a known name", names=_list_weights(EMBEDDINGS))
        )
    normed = any(_NORM.search(pattern) for each in usual for layer in each.layers.values() for pattern in layer)
    expected = known and config.get("model_type") not in _WITHOUT_NORM or not known and normed
    norms = [name for name in own if _has_ending(name, _LAST_NORMS)]
    if expected and not norms:
        lacks.append(
            Lack("tensor-missing", "", "no norm after the last layer is stored under a known name", names=_LAST_NORMS)
        )
    for name in [*([embedding] if embedding else []), *heads]:
        lacks += _check_rows(name, own[name], declared)
    for name in norms:
        if embedding is not None and _find_module(name) == _find_module(embedding):
            lacks += _check_norm(name, own[name], declared)
    return lacks


def _check_head(heads: list[str], embedding: str | None, config: Mapping[str, object]) -> Iterator[Lack]:
    """Yield a finding if config.json declares a head of its own and none is stored."""
    classes = config.get("architectures")
    has_head = isinstance(classes, list) and any(isinstance(c, str) and _WITH_HEAD.fullmatch(c) for c in classes)
    if has_head and not heads and embedding is not None and is_tied_by_config(config) is False:
        what = f"no language-modelling head is stored, and config.json does not tie it to {embedding}"
        yield Lack("head-missing", "", what, names=_list_weights(HEADS))


def _check_rows(name: str, shape: Shape | None, declared: Declared) -> Iterator[Lack]:
    """Yield a finding if a matrix has fewer rows than tokens, or rows of a length that config.json does not contain."""
    if shape is None or len(shape) != 2:
        return
    if declared.vocabulary is not None and shape[0] < declared.vocabulary:
        what = f"has {shape[0]} rows, but config.json declares a vocabulary of {declared.vocabulary} tokens"
        yield Lack("vocabulary", name, what, name)
    elif shape[1] not in declared.numbers and declared.has_width:
        what = f"is stored as {list(shape)}, but config.json contains no size {shape[1]}"
        yield Lack("shape-mismatch", name, what, name)


def _check_norm(name: str, shape: Shape | None, declared: Declared) -> Iterator[Lack]:
    """Yield a finding if the norm after the last layer has a length that config.json does not contain."""
    if shape is not None and len(shape) == 1 and declared.has_width and shape[0] not in declared.numbers:
        what = f"is stored as {list(shape)}, but config.json contains no size {shape[0]}"
        yield Lack("shape-mismatch", name, what, name)


def _find_module(name: str) -> str:
    """Return the name of the module that contains the module of a weight: "model" for "model.norm.weight"."""
    return name.removesuffix(".weight").rpartition(".")[0]


def _find_heads(names: Mapping[str, object]) -> list[str]:
    """Return the names of the language-modelling heads among `names`."""
    return [name for name in names if _has_ending(name, _list_weights(HEADS))]


def _list_weights(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{module}.weight" for module in modules)


def _has_ending(name: str, endings: tuple[str, ...]) -> bool:
    """Return True if a name is one of `endings`, or ends in one after a prefix with a period."""
    return name.endswith(endings) and any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _find_embedding(names: Mapping[str, object]) -> str | None:
    """Return the name of the embedding, or None. The first of EMBEDDINGS that is stored decides."""
    for embedding in EMBEDDINGS:
        ending = f"{embedding}.weight"
        if ending in names:
            return ending
        found = next((name for name in names if name.endswith(f".{ending}")), None)
        if found is not None:
            return found
    return next((name for name in names if name.endswith("embeddings.word_embeddings.weight")), None)
