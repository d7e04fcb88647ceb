"""Splice: one scalar's place and bytes in a file, before and after. What a plan is made of and what copying needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import Dtype, bits_of, json_value


@dataclass(frozen=True, slots=True)
class Scalar:
    """One stored scalar of the plan. `offset` is absolute in the file, bytes are little-endian."""

    file: str
    coordinate: Coordinate
    dtype: Dtype
    offset: int
    old: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.old)

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "tensor": self.coordinate.tensor,
            "index": list(self.coordinate.index),
            "dtype": self.dtype.name,
            "offset": self.offset,
            "old": json_value(self.dtype, self.old),
            "old_bits": bits_of(self.old),
        }


@dataclass(frozen=True, slots=True)
class Splice(Scalar):
    """One scalar to change: `old` is compared while copying and `new` written in its place."""

    op: str = ""
    new: bytes = b""
    factor: float | None = None

    def to_json(self) -> dict[str, Any]:
        document = Scalar.to_json(self)
        if self.factor is not None:
            document["factor"] = self.factor
        document["op"] = self.op
        document["new"] = json_value(self.dtype, self.new)
        document["new_bits"] = bits_of(self.new)
        return document


def by_file(splices: Iterable[Splice]) -> dict[str, list[Splice]]:
    """Group splices by their file, each group in the order of its offsets."""
    groups: dict[str, list[Splice]] = {}
    for splice in splices:
        groups.setdefault(splice.file, []).append(splice)
    for group in groups.values():
        group.sort(key=lambda s: s.offset)
    return groups
