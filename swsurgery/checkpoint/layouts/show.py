"""Describe quantised weights and their elements for `inspect`."""

from __future__ import annotations

import math

from swsurgery.checkpoint.layouts.cells import CannotTell, Cell, QuantisedMatrix
from swsurgery.checkpoint.layouts.find import StoredTensors, find_codes, find_matrix, make_reader
from swsurgery.checkpoint.layouts.module import list_elements
from swsurgery.errors import CheckpointError
from swsurgery.storage.dtypes import format_bits
from swsurgery.storage.ggml import BlockDtype
from swsurgery.storage.shard import Shard, TensorInfo


def describe_matrix(checkpoint: StoredTensors, weight: str) -> dict[str, object]:
    """Return the facts about a quantised weight whose tensors have other names.

    The keys are tensor, layout, shape and stored: a list of the module's tensors, with tensor, file, dtype and shape.
    Raises CheckpointError if the layout cannot be decided.
    """
    matrix = _find(checkpoint, weight)
    names = dict.fromkeys(filter(None, (find_codes(checkpoint, weight), *checkpoint.quantisation.list_others(weight))))
    stored = [
        {
            "tensor": name,
            "file": checkpoint.weight_map[name],
            "dtype": checkpoint.infos[name].dtype.name,
            "shape": list(checkpoint.infos[name].shape),
        }
        for name in names
        if name in checkpoint.infos
    ]
    return {"tensor": weight, "layout": matrix.layout, "shape": list(matrix.shape), "stored": stored}


def describe_element(checkpoint: StoredTensors, weight: str, index: tuple[int, ...]) -> dict[str, object]:
    """Return the facts about the element at `index` of a quantised weight.

    The keys are tensor, file, dtype (of the codes), shape, layout, index, offset (of the byte with the lowest bit of
    the code, from the start of the file), value, code, scale, step and stored. `stored` lists the stored numbers that
    contain the code, with tensor, index and bits; it is empty if the numbers are parts of blocks, as in GGUF. `offset`,
    `code` and `scale` are None if the element has no code of its own. Raises CheckpointError if the layout cannot be
    decided, or if `index` is out of range.
    """
    matrix = _find(checkpoint, weight)
    try:
        return _describe(checkpoint, matrix, index)
    except CannotTell as error:
        raise _make_error(weight, error) from None


def _find(checkpoint: StoredTensors, weight: str) -> QuantisedMatrix:
    """Find the layout of a quantised weight. Raises CheckpointError if it cannot be decided."""
    try:
        matrix = find_matrix(checkpoint, weight)
        if matrix is None:
            raise CannotTell("it is not quantised")
    except CannotTell as error:
        raise _make_error(weight, error) from None
    return matrix


def _make_error(weight: str, reason: CannotTell) -> CheckpointError:
    return CheckpointError(f"the value of this weight cannot be determined: {reason}", weight)


def _describe(checkpoint: StoredTensors, matrix: QuantisedMatrix, index: tuple[int, ...]) -> dict[str, object]:
    """Return the facts about an element. Raises CheckpointError for a wrong index, and CannotTell."""
    name = find_codes(checkpoint, matrix.weight) or matrix.weight
    file = checkpoint.weight_map[name]
    dtype = checkpoint.infos[name].dtype
    try:
        TensorInfo(matrix.weight, dtype, matrix.shape, (0, 0)).flatten(index)
    except IndexError as error:
        raise CheckpointError(str(error), matrix.weight) from None
    cell = matrix.find_cell(index)
    code = cell.read_code(make_reader(checkpoint))
    value = cell.values[code]
    return {
        "tensor": matrix.weight,
        "file": file,
        "dtype": dtype.name,
        "shape": list(matrix.shape),
        "layout": matrix.layout,
        "index": list(index),
        "offset": _find_offset(checkpoint.shards[file], cell),
        "value": value if math.isfinite(value) else str(value),
        "code": code if cell.fields else None,
        "scale": cell.scale if cell.fields else None,
        "step": cell.compute_step(value) if math.isfinite(value) else None,
        "stored": [] if isinstance(dtype, BlockDtype) else _list_stored(checkpoint, cell),
    }


def _find_offset(shard: Shard, cell: Cell) -> int | None:
    """Return the offset in the file of the byte with the lowest bit of a code; None if the element has no code."""
    if not cell.fields:
        return None
    first = cell.fields[0]
    return shard.data_start + shard.tensors[first.tensor].data_offsets[0] + first.start // 8


def _list_stored(checkpoint: StoredTensors, cell: Cell) -> list[dict[str, object]]:
    """List the stored numbers that contain a code. `bits` is None for a number that does not fill whole bytes."""
    found: list[dict[str, object]] = []
    for name, index in list_elements(cell, checkpoint.infos):
        whole = checkpoint.infos[name].dtype.bits % 8 == 0
        shard = checkpoint.shards[checkpoint.weight_map[name]]
        bits = format_bits(shard.read_scalar(name, index)) if whole else None
        found.append({"tensor": name, "index": list(index), "bits": bits})
    return found
