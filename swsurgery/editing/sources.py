"""Open the checkpoints whose bytes the operation "restore" puts back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.editing.rewrite import StoredTensor
from swsurgery.errors import PlanError
from swsurgery.hub import Uri, open_location, parse_field
from swsurgery.storage.files import File, LocalFile
from swsurgery.storage.folder import Entry
from swsurgery.storage.shard import TensorInfo


@dataclass
class Sources:
    """The checkpoints that `from:` names in one manifest, each opened once. `beside` is the manifest's directory."""

    beside: Path
    opened: dict[str, Checkpoint] = field(default_factory=dict)

    def find(self, name: str, info: TensorInfo) -> StoredTensor:
        """Find the tensor that has the name, dtype and shape of `info` in the checkpoint `name`.

        Raises PlanError if it has none, and the errors of `open_checkpoint`.
        """
        checkpoint = self.open(name)
        shard = checkpoint.shards.get(checkpoint.weight_map.get(info.name, ""))
        found = shard.tensors.get(info.name) if shard else None
        if shard is None or found is None or info.name in checkpoint.disagreements:
            raise PlanError(f"{name} has no tensor {info.name}", remedy="give the base in from:")
        if (found.dtype, found.shape) != (info.dtype, info.shape):
            theirs = f"{found.dtype.name} of shape {list(found.shape)}"
            raise PlanError(f"{info.name} is {info.dtype.name} of shape {list(info.shape)}, but {theirs} in {name}")
        return StoredTensor(_detach(shard.file), shard.data_start + found.data_offsets[0], found)

    def open(self, name: str) -> Checkpoint:
        """Return the checkpoint `name`, which is opened on first use. Raises the errors of `open_checkpoint`."""
        if name not in self.opened:
            where = parse_field(name)
            root = open_location(where) if isinstance(where, Uri) else self.beside / where
            self.opened[name] = open_checkpoint(root, gguf=True)
        return self.opened[name]


def _detach(file: File) -> File:
    """Return a local file by its path, because the directory of its entry is open only while headers are read."""
    if isinstance(file, LocalFile) and isinstance(file.where, Entry):
        return replace(file, where=file.where.folder.path / file.where.name)
    return file
