"""Quantised checkpoints of matrices of SmolLM2, and what every layout must do with them. No test lives here."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from checkpoints import down
from numpy.typing import NDArray

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.layouts.cells import BitField, CannotTell, QuantisedMatrix
from swsurgery.checkpoint.layouts.find import WeightShapes, find_matrix, make_reader
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.verifying.stored_weight import read_weight

MODEL = os.environ.get("SWSURGERY_TEST_MODEL")
LAYERS = (2, 11, 29)
SHARD = "model.safetensors"
SUPER = (507, 1229)
"""Row and column of the super weight in layer 11 of SmolLM2, whose value is 5.875."""


only_with_model = [pytest.mark.model, pytest.mark.skipif(not MODEL, reason="SWSURGERY_TEST_MODEL names no model")]
"""The marks of tests that need SmolLM2."""


def needs_model(test):
    """Mark a test that needs SmolLM2."""
    for mark in only_with_model:
        test = mark(test)
    return test


def read_down(layer: int) -> NDArray[np.float32]:
    """The down projection of a layer of SmolLM2, [576, 1536], read without the code under test."""
    index = json.loads((Path(str(MODEL)) / "model.safetensors.index.json").read_text())
    with open(Path(str(MODEL)) / index["weight_map"][down(layer)], "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(size))[down(layer)]
        begin, end = entry["data_offsets"]
        file.seek(8 + size + begin)
        words = np.frombuffer(file.read(end - begin), "<u2").astype("<u4")
    assert entry["dtype"] == "BF16"
    return (words << 16).view("<f4").reshape(entry["shape"])


def write_config(folder: Path, quantisation: Mapping[str, object] | None) -> None:
    """config.json of SmolLM2 with a section that declares quantisation."""
    config = json.loads((Path(str(MODEL)) / "config.json").read_text()) if MODEL else {"model_type": "llama"}
    folder.mkdir(exist_ok=True)
    extra = {} if quantisation is None else {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config | extra))


def write_arrays(
    folder: Path, arrays: Mapping[str, NDArray], quantisation: Mapping[str, object], metadata: Mapping[str, str] = {}
) -> Path:
    """A checkpoint with one shard, saved by safetensors."""
    from safetensors.numpy import save_file

    write_config(folder, quantisation)
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / SHARD, {"format": "pt", **metadata})
    return folder


def open_matrix(folder: Path, weight: str) -> tuple[Checkpoint, QuantisedMatrix]:
    """The quantised matrix of that weight. It must have the shape that the weight has in a loaded model."""
    checkpoint = open_checkpoint(folder)
    matrix = find_matrix(checkpoint, weight)
    assert matrix is not None and matrix.weight == weight
    assert WeightShapes(checkpoint)[weight] == matrix.shape
    return checkpoint, matrix


def read_matrix(folder: Path, weight: str) -> tuple[QuantisedMatrix, NDArray[np.float64]]:
    """A quantised matrix and all its values, one row for each combination of the axes before the last.

    Single elements have the same values.
    """
    checkpoint, matrix = open_matrix(folder, weight)
    values = matrix.dequantise(0, int(np.prod(matrix.shape[:-1])))
    compare_cells(checkpoint, matrix, values)
    return matrix, values


def refuse_matrix(folder: Path, weight: str, message: str) -> None:
    """The layout of that weight cannot be decided, for this reason."""
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CannotTell, match=message):
        find_matrix(checkpoint, weight)


def refuse_values(folder: Path, weight: str, message: str) -> None:
    """The layout of that weight is found, but neither its last element nor the whole matrix is read."""
    _, matrix = open_matrix(folder, weight)
    with pytest.raises(CannotTell, match=message):
        matrix.find_cell(tuple(length - 1 for length in matrix.shape))
    with pytest.raises(CannotTell, match=message):
        matrix.dequantise(0, matrix.shape[0])


def change_module(weight: str, arrays: Mapping[str, NDArray], **changed: NDArray | None) -> dict[str, NDArray]:
    """Other tensors of the module of that weight, by the last parts of their names; None for one that is missing."""
    named = {f"{weight.removesuffix('weight')}{last}": array for last, array in changed.items()}
    return {name: array for name, array in {**arrays, **named}.items() if array is not None}


def compare_cells(checkpoint: Checkpoint, matrix: QuantisedMatrix, values: NDArray[np.float64]) -> None:
    """200 random elements and the corners, read one by one, have these values; so have all rows in pieces.

    `values` counts the axes before the last as one.
    """
    rows = len(values)
    draw = random.Random(7)
    places = list(itertools.product(*((0, length - 1) for length in matrix.shape)))
    places += [tuple(draw.randrange(length) for length in matrix.shape) for _ in range(200)]
    read = make_reader(checkpoint)
    for place in places:
        cell = matrix.find_cell(place)
        row = int(np.ravel_multi_index(place[:-1], matrix.shape[:-1]))
        assert cell.values[cell.read_code(read)] == values[row, place[-1]], place
    for begin, end in ((0, 1), (3, 14), (rows - 5, rows), (rows // 2, rows // 2)):
        assert np.array_equal(matrix.dequantise(begin, end), values[begin:end])


def locate_super(folder: Path) -> tuple[float, float]:
    """The value of the super weight of layer 11, found by layer, row and column, and the step of its grid."""
    checkpoint = open_checkpoint(folder)
    row, col = SUPER
    at = projections.locate(checkpoint.config, WeightShapes(checkpoint), layer=11, row=row, col=col, expert=None)
    matrix = find_matrix(checkpoint, at.tensor)
    assert matrix is not None
    cell = matrix.find_cell(at.index)
    value = cell.values[cell.read_code(make_reader(checkpoint))]
    stored = read_weight(checkpoint, at)  # what `verify --known` reads
    assert (stored.value, stored.step) == (value, cell.compute_step(value))
    return value, cell.compute_step(value)


def find_super(folder: Path) -> None:
    """The super weight of layer 11 is at most one step of its grid away from its value in SmolLM2."""
    value, step = locate_super(folder)
    assert abs(value - 5.875) <= step


def set_nearest(folder: Path, copy: Path, weight: str, index: tuple[int, ...], wanted: float) -> float:
    """Copy a checkpoint with the nearest code in the place of one element, and return the value of this code."""
    _, matrix = open_matrix(folder, weight)
    cell = matrix.find_cell(index)
    code = cell.find_nearest(wanted)
    shutil.copytree(folder, copy)
    set_bits(copy / SHARD, cell.fields, code)
    return cell.values[code]


def set_bits(path: Path, fields: Sequence[BitField], code: int) -> None:
    """Write a code into a file bit by bit."""
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    for name, start, width in fields:
        begin = 8 + size + header[name]["data_offsets"][0]
        for bit in range(start, start + width):
            data[begin + bit // 8] = data[begin + bit // 8] & ~(1 << bit % 8) | (code & 1) << bit % 8
            code >>= 1
    path.write_bytes(data)


def differ_once(before: NDArray, after: NDArray, index: tuple[int, ...]) -> bool:
    """Tell whether exactly the element at `index` differs."""
    return [tuple(map(int, place)) for place in np.argwhere(before != after)] == [index]
