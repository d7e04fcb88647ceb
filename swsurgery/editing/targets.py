"""Find what the target of one edit names in a checkpoint: single scalars, or regions of stored tensors.

Reads the headers of the checkpoint but no tensor data. To add a target, write a class with the methods of `EditTarget`
and return it from `read_target`.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar

from swsurgery.checkpoint import projections, structures
from swsurgery.checkpoint.architectures import FAMILIES, ExpertChoice
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projection_names import list_matches
from swsurgery.checkpoint.tying import find_tied_partner
from swsurgery.errors import ArchitectureError, LookupFailed, PlanError
from swsurgery.manifest.targets import AxisSlice, MeasuredValue, Target, parse_slice
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.region import Region
from swsurgery.storage.shard import TensorInfo

if TYPE_CHECKING:
    from swsurgery.known import KnownCoordinate, KnownEntry, KnownModel

T = TypeVar("T")

Expected = int | float | str | MeasuredValue | None
"""The value that an edit expects a scalar to have: a number, bits such as "0x40bc", a MeasuredValue; None for any."""


class TargetPlace(NamedTuple):
    """One scalar that a target names, and the value that the edit expects it to have."""

    coordinate: Coordinate
    expect: Expected


@dataclass(frozen=True)
class KnownPlace:
    """The position and the expected value of a known super weight, or of a larger part, that an edit names by id.

    `col` is None for a whole row, `row` for a whole column, and both for a whole expert. Only a single scalar has an
    expected value.
    """

    layer: int
    row: int | None
    col: int | None
    expert: ExpertChoice
    expect: MeasuredValue | None = None

    def find_part(self) -> LayerPart | LayerExpert | None:
        """Return the row, column or expert; None for a single scalar."""
        if self.row is not None and self.col is not None:
            return None
        if self.row is not None:
            return LayerPart("row", self.layer, self.row, self.expert)
        if self.col is not None:
            return LayerPart("column", self.layer, self.col, self.expert)
        assert self.expert is not None  # the id of a known expert contains it
        return LayerExpert(self.layer, self.expert)


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
    """What an edit refers to. `str()` returns the shortest form, such as `L2.3968.7003`."""

    def resolve(self, scope: Scope) -> Iterator[TargetPlace | Region]:
        """Yield each scalar or region of the target that can be located in the checkpoint.

        Afterwards, raises ArchitectureError, LookupFailed or PlanError if a part of it could not be located.
        """

    def find_entry(self, model: KnownModel | None) -> KnownEntry | None:
        """Return the known super weight, or larger part, of `model` that this target refers to.

        Does not read a checkpoint.

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
        from swsurgery.known.schema import format_coordinate_id

        return format_coordinate_id(self.layer, self.expert, self.row, self.col)

    def resolve(self, scope: Scope) -> Iterator[TargetPlace]:
        coordinate = locate(scope.checkpoint, self.layer, self.row, self.col, self.expert)
        yield TargetPlace(coordinate, self.expect)

    def find_entry(self, model: KnownModel | None) -> KnownCoordinate | None:
        wanted = (self.layer, self.expert, self.row, self.col)
        entries = model.coordinates if model else ()
        return next((e for e in entries if (e.layer, e.expert, e.row, e.col) == wanted), None)


class _Unpublished:
    """A target that no entry of the known super weights describes."""

    def find_entry(self, model: KnownModel | None) -> KnownCoordinate | None:
        return None


@dataclass(frozen=True)
class LayerPart(_Unpublished):
    """A row, a column or a neuron of a layer, named by its number as in papers."""

    kind: Literal["row", "column", "neuron"]
    layer: int
    number: int
    expert: ExpertChoice

    def __str__(self) -> str:
        expert = "" if self.expert is None else f".E{self.expert}"
        return f"L{self.layer}{expert} {self.kind} {self.number}"

    def resolve(self, scope: Scope) -> Iterator[Region]:
        place = (scope.checkpoint.config, scope.checkpoint.all_shapes, self.layer, self.number, self.expert)
        if self.kind == "row":
            yield structures.locate_row(*place)
        elif self.kind == "column":
            yield structures.locate_column(*place)
        else:
            yield from structures.locate_neuron(*place)


