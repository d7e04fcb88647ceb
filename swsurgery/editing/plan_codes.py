"""Plan edits of single elements of quantised matrices: choose the nearest code, and change the bits that store it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.layouts.cells import BitField, CannotTell, Cell, QuantisedMatrix
from swsurgery.checkpoint.layouts.find import find_codes, find_matrix, make_reader
from swsurgery.checkpoint.layouts.module import list_elements
from swsurgery.checkpoint.projections import find_short_form
from swsurgery.editing.asked import Asked, Misfit
from swsurgery.editing.code_edit import CodeEdit, PlannedCodes
from swsurgery.editing.sources import Sources
from swsurgery.editing.targets import locate
from swsurgery.errors import ArchitectureError, NumberError, PlanError, SwsurgeryError
from swsurgery.manifest.operations import Edit, Protect, Restore, Scale, Set, Zero, is_of_stored_number
from swsurgery.manifest.targets import MeasuredValue
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import Coordinate, is_valid_index
from swsurgery.storage.numbers import Written, format_exact, format_number
from swsurgery.storage.splice import Scalar, Splice

_BEFORE = "edit the model before it is quantised"
"""The remedy if a quantised weight cannot be edited."""


def is_coded(asked: Asked, checkpoint: Checkpoint) -> bool:
    """Return True if an edit names an element of a quantised matrix by its weight, and not a stored number.

    A stored number can always be protected, even if the layout of its matrix cannot be decided.
    """
    name = asked.coordinate.tensor
    if is_of_stored_number(asked.edit) or find_codes(checkpoint, name) is None:
        return False
    if asked.edit.writes or name not in checkpoint.weight_map:
        return True
    try:
        return find_matrix(checkpoint, name) is not None
    except CannotTell:
        return False


def plan_codes(asked: Sequence[Asked], checkpoint: Checkpoint, sources: Sources) -> PlannedCodes:
    """Plan the edits of quantised elements, for which `is_coded` is True, in the manifest's order."""
    planned = PlannedCodes()
    opened = _Opened(checkpoint, sources)
    changed: dict[Coordinate, _Element] = {}
    for one in asked:
        try:
            found = opened.find(one.coordinate)
            _check_expectation(one, found, opened)
            edit = _choose_code(one, found, opened)
            planned.edits.append(edit)
            if not one.edit.writes:
                planned.protect(one.number, map(opened.read_element, edit.elements))
                continue
            for place in edit.elements:
                if place not in changed:
                    changed[place] = _Element(one.number, opened.read_element(place))
                changed[place].put(found.cell, edit.new_code, opened)
        except SwsurgeryError as error:
            planned.misfits += [Misfit(one.number, fault) for fault in error.faults]
    planned.splices = [(element.number, element.make_splice()) for element in changed.values()]
    return planned


class _Found(NamedTuple):
    """An element of a quantised matrix, its code and the value of the code."""

    coordinate: Coordinate
    layout: str
    cell: Cell
    code: int
    value: float


@dataclass
class _Opened:
    """The checkpoint to edit, with the matrices that were found in it."""

    checkpoint: Checkpoint
    sources: Sources
    matrices: dict[str, QuantisedMatrix] = field(default_factory=dict)

    def find(self, coordinate: Coordinate) -> _Found:
        """Find an element of a quantised matrix. Raises PlanError if there is none, or its layout cannot be decided."""
        name, index = coordinate
        try:
            if name not in self.matrices:
                matrix = find_matrix(self.checkpoint, name)
                assert matrix is not None  # is_coded
                self.matrices[name] = matrix
            matrix = self.matrices[name]
            _require_index(index, matrix)
            cell = matrix.find_cell(index)
            code = cell.read_code(make_reader(self.checkpoint))
        except CannotTell as reason:
            remedy = self.offer_raw(_BEFORE, "set raw: true to change a stored number")
            raise PlanError(f"cannot tell what its codes mean: {reason}", coordinate, remedy) from None
        return _Found(coordinate, matrix.layout, cell, code, cell.values[code])

    def offer_raw(self, remedy: str, raw: str) -> str:
        """Return a remedy that also names `raw`, which uses raw: true. Blocks of a GGUF file accept no raw edits."""
        return remedy if self.checkpoint.is_gguf else f"{remedy}, or {raw}"

    def list_elements(self, found: _Found) -> list[Coordinate]:
        """List the stored numbers that contain the code of an element. Raises PlanError for an opaque dtype."""
        for bits in found.cell.fields:
            dtype = self.checkpoint.get_info(bits.tensor).stored.dtype
            if dtype.bits % 8 or dtype.kind == "opaque":
                raise PlanError(f"{dtype.name} {dtype.refusal}", bits.tensor)
        return list_elements(found.cell, self.checkpoint.infos)

    def read_element(self, place: Coordinate) -> Scalar:
        """Read one stored number."""
        file = self.checkpoint.weight_map[place.tensor]
        shard = self.checkpoint.shards[file]
        old = shard.read_scalar(*place)
        return Scalar(file, place, shard.tensors[place.tensor].stored.dtype, shard.find_offset(*place), old)


