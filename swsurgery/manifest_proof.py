"""Manifest x checkpoint -> findings: is this checkpoint exactly what the manifest makes of its base?

By the registry the arithmetic is done once more on its old bits, without the planner: those bits are the base's where
`verify` finds nothing. By the base the planner plans anew, and the bytes are compared. Every finding about an edit
points at the manifest's line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from swsurgery import dtypes, known, projections
from swsurgery.checkpoint import Checkpoint
from swsurgery.comparison import chunks, undeclared_changes
from swsurgery.coordinate import Coordinate
from swsurgery.dtypes import DTYPES
from swsurgery.edits import MeasuredValue, expectation_fault
from swsurgery.errors import ArchitectureError, LookupFailed, NumberError, PlanError, printable
from swsurgery.known import KnownModel
from swsurgery.manifest import LoadedManifest
from swsurgery.names import OWN_FILES
from swsurgery.plan import Plan, make_plan
from swsurgery.progress import Progress
from swsurgery.registry import EditRecord, Registry, ScalarRecord
from swsurgery.rules import Finding


@dataclass(frozen=True)
class Asked:
    """One scalar that edit number `number` of a manifest names, and what it expects there."""

    number: int
    edit: Any
    expect: Any = None


@dataclass(frozen=True)
class Wishes:
    """What a manifest asks of this checkpoint: each scalar once, and the edits that have no meaning here."""

    loaded: LoadedManifest
    asked: dict[Coordinate, Asked]
    misfits: tuple[Finding, ...]

    def finding(self, message: str, coordinate: Coordinate | None = None, *, path: tuple | None = None) -> Finding:
        """A manifest-mismatch at the edit that names `coordinate`, or at the manifest's node `path`."""
        finding = Finding("manifest-mismatch", message)
        if coordinate is not None:
            finding = replace(finding, tensor=coordinate.tensor, index=coordinate.index)
        return self.at(finding, path if path is not None else ("edits",))

    def at(self, finding: Finding, path: tuple = ()) -> Finding:
        """The finding with its place in the manifest: the edit that names its scalar, else the node `path`, if any."""
        scalar = self.asked.get(Coordinate(finding.tensor, finding.index)) if finding.index is not None else None
        path = ("edits", scalar.number) if scalar else path
        return _at(self.loaded, finding, path) if path else finding


def _at(loaded: LoadedManifest, finding: Finding, path: tuple) -> Finding:
    line, column = loaded.positions.get(path) or loaded.positions[()]
    return replace(finding, manifest=str(loaded.path), line=line, column=column)


def read_wishes(loaded: LoadedManifest, checkpoint: Checkpoint, repo_ids: tuple[str | None, ...] = ()) -> Wishes:
    """Resolve every edit against the headers of `checkpoint`. `repo_ids` are further names that its base may have."""
    base = loaded.manifest.base
    asked: dict[Coordinate, Asked] = {}
    misfits = []
    try:
        model = known.lookup(base.model) if base.model else None
    except LookupFailed as error:
        model = None
        misfits = [_at(loaded, Finding("manifest-mismatch", fault), ("base", "model")) for fault in error.faults]
    for repo_id in (base.repo_id, checkpoint.repo_id, *repo_ids):
        model = model or (known.of_repo(repo_id) if repo_id else None)
    # `known: all` stands for every known coordinate that no other edit names, so it goes last.
    for number, edit in sorted(enumerate(loaded.manifest.edits), key=lambda item: (item[1].known == "all", item[0])):
        place = ("edits", number)
        try:
            targets = list(_targets(edit, checkpoint, model))
        except (ArchitectureError, LookupFailed, PlanError) as error:
            misfits += [_at(loaded, Finding("manifest-mismatch", fault), place) for fault in error.faults]
            continue
        for coordinate, expect in targets:
            if coordinate not in asked:
                asked[coordinate] = Asked(number, edit, expect)
            elif edit.known != "all":
                message = f"{coordinate} has two operations (the other is edits[{asked[coordinate].number}])"
                misfits.append(_at(loaded, Finding("manifest-mismatch", message), place))
    return Wishes(loaded, asked, tuple(misfits))


