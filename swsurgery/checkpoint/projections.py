"""Find the stored tensor of a layer's down projection, and convert between coordinates and short forms.

Papers report a super weight in short form: as layer, row and col (arXiv:2411.07191, table 2), and in a mixture of
experts also by the number of the expert. Row is the output channel of the down projection, a position in the residual
stream. Col is its input, the intermediate neuron. This module converts the short form to a `Coordinate`, which consists
of the tensor's name and the index under which the scalar is *stored*, and it converts a `Coordinate` back.

The table in architectures.py lists the possible names and axes of the tensors. This module must not read files or
import torch or transformers. Its functions receive config.json as a mapping, and the name and shape of each tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from swsurgery.checkpoint.architectures import (
    FAMILIES,
    Axes,
    ExpertChoice,
    Family,
    InputLayout,
    Layout,
    ProjectionKind,
    Shapes,
    list_prefixes,
)
from swsurgery.checkpoint.quantised import PACKED_SUFFIXES
from swsurgery.errors import ArchitectureError
from swsurgery.storage.coordinate import Coordinate

_BY_NAME = "name the scalar by tensor and index instead"
"""The remedy in most error messages of this module."""

_SECTIONS = ("text_config", "llm_config", "thinker_config")
"""Keys of config.json whose values describe the language model of a multimodal model."""

_Match: TypeAlias = tuple[Family, Layout, int, ExpertChoice]
"""What a tensor's name says if it is the name of a down projection: the family, the layout, the layer and the expert.
The expert is None in a dense layer, and in a tensor that stacks all experts."""


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
    families = _get_families(config)
    limit = read_layer_limit(config)
    names = _list_stored_names(families, shapes, layer, expert)
    # More layers may be stored than config.json states. DeepSeek-V3 stores its token-prediction module as layer 61,
    # although config.json states 61 layers (0 to 60).
    if not names or (limit is not None and layer >= limit):
        raise _explain_missing(config, families, shapes, layer, expert)
    for name in names:
        refuse_packed(name, shapes)
    if len(names) > 1:
        raise ArchitectureError(f"layer {layer} has several down projections", ", ".join(names), _BY_NAME)

    [(name, layouts)] = names.items()
    axes = _find_orientation(config, name, shapes[name], layouts)
    sizes = dict(zip(axes.split(), shapes[name], strict=True))
    if "expert" in sizes and isinstance(expert, int) and not 0 <= expert < sizes["expert"]:
        raise _make_expert_error(layer, expert, f"0 to {sizes['expert'] - 1}")
    return DownProjection(layer, expert, name, axes, rows=sizes["row"], cols=sizes["col"])


def list_down_projections(config: Mapping[str, Any], shapes: Shapes) -> Iterator[DownProjection]:
    """Find all down projections, sorted by layer and within a layer in the order dense, expert 0, 1, ..., shared.

    Layers without a down projection are skipped. Raises ArchitectureError if no layer has a down projection, or if
    `find_down_projection` raises it for one of them.
    """
    families = _get_families(config)
    limit = read_layer_limit(config)
    found: set[tuple[int, ExpertChoice]] = set()
    for tensor in shapes:
        for _, layout, layer, expert in _list_matches(families, tensor):
            if limit is not None and layer >= limit:
                continue
            if "expert" in layout.axes:
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
    if len(coordinate.index) != len(shape) or not all(0 <= i < n for i, n in zip(coordinate.index, shape, strict=True)):
        return None
    for _, layout, layer, named_expert in _list_matches(_get_families(config), coordinate.tensor):
        if len(layout.axes.split()) != len(coordinate.index):
            continue
        expert = coordinate.index[0] if "expert" in layout.axes else named_expert
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
    families = _get_families(config)
    tensor, index = coordinate
    matches = _list_loaded_matches(config, families, coordinate, shapes)
    transposed = [layout.stored_only for _, layout, _, _ in matches]
    if any(transposed) and not all(transposed):
        what = "the name of the tensor does not tell whether it is stored as [row, col] or [col, row]"
        raise ArchitectureError(what, tensor, "give the stored shapes")

    # A tensor that is transposed while loading keeps its name, but the stored index would name another scalar of it.
    candidates = [] if any(transposed) else [coordinate]
    for family, layout, layer, named_expert in matches:
        row, col, expert = _decode(layout.axes, index, named_expert)
        candidates += [
            Coordinate(prefix + target.name.format(layer=layer, expert=expert), _encode(target.axes, row, col, expert))
            for target in sorted(family.layouts, key=lambda target: target != layout)  # the stored layout first
            if target.kind == layout.kind and not target.stored_only
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
) -> list[_Match]:
    """Return the layouts that agree with the length of a coordinate's index and with the stored shape of its tensor.

    Raises ArchitectureError if the shape agrees with no layout, or with several layouts of a known family.
    """
    tensor, index = coordinate
    matches = [m for m in _list_matches(families, tensor) if len(m[1].axes.split()) == len(index)]
    if shapes is None or tensor not in shapes or not matches:
        return matches
    layouts = [layout for _, layout, _, _ in matches]
    if not find_known_families(config) and len(_list_fitting_axes(config, shapes[tensor], layouts)) > 1:
        return []  # of an unknown family, transformers is assumed to load every tensor in its stored orientation
    axes = _find_orientation(config, tensor, shapes[tensor], layouts)
    return [m for m in matches if m[1].axes == axes]


def name_prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the prefixes that names of stored and loaded tensors may have, such as "model." and "text_model."."""
    return tuple(dict.fromkeys(prefix for family in _get_families(config) for prefix in family.prefixes))


