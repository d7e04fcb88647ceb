"""Manifest x checkpoint -> findings: is this checkpoint exactly what the manifest makes of its base?

By the registry this is decided in `manifest_record.py`, without the planner. Here the planner plans anew with the base,
and the bytes are compared. Every finding about an edit points at the manifest's line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.compare import chunks, undeclared_changes
from swsurgery.checkpoint.record import Registry
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.errors import PlanError, printable
from swsurgery.manifest.load import LoadedManifest
from swsurgery.progress import Progress
from swsurgery.storage import dtypes
from swsurgery.storage.names import OWN_FILES
from swsurgery.verifying.against_manifest import Wishes, point_at
from swsurgery.verifying.findings import Finding


def planned(loaded: LoadedManifest, base: Checkpoint) -> tuple[Plan | None, list[Finding]]:
    """The plan for this base, or every misfit at its line of the manifest."""
    try:
        return make_plan(loaded, base), []
    except PlanError as error:
        return None, [_misfit(loaded, fault) for fault in error.faults]


def _misfit(loaded: LoadedManifest, fault: str) -> Finding:
    for number in range(len(loaded.manifest.edits)):
        prefix = printable(f"{loaded.where(number)}: ")
        if fault.startswith(prefix):
            return point_at(loaded, Finding("manifest-mismatch", fault.removeprefix(prefix)), ("edits", number))
    message = fault.removeprefix(printable(f"{loaded.path}: "))
    return point_at(loaded, Finding("manifest-mismatch", f"the base does not fit: {message}"), ("base",))


def plan_against_registry(wishes: Wishes, plan: Plan, registry: Registry) -> list[Finding]:
    """The base's own bits are the registry's old ones, and the plan's new ones are the registry's."""
    recorded = {r.coordinate: r for r in (*registry.edits, *registry.protected)}
    findings = []
    for scalar in (*plan.splices, *plan.protected):
        record = recorded.get(scalar.coordinate)
        if record is None:
            continue  # by_registry says so
        ours = scalar.to_json()
        unlike = [k for k in ("file", "offset", "dtype", "old_bits", "new_bits") if k in ours
                  and ours[k] != getattr(record, k, None)]  # fmt: skip
        if unlike:
            said = ", ".join(f"{k} {ours[k]} and not {getattr(record, k, None)}" for k in unlike)
            findings.append(wishes.finding(f"the base gives {said}", scalar.coordinate))
    return findings


def by_base(wishes: Wishes, plan: Plan, checkpoint: Checkpoint, progress: Progress) -> list[Finding]:
    """Without a registry: the checkpoint has the base's files, and their bytes but for exactly the planned scalars."""
    base = plan.checkpoint
    theirs = {f.name for f in base.files} - {*plan.omitted, *OWN_FILES}
    ours = {f.name for f in checkpoint.files}
    findings = [Finding("file-missing", "the base has it, it is not there", name) for name in sorted(theirs - ours)]
    findings += [Finding("file-undeclared", "it is there, the base does not have it", n) for n in sorted(ours - theirs)]
    declared: dict[str, set[int]] = {}
    for splice in plan.splices:
        declared.setdefault(splice.file, set()).update(range(splice.offset, splice.end))
    changed = [
        Finding.of_difference(d)
        for d in undeclared_changes(checkpoint, base, sorted(ours & theirs), declared, progress)
    ]
    sound = {name for name, shard in checkpoint.shards.items() if shard.size == base.file(name).size}
    for splice in (s for s in plan.splices if s.file in sound):
        tensor, index = splice.coordinate
        try:
            stored = checkpoint.shards[splice.file].read_scalar(tensor, index)
        except (KeyError, IndexError):
            continue  # the header is not the base's, which the bytes have told
        if stored != splice.new:
            message = f"{splice.op} makes {dtypes.bits_of(splice.new)} of the base's {dtypes.bits_of(splice.old)}, " \
                      f"it holds {dtypes.bits_of(stored)}"  # fmt: skip
            findings.append(wishes.finding(message, splice.coordinate))
    return findings + [wishes.at(f) for f in changed] + list(_pins(wishes, base))


def _pins(wishes: Wishes, base: Checkpoint) -> Iterator[Finding]:
    """The digests that the manifest pins, of the files that the planner found to be there."""
    for name, digest in wishes.loaded.manifest.base.sha256.items():
        here = hashlib.sha256()
        for _, chunk in chunks(base.file(name), []):
            here.update(chunk)
        if here.hexdigest() != digest:
            message = f"base.sha256 of {name} is {digest}, this base's is {here.hexdigest()}"
            yield wishes.finding(message, path=("base", "sha256", name))
