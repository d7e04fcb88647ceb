"""Quantised down projections of SmolLM2 as tensors of torch, and the comparison with what a library computes.

No test lives here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from checkpoints import down
from quantised_files import LAYERS, SHARD, locate_super, read_down, read_matrix, write_config
from safetensors.torch import save_file

from swsurgery.checkpoint.layouts.cells import QuantisedMatrix


def read_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The down projections of LAYERS by their names, [576, 1536]."""
    return {down(layer): torch.from_numpy(read_down(layer)).to(dtype) for layer in LAYERS}


def write_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], quantisation: Mapping[str, object] | None = None
) -> Path:
    """A checkpoint with one shard, and with the config.json of SmolLM2."""
    write_config(folder, quantisation)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SHARD)
    return folder


def compare(folder: Path, weight: str, expected: torch.Tensor, *steps: torch.dtype) -> QuantisedMatrix:
    """Every element of a matrix has the value that the library computes, rounded as the library rounds."""
    matrix, values = read_matrix(folder, weight)
    assert matrix.shape == tuple(expected.shape)
    found = torch.from_numpy(values.copy())
    for step in steps:
        found = found.to(step)
    assert torch.equal(found.reshape(expected.shape).to(expected.dtype), expected)
    return matrix


def compare_super(folder: Path, expected: torch.Tensor) -> None:
    """The layer, row and column of the super weight find its value in the matrix that a library computes."""
    value, step = locate_super(folder)
    assert torch.tensor(value).to(expected.dtype) == expected[507, 1229] and step > 0
