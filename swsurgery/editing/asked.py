"""Define what the edits of a manifest ask for: scalars and regions of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from swsurgery.editing.targets import Expected
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
    """The reason why an edit cannot be made. `number` is the edit's position in the manifest, counted from 0."""

    number: int
    message: str
