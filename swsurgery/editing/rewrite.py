"""Describe rewrites: regions of stored tensors whose new bytes are computed while a file is copied.

A splice replaces one scalar by bytes that the plan knows. A rewrite names a region, and the operation that computes its
new bytes. This module must not import numpy, because planning needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from swsurgery.storage.files import File
from swsurgery.storage.region import Region
from swsurgery.storage.shard import TensorInfo

MEASURED = ("scale", "clip", "prune_outliers", "round")
"""Operations on regions that the values of the base can make impossible: a product may overflow, a clip may remove
everything, and only finite values can be clipped, pruned and rounded."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file. `start` is the offset of its data from the start of the file, in bytes."""

    file: File
    start: int
    info: TensorInfo


@dataclass(frozen=True)
class ProtectedRegion:
    """A region that keeps the bytes of the base. `start` is the offset of its tensor's data in `file`."""

    target: str
    file: str
    region: Region
    info: TensorInfo = field(repr=False)
    start: int = field(repr=False)

    @property
    def size(self) -> int:
        """Size of the region in bytes."""
        return self.region.scalars * self.info.dtype.size

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object with the fields of the record that are known before copying."""
        return {
            "target": self.target,
            "file": self.file,
            "tensor": self.region.tensor,
            "bounds": [list(axis) for axis in self.region.bounds],
            "dtype": self.info.dtype.name,
            "scalars": self.region.scalars,
        }


@dataclass(frozen=True)
class Rewrite(ProtectedRegion):
    """A region that edit number `number` (from 0) of the manifest changes; `part` counts the regions of the edit.

    `options` are those of the operation `op`, as JSON. `kept` contains the flat indices in the region of protected
    scalars, in rising order. `source` is the tensor with the bytes that the operation "restore" copies.
    """

    number: int = 0
    part: int = 0
    op: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[int, ...] = field(default=(), repr=False)
    source: StoredTensor | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Name of the region among those of all edits, and prefix of its tensors in the undo file: `edit.0.2`."""
        return f"edit.{self.number}.{self.part}"

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object with the fields of the record that are known before copying."""
        return {"edit": self.number, "op": self.op, "options": dict(self.options)} | super().to_json()


def group_rewrites(rewrites: Iterable[Rewrite]) -> dict[str, list[Rewrite]]:
    """Group rewrites by file, in the order of the plan."""
    groups: dict[str, list[Rewrite]] = {}
    for rewrite in rewrites:
        groups.setdefault(rewrite.file, []).append(rewrite)
    return groups
