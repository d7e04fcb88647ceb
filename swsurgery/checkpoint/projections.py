"""Find the stored tensor of a layer's down projection, and convert between coordinates and short forms.

Papers report a super weight in short form: as layer, row and col (arXiv:2411.07191, table 2), and in a mixture of
experts also by the number of the expert. Row is the output channel of the down projection, a position in the residual
stream. Col is its input, the intermediate neuron. This module converts the short form to a `Coordinate`, which consists
of the tensor's name and the index under which the scalar is *stored*, and it converts a `Coordinate` back.

The table in architectures.py lists the possible names and axes of the tensors. This module must not read files or
import torch or transformers. Its functions receive config.json as a mapping, and the name and shape of each tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swsurgery.checkpoint.architectures import FAMILIES, ExpertChoice, Shapes
from swsurgery.checkpoint.family import Axes, Family, InputProjections, Template
from swsurgery.checkpoint.model_config import (
    find_known_families,
    find_number,
    get_families,
    read_hidden_size,
    read_layer_limit,
)
from swsurgery.checkpoint.projection_names import (
    BY_NAME,
    Match,
    explain_missing,
    list_matches,
    list_stored_names,
    make_expert_error,
    refuse_packed,
)
from swsurgery.errors import ArchitectureError
from swsurgery.storage.coordinate import Coordinate, is_valid_index


@dataclass(frozen=True)
class DownProjection:
    """One down projection as stored, with `rows` output channels and `cols` intermediate neurons.

    `axes` names the axes of the stored tensor in order, such as "expert row col".
    """

    layer: int
    expert: ExpertChoice
    tensor: str
    axes: Axes
    rows: int
    cols: int

    @property
    def transposed(self) -> bool:
        """True if the last two axes of the stored tensor are [col, row] instead of [row, col]."""
        return self.axes.endswith("col row")

    @property
    def expert_axis(self) -> int | None:
        """Position of the expert axis in the stored shape: 0, or None if the tensor does not stack experts."""
        return 0 if "expert" in self.axes else None

    def find_index(self, row: int, col: int) -> tuple[int, ...]:
        """Return the index of the scalar (row, col) in the stored tensor, such as (expert, col, row)."""
        return _encode(self.axes, row, col, self.expert)


def locate(
    config: Mapping[str, Any], shapes: Shapes, *, layer: int, row: int, col: int, expert: ExpertChoice = None
) -> Coordinate:
    """Return the coordinate of a scalar that is given in short form.

    The scalar multiplies the intermediate neuron `col` of `layer`, and the product is added to channel `row` of the
    residual stream. `config` is config.json. Raises ArchitectureError if `row` or `col` is out of range, or if
    `find_down_projection` raises it.
    """
    projection = find_down_projection(config, shapes, layer, expert)
    faults = [
        f"{axis} {value} is out of range {f'0..{size - 1}' if size else '(the tensor is empty)'}"
        for axis, value, size in (("row", row, projection.rows), ("col", col, projection.cols))
        if not 0 <= value < size
    ]
    if faults:
        swap_fits = 0 <= col < projection.rows and 0 <= row < projection.cols
        raise ArchitectureError(
            " and ".join(faults),
            projection.tensor,
            f"row and col look swapped: [{col}, {row}] would fit" if swap_fits else "row is the output channel",
        )
    return Coordinate(projection.tensor, projection.find_index(row, col))


def find_down_projection(
    config: Mapping[str, Any], shapes: Shapes, layer: int, expert: ExpertChoice = None
) -> DownProjection:
    """Find the down projection of a layer, or of one expert in the layer, among the stored tensors.

    `config` is config.json. Raises ArchitectureError in these cases: no tensor has a known name of this down
    projection, or several have one; the layer is out of range; `expert` is missing in a mixture of experts, given for a
    dense layer, or out of range; the tensor is packed; the shape does not fit the hidden size in config.json, or does
    not tell rows from columns.
    """
    families = get_families(config)
    limit = read_layer_limit(config)
    names = list_stored_names(families, shapes, layer, expert)
    # More layers may be stored than config.json states. DeepSeek-V3 stores its token-prediction module as layer 61,
    # although config.json states 61 layers (0 to 60).
    if not names or (limit is not None and layer >= limit):
        raise explain_missing(config, families, shapes, layer, expert)
    for name in names:
        refuse_packed(name, shapes)
    if len(names) > 1:
        raise ArchitectureError(f"layer {layer} has several down projections", ", ".join(names), BY_NAME)

    [(name, templates)] = names.items()
    axes = _find_orientation(config, name, shapes[name], templates)
    sizes = dict(zip(axes.split(), shapes[name], strict=True))
    if "expert" in sizes and isinstance(expert, int) and not 0 <= expert < sizes["expert"]:
        raise make_expert_error(layer, expert, f"0 to {sizes['expert'] - 1}")
    return DownProjection(layer, expert, name, axes, rows=sizes["row"], cols=sizes["col"])


def list_down_projections(config: Mapping[str, Any], shapes: Shapes) -> Iterator[DownProjection]:
    """Find all down projections, sorted by layer and within a layer in the order dense, expert 0, 1, ..., shared.

    Layers without a down projection are skipped. Raises ArchitectureError if no layer has a down projection, or if
    `find_down_projection` raises it for one of them.
    """
    families = get_families(config)
    limit = read_layer_limit(config)
    found: set[tuple[int, ExpertChoice]] = set()
    for tensor in shapes:
        for _, template, layer, expert in list_matches(families, tensor):
            if limit is not None and layer >= limit:
                continue
            if "expert" in template.axes:
                shape = shapes[tensor]
                # The header of an empty tensor may state any number of experts, so it counts as zero experts.
                found.update((layer, number) for number in range(shape[0] if shape and all(shape) else 0))
            else:
                found.add((layer, expert))
    if not found:
        find_down_projection(config, shapes, 0)  # raises an error with the names that were looked for
    return iter([find_down_projection(config, shapes, *place) for place in sorted(found, key=_order)])


def find_short_form(
    config: Mapping[str, Any], shapes: Shapes, coordinate: Coordinate
) -> tuple[int, int, int, ExpertChoice] | None:
    """Return the short form (layer, row, col, expert) of a stored scalar: the inverse of `locate`.

    Returns None if the scalar does not exist, or if it is not part of a down projection that can be found.
    """
    shape = shapes.get(coordinate.tensor, ())
    if not is_valid_index(coordinate.index, shape):
        return None
    for _, template, layer, named_expert in list_matches(get_families(config), coordinate.tensor):
        if len(template.axes.split()) != len(coordinate.index):
            continue
        expert = coordinate.index[0] if "expert" in template.axes else named_expert
        try:
            projection = find_down_projection(config, shapes, layer, expert)
        except ArchitectureError:
            continue
        if projection.tensor == coordinate.tensor:
            row, col, _ = _decode(projection.axes, coordinate.index, expert)
            return layer, row, col, expert
    return None


def list_loaded_candidates(
    config: Mapping[str, Any], coordinate: Coordinate, shapes: Shapes | None = None
) -> tuple[Coordinate, ...]:
    """List the names and indices under which a model loaded by transformers may contain a stored scalar.

    The caller looks up each name in `model.named_parameters(remove_duplicate=False)` (a tied tensor has two names) and
    takes the first that exists. The list begins with the stored name. It continues with the same name under other
    prefixes, and with the position in the stacked experts of transformers >= 5. For a tensor that is not a down
    projection, only the prefix varies. Tensors that transformers joins into one while loading are not found.

    `shapes` is needed only if a family stores tensors of one name in two orientations (Qwen3-VL-MoE). Raises
    ArchitectureError if the orientation cannot be decided.
    """
    families = get_families(config)
    tensor, index = coordinate
    matches = _list_loaded_matches(config, families, coordinate, shapes)
    transposed = [template.stored_only for _, template, _, _ in matches]
    if any(transposed) and not all(transposed):
        what = "the name of the tensor does not tell whether it is stored as [row, col] or [col, row]"
        raise ArchitectureError(what, tensor, "give the stored shapes")

    # A tensor that is transposed while loading keeps its name, but the stored index would name another scalar of it.
    candidates = [] if any(transposed) else [coordinate]
    for family, template, layer, named_expert in matches:
        row, col, expert = _decode(template.axes, index, named_expert)
        candidates += [
            Coordinate(prefix + target.name.format(layer=layer, expert=expert), _encode(target.axes, row, col, expert))
            # The template of the stored tensor is the first.
            for target in sorted(family.templates, key=lambda target: target != template)
            if target.kind == template.kind and not target.stored_only
            for prefix in family.prefixes
        ]
    if not matches:  # no down projection
        prefixes = list(dict.fromkeys(prefix for family in families for prefix in family.prefixes))
        longest = max((prefix for prefix in prefixes if tensor.startswith(prefix)), key=len, default="")
        rests = dict.fromkeys((tensor.removeprefix(longest), tensor))
        candidates += [Coordinate(prefix + rest, index) for rest in rests for prefix in ("", *prefixes)]
    return tuple(dict.fromkeys(candidates))


def _list_loaded_matches(
    config: Mapping[str, Any], families: tuple[Family, ...], coordinate: Coordinate, shapes: Shapes | None
) -> list[Match]:
    """Return the templates that agree with the length of a coordinate's index and with the stored shape of its tensor.

    Raises ArchitectureError if the shape agrees with no template, or with several templates of a known family.
    """
    tensor, index = coordinate
    matches = [m for m in list_matches(families, tensor) if len(m[1].axes.split()) == len(index)]
    if shapes is None or tensor not in shapes or not matches:
        return matches
    templates = [template for _, template, _, _ in matches]
    if not find_known_families(config) and len(_list_fitting_axes(config, shapes[tensor], templates)) > 1:
        return []  # of an unknown family, transformers is assumed to load every tensor in its stored orientation
    axes = _find_orientation(config, tensor, shapes[tensor], templates)
    return [m for m in matches if m[1].axes == axes]


def name_prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the prefixes that names of stored and loaded tensors may have, such as "model." and "text_model."."""
    return tuple(dict.fromkeys(prefix for family in get_families(config) for prefix in family.prefixes))


