"""Check that a checkpoint is exactly what a manifest makes of a given base.

The manifest is planned again on the base. The plan is compared with the checkpoint's record or, without a record, with
the checkpoint's bytes. `against_manifest.py` contains the check that needs neither the base nor the planner. Every
finding about an edit contains the position of the edit in the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.compare import find_undeclared_changes
from swsurgery.checkpoint.record import Record
from swsurgery.editing.overlay import overlay_checkpoint
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.errors import PlanError, escape_control
from swsurgery.manifest.load import LoadedManifest
from swsurgery.progress import Progress
from swsurgery.storage import dtypes
from swsurgery.storage.hashing import hash_file
from swsurgery.storage.names import OWN_FILES
from swsurgery.verifying.against_manifest import Wishes, point_at
from swsurgery.verifying.findings import Finding


def plan_or_report(loaded: LoadedManifest, base: Checkpoint) -> tuple[Plan | None, list[Finding]]:
    """Plan the manifest on this base.

    Returns (plan, []), or (None, findings) if the manifest does not fit the base: one finding for each planning error.
    """
    try:
        return make_plan(loaded, base), []
    except PlanError as error:
        return None, [_locate_misfit(loaded, fault) for fault in error.faults]


def _locate_misfit(loaded: LoadedManifest, fault: str) -> Finding:
    for number in range(len(loaded.manifest.edits)):
        prefix = escape_control(f"{loaded.describe_position(number)}: ")
        if fault.startswith(prefix):
            return point_at(loaded, Finding("manifest-mismatch", fault.removeprefix(prefix)), ("edits", number))
    message = fault.removeprefix(escape_control(f"{loaded.path}: "))
    return point_at(loaded, Finding("manifest-mismatch", f"the base does not match: {message}"), ("base",))


def plan_against_record(wishes: Wishes, plan: Plan, record: Record) -> list[Finding]:
    """Compare each planned scalar with its entry in the record: file, offset, dtype, old bits and new bits."""
    recorded = {r.coordinate: r for r in (*record.edits, *record.protected)}
    findings = []
    for scalar in (*plan.splices, *plan.protected):
        entry = recorded.get(scalar.coordinate)
        if entry is None:
            continue  # `check_by_record` reports the missing entry
        ours = scalar.to_json()
        names = [name for name in ("file", "offset", "dtype", "old_bits", "new_bits") if name in ours]
        unlike = [name for name in names if ours[name] != getattr(entry, name, None)]
        if unlike:
            said = ", ".join(f"{k} {ours[k]} (the record has {getattr(entry, k, None)})" for k in unlike)
            findings.append(wishes.make_finding(f"the plan on this base has {said}", scalar.coordinate))
    return findings


def check_by_base(wishes: Wishes, plan: Plan, checkpoint: Checkpoint, progress: Progress) -> list[Finding]:
    """Check that a checkpoint without a record has the base's files, and that exactly the planned scalars differ.

    If the base does not have the pinned digests, only this is reported, because all else follows from it.
    """
    if pins := list(_check_pins(wishes, plan.checkpoint)):
        return pins
    findings = [*_compare_names(plan, checkpoint), *_compare_scalars(wishes, plan, checkpoint)]
    return findings + [wishes.attach_position(f) for f in _find_other_changes(plan, checkpoint, progress)]


def _list_files(plan: Plan) -> set[str]:
    """Return the names of the base's files that an edited checkpoint contains too."""
    return {file.name for file in plan.checkpoint.files} - {*plan.omitted, *OWN_FILES}


def _compare_names(plan: Plan, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Yield a finding for each file that only the base or only the checkpoint has."""
    ours, theirs = {file.name for file in checkpoint.files}, _list_files(plan)
    for name in sorted(theirs - ours):
        yield Finding("file-missing", "the base has this file, but the checkpoint does not", name)
    for name in sorted(ours - theirs):
        yield Finding("file-undeclared", "the checkpoint has this file, but the base does not", name)


def _compare_scalars(wishes: Wishes, plan: Plan, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Yield a finding for each planned scalar that has other bytes than the plan makes of the base's."""
    sizes = {file.name: file.size for file in plan.checkpoint.files}
    sound = {name for name, shard in checkpoint.shards.items() if shard.size == sizes.get(name)}
    for splice in (s for s in plan.splices if s.file in sound):
        try:
            stored = checkpoint.shards[splice.file].read_scalar(*splice.coordinate)
        except (KeyError, IndexError):
            continue  # the header differs from the base's, which `_find_other_changes` reports
        if stored != splice.new:
            new, old = dtypes.format_bits(splice.new), dtypes.format_bits(splice.old)
            message = f"{splice.op} gives {new} from the base's {old}, but the checkpoint has"
            yield wishes.make_finding(f"{message} {dtypes.format_bits(stored)}", splice.coordinate)


def _find_other_changes(plan: Plan, checkpoint: Checkpoint, progress: Progress) -> list[Finding]:
    """Compare the files that both have byte by byte. Returns a finding for each difference that no edit makes."""
    base = plan.checkpoint
    declared: dict[str, set[int]] = {}
    for splice in plan.splices:
        declared.setdefault(splice.file, set()).update(range(splice.offset, splice.end))
    if plan.rewrites:
        # The wanted bytes of every file can be read, so no difference is expected.
        base, declared = overlay_checkpoint(plan, progress), {}
    both = sorted(_list_files(plan) & {file.name for file in checkpoint.files})
    return [Finding.of_difference(d) for d in find_undeclared_changes(checkpoint, base, both, declared, progress)]


def _check_pins(wishes: Wishes, base: Checkpoint) -> Iterator[Finding]:
    """Compare the base's files with the manifest's base.sha256. The planner has checked that these files exist."""
    for name, digest in wishes.loaded.manifest.base.sha256.items():
        here = hash_file(base.get_file(name).source)
        if here != digest:
            message = f"base.sha256 of {name} is {digest}, but the sha256 of the base's file is {here}"
            yield wishes.make_finding(message, path=("base", "sha256", name))
