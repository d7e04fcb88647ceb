"""Define `Checkpoint`: the files of an opened checkpoint, the headers of its shards, and facts derived from them.

A checkpoint is a single file, shards with an index, or a snapshot in the Hugging Face cache. This module reads nothing:
opening.py builds the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swsurgery.checkpoint.quantised import Quantisation
from swsurgery.checkpoint.weight_files import SINGLE, Weights, is_gguf, is_index
from swsurgery.hub.remote import RemoteTree
from swsurgery.storage.files import BaseFile
from swsurgery.storage.numeric import load_numpy
from swsurgery.storage.result import TableResult
from swsurgery.storage.shard import Shard, TensorInfo

if TYPE_CHECKING:
    from swsurgery.checkpoint.layouts.summary import LayoutSummary


@dataclass(frozen=True)
class Step:
    """One of the manifests that were applied to a checkpoint one after the other. Steps are numbered from 1.

    `name` is the name that the manifest states, or None. `edits` describes each edited or protected scalar, region and
    quantised element in one line. `created` is the time in seconds since 1970 if SOURCE_DATE_EPOCH was set, else None.
    """

    number: int
    name: str | None
    edits: tuple[str, ...]
    created: int | None
    swsurgery_version: str
    manifest_sha256: str
    manifest: str = field(repr=False)

    def to_json(self) -> dict[str, object]:
        """Return the step as an entry of `steps` in the document that `inspect --json` prints."""
        return {
            "number": self.number,
            "name": self.name,
            "edits": list(self.edits),
            "created": self.created,
            "swsurgery_version": self.swsurgery_version,
            "manifest_sha256": self.manifest_sha256,
            "manifest": self.manifest,
        }


@dataclass(frozen=True, repr=False)
class Checkpoint(TableResult):
    """Every file of a checkpoint and the headers of its shards.

    `weight_map` maps each tensor to the shard in which loaders look for it. `copies` lists the names of files outside
    the shards that contain the weights a second time (such as GGUF). `left_out` lists names in the directory that are
    not part of the checkpoint (such as ".git"). `disagreements` maps each tensor for which the index contradicts the
    shards to a description of the contradiction. `revision` is the commit of the repository, `sub` the folder in the
    repository, and `variant` the chosen variant of the weights (such as "fp16"). `steps` are the manifests that were
    applied; only `inspect` fills it in.
    """

    root: Path | RemoteTree
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
    steps: tuple[Step, ...] = ()

    @property
    def is_here(self) -> bool:
        """True if the files are on this machine."""
        return not isinstance(self.root, RemoteTree)

    @property
    def is_gguf(self) -> bool:
        """True if the weights are a GGUF file, or the parts of one."""
        return any(is_gguf(name) for name in self.shards)

    def to_json(self) -> dict[str, object]:
        """Return the document that `inspect --json` prints: the files and tensors, with sizes in bytes."""
        model_type = self.config.get("model_type")
        return {
            "checkpoint": str(self.root),
            "model_type": model_type if isinstance(model_type, str) else None,
            "repo_id": self.repo_id,
            "revision": self.revision,
            "files": [{"file": f.name, "size": f.size, "shard": f.name in self.shards} for f in self.files],
            "tensors": self.to_rows(),
            "copies": list(self.copies),
            "disagreements": self.disagreements,
            "notes": list(self.notes),
            "quantised": self.layouts and self.layouts.to_json(),
            "steps": [step.to_json() for step in self.steps],
        }

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per tensor: its name, shard, dtype, stored shape and size in bytes."""
        return [
            {"tensor": info.name, "file": file, "dtype": info.dtype.name, "shape": list(info.shape), "bytes": info.size}
            for file, shard in self.shards.items()
            for info in shard.tensors.values()
        ]

    @property
    def directory(self) -> Path:
        """Return `root` as a path. Raises TypeError if the files are not on this machine."""
        if isinstance(self.root, RemoteTree):
            raise TypeError(f"{self.root} is not a directory on this machine")
        return self.root

    def get_info(self, tensor: str) -> TensorInfo:
        """Return the header entry of a tensor in `weight_map`. Raises KeyError."""
        return self.shards[self.weight_map[tensor]].tensors[tensor]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The stored shape of every tensor in `weight_map`, except those in `disagreements`."""
        return {tensor: info.shape for tensor, info in self.infos.items()}

    @cached_property
    def scalars(self) -> int:
        """The number of scalars that the tensors in `shapes` store."""
        return sum(map(math.prod, self.shapes.values()))

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """The header entry of every tensor in `weight_map`, except those in `disagreements`."""
        return {t: self.get_info(t) for t in self.weight_map if t not in self.disagreements}

    @cached_property
    def all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Like `shapes`, with the tensors in `disagreements` too, so that an edit of one reports the disagreement."""
        apart = {
            tensor: shard.tensors[tensor].shape
            for shard in self.shards.values()
            for tensor in self.disagreements
            if tensor in shard.tensors
        }
        return {**self.shapes, **apart}

    @cached_property
    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Like `all_shapes`, but a quantised weight has the name and shape that it has in a loaded model."""
        if not self.quantisation.has_codes:
            return self.all_shapes
        from swsurgery.checkpoint.layouts.find import WeightShapes  # imports numpy

        return WeightShapes(self)

    @cached_property
    def layouts(self) -> LayoutSummary | None:
        """The layouts of the quantised weights, and the matrices in high precision; None if nothing is quantised."""
        if not self.quantisation.has_codes:
            return None
        load_numpy()
        from swsurgery.checkpoint.layouts.summary import summarise_layouts  # imports numpy

        return summarise_layouts(self)

    @property
    def single(self) -> str:
        """The name of a single file with all weights. If it exists, transformers loads it instead of an index."""
        return f"model.{self.variant}.safetensors" if self.variant else SINGLE

    @cached_property
    def quantisation(self) -> Quantisation:
        """Answers for each tensor what its numbers are: weights, codes, or a quantiser's own values such as scales."""
        tensors: dict[str, TensorInfo] = {}
        for shard in self.shards.values():
            tensors |= shard.tensors
        tensors |= self.infos
        return Quantisation(
            tensors, self.config, (f.name for f in self.files), (shard.metadata for shard in self.shards.values())
        )

    @cached_property
    def choice(self) -> Weights | None:
        """The set of weights that was chosen if an index and a single file both exist; None if only one set exists.

        An index that lists only the single file is not counted as a second set.
        """
        names = {f.name for f in self.files}
        if self.index_name is not None:
            return "index" if self.single in names and self.single not in self.shards else None
        return "single" if self.single in self.shards and any(is_index(n, self.variant) for n in names) else None

    def get_file(self, name: str) -> BaseFile:
        """Return the file of this name. Raises StopIteration if the checkpoint does not have it."""
        return next(f for f in self.files if f.name == name)

    def refuse_changed(self) -> None:
        """Raise CheckpointError if a local file was replaced since it was listed."""
        for file in self.files:
            if file.entry:
                file.entry.refuse_replaced()