@dataclass
class _Element:
    """A stored number whose bits the edits change. `number` is the number of the first of these edits."""

    number: int
    scalar: Scalar
    bits: int = -1

    def put(self, cell: Cell, code: int, opened: _Opened) -> None:
        """Replace the bits of this number that hold the code of `cell`."""
        if self.bits < 0:
            self.bits = int.from_bytes(self.scalar.old, "little")
        flat = opened.checkpoint.get_info(self.scalar.coordinate.tensor).stored.flatten(self.scalar.coordinate.index)
        begin = flat * self.scalar.dtype.bits
        for bits in cell.fields:
            self._put_field(bits, code & (1 << bits.width) - 1, begin)
            code >>= bits.width

    def _put_field(self, bits: BitField, part: int, begin: int) -> None:
        """Replace the bits that `part` and this number share.

        The first bit of this number is bit `begin` of the tensor.
        """
        if bits.tensor != self.scalar.coordinate.tensor:
            return
        low, high = max(bits.start, begin), min(bits.start + bits.width, begin + self.scalar.dtype.bits)
        if low < high:
            mask = (1 << high - low) - 1
            self.bits &= ~(mask << low - begin)
            self.bits |= (part >> low - bits.start & mask) << low - begin

    def make_splice(self) -> Splice:
        """Return the splice that stores the changed bits."""
        old = self.scalar
        new = self.bits.to_bytes(len(old.old), "little")
        return Splice(old.file, old.coordinate, old.dtype, old.offset, old.old, op="set", new=new)


def _require_index(index: tuple[int, ...], matrix: QuantisedMatrix) -> None:
    """Raise PlanError if an index is out of range."""
    shape = matrix.shape
    if not is_valid_index(index, shape):
        raise PlanError(f"index {list(index)} is out of range", f"{matrix.weight} of shape {list(shape)}")


def _check_expectation(asked: Asked, found: _Found, opened: _Opened) -> None:
    """Raise PlanError if an element has another value than its edit expects.

    An expected number must have the stored code as its nearest code. A value measured in another checkpoint, such as a
    known one, may also be one step of the grid away, because quantisers do not all round to the nearest code.
    """
    expect = asked.expect
    if expect is None:
        return
    if isinstance(expect, str):
        what = "expect cannot name the bits of a quantised element: only a stored number has bits"
        remedy = opened.offer_raw("expect a value", "name the stored tensor with raw: true")
        raise PlanError(what, asked.coordinate, remedy)
    measured = isinstance(expect, MeasuredValue)
    value = float(expect.value if isinstance(expect, MeasuredValue) else expect)
    slack = found.cell.compute_step(found.value) if measured else 0.0
    try:
        near = found.cell.values[found.cell.find_nearest(value)]
    except NumberError:
        near = math.inf
    if near != found.value and not abs(value - found.value) <= slack:
        what = f"expected {format_exact(value)}, stored is {format_exact(found.value)}"
        raise PlanError(what, asked.coordinate, "is this the right base?")