@dataclass(frozen=True)
class LayerExpert(_Unpublished):
    """Every matrix of one expert of a layer."""

    layer: int
    expert: int | Literal["shared"]

    def __str__(self) -> str:
        return f"L{self.layer}.E{self.expert}"

    def resolve(self, scope: Scope) -> Iterator[Region]:
        yield from structures.locate_expert(
            scope.checkpoint.config, scope.checkpoint.all_shapes, self.layer, self.expert
        )


@dataclass(frozen=True)
class StoredSlice(_Unpublished):
    """A part of one tensor, given by a slice as in numpy: indices and ranges of the first axes, without steps."""

    tensor: str
    text: str

    def __str__(self) -> str:
        return f"{self.tensor}[{self.text}]"

    def resolve(self, scope: Scope) -> Iterator[Region]:
        shape = find_tensor(self.tensor, scope.checkpoint).shape
        axes = parse_slice(self.text)
        if len(axes) > len(shape):
            what = f"the slice has {len(axes)} axes, but {self.tensor} has shape {list(shape)}"
            raise PlanError(what)
        chosen = [*axes, *[AxisSlice()] * (len(shape) - len(axes))]
        bounds = tuple(_cut(axis, size, self) for axis, size in zip(chosen, shape, strict=True))
        yield Region(self.tensor, bounds)


def _cut(axis: AxisSlice, size: int, target: StoredSlice) -> tuple[int, int]:
    """Return the bounds that a slice selects on an axis of `size` indices. Raises PlanError if it is out of range."""
    begin, end = axis.begin, axis.end
    if axis.index is not None:
        begin, end = axis.index, axis.index + 1 or None
    wrong = [n for n in (begin, axis.end) if n is not None and not -size <= n <= size]
    if axis.index is not None and not -size <= axis.index < size:
        wrong = [axis.index]
    if wrong:
        raise PlanError(f"{wrong[0]} is out of range for an axis of {size}", target)
    first, last = (0 if begin is None else begin), (size if end is None else end)
    first, last = (n + size if n < 0 else n for n in (first, last))
    if first >= last:
        raise PlanError("the slice selects nothing", target)
    return first, last


@dataclass(frozen=True)
class WholeTensors(_Unpublished):
    """Whole tensors: one by its name, or all that a glob matches. `*` matches any text, dots too."""

    pattern: str

    def __str__(self) -> str:
        return self.pattern

    def resolve(self, scope: Scope) -> Iterator[Region]:
        checkpoint = scope.checkpoint
        if self.pattern in checkpoint.weight_map:
            names = [self.pattern]
        else:
            matches = re.compile(translate(self.pattern)).match
            names = sorted(name for name in checkpoint.weight_map if matches(name))
        if not names and not set("*?[") & set(self.pattern):
            find_tensor(self.pattern, checkpoint)  # raises an error that suggests a similar name
        if not names:
            raise PlanError("no tensor matches", self.pattern, "swsurgery inspect lists the tensors")
        yield from [Region.of_tensor(find_tensor(name, checkpoint)) for name in names]


@dataclass(frozen=True)
class KnownScalars:
    """All known super weights of a model (`name` is "all"), or the scalar, row, column or expert with the id `name`."""

    name: str

    def __str__(self) -> str:
        return self.name

    def resolve(self, scope: Scope) -> Iterator[TargetPlace | Region]:
        faults: list[str] = []
        for known in scope.find_known(self.name):
            try:
                if part := known.find_part():
                    yield from part.resolve(scope)
                    continue
                row, col = _require(known.row), _require(known.col)
                coordinate = locate(scope.checkpoint, known.layer, row, col, known.expert)
                yield TargetPlace(coordinate, known.expect)
            except ArchitectureError as error:
                faults += error.faults
        if faults:
            raise PlanError.of(faults)

    def find_entry(self, model: KnownModel | None) -> KnownEntry | None:
        entries = select_known(model, self.name)
        return None if self.name == "all" else entries[0]


def read_target(edit: Target) -> EditTarget:
    """Return the target of an edit."""
    return _READERS[edit.form.name](edit)


def _require(value: T | None) -> T:
    """Return the value of a field that the form of the target requires."""
    assert value is not None
    return value


