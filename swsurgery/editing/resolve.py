"""Resolve the edits of a manifest into the scalars of a checkpoint that they name.

The planner, the check against a manifest, an edit in place that finds its work done and the linter share this module.
It reads the headers of the checkpoint but no tensor data. It must not import the planner, whose result is checked.

To add a target, write a class with the methods of `EditTarget` and return it from `read_target`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.architectures import ExpertChoice
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ArchitectureError, LookupFailed, PlanError
from swsurgery.known import KnownCoordinate, KnownModel, shipped
from swsurgery.known.schema import format_coordinate_id
from swsurgery.manifest.operations import Edit, MeasuredValue, Target
from swsurgery.manifest.schema import Manifest
from swsurgery.storage.coordinate import Coordinate

Expected = int | float | str | MeasuredValue | None
"""What an edit expects of a scalar: a value, bits as text, a measured value, or None for anything."""


class TargetPlace(NamedTuple):
    """One scalar that a target names, and what the edit expects there."""

    coordinate: Coordinate
    expect: Expected


@dataclass(frozen=True, slots=True)
class Asked:
    """One scalar that the edit with this number, counted from 0, names."""

    number: int
    edit: Edit
    coordinate: Coordinate
    expect: Expected = None


class Misfit(NamedTuple):
    """An edit that cannot be made, by its number from 0, and the reason."""

    number: int
    message: str


@dataclass(frozen=True)
class Resolution:
    """The scalars that the edits name, in the manifest's order, and the edits that do not fit the checkpoint.

    Two edits may name the same scalar; `find_conflicts` reports them.
    """

    asked: tuple[Asked, ...]
    misfits: tuple[Misfit, ...]

    def list_misfits(self) -> list[Misfit]:
        """List the edits that do not fit, and those of a scalar that an earlier edit names."""
        return [*self.misfits, *find_conflicts((one.number, one.coordinate) for one in self.asked)]

    def group_by_coordinate(self) -> dict[Coordinate, Asked]:
        """Map each scalar to the first edit that names it."""
        first: dict[Coordinate, Asked] = {}
        for asked in self.asked:
            first.setdefault(asked.coordinate, asked)
        return first


@dataclass(frozen=True)
class KnownPlace:
    """A known super weight, as far as an edit with `known:` uses it."""

    layer: int
    row: int
    col: int
    expert: ExpertChoice
    expect: MeasuredValue | None


FindKnown = Callable[[str], Sequence[KnownPlace]]
"""Type of a function that finds the super weights that `known:` means ("all", or an id).

