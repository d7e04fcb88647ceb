"""Refuse edits of stored numbers that would change the value of a protected element of a quantised matrix.

The bits of a protected code are protected as stored numbers. Its value also depends on scales and zero points, which a
later step may change with `raw: true`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.layouts.cells import CannotTell, ReadBytes
from swsurgery.checkpoint.layouts.find import find_matrix, make_reader
from swsurgery.checkpoint.record import Record
from swsurgery.editing.asked import Misfit
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.numbers import format_exact
from swsurgery.storage.splice import Splice

Edits = Sequence[tuple[int, Splice]]
"""Changes of stored numbers, each with the number of its edit in the manifest, counted from 0."""


def find_changed_codes(edits: Edits, previous: Record, checkpoint: Checkpoint) -> Iterator[Misfit]:
    """Yield a misfit for each element that a step of `previous` protects and whose value the edits would change.

    Edits of the stored numbers that hold the bits of a protected code are left out, because the planner refuses them
    for another reason.
    """
    for step, code in previous.list_protected_codes():
        module = code.weight.removesuffix(".weight")
        own = {element.coordinate for element in code.elements}
        others = [(n, s) for n, s in edits if s.coordinate not in own]
        near = [(n, s) for n, s in others if s.coordinate.tensor.startswith((f"{module}.", f"{module}_"))]
        if not near:
            continue
        before, after = (_read_value(code.coordinate, changes, checkpoint) for changes in ([], near))
        if before is None or after == before:
            continue
        number = next((n for n, s in near if _read_value(code.coordinate, [(n, s)], checkpoint) != before), near[0][0])
        becomes = "be undecided" if after is None else f"become {format_exact(after)}"
        what = f"{code.coordinate}, which is protected by step {step} of the base's record, would {becomes}"
        yield Misfit(
            number, f"{what} instead of {format_exact(before)} (revert that step, or start from the first base)"
        )


def _read_value(coordinate: Coordinate, edits: Edits, checkpoint: Checkpoint) -> float | None:
    """Return the value that an element has after the edits; None if the stored tensors do not decide it."""
    read = _make_reader(edits, checkpoint)
    try:
        matrix = find_matrix(checkpoint, coordinate.tensor, read)
        if matrix is None:
            return None
        cell = matrix.find_cell(coordinate.index)
        return cell.values[cell.read_code(read)]
    except CannotTell:
        return None


def _make_reader(edits: Edits, checkpoint: Checkpoint) -> ReadBytes:
    """Return a function that reads the data of stored tensors as they are after the edits."""
    stored = make_reader(checkpoint)

    def read(name: str, begin: int, size: int) -> bytes:
        data = bytearray(stored(name, begin, size))
        for _, splice in edits:
            if splice.coordinate.tensor == name:
                info = checkpoint.get_info(name).stored
                start = info.flatten(splice.coordinate.index) * info.dtype.size - begin
                for position, byte in enumerate(splice.new, start):
                    if 0 <= position < size:
                        data[position] = byte
        return bytes(data)

    return read
