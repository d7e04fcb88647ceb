"""Resolve the edits of a manifest into the scalars of a checkpoint that they name.

Uses the checkpoint's headers and the known super weights. Reads no tensor data, and must not import the planner or the
findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.architectures import ExpertChoice
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ArchitectureError, LookupFailed, PlanError
from swsurgery.known import KnownModel, shipped
from swsurgery.manifest.operations import MeasuredValue
from swsurgery.manifest.schema import Manifest
from swsurgery.storage.coordinate import Coordinate


@dataclass(frozen=True)
class Asked:
    """The request for one scalar: the edit that names it, its number in the manifest (from 0), and the expected value.

    `expect` is a number, bits as text, a MeasuredValue, or None.
    """

    number: int
    edit: Any
    expect: Any = None


class KnownPlace(Protocol):
    """A known super weight, as far as an edit with `known:` uses it. `col` is None if only the row is known."""

    @property
    def layer(self) -> int: ...
    @property
    def row(self) -> int: ...
    @property
    def col(self) -> int | None: ...
    @property
    def expert(self) -> ExpertChoice: ...
    @property
    def value(self) -> float | None: ...
    @property
    def dtype(self) -> str | None: ...


KnownPlaces = Callable[[str], Sequence[KnownPlace]]
"""Type of a function that finds the super weights for an edit's `known:` ("all" or an id).

Raises LookupFailed or PlanError if none is found.
"""


def resolve(
    manifest: Manifest, checkpoint: Checkpoint, known_places: KnownPlaces
) -> tuple[dict[Coordinate, Asked], list[tuple[int, str]]]:
    """Resolve every edit.

    Returns the request for each scalar, and (number of the edit, fault) for each edit that cannot be resolved.
    """
    asked: dict[Coordinate, Asked] = {}
    faults: list[tuple[int, str]] = []
    # `known: all` means every known coordinate that no other edit names, so it is resolved last.
    for number, edit in sorted(enumerate(manifest.edits), key=lambda item: (item[1].known == "all", item[0])):
        for coordinate, expect in _targets(edit, checkpoint, known_places):
            if isinstance(coordinate, str):
                faults.append((number, coordinate))
            elif coordinate not in asked:
                asked[coordinate] = Asked(number, edit, expect)
            elif edit.known != "all":
                message = f"{coordinate} has two operations (the other is edits[{asked[coordinate].number}])"
                faults.append((number, message))
    return asked, faults


def look_up(model: KnownModel | None) -> KnownPlaces:
    """Return a function that finds the super weights of `model` that this version knows."""

    def places(word: str) -> Sequence[KnownPlace]:
        if model is None:
            raise PlanError("nothing says which known model this is", word, "say which: base.model")
        return shipped.list_addressable(model) if word == "all" else [shipped.find(model, word)]

    return places


def _targets(edit: Any, checkpoint: Checkpoint, known_places: KnownPlaces) -> Iterator[tuple[Coordinate | str, Any]]:
    """Yield each scalar that an edit names, with its expected value, or a fault as text instead of the scalar."""
    if edit.tensor is not None:
        yield Coordinate(edit.tensor, edit.index), edit.expect
        return
    try:
        if edit.layer is not None:
            places, expects = [edit], [edit.expect]
        else:
            places = [place for place in known_places(edit.known) if place.col is not None]
            expects = [MeasuredValue(value=p.value, dtype=p.dtype) if p.dtype else None for p in places]
    except (LookupFailed, PlanError) as error:
        yield from ((fault, None) for fault in error.faults)
        return
    except ValueError:  # raised by MeasuredValue: the record was changed by hand
        yield f"the value that the registry recorded of {edit.known} is none", None
        return
    for place, expect in zip(places, expects, strict=True):
        try:
            coordinate = projections.locate(
                checkpoint.config,
                checkpoint.shapes,
                layer=place.layer,
                row=place.row,
                col=place.col,
                expert=place.expert,
            )
        except ArchitectureError as error:
            yield from ((fault, None) for fault in error.faults)
        else:
            yield coordinate, expect
