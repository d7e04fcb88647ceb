"""Describe a checkpoint for `inspect`: its files and tensors, one tensor, or one scalar.

From the data of tensors, only the requested scalar and a few bytes of quantised weights are read.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.architectures import Shapes
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import open_checkpoint, open_for_reading
from swsurgery.checkpoint.record import find_record
from swsurgery.checkpoint.steps import list_steps
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import ArchitectureError, CheckpointError
from swsurgery.progress import Reporter, require_reporter
from swsurgery.storage.arguments import require_integer, require_type
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import convert_to_json, format_bits
from swsurgery.storage.ggml import BlockDtype
from swsurgery.storage.numeric import load_numpy
from swsurgery.storage.result import Result


@dataclass(frozen=True, repr=False)
class Details(Result):
    """A description of one tensor or of one scalar: the document that `inspect --tensor --json` prints.

    Both have the fields tensor, file, dtype and shape. A tensor also has bytes (its size) and data_offsets. A scalar
    also has index, offset (in bytes from the start of the file), value and bits. If the scalar is in a down projection,
    it has layer, row, col and expert. If the stored numbers are not weights, the field note gives the reason.

    An element of a matrix that is stored as packed codes has layout, code, scale, step and stored instead of bits: the
    name of the layout, the stored code, the factor that multiplies it, the distance to the next value that another code
    has, and a list of the stored numbers that contain the code, with tensor, index and bits. If one code stands for
    several elements, code, scale and offset are None. If each code fills bytes of its own, as in FP8, value is the
    stored number, and weight is the value of the element, which scales multiply. A matrix of packed codes has layout,
    shape and stored: a list of its tensors, with tensor, file, dtype and shape.
    """

    fields: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        """Return the document that `inspect --tensor --json` prints."""
        return dict(self.fields)

    def __repr__(self) -> str:
        return f"Details({', '.join(f'{key}: {value}' for key, value in self.fields.items())})"


@overload
def inspect(
    checkpoint: str | Path,
    tensor: None = None,
    at: None = None,
    *,
    weights: Weights | None = None,
    variant: str | None = None,
    reporter: Reporter | None = None,
) -> Checkpoint: ...


@overload
def inspect(
    checkpoint: str | Path,
    tensor: str | None,
    at: str | int | Sequence[int] | None = None,
    *,
    weights: Weights | None = None,
    variant: str | None = None,
    reporter: Reporter | None = None,
) -> Checkpoint | Details: ...


def inspect(
    checkpoint: str | Path,
    tensor: str | None = None,
    at: str | int | Sequence[int] | None = None,
    *,
    weights: Weights | None = None,
    variant: str | None = None,
    reporter: Reporter | None = None,
) -> Checkpoint | Details:
    """Describe a checkpoint: its files, tensors and steps, or one tensor, or one scalar with its value and bits.

    `checkpoint` is a directory, a GGUF file or `hf://ORG/NAME[@REV][/sub]`. Without `tensor`, the opened checkpoint is
    returned, and its `steps` are the manifests that were applied to it. `at` is the index of a scalar in the stored
    shape of `tensor`: integers, or text such as "3968,7003". An element of a packed matrix is given by the name and the
    index that it has in a loaded model. If the checkpoint has several sets of weights, `weights` and `variant` choose
    one. From the data of tensors, only this scalar and a few bytes of quantised weights are read.

    Raises TypeError, HubError, CheckpointError; TargetError while another run edits the checkpoint in place.
    """
    require_type("tensor", tensor, str, optional=True)
    index = None if at is None else _parse_index(at)
    with open_for_reading("checkpoint", checkpoint, require_reporter(reporter)) as root:
        opened = open_checkpoint(root, weights, variant, gguf=True)
        if tensor is None and at is None:
            described = _add_steps(opened)
            described.layouts  # noqa: B018 - reads a few bytes, while the files are open
            return described
        if tensor is None:
            raise CheckpointError("--at needs --tensor", at or "")
        return Details(_describe(opened, tensor, index))


def _add_steps(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the steps of its record, or with a note if the record cannot be read."""
    try:
        patched = find_record(checkpoint)
        return replace(checkpoint, steps=list_steps(patched)) if patched else checkpoint
    except CheckpointError as error:
        note = f"the steps cannot be listed: {error.faults[0]}"
        return replace(checkpoint, notes=(*checkpoint.notes, note))


def _find_similar(tensor: str, names: Sequence[str]) -> str | None:
    """Return the most similar name; None if no name is similar. `tensor` may be only the end of a name."""
    if near := difflib.get_close_matches(tensor, names, 1, 0.8):
        return near[0]
    ends = {".".join(name.split(".")[-1 - tensor.count(".") :]): name for name in reversed(names)}
    near = difflib.get_close_matches(tensor, list(ends), 1, 0.8)
    return ends[near[0]] if near else None


