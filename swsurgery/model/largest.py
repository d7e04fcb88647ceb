"""Find the scalars of largest magnitude in all down projections, by reading them once in small pieces.

This module computes with numpy. It must not import torch, and it runs no model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import list_down_projections
from swsurgery.errors import ModelError, pluralise
from swsurgery.storage.arrays import Words, decode_doubles
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import FloatDtype
from swsurgery.storage.files import fill

MAGNITUDES_AT_ONCE = 1 << 18
"""Number of scalars of a tensor that are read at a time. A piece takes 2 MiB as float64."""

_REMEDY = "leave out --control outliers"


@dataclass(frozen=True)
class LargeScalar:
    """One stored scalar of a down projection and the magnitude of its value."""

    coordinate: Coordinate
    magnitude: float


def list_down_tensors(checkpoint: Checkpoint) -> dict[str, int]:
    """Map the name of each stored tensor of down projections to its number of scalars, in the order of the layers.

    Raises ArchitectureError if no down projection is found, and ModelError if the elements of one are not plain weights
    (they are codes, or another tensor scales them).
    """
    projections = list_down_projections(checkpoint.config, checkpoint.shapes)
    sizes = {name: math.prod(checkpoint.shapes[name]) for name in dict.fromkeys(each.tensor for each in projections)}
    for name in sizes:
        if why := checkpoint.quantisation.explain_refusal(name):
            raise ModelError(why, name, _REMEDY)
        if not isinstance(checkpoint.get_info(name).dtype, FloatDtype):
            raise ModelError(f"{checkpoint.get_info(name).dtype.name} elements are not weights", name, _REMEDY)
    return sizes


def find_largest_scalars(checkpoint: Checkpoint, count: int, excluded: Collection[Coordinate]) -> list[LargeScalar]:
    """Find the `count` scalars of largest magnitude in all down projections, largest first, without those `excluded`.

    Among equal magnitudes, a scalar of an earlier layer and of a lower flat index comes first. Values that are 0, NaN
    or infinite do not count. Memory holds one piece of a tensor and `count` scalars. Raises ArchitectureError and
    ModelError as `list_down_tensors` does, ModelError if fewer scalars are left, and ShardError if a file ends early.
    """
    names = list(list_down_tensors(checkpoint))
    best = _Best(count)
    skipped = _group_by_tensor(checkpoint, excluded)
    for number, name in enumerate(names):
        for first, magnitudes in _read_magnitudes(checkpoint, name):
            here = [flat - first for flat in skipped[name] if 0 <= flat - first < len(magnitudes)]
            magnitudes[here] = 0
            best.add(magnitudes, number, first)
    if len(best.magnitudes) < count:
        found = pluralise(len(best.magnitudes), "other scalar")
        raise ModelError(f"the down projections have {found} above 0, fewer than {count}", checkpoint.root, _REMEDY)
    found_places = zip(best.magnitudes.tolist(), best.tensors.tolist(), best.places.tolist(), strict=True)
    return [
        LargeScalar(Coordinate(names[number], checkpoint.get_info(names[number]).unflatten(flat)), magnitude)
        for magnitude, number, flat in found_places
    ]


class _Best:
    """The largest magnitudes so far, in descending order, with the number of the tensor and the flat index of each."""

    def __init__(self, count: int):
        self.count = count
        self.magnitudes: NDArray[np.float64] = np.empty(0)
        self.tensors: NDArray[np.int64] = np.empty(0, np.int64)
        self.places: NDArray[np.int64] = np.empty(0, np.int64)

    def add(self, magnitudes: NDArray[np.float64], tensor: int, first: int) -> None:
        """Add a piece of a tensor, whose first scalar has the flat index `first`."""
        least = self.magnitudes[-1] if len(self.magnitudes) == self.count else 0.0
        places = np.flatnonzero(magnitudes > least)
        if len(places) > self.count:  # sorting all scalars of a piece would take longer than reading them
            bound = np.partition(magnitudes[places], len(places) - self.count)[len(places) - self.count]
            places = places[magnitudes[places] >= bound]
        if not len(places):
            return
        joined = np.concatenate([self.magnitudes, magnitudes[places]])
        order = np.argsort(-joined, kind="stable")[: self.count]  # stable: the earlier of two equal magnitudes stays
        self.magnitudes = joined[order]
        self.tensors = np.concatenate([self.tensors, np.full(len(places), tensor)])[order]
        self.places = np.concatenate([self.places, places + first])[order]


def _group_by_tensor(checkpoint: Checkpoint, coordinates: Collection[Coordinate]) -> defaultdict[str, list[int]]:
    """Map each tensor to the flat indices of the coordinates that it contains."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for tensor, index in coordinates:
        if tensor in checkpoint.shapes:
            found[tensor].append(checkpoint.get_info(tensor).flatten(index))
    return found


def _read_magnitudes(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield (flat index of the first scalar, magnitudes) of each piece; magnitudes that are not finite are 0."""
    info, shard = checkpoint.get_info(name), checkpoint.shards[checkpoint.weight_map[name]]
    assert isinstance(info.dtype, FloatDtype)
    start, size, total = shard.data_start + info.data_offsets[0], info.dtype.size, math.prod(info.shape)
    with shard.file.open() as file:
        for first in range(0, total, MAGNITUDES_AT_ONCE):
            raw = bytearray(min(MAGNITUDES_AT_ONCE, total - first) * size)
            fill(file, raw, start + first * size)
            words: Words = np.frombuffer(raw, f"<u{size}")
            magnitudes = np.abs(decode_doubles(info.dtype, words))
            magnitudes[~np.isfinite(magnitudes)] = 0
            yield first, magnitudes
