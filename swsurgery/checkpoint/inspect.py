"""Describe a checkpoint for `inspect`: its files and tensors, one tensor, or one scalar.

Reads the headers and that scalar only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.opening import held, open_checkpoint
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import ArchitectureError, CheckpointError
from swsurgery.hub.remote import RemoteTree
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import convert_to_json, format_bits


def inspect_files(
    root: Path | RemoteTree, weights: Weights | None = None, variant: str | None = None
) -> dict[str, Any]:
    """List the files with their sizes in bytes, and the tensors with their shard, dtype and shape.

    `weights` and `variant` choose between several sets of weights, as in `open_checkpoint`. Raises CheckpointError.
    """
    checkpoint = open_checkpoint(root, weights, variant)
    shard_of = checkpoint.shards
    tensors = [
        {"tensor": info.name, "file": file, "dtype": info.dtype.name, "shape": list(info.shape), "bytes": info.size}
        for file, shard in shard_of.items()
        for info in shard.tensors.values()
    ]
    model_type = checkpoint.config.get("model_type")
    return {
        "checkpoint": str(root),
        "model_type": model_type if isinstance(model_type, str) else None,
        "repo_id": checkpoint.repo_id,
        "revision": checkpoint.revision,
        "files": [{"file": f.name, "size": f.size, "shard": f.name in shard_of} for f in checkpoint.files],
        "tensors": tensors,
        "copies": list(checkpoint.copies),
        "disagreements": checkpoint.disagreements,
        "notes": list(checkpoint.notes),
    }


def inspect_tensor(
    root: Path | RemoteTree,
    tensor: str | None,
    at: str | None,
    weights: Weights | None = None,
    variant: str | None = None,
) -> dict[str, Any]:
    """Describe one tensor, or with `at` ("3968,7003") one scalar with its value and bits.

    `weights` and `variant` are as in `inspect_files`. Raises CheckpointError.
    """
    with held(root) as entered:
        checkpoint = open_checkpoint(entered, weights, variant)
        if tensor is None:
            raise CheckpointError("--at needs --tensor", at or "")
        if tensor not in checkpoint.weight_map or tensor in checkpoint.disagreements:
            raise CheckpointError("no such tensor", tensor, "swsurgery inspect lists them")
        info, file = checkpoint.info(tensor), checkpoint.weight_map[tensor]
        found: dict[str, Any] = {"tensor": tensor, "file": file, "dtype": info.dtype.name, "shape": list(info.shape)}
        if why := checkpoint.quantisation.refusal(tensor):
            found["note"] = why
        if at is None:
            return found | {"bytes": info.size, "data_offsets": list(info.data_offsets)}
        index = _parse_index(at)
        if info.dtype.bits % 8:
            raise CheckpointError(f"{info.dtype.name} {info.dtype.refusal}", tensor)
        try:
            offset = checkpoint.shards[file].find_offset(tensor, index)
        except IndexError as error:
            raise CheckpointError(str(error), tensor) from None
        data = checkpoint.shards[file].read_scalar(tensor, index)
        try:
            short = projections.find_short_form(checkpoint.config, checkpoint.shapes, Coordinate(tensor, index))
        except ArchitectureError:
            short = None
        place = dict(zip(("layer", "row", "col", "expert"), short, strict=True)) if short else {}
        value = convert_to_json(info.dtype, data)
        return found | {"index": list(index), "offset": offset, "value": value, "bits": format_bits(data), **place}


def _parse_index(at: str) -> tuple[int, ...]:
    """Parse an index such as "3968,7003" or "[3968, 7003]". Raises CheckpointError."""
    parts = [p.strip() for p in at.strip("[]() ").split(",")] if at.strip("[]() ") else []
    if not all(p.isdecimal() and len(p) < 20 for p in parts):
        raise CheckpointError("--at takes whole numbers from 0", at, "such as --at 3968,7003")
    return tuple(int(p) for p in parts)