def _targets(edit: Any, checkpoint: Checkpoint, model: KnownModel | None) -> Iterator[tuple[Coordinate, Any]]:
    if edit.tensor is not None:
        yield Coordinate(edit.tensor, edit.index), edit.expect
        return
    if edit.layer is not None:
        places, expects = [edit], [edit.expect]
    elif model is None:
        raise PlanError("nothing says which known model this is", edit.known, "say which: base.model")
    else:
        entries = known.addressable(model) if edit.known == "all" else [known.find(model, edit.known)]
        places = [entry for entry in entries if entry.col is not None]
        expects = [MeasuredValue(value=e.value, dtype=e.dtype) if e.dtype else None for e in places]
    for place, expect in zip(places, expects, strict=True):
        yield (
            projections.locate(
                checkpoint.config,
                checkpoint.shapes,
                layer=place.layer,
                row=place.row,
                col=place.col,
                expert=place.expert,
            ),
            expect,
        )


def by_registry(wishes: Wishes, registry: Registry) -> list[Finding]:
    """The registry records exactly what the manifest asks: the same scalars, operations, factors and pins, and new
    bits that the arithmetic gives for the old ones."""
    recorded = {r.coordinate: r for r in (*registry.edits, *registry.protected)}
    findings = [*wishes.misfits, *_identity(wishes, registry)]
    for coordinate, asked in wishes.asked.items():
        record = recorded.get(coordinate)
        message = "nothing was done to it" if record is None else _unlike(asked, record)
        if message:
            findings.append(wishes.finding(f"{asked.edit.op} was asked: {message}", coordinate))
    for coordinate, record in recorded.items():
        if coordinate not in wishes.asked:
            what = f"{record.op} was done" if isinstance(record, EditRecord) else "it was protected"
            findings.append(wishes.finding(f"{what}, and the manifest does not ask for it", coordinate))
    return findings


def _unlike(asked: Asked, record: ScalarRecord) -> str | None:
    """How a record differs from what the edit makes of its old bits; None where it does not."""
    edit, dtype = asked.edit, DTYPES[record.dtype]
    done = record.op if isinstance(record, EditRecord) else "protect"
    if done != edit.op:
        return f"{done} was done"
    try:
        if asked.expect is not None and (fault := expectation_fault(asked.expect, dtype, record.old_bytes)):
            return f"the base does not fit: {fault}"
        if not isinstance(record, EditRecord):
            return None
        if getattr(edit, "factor", None) != record.factor:
            return f"the factor is {edit.factor}, {record.factor} was used"
        new = edit.new_bytes(dtype, record.old_bytes)
    except NumberError as error:
        return str(error)
    return None if new == record.new_bytes else f"it makes {dtypes.bits_of(new)}, not {record.new_bits}"


def _identity(wishes: Wishes, registry: Registry) -> Iterator[Finding]:
    """What the manifest says of its base, against the base that the registry names."""
    base = wishes.loaded.manifest.base
    for name in ("repo_id", "revision", "weights", "variant"):
        said, found = getattr(base, name), getattr(registry.base, name)
        if said is not None and found is not None and said != found:
            yield wishes.finding(f"base.{name} is {said}, the base was {found}", path=("base", name))
    for name, digest in base.sha256.items():
        record = registry.files.get(name)
        found = record.base_sha256 if record else None
        if found != digest:
            what = f"the base's was {found}" if found else "the registry does not know the base's"
            yield wishes.finding(f"base.sha256 of {name} is {digest}, {what}", path=("base", "sha256", name))


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
            return _at(loaded, Finding("manifest-mismatch", fault.removeprefix(prefix)), ("edits", number))
    message = fault.removeprefix(printable(f"{loaded.path}: "))
    return _at(loaded, Finding("manifest-mismatch", f"the base does not fit: {message}"), ("base",))


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
    changed = undeclared_changes(checkpoint, base, sorted(ours & theirs), declared, progress)
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