def _choose_code(asked: Asked, found: _Found, opened: _Opened) -> CodeEdit:
    """Choose the code whose value is nearest to the value that an edit asks for. Raises PlanError."""
    edit, cell = asked.edit, found.cell
    if not math.isfinite(found.value):
        what = f"cannot {edit.op} an element whose value is {found.value}, because its scale or its code is no number"
        raise PlanError(what, found.coordinate, "give a checkpoint without NaN and infinities")
    try:
        wanted = _compute_wanted(asked, found, opened)
        code = found.code if isinstance(edit, Protect) else _find_code(edit, cell, wanted)
    except NumberError as error:
        raise PlanError.of(f.add_context(f"cannot {edit.op} {found.coordinate}") for f in error.faults) from None
    done = CodeEdit(
        asked.number,
        edit.op,
        edit.factor if isinstance(edit, Scale) else None,
        found.coordinate,
        found.layout,
        wanted,
        found.value,
        cell.values[code],
        found.code,
        code,
        tuple(opened.list_elements(found)),
    )
    limit = edit.max_error if isinstance(edit, Scale | Set | Restore) else None
    if limit is not None and done.error > limit:
        near = f"the nearest value of the grid is {format_exact(done.new)}"
        what = f"{near}, which differs from {format_exact(wanted)} by {format_number(done.error)}"
        raise PlanError(f"cannot {edit.op} {found.coordinate}: {what}, more than max_error {format_number(limit)}")
    return done


def _find_code(edit: Edit, cell: Cell, wanted: float) -> int:
    """Return the code that an edit stores for a wanted value. Raises NumberError."""
    return cell.find_zero() if isinstance(edit, Zero) else cell.find_nearest(wanted)


def _compute_wanted(asked: Asked, found: _Found, opened: _Opened) -> float:
    """Return the value that an edit asks for, rounded to float64. Raises NumberError and PlanError."""
    edit = asked.edit
    if isinstance(edit, Zero):
        return 0.0
    if isinstance(edit, Protect):
        return found.value
    if isinstance(edit, Scale):
        return found.value * edit.factor  # rounded once, to float64
    if isinstance(edit, Set):
        if edit.value is None:
            raise NumberError("only a stored number has bits", remedy=opened.offer_raw("give a value", "set raw: true"))
        return float(edit.value.exact if isinstance(edit.value, Written) else edit.value)
    if isinstance(edit, Restore):
        if edit.source is None:
            assert asked.value is not None  # `resolve` reports a scalar without a known value
            return float(asked.value.value)
        return _read_source(edit.source, found.coordinate, opened)
    raise PlanError(f"{edit.op} needs more than one scalar", asked.coordinate)


def _read_source(name: str, coordinate: Coordinate, opened: _Opened) -> float:
    """Read the value of a weight, plain or quantised, in the checkpoint that `from:` names. Raises PlanError."""
    checkpoint = opened.sources.open(name)
    tensor, index = coordinate = _find_in_source(coordinate, opened.checkpoint, checkpoint)
    if tensor not in checkpoint.weight_shapes:
        raise PlanError(f"{name} has no weight {tensor}", remedy="give the base in from:")
    if not is_valid_index(index, shape := checkpoint.weight_shapes[tensor]):
        raise PlanError(f"{tensor} has the shape {list(shape)} in {name}", remedy="give the base in from:")
    if find_codes(checkpoint, tensor) is not None:
        return _Opened(checkpoint, opened.sources).find(coordinate).value
    info = checkpoint.get_info(tensor)
    data = checkpoint.shards[checkpoint.weight_map[tensor]].read_scalar(tensor, index)
    return float(dtypes.decode(info.dtype, data))


def _find_in_source(coordinate: Coordinate, checkpoint: Checkpoint, source: Checkpoint) -> Coordinate:
    """Return the place of a weight in another checkpoint, which may name it differently.

    A GGUF file and the model from which it was converted have the same elements of down projections. All other weights
    must have the same name.
    """
    if checkpoint.is_gguf == source.is_gguf or coordinate.tensor in source.weight_shapes:
        return coordinate
    short = find_short_form(checkpoint.config, checkpoint.weight_shapes, coordinate)
    if short is None:
        return coordinate
    layer, row, col, expert = short
    try:
        return locate(source, layer, row, col, expert)
    except ArchitectureError:
        return coordinate
