"""Check the edits of quantised elements that a record lists: their codes, and the stored bits of the codes.

The layout of each matrix is found again from the checkpoint. This module must not import the planner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.layouts.cells import BitField, CannotTell, Cell, QuantisedMatrix
from swsurgery.checkpoint.layouts.find import find_matrix, make_reader
from swsurgery.checkpoint.layouts.module import list_elements
from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import CodeRecord, EditRecord
from swsurgery.errors import NumberError
from swsurgery.storage.coordinate import Coordinate, is_valid_index
from swsurgery.storage.numbers import format_exact
from swsurgery.verifying.findings import Finding


def check_codes(record: Record, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Yield a finding for each recorded element of a quantised matrix that contradicts the layout or the record."""
    edits = {edit.coordinate: edit for edit in record.edits}
    held: dict[Coordinate, int] = {}
    for code in record.codes:
        if any(element.tensor not in checkpoint.weight_map for element in code.elements):
            continue  # this shard stays in the base's repository until `publish` copies it
        try:
            matrix = _find_matrix(code, checkpoint)
            cell = matrix.find_cell(code.index)
            fault = _explain_fault(code, cell, _OldBytes(edits, checkpoint))
            if code.layout != matrix.layout:
                fault = f"the layout is {matrix.layout}, not {code.layout}"
            if any([_mark(bits, checkpoint, held) for bits in cell.fields]):
                fault = "the record lists this element twice"
        except (CannotTell, NumberError) as error:
            fault = str(error)
        if fault:
            message = f"the record's edit of a quantised element is wrong: {fault}"
            yield Finding("registry", message, tensor=code.weight, index=code.index)
    for coordinate in {element.coordinate for code in record.codes for element in code.elements} & edits.keys():
        edit = edits[coordinate]
        changed = int.from_bytes(edit.old_bytes, "little") ^ int.from_bytes(edit.new_bytes, "little")
        if changed & ~held.get(coordinate, 0):
            message = "the record changes bits of a stored number that belong to none of the edited codes"
            yield Finding("registry", message, edit.file, edit.tensor, edit.index)


def check_protected_codes(record: Record, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Yield a finding for each quantised element that an earlier step protects and that has another value now."""
    for step, code in record.list_protected_codes():
        here = all(element.tensor in checkpoint.weight_map for element in code.elements)
        if step > len(record.history) or not here:
            continue
        try:
            cell = _find_matrix(code, checkpoint).find_cell(code.index)
            value = cell.values[cell.read_code(make_reader(checkpoint))]
            fault = None if value == code.old else f"it is {format_exact(value)}, not {format_exact(code.old)}"
        except CannotTell as error:
            fault = str(error)
        if fault:
            message = f"step {step} protects this quantised element: {fault}"
            yield Finding("protected-changed", message, tensor=code.weight, index=code.index)


def _find_matrix(code: CodeRecord, checkpoint: Checkpoint) -> QuantisedMatrix:
    """Find the matrix of an element. Raises CannotTell if the layout is undecided or the element does not exist."""
    matrix = find_matrix(checkpoint, code.weight)
    if matrix is None:
        raise CannotTell("the weight is not quantised")
    shape = matrix.shape
    if not is_valid_index(code.index, shape):
        raise CannotTell(f"the index is out of range for the shape {list(shape)}")
    return matrix


def _explain_fault(code: CodeRecord, cell: Cell, old: _OldBytes) -> str | None:
    """Explain how a recorded element contradicts its layout or its operation; None if it does not.

    Raises NumberError if no code is near the wanted value.
    """
    if max(code.old_code, code.new_code) >= len(cell.values):
        return f"the element has only {len(cell.values)} codes"
    if {element.coordinate for element in code.elements} != set(list_elements(cell, old.checkpoint.infos)):
        return "its code is in other stored numbers than the record lists"
    if (cell.values[code.old_code], cell.values[code.new_code]) != (code.old, code.new):
        return "the codes do not have the recorded values"
    if cell.read_code(make_reader(old.checkpoint)) != code.new_code:
        return f"the stored code is not {code.new_code}"
    if cell.read_code(old.read) != code.old_code:
        return f"the old bits do not contain the code {code.old_code}"
    wanted = {"zero": 0.0, "protect": code.old}.get(code.op, code.wanted)
    if code.op == "scale" and code.factor is not None:
        wanted = code.old * code.factor  # rounded once, to float64
    if wanted != code.wanted or (code.op == "scale") != (code.factor is not None):
        return f"{code.op} does not ask for {code.wanted}"
    if code.op == "protect":
        return None if code.old_code == code.new_code else "a protected code was changed"
    nearest = cell.find_zero() if code.op == "zero" else cell.find_nearest(wanted)
    return None if nearest == code.new_code else f"the code nearest to {wanted} is {nearest}, not {code.new_code}"


@dataclass(frozen=True)
class _OldBytes:
    """The data of the tensors before the edits of a record."""

    edits: Mapping[Coordinate, EditRecord]
    checkpoint: Checkpoint

    def read(self, name: str, begin: int, size: int) -> bytes:
        """Read bytes of a tensor's data, with the recorded old bytes of the edited numbers."""
        info = self.checkpoint.get_info(name).stored
        width = info.dtype.size
        first, last = begin // width, (begin + size - 1) // width
        data = bytearray(make_reader(self.checkpoint)(name, first * width, (last - first + 1) * width))
        for flat in range(first, last + 1):
            edit = self.edits.get(Coordinate(name, info.unflatten(flat)))
            if edit is not None:
                data[(flat - first) * width : (flat - first + 1) * width] = edit.old_bytes
        return bytes(data[begin - first * width :][:size])


def _mark(bits: BitField, checkpoint: Checkpoint, held: dict[Coordinate, int]) -> bool:
    """Add the bits of a field to the masks of the stored numbers that contain them.

    Returns True if the mask of one of these numbers had one of the bits already.
    """
    info = checkpoint.get_info(bits.tensor).stored
    width = info.dtype.bits
    again = False
    for position in range(bits.start, bits.start + bits.width):
        place = Coordinate(bits.tensor, info.unflatten(position // width))
        mask = 1 << position % width
        again |= bool(held.get(place, 0) & mask)
        held[place] = held.get(place, 0) | mask
    return again