def has_residual_rows(config: Mapping[str, Any], projection: DownProjection) -> bool:
    """Return True if each row of a down projection is a channel of the residual stream.

    The rows are other channels if another matrix multiplies the output of the MLP, as in Zamba, or of the experts, as
    in a Nemotron 3 with a latent space.
    """
    templates = list_templates(config, projection)
    direct = all(template.direct for template in templates)
    return direct and _read_row_count(config, templates) == read_hidden_size(config)


def list_templates(config: Mapping[str, Any], projection: DownProjection) -> tuple[Template, ...]:
    """List the templates that a down projection may have: one kind of MLP for a known family, several for others."""
    matches = list_matches(get_families(config), projection.tensor)
    known = find_known_families(config)
    return tuple(template for _, template, _, _ in matches if not known or template.axes == projection.axes)


def list_input_projections(config: Mapping[str, Any], projection: DownProjection) -> list[InputProjections]:
    """List the ways in which the input projections of an MLP may be stored, the most likely first.

    Those of the model's own family come first. Those of other families follow, if the down projection's module has the
    same name there: some checkpoints store the experts or the gate in another way than their family does. Each set of
    names occurs once.
    """
    module = _get_module_name(projection.tensor)
    everything = (template for family in FAMILIES for template in family.templates)
    others = (template for template in everything if _get_module_name(template.name) == module)
    found: dict[tuple[str, ...], InputProjections] = {}
    for template in (*list_templates(config, projection), *others):
        if template.inputs is not None:
            found.setdefault(template.inputs.names, template.inputs)
    return list(found.values())


