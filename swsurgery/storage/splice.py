"""Describe single scalars in a file: their position and their bytes before and after an edit.

A plan contains one description per edited scalar. Copying with edits needs nothing else from the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import Dtype, convert_to_json, format_bits


@dataclass(frozen=True, slots=True)
class Scalar:
    """One stored scalar. `offset` is its position in `file`, in bytes; `old` contains its little-endian bytes."""

    file: str
    coordinate: Coordinate
    dtype: Dtype
    offset: int
    old: bytes

    @property
    def end(self) -> int:
        """Offset of the first byte after the scalar."""
        return self.offset + len(self.old)

    def to_json(self) -> dict[str, Any]:
        """Convert the scalar to a JSON object, in the form of the record."""
        return {
            "file": self.file,
            "tensor": self.coordinate.tensor,
            "index": list(self.coordinate.index),
            "dtype": self.dtype.name,
            "offset": self.offset,
            "old": convert_to_json(self.dtype, self.old),
            "old_bits": format_bits(self.old),
        }


@dataclass(frozen=True, slots=True)
class Splice(Scalar):
    """An edit of one scalar by the operation `op`.

    `factor` is the factor of a scale, otherwise None. `bits` are the numbers of the bits that a flip inverts.

    While the file is copied, the bytes in the base must equal `old`, and the bytes `new` are written instead.
    """

    op: str = ""
    new: bytes = b""
    factor: float | None = None
    bits: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Convert the edit to a JSON object, in the form of the record."""
        document = Scalar.to_json(self)
        if self.factor is not None:
            document["factor"] = self.factor
        if self.bits:
            document["bit"] = list(self.bits)
        document["op"] = self.op
        document["new"] = convert_to_json(self.dtype, self.new)
        document["new_bits"] = format_bits(self.new)
        return document


def group_by_file(splices: Iterable[Splice]) -> dict[str, list[Splice]]:
    """Group splices by file, each group sorted by offset."""
    groups: dict[str, list[Splice]] = {}
    for splice in splices:
        groups.setdefault(splice.file, []).append(splice)
    for group in groups.values():
        group.sort(key=lambda s: s.offset)
    return groups


def list_rows(
    edits: Iterable[Mapping[str, object]],
    protected: Iterable[Mapping[str, object]],
    changes: Iterable[Mapping[str, object]] = (),
    protected_regions: Iterable[Mapping[str, object]] = (),
) -> list[dict[str, object]]:
    """Return one table row per edited scalar, protected scalar, changed region and protected region.

    The arguments contain JSON objects of the record. If there are regions, the table has the further columns "bounds",
    "scalars" and "changed", which are None for scalars, while "index", "old", "new" and "offset" are None for regions.
    """
    columns = ["op", "tensor", "index", "dtype", "old", "new", "file", "offset"]
    regions = [*changes, *({**region, "op": "protect"} for region in protected_regions)]
    if regions:
        columns += ["bounds", "scalars", "changed"]
    everything = [*edits, *({**scalar, "op": "protect"} for scalar in protected), *regions]
    return [{column: entry.get(column) for column in columns} for entry in everything]
