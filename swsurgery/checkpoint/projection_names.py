"""Match names of tensors with the templates of families, and explain why a down projection was not found.

This module reads names and shapes only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeAlias

from swsurgery.checkpoint.architectures import ExpertChoice, Shapes
from swsurgery.checkpoint.family import Family, ProjectionKind, Template, list_prefixes
from swsurgery.checkpoint.model_config import read_layer_limit, read_model_type
from swsurgery.checkpoint.quantised import PACKED_SUFFIXES
from swsurgery.errors import ArchitectureError

BY_NAME = "name the scalar by tensor and index instead"
"""The remedy in most error messages of this module."""

Match: TypeAlias = tuple[Family, Template, int, ExpertChoice]
"""What a tensor's name says if it is the name of a down projection: the family, the template, the layer and the expert.
The expert is None in a dense layer, and in a tensor that stacks all experts."""

MAX_SOUGHT = 4
"""Maximum number of tensor names that a message lists as looked for."""


@cache
def _compile_pattern(trunks: tuple[str, ...], name: str) -> re.Pattern[str]:
    """Compile the pattern of the full tensor names of a template. Its groups "layer" and "expert" match the numbers.

    `name` is the template's name, such as "layers.{layer}.mlp.down_proj.weight". `trunks` are the family's prefixes.
    """
    prefix = "|".join(map(re.escape, list_prefixes(trunks)))
    # Numbers with leading zeros do not match, because `list_possible_names` builds names without them.
    number = r"(?P<{}>0|[1-9][0-9]{{0,8}})"
    tail = re.escape(name)
    for field in ("layer", "expert"):
        tail = tail.replace(re.escape(f"{{{field}}}"), number.format(field))
    return re.compile(f"(?:{prefix}){tail}")


def list_matches(families: tuple[Family, ...], tensor: str) -> list[Match]:
    """Return what a tensor's name says about the down projection, once for each template that has such a name.

    The list is empty if the tensor is not a down projection.
    """
    found: list[Match] = []
    for family in families:
        for template in family.templates:
            match = _compile_pattern(family.trunks, template.name).fullmatch(tensor)
            if match is None:
                continue
            number = match.groupdict().get("expert")
            expert: ExpertChoice = "shared" if template.kind == "shared" else None if number is None else int(number)
            found.append((family, template, int(match["layer"]), expert))
    return found


def list_possible_names(families: tuple[Family, ...], layer: int, expert: ExpertChoice) -> dict[str, list[Template]]:
    """Map every tensor name that the down projection of a layer or expert may have to the templates with that name."""
    kind: ProjectionKind = "dense" if expert is None else "shared" if expert == "shared" else "routed"
    names: dict[str, list[Template]] = {}
    for family in families:
        for template in family.templates:
            if template.kind == kind:
                tail = template.name.format(layer=layer, expert=expert)
                for prefix in family.prefixes:
                    names.setdefault(prefix + tail, []).append(template)
    return names


def list_stored_names(
    families: tuple[Family, ...], shapes: Shapes, layer: int, expert: ExpertChoice
) -> dict[str, list[Template]]:
    """Return the names of `list_possible_names` under which a tensor is stored, with the templates of each name."""
    return {
        name: templates for name, templates in list_possible_names(families, layer, expert).items() if name in shapes
    }


def refuse_packed(name: str, shapes: Shapes, what: str = "the down projection") -> None:
    """Raise ArchitectureError if a matrix is stored in packed form. `what` describes it in the message."""
    for suffix in PACKED_SUFFIXES:
        packed = name.removesuffix(".weight") + suffix
        if packed in shapes:
            raise ArchitectureError(
                f"{what} is packed, so its scalars are not stored one by one",
                packed,
                "use the checkpoint before quantisation",
            )


def refuse_otherwise_stored(name: str, shapes: Shapes, what: str = "the down projection") -> None:
    """Raise ArchitectureError if tensors of a matrix are stored, but not its weight. `what` is for the message."""
    if not name.endswith(".weight") or name in shapes:
        return
    module = name.removesuffix("weight")
    stored = sorted(t for t in shapes if t.startswith(module) and t != f"{module}bias")
    if stored:
        how = f"{what} is quantised or stored in parts, so its scalars are not stored one by one"
        raise ArchitectureError(how, stored[0], "use the checkpoint before quantisation")


def _list_layer_numbers(families: tuple[Family, ...], shapes: Shapes) -> set[int]:
    """Return the numbers of all layers of which a tensor is stored.

    Tensors named `NAME.weight.REST`, which quantisers add, do not count.
    """
    starts = {
        (prefix + template.name).split("{layer}")[0]
        for family in families
        for template in family.templates
        for prefix in family.prefixes
    }
    pattern = re.compile(f"(?:{'|'.join(map(re.escape, sorted(starts)))})(0|[1-9][0-9]{{0,8}})\\.")
    return {int(match[1]) for tensor in shapes if ".weight." not in tensor and (match := pattern.match(tensor))}


def explain_missing(
    config: Mapping[str, Any], families: tuple[Family, ...], shapes: Shapes, layer: int, expert: ExpertChoice
) -> ArchitectureError:
    """Return the error that explains why the down projection of a layer or expert was not found.

    Raises ArchitectureError itself if the down projection is packed or quantised.
    """
    for place in (expert, None, 0, "shared"):
        for name in list_possible_names(families, layer, place):
            refuse_packed(name, shapes)

    by_name = 1 + max(_list_layer_numbers(families, shapes), default=-1)
    counts = [count for count in (by_name, read_layer_limit(config)) if count]
    if counts and not 0 <= layer < min(counts):
        where = f"it has layers 0 to {min(counts) - 1}"
        return ArchitectureError(f"layer {layer} is beyond the model", where, BY_NAME)
    for place in (expert, None, 0, "shared"):
        for name in list_possible_names(families, layer, place):
            refuse_otherwise_stored(name, shapes)

    if (error := _explain_expert(families, shapes, layer, expert)) is not None:
        return error
    sought = list(
        dict.fromkeys(
            template.name.format(layer=layer, expert=expert or 0)
            for family in families
            for template in family.templates
        )
    )
    more = f" and {len(sought) - MAX_SOUGHT} other names" if len(sought) > MAX_SOUGHT else ""
    names = ", ".join(sought[:MAX_SOUGHT]) or "no name, because an encoder-decoder has two stacks of layers"
    return ArchitectureError(
        f"no known down projection in layer {layer}",
        f"model_type {read_model_type(config)}",
        f"looked for {names}{more}; {BY_NAME}",
    )


def _explain_expert(
    families: tuple[Family, ...], shapes: Shapes, layer: int, expert: ExpertChoice
) -> ArchitectureError | None:
    """Return the error for an expert that is not given, given for a dense layer, or not in the layer.

    Returns None if the layer has no down projection with a known name.
    """
    dense, routed, shared = (bool(list_stored_names(families, shapes, layer, place)) for place in (None, 0, "shared"))
    if dense:
        return ArchitectureError(f"layer {layer} is dense", f"it has no expert {expert}", "leave expert out")
    choices = [f"0 to {count_experts(families, shapes, layer) - 1}"] if routed else []
    choice = ", ".join([*choices, "shared"] if shared else choices)
    if not choice:
        return None
    if expert is None:
        return ArchitectureError(f"layer {layer} is a mixture of experts", "no expert is given", f"expert: {choice}")
    return make_expert_error(layer, expert, choice)


def make_expert_error(layer: int, expert: ExpertChoice, choice: str) -> ArchitectureError:
    """Return the error for an expert that does not exist. `choice` lists the experts of the layer ("0 to 7")."""
    return ArchitectureError(f"layer {layer} has no expert {expert}", f"its experts are {choice}")


def count_experts(families: tuple[Family, ...], shapes: Shapes, layer: int) -> int:
    """Return the number of routed experts of a layer, whether they are stacked in one tensor or stored one by one."""
    count = 0
    while names := list_stored_names(families, shapes, layer, count):
        for name, templates in names.items():
            if "expert" in templates[0].axes:
                return shapes[name][0] if shapes[name] else 0
        count += 1
    return count
