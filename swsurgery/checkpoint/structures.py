"""Find the stored regions of rows, columns, neurons and experts.

The table in architectures.py states how each family stores its MLPs. This module must not read files or import torch
or transformers: it takes config.json as a mapping, and the name and shape of each tensor.

All functions raise ArchitectureError as `find_down_projection` does: if the layer or expert does not exist, the expert
is missing or superfluous, or the tensor is packed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from swsurgery.checkpoint.architectures import ExpertChoice, Shapes
from swsurgery.checkpoint.family import InputProjections
from swsurgery.checkpoint.model_config import find_known_families, read_model_type
from swsurgery.checkpoint.projection_names import refuse_otherwise_stored, refuse_packed
from swsurgery.checkpoint.projections import DownProjection, find_down_projection, list_templates
from swsurgery.errors import ArchitectureError
from swsurgery.storage.region import Region

_SUFFIXES = (".base_layer.weight", ".weight")
"""Endings of a matrix's name after the module's name; the first one if the module has LoRA adapters."""

_BY_SLICE = "name the tensors with `tensor` and `slice` instead"
"""The remedy in most messages of this module."""


@dataclass(frozen=True)
class _Stored:
    """One stored tensor of an MLP. `axes` names the axes in order; "col" counts the neurons, or twice as many."""

    tensor: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]

    def cut(self, expert: ExpertChoice, **position: int) -> Region:
        """Return the region at one position on some axes, and on the expert axis if there is one."""
        at: dict[str, int] = position if not isinstance(expert, int) else {"expert": expert, **position}
        sizes = zip(self.axes, self.shape, strict=True)
        return Region(self.tensor, tuple((at[a], at[a] + 1) if a in at else (0, size) for a, size in sizes))


def locate_row(config: Mapping[str, Any], shapes: Shapes, layer: int, row: int, expert: ExpertChoice = None) -> Region:
    """Find output channel `row` of a down projection: the weights of all neurons for one channel of the residual.

    A bias of the down projection is not part of the row.
    """
    projection = find_down_projection(config, shapes, layer, expert)
    _refuse_out_of_range("row", row, projection.rows, projection.tensor)
    return _read_down(projection, shapes).cut(expert, row=row)


def locate_column(
    config: Mapping[str, Any], shapes: Shapes, layer: int, col: int, expert: ExpertChoice = None
) -> Region:
    """Find input channel `col` of a down projection: the weights by which one neuron writes to the residual."""
    projection = find_down_projection(config, shapes, layer, expert)
    _refuse_out_of_range("col", col, projection.cols, projection.tensor)
    return _read_down(projection, shapes).cut(expert, col=col)


def locate_neuron(
    config: Mapping[str, Any], shapes: Shapes, layer: int, neuron: int, expert: ExpertChoice = None
) -> tuple[Region, ...]:
    """Find everything that one neuron of an MLP has alone: its gate row, its up row and its down column.

    A neuron of an MLP without a gate has one input row and a down column. A neuron includes its bias: if the input
    projections have biases or adapters, its elements of them are found too, and zeros in all regions make its
    activation exactly zero. The order is gate, gate bias, up, up bias, down; adapters come after biases. The regions do
    not overlap.

    Raises ArchitectureError also if the gate of the family is unknown, or a tensor of the MLP is missing or has a shape
    that does not fit.
    """
    projection = find_down_projection(config, shapes, layer, expert)
    inputs = _find_inputs(config, projection, shapes, whole=False)
    tensors = list(_list_input_tensors(projection, inputs, shapes))
    _refuse_out_of_range("neuron", neuron, projection.cols, projection.tensor)
    positions = {
        "apart": (neuron,),
        "halves": (neuron, projection.cols + neuron),
        "alternating": (2 * neuron, 2 * neuron + 1),
    }[inputs.fusion]
    rows = [tensor.cut(expert, col=position) for position in positions for tensor in tensors]
    return (*rows, _read_down(projection, shapes).cut(expert, col=neuron))


def locate_expert(
    config: Mapping[str, Any], shapes: Shapes, layer: int, expert: int | Literal["shared"]
) -> tuple[Region, ...]:
    """Find all matrices and biases of one expert: whole tensors, or slices of tensors that stack the experts.

    If all of them are zero, the expert's output is exactly zero. The order is gate, up, down; each bias comes after its
    matrix. The router is not part of an expert, and neither is the gate with which Qwen2-MoE scales the output of its
    shared expert (`shared_expert_gate`). DeepSeek stores all shared experts of a layer as one MLP, which is one expert
    here.

    Raises ArchitectureError also if the layer is dense, the family's gate is unknown, or a tensor of the expert is
    missing or has a shape that does not fit.
    """
    projection = find_down_projection(config, shapes, layer, expert)
    inputs = _find_inputs(config, projection, shapes, whole=True)
    tensors = _list_input_tensors(projection, inputs, shapes)
    down = _read_down(projection, shapes)
    biases = _read_bias(down, shapes, "row", projection.rows)
    return tuple(tensor.cut(expert) for tensor in (*tensors, down, *biases))


# Tensors of an MLP --------------------------------------------------------------------------------------------------


def _find_inputs(
    config: Mapping[str, Any], projection: DownProjection, shapes: Shapes, *, whole: bool
) -> InputProjections:
    """Return how the MLP of a down projection stores its input projections.

    In an unknown family, only the names of a gate and an up projection that are separate tensors are unambiguous. If
    the `whole` MLP is wanted, the order of gate and up in one tensor does not matter. Raises ArchitectureError if the
    gate is unknown.
    """
    families = find_known_families(config)
    found = [template.inputs for template in list_templates(config, projection) if template.inputs is not None]
    if not families:
        stored = [inputs for inputs in found if all(name_sibling(projection, n) in shapes for n in inputs.names)]
        found = [inputs for inputs in stored if len(inputs.names) == 2 or (whole and inputs.fusion != "apart")]
    if not found:
        family = f"model type {read_model_type(config)}"
        if families:
            family = f"{families[0].name} ({family})"
        raise ArchitectureError(f"the gate of {family} is unknown", projection.tensor, _BY_SLICE)
    _refuse_other_matrices(projection, found[0], shapes)
    return found[0]


def _read_down(projection: DownProjection, shapes: Shapes) -> _Stored:
    """Return the tensor of a down projection."""
    return _Stored(projection.tensor, tuple(projection.axes.split()), shapes[projection.tensor])


def _list_input_tensors(projection: DownProjection, inputs: InputProjections, shapes: Shapes) -> Iterator[_Stored]:
    """Yield the tensors of the input projections, and after each its bias if it is stored.

    Raises ArchitectureError if a matrix is packed or missing, or a shape does not fit that of the down projection.
    """
    exchanged = {"row": "col", "col": "row"}
    axes = tuple(exchanged.get(axis, axis) for axis in projection.axes.split())
    width = projection.cols if inputs.fusion == "apart" else 2 * projection.cols
    for module in inputs.names:
        name = name_sibling(projection, module)
        refuse_packed(name, shapes, module)
        refuse_otherwise_stored(name, shapes, module)
        if name not in shapes:
            raise ArchitectureError(f"the MLP of {projection.tensor} has no {module}", name, _BY_SLICE)
        sizes = _map_sizes(projection, shapes) | {"col": width}
        if "expert" in axes:  # LongCat stores input projections, but no down projections, for its zero experts
            sizes["expert"] = max(sizes["expert"], next(iter(shapes[name]), 0))
        matrix = _read_tensor(name, axes, shapes, sizes)
        yield matrix
        yield from _read_bias(matrix, shapes, "col", width)
    if inputs.adapters:
        yield from _list_adapters(name_sibling(projection, inputs.adapters), shapes, width)


def _list_adapters(name: str, shapes: Shapes, width: int) -> Iterator[_Stored]:
    """Yield the second matrix of each low-rank adapter of the input projections: (width, rank).

    `name` is the name of the list of adapters with the ending of a weight. An input projection has one adapter for each
    layer that uses the MLP. The first matrix of an adapter belongs to all neurons together.
    """
    pattern = re.compile(re.escape(name.removesuffix(".weight")) + r"\.[0-9]+\.1\.weight")
    for adapter in sorted(filter(pattern.fullmatch, shapes)):
        rank = shapes[adapter][1] if len(shapes[adapter]) == 2 else 0
        yield _read_tensor(adapter, ("col", "rank"), shapes, {"col": width, "rank": rank})


def _read_bias(matrix: _Stored, shapes: Shapes, axis: str, size: int) -> Iterator[_Stored]:
    """Yield the bias of a matrix if it is stored: a vector with one axis, or one vector for each stacked expert."""
    stacked = not matrix.tensor.endswith(".weight")
    name = f"{matrix.tensor}_bias" if stacked else f"{matrix.tensor.removesuffix('weight')}bias"
    if name in shapes:
        axes = ("expert", axis) if "expert" in matrix.axes else (axis,)
        yield _read_tensor(name, axes, shapes, dict(zip(matrix.axes, matrix.shape, strict=True)) | {axis: size})


def _read_tensor(name: str, axes: tuple[str, ...], shapes: Shapes, sizes: Mapping[str, int]) -> _Stored:
    """Return a stored tensor. Raises ArchitectureError if its shape is not `sizes` in the order of `axes`."""
    wanted = tuple(sizes[axis] for axis in axes)
    if shapes[name] != wanted:
        raise ArchitectureError(f"shape {list(shapes[name])} is not {list(wanted)}", name, _BY_SLICE)
    return _Stored(name, axes, wanted)


def _map_sizes(projection: DownProjection, shapes: Shapes) -> dict[str, int]:
    """Map the axes of a down projection to their sizes."""
    return dict(zip(projection.axes.split(), shapes[projection.tensor], strict=True))


def _split_name(tensor: str) -> tuple[str, str, str]:
    """Split a matrix's name around its module: ("model.layers.2.mlp.", "down_proj", ".weight")."""
    suffix = next((suffix for suffix in _SUFFIXES if tensor.endswith(suffix)), "")
    parent, dot, module = tensor.removesuffix(suffix).rpartition(".")
    return parent + dot, module, suffix


