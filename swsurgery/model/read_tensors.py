"""Read the tensors of a checkpoint one after the other, with planned splices applied.

This module must not depend on transformers or on models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor as Tensor

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import CheckpointError, ModelError
from swsurgery.model.torch_dtypes import TORCH_DTYPES
from swsurgery.storage.files import File, fill
from swsurgery.storage.shard import TensorInfo
from swsurgery.storage.splice import Splice


def refuse_unreadable(checkpoint: Checkpoint) -> None:
    """Raise an error if a tensor cannot be read into torch.

    The error is CheckpointError if index and shards disagree about a tensor, and ModelError if torch does not have its
    dtype.
    """
    if checkpoint.disagreements:
        name, what = min(checkpoint.disagreements.items())
        raise CheckpointError(f"index and shards disagree about {name}", what)
    for name in checkpoint.weight_map:
        dtype = checkpoint.get_info(name).dtype.name
        if dtype not in TORCH_DTYPES:
            raise ModelError(f"torch has no dtype {dtype}", name)


def load_tensors(checkpoint: Checkpoint, splices: Sequence[Splice] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for every tensor of the weight_map, with the splices applied.

    Tensors are yielded shard by shard, and within a shard in the order of their data. Raises CheckpointError if a shard
    ends early or does not contain the old bytes of a splice.
    """
    for file, shard in checkpoint.shards.items():
        with shard.file.open() as opened:
            for info in shard.tensors.values():
                if checkpoint.weight_map.get(info.name) != file:
                    continue
                here = [s for s in splices if s.coordinate.tensor == info.name]
                yield info.name, _read(opened, info, shard.data_start + info.data_offsets[0], here, file)


def _read(opened: File, info: TensorInfo, offset: int, splices: Sequence[Splice], file: str) -> Tensor:
    """Read the tensor whose data begin at `offset` of the file into new memory, and apply its splices."""
    if not info.size:
        return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype.name])
    data = bytearray(info.size)
    fill(opened, data, offset)
    for splice in splices:
        begin = splice.offset - offset
        place = slice(begin, begin + len(splice.old))
        if data[place] != splice.old:
            raise CheckpointError("the file was changed while it was read", f"{splice.coordinate} in {file}")
        data[place] = splice.new
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype.name]).reshape(info.shape)
