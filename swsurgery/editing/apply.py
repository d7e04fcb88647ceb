"""The whole operation on one page.

    load_manifest        what the user asked                              manifest.py
    open_checkpoint      which files there are, and their headers         checkpoint.py
    make_plan            shard -> splices, every misfit at once           plan.py
    write_checkpoint     byte copy with splices and digests, staged       apply.py
    check                base and patched side by side                    model/check.py, the only torch
    draft_registry       what was done, and the proof of it               registry.py
    staged               all of it gets its name at once, or nothing does staging.py

`revert` goes the other way, from the registry alone; `inplace.py` does both where the files lie, under a journal;
`verify.py` proves the result without any of this.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.listing import cached_files
from swsurgery.checkpoint.opening import held, open_as
from swsurgery.checkpoint.record import Patched, Registry
from swsurgery.editing.base import base_of, known_digests
from swsurgery.editing.copy import Applied, Link, Source, write_checkpoint
from swsurgery.editing.pins import check_left_out, check_planned
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.editing.record import complete_registry, draft_registry
from swsurgery.editing.sanity import Check, CheckOptions, bounds_of, run_check
from swsurgery.errors import (
    ModelError,
    PlanError,
    TargetError,
)
from swsurgery.hub import Repo, Uri, fetch, local, place
from swsurgery.manifest.load import load_manifest
from swsurgery.model.report import Bounds
from swsurgery.progress import Progress, Silent
from swsurgery.storage import filesystem, staging
from swsurgery.storage.arguments import require_choice, require_type
from swsurgery.storage.digest_cache import DigestCache
from swsurgery.storage.folder import Folder
from swsurgery.storage.names import OWN_FILES

SMALL = 64 << 20
"""Bytes. Untouched files up to this size are downloaded for publishing, and hashed by an edit in place."""


@dataclass(frozen=True)
class Outcome:
    """A patched checkpoint that is there."""

    output: Path
    applied: Applied
    registry: Registry
    notes: tuple[str, ...] = ()
    written: bool = True

    def to_json(self) -> dict[str, Any]:
        files = {
            f.name: {"size": f.size, "base_sha256": f.base_digest, "sha256": f.patched_digest, "how": f.how}
            | ({"unverified": True} if f.unverified else {})
            for f in self.applied.files
        }
        document = self.registry.model_dump(mode="json")
        records = (document["edits"], document["protected"])
        edits, protected = ([{k: v for k, v in r.items() if k != "known"} for r in each] for each in records)
        return {
            "output": str(self.output),
            "splices": edits,
            "protected": protected,
            "omitted": document["omitted"],
            "notes": list(self.notes),
            "check": document["check"],
            "files": files,
        }


def plan_manifest(manifest: Path, base: str | None = None, *, progress: Progress | None = None) -> Plan:
    """Read the manifest, open its base (or `base`: a directory or hf://ORG/NAME[@REV]) and plan; write nothing.

    If the base is a directory, the shards that the edits touch are hashed if anything pins them. If it is a repository,
    only headers and scalars are read, and the digests that the Hub lists are compared. The plan names the pins that
    were not checked.

    Raises HubError, ManifestError, CheckpointError, PlanError, TargetError while another run is editing it in place.
    """
    loaded = load_manifest(manifest)
    with held(place(base_of(loaded, base))) as root:
        plan = make_plan(loaded, open_as(root, loaded.manifest.base))
        draft_registry(plan)  # a dry run refuses what the run itself would refuse
        return check_planned(plan, progress or Silent())


def apply_manifest(
    manifest: Path,
    output: Path,
    *,
    base: str | None = None,
    link: Link = "auto",
    check: CheckOptions | Check | None = None,
    reuse_digests: bool = False,
    for_publish: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Make the patched checkpoint `output`, checked and with its registry, or nothing.

    A base on the Hub is downloaded; with `for_publish` only its small files and the shards that the edits touch, and
    `publish` has the rest copied there. With `reuse_digests`, files that have neither an edit nor a pin and that were
    hashed before are not hashed: their remembered digests go into the record, marked as unverified.

    Raises HubError, ManifestError, CheckpointError, PlanError, TargetError, ModelError; CheckFailed where the check
    says no.
    """
    progress = progress or Silent()
    check = CheckOptions.of(check)
    require_choice("link", link, get_args(Link))
    require_type("reuse_digests", reuse_digests, bool)
    require_type("for_publish", for_publish, bool)
    loaded = load_manifest(manifest)
    where = base_of(loaded, base)
    with held(place(where) if for_publish else local(where)) as root:
        plan = make_plan(loaded, open_as(root, loaded.manifest.base))
        _refuse_inside(output, plan.checkpoint.root)
        bounds_of(plan, check)  # an hour before they are needed
        draft = draft_registry(plan)
        for note in plan.notes:
            say(note)
        source = _source(plan)
        check_left_out(plan, source.names, source.pins, progress)
        if for_publish:
            check = _without_whole_model(plan, check)
            source = _fetched(source, plan.checkpoint)
        with staging.staged(output, source.names, OWN_FILES, source.folder_mode) as stage:
            applied = write_checkpoint(
                source, stage, link=link, progress=progress, digests=DigestCache(), reuse=reuse_digests
            )
            result = run_check(plan, stage, check, progress, say)
            registry = complete_registry(draft, applied, result)
            _write_own_files(stage, Patched(registry, registry.render(), loaded.raw), source.own_mode)
    return Outcome(output, applied, registry, plan.notes)


def _fetched(source: Source, base: Checkpoint) -> Source:
    """The files of a repository that publishing needs here, downloaded: the touched shards, whatever is small, and
    whatever has no digest on the Hub; the rest stays elsewhere. Raises PlanError for a mere directory, HubError."""
    if base.repo_id is None or base.revision is None:
        raise PlanError("--for-publish leaves files in the base's repository, so the base must be in one", base.root,
                        "give --base hf://ORG/NAME@REV")  # fmt: skip
    touched = {s.file for s in source.splices}
    stay = {f.name for f in source.files if f.name not in touched and f.size > SMALL and f.digest}
    here = [f for f in source.files if f.name not in stay]
    if not base.in_cache:
        folder = fetch(Uri(base.repo_id, base.revision, base.sub), [f.name for f in here])
        there = cached_files(Path(os.path.realpath(folder)), (f.name for f in here))
        here = [replace(f, path=there[f.name].path) for f in here]
    return replace(source, files=tuple(here), elsewhere=tuple(f for f in source.files if f.name in stay), in_cache=True)


def _without_whole_model(plan: Plan, options: CheckOptions) -> CheckOptions:
    """The check that can be made where most shards are not here. Raises ModelError where more was asked."""
    if options.kind == "forward" or bounds_of(plan, options) != Bounds():
        raise ModelError("a forward check needs the whole model", plan.checkpoint.root,
                         "leave out --for-publish, or the bounds and --check forward")  # fmt: skip
    return replace(options, kind="weights" if options.kind == "auto" else options.kind)


def _refuse_inside(output: Path, root: Path | Repo) -> None:
    """A target inside the base would change the base, and be copied into the next one made from it."""
    if isinstance(root, Path) and Path(os.path.realpath(output)).is_relative_to(root):
        raise TargetError("the target lies inside the base", output, "give another -o")


def _source(plan: Plan) -> Source:
    leave = {*plan.omitted, *OWN_FILES}
    files = tuple(f for f in plan.checkpoint.files if f.name not in leave)
    checkpoint = plan.checkpoint
    return Source(files, plan.splices, known_digests(plan), checkpoint.in_cache, shards=checkpoint.shards)


def _write_own_files(stage: Folder, patched: Patched, mode: int) -> None:
    for name, data in patched.own_files().items():
        filesystem.write_file(stage / name, data, mode)
