"""Where a layer's down projection lives in the stored checkpoint.

A super weight is reported as layer, row and col (arXiv:2411.07191, table 2), in a mixture of experts with the
expert's number too. Row is the output channel, a place in the residual stream; col is the intermediate neuron.
Here that short form becomes a `Coordinate`, the name and index under which the scalar is *stored*, and back again.

Which names and axes there are is said by the table in architectures.py. This room reads no file and knows neither
torch nor transformers: it sees config.json as a mapping, and of each tensor only its name and shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from swsurgery.checkpoint.architectures import FAMILIES, Axes, Expert, Family, Kind, Layout, Shapes, prefixes_of
from swsurgery.checkpoint.quantised import PACKED_SUFFIXES
from swsurgery.errors import ArchitectureError
from swsurgery.storage.coordinate import Coordinate

_BY_NAME = "name the scalar by tensor and index instead"


@dataclass(frozen=True)
class DownProjection:
    """One down projection as stored: `rows` output channels times `cols` intermediate neurons.

    `axes` says what each axis of the stored tensor counts.
    """

    layer: int
    expert: Expert
    tensor: str
    axes: Axes
    rows: int
    cols: int

    @property
    def transposed(self) -> bool:
        """True where the tensor is stored as [..., col, row]."""
        return self.axes.endswith("col row")

    @property
    def expert_axis(self) -> int | None:
        """The axis that counts experts where one tensor stacks them all."""
        return 0 if "expert" in self.axes else None

    def index(self, row: int, col: int) -> tuple[int, ...]:
        """The index of (row, col) in the stored shape."""
        return _encode(self.axes, row, col, self.expert)


def locate(
    config: Mapping[str, Any], shapes: Shapes, *, layer: int, row: int, col: int, expert: Expert = None
) -> Coordinate:
    """The stored scalar that multiplies neuron `col` of `layer` on its way to residual channel `row`.

    `config` is config.json. Raises ArchitectureError as `down_projection` does, and where row or col is out of range.
    """
    projection = down_projection(config, shapes, layer, expert)
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
    return Coordinate(projection.tensor, projection.index(row, col))


def down_projection(config: Mapping[str, Any], shapes: Shapes, layer: int, expert: Expert = None) -> DownProjection:
    """Find one down projection by config.json and by the names that are really there.

    Raises ArchitectureError where the model stores none under a known name, the layer is beyond the model, `expert` is
    missing, superfluous or too large, the tensor is packed, or its shape does not fit the config's hidden size.
    """
    families = _families(config)
    limit = layer_limit(config)
    names = _stored_names(families, shapes, layer, expert)
    # Names may go further than the config: DeepSeek-V3 stores its token-prediction module as layer 61 of 61.
    if not names or (limit is not None and layer >= limit):
        raise _not_there(config, families, shapes, layer, expert)
    for name in names:
        _refuse_packed(name, shapes)
    if len(names) > 1:
        raise ArchitectureError(f"layer {layer} has several down projections", ", ".join(names), _BY_NAME)

    [(name, layouts)] = names.items()
    axes = _orientation(config, name, shapes[name], layouts)
    sizes = dict(zip(axes.split(), shapes[name], strict=True))
    if "expert" in sizes and isinstance(expert, int) and not 0 <= expert < sizes["expert"]:
        raise _beyond_the_experts(layer, expert, f"0 to {sizes['expert'] - 1}")
    return DownProjection(layer, expert, name, axes, rows=sizes["row"], cols=sizes["col"])


def down_projections(config: Mapping[str, Any], shapes: Shapes) -> Iterator[DownProjection]:
    """Every down projection of the model: by layer, within it dense first, then expert 0, 1, ..., shared last.

    Layers that store none are passed over. Raises ArchitectureError where no layer has one or one is packed.
    """
    families = _families(config)
    limit = layer_limit(config)
    found: set[tuple[int, Expert]] = set()
    for tensor in shapes:
        for _, layout, layer, expert in _matches(families, tensor):
            if limit is not None and layer >= limit:
                continue
            if "expert" in layout.axes:
                shape = shapes[tensor]
                # An empty tensor may claim any number of experts: it costs the file nothing.
                found.update((layer, number) for number in range(shape[0] if shape and all(shape) else 0))
            else:
                found.add((layer, expert))
    if not found:
        down_projection(config, shapes, 0)  # says what was looked for, or that it is packed
    return iter([down_projection(config, shapes, *place) for place in sorted(found, key=_order)])


def short_form(
    config: Mapping[str, Any], shapes: Shapes, coordinate: Coordinate
) -> tuple[int, int, int, Expert] | None:
    """(layer, row, col, expert) of a stored scalar: the inverse of `locate`. None where it has no short form."""
    shape = shapes.get(coordinate.tensor, ())
    if len(coordinate.index) != len(shape) or not all(0 <= i < n for i, n in zip(coordinate.index, shape, strict=True)):
        return None
    for _, layout, layer, named_expert in _matches(_families(config), coordinate.tensor):
        if len(layout.axes.split()) != len(coordinate.index):
            continue
        expert = coordinate.index[0] if "expert" in layout.axes else named_expert
        try:
            projection = down_projection(config, shapes, layer, expert)
        except ArchitectureError:
            continue
        if projection.tensor == coordinate.tensor:
            row, col, _ = _decode(projection.axes, coordinate.index, expert)
            return layer, row, col, expert
    return None


def loaded_candidates(
    config: Mapping[str, Any], coordinate: Coordinate, shapes: Shapes | None = None
) -> tuple[Coordinate, ...]:
    """Where a model that transformers loaded may hold a stored scalar: names and indices to try, best first.

    Look each name up in `model.named_parameters(remove_duplicate=False)` (a tied tensor has two names); the first that
    exists is the one. First the stored name, then the same under other prefixes, then its place in the stacked experts
    of transformers >= 5. Tensors that are no down projection get other prefixes only: a fusion of others is not
    followed. `shapes` is needed only where a family stores one name in two orientations (Qwen3-VL-MoE); without it
    that raises ArchitectureError.
    """
    families = _families(config)
    tensor, index = coordinate
    matches = [m for m in _matches(families, tensor) if len(m[1].axes.split()) == len(index)]
    if shapes is not None and tensor in shapes and matches:
        layouts = [layout for _, layout, _, _ in matches]
        if not _known_families(config) and len(_fitting_axes(config, shapes[tensor], layouts)) > 1:
            matches = []  # nothing is known to be turned while an unknown family is loaded: it keeps its index
        else:
            axes = _orientation(config, tensor, shapes[tensor], layouts)
            matches = [m for m in matches if m[1].axes == axes]
    turned = [layout.stored_only for _, layout, _, _ in matches]
    if any(turned) and not all(turned):
        raise ArchitectureError("its orientation is not known by name alone", tensor, "give the stored shapes")

    # A tensor that is turned while loading keeps its name, so under its own index it would be another scalar.
    candidates = [] if any(turned) else [coordinate]
    for family, layout, layer, named_expert in matches:
        row, col, expert = _decode(layout.axes, index, named_expert)
        candidates += [
            Coordinate(prefix + target.name.format(layer=layer, expert=expert), _encode(target.axes, row, col, expert))
            for target in sorted(family.layouts, key=lambda target: target != layout)  # its own layout first
            if target.kind == layout.kind and not target.stored_only
            for prefix in family.prefixes
        ]
    if not matches:
        prefixes = list(dict.fromkeys(prefix for family in families for prefix in family.prefixes))
        longest = max((prefix for prefix in prefixes if tensor.startswith(prefix)), key=len, default="")
        rests = dict.fromkeys((tensor.removeprefix(longest), tensor))
        candidates += [Coordinate(prefix + rest, index) for rest in rests for prefix in ("", *prefixes)]
    return tuple(dict.fromkeys(candidates))


def name_prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What may stand in front of a tensor's name, stored or loaded: "model.", "language_model.model.", and so on."""
    return tuple(dict.fromkeys(prefix for family in _families(config) for prefix in family.prefixes))


