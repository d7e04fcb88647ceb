"""Read the edits to export: those of a patched checkpoint since its first base, or those of a manifest on its base.

Must not depend on the formats of exports.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import held, read_checkpoint
from swsurgery.checkpoint.record import MANIFEST_NAME, Patched, Record, read_record
from swsurgery.editing.base import collect_known_digests, find_base
from swsurgery.editing.copy_job import compute_outside_mode
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.errors import CheckpointError, PlanError
from swsurgery.hub import RemoteTree, Uri, open_location, parse_location
from swsurgery.manifest.load import LoadedManifest, ManifestLike, load_manifest, parse_manifest
from swsurgery.manifest.patch import (
    Patch,
    PatchBase,
    PatchBounds,
    PatchScalar,
    choose_operation,
)
from swsurgery.manifest.schema import Manifest
from swsurgery.progress import Progress
from swsurgery.storage.arguments import is_path
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.folder import Folder
from swsurgery.storage.hashing import check_digest, hash_file
from swsurgery.storage.region import Region


@dataclass(frozen=True)
class EditSource:
    """The edits to export, and the config.json of their model."""

    patch: Patch
    config: dict[str, Any]
    mode: int
    """Permissions of the exported files: they permit no more than the permissions of the weights."""
    notes: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    """One message for each edit of a stored number that is not a weight, such as a quantised code.

    Only flips of raw bits and the records that swsurgery 0.1.0 made contain such an edit.
    """
    zeros: Mapping[str, int] = field(default_factory=dict)
    """The tensors in which an edit changes regions, and the number of their unchanged scalars that are -0.0."""


def read(source: ManifestLike, base: str | Path | None, progress: Progress, *, for_adapter: bool = False) -> EditSource:
    """Read the edits that a patched checkpoint contains since its first base, or plan a manifest on its base.

    `for_adapter` is True to count the scalars that are -0.0, which reads every tensor with a changed region.

    Raises HubError, ManifestError, CheckpointError, PlanError.
    """
    where = find_checkpoint(source, base)
    if where is None:
        return _read_manifest(load_manifest(source, base), base, progress, for_adapter)
    return read_edits(open_location(where), for_adapter)


def find_checkpoint(source: ManifestLike, base: str | Path | None) -> Path | Uri | None:
    """Return the location of the checkpoint that `source` names, or None if `source` is a manifest or a patch.

    Raises PlanError if `base` is given for a checkpoint.
    """
    where = parse_location(source) if is_path(source) else None
    if where is None or (isinstance(where, Path) and not os.path.isdir(where)):
        return None
    if base is not None:
        raise PlanError(
            "--base is only for a manifest; this is a patched checkpoint, whose record names its base",
            where,
            "leave out --base",
        )
    return where


def _read_manifest(
    loaded: LoadedManifest, base: str | Path | None, progress: Progress, for_adapter: bool
) -> EditSource:
    with held(open_location(find_base(loaded, base))) as entered:
        checkpoint = read_checkpoint(entered, loaded.manifest.base)
        plan = make_plan(loaded, checkpoint)
        inside: list[PatchScalar] = []
        if plan.rewrites:
            from swsurgery.sharing import region_scalars  # imports numpy

            inside = region_scalars.read_planned(plan, progress)
        digests = _find_digests(plan, {*(s.file for s in plan.splices), *(s.file for s in inside)}, progress)
        named = [rewrite.region.tensor for rewrite in plan.rewrites] if for_adapter else []
        zeros = _count_zeros(checkpoint, named, inside, after=False)
    said = loaded.manifest.base
    identity = checkpoint.repo_id or said.repo_id, checkpoint.revision or said.revision
    scalars = [_make_scalar(checkpoint, s.coordinate, s.old, s.new, s.op, s.factor) for s in plan.splices]
    scalars = [s for s in scalars if s.old != s.new or s.op != "flip"]
    manifest_sha256 = hashlib.sha256(loaded.raw).hexdigest()
    return _make_source(checkpoint, loaded.manifest, identity, digests, manifest_sha256, [*scalars, *inside], zeros)


def _find_digests(plan: Plan, names: Collection[str], progress: Progress) -> dict[str, str]:
    """Return (file name -> sha256) for the named shards. A shard whose sha256 is unknown is left out.

    A local shard is hashed; for a base on the Hub, the sha256 is the one that the Hub lists or the manifest
    pins. Raises PlanError if a digest differs from the one in the manifest or in the base's own record.
    """
    pins, found = collect_known_digests(plan), {}
    for name in sorted(names):
        file = plan.checkpoint.get_file(name)
        digest = hash_file(file.source, progress) if file.is_here else file.digest
        if digest:
            check_digest(file, digest, pins)
        elif name in pins:
            digest = pins[name][0]
        if digest:
            found[name] = digest
    return found


def read_edits(root: Path | Folder | RemoteTree, for_adapter: bool = False) -> EditSource:
    """Read the edits that a patched checkpoint contains since its first base; `for_adapter` as in `read`.

    Raises CheckpointError, PlanError.
    """
    with held(root) as entered:
        patched = read_record(entered)
        checkpoint = read_checkpoint(entered, patched.record.base, elsewhere=patched.record.elsewhere)
        return _read_edits(patched, checkpoint, for_adapter)


def _read_edits(patched: Patched, checkpoint: Checkpoint, for_adapter: bool) -> EditSource:
    """Collect the edits of all steps, and check that the checkpoint contains their new values.

    Raises CheckpointError if a stored scalar differs from the record.
    """
    steps = list_steps(patched)
    regions = group_regions(entry.region for record in steps for entry in record.changes)
    inside: list[PatchScalar] = []
    if regions:
        from swsurgery.sharing import region_scalars  # imports numpy

        inside = region_scalars.read_recorded(steps, checkpoint)
    changed: dict[Coordinate, PatchScalar] = {}
    for record in steps:
        for e in record.edits:
            if is_inside(e.coordinate, regions):
                continue  # it is among those inside the region
            if e.tensor not in checkpoint.shapes or e.dtype != checkpoint.get_info(e.tensor).dtype.name:
                what = "the record lists a scalar that does not exist"
                raise CheckpointError(what, f"{e.coordinate} in {e.file}", "restore swsurgery.json")
            earlier = changed.get(e.coordinate)
            if earlier:  # two operations on one scalar are exported as the final value
                changed[e.coordinate] = _make_scalar(checkpoint, e.coordinate, earlier.old, e.new_bytes, "set", None)
            else:
                changed[e.coordinate] = _make_scalar(checkpoint, e.coordinate, e.old_bytes, e.new_bytes, e.op, e.factor)
    scalars = [s for s in changed.values() if s.old != s.new or (len(steps) == 1 and s.op != "flip")]
    for s in scalars:
        stored = checkpoint.shards[s.file].read_scalar(*s.coordinate)
        if stored != s.new:
            where = f"{s.coordinate} in {s.file}"
            raise CheckpointError("the stored scalar differs from its record", where, "run swsurgery verify")
    zeros = _count_zeros(checkpoint, regions if for_adapter else (), inside, after=True)
    scalars += inside
    first, last = steps[0], steps[-1]
    digests = {s.file: first.files[s.file].base_sha256 for s in scalars}
    manifest = parse_manifest(patched.manifest_raw, Path(MANIFEST_NAME)).manifest
    identity = first.base.repo_id, first.base.revision
    known = {name: digest for name, digest in digests.items() if digest}
    return _make_source(checkpoint, manifest, identity, known, last.manifest_sha256, scalars, zeros)


def _count_zeros(
    checkpoint: Checkpoint, tensors: Iterable[str], changed: Sequence[PatchScalar], *, after: bool
) -> dict[str, int]:
    """Count, in each tensor with a changed region, the scalars that are -0.0 and do not change.

    `changed` are the scalars that change in these regions. `after` is True if the checkpoint is the patched one.
    """
    counts: dict[str, int] = {}
    for tensor in dict.fromkeys(tensors):
        from swsurgery.sharing.region_scalars import count_negative_zeros  # imports numpy

        dtype = checkpoint.get_info(tensor).dtype
        minus = (1 << dtype.bits - 1).to_bytes(dtype.size, "little")
        also = sum((s.new if after else s.old) == minus for s in changed if s.tensor == tensor)
        counts[tensor] = count_negative_zeros(checkpoint, tensor) - also
    return counts


def group_regions(regions: Iterable[Region]) -> dict[str, set[Region]]:
    """Group regions by tensor."""
    groups: dict[str, set[Region]] = {}
    for region in regions:
        groups.setdefault(region.tensor, set()).add(region)
    return groups


def is_inside(coordinate: Coordinate, regions: Mapping[str, Collection[Region]]) -> bool:
    """Return True if a scalar is in one of the regions, which `group_regions` grouped."""
    return any(region.contains(coordinate) for region in regions.get(coordinate.tensor, ()))


def list_steps(patched: Patched | None) -> list[Record]:
    """List the records of all steps in which a checkpoint was patched, the earliest first."""
    steps: list[Record] = []
    while patched is not None:
        steps.append(patched.record)
        patched = patched.rebuild_previous()
    return steps[::-1]


def _make_scalar(
    checkpoint: Checkpoint, coordinate: Coordinate, old: bytes, new: bytes, op: str, factor: float | None
) -> PatchScalar:
    info = checkpoint.get_info(coordinate.tensor)
    try:
        flat = info.flatten(coordinate.index)
    except IndexError as error:
        raise CheckpointError(str(error), coordinate.tensor, "restore swsurgery.json") from None
    file = checkpoint.weight_map[coordinate.tensor]
    if op == "restore":
        op = choose_operation(op, info.dtype, new)
    return PatchScalar(coordinate.tensor, info.shape, info.dtype, flat, file, old, new, op, factor)


def _make_source(
    checkpoint: Checkpoint,
    manifest: Manifest,
    identity: tuple[str | None, str | None],
    digests: dict[str, str],
    manifest_sha256: str,
    scalars: Sequence[PatchScalar],
    zeros: Mapping[str, int],
) -> EditSource:
    if not scalars:
        raise PlanError("nothing is changed, so there is nothing to export", checkpoint.root)
    repo_id, revision = identity
    base = PatchBase(
        repo_id=repo_id,
        revision=revision if repo_id else None,
        model=manifest.base.model,
        sha256=digests,
        weights=manifest.base.weights,
        variant=manifest.base.variant,
        copies=manifest.base.copies,
    )
    missing = sorted({s.file for s in scalars} - set(digests))
    notes = [f"the sha256 of {name} is unknown, so only the old values identify the base" for name in missing]
    ordered = tuple(sorted(scalars, key=lambda s: (s.tensor, s.flat)))
    bounds = PatchBounds(**manifest.check.model_dump())
    codes = [
        f"a LoRA adapter cannot represent this edit: {s.coordinate} is not a weight ({why})"
        for s in ordered
        if (why := checkpoint.quantisation.explain_refusal(s.tensor))
    ]
    return EditSource(
        Patch(base, bounds, manifest_sha256, ordered),
        checkpoint.config,
        compute_outside_mode(checkpoint.files),
        tuple(notes),
        tuple(codes),
        zeros,
    )