def has_residual_rows(config: Mapping[str, Any], projection: DownProjection) -> bool:
    """Return True if each row of a down projection is a channel of the residual stream.

    The rows are other channels if another matrix multiplies the output of the MLP, as in Zamba, or of the experts, as
    in a Nemotron 3 with a latent space.
    """
    layouts = list_layouts(config, projection)
    return all(layout.direct for layout in layouts) and _read_row_count(config, layouts) == read_hidden_size(config)


def list_layouts(config: Mapping[str, Any], projection: DownProjection) -> tuple[Layout, ...]:
    """List the layouts that a down projection may have: one kind of MLP for a known family, several for others."""
    matches = _list_matches(_get_families(config), projection.tensor)
    known = find_known_families(config)
    return tuple(layout for _, layout, _, _ in matches if not known or layout.axes == projection.axes)


def list_input_layouts(config: Mapping[str, Any], projection: DownProjection) -> list[InputLayout]:
    """List the ways in which the input projections of an MLP may be stored, the most likely first.

    The layouts of the model's own family come first. Those of other families follow, if the down projection's module
    has the same name there: some checkpoints store the experts or the gate in another way than their family does. Each
    set of names occurs once.
    """
    module = _get_module_name(projection.tensor)
    everything = (layout for family in FAMILIES for layout in family.layouts)
    others = (layout for layout in everything if _get_module_name(layout.name) == module)
    found: dict[tuple[str, ...], InputLayout] = {}
    for layout in (*list_layouts(config, projection), *others):
        if layout.inputs is not None:
            found.setdefault(layout.inputs.names, layout.inputs)
    return list(found.values())


def _get_module_name(tensor: str) -> str:
    return tensor.removesuffix(".weight").rpartition(".")[2]


# Choosing the family ------------------------------------------------------------------------------------------------


def _get_families(config: Mapping[str, Any]) -> tuple[Family, ...]:
    """Return the families of the model type in config.json, or all families if the model type is unknown.

    If all families are returned, the names of the tensors decide between them. An encoder-decoder of unknown type has
    no family, because "layer 3" may be a layer of the encoder or of the decoder.
    """
    if known := find_known_families(config):
        return known
    if config.get("is_encoder_decoder") is True:
        return ()
    # The model type decides which tensors transformers transposes while loading. If the type is unknown, we assume that
    # transformers transposes no tensor.
    return tuple(
        Family(f.name, f.model_types, f.trunks, tuple(layout for layout in f.layouts if not layout.stored_only))
        for f in FAMILIES
    )


