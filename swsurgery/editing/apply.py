"""Apply a manifest to a copy of its base: the whole operation on one page.

    load_manifest        reads what the user asked for                      manifest/load.py
    open_checkpoint      lists the files and reads their headers            checkpoint/opening.py
    make_plan            resolves edits to splices, reports all faults      plan.py
    write_checkpoint     copies bytes, makes splices, hashes, in a stage    copy.py
    run_check            compares base and patched; may run the model       sanity.py
    complete_record    records what was done, and its proof               record.py
    stage_output         renames the stage, so that all or nothing exists   storage/staging.py

`in_place.py` writes into the base itself, under a journal. `revert.py` is the opposite of both and needs only the
record.
Verification (`verifying/against_record.py`) uses none of this.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.listing import list_cached_files
from swsurgery.checkpoint.opening import describe_traffic, held, read_checkpoint
from swsurgery.checkpoint.record import Patched
from swsurgery.editing.applied import SMALL_CHECKPOINT, Applied
from swsurgery.editing.base import collect_known_digests, find_base
from swsurgery.editing.copy import CopyJob, Link, write_checkpoint
from swsurgery.editing.in_place import apply_in_place
from swsurgery.editing.pins import check_left_out, check_planned
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.editing.record import complete_record, draft_record
from swsurgery.editing.sanity import Check, CheckOptions, combine_bounds, run_check
from swsurgery.errors import ModelError, PlanError, SwsurgeryError, TargetError
from swsurgery.hub import RemoteTree, Uri, download_checkpoint, fetch, open_location
from swsurgery.manifest.load import ManifestLike, load_manifest
from swsurgery.model.report import CheckedBounds
from swsurgery.progress import Reporter, require_reporter
from swsurgery.storage import filesystem, staging
from swsurgery.storage.arguments import require_choice, require_path, require_type
from swsurgery.storage.digest_cache import DigestCache
from swsurgery.storage.folder import Folder
from swsurgery.storage.names import OWN_FILES


def plan(manifest: ManifestLike, base: str | Path | None = None, *, reporter: Reporter | None = None) -> Plan:
    """Read a manifest, open its base and return what `apply` would change; write nothing.

    `manifest` is a path to a manifest or a patch, a manifest's text as bytes, a dict, a Manifest, a LoadedManifest or a
    list of edits, which needs `base`. `base` replaces the base that the manifest names: a directory or
    hf://ORG/NAME[@REV][/sub]. Of a repository, only headers and single scalars are read, and the digests that the Hub
    lists are compared with the pins. Of a directory, the pinned shards with edits are hashed. The plan lists the pins
    that were not checked.

    Raises TypeError, HubError, ManifestError, CheckpointError and PlanError, which lists every fault; TargetError while
    another run edits the base in place.
    """
    reporter = require_reporter(reporter)
    loaded = load_manifest(manifest, base)
    with held(open_location(find_base(loaded, base))) as root:
        found = make_plan(loaded, read_checkpoint(root, loaded.manifest.base))
        draft_record(found)  # so that a dry run refuses what the run itself would refuse
        found = check_planned(found, reporter)
    if isinstance(root, RemoteTree):
        reporter.say(describe_traffic(root))
    return found


def apply(
    manifest: ManifestLike,
    base: str | Path | None = None,
    output: str | Path | None = None,
    *,
    in_place: bool = False,
    link: Link = "auto",
    check: CheckOptions | Check | None = "auto",
    reuse_digests: bool = False,
    for_publish: bool = False,
    reporter: Reporter | None = None,
) -> Applied:
    """Make the patched checkpoint `output`, checked and with its record, or nothing.

    `manifest` and `base` are those of `plan`; a base on the Hub is downloaded. Without `output`, the patched checkpoint
    is a folder of the current directory with the manifest's name. With `in_place`, the base itself becomes the patched
    checkpoint: a few bytes are written under a journal, nothing is copied, and a manifest that was applied last is not
    applied again.

    `link` says how files are copied: "auto" clones them if the file system can and copies them otherwise, "hard" makes
    hard links. `check` is the sanity check: "auto" runs base and patched if torch is installed, "weights" only rereads
    the stored scalars. With `for_publish`, only the small files and the shards with edits are downloaded, and `publish`
    copies the others on the Hub. With `reuse_digests`, files that have neither an edit nor a pin and that were hashed
    before are not hashed again: their cached digests go into the record, marked as unverified.

    Raises TypeError, HubError, ManifestError, CheckpointError, PlanError, ModelError; TargetError if the output exists
    or cannot be written; CheckFailed if the patched checkpoint fails the check.
    """
    reporter, check = require_reporter(reporter), CheckOptions.of(check)
    require_choice("link", link, get_args(Link))
    for name, value in (("in_place", in_place), ("reuse_digests", reuse_digests), ("for_publish", for_publish)):
        require_type(name, value, bool)
    loaded = load_manifest(manifest, base)
    where = find_base(loaded, base)
    if in_place:
        if output is not None or link != "auto" or reuse_digests or for_publish:
            raise SwsurgeryError(
                "--in-place writes no copy, so it cannot be combined with -o, --link, --reuse-digests or --for-publish"
            )
        return apply_in_place(loaded, where, check, reporter)
    target = Path.cwd() / loaded.path.stem if output is None else require_path("output", output)
    with held(open_location(where) if for_publish else download_checkpoint(where)) as root:
        plan = make_plan(loaded, read_checkpoint(root, loaded.manifest.base))
        refuse_inside(target, plan.checkpoint)
        combine_bounds(plan, check)  # raises before the copy, which may take an hour
        draft = draft_record(plan)
        for note in plan.notes:
            reporter.say(note)
        job = _make_job(plan)
        check_left_out(plan, job.names, job.pins, reporter)
        if for_publish:
            check = _restrict_check(plan, check)
            job = _download_touched(job, plan.checkpoint)
        with staging.stage_output(target, job.names, OWN_FILES, job.folder_mode) as stage:
            copied = write_checkpoint(
                job, stage, link=link, progress=reporter, digests=DigestCache(), reuse=reuse_digests
            )
            result = run_check(plan, stage, check, reporter, reporter.say)
            record = complete_record(draft, copied, result)
            write_own_files(stage, Patched(record, record.render(), loaded.raw), job.own_mode)
    return Applied(target, copied, record, plan.notes)


def _download_touched(job: CopyJob, base: Checkpoint) -> CopyJob:
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
    touched = {s.file for s in job.splices}
    stay = {f.name for f in job.files if f.name not in touched and f.size > SMALL_CHECKPOINT and f.digest}
    here = [f for f in job.files if f.name not in stay]
    if not base.in_cache:
        folder = fetch(Uri(base.repo_id, base.revision, base.sub), [f.name for f in here])
        there = list_cached_files(Path(os.path.realpath(folder)), (f.name for f in here))
        here = [replace(f, source=there[f.name].source) for f in here]
    return replace(job, files=tuple(here), elsewhere=tuple(f for f in job.files if f.name in stay), in_cache=True)


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


def _make_job(plan: Plan) -> CopyJob:
    """Describe the copy that a plan asks for."""
    leave = {*plan.omitted, *OWN_FILES}
    files = tuple(f for f in plan.checkpoint.files if f.name not in leave)
    checkpoint = plan.checkpoint
    return CopyJob(files, plan.splices, collect_known_digests(plan), checkpoint.in_cache, shards=checkpoint.shards)


def write_own_files(stage: Folder, patched: Patched, mode: int) -> None:
    """Write swsurgery's own three files into the stage."""
    for name, data in patched.render_own_files().items():
        filesystem.write_file(stage / name, data, mode)
