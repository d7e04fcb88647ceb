"""Count the quantised weights of a checkpoint by layout, and list the matrices that were kept in high precision.

Weights with the same role, dtypes and shapes have the same layout, so only one of them is examined. A *role* is the
name of a weight with * for each number, such as "model.layers.*.mlp.down_proj.weight".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.find import (
    StoredTensors,
    describe_headers,
    find_codes,
    find_matrix,
    get_role,
    name_weight,
)
from swsurgery.errors import pluralise
from swsurgery.storage.dtypes import FloatDtype

MAX_EXAMINED = 200
"""Maximum number of weights whose layout is determined. A model with experts has about twenty roles."""

_UNEXAMINED = f"only {MAX_EXAMINED} kinds of weights are examined"
"""Reason for a weight after the first MAX_EXAMINED that differ in role, dtypes or shapes."""

MAX_ROLES = 5
"""Maximum number of names, or of roles, that are listed in one line."""


@dataclass(frozen=True)
class LayoutCount:
    """The number of weights that are stored in one layout. `layout` is None if it cannot be decided for `reason`."""

    layout: str | None
    weights: int
    reason: str = ""

    def describe(self) -> str:
        """Describe the layout in one line, such as "210 weights: gptq, 4 bits, groups of 128"."""
        return f"{pluralise(self.weights, 'weight')}: {self.layout or f'cannot be read, because {self.reason}'}"

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON."""
        return {"layout": self.layout, "weights": self.weights, "reason": self.reason or None}


@dataclass(frozen=True)
class LayoutSummary:
    """The layouts of the quantised weights of a checkpoint.

    `kept` maps each dtype to the names of the matrices in numbered layers that are stored as plain floats of this
    dtype. Norms and other vectors are left out, and so are embeddings and heads.
    """

    counts: tuple[LayoutCount, ...] = ()
    kept: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def to_lines(self) -> list[str]:
        """Describe each layout in one line. The last line also lists the matrices in high precision."""
        lines = [count.describe() for count in self.counts]
        kept = "".join(f"; {len(names)} kept in {dtype}: {_list_roles(names)}" for dtype, names in self.kept)
        return [*lines[:-1], lines[-1] + kept] if lines else []

    def to_json(self) -> dict[str, object]:
        """Return the counts, the names of the matrices in high precision by dtype, and both as lines of text."""
        return {
            "text": self.to_lines(),
            "layouts": [count.to_json() for count in self.counts],
            "high_precision": {dtype: list(names) for dtype, names in self.kept},
        }


def summarise_layouts(checkpoint: StoredTensors) -> LayoutSummary:
    """Count the quantised weights by layout, from the headers and a few bytes of one weight of each role."""
    found: dict[object, tuple[str | None, str]] = {}
    counts: dict[tuple[str | None, str], int] = {}
    for weight in dict.fromkeys(_list_quantised(checkpoint)):
        alike = describe_headers(checkpoint, weight)
        if alike not in found:
            found[alike] = _find_layout(checkpoint, weight) if len(found) < MAX_EXAMINED else (None, _UNEXAMINED)
        counts[found[alike]] = counts.get(found[alike], 0) + 1
    if not counts:
        return LayoutSummary()
    return LayoutSummary(
        tuple(LayoutCount(layout, number, reason) for (layout, reason), number in counts.items()),
        tuple(_find_kept(checkpoint).items()),
    )


def _list_quantised(checkpoint: StoredTensors) -> Iterator[str]:
    """Yield the names of the quantised weights, as in a loaded model. A name may occur several times."""
    for name in checkpoint.infos:
        weight = name_weight(name)
        coded = find_codes(checkpoint, weight)
        if coded is not None and checkpoint.quantisation.get_reading(coded).kind != "plain":
            yield weight


def _find_layout(checkpoint: StoredTensors, weight: str) -> tuple[str | None, str]:
    """Return (layout, "") or (None, reason)."""
    try:
        matrix = find_matrix(checkpoint, weight)
    except CannotTell as error:
        return None, str(error)
    return (matrix.layout, "") if matrix is not None else (None, "they are stored like plain weights")


def _find_kept(checkpoint: StoredTensors) -> dict[str, tuple[str, ...]]:
    """Return the names of the matrices in numbered layers that are plain floats of 16 bits or more, by dtype."""
    kept: dict[str, list[str]] = {}
    for name, info in checkpoint.infos.items():
        if len(info.shape) < 2 or not isinstance(info.dtype, FloatDtype) or info.dtype.bits < 16:
            continue
        if get_role(name) != name and checkpoint.quantisation.get_reading(name).kind == "plain":
            kept.setdefault(info.dtype.name, []).append(name)
    return {dtype: tuple(names) for dtype, names in kept.items()}


def _list_roles(names: tuple[str, ...]) -> str:
    """List names without ".weight". More than MAX_ROLES names of one role are listed as the role and their number."""
    roles: dict[str, list[str]] = {}
    for name in names:
        roles.setdefault(get_role(name), []).append(name)
    listed: list[str] = []
    for role, members in roles.items():
        listed += [f"{role.removesuffix('.weight')} ({len(members)})"] if len(members) > MAX_ROLES else members
    shown = [name.removesuffix(".weight") for name in listed[:MAX_ROLES]]
    more = [f"and {len(listed) - MAX_ROLES} more"] if len(listed) > MAX_ROLES else []
    return ", ".join([*shown, *more])