# Choosing the family ------------------------------------------------------------------------------------------------


def _families(config: Mapping[str, Any]) -> tuple[Family, ...]:
    """The family that config.json names, or, where it names none that is known, all of them: the tensor names decide.

    An unknown encoder-decoder gets none, since "layer 3" would not say which of the two stacks is meant.
    """
    if known := _known_families(config):
        return known
    if config.get("is_encoder_decoder") is True:
        return ()
    # What transformers turns while loading is known per model type only; an unknown one is taken as it is stored.
    return tuple(
        Family(f.name, f.model_types, f.trunks, tuple(layout for layout in f.layouts if not layout.stored_only))
        for f in FAMILIES
    )


def _known_families(config: Mapping[str, Any]) -> tuple[Family, ...]:
    """The families of the model type that config.json names; empty if it names none that is known."""
    for section in _sections(config):
        known = tuple(family for family in FAMILIES if section.get("model_type") in family.model_types)
        if known:
            return known
    return ()


def _sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of config.json that may describe the language model, the most specific first."""
    nested = [config.get(key) for key in ("text_config", "llm_config")]
    return [section for section in nested if isinstance(section, Mapping)] + [config]


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    values = (section.get(key) for section in _sections(config) for key in keys)
    return next((value for value in values if type(value) is int and value > 0), None)


def layer_limit(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers that config.json gives; None if it gives none."""
    return _number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")


