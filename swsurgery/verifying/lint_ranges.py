"""Find the parts of an edit's target that a known model does not have, without a checkpoint.

Only numbers that the known model states are checked. In a mixture of experts, dense layers, experts and shared experts
differ in width, so columns, neurons and tensors are not checked.
"""

from __future__ import annotations

from collections.abc import Iterator

from swsurgery.errors import pluralise
from swsurgery.known import KnownModel
from swsurgery.manifest.targets import AxisSlice, Target, parse_slice


def find_range_faults(edit: Target, model: KnownModel | None) -> Iterator[tuple[str, str]]:
    """Yield a field of the edit and what is wrong with it, such as ("row", "7003 is out of range: ...")."""
    if edit.slice is not None:
        shape = _find_shape(edit.tensor, model)
        yield from (("slice", fault) for fault in _check_slice(parse_slice(edit.slice), shape, edit.tensor))
    if model is None:
        return
    if edit.index is not None and (shape := _find_shape(edit.tensor, model)) is not None:
        axes = tuple(AxisSlice(index=i) for i in edit.index)
        faults = list(_check_slice(axes, shape, edit.tensor))
        if not faults and len(axes) < len(shape):
            faults = [f"{pluralise(len(axes), 'number')}, but {edit.tensor} has {len(shape)} axes"]
        yield from (("index", fault) for fault in faults)
    yield from _check_numbers(edit, model)


def _check_numbers(edit: Target, model: KnownModel) -> Iterator[tuple[str, str]]:
    if edit.expert is not None and model.num_experts is None:
        yield "expert", f"{model.hf_id} has no experts (leave it out)"
        return
    width = model.intermediate_size if model.num_experts is None else None
    limits = {
        "layer": (edit.layer, model.num_layers),
        "row": (edit.row, model.hidden_size),
        "col": (edit.col, width),
        "neuron": (edit.neuron, width),
        "expert": (edit.expert, model.num_experts),
    }
    wrong = [
        (field, value, size)
        for field, (value, size) in limits.items()
        if isinstance(value, int) and size is not None and value >= size
    ]
    row, col = edit.row, edit.col
    fits = row is not None and col is not None and col < model.hidden_size and (width is None or row < width)
    swapped = fits and [field for field, *_ in wrong] == ["row"]
    for field, value, size in wrong:
        hint = "row and col look swapped" if swapped else "numbers start at 0"
        yield field, f"{value} is out of range: {model.hf_id} has {pluralise(size, field)} ({hint})"


def _find_shape(tensor: str | None, model: KnownModel | None) -> tuple[int, int] | None:
    """Return the stored shape of a tensor if it is a down projection of a dense known model; None otherwise."""
    if model is None or model.num_experts is not None:
        return None
    before, _, after = model.tensor.partition("{layer}")
    name = tensor or ""
    layer = name.removeprefix(before).removesuffix(after)
    if name != f"{before}{layer}{after}" or not layer.isdecimal() or int(layer) >= model.num_layers:
        return None
    shape = model.hidden_size, model.intermediate_size
    return (shape[1], shape[0]) if model.transposed else shape


def _check_slice(axes: tuple[AxisSlice, ...], shape: tuple[int, ...] | None, tensor: str | None) -> Iterator[str]:
    """Yield what is wrong with a slice of a tensor. Without a shape, only a range with no index is wrong."""
    if shape is not None and len(axes) > len(shape):
        yield f"{len(axes)} axes, but {tensor} has {len(shape)}"
        return
    for number, axis in enumerate(axes):
        size = None if shape is None else shape[number]
        begin, end = axis.begin, axis.end
        if size is not None:
            limits = [(axis.index, size - 1), (begin, size), (end, size)]
            wrong = [value for value, most in limits if value is not None and not -size <= value <= most]
            if wrong:
                yield f"{wrong[0]} is out of range: axis {number} of {tensor} has {size} (numbers start at 0)"
                continue
            first, last, _ = slice(begin, end).indices(size)
            if axis.index is None and first >= last:
                yield f"selects nothing on axis {number} of {tensor}, which has {size}"
        elif begin is not None and end is not None and (begin < 0) == (end < 0) and begin >= end:
            yield f"selects nothing on axis {number}: {begin}:{end} is empty"