_READERS: dict[str, Callable[[Target], EditTarget]] = {
    "scalar": lambda t: LayerScalar(_require(t.layer), _require(t.row), _require(t.col), t.expert, t.expect),
    "scalar by index": lambda t: StoredScalar(Coordinate(_require(t.tensor), _require(t.index)), t.expect),
    "row": lambda t: LayerPart("row", _require(t.layer), _require(t.row), t.expert),
    "column": lambda t: LayerPart("column", _require(t.layer), _require(t.col), t.expert),
    "neuron": lambda t: LayerPart("neuron", _require(t.layer), _require(t.neuron), t.expert),
    "expert": lambda t: LayerExpert(_require(t.layer), _require(t.expert)),
    "slice": lambda t: StoredSlice(_require(t.tensor), _require(t.slice)),
    "tensors": lambda t: WholeTensors(_require(t.tensors)),
    "known": lambda t: KnownScalars(_require(t.known)),
}
"""The function that reads each form of a target (`manifest.targets.FORMS`)."""


def select_known(model: KnownModel | None, name: str) -> tuple[KnownEntry, ...]:
    """Return what the text after `known:`, which is "all" or an id, names of a model.

    With "all", each entry is a single scalar. Raises LookupFailed if `model` is None or has nothing with this id.
    """
    if model is None:
        raise LookupFailed("no known super weights of this base", name, "set base.model to the name of the known model")
    from swsurgery.known import shipped

    entries: tuple[KnownEntry, ...]
    entries = shipped.list_addressable(model) if name == "all" else (shipped.find(model, name),)
    if not entries:
        raise LookupFailed(f"no complete coordinate (layer, row and col) of {model.hf_id} is known", name)
    return entries


def find_known(model: KnownModel | None, name: str) -> list[KnownPlace]:
    """Return position and expected value of everything that `select_known` selects. Raises LookupFailed."""
    return [_make_place(entry) for entry in select_known(model, name)]


def _make_place(entry: KnownEntry) -> KnownPlace:
    from swsurgery.known import KnownCoordinate, KnownExpert

    if isinstance(entry, KnownCoordinate):
        return KnownPlace(entry.layer, entry.row, entry.col, entry.expert, expect_known(entry))
    return KnownPlace(entry.layer, None, None if isinstance(entry, KnownExpert) else entry.col, entry.expert)


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
    return projections.locate(checkpoint.config, checkpoint.weight_shapes, layer=layer, row=row, col=col, expert=expert)


def find_tensor(name: str, checkpoint: Checkpoint) -> TensorInfo:
    """Find the header entry of a tensor that an edit names.

    Raises PlanError if the tensor is not stored, or if the index and the headers place it in different shards.
    """
    if name in checkpoint.disagreements:
        raise PlanError(f"index and shards disagree about {name}", checkpoint.disagreements[name])
    if name not in checkpoint.weight_map and name in checkpoint.weight_shapes:
        remedy = "name a stored tensor of the layer, with raw: true"
        raise PlanError("the weight is quantised, so it is stored as codes and scales", name, remedy)
    if name not in checkpoint.weight_map:
        if partner := find_tied_partner(name, checkpoint):
            raise PlanError(f"{name} is tied to {partner} and not stored", remedy=f"edit {partner}")
        raise PlanError("no such tensor", name, _suggest_tensor(name, checkpoint))
    return checkpoint.get_info(name)


def _suggest_tensor(name: str, checkpoint: Checkpoint) -> str:
    """Suggest the tensor with the most similar name, as in "did you mean ...?"; "" if no name is similar.

    Only names with the same last two parts, such as `down_proj.weight`, are compared, or all names if no name has them.
    At most 500 names are compared, because comparing more would be slow. For a GGUF file, the name that a down
    projection has in transformers suggests the name that llama.cpp gives to it.
    """
    for _, _, layer, expert in list_matches(FAMILIES, name) if checkpoint.is_gguf else ():
        with contextlib.suppress(ArchitectureError):
            projection = projections.find_down_projection(checkpoint.config, checkpoint.weight_shapes, layer, expert)
            return f"name it {projection.tensor}, or give layer, row and col"
    ending = name.rsplit(".", 2)[-2:]
    alike = [t for t in checkpoint.weight_map if t.rsplit(".", 2)[-2:] == ending] or list(checkpoint.weight_map)
    near = difflib.get_close_matches(name, alike[:500], 1, 0.8)
    return f"did you mean {near[0]}?" if near else ""
