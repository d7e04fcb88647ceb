"""Find what is wrong with the files of a checkpoint whose download may be incomplete, and continue after a fault.

`find_present_weights` chooses the weights although shards are missing, and `read_damaged_shards` reads headers although
files are truncated. Both report each fault as a `Damage`. All other commands use `opening.read_checkpoint`, which
raises an error for the same faults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.weight_files import (
    INDEX,
    MAX_LISTED,
    SINGLE,
    Listed,
    WeightFiles,
    Weights,
    find_weights,
    has_several_sets,
    refuse_too_many,
)
from swsurgery.errors import CheckpointError
from swsurgery.storage.files import BaseFile
from swsurgery.storage.gguf import MetadataValue
from swsurgery.storage.names import SHARD_NAME, is_undo_name
from swsurgery.storage.numbers import format_size
from swsurgery.storage.shard import Shard, open_truncated_shard

NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})\.safetensors", re.ASCII)
"""The pattern of the names of numbered shards, such as model-00003-of-00005.safetensors."""

DamageKind = Literal["missing", "truncated", "unreadable", "index"]


@dataclass(frozen=True)
class Damage:
    """One fault of the files that store the weights.

    `kind` is "missing" or "truncated" for a shard that a new download repairs, "unreadable" for a shard with another
    fault, and "index" if the index itself is missing. `what` describes the fault, such as "is 1.2 GB short".
    """

    kind: DamageKind
    file: str
    what: str


@dataclass(frozen=True)
class Survey:
    """A checkpoint that was opened although files may be damaged, and what is wrong with them.

    `checkpoint` contains the shards whose headers could be read. `unseen` maps each tensor that the index puts in any
    other shard to this shard; its shape is unknown. `total_size` is the value that the index states, if it is a number.
    `gguf` is the metadata of a GGUF file, or {} if it could not be read; None for any other checkpoint.
    """

    checkpoint: Checkpoint
    damages: tuple[Damage, ...]
    unseen: dict[str, str]
    total_size: int | None
    gguf: Mapping[str, MetadataValue] | None = None


def find_present_weights(
    root: object,
    names: Mapping[str, Listed],
    weights: Weights | None,
    variant: str | None,
    elsewhere: Collection[str],
) -> tuple[WeightFiles, list[Damage]]:
    """Find the weights like `find_weights`, and return missing shards as damages.

    Numbered shards without an index are accepted too, with a damage for the index. Raises the other errors of
    `find_weights`.
    """
    numbered = () if weights or variant else _find_numbered(names)
    if numbered:
        chosen = WeightFiles(None, numbered)
        damages = [Damage("index", INDEX, "is missing, so loaders do not find the shards")]
    else:
        chosen, damages = find_weights(root, names, weights, variant, may_miss=True), []
    damages += _list_missing(chosen, names, elsewhere)
    return chosen, damages


def read_damaged_shards(
    files: Sequence[BaseFile],
    read_headers: Callable[[Sequence[BaseFile], Callable[[BaseFile], Opened]], Iterable[tuple[str, Opened]]],
    root: object,
) -> tuple[dict[str, Shard], list[Damage]]:
    """Read the headers of shards that may be truncated. Returns the shards by name, and what is wrong with the files.

    `read_headers` applies a function to each file. Raises CheckpointError if the shards have too many tensors.
    """
    shards: dict[str, Shard] = {}
    damages: list[Damage] = []
    size = sum(file.size for file in files)
    tensors = 0
    for name, (shard, damage) in read_headers(files, open_damaged):
        damages += [damage] if damage else []
        if shard is not None:
            shards[name] = shard
            tensors += len(shard.tensors)
            refuse_too_many(tensors, max(size, sum(s.data_size for s in shards.values()) if damages else 0), root)
    return shards, damages


Opened = tuple[Shard | None, Damage | None]
"""The shard in a file if its header could be read, and what is wrong with the file, or None."""


def open_damaged(file: BaseFile) -> Opened:
    """Read the header of one shard. Returns the shard, or None, and what is wrong with the file, or None."""
    try:
        shard, short = open_truncated_shard(file.source)
    except CheckpointError as error:
        return None, Damage("unreadable", file.name, error.faults[0])
    if not short:
        return shard, None
    if shard is None:
        return None, Damage("truncated", file.name, f"is truncated in its header: it has only {format_size(file.size)}")
    whole = shard.data_start + shard.data_size
    what = f"is {format_size(short)} short: it has {file.size} bytes, and its header needs {whole}"
    return shard, Damage("truncated", file.name, what)


def find_gaps(present: Collection[int], first: int, end: int) -> tuple[list[int], int]:
    """Find the numbers from `first` to `end` - 1 that are not in `present`.

    Returns at most MAX_LISTED of them, sorted, and how many there are. The time does not depend on `end`, which may
    come from a hostile file.
    """
    inside = {number for number in present if first <= number < end}
    count = max(0, end - first) - len(inside)
    gaps: list[int] = []
    number = first
    while len(gaps) < min(count, MAX_LISTED):
        if number not in inside:
            gaps.append(number)
        number += 1
    return gaps, count


def _find_numbered(names: Mapping[str, Listed]) -> tuple[str, ...]:
    """Return the numbered shards of a checkpoint without an index; () if there are none, or other weights exist."""
    if SINGLE in names or INDEX in names or has_several_sets(names.keys()):
        return ()
    loose = [name for name in names if SHARD_NAME.fullmatch(name) and not is_undo_name(name)]
    matches = [match for match in map(NUMBERED.fullmatch, loose) if match and int(match["count"]) > 1]
    if not loose or len(matches) < len(loose) or len({(m["stem"], m["count"]) for m in matches}) > 1:
        return ()
    return tuple(sorted(loose))


def _list_missing(chosen: WeightFiles, names: Mapping[str, Listed], elsewhere: Collection[str]) -> list[Damage]:
    """Return a damage for each shard that the index lists and that does not exist, and for each gap in the numbers."""
    damages = []
    listed: dict[str, int] = {}
    for shard in chosen.weight_map.values():
        listed[shard] = listed.get(shard, 0) + 1
    for shard in chosen.shards:
        if shard not in names and shard not in elsewhere:
            tensors = "1 tensor" if listed[shard] == 1 else f"{listed[shard]} tensors"
            damages.append(Damage("missing", shard, f"is missing, and {chosen.index} puts {tensors} there"))
    return damages + [
        Damage("missing", name, "is missing: the other shards are numbered as if it existed")
        for name in _list_unnumbered(chosen.shards)
        if name not in elsewhere
    ]


def _list_unnumbered(shards: Iterable[str]) -> list[str]:
    """Return the names that complete the numbers of the shards, at most MAX_LISTED.

    Example: the second of three names for shards 1 and 3 of 3. Numbers may start at 0.
    """
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for match in filter(None, map(NUMBERED.fullmatch, shards)):
        groups.setdefault((match["stem"], match["count"]), {})[int(match["number"])] = match["number"]
    found: list[str] = []
    for (stem, count), numbers in groups.items():
        first = 0 if 0 in numbers else 1
        gaps, _ = find_gaps(numbers.keys(), first, first + int(count))
        width = len(next(iter(numbers.values())))
        found += [f"{stem}-{number:0{width}}-of-{count}.safetensors" for number in gaps]
    return found[:MAX_LISTED]