def find_known_families(config: Mapping[str, Any]) -> tuple[Family, ...]:
    """Return the families that have the model type in config.json; an empty tuple if no family has it."""
    for section in list_sections(config):
        known = tuple(family for family in FAMILIES if section.get("model_type") in family.model_types)
        if known:
            return known
    return ()


def list_sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parts of config.json that may describe the language model, the most specific first."""
    nested = [config.get(key) for key in _SECTIONS]
    return [inner for section in nested if isinstance(section, Mapping) for inner in list_sections(section)] + [config]


def find_number(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first positive integer that config.json has under one of the keys; None if it has none.

    The most specific section is searched first, and in each section the keys in the given order.
    """
    values = (section.get(key) for section in list_sections(config) for key in keys)
    return next((value for value in values if type(value) is int and value > 0), None)


def read_model_type(config: Mapping[str, Any]) -> str:
    """Return the model type of the language model in config.json, for messages; "not given" if there is none."""
    types = [section["model_type"] for section in list_sections(config) if "model_type" in section]
    return str(types[0]) if types else "not given"


def read_layer_limit(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers that config.json states; None if it states no number."""
    return find_number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")


# Names --------------------------------------------------------------------------------------------------------------


@cache
def _compile_pattern(trunks: tuple[str, ...], name: str) -> re.Pattern[str]:
    """Compile the pattern of the full tensor names of a layout. Its groups "layer" and "expert" match the numbers.

    `name` is the layout's name, such as "layers.{layer}.mlp.down_proj.weight". `trunks` are the family's prefixes.
    """
    prefix = "|".join(map(re.escape, list_prefixes(trunks)))
    # Numbers with leading zeros do not match, because `_map_possible_names` builds names without them.
    number = r"(?P<{}>0|[1-9][0-9]{{0,8}})"
    tail = re.escape(name)
    for field in ("layer", "expert"):
        tail = tail.replace(re.escape(f"{{{field}}}"), number.format(field))
    return re.compile(f"(?:{prefix}){tail}")


def _list_matches(families: tuple[Family, ...], tensor: str) -> list[_Match]:
    """Return what a tensor's name says about the down projection, once for each layout that has such a name.

    The list is empty if the tensor is not a down projection.
    """
    found: list[_Match] = []
    for family in families:
        for layout in family.layouts:
            match = _compile_pattern(family.trunks, layout.name).fullmatch(tensor)
            if match is None:
                continue
            number = match.groupdict().get("expert")
            expert: ExpertChoice = "shared" if layout.kind == "shared" else None if number is None else int(number)
            found.append((family, layout, int(match["layer"]), expert))
    return found


def _map_possible_names(families: tuple[Family, ...], layer: int, expert: ExpertChoice) -> dict[str, list[Layout]]:
    """Map every tensor name that the down projection of a layer or expert may have to the layouts with that name."""
    kind: ProjectionKind = "dense" if expert is None else "shared" if expert == "shared" else "routed"
    names: dict[str, list[Layout]] = {}
    for family in families:
        for layout in family.layouts:
            if layout.kind == kind:
                tail = layout.name.format(layer=layer, expert=expert)
                for prefix in family.prefixes:
                    names.setdefault(prefix + tail, []).append(layout)
    return names


def _list_stored_names(
    families: tuple[Family, ...], shapes: Shapes, layer: int, expert: ExpertChoice
) -> dict[str, list[Layout]]:
    """Return the names of `_map_possible_names` under which a tensor is stored, with the layouts of each name."""
    return {name: layouts for name, layouts in _map_possible_names(families, layer, expert).items() if name in shapes}


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


def _list_possible_axes(config: Mapping[str, Any], layouts: list[Layout]) -> set[Axes]:
    """Return the orders of axes that a tensor may have if its name fits these layouts.

    If the family is unknown, these are the orders in which known families store tensors with the same last part of the
    name. For example, known families store `experts.down_proj` in both orientations.
    """
    axes = {layout.axes for layout in layouts}
    if find_known_families(config):
        return axes
    tails = {_split_tail(layout) for layout in layouts}
    return axes | {layout.axes for family in FAMILIES for layout in family.layouts if _split_tail(layout) in tails}


def _split_tail(layout: Layout) -> tuple[str, int]:
    """Return the last part of a layout's name and the number of its axes, such as ("down_proj.weight", 2)."""
    parts = layout.name.split(".")
    return ".".join(parts[-2:] if parts[-1] == "weight" else parts[-1:]), len(layout.axes.split())


def read_hidden_size(config: Mapping[str, Any]) -> int | None:
    """Return the hidden size that config.json states; None if it states none."""
    return find_number(config, "hidden_size", "n_embd", "n_embed", "d_model")


def _read_row_count(config: Mapping[str, Any], layouts: Sequence[Layout]) -> int | None:
    """Return the number of rows that config.json states for a down projection; None if it states none."""
    stated = (find_number(config, layout.rows_key) for layout in layouts if layout.rows_key)
    return next((rows for rows in stated if rows is not None), None) or read_hidden_size(config)


def _list_fitting_axes(config: Mapping[str, Any], shape: tuple[int, ...], layouts: list[Layout]) -> set[Axes]:
    """Return the possible orders of a tensor's axes that agree with its shape and the row count in config.json."""
    hidden = _read_row_count(config, layouts)
    return {
        axes
        for axes in _list_possible_axes(config, layouts)
        if len(axes.split()) == len(shape) and hidden in (None, dict(zip(axes.split(), shape, strict=True))["row"])
    }


def _find_orientation(config: Mapping[str, Any], name: str, shape: tuple[int, ...], layouts: list[Layout]) -> Axes:
    """Return the order of a tensor's axes that fits its shape. Raises ArchitectureError if no order or several fit."""
    hidden = _read_row_count(config, layouts)
    fitting = _list_fitting_axes(config, shape, layouts)
    if not fitting:
        possible = sorted(_list_possible_axes(config, layouts))
        wanted = " or ".join(f"[{axes.replace(' ', ', ')}]" for axes in possible)
        rows = "" if hidden is None else f" with {hidden} rows"
        what = f"the down projection has shape {list(shape)}, but {wanted}{rows} is expected"
        raise ArchitectureError(what, name, _BY_NAME)
    if len(fitting) > 1:
        why = "config.json does not give the hidden size" if hidden is None else "the matrix is square"
        raise ArchitectureError("the order of rows and columns is not known", name, f"{why}; {_BY_NAME}")
    return fitting.pop()


# Refusals -----------------------------------------------------------------------------------------------------------


def refuse_packed(name: str, shapes: Shapes, what: str = "the down projection") -> None:
    """Raise ArchitectureError if a matrix is stored in packed form. `what` describes it in the message."""
    for suffix in PACKED_SUFFIXES:
        packed = name.removesuffix(".weight") + suffix
        if packed in shapes:
            raise ArchitectureError(
                f"{what} is packed, so no single scalar of it can be edited",
                packed,
                "edit the checkpoint before it is quantised",
            )


def refuse_otherwise_stored(name: str, shapes: Shapes, what: str = "the down projection") -> None:
    """Raise ArchitectureError if tensors of a matrix are stored, but not its weight. `what` is for the message."""
    if not name.endswith(".weight") or name in shapes:
        return
    module = name.removesuffix("weight")
    stored = sorted(t for t in shapes if t.startswith(module) and t != f"{module}bias")
    if stored:
        how = f"{what} is quantised or stored in parts, so no single scalar of it can be edited"
        raise ArchitectureError(how, stored[0], "edit the checkpoint before it is quantised")


def _list_layer_numbers(families: tuple[Family, ...], shapes: Shapes) -> set[int]:
    """Return the numbers of all layers of which a tensor is stored.

    Tensors named `NAME.weight.REST`, which quantisers add, do not count.
    """
    starts = {
        (prefix + layout.name).split("{layer}")[0]
        for family in families
        for layout in family.layouts
        for prefix in family.prefixes
    }
    pattern = re.compile(f"(?:{'|'.join(map(re.escape, sorted(starts)))})(0|[1-9][0-9]{{0,8}})\\.")
    return {int(match[1]) for tensor in shapes if ".weight." not in tensor and (match := pattern.match(tensor))}


def _explain_missing(
    config: Mapping[str, Any], families: tuple[Family, ...], shapes: Shapes, layer: int, expert: ExpertChoice
) -> ArchitectureError:
    """Return the error that explains why the down projection of a layer or expert was not found.

    Raises ArchitectureError itself if the down projection is packed or quantised.
    """
    for place in (expert, None, 0, "shared"):
        for name in _map_possible_names(families, layer, place):
            refuse_packed(name, shapes)

    by_name = 1 + max(_list_layer_numbers(families, shapes), default=-1)
    counts = [count for count in (by_name, read_layer_limit(config)) if count]
    if counts and not 0 <= layer < min(counts):
        where = f"it has layers 0 to {min(counts) - 1}"
        return ArchitectureError(f"layer {layer} is beyond the model", where, _BY_NAME)
    for place in (expert, None, 0, "shared"):
        for name in _map_possible_names(families, layer, place):
            refuse_otherwise_stored(name, shapes)

    if (error := _explain_expert(families, shapes, layer, expert)) is not None:
        return error
    sought = {layout.name.format(layer=layer, expert=expert or 0) for family in families for layout in family.layouts}
    return ArchitectureError(
        f"no known down projection in layer {layer}",
        f"model_type {read_model_type(config)}",
        f"looked for {', '.join(sorted(sought)) or 'no name, because an encoder-decoder has two stacks of layers'}; "
        f"{_BY_NAME}",
    )


def _explain_expert(
    families: tuple[Family, ...], shapes: Shapes, layer: int, expert: ExpertChoice
) -> ArchitectureError | None:
    """Return the error for an expert that is not given, given for a dense layer, or not in the layer.

    Returns None if the layer has no down projection with a known name.
    """
    dense, routed, shared = (bool(_list_stored_names(families, shapes, layer, place)) for place in (None, 0, "shared"))
    if dense:
        return ArchitectureError(f"layer {layer} is dense", f"it has no expert {expert}", "leave expert out")
    choices = [f"0 to {_count_experts(families, shapes, layer) - 1}"] if routed else []
    choice = ", ".join([*choices, "shared"] if shared else choices)
    if not choice:
        return None
    if expert is None:
        return ArchitectureError(f"layer {layer} is a mixture of experts", "no expert is given", f"expert: {choice}")
    return _make_expert_error(layer, expert, choice)


def _make_expert_error(layer: int, expert: ExpertChoice, choice: str) -> ArchitectureError:
    """Return the error for an expert that does not exist. `choice` lists the experts of the layer ("0 to 7")."""
    return ArchitectureError(f"layer {layer} has no expert {expert}", f"its experts are {choice}")


def _count_experts(families: tuple[Family, ...], shapes: Shapes, layer: int) -> int:
    """Return the number of routed experts of a layer, which are stored in one stacked tensor or one by one."""
    count = 0
    while names := _list_stored_names(families, shapes, layer, count):
        for name, layouts in names.items():
            if "expert" in layouts[0].axes:
                return shapes[name][0] if shapes[name] else 0
        count += 1
    return count