Raises LookupFailed if there are none.
"""


@dataclass(frozen=True)
class Scope:
    """What a target is resolved against: the headers of a checkpoint, and known super weights."""

    checkpoint: Checkpoint
    find_known: FindKnown


class EditTarget(Protocol):
    """What an edit refers to. `str()` spells it as short as possible."""

    def resolve(self, scope: Scope) -> Iterator[TargetPlace]:
        """Yield each place that exists; then raise ArchitectureError, LookupFailed or PlanError for the others."""

    def find_entry(self, model: KnownModel | None) -> KnownCoordinate | None:
        """Find the known coordinate that is this target, without a checkpoint. Raises LookupFailed."""


@dataclass(frozen=True)
class StoredScalar:
    """A scalar named by its tensor and its index in the stored shape."""

    coordinate: Coordinate
    expect: Expected

    def __str__(self) -> str:
        return str(self.coordinate)

    def resolve(self, scope: Scope) -> Iterator[TargetPlace]:
        yield TargetPlace(self.coordinate, self.expect)

    def find_entry(self, model: KnownModel | None) -> KnownCoordinate | None:
        for entry in model.coordinates if model else ():
            index = (entry.col, entry.row) if model and model.transposed else (entry.row, entry.col)
            if (entry.tensor, index) == self.coordinate:
                return entry
        return None


@dataclass(frozen=True)
class LayerScalar:
    """A scalar of a down projection, named as in papers by layer, row, col and expert."""

    layer: int
    row: int
    col: int
    expert: ExpertChoice
    expect: Expected

    def __str__(self) -> str:
        return format_coordinate_id(self.layer, self.expert, self.row, self.col)

    def resolve(self, scope: Scope) -> Iterator[TargetPlace]:
        coordinate = locate(scope.checkpoint, self.layer, self.row, self.col, self.expert)
        yield TargetPlace(coordinate, self.expect)

    def find_entry(self, model: KnownModel | None) -> KnownCoordinate | None:
        wanted = (self.layer, self.expert, self.row, self.col)
        entries = model.coordinates if model else ()
        return next((e for e in entries if (e.layer, e.expert, e.row, e.col) == wanted), None)


@dataclass(frozen=True)
class KnownScalars:
    """Known super weights, named by "all" or by the id of one."""

    name: str

    def __str__(self) -> str:
        return self.name

    def resolve(self, scope: Scope) -> Iterator[TargetPlace]:
        faults: list[str] = []
        for known in scope.find_known(self.name):
            try:
                coordinate = locate(scope.checkpoint, known.layer, known.row, known.col, known.expert)
                yield TargetPlace(coordinate, known.expect)
            except ArchitectureError as error:
                faults += error.faults
        if faults:
            raise PlanError.of(faults)

    def find_entry(self, model: KnownModel | None) -> KnownCoordinate | None:
        entries = select_known(model, self.name)
        return None if self.name == "all" else entries[0]


def read_target(edit: Target) -> EditTarget:
    """Return the target of an edit."""
    if edit.tensor is not None and edit.index is not None:
        return StoredScalar(Coordinate(edit.tensor, edit.index), edit.expect)
    if edit.layer is not None and edit.row is not None and edit.col is not None:
        return LayerScalar(edit.layer, edit.row, edit.col, edit.expert, edit.expect)
    if edit.known is not None:
        return KnownScalars(edit.known)
    raise ValueError("the edit names no scalar")  # impossible: the schema requires one of the three forms


def resolve(manifest: Manifest, checkpoint: Checkpoint, find_known: FindKnown) -> Resolution:
    """Resolve every edit of a manifest against the headers of a checkpoint.

    `known: all` means every known super weight that no other edit names.
    """
    scope = Scope(checkpoint, find_known)
    asked: list[Asked] = []
    misfits: list[Misfit] = []
    for number, edit in enumerate(manifest.edits):
        try:
            for coordinate, expect in read_target(edit).resolve(scope):
                asked.append(Asked(number, edit, coordinate, expect))
        except (ArchitectureError, LookupFailed, PlanError) as error:
            misfits += [Misfit(number, fault) for fault in error.faults]
    named = {one.coordinate for one in asked if one.edit.known != "all"}
    kept = (one for one in asked if one.edit.known != "all" or one.coordinate not in named)
    return Resolution(tuple(kept), tuple(misfits))


def find_conflicts(named: Iterable[tuple[int, Hashable]]) -> Iterator[Misfit]:
    """Yield a misfit for every edit of a scalar that an earlier edit names too. `named` are (edit, scalar) pairs."""
    first: dict[Hashable, int] = {}
    for number, scalar in named:
        other = first.setdefault(scalar, number)
        if other != number:
            yield Misfit(number, f"{scalar} has two operations (the other is edits[{other}])")


def select_known(model: KnownModel | None, name: str) -> tuple[KnownCoordinate, ...]:
    """Return the coordinates of a model that `known:` means ("all", or an id). All of them have a column.

    Raises LookupFailed if the model is None, or has no such coordinate with a column.
    """
    if model is None:
        raise LookupFailed("no known super weights of this base", name, "name its known model in base.model")
    entries = shipped.list_addressable(model) if name == "all" else (shipped.find(model, name),)
    if not entries:
        raise LookupFailed(f"no complete coordinate of {model.hf_id} is known", name)
    for entry in entries:
        if entry.col is None:
            raise LookupFailed(f"only the row of {entry.id} is known, not the column", model.hf_id)
    return entries


def find_known(model: KnownModel | None, name: str) -> list[KnownPlace]:
    """Find the super weights of a model that `known:` means, as this version knows them. Raises LookupFailed."""
    return [
        KnownPlace(entry.layer, entry.row, entry.col, entry.expert, expect_known(entry))
        for entry in select_known(model, name)
        if entry.col is not None
    ]


def expect_known(entry: KnownCoordinate) -> MeasuredValue | None:
    """Return the value that an edit of a known super weight expects; None if none is published."""
    if entry.value is None or entry.dtype is None:
        return None
    return MeasuredValue(value=entry.value, dtype=entry.dtype)


def locate(checkpoint: Checkpoint, layer: int, row: int, col: int, expert: ExpertChoice) -> Coordinate:
    """Find the stored scalar that a paper calls (layer, row, col). Raises ArchitectureError."""
    # Include tensors that index and shards place differently, so that the fault reported is the disagreement.
    shapes = {
        tensor: shard.tensors[tensor].shape
        for shard in checkpoint.shards.values()
        for tensor in checkpoint.disagreements
        if tensor in shard.tensors
    }
    return projections.locate(
        checkpoint.config,
        {**checkpoint.shapes, **shapes} if shapes else checkpoint.shapes,
        layer=layer,
        row=row,
        col=col,
        expert=expert,
    )
