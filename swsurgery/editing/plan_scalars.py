"""Read the single scalars that edits name, and compute their new bytes."""

from __future__ import annotations

from collections.abc import Sequence

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.editing.asked import Asked, Misfit
from swsurgery.editing.code_edit import PlannedCodes
from swsurgery.editing.sources import Sources
from swsurgery.editing.targets import find_tensor
from swsurgery.errors import NumberError, PlanError, SwsurgeryError
from swsurgery.manifest.operations import (
    Clip,
    Edit,
    Flip,
    Protect,
    PruneOutliers,
    Restore,
    Round,
    Scale,
    explain_expectation,
    is_of_stored_number,
)
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import is_valid_index
from swsurgery.storage.files import read_exactly
from swsurgery.storage.ggml import BlockDtype
from swsurgery.storage.shard import TensorInfo
from swsurgery.storage.splice import Scalar, Splice


def plan_elements(
    asked: Sequence[Asked], checkpoint: Checkpoint, sources: Sources
) -> tuple[Sequence[Asked], PlannedCodes]:
    """Plan the edits of quantised elements. Returns the other edits too."""
    if not checkpoint.quantisation.has_codes:
        return asked, PlannedCodes()
    from swsurgery.editing.plan_codes import is_coded, plan_codes  # imports numpy

    coded = {id(one) for one in asked if is_coded(one, checkpoint)}
    plain = [one for one in asked if id(one) not in coded]
    return plain, plan_codes([one for one in asked if id(one) in coded], checkpoint, sources)


def read_scalars(
    asked: Sequence[Asked], checkpoint: Checkpoint, sources: Sources
) -> tuple[list[tuple[Asked, Scalar]], list[Misfit]]:
    """Read every scalar that the edits name.

    Returns the scalars that can be edited, in the manifest's order, and a fault for each of the other scalars.
    """
    read: list[tuple[Asked, Scalar]] = []
    misfits: list[Misfit] = []
    for one in asked:
        try:
            read.append((one, _read_scalar(one, checkpoint, sources)))
        except SwsurgeryError as error:
            misfits += [Misfit(one.number, fault) for fault in error.faults]
    return read, misfits


def _read_scalar(asked: Asked, checkpoint: Checkpoint, sources: Sources) -> Scalar:
    """Read one scalar, compare it with the value that the edit expects, and compute its new bytes.

    Raises PlanError or NumberError if the scalar does not exist, differs, or cannot be edited.
    """
    edit, coordinate, expect = asked.edit, asked.coordinate, asked.expect
    info = find_tensor(coordinate.tensor, checkpoint)
    name, index = coordinate
    if edit.writes and not _may_change(edit, name, checkpoint):
        _refuse_quantised(name, checkpoint)
    if not is_valid_index(index, info.shape):
        where = f"{name} of shape {list(info.shape)}"
        raise PlanError(f"index {list(index)} is out of range", where, _explain_index(info, index))
    if info.dtype.bits % 8:  # such an element has no address of its own
        raise PlanError(f"{info.dtype.name} {info.dtype.refusal}", coordinate)
    file = checkpoint.weight_map[name]
    shard = checkpoint.shards[file]
    old = shard.read_scalar(name, index)
    if expect is not None and (fault := explain_expectation(expect, info.dtype, old)):
        hint = "is this the right base?"
        swapped = index[::-1]
        if len(index) == 2 and is_valid_index(swapped, info.shape):
            other = shard.read_scalar(name, swapped)
            if explain_expectation(expect, info.dtype, other) is None:
                hint = f"row and col look swapped: {list(swapped)} has this value"
        raise PlanError(fault, coordinate, hint)
    offset = shard.find_offset(name, index)
    if isinstance(edit, Protect):
        return Scalar(file, coordinate, info.dtype, offset, old)
    try:
        new = _compute_bytes(asked, info, old, sources)
    except NumberError as error:
        raise PlanError.of(f.add_context(f"cannot {edit.op} {coordinate}") for f in error.faults) from None
    factor = edit.factor if isinstance(edit, Scale) else None
    bits = edit.numbers if isinstance(edit, Flip) else ()
    return Splice(file, coordinate, info.dtype, offset, old, op=edit.op, new=new, factor=factor, bits=bits)


def _compute_bytes(asked: Asked, info: TensorInfo, old: bytes, sources: Sources) -> bytes:
    """Return the new bytes of a scalar. Raises NumberError, and the errors of opening the checkpoint of a restore."""
    edit = asked.edit
    if isinstance(edit, Clip | PruneOutliers | Round):
        raise PlanError(f"{edit.op} needs more than one scalar", asked.coordinate)
    if not isinstance(edit, Restore):
        return edit.compute_bytes(info.dtype, old)
    if edit.source is None:
        assert asked.value is not None  # `resolve` reports a scalar without a known value
        return dtypes.encode(info.dtype, asked.value.value)
    tensor = sources.find(edit.source, info)
    size = info.dtype.size
    return read_exactly(tensor.file, size, tensor.start + info.flatten(asked.coordinate.index) * size)


def _may_change(edit: Edit, name: str, checkpoint: Checkpoint) -> bool:
    """Return True if an edit may change a stored number of a tensor even if it stores no plain weights."""
    if not isinstance(edit, Flip):
        return is_of_stored_number(edit)
    reading = checkpoint.quantisation.get_reading(name)
    is_float_code = reading.kind == "scaled" and checkpoint.get_info(name).dtype.kind == "float"
    return edit.raw or is_float_code


def _explain_index(info: TensorInfo, index: tuple[int, ...]) -> str:
    """Explain why an index is out of range, as in "row and col look swapped"; "" if the reason is not obvious."""
    if 0 in info.shape:
        return "the tensor has no elements"
    if len(index) == 2 and is_valid_index(index[::-1], info.shape):
        return f"row and col look swapped: {list(index[::-1])} would fit"
    return ""


def _refuse_quantised(name: str, checkpoint: Checkpoint) -> None:
    """Raise PlanError if a tensor does not store plain weights."""
    if why := checkpoint.quantisation.explain_refusal(name):
        if isinstance(checkpoint.get_info(name).dtype, BlockDtype):
            raise PlanError(why, name, "use set, scale or zero, which store the nearest code")
        raise PlanError(why, name, "edit the model before it is quantised, or set raw: true to change a stored number")