def _describe(checkpoint: Checkpoint, tensor: str, index: tuple[int, ...] | None) -> dict[str, object]:
    """Return the fields of `Details` for a tensor, or for its scalar at `index`. Raises CheckpointError."""
    if _is_packed(checkpoint, tensor, index):
        return _describe_packed(checkpoint, tensor, index)
    if tensor not in checkpoint.weight_map or tensor in checkpoint.disagreements:
        near = _find_similar(tensor, list(checkpoint.weight_map)[:500])
        hint = f"did you mean {near}?" if near else "swsurgery inspect lists them"
        raise CheckpointError("no such tensor", tensor, hint)
    info, file = checkpoint.get_info(tensor), checkpoint.weight_map[tensor]
    found: dict[str, object] = {"tensor": tensor, "file": file, "dtype": info.dtype.name, "shape": list(info.shape)}
    if why := checkpoint.quantisation.explain_refusal(tensor):
        found["note"] = why
    if index is None:
        return found | {"bytes": info.size, "data_offsets": list(info.data_offsets)}
    if info.dtype.bits % 8:
        raise CheckpointError(f"{info.dtype.name} {info.dtype.refusal}", tensor)
    try:
        offset = checkpoint.shards[file].find_offset(tensor, index)
    except IndexError as error:
        raise CheckpointError(str(error), tensor) from None
    data = checkpoint.shards[file].read_scalar(tensor, index)
    place = _find_place(checkpoint, checkpoint.shapes, Coordinate(tensor, index))
    value = convert_to_json(info.dtype, data)
    code = _describe_stored_code(checkpoint, tensor, index) if "note" in found else {}
    return found | {"index": list(index), "offset": offset, "value": value, "bits": format_bits(data), **code, **place}


def _describe_stored_code(checkpoint: Checkpoint, tensor: str, index: tuple[int, ...]) -> dict[str, object]:
    """Return weight, code, step and layout of an element whose code fills bytes of its own; empty if unknown."""
    load_numpy()
    from swsurgery.checkpoint.layouts.show import describe_element

    try:
        found = describe_element(checkpoint, tensor, index)
    except CheckpointError:  # no layout describes the tensor, and its note says so
        return {}
    if found["shape"] != list(checkpoint.shapes[tensor]):  # `index` counts stored bytes that hold several codes
        return {}
    return {"weight": found["value"]} | {key: found[key] for key in ("code", "scale", "step", "layout")}


def _is_packed(checkpoint: Checkpoint, name: str, index: tuple[int, ...] | None) -> bool:
    """Return True if `name` is a weight whose elements are packed codes, so that none fills bytes of its own.

    The tensor of codes may have the name of the weight. It is then described as stored if no index is given, or if its
    layout cannot be decided.
    """
    if not checkpoint.quantisation.has_codes:
        return False
    load_numpy()
    from swsurgery.checkpoint.layouts.find import find_codes

    codes = find_codes(checkpoint, name)
    if name not in checkpoint.weight_map:
        return codes is not None
    if codes != name or index is None:
        return False
    packed = isinstance(checkpoint.infos[name].dtype, BlockDtype)
    return packed or checkpoint.weight_shapes[name] != checkpoint.shapes[name]


def _describe_packed(checkpoint: Checkpoint, weight: str, index: tuple[int, ...] | None) -> dict[str, object]:
    """Return the fields of `Details` for a packed matrix, or for its element at `index`. Raises CheckpointError."""
    from swsurgery.checkpoint.layouts.show import describe_element, describe_matrix

    if index is None:
        return describe_matrix(checkpoint, weight)
    found = describe_element(checkpoint, weight, index)
    return found | _find_place(checkpoint, checkpoint.weight_shapes, Coordinate(weight, index))


def _find_place(checkpoint: Checkpoint, shapes: Shapes, coordinate: Coordinate) -> dict[str, object]:
    """Return the layer, row, col and expert of a scalar in a down projection; an empty dict for other scalars."""
    try:
        short = projections.find_short_form(checkpoint.config, shapes, coordinate)
    except ArchitectureError:
        short = None
    return dict(zip(("layer", "row", "col", "expert"), short, strict=True)) if short else {}


def _parse_index(at: str | int | Sequence[int]) -> tuple[int, ...]:
    """Parse an index: integers, or text such as "3968,7003" or "[3968, 7003]". Raises TypeError, CheckpointError."""
    if isinstance(at, list | tuple):
        return tuple(require_integer("at", part) for part in at)
    if not isinstance(at, str):
        return (require_integer("at", at),)
    parts = [p.strip() for p in at.strip("[]() ").split(",")] if at.strip("[]() ") else []
    if not all(p.isdecimal() and len(p) < 20 for p in parts):
        raise CheckpointError("--at takes whole numbers from 0", at, "such as --at 3968,7003")
    return tuple(int(p) for p in parts)
