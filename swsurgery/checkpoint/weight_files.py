"""Find the files that contain the weights of a checkpoint: an index with its shards, or a single file.

This module reads the index but no shard. A variant is another set of the same weights, often in another dtype. Its
files have the names that transformers and diffusers use: `model.fp16.safetensors` for a single file, or
`model.safetensors.index.fp16.json` for an index with shards. The weights without a variant's name are called plain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from swsurgery.errors import AmbiguousWeights, CheckpointError
from swsurgery.storage.files import File
from swsurgery.storage.names import SHARD_NAME, VARIANT, is_undo_name
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
"""Patterns of the names of a variant's files: its single file, its index, and its index as diffusers named it until
version 0.30."""

SHARD_OF_VARIANT = re.compile(rf"model\.{VARIANT}-\d{{5}}-of-\d{{5}}\.safetensors")

SECOND_COPY = re.compile(r"(.+?)(?: ?\(\d+\)| - Copy(?: \(\d+\))?| copy(?: \d+)?)(\.[^./]+)")
"""The pattern of the names that browsers and file managers give to the second copy of a file. Example:
`model (1).safetensors` for `model.safetensors`."""

MAX_LISTED = 20
"""Maximum number of faults of one checkpoint that an error message lists individually."""

MAX_TENSORS, TENSORS_WITHOUT_DATA = 1 << 18, 50_000
"""Maximum number of tensors in a checkpoint, and the number that is always accepted. Between the two, a checkpoint may
have one tensor for each 4 KiB of its size. DeepSeek-V3 has 91,991 tensors of 7 MB on average."""


class Listed(Protocol):
    """One file of a checkpoint: where to read it, and its size in bytes."""

    @property
    def source(self) -> File: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class WeightFiles:
    """One set of weights: the names of its index and of its shards.

    For a single file, `index` is None and the file is the only shard. `weight_map` and `total_size` are copied from the
    index. `variant` is the name of the variant, such as "fp16", or None for the plain weights.
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
    *,
    may_miss: bool = False,
) -> WeightFiles:
    """Find the weights among the files of a checkpoint.

    `root` is the checkpoint's place, which messages name. `weights` chooses between an index and a single file.
    `variant` names the variant to take. If it is None, the plain weights are taken, or the only variant if no plain
    weights exist. Shards in `elsewhere` may be missing, and with `may_miss` any shard of an index may.

    Raises CheckpointError if the weights are missing or incomplete, and AmbiguousWeights if several sets of weights
    exist and the arguments choose none of them.
    """
    variants = _find_variants(names)
    if variant is not None and variant not in variants:
        remedy = f"choose one of its variants: {', '.join(sorted(variants))}" if variants else "it has no variants"
        raise CheckpointError(f"the checkpoint has no variant {variant}", root, remedy)
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
        what = f"there are several indices: {', '.join(indices)}"
        raise CheckpointError(what, root, "keep only the index that loaders read")
    if weights == "index" and not indices or weights == "single" and not singles:
        raise CheckpointError(f"the choice of weights is {weights}, which the checkpoint does not have", root)
    if not _choose_index(root, names, indices, singles, weights):
        return WeightFiles(None, tuple(singles), variant=variant)
    shards, weight_map, total = _read_index(root, names, indices[0], elsewhere, may_miss)
    return WeightFiles(indices[0], tuple(shards), weight_map, total, variant)


def _find_plain_indices(names: Iterable[str]) -> list[str]:
    """Return the names of the indices of the plain weights; if one has the usual name `INDEX`, only this name."""
    indices = [n for n in names if is_index(n, None)]
    return [INDEX] if INDEX in indices else indices


def _find_only_variant(root: object, variants: Collection[str]) -> str | None:
    """Return the only variant; None if no variant exists. Raises AmbiguousWeights if several variants exist."""
    if len(variants) > 1:
        what = f"there is no {SINGLE}, but there are the variants {', '.join(sorted(variants))}"
        remedy = "choose one with base.variant in a manifest, or with the option --variant"
        raise AmbiguousWeights(what, root, remedy)
    return next(iter(variants), None)


def _choose_index(
    root: object, names: Mapping[str, Listed], indices: list[str], singles: list[str], weights: Weights | None
) -> bool:
    """Return True if the index is to be read, False if the single file is.

    `indices` and `singles` are the names of the files that exist, at most one of each kind. Raises AmbiguousWeights if
    both kinds exist and `weights` is None, unless the index lists only the single file.
    """
    one_set = not (singles and indices) or _is_index_of(singles[0], names[indices[0]], indices[0])
    if weights is None and not one_set:
        raise AmbiguousWeights(
            f"there are two sets of weights, {singles[0]} and {indices[0]}: transformers loads the first, vLLM and "
            "mergekit load the second",
            root,
            "choose single or index with base.weights in a manifest, or with the option --weights",
        )
    return bool(indices) and (weights != "single" or one_set)


def has_several_sets(names: Collection[str]) -> bool:
    """Return True if the files `names` may contain several sets of weights: several single files or indices."""
    plain = [name for name in names if name == SINGLE or is_index(name, None)]
    return len(plain) + sum(map(len, _find_variants(names).values())) > 1


def is_index(name: str, variant: str | None) -> bool:
    """Return True if `name` is the name of an index of `variant`, or of the plain weights if `variant` is None."""
    if variant is None:
        return "/" not in name and name.endswith(INDEX_SUFFIX)
    return name in (f"model.safetensors.index.{variant}.json", f"model.safetensors.{variant}.index.json")