def _get_module_name(tensor: str) -> str:
    return tensor.removesuffix(".weight").rpartition(".")[2]


def _order(place: tuple[int, ExpertChoice]) -> tuple[int, float]:
    """Return the sort key of (layer, expert): by layer, then no expert, the experts by number, the shared expert."""
    layer, expert = place
    return layer, -1 if expert is None else float("inf") if expert == "shared" else expert


# Axes ---------------------------------------------------------------------------------------------------------------


def _encode(axes: str, row: int, col: int, expert: ExpertChoice) -> tuple[int, ...]:
    """Return the index of a scalar: its row, col and expert in the order of the tensor's axes. Inverse of `_decode`."""
    values = {"row": row, "col": col}
    if expert is not None and expert != "shared":
        values["expert"] = expert
    return tuple(values[axis] for axis in axes.split())


def _decode(axes: str, index: tuple[int, ...], expert: ExpertChoice) -> tuple[int, int, ExpertChoice]:
    """Return (row, col, expert) of the scalar at an index. Inverse of `_encode`.

    If the tensor does not stack experts, the index does not contain the expert, and the argument `expert` is returned.
    """
    values = dict(zip(axes.split(), index, strict=True))
    return values["row"], values["col"], values.get("expert", expert)


def _list_possible_axes(config: Mapping[str, Any], templates: list[Template]) -> set[Axes]:
    """Return the orders of axes that a tensor may have if its name fits these templates.

    If the family is unknown, these are the orders in which known families store tensors with the same last part of the
    name. For example, known families store `experts.down_proj` in both orientations. Quantisers put a linear layer in
    the place of the Conv1D of GPT-2, so its matrices may be stored as [row, col] after quantisation.
    """
    axes = {template.axes for template in templates}
    if "col row" in axes and config.get("quantization_config"):
        axes.add("row col")
    if find_known_families(config):
        return axes
    tails = {_split_tail(template) for template in templates}
    everything = (template for family in FAMILIES for template in family.templates)
    return axes | {template.axes for template in everything if _split_tail(template) in tails}


