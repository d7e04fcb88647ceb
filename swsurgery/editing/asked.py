"""Define what the edits of a manifest ask for: scalars and regions of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from swsurgery.editing.targets import Expected
from swsurgery.errors import Fault
from swsurgery.manifest.operations import Edit
from swsurgery.manifest.targets import MeasuredValue
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.region import Region


@dataclass(frozen=True, slots=True)
class Asked:
    """One scalar that an edit names. `number` is the edit's position in the manifest, counted from 0.

    `value` is the known value that the edit restores, None for any other operation.
    """

    number: int
    edit: Edit
    coordinate: Coordinate
    expect: Expected = None
    value: MeasuredValue | None = None


@dataclass(frozen=True, slots=True)
class AskedRegion:
    """One region that an edit names. `number` is the edit's position in the manifest, counted from 0.

    `part` counts the regions of the edit, and `target` is the edit's target as text, such as "L3 row 12". `scalar` is
    True if the region is a scalar that the edit names by its index.
    """

    number: int
    part: int
    edit: Edit
    region: Region
    target: str
    scalar: bool = False


class Misfit(NamedTuple):
    """The reason why an edit cannot be made. `number` is the edit's position in the manifest, counted from 0.

    `other` is the number of another edit with which this edit is in conflict, or None.
    """

    number: int
    message: str
    other: int | None = None

    def explain(self, name_edit: Callable[[int], str] = "edits[{}]".format) -> str:
        """Return the message, with the name of the other edit."""
        if self.other is None:
            return self.message
        return Fault(f"{self.message} (the other is {name_edit(self.other)})")  # the parentheses contain no remedy
