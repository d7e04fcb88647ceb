"""Turn the edits of a manifest into the scalars of a checkpoint that they name.

Knows headers and known super weights; reads no tensor data and must not import the planner or the findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.architectures import Expert
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ArchitectureError, LookupFailed, PlanError
from swsurgery.known import KnownModel, shipped
from swsurgery.manifest.operations import MeasuredValue
from swsurgery.manifest.schema import Manifest
from swsurgery.storage.coordinate import Coordinate


@dataclass(frozen=True)
class Asked:
    """One scalar that edit number `number` of a manifest names, and what it expects there."""

    number: int
    edit: Any
    expect: Any = None


class KnownPlace(Protocol):
    """What an edit that says `known:` needs of a known super weight. `col` is None if only the row is known."""

    @property
    def layer(self) -> int: ...
    @property
    def row(self) -> int: ...
    @property
    def col(self) -> int | None: ...
    @property
    def expert(self) -> Expert: ...
    @property
    def value(self) -> float | None: ...
    @property
    def dtype(self) -> str | None: ...


KnownPlaces = Callable[[str], Sequence[KnownPlace]]
"""What an edit's `known:` names, "all" or an id. Raises LookupFailed or PlanError if it names nothing."""


def resolve(
    manifest: Manifest, checkpoint: Checkpoint, known_places: KnownPlaces
) -> tuple[dict[Coordinate, Asked], list[tuple[int, str]]]:
    """Resolve every edit: what is asked of each scalar, and (number of the edit, fault) of what has no meaning here."""
    asked: dict[Coordinate, Asked] = {}
    faults: list[tuple[int, str]] = []
    # `known: all` stands for every known coordinate that no other edit names, so it goes last.
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
    """The known super weights of a model, as this version knows them."""

    def places(word: str) -> Sequence[KnownPlace]:
        if model is None:
            raise PlanError("nothing says which known model this is", word, "say which: base.model")
        return shipped.addressable(model) if word == "all" else [shipped.find(model, word)]

    return places


def _targets(edit: Any, checkpoint: Checkpoint, known_places: KnownPlaces) -> Iterator[tuple[Coordinate | str, Any]]:
    """Each scalar that an edit names, with what is expected there; or what is wrong with it, in words."""
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
    except ValueError:  # of MeasuredValue: the registry was changed by hand
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