def _find_variants(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the variants among the files `names`: the name of each variant, with its single file and its indices."""
    found: dict[str, list[str]] = {}
    for name in names:
        for pattern in VARIANT_FILES:
            if match := pattern.fullmatch(name):
                found.setdefault(match[1], []).append(name)
    return found


def _find_only_file(root: object, names: Mapping[str, Listed]) -> str:
    """Return the only safetensors file of a checkpoint without files of the usual names. Raises CheckpointError."""
    loose = [n for n in names if SHARD_NAME.fullmatch(n) and not is_undo_name(n)]
    if len(loose) == 1:
        return loose[0]
    if not loose and (packed := [name for name in names if is_gguf(name)]):
        raise explain_gguf(root if str(root).endswith(packed[0]) else f"{root}/{packed[0]}")
    for name, usual in _find_second_copies(names).items():
        if usual.endswith((".safetensors", INDEX_SUFFIX)):
            what = f"there is no {usual}, but there is {quote(name)}, as a browser names a second download"
            raise CheckpointError(what, root, f"rename it to {usual}")
    if loose and all(SHARD_OF_VARIANT.fullmatch(name) for name in loose):
        what = f"there are {len(loose)} shards of a variant and no index"
        raise CheckpointError(what, root, "download model.safetensors.index.VARIANT.json too")
    if not loose and any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        remedy = "load it with transformers, and save it with save_pretrained"
        raise CheckpointError("the weights are not in safetensors files", root, remedy)
    what = f"there are {len(loose)} safetensors files and no index" if loose else "there is no safetensors file"
    raise CheckpointError(what, root, f"a checkpoint needs one safetensors file, or several and {INDEX}")


def is_gguf(name: str) -> bool:
    """Return True if the file `name` of a checkpoint's top folder is a GGUF file."""
    return "/" not in name and name.lower().endswith(".gguf")


def has_only_gguf(names: Collection[str]) -> bool:
    """Return True if the top folder of a checkpoint has GGUF files and no safetensors files."""
    others = (name for name in names if "/" not in name and not is_undo_name(name))
    return any(map(is_gguf, names)) and not any(name.endswith((".safetensors", INDEX_SUFFIX)) for name in others)


def explain_gguf(where: object) -> CheckpointError:
    """Return the error of a command that reads no GGUF files. `where` is the file."""
    what = "this command does not read GGUF files, because swsurgery can neither run nor export them"
    return CheckpointError(what, where, "give the safetensors checkpoint from which the file was converted")


def _is_index_of(single: str, index: Listed, name: str) -> bool:
    """Return True if the index lists only the single file, so that both are the same set of weights.

    mlx-lm writes such an index.
    """
    try:
        weight_map = read_json(index.source, name).get("weight_map")
    except CheckpointError:
        return False  # if this index is chosen, it is read again and that error is reported
    return type(weight_map) is dict and bool(weight_map) and all(shard == single for shard in weight_map.values())


def _read_index(
    root: object, names: Mapping[str, Listed], index_name: str, elsewhere: Collection[str], may_miss: bool
) -> tuple[list[str], dict[str, str], object]:
    """Return the names of the shards, the weight_map and the total_size that an index states.

    Raises CheckpointError if the index is not valid, or, without `may_miss`, lists a shard that does not exist.
    """
    index = read_json(names[index_name].source, index_name)
    weight_map = index.get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError("has no weight_map", index_name)
    refuse_too_many(len(weight_map), sum(file.size for file in names.values()), index_name)
    faults = []
    for shard in dict.fromkeys(json.dumps(v) if type(v) is not str else v for v in weight_map.values()):
        if not SHARD_NAME.fullmatch(shard):
            faults.append(f"lists the shard {quote(shard)}, which is not a plain file name *.safetensors: {index_name}")
        elif shard not in names and shard not in elsewhere and not may_miss:
            faults.append(_describe_missing(root, names, shard))
    if faults:
        raise CheckpointError.of(format_some(faults))
    metadata = index.get("metadata")
    total = metadata.get("total_size") if type(metadata) is dict else None
    return sorted(set(weight_map.values())), weight_map, total


def _describe_missing(root: object, names: Mapping[str, Listed], shard: str) -> str:
    """Return the message for a missing shard. It names a file that may be a second download of the shard."""
    renamed = next((name for name, usual in _find_second_copies(names).items() if usual == shard), None)
    remedy = f"rename {quote(renamed)} to it, as a browser changed the name" if renamed else "complete the download"
    return f"missing shard: {root}/{shard} ({remedy})"


def _find_second_copies(names: Iterable[str]) -> dict[str, str]:
    """Find the files that have the name of a second copy, such as `model (1).safetensors`.

    Returns a dict from this name to the usual name `model.safetensors`, sorted. Files in folders do not count.
    """
    matches = {name: SECOND_COPY.fullmatch(name) for name in sorted(names) if "/" not in name}
    return {name: match[1] + match[2] for name, match in matches.items() if match}


def refuse_too_many(tensors: int, size: int, where: object) -> None:
    """Raise CheckpointError if `tensors` is more than the number that a checkpoint of `size` bytes may have.

    `where` is the checkpoint or the index, which the message names.
    """
    limit = max(TENSORS_WITHOUT_DATA, min(MAX_TENSORS, size >> 12))
    if tensors > limit:
        what = f"there are {tensors} tensors, but a checkpoint of {size} bytes may have at most {limit}"
        raise CheckpointError(what, where)


def format_some(faults: Iterable[str]) -> list[str]:
    """Return the first MAX_LISTED faults, and, if there are more, a line with the number of the further faults."""
    faults = list(faults)
    more = len(faults) - MAX_LISTED
    return faults[:MAX_LISTED] + ([f"and {more} more of these"] if more > 0 else [])
