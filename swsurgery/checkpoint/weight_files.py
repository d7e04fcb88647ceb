"""Find the files that contain the weights of a checkpoint: an index with its shards, or a single file.

Reads the index but no shard. A variant is a second set of the same weights, named as transformers and diffusers name
it: `model.fp16.safetensors`, or `model.safetensors.index.fp16.json` with its shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from swsurgery.errors import AmbiguousWeights, CheckpointError
from swsurgery.storage.files import File
from swsurgery.storage.names import SHARD_NAME, VARIANT
from swsurgery.storage.strict_json import quote, read_json

Weights = Literal["index", "single"]
"""The choice between two sets of weights: the shards of an index, or model.safetensors."""

INDEX_SUFFIX = ".safetensors.index.json"
SINGLE, INDEX = "model.safetensors", "model" + INDEX_SUFFIX

VARIANT_FILES = (
    re.compile(rf"model\.(?!{VARIANT}-\d{{5}}-of-\d{{5}}\.)({VARIANT})\.safetensors"),
    re.compile(rf"model\.safetensors\.index\.({VARIANT})\.json"),
    re.compile(rf"model\.safetensors\.({VARIANT})\.index\.json"),
)
"""Patterns of a variant's single file, of its index, and of its index as diffusers wrote it until 0.30."""

SHARD_OF_VARIANT = re.compile(rf"model\.{VARIANT}-\d{{5}}-of-\d{{5}}\.safetensors")

SECOND_COPY = re.compile(r"(.+?)(?: ?\(\d+\)| - Copy(?: \(\d+\))?| copy(?: \d+)?)(\.[^./]+)")
"""The pattern of names that browsers and file managers give to a second copy, such as `model (1).safetensors`."""

MAX_LISTED = 20
"""Maximum number of faults listed individually."""

MAX_TENSORS, TENSORS_WITHOUT_DATA = 1 << 18, 50_000
"""Maximum number of tensors in a checkpoint, and the maximum if they have less than 4 KiB each on average.

DeepSeek-V3 has 91,991 tensors of 7 MB on average.
"""


class Listed(Protocol):
    """One file of a checkpoint."""

    @property
    def source(self) -> File: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class WeightFiles:
    """One set of weights: the names of its index (None for a single file) and of its shards.

    `weight_map` and `total_size` are copied from the index. `variant` is None for the plain weights.
    """

    index: str | None
    shards: tuple[str, ...]
    weight_map: dict[str, str] = field(default_factory=dict)
    total_size: object = None
    variant: str | None = None


def find_weights(
    root: object,
    names: Mapping[str, Listed],
    weights: Weights | None = None,
    variant: str | None = None,
    elsewhere: Collection[str] = (),
) -> WeightFiles:
    """Find the weights among the files of a checkpoint.

    `root` is quoted in messages only. `weights` chooses between an index and a single file, `variant` between the plain
    weights and variants. Without plain weights, the only variant is taken. Shards in `elsewhere` may be missing.

    Raises CheckpointError; AmbiguousWeights if several sets of weights exist and none was chosen.
    """
    variants = _find_variants(names)
    if variant is not None and variant not in variants:
        remedy = f"the variants here: {', '.join(sorted(variants))}" if variants else "it has none"
        raise CheckpointError(f"no variant {variant}", root, remedy)
    indices = _find_plain_indices(names)
    if variant is None and SINGLE not in names and not indices:
        variant = _find_only_variant(root, variants)
    single = SINGLE
    if variant is not None:
        single = f"model.{variant}.safetensors"
        indices = [n for n in variants[variant] if is_index(n, variant)]
    singles = [single] if single in names else []
    if not indices and not singles:
        singles = [_find_only_file(root, names)]
    if len(indices) > 1:
        raise CheckpointError(f"several indices: {', '.join(indices)}", root, "keep the one that loaders read")
    if weights == "index" and not indices or weights == "single" and not singles:
        raise CheckpointError(f"base.weights asks for {weights}, which does not exist", root)
    if not _choose_index(root, names, indices, singles, weights):
        return WeightFiles(None, tuple(singles), variant=variant)
    shards, weight_map, total = _read_index(root, names, indices[0], elsewhere)
    return WeightFiles(indices[0], tuple(shards), weight_map, total, variant)


def _find_plain_indices(names: Iterable[str]) -> list[str]:
    """Return the index of the usual name, or without it all indices of plain weights."""
    indices = [n for n in names if is_index(n, None)]
    return [INDEX] if INDEX in indices else indices


def _find_only_variant(root: object, variants: Collection[str]) -> str | None:
    """Return the only variant, None if no variant exists. Raises AmbiguousWeights for several."""
    if len(variants) > 1:
        what = f"no {SINGLE}, but the variants {', '.join(sorted(variants))}"
        raise AmbiguousWeights(what, root, "say which: base.variant in a manifest, or the option --variant")
    return next(iter(variants), None)