def name_sibling(projection: DownProjection, module: str) -> str:
    """Return the name of the matrix of another module of the same MLP."""
    parent, _, suffix = _split_name(projection.tensor)
    return parent + module + suffix


# Refusals -----------------------------------------------------------------------------------------------------------


def _refuse_other_matrices(projection: DownProjection, inputs: InputProjections, shapes: Shapes) -> None:
    """Raise ArchitectureError if the MLP stores another matrix with one row or column per neuron.

    Example: MPT with a gated MLP, which transformers does not support, stores the gate as `ffn.gate`.
    """
    parent, down, suffix = _split_name(projection.tensor)
    known = {down, *inputs.names}
    for name, shape in shapes.items():
        if not name.startswith(parent) or not name.endswith(suffix) or len(shape) != len(shapes[projection.tensor]):
            continue
        module = name.removeprefix(parent).removesuffix(suffix)
        if "." not in module and module not in known and not {projection.cols, 2 * projection.cols}.isdisjoint(shape):
            raise ArchitectureError("the MLP has a matrix of unknown use, so its gate is unknown", name, _BY_SLICE)


def _refuse_out_of_range(axis: str, value: int, size: int, tensor: str) -> None:
    """Raise ArchitectureError if `value` is not an index of an axis with `size` positions."""
    if not 0 <= value < size:
        limits = f"0..{size - 1}" if size else "(the tensor is empty)"
        raise ArchitectureError(f"{axis} {value} is out of range {limits}", tensor)
