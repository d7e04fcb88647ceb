"""Apply a manifest to a copy of its base: the whole operation on one page.

    load_manifest        reads what the user asked for                      manifest/load.py
    open_checkpoint      lists the files and reads their headers            checkpoint/opening.py
    make_plan            resolves edits to splices, reports all faults      plan.py
    write_checkpoint     copies bytes, makes splices, hashes, in a stage    copy.py
    run_check            compares base and patched; may run the model       sanity.py
    complete_record    records what was done, and its proof               record.py
    stage_output         renames the stage, so that all or nothing exists   storage/staging.py

`revert.py` is the opposite and needs only the record. `in_place.py` does both in the same directory, with a journal.
Verification (`verifying/against_record.py`) uses none of this.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.listing import list_cached_files
from swsurgery.checkpoint.opening import held, read_checkpoint
from swsurgery.checkpoint.record import Patched, Record
from swsurgery.editing.base import collect_known_digests, find_base
from swsurgery.editing.copy import Applied, CopyJob, Link, write_checkpoint
from swsurgery.editing.pins import check_left_out, check_planned
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.editing.record import complete_record, draft_record
from swsurgery.editing.sanity import Check, CheckOptions, combine_bounds, run_check
from swsurgery.errors import ModelError, PlanError, TargetError
from swsurgery.hub import Uri, download_checkpoint, fetch, open_location
from swsurgery.manifest.load import load_manifest
from swsurgery.model.report import CheckedBounds
from swsurgery.progress import Progress, Silent
from swsurgery.storage import filesystem, staging
from swsurgery.storage.arguments import require_choice, require_type
from swsurgery.storage.digest_cache import DigestCache
from swsurgery.storage.folder import Folder
from swsurgery.storage.names import OWN_FILES

SMALL_CHECKPOINT = 64 << 20
"""Maximum size, in bytes, of an unedited file that is downloaded for publishing and hashed by an edit in place."""


@dataclass(frozen=True)
class Outcome:
    """A patched checkpoint that was made.

    `written` is False if the directory was the patched checkpoint already and nothing had to be done.
    """

    output: Path
    applied: Applied
    record: Record
    notes: tuple[str, ...] = ()
    written: bool = True

    def to_json(self) -> dict[str, Any]:
        """Build the JSON document that `apply --json` prints."""
        files = {
            f.name: {"size": f.size, "base_sha256": f.base_digest, "sha256": f.patched_digest, "how": f.how}
            | ({"unverified": True} if f.unverified else {})
            for f in self.applied.files
        }
        document = self.record.model_dump(mode="json")
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
    """Read a manifest, open its base (or `base`: a directory or hf://ORG/NAME[@REV]) and plan; write nothing.

    If the base is a directory, the pinned shards with edits are hashed. If it is a repository, only headers and scalars
    are read, and the digests that the Hub lists are compared with the pins. The plan names the pins that were not
    checked.

    Raises HubError, ManifestError, CheckpointError, PlanError; TargetError while another run edits the base in place.
    """
    loaded = load_manifest(manifest)
    with held(open_location(find_base(loaded, base))) as root:
        plan = make_plan(loaded, read_checkpoint(root, loaded.manifest.base))
        draft_record(plan)  # so that a dry run refuses what the run itself would refuse
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
    """Make the patched checkpoint `output`, checked and with its record, or nothing.

    A base on the Hub is downloaded. With `for_publish`, only its small files and the shards with edits are downloaded,
    and `publish` copies the others on the Hub. With `reuse_digests`, files that have neither an edit nor a pin and that
    were hashed before are not hashed again: their cached digests go into the record, marked as unverified. `say`
    receives each note for the user.

    Raises HubError, ManifestError, CheckpointError, PlanError, TargetError, ModelError; CheckFailed if the patched
    checkpoint fails the check.
    """
    progress = progress or Silent()
    check = CheckOptions.of(check)
    require_choice("link", link, get_args(Link))
    require_type("reuse_digests", reuse_digests, bool)
    require_type("for_publish", for_publish, bool)
    loaded = load_manifest(manifest)
    where = find_base(loaded, base)
    with held(open_location(where) if for_publish else download_checkpoint(where)) as root:
        plan = make_plan(loaded, read_checkpoint(root, loaded.manifest.base))
        refuse_inside(output, plan.checkpoint)
        combine_bounds(plan, check)  # raises before the copy, which may take an hour
        draft = draft_record(plan)
        for note in plan.notes:
            say(note)
        source = _build_source(plan)
        check_left_out(plan, source.names, source.pins, progress)
        if for_publish:
            check = _restrict_check(plan, check)
            source = _download_touched(source, plan.checkpoint)
        with staging.stage_output(output, source.names, OWN_FILES, source.folder_mode) as stage:
            applied = write_checkpoint(
                source, stage, link=link, progress=progress, digests=DigestCache(), reuse=reuse_digests
            )
            result = run_check(plan, stage, check, progress, say)
            record = complete_record(draft, applied, result)
            write_own_files(stage, Patched(record, record.render(), loaded.raw), source.own_mode)
    return Outcome(output, applied, record, plan.notes)


def _download_touched(source: CopyJob, base: Checkpoint) -> CopyJob:
    """Download the files that publishing needs on this machine; the others remain in the base's repository.

    These are the shards with edits, small files and files without a digest on the Hub. Raises PlanError if the base is
    not in a repository, HubError.
    """
    if base.repo_id is None or base.revision is None:
        raise PlanError(
            "--for-publish leaves files in the base's repository, so the base must be in one",
            base.root,
            "give --base hf://ORG/NAME@REV",
        )
    touched = {s.file for s in source.splices}
    stay = {f.name for f in source.files if f.name not in touched and f.size > SMALL_CHECKPOINT and f.digest}
    here = [f for f in source.files if f.name not in stay]
    if not base.in_cache:
        folder = fetch(Uri(base.repo_id, base.revision, base.sub), [f.name for f in here])
        there = list_cached_files(Path(os.path.realpath(folder)), (f.name for f in here))
        here = [replace(f, source=there[f.name].source) for f in here]
    return replace(source, files=tuple(here), elsewhere=tuple(f for f in source.files if f.name in stay), in_cache=True)


def _restrict_check(plan: Plan, options: CheckOptions) -> CheckOptions:
    """Choose the check that works without most shards. Raises ModelError if the user asked for more."""
    if options.kind == "forward" or combine_bounds(plan, options) != CheckedBounds():
        raise ModelError(
            "a forward check needs the whole model",
            plan.checkpoint.root,
            "leave out --for-publish, or the bounds and --check forward",
        )
    return replace(options, kind="weights" if options.kind == "auto" else options.kind)


def refuse_inside(output: Path, base: Checkpoint) -> None:
    """Raise TargetError for a target inside the base: it would change the base and later be copied with it."""
    if base.is_here and Path(os.path.realpath(output)).is_relative_to(base.directory):
        raise TargetError("the output is inside the base", output, "choose another -o")


def _build_source(plan: Plan) -> CopyJob:
    """Describe the copy that a plan asks for."""
    leave = {*plan.omitted, *OWN_FILES}
    files = tuple(f for f in plan.checkpoint.files if f.name not in leave)
    checkpoint = plan.checkpoint
    return CopyJob(files, plan.splices, collect_known_digests(plan), checkpoint.in_cache, shards=checkpoint.shards)


def write_own_files(stage: Folder, patched: Patched, mode: int) -> None:
    """Write swsurgery's own three files into the stage."""
    for name, data in patched.own_files().items():
        filesystem.write_file(stage / name, data, mode)