def _choose_index(
    root: object, names: Mapping[str, Listed], indices: list[str], singles: list[str], weights: Weights | None
) -> bool:
    """Return True if the index is to be read, False for the single file. Raises AmbiguousWeights without a choice."""
    one_set = not (singles and indices) or _is_index_of(singles[0], names[indices[0]], indices[0])
    if weights is None and not one_set:
        raise AmbiguousWeights(
            f"two sets of weights, {singles[0]} and {indices[0]}: transformers loads the first, vLLM and mergekit "
            "the second",
            root,
            "say which, single or index: base.weights in a manifest, or the option --weights",
        )
    return bool(indices) and (weights != "single" or one_set)


def has_several_sets(names: Collection[str]) -> bool:
    """Return True if more than one single file or index exists, and thus more than one set of weights may."""
    plain = [name for name in names if name == SINGLE or is_index(name, None)]
    return len(plain) + sum(map(len, _find_variants(names).values())) > 1


def is_index(name: str, variant: str | None) -> bool:
    """Return True if `name` is an index of `variant` (None is the plain weights)."""
    if variant is None:
        return "/" not in name and name.endswith(INDEX_SUFFIX)
    return name in (f"model.safetensors.index.{variant}.json", f"model.safetensors.{variant}.index.json")


def _find_variants(names: Iterable[str]) -> dict[str, list[str]]:
    """Map the name of each variant to its single file and its indices."""
    found: dict[str, list[str]] = {}
    for name in names:
        for pattern in VARIANT_FILES:
            if match := pattern.fullmatch(name):
                found.setdefault(match[1], []).append(name)
    return found


def _find_only_file(root: object, names: Mapping[str, Listed]) -> str:
    """Return the only safetensors file of a checkpoint without files of the usual names. Raises CheckpointError."""
    loose = [n for n in names if SHARD_NAME.fullmatch(n)]
    if len(loose) == 1:
        return loose[0]
    for name, usual in _find_second_copies(names).items():
        if usual.endswith((".safetensors", INDEX_SUFFIX)):
            what = f"no {usual}, but {quote(name)}, as a browser names a second download"
            raise CheckpointError(what, root, f"rename it to {usual}")
    if loose and all(SHARD_OF_VARIANT.fullmatch(name) for name in loose):
        what = f"{len(loose)} shards of a variant and no index"
        raise CheckpointError(what, root, "get its model.safetensors.index.VARIANT.json too")
    what = f"{len(loose)} safetensors files and no index" if loose else "no safetensors file"
    raise CheckpointError(what, root, f"a checkpoint has one, or several and {INDEX}")


def _is_index_of(single: str, index: Listed, name: str) -> bool:
    """Return True if the index lists only the single file, as mlx-lm writes it: both are the same set of weights."""
    try:
        weight_map = read_json(index.source, name).get("weight_map")
    except CheckpointError:
        return False  # if this index is chosen, it is read again and the error reported
    return type(weight_map) is dict and bool(weight_map) and all(shard == single for shard in weight_map.values())


def _read_index(
    root: object, names: Mapping[str, Listed], index_name: str, elsewhere: Collection[str]
) -> tuple[list[str], dict[str, str], object]:
    """Return the shards, the weight_map and the total_size of an index. Raises CheckpointError."""
    index = read_json(names[index_name].source, index_name)
    weight_map = index.get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError("has no weight_map", index_name)
    refuse_too_many(len(weight_map), sum(file.size for file in names.values()), index_name)
    faults = []
    for shard in dict.fromkeys(json.dumps(v) if type(v) is not str else v for v in weight_map.values()):
        if not SHARD_NAME.fullmatch(shard):
            faults.append(f"index points to {quote(shard)}, which is no plain name of a safetensors file: {index_name}")
        elif shard not in names and shard not in elsewhere:
            faults.append(_describe_missing(root, names, shard))
    if faults:
        raise CheckpointError.of(format_some(faults))
    metadata = index.get("metadata")
    total = metadata.get("total_size") if type(metadata) is dict else None
    return sorted(set(weight_map.values())), weight_map, total


def _describe_missing(root: object, names: Mapping[str, Listed], shard: str) -> str:
    """Describe a missing shard, and mention a file that is named like a second download of it."""
    renamed = next((name for name, usual in _find_second_copies(names).items() if usual == shard), None)
    remedy = f"rename {quote(renamed)}, as a browser named it" if renamed else "the download is not complete"
    return f"missing shard: {root}/{shard} ({remedy})"


def _find_second_copies(names: Iterable[str]) -> dict[str, str]:
    """Map the name of each second copy in the top folder to the usual name, sorted by the former."""
    matches = {name: SECOND_COPY.fullmatch(name) for name in sorted(names) if "/" not in name}
    return {name: match[1] + match[2] for name, match in matches.items() if match}


def refuse_too_many(tensors: int, size: int, where: object) -> None:
    """Raise CheckpointError for more tensors than a checkpoint of `size` bytes may have."""
    limit = max(TENSORS_WITHOUT_DATA, min(MAX_TENSORS, size >> 12))
    if tensors > limit:
        raise CheckpointError(f"more than the {limit} tensors accepted in a checkpoint of {size} bytes", where)


def format_some(faults: Iterable[str]) -> list[str]:
    """Return the first MAX_LISTED faults, and a line with the number of the others."""
    faults = list(faults)
    more = len(faults) - MAX_LISTED
    return faults[:MAX_LISTED] + ([f"and {more} more of these"] if more > 0 else [])
