"""Compute scalars multiplied by factors, and refuse impossible factors before a model is loaded.

The scaled values equal those that a manifest with `op: scale` writes. This module must not import torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import Fault, ModelError, NumberError
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import Coordinate, is_valid_index


def refuse_factors(factors: Sequence[float]) -> None:
    """Raise NumberError with all faults: no factor, or a factor that is not finite or repeated."""
    if not factors:
        raise NumberError("nothing to sweep", "no factors")
    faults = [Fault("factor is not finite", factor) for factor in factors if not math.isfinite(factor)]
    faults += [Fault("factor is given twice", f"{factor:g}") for factor, times in Counter(factors).items() if times > 1]
    if faults:
        raise NumberError.of(faults)


def compute_scaled_values(
    checkpoint: Checkpoint, coordinates: Sequence[Coordinate], factors: Sequence[float], or_regions: bool = False
) -> list[dict[Coordinate, float]]:
    """Compute for each factor the scalars that it changes and their new values, rounded to the stored dtype.

    Raises NumberError with all faults: no factor, a factor that is not finite or repeated, or a product that the dtype
    cannot represent. Raises ModelError if no scalar is given and `or_regions` is False, or if a scalar is repeated or
    not in the checkpoint.
    """
    if not coordinates and not or_regions:
        raise ModelError("nothing to sweep", "no coordinates")
    refuse_factors(factors)
    faults: list[Fault] = []
    if twice := [coordinate for coordinate, times in Counter(coordinates).items() if times > 1]:
        raise ModelError("coordinate is given twice", twice[0])
    values: list[dict[Coordinate, float]] = [{} for _ in factors]
    for coordinate in coordinates:
        dtype, data = read_stored(checkpoint, coordinate)
        for variant, factor in zip(values, factors, strict=True):
            try:
                new = dtypes.scale_value(dtype, data, factor) if factor else dtypes.make_zero(dtype)
                old, value = dtypes.decode(dtype, data), dtypes.decode(dtype, new)
            except NumberError as error:
                faults += [fault.add_context(f"cannot scale {coordinate} by {factor:g}") for fault in error.faults]
            else:
                if value != old:
                    variant[coordinate] = float(value)
    if faults:
        raise NumberError.of(faults)
    return values


def read_stored(checkpoint: Checkpoint, coordinate: Coordinate) -> tuple[dtypes.Dtype, bytes]:
    """Read the dtype and the stored bytes of one scalar. Raises ModelError if the scalar is missing or not a weight."""
    tensor, index = coordinate
    shape = checkpoint.shapes.get(tensor, ())
    if index and is_valid_index(index, shape):
        if why := checkpoint.quantisation.explain_refusal(tensor):
            raise ModelError(why, coordinate)
        shard = checkpoint.shards[checkpoint.weight_map[tensor]]
        return shard.tensors[tensor].dtype, shard.read_scalar(tensor, index)
    raise ModelError("no such scalar in the checkpoint", coordinate)
