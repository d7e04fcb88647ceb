"""Describe one element of a quantised matrix for `inspect`."""

from __future__ import annotations

import math

from swsurgery.checkpoint.layouts.cells import CannotTell, QuantisedMatrix
from swsurgery.checkpoint.layouts.find import StoredTensors, find_codes, find_matrix, make_reader
from swsurgery.errors import CheckpointError
from swsurgery.storage.shard import TensorInfo


def describe_element(checkpoint: StoredTensors, weight: str, index: tuple[int, ...]) -> dict[str, object]:
    """Return the facts about the element at `index` of a quantised weight.

    The keys are tensor, file, dtype (of the codes), shape, layout, index, offset (of the byte with the lowest bit of
    the code, from the start of the file), value, code and step. `offset` and `code` are None if the element has no code
    of its own. Raises CheckpointError if the layout cannot be decided, or if `index` is out of range.
    """
    try:
        matrix = find_matrix(checkpoint, weight)
        if matrix is None:
            raise CannotTell("it is not quantised")
        return _describe(checkpoint, matrix, index)
    except CannotTell as error:
        raise CheckpointError(f"the layout does not tell what this element is: {error}", weight) from None


def _describe(checkpoint: StoredTensors, matrix: QuantisedMatrix, index: tuple[int, ...]) -> dict[str, object]:
    """Return the facts about an element. Raises CheckpointError for a wrong index, and CannotTell."""
    name = find_codes(checkpoint, matrix.weight) or matrix.weight
    file = checkpoint.weight_map[name]
    shard, dtype = checkpoint.shards[file], checkpoint.infos[name].dtype
    try:
        TensorInfo(matrix.weight, dtype, matrix.shape, (0, 0)).flatten(index)
    except IndexError as error:
        raise CheckpointError(str(error), matrix.weight) from None
    cell = matrix.find_cell(index)
    code = cell.read_code(make_reader(checkpoint))
    value = cell.values[code]
    offset = None
    if cell.fields:
        first = cell.fields[0]
        offset = shard.data_start + shard.tensors[first.tensor].data_offsets[0] + first.start // 8
    return {
        "tensor": matrix.weight,
        "file": file,
        "dtype": dtype.name,
        "shape": list(matrix.shape),
        "layout": matrix.layout,
        "index": list(index),
        "offset": offset,
        "value": value if math.isfinite(value) else str(value),
        "code": code if cell.fields else None,
        "step": cell.compute_step(value) if math.isfinite(value) else None,
    }
