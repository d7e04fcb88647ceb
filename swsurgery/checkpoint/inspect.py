"""Describe a checkpoint for `inspect`: its files and tensors, one tensor, or one scalar.

Reads the headers and that scalar only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import open_checkpoint, open_for_reading
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import ArchitectureError, CheckpointError
from swsurgery.progress import Reporter, require_reporter
from swsurgery.storage.arguments import require_integer, require_type
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import convert_to_json, format_bits
from swsurgery.storage.result import Result, TableResult


@dataclass(frozen=True, repr=False)
class Overview(TableResult):
    """The files and tensors of a checkpoint, from its headers.

    `files` are (name, size in bytes, whether it is a shard). `revision` is a commit. `copies` names files that hold the
    weights again. `disagreements` maps tensors to a description of how the index and the shards contradict each other.
    """

    checkpoint: str
    model_type: str | None
    repo_id: str | None
    revision: str | None
    files: tuple[tuple[str, int, bool], ...]
    tensors: tuple[StoredTensor, ...]
    copies: tuple[str, ...]
    disagreements: Mapping[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Return the document that `inspect --json` prints."""
        return {
            "checkpoint": self.checkpoint,
            "model_type": self.model_type,
            "repo_id": self.repo_id,
            "revision": self.revision,
            "files": [{"file": name, "size": size, "shard": shard} for name, size, shard in self.files],
            "tensors": self.to_rows(),
            "copies": list(self.copies),
            "disagreements": dict(self.disagreements),
            "notes": list(self.notes),
        }

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per tensor: its name, file, dtype, shape and size in bytes."""
        return [{**vars(tensor), "shape": list(tensor.shape)} for tensor in self.tensors]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its shard, dtype (safetensors' name), stored shape and size in bytes."""

    tensor: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, repr=False)
class Details(Result):
    """One tensor, or one scalar of it: the fields of the document that `inspect --tensor --json` prints.

    A tensor has bytes and data_offsets. A scalar has index, offset (from the start of the file), value and bits; and
    layer, row, col and expert, if it is in a down projection. `note` says why the numbers are no weights.
    """

    fields: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        return dict(self.fields)

    def __repr__(self) -> str:
        return f"Details({', '.join(f'{key}: {value}' for key, value in self.fields.items())})"


@overload
def inspect(
    checkpoint: str | Path,
    tensor: None = None,
    at: None = None,
    *,
    weights: Weights | None = None,
    variant: str | None = None,
    reporter: Reporter | None = None,
) -> Overview: ...


@overload
def inspect(
    checkpoint: str | Path,
    tensor: str | None,
    at: str | int | Sequence[int] | None = None,
    *,
    weights: Weights | None = None,
    variant: str | None = None,
    reporter: Reporter | None = None,
) -> Overview | Details: ...


def inspect(
    checkpoint: str | Path,
    tensor: str | None = None,
    at: str | int | Sequence[int] | None = None,
    *,
    weights: Weights | None = None,
    variant: str | None = None,
    reporter: Reporter | None = None,
) -> Overview | Details:
    """List the files and tensors of a checkpoint, or describe one tensor, or one scalar with its value and bits.

    `checkpoint` is a directory or hf://ORG/NAME[@REV][/sub]. `at` is the index of a scalar in the stored shape of
    `tensor`: integers, or text such as "3968,7003". `weights` and `variant` choose between several sets of weights.
    Reads the headers and that scalar only.

    Raises TypeError, HubError, CheckpointError; TargetError while another run edits the checkpoint in place.
    """
    require_type("tensor", tensor, str, optional=True)
    index = None if at is None else _parse_index(at)
    with open_for_reading("checkpoint", checkpoint, require_reporter(reporter)) as root:
        opened = open_checkpoint(root, weights, variant)
        if tensor is None and at is None:
            return _list_contents(opened)
        if tensor is None:
            raise CheckpointError("--at needs --tensor", at or "")
        return Details(_describe(opened, tensor, index))


def _list_contents(checkpoint: Checkpoint) -> Overview:
    model_type = checkpoint.config.get("model_type")
    return Overview(
        checkpoint=str(checkpoint.root),
        model_type=model_type if isinstance(model_type, str) else None,
        repo_id=checkpoint.repo_id,
        revision=checkpoint.revision,
        files=tuple((f.name, f.size, f.name in checkpoint.shards) for f in checkpoint.files),
        tensors=tuple(
            StoredTensor(info.name, file, info.dtype.name, info.shape, info.size)
            for file, shard in checkpoint.shards.items()
            for info in shard.tensors.values()
        ),
        copies=checkpoint.copies,
        disagreements=checkpoint.disagreements,
        notes=checkpoint.notes,
    )


def _describe(checkpoint: Checkpoint, tensor: str, index: tuple[int, ...] | None) -> dict[str, object]:
    """Describe a tensor, or one scalar of it. Raises CheckpointError."""
    if tensor not in checkpoint.weight_map or tensor in checkpoint.disagreements:
        raise CheckpointError("no such tensor", tensor, "swsurgery inspect lists them")
    info, file = checkpoint.get_info(tensor), checkpoint.weight_map[tensor]
    found: dict[str, object] = {"tensor": tensor, "file": file, "dtype": info.dtype.name, "shape": list(info.shape)}
    if why := checkpoint.quantisation.explain_refusal(tensor):
        found["note"] = why
    if index is None:
        return found | {"bytes": info.size, "data_offsets": list(info.data_offsets)}
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


def _parse_index(at: str | int | Sequence[int]) -> tuple[int, ...]:
    """Parse an index: integers, or text such as "3968,7003" or "[3968, 7003]". Raises TypeError, CheckpointError."""
    if isinstance(at, list | tuple):
        return tuple(require_integer("at", part) for part in at)
    if not isinstance(at, str):
        return (require_integer("at", at),)
    parts = [p.strip() for p in at.strip("[]() ").split(",")] if at.strip("[]() ") else []
    if not all(p.isdecimal() and len(p) < 20 for p in parts):
        raise CheckpointError("--at takes whole numbers from 0", at, "such as --at 3968,7003")
    return tuple(int(p) for p in parts)
