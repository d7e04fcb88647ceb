"""Find the scalars and regions of a checkpoint that the edits of a manifest name.

The planner, `verify --manifest` and the linter use this module. `apply --in-place` uses it to recognise a manifest that
was already applied. This module reads the headers of the checkpoint but no tensor data. It must not import the planner,
because `verify --manifest` checks the planner's result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.editing.asked import Asked, AskedRegion, Misfit
from swsurgery.editing.conflicts import find_conflicts, find_region_conflicts
from swsurgery.editing.targets import EditTarget, FindKnown, Scope, TargetPlace, locate, read_target
from swsurgery.errors import ArchitectureError, Fault, LookupFailed, PlanError, list_some, pluralise
from swsurgery.manifest.operations import Clip, Edit, Restore, Round
from swsurgery.manifest.schema import Manifest
from swsurgery.manifest.targets import MeasuredValue
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.ggml import BlockDtype
from swsurgery.storage.region import Region

MAX_SKIPPED_NAMES = 3
"""Maximum number of skipped tensors that a note names."""


@dataclass(frozen=True)
class Resolution:
    """What the edits name, in the manifest's order, and the edits that do not fit the checkpoint.

    Two edits may name the same scalar; `list_misfits` reports them. `notes` tell which tensors an edit skips.
    """

    asked: tuple[Asked, ...]
    misfits: tuple[Misfit, ...]
    regions: tuple[AskedRegion, ...] = ()
    notes: tuple[str, ...] = ()

    def list_misfits(self) -> list[Misfit]:
        """List the edits that do not fit the checkpoint, and the edits of a scalar that another edit also names."""
        scalars = find_conflicts((one.number, one.coordinate) for one in self.asked)
        return [*self.misfits, *scalars, *find_region_conflicts(self.asked, self.regions)]

    def group_by_coordinate(self) -> dict[Coordinate, Asked]:
        """Map each scalar to the first edit that names it."""
        first: dict[Coordinate, Asked] = {}
        for asked in self.asked:
            first.setdefault(asked.coordinate, asked)
        return first


def resolve(manifest: Manifest, checkpoint: Checkpoint, find_known: FindKnown) -> Resolution:
    """Find what each edit of a manifest names in a checkpoint.

    `known: all` names every known super weight that no other edit of the manifest names. If it protects them, it also
    names those inside regions that other edits change.
    """
    scope = Scope(checkpoint, find_known)
    asked: list[Asked] = []
    regions: list[AskedRegion] = []
    misfits: list[Misfit] = []
    notes: list[str] = []
    for number, edit in enumerate(manifest.edits):
        target = read_target(edit)
        found: list[Region] = []
        try:
            for place in target.resolve(scope):
                if isinstance(place, Region):
                    found.append(place)
                else:
                    asked.append(_ask(number, edit, place, scope))
        except (ArchitectureError, LookupFailed, PlanError) as error:
            misfits += [Misfit(number, fault) for fault in error.faults]
        found, note = _skip_vectors(edit, found, checkpoint)
        notes += [f"edits[{number}]: {note}"] if note and found else []
        misfits += [Misfit(number, f"{note}; the edit names no other tensor")] if note and not found else []
        misfits += [Misfit(number, fault) for fault in _find_faults(edit, target, found, checkpoint)]
        regions += [AskedRegion(number, part, edit, region, str(target)) for part, region in enumerate(found)]
    misfits += _refuse_lone_scalars(asked)
    regions, skipped = _skip_protected(regions)
    notes += skipped
    kept = list(_drop_named(asked, regions))
    misfits += [Misfit(one.number, _explain_unknown(one)) for one in kept if _lacks_value(one)]
    kept = [one for one in kept if not _lacks_value(one)]
    return Resolution(tuple(kept), tuple(misfits), tuple(regions), tuple(notes))


def _ask(number: int, edit: Edit, place: TargetPlace, scope: Scope) -> Asked:
    """Describe a scalar that an edit names. `_lacks_value` is True if the edit restores an unknown value."""
    asked = Asked(number, edit, place.coordinate, place.expect)
    if not isinstance(edit, Restore):
        return asked
    if edit.known is not None:  # its known value is what the scalar becomes, not what it is expected to be
        known = place.expect if isinstance(place.expect, MeasuredValue) else None
        asked = replace(asked, expect=None, value=known)
    if edit.source is not None:
        return replace(asked, value=None)
    return asked if edit.known is not None else replace(asked, value=_find_value(place.coordinate, scope))


def _lacks_value(one: Asked) -> bool:
    """Return True if an edit restores the known value of a scalar, and no exact value is known."""
    return isinstance(one.edit, Restore) and one.edit.source is None and one.value is None


def _explain_unknown(one: Asked) -> Fault:
    remedy = "give from: CHECKPOINT"
    if one.edit.known == "all":
        remedy += ", or protect this scalar, which known: all then leaves out"
    return Fault("no exact value of this scalar is known", str(one.coordinate), remedy)


def _find_value(coordinate: Coordinate, scope: Scope) -> MeasuredValue | None:
    """Return the known value of a scalar; None if it is no known super weight, or only an inexact value is known."""
    for known in scope.find_known("all"):
        try:
            if known.row is None or known.col is None:
                continue
            if locate(scope.checkpoint, known.layer, known.row, known.col, known.expert) == coordinate:
                return known.expect
        except ArchitectureError:
            continue
    return None


def _skip_protected(regions: Sequence[AskedRegion]) -> tuple[list[AskedRegion], list[str]]:
    """Leave out each region that another edit protects as a whole, if its own edit names further regions.

    Returns the other regions, and one note for each edit with omitted regions. An edit of which every region is
    protected keeps its regions, because the planner refuses it.
    """
    shields: dict[str, list[Region]] = {}
    for one in regions:
        if not one.edit.writes:
            shields.setdefault(one.region.tensor, []).append(one.region)
    inside: dict[int, list[AskedRegion]] = {}
    for one in regions:
        around = shields.get(one.region.tensor, ()) if one.edit.writes else ()
        if any(area.overlaps(one.region) and area.intersect(one.region) == one.region for area in around):
            inside.setdefault(one.number, []).append(one)
    counts = Counter(one.number for one in regions)
    skipped = {number: found for number, found in inside.items() if len(found) < counts[number]}
    notes = []
    for number, found in skipped.items():
        names = list(dict.fromkeys(one.region.tensor for one in found))
        what = "region, which is protected" if len(found) == 1 else "regions, which are protected"
        notes.append(f"edits[{number}]: skips {len(found)} {what}, in {list_some(names, MAX_SKIPPED_NAMES)}")
    omitted = {id(one) for found in skipped.values() for one in found}
    return [one for one in regions if id(one) not in omitted], notes


def _skip_vectors(edit: Edit, regions: list[Region], checkpoint: Checkpoint) -> tuple[list[Region], str]:
    """Leave out one-dimensional tensors, such as norms, if the edit clips or rounds whole tensors.

    Returns the other regions, and a note about the omitted tensors, or "".
    """
    if edit.tensors is None or not isinstance(edit, Clip | Round):
        return regions, ""
    rest = [region for region in regions if len(region.bounds) > 1]
    names = [region.tensor for region in regions if len(region.bounds) < 2]
    if not names:
        return rest, ""
    what = pluralise(len(names), "one-dimensional tensor")
    return rest, f"{edit.op} skips {what}: {list_some(names, MAX_SKIPPED_NAMES)}"


def _find_faults(edit: Edit, target: EditTarget, regions: Sequence[Region], checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the reasons why an operation cannot be done on these regions."""
    if not regions:
        return
    if not edit.on_regions:
        yield f"{edit.op} changes one scalar, but {target} is {regions[0]}"
        return
    if isinstance(edit, Restore) and edit.source is None:
        yield f"only the values of single scalars are known, but {target} is {regions[0]} (give from: CHECKPOINT)"
        return
    if not edit.writes:
        infos = [checkpoint.infos[region.tensor] for region in regions if region.tensor in checkpoint.infos]
        for info in (info for info in infos if isinstance(info.dtype, BlockDtype)):
            yield f"{info.dtype.name} {info.dtype.refusal}: {info.name} (protect single elements)"
            return
        return
    names = list(dict.fromkeys(region.tensor for region in regions if region.tensor not in checkpoint.disagreements))
    reasons = {name: why for name in names if (why := checkpoint.quantisation.explain_refusal(name))}
    if reasons:
        name, why = next(iter(reasons.items()))
        first = f"{len(reasons)} of {len(names)} tensors cannot be edited; the first is {name}"
        what = first if len(names) > 1 else f"{name} cannot be edited"
        yield f"{what}: {why} (edit the model before it is quantised)"
    for name in names:
        dtype = checkpoint.get_info(name).dtype
        if name not in reasons and dtype.kind == "opaque":
            yield f"{dtype.name} {dtype.refusal}: {name}"
            return


def _refuse_lone_scalars(asked: Sequence[Asked]) -> Iterator[Misfit]:
    """Yield a misfit for each edit with an operation on regions whose `known:` names single scalars."""
    for number, edit in {one.number: one.edit for one in asked if not one.edit.on_scalars}.items():
        yield Misfit(number, f"{edit.op} needs more than one scalar, but known: {edit.known} names single scalars")


def _drop_named(asked: Sequence[Asked], regions: Sequence[AskedRegion]) -> Iterator[Asked]:
    """Leave out the scalars of `known: all` that another edit names too."""
    named = {one.coordinate for one in asked if one.edit.known != "all"}
    groups: dict[str, list[AskedRegion]] = {}
    for region in regions:
        groups.setdefault(region.region.tensor, []).append(region)
    for one in asked:
        if one.edit.known == "all":
            around = [r for r in groups.get(one.coordinate.tensor, ()) if r.region.contains(one.coordinate)]
            if one.coordinate in named or any(one.edit.writes or not r.edit.writes for r in around):
                continue
        yield one
