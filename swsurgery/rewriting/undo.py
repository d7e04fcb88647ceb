"""Define the undo file: the old bytes of changed regions, in a safetensors file that any reader of the format opens.

For a dense rewrite, the tensor `edit.N.K.old` has the dtype and the shape of the region. For a sparse one,
`edit.N.K.index` (I64) contains the flat indices in the stored tensor of the changed scalars, rising, and `edit.N.K.old`
their old values. N is the number of the edit in the manifest and K that of the region in the edit, both from 0.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from swsurgery.errors import CheckpointError
from swsurgery.rewriting.function import Function
from swsurgery.rewriting.rows import RegionRows
from swsurgery.rewriting.stored import RegionPlace, SparseRows, StoredRows
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.region import Region
from swsurgery.storage.shard import Shard, parse_header

HEADER_ALIGNMENT = 8
"""The size of the header is a multiple of this number of bytes, as safetensors recommends."""


@dataclass(frozen=True)
class UndoTensor:
    """One tensor of an undo file that is being written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def sort_tensors(tensors: Sequence[UndoTensor]) -> list[UndoTensor]:
    """Return tensors in the order in which they are stored: wide dtypes first, so that all are aligned."""
    return sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].size)


def render_header(tensors: Sequence[UndoTensor]) -> bytes | None:
    """Return the bytes before the data of an undo file, whose tensors are stored in the given order.

    Returns None if there are more tensors than a reader accepts.
    """
    header: dict[str, object] = {}
    at = 0
    for tensor in tensors:
        end = at + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "swsurgery-undo"}} | header, sort_keys=True).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    try:
        parse_header(text, at)
    except ValueError:
        return None
    return struct.pack("<Q", len(text)) + text


def make_undo_function(shard: Shard, prefix: str, place: RegionPlace) -> Function:
    """Return the function that puts back the old bytes of a region. `shard` is the open undo file.

    Raises CheckpointError if the undo file has no such region with the dtype and shape of `place`.
    """
    old, index = shard.tensors.get(f"{prefix}.old"), shard.tensors.get(f"{prefix}.index")
    dtype, region = place.info.dtype, place.region
    if old is None or old.dtype != dtype:
        raise CheckpointError(f"the undo file has no {prefix}.old of dtype {dtype.name}", shard.file)
    start = shard.data_start + old.data_offsets[0]
    if index is None:
        if old.shape != region.shape:
            what = f"{prefix}.old of the undo file has shape {list(old.shape)}, but the region {list(region.shape)}"
            raise CheckpointError(what, shard.file)
        return StoredRows(shard.file, RegionPlace(old, start, Region.of_tensor(old)))
    if index.dtype.name != "I64" or len(index.shape) != 1 or old.shape != index.shape:
        raise CheckpointError(f"{prefix}.index and {prefix}.old of the undo file do not fit together", shard.file)
    return SparseRows(shard.file, place, old.shape[0], shard.data_start + index.data_offsets[0], start)


def list_undo_tensors(prefix: str, dtype: str, rows: RegionRows, sparse: int | None) -> list[UndoTensor]:
    """Return the tensors with the old bytes of one region; `sparse` is the number of changed scalars, or None."""
    size = DTYPES[dtype].size
    if sparse is None:
        region = rows.region
        return [UndoTensor(f"{prefix}.old", dtype, region.shape, region.scalars * size)]
    index = UndoTensor(f"{prefix}.index", "I64", (sparse,), sparse * 8)
    return [index, UndoTensor(f"{prefix}.old", dtype, (sparse,), sparse * size)]