# Names --------------------------------------------------------------------------------------------------------------


@cache
def _pattern(trunks: tuple[str, ...], name: str) -> re.Pattern[str]:
    prefix = "|".join(map(re.escape, prefixes_of(trunks)))
    # No leading zeros: what matches must be what `_possible_names` writes for that layer and expert.
    number = r"(?P<{}>0|[1-9][0-9]{{0,8}})"
    tail = re.escape(name)
    for field in ("layer", "expert"):
        tail = tail.replace(re.escape(f"{{{field}}}"), number.format(field))
    return re.compile(f"(?:{prefix}){tail}")


def _matches(families: tuple[Family, ...], tensor: str) -> list[tuple[Family, Layout, int, Expert]]:
    """Every reading of a whole tensor name as a down projection; the expert of a stacked tensor is left None."""
    found: list[tuple[Family, Layout, int, Expert]] = []
    for family in families:
        for layout in family.layouts:
            match = _pattern(family.trunks, layout.name).fullmatch(tensor)
            if match is None:
                continue
            number = match.groupdict().get("expert")
            expert: Expert = "shared" if layout.kind == "shared" else None if number is None else int(number)
            found.append((family, layout, int(match["layer"]), expert))
    return found


def _possible_names(families: tuple[Family, ...], layer: int, expert: Expert) -> dict[str, list[Layout]]:
    kind: Kind = "dense" if expert is None else "shared" if expert == "shared" else "routed"
    names: dict[str, list[Layout]] = {}
    for family in families:
        for layout in family.layouts:
            if layout.kind == kind:
                tail = layout.name.format(layer=layer, expert=expert)
                for prefix in family.prefixes:
                    names.setdefault(prefix + tail, []).append(layout)
    return names


def _stored_names(families: tuple[Family, ...], shapes: Shapes, layer: int, expert: Expert) -> dict[str, list[Layout]]:
    return {name: layouts for name, layouts in _possible_names(families, layer, expert).items() if name in shapes}


def _order(place: tuple[int, Expert]) -> tuple[int, float]:
    layer, expert = place
    return layer, -1 if expert is None else float("inf") if expert == "shared" else expert


# Axes ---------------------------------------------------------------------------------------------------------------


def _encode(axes: str, row: int, col: int, expert: Expert) -> tuple[int, ...]:
    """Order the coordinates of a scalar as the axes of its tensor; the inverse of `_decode`."""
    values = {"row": row, "col": col}
    if expert is not None and expert != "shared":
        values["expert"] = expert
    return tuple(values[axis] for axis in axes.split())


def _decode(axes: str, index: tuple[int, ...], expert: Expert) -> tuple[int, int, Expert]:
    values = dict(zip(axes.split(), index, strict=True))
    return values["row"], values["col"], values.get("expert", expert)


def _possible_axes(config: Mapping[str, Any], layouts: list[Layout]) -> set[Axes]:
    """What the axes of a tensor with these layouts may mean.

    An unknown family may store `experts.down_proj` either way round, as the known families do, whatever the block is
    called in which it stores it.
    """
    axes = {layout.axes for layout in layouts}
    if _known_families(config):
        return axes
    tails = {_tail(layout) for layout in layouts}
    return axes | {layout.axes for family in FAMILIES for layout in family.layouts if _tail(layout) in tails}


def _tail(layout: Layout) -> tuple[str, int]:
    """The last part of a layout's name, with ".weight" if it has one, and its number of dimensions."""
    parts = layout.name.split(".")
    return ".".join(parts[-2:] if parts[-1] == "weight" else parts[-1:]), len(layout.axes.split())


def _hidden_size(config: Mapping[str, Any]) -> int | None:
    return _number(config, "hidden_size", "n_embd", "n_embed", "d_model")


def _fitting_axes(config: Mapping[str, Any], shape: tuple[int, ...], layouts: list[Layout]) -> set[Axes]:
    """The meanings of the axes that the number of dimensions and the config's hidden size allow."""
    hidden = _hidden_size(config)
    return {
        axes
        for axes in _possible_axes(config, layouts)
        if len(axes.split()) == len(shape) and hidden in (None, dict(zip(axes.split(), shape, strict=True))["row"])
    }


