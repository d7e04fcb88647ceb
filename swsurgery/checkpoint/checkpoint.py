"""A checkpoint on disk: which files it has, which of them hold the weights, and whether they agree.

Knows single files, shards with an index, and snapshots of the Hugging Face cache (whose files are links
into `blobs/`, read only). Reads headers and small JSON files; never tensor data, and writes nothing, except that
it has an edit in place that was cut off undone first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from swsurgery.checkpoint.quantised import Quantisation
from swsurgery.checkpoint.weight_files import SINGLE, Weights, is_index
from swsurgery.storage.files import BaseFile, Repository
from swsurgery.storage.folder import Entry
from swsurgery.storage.shard import Shard, TensorInfo


@dataclass(frozen=True)
class Checkpoint:
    """Every file of a checkpoint and the headers of its shards.

    `weight_map` says for each tensor in which shard loaders will look for it. `copies` are further copies of
    the weights beside the shards. `disagreements` maps a tensor to what index and shards say differently of it.
    """

    root: Path | Repository
    files: tuple[BaseFile, ...]
    shards: dict[str, Shard]
    weight_map: dict[str, str]
    index_name: str | None
    config: dict[str, Any]
    copies: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    disagreements: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    repo_id: str | None = None
    revision: str | None = None
    in_cache: bool = False
    sub: str = ""
    variant: str | None = None

    @property
    def directory(self) -> Path:
        """Return `root` as a path. Raises TypeError if the files are not on this machine."""
        if not isinstance(self.root, Path):
            raise TypeError(f"{self.root} is not a directory on this machine")
        return self.root

    def info(self, tensor: str) -> TensorInfo:
        """The header's entry of a tensor of the weight_map. Raises KeyError."""
        return self.shards[self.weight_map[tensor]].tensors[tensor]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored shape of every tensor that the weight_map and the shards agree on."""
        return {t: self.info(t).shape for t in self.weight_map if t not in self.disagreements}

    @property
    def single(self) -> str:
        """The single file that transformers would load, if it is there, before an index."""
        return f"model.{self.variant}.safetensors" if self.variant else SINGLE

    @cached_property
    def quantisation(self) -> Quantisation:
        """What the stored numbers of each tensor are: plain weights, codes, or internals of a quantiser."""
        tensors: dict[str, TensorInfo] = {}
        for shard in self.shards.values():
            tensors |= shard.tensors
        tensors |= {t: self.info(t) for t in self.shapes}
        return Quantisation(
            tensors, self.config, (f.name for f in self.files), (shard.metadata for shard in self.shards.values())
        )

    @cached_property
    def choice(self) -> Weights | None:
        """Which weights these are if an index and a single file are there; None if there was no choice.

        An index that lists only that file is no second set.
        """
        names = {f.name for f in self.files}
        if self.index_name is not None:
            return "index" if self.single in names and self.single not in self.shards else None
        return "single" if self.single in self.shards and any(is_index(n, self.variant) for n in names) else None

    def file(self, name: str) -> BaseFile:
        return next(f for f in self.files if f.name == name)

    def refuse_changed(self) -> None:
        """Raise CheckpointError if a file here is no longer the one that was listed."""
        for file in self.files:
            if isinstance(file.path, Entry):
                file.path.refuse_replaced()
