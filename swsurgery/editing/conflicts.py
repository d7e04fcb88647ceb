"""Find edits that name the same scalar.

Two operations on one scalar are an error whatever their order, with one exception: a scalar or region that one edit
protects may be inside a region that another edit changes. The change then leaves it unchanged.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

from swsurgery.editing.asked import Asked, AskedRegion, Misfit
from swsurgery.storage.region import Region


def find_conflicts(named: Iterable[tuple[int, Hashable]]) -> Iterator[Misfit]:
    """Yield a misfit for every edit of a scalar that an earlier edit also names.

    `named` contains pairs of an edit's number and a scalar, in the manifest's order.
    """
    first: dict[Hashable, int] = {}
    for number, scalar in named:
        other = first.setdefault(scalar, number)
        if other != number:
            yield _make_misfit(number, other, scalar)


def find_region_conflicts(asked: Sequence[Asked], regions: Sequence[AskedRegion]) -> Iterator[Misfit]:
    """Yield a misfit for every two edits that name a common scalar, if one of them names a region.

    Two edits with several common parts are reported once, with the first part.
    """
    groups: dict[str, list[AskedRegion]] = {}
    for one in regions:
        groups.setdefault(one.region.tensor, []).append(one)
    for scalar in asked:
        if scalar.coordinate.tensor in groups:
            point = Region.of_scalar(scalar.coordinate)
            groups[scalar.coordinate.tensor].append(AskedRegion(scalar.number, 0, scalar.edit, point, "", scalar=True))
    reported: set[tuple[int, int]] = set()
    for group in groups.values():
        for one, other in _find_overlaps(group):
            later, earlier = (one, other) if one.number > other.number else (other, one)
            pair = (later.number, earlier.number)
            if one.number == other.number or pair in reported or _may_share(one, other):
                continue
            if one.scalar and other.scalar:
                continue  # `find_conflicts` reports two scalars
            reported.add(pair)
            yield _make_misfit(*pair, one.region.intersect(other.region))


def _may_share(one: AskedRegion, other: AskedRegion) -> bool:
    """Return True if one edit protects what is inside a region that the other edit changes."""
    protects, changes = (one, other) if not one.edit.writes else (other, one)
    return not protects.edit.writes and changes.edit.writes and not changes.scalar


def _find_overlaps(group: Sequence[AskedRegion]) -> Iterator[tuple[AskedRegion, AskedRegion]]:
    """Yield each pair of regions of one tensor that have a common scalar.

    The regions are sorted along the axis on which most of them begin at different indices, so that thousands of rows,
    or of columns, are compared with their neighbours only.
    """
    rank = min(len(one.region.bounds) for one in group)
    if len(group) < 2 or any(len(one.region.bounds) != rank for one in group):
        return  # an index of another rank is reported as out of range
    axis = max(range(rank), key=lambda n: len({one.region.bounds[n][0] for one in group}), default=None)
    if axis is None:
        yield from ((one, other) for n, one in enumerate(group) for other in group[:n])
        return
    active: list[AskedRegion] = []
    for one in sorted(group, key=lambda o: (o.region.bounds[axis], o.number)):
        begin = one.region.bounds[axis][0]
        active = [other for other in active if other.region.bounds[axis][1] > begin]
        yield from ((one, other) for other in active if one.region.overlaps(other.region))
        active.append(one)


def _make_misfit(number: int, other: int, what: object) -> Misfit:
    return Misfit(number, f"{what} has two operations", other)
