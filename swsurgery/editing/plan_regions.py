"""Turn the regions that edits name into rewrites and protected regions.

Reads no tensor data and imports no numpy: the new bytes are computed while the files are copied.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Record
from swsurgery.editing.asked import AskedRegion, Misfit
from swsurgery.editing.rewrite import ProtectedRegion, Rewrite, StoredTensor
from swsurgery.editing.sources import Sources
from swsurgery.errors import NumberError, PlanError, SwsurgeryError, pluralise
from swsurgery.manifest.operations import Edit, Restore, Scale, Set, Zero
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import FloatDtype
from swsurgery.storage.region import Region
from swsurgery.storage.shard import TensorInfo

MAX_KEPT = 1 << 20
"""Maximum number of protected scalars inside one rewritten region."""


@dataclass(frozen=True)
class PlannedRegions:
    """The rewrites and the protected regions of a plan, and the edits that cannot be made."""

    rewrites: tuple[Rewrite, ...]
    protected: tuple[ProtectedRegion, ...]
    misfits: tuple[Misfit, ...]


def plan_regions(
    asked: Sequence[AskedRegion],
    scalars: Iterable[Coordinate],
    previous: Record | None,
    checkpoint: Checkpoint,
    sources: Sources,
) -> PlannedRegions:
    """Plan every region that the edits name.

    `scalars` are the scalars that this manifest protects. `previous` is the base's own record, whose protected scalars
    and regions keep their bits too.
    """
    rewrites: list[Rewrite] = []
    misfits: list[Misfit] = []
    protected = [_describe_protected(one, checkpoint) for one in asked if not one.edit.writes]
    shields = list_shields(scalars, (p.region for p in protected), previous)
    for one in asked:
        if not one.edit.writes:
            continue
        try:
            info = checkpoint.get_info(one.region.tensor)
            rewrites.append(_plan_rewrite(one, info, checkpoint, find_kept(one.region, shields), sources))
        except SwsurgeryError as error:
            misfits += [Misfit(one.number, fault) for fault in error.faults]
    return PlannedRegions(tuple(rewrites), tuple(protected), tuple(_keep_first(misfits)))


def _keep_first(misfits: Sequence[Misfit]) -> Iterator[Misfit]:
    """Keep one misfit per edit, because all tensors of a glob often have the same fault; the last part counts them."""
    seen: dict[int, list[Misfit]] = {}
    for misfit in misfits:
        seen.setdefault(misfit.number, []).append(misfit)
    for number, group in seen.items():
        more = f", and {pluralise(len(group) - 1, 'other region')} of the edit" if len(group) > 1 else ""
        yield Misfit(number, f"{group[0].message}{more}")


def _describe_protected(one: AskedRegion, checkpoint: Checkpoint) -> ProtectedRegion:
    file, start, info = find_place(one.region.tensor, checkpoint)
    return ProtectedRegion(one.target, file, one.region, info, start)


def find_place(tensor: str, checkpoint: Checkpoint) -> tuple[str, int, TensorInfo]:
    """Return the file of a tensor, the offset of its data in the file in bytes, and its header entry."""
    file = checkpoint.weight_map[tensor]
    shard = checkpoint.shards[file]
    info = shard.tensors[tensor]
    return file, shard.data_start + info.data_offsets[0], info


def _plan_rewrite(
    one: AskedRegion, info: TensorInfo, checkpoint: Checkpoint, kept: tuple[int, ...], sources: Sources
) -> Rewrite:
    """Plan one region. Raises PlanError or NumberError if the operation cannot be done on it."""
    edit, region = one.edit, one.region
    if not region.scalars:
        raise PlanError("the region has no scalars", region)
    if len(kept) == region.scalars:
        raise _make_all_kept(region)
    try:
        options, source = _find_options(edit, info, sources)
    except NumberError as error:
        raise PlanError.of(f.add_context(f"cannot {edit.op} {region}") for f in error.faults) from None
    file, start, _ = find_place(region.tensor, checkpoint)
    return Rewrite(one.target, file, region, info, start, one.number, one.part, edit.op, options, kept, source)


def _find_options(edit: Edit, info: TensorInfo, sources: Sources) -> tuple[Mapping[str, Any], StoredTensor | None]:
    """Return the options of an operation on a tensor, and the tensor with the bytes of a restore.

    Raises NumberError if the dtype does not permit the operation.
    """
    options, dtype = edit.options, info.dtype
    if isinstance(edit, Zero):
        dtypes.make_zero(dtype)
    elif isinstance(edit, Set):
        new = edit.compute_bytes(dtype, b"")
        if edit.value is not None and dtypes.encode(dtype, options["value"]) != new:
            options = {"bits": dtypes.format_bits(new)}  # the text of the value has more digits than a float64
    elif isinstance(edit, Restore):
        assert edit.source is not None  # the schema requires it, except for single scalars
        return options, sources.find(edit.source, info)
    elif not isinstance(dtype, FloatDtype):
        remedy = "use set or zero" if isinstance(edit, Scale) else "only zero, set and restore accept it"
        raise NumberError(f"{dtype.name} is not a floating-point dtype", remedy=remedy)
    return options, None


Shields = Mapping[str, tuple[Sequence[Coordinate], Sequence[Region]]]
"""The protected scalars, sorted by index, and the protected regions of each tensor."""


def list_shields(scalars: Iterable[Coordinate], regions: Iterable[Region], previous: Record | None) -> Shields:
    """Collect what this step and the earlier steps protect, by tensor."""
    points: dict[str, set[Coordinate]] = {}
    areas: dict[str, list[Region]] = {}
    earlier = previous.map_protectors() if previous else {}
    for coordinate in (*scalars, *earlier):
        points.setdefault(coordinate.tensor, set()).add(coordinate)
    older = (entry.region for _, entry in previous.list_protected_regions()) if previous else ()
    for region in (*regions, *older):
        areas.setdefault(region.tensor, []).append(region)
    return {name: (sorted(points.get(name, ())), areas.get(name, [])) for name in {*points, *areas}}


def find_kept(region: Region, shields: Shields) -> tuple[int, ...]:
    """Return the flat indices in a region of the scalars that are protected, in rising order.

    Raises PlanError for more than MAX_KEPT, and if a protected region contains the whole region.
    """
    points, areas = shields.get(region.tensor, ((), ()))
    kept: set[int] = set()
    for area in areas:
        if region.overlaps(area):
            part = region.intersect(area)
            if part == region:
                raise _make_all_kept(region)
            if part.scalars > MAX_KEPT:
                _refuse_many(region)
            kept.update(region.list_positions(part))
    begin = bisect.bisect_left(points, region.bounds[0][0], key=lambda c: c.index[0]) if region.bounds else 0
    for point in points[begin:]:
        if region.bounds and point.index[0] >= region.bounds[0][1]:
            break
        if region.contains(point):
            kept.update(region.list_positions(Region.of_scalar(point)))
    if len(kept) > MAX_KEPT:
        _refuse_many(region)
    return tuple(sorted(kept))


def _make_all_kept(region: Region) -> PlanError:
    remedy = "leave out this edit or what protects the region, or name only the other tensors"
    return PlanError("every scalar is protected", region, remedy)


def _refuse_many(region: Region) -> None:
    what = f"more than {MAX_KEPT} protected scalars are inside the region"
    raise PlanError(what, region, "name the parts that should change with slices")


def make_signature(rewrite: Rewrite) -> str:
    """Return a text that is equal for two rewrites that do the same to two tensors."""
    return json.dumps([rewrite.op, dict(rewrite.options), rewrite.region.bounds], sort_keys=True)
