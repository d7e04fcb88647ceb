"""Find the scalars of a checkpoint that the edits of a manifest name.

The planner, `verify --manifest` and the linter use this module. `apply --in-place` uses it to recognise a manifest that
was already applied. This module reads the headers of the checkpoint but no tensor data. It must not import the planner,
because `verify --manifest` checks the planner's result.

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
from swsurgery.manifest.operations import Edit
from swsurgery.manifest.schema import Manifest
from swsurgery.manifest.targets import MeasuredValue, Target
from swsurgery.storage.coordinate import Coordinate

Expected = int | float | str | MeasuredValue | None
"""The value that an edit expects a scalar to have: a number, bits such as "0x40bc", a MeasuredValue; None for any."""


class TargetPlace(NamedTuple):
    """One scalar that a target names, and the value that the edit expects it to have."""

    coordinate: Coordinate
    expect: Expected


@dataclass(frozen=True, slots=True)
class Asked:
    """One scalar that an edit names. `number` is the edit's position in the manifest, counted from 0."""

    number: int
    edit: Edit
    coordinate: Coordinate
    expect: Expected = None


class Misfit(NamedTuple):
    """The reason why an edit cannot be made. `number` is the edit's position in the manifest, counted from 0."""

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
        """List the edits that do not fit the checkpoint, and the edits of a scalar that an earlier edit also names."""
        return [*self.misfits, *find_conflicts((one.number, one.coordinate) for one in self.asked)]

    def group_by_coordinate(self) -> dict[Coordinate, Asked]:
        """Map each scalar to the first edit that names it."""
        first: dict[Coordinate, Asked] = {}
        for asked in self.asked:
            first.setdefault(asked.coordinate, asked)
        return first


@dataclass(frozen=True)
class KnownPlace:
    """The position and the expected value of a known super weight that an edit names with `known:`."""

    layer: int
    row: int
    col: int
    expert: ExpertChoice
    expect: MeasuredValue | None


FindKnown = Callable[[str], Sequence[KnownPlace]]
"""Type of a function that returns the known super weights for the text after `known:`, which is "all" or an id.

The function raises LookupFailed if there are none.
"""


@dataclass(frozen=True)
class Scope:
    """The checkpoint in which the scalars of a target are searched, and the function that finds known super weights."""

    checkpoint: Checkpoint
    find_known: FindKnown


class EditTarget(Protocol):
    """The scalars that an edit refers to. `str()` returns the shortest form, such as `L2.3968.7003`."""

    def resolve(self, scope: Scope) -> Iterator[TargetPlace]:
        """Yield each scalar of the target that can be located in the checkpoint.

        Afterwards, raises ArchitectureError, LookupFailed or PlanError if any scalar could not be located.
        """

    def find_entry(self, model: KnownModel | None) -> KnownCoordinate | None:
        """Return the known super weight of `model` that this target refers to, without reading a checkpoint.

        Returns None if there is none, or if the target is `known: all`. Raises LookupFailed for a target of the form
        `known: ...` as `select_known` does, for example if `model` has no super weight with this id.
        """


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
    """All known super weights of a model (`name` is "all"), or the one whose id is `name`."""

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
    """Find the scalars that each edit of a manifest names in a checkpoint.

    `known: all` names every known super weight that no other edit of the manifest names.
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
    """Yield a misfit for every edit of a scalar that an earlier edit also names.

    `named` contains pairs of an edit's number and a scalar, in the manifest's order.
    """
    first: dict[Hashable, int] = {}
    for number, scalar in named:
        other = first.setdefault(scalar, number)
        if other != number:
            yield Misfit(number, f"{scalar} has two operations (the other is edits[{other}])")


def select_known(model: KnownModel | None, name: str) -> tuple[KnownCoordinate, ...]:
    """Return the coordinates of a model for the text after `known:`, which is "all" or an id.

    Each coordinate returned has a column. Raises LookupFailed if `model` is None, if it has no such coordinate, or if
    only the coordinate's row is known.
    """
    if model is None:
        raise LookupFailed("no known super weights of this base", name, "set base.model to the name of the known model")
    entries = shipped.list_addressable(model) if name == "all" else (shipped.find(model, name),)
    if not entries:
        raise LookupFailed(f"no complete coordinate (layer, row and col) of {model.hf_id} is known", name)
    for entry in entries:
        if entry.col is None:
            raise LookupFailed(f"only the row of {entry.id} is known, not the column", model.hf_id)
    return entries


def find_known(model: KnownModel | None, name: str) -> list[KnownPlace]:
    """Return position and expected value of each super weight that `select_known` selects. Raises LookupFailed."""
    return [
        KnownPlace(entry.layer, entry.row, entry.col, entry.expert, expect_known(entry))
        for entry in select_known(model, name)
        if entry.col is not None
    ]


def expect_known(entry: KnownCoordinate) -> MeasuredValue | None:
    """Return the value that an edit of a known super weight expects; None if no exact value is known."""
    if entry.value is None or entry.dtype is None:
        return None
    return MeasuredValue(value=entry.value, dtype=entry.dtype)


def locate(checkpoint: Checkpoint, layer: int, row: int, col: int, expert: ExpertChoice) -> Coordinate:
    """Find the stored scalar that a paper calls (layer, row, col).

    The scalar is in a down projection: `row` is its output channel, and `col` its input. Raises ArchitectureError if
    `projections.locate` does not find exactly one such scalar, for example because the architecture is not supported.
    """
    # Include tensors that the index and the headers place in different shards. The planner reports the disagreement.
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