def _split_tail(template: Template) -> tuple[str, int]:
    """Return the last part of a template's name and the number of its axes, such as ("down_proj.weight", 2)."""
    parts = template.name.split(".")
    return ".".join(parts[-2:] if parts[-1] == "weight" else parts[-1:]), len(template.axes.split())


def _read_row_count(config: Mapping[str, Any], templates: Sequence[Template]) -> int | None:
    """Return the number of rows that config.json states for a down projection; None if it states none."""
    stated = (find_number(config, template.rows_key) for template in templates if template.rows_key)
    return next((rows for rows in stated if rows is not None), None) or read_hidden_size(config)


def _list_fitting_axes(config: Mapping[str, Any], shape: tuple[int, ...], templates: list[Template]) -> set[Axes]:
    """Return the possible orders of a tensor's axes that agree with its shape and the row count in config.json."""
    hidden = _read_row_count(config, templates)
    return {
        axes
        for axes in _list_possible_axes(config, templates)
        if len(axes.split()) == len(shape) and hidden in (None, dict(zip(axes.split(), shape, strict=True))["row"])
    }


def _find_orientation(config: Mapping[str, Any], name: str, shape: tuple[int, ...], templates: list[Template]) -> Axes:
    """Return the order of a tensor's axes that fits its shape. Raises ArchitectureError if no order or several fit."""
    hidden = _read_row_count(config, templates)
    fitting = _list_fitting_axes(config, shape, templates)
    if not fitting:
        possible = sorted(_list_possible_axes(config, templates))
        wanted = " or ".join(f"[{axes.replace(' ', ', ')}]" for axes in possible)
        rows = "" if hidden is None else f" with {hidden} rows"
        what = f"the down projection has shape {list(shape)}, but {wanted}{rows} is expected"
        raise ArchitectureError(what, name, BY_NAME)
    if len(fitting) > 1:
        why = "config.json does not give the hidden size" if hidden is None else "the matrix is square"
        raise ArchitectureError("the order of rows and columns is not known", name, f"{why}; {BY_NAME}")
    return fitting.pop()