def _orientation(config: Mapping[str, Any], name: str, shape: tuple[int, ...], layouts: list[Layout]) -> Axes:
    """The one meaning of the axes that the shape allows. Raises ArchitectureError if it allows none or several."""
    hidden = _hidden_size(config)
    fitting = _fitting_axes(config, shape, layouts)
    if not fitting:
        possible = sorted(_possible_axes(config, layouts))
        wanted = " or ".join(f"[{axes.replace(' ', ', ')}]" for axes in possible)
        rows = "" if hidden is None else f" with {hidden} rows"
        raise ArchitectureError(f"shape {list(shape)} is not {wanted}{rows}", name, _BY_NAME)
    if len(fitting) > 1:
        why = "config.json does not give the hidden size" if hidden is None else "the matrix is square"
        raise ArchitectureError("the order of rows and columns is not known", name, f"{why}; {_BY_NAME}")
    return fitting.pop()


# Refusals -----------------------------------------------------------------------------------------------------------


def _refuse_packed(name: str, shapes: Shapes) -> None:
    for suffix in PACKED_SUFFIXES:
        packed = name.removesuffix(".weight") + suffix
        if packed in shapes:
            raise ArchitectureError(
                "the down projection is packed, so no single scalar of it can be edited",
                packed,
                "edit the checkpoint before it is quantised",
            )


def _refuse_otherwise_stored(name: str, shapes: Shapes) -> None:
    """Raise ArchitectureError if the module of a down projection is stored, but under other names than its weight."""
    if not name.endswith(".weight") or name in shapes:
        return
    module = name.removesuffix("weight")
    stored = sorted(t for t in shapes if t.startswith(module) and t != f"{module}bias")
    if stored:
        raise ArchitectureError("the down projection is quantised or stored in parts, so no single scalar of it can be "
                                "edited", stored[0], "edit the checkpoint before it is quantised")  # fmt: skip


def _layer_numbers(families: tuple[Family, ...], shapes: Shapes) -> set[int]:
    """Return the number of every layer that stores a tensor of whatever kind, other than `NAME.weight.REST`."""
    starts = {
        (prefix + layout.name).split("{layer}")[0]
        for family in families
        for layout in family.layouts
        for prefix in family.prefixes
    }
    pattern = re.compile(f"(?:{'|'.join(map(re.escape, sorted(starts)))})(0|[1-9][0-9]{{0,8}})\\.")
    return {int(match[1]) for tensor in shapes if ".weight." not in tensor and (match := pattern.match(tensor))}


def _not_there(
    config: Mapping[str, Any], families: tuple[Family, ...], shapes: Shapes, layer: int, expert: Expert
) -> ArchitectureError:
    """Why a layer has no such down projection, as exactly as config and names tell."""
    for place in (expert, None, 0, "shared"):
        for name in _possible_names(families, layer, place):
            _refuse_packed(name, shapes)

    by_name = 1 + max(_layer_numbers(families, shapes), default=-1)
    counts = [count for count in (by_name, layer_limit(config)) if count]
    if counts and not 0 <= layer < min(counts):
        where = f"it has layers 0 to {min(counts) - 1}"
        return ArchitectureError(f"layer {layer} is beyond the model", where, _BY_NAME)
    for place in (expert, None, 0, "shared"):
        for name in _possible_names(families, layer, place):
            _refuse_otherwise_stored(name, shapes)

    dense, routed, shared = (bool(_stored_names(families, shapes, layer, place)) for place in (None, 0, "shared"))
    experts = _expert_count(families, shapes, layer)
    choice = ", ".join([f"0 to {experts - 1}"] * routed + ["shared"] * shared)
    if dense:
        return ArchitectureError(f"layer {layer} is dense", f"it has no expert {expert}", "leave expert out")
    if choice and expert is None:
        return ArchitectureError(f"layer {layer} is a mixture of experts", "no expert is given", f"expert: {choice}")
    if choice:
        return _beyond_the_experts(layer, expert, choice)

    sought = {layout.name.format(layer=layer, expert=expert or 0) for family in families for layout in family.layouts}
    model_type = next((section["model_type"] for section in _sections(config) if "model_type" in section), "not given")
    return ArchitectureError(
        f"no known down projection in layer {layer}",
        f"model_type {model_type}",
        f"looked for {', '.join(sorted(sought)) or 'none, as the layers of an encoder-decoder are two'}; {_BY_NAME}",
    )


def _beyond_the_experts(layer: int, expert: Expert, choice: str) -> ArchitectureError:
    return ArchitectureError(f"layer {layer} has no expert {expert}", f"its experts are {choice}")


def _expert_count(families: tuple[Family, ...], shapes: Shapes, layer: int) -> int:
    """How many routed experts a layer stores, stacked or one by one."""
    count = 0
    while names := _stored_names(families, shapes, layer, count):
        for name, layouts in names.items():
            if "expert" in layouts[0].axes:
                return shapes[name][0] if shapes[name] else 0
        count += 1
    return count
