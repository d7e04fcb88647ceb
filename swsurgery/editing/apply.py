"""Apply a manifest to a copy of its base: the whole operation on one page.

    load_merged       reads what the user asked for, in one manifest or several             manifest/merge.py
    open_checkpoint   lists the files and reads their headers                               checkpoint/opening.py
    make_plan         converts edits to splices (bytes to replace), or reports all faults   plan.py
    write_checkpoint  copies the files into a temporary directory, splices and hashes       copy.py
    run_check         compares the patched checkpoint with its base; may run both           sanity.py
    complete_record   adds the digests and the result of the check to the record            record.py
    stage_output      gives the temporary directory its final name, or removes it           storage/staging.py

`in_place.py` edits the base itself, and a journal allows it to be restored. `revert.py` restores the base from a
patched checkpoint and its record. Verification (`verifying/against_record.py`) uses none of these modules.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.listing import list_cached_files
from swsurgery.checkpoint.opening import describe_traffic, held
from swsurgery.checkpoint.record import Patched
from swsurgery.editing.applied import SMALL_CHECKPOINT, Applied
from swsurgery.editing.base import collect_known_digests, find_base, read_base
from swsurgery.editing.check_options import Check, CheckOptions
from swsurgery.editing.control_checks import refuse_controls
from swsurgery.editing.copy import write_checkpoint
from swsurgery.editing.copy_job import CopyJob, Link
from swsurgery.editing.pins import check_left_out, check_planned
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.editing.record import complete_record, draft_record
from swsurgery.editing.rewrite import MEASURED
from swsurgery.editing.sanity import combine_bounds, run_check
from swsurgery.errors import ModelError, PlanError, SwsurgeryError, TargetError
from swsurgery.hub import RemoteTree, Uri, download_checkpoint, fetch, open_location
from swsurgery.manifest.merge import ManifestsLike, load_merged
from swsurgery.model.bounds import CheckedBounds
from swsurgery.progress import Progress, Reporter, require_reporter
from swsurgery.storage import filesystem, staging
from swsurgery.storage.arguments import require_choice, require_integer, require_path, require_type
from swsurgery.storage.digest_cache import DigestCache
from swsurgery.storage.folder import Folder
from swsurgery.storage.names import OWN_FILES, make_undo_name

if TYPE_CHECKING:
    from swsurgery.rewriting.segments import RegionChange

UNDO_LIMIT = 256 * 10**6
"""Maximum number of old bytes that are stored in the undo file, by default."""


def plan(
    manifest: ManifestsLike,
    base: str | Path | None = None,
    *,
    in_place: bool = False,
    undo_limit: int = UNDO_LIMIT,
    reporter: Reporter | None = None,
) -> Plan:
    """Read a manifest, open its base and return what `apply` would change; write nothing.

    `manifest` is a path to a manifest or a patch, a manifest's text as bytes, a dict, a Manifest, a LoadedManifest or a
    list of edits, which needs `base`. A list of manifests for one base, such as paths, is merged into one manifest: an
    edit that repeats a change of an earlier manifest is left out, and scalars that two of them change differently are
    an error. `base` replaces the base that the manifest names: a directory, a GGUF file, or
    `hf://ORG/NAME[@REV][/sub]`.

    A pin is the digest that the manifest, or the base's own record, requires of a file. From a repository, only headers
    and single scalars are read, and the digests that the Hub lists are compared with the pins. In a directory, the
    pinned shards with edits are hashed. The plan lists the pins that were not checked. The new values of regions are
    not computed; a note names the operations that `apply` may still refuse, such as a clip that removes everything.

    With `in_place`, everything is checked that can forbid an edit in place, such as hard links, a missing digest, or
    more than 16 MiB of changed bytes. The files to edit are then hashed, and the new values of regions are computed.

    Raises TypeError, HubError, ManifestError, CheckpointError; PlanError, which lists every fault; TargetError if
    another run is editing the base in place.
    """
    reporter = require_reporter(reporter)
    require_type("in_place", in_place, bool)
    undo_limit = _require_limit(undo_limit)
    loaded = load_merged(manifest, base)
    if in_place:
        from swsurgery.editing.in_place import plan_in_place

        return plan_in_place(loaded, find_base(loaded, base), undo_limit, reporter)
    with held(open_location(find_base(loaded, base))) as root:
        found = make_plan(loaded, read_base(root, loaded))
        draft_record(found)  # so that a dry run refuses what `apply` would refuse
        found = replace(check_planned(found, reporter), notes=(*found.notes, *_list_unmeasured(found)))
    if isinstance(root, RemoteTree):
        reporter.say(describe_traffic(root))
    return found


def _require_limit(undo_limit: int) -> int:
    """Return the limit of the undo file as an int. Raises TypeError, and SwsurgeryError for a negative number."""
    if (limit := require_integer("undo_limit", undo_limit)) < 0:
        raise SwsurgeryError("undo_limit must be a number of bytes from 0", limit)
    return limit


def _list_unmeasured(found: Plan) -> list[str]:
    """Return a note if the plan has changes of regions that `apply` may refuse once it has read their values."""
    ops = [op for op in MEASURED if any(rewrite.op == op for rewrite in found.rewrites)]
    if not ops:
        return []
    refused = "apply refuses results that overflow, and a clip that removes everything"
    return [f"not computed in a dry run: {', '.join(ops)} ({refused})"]


def apply(
    manifest: ManifestsLike,
    base: str | Path | None = None,
    output: str | Path | None = None,
    *,
    in_place: bool = False,
    link: Link = "auto",
    check: CheckOptions | Check | None = "auto",
    reuse_digests: bool = False,
    for_publish: bool = False,
    undo_limit: int = UNDO_LIMIT,
    reporter: Reporter | None = None,
) -> Applied:
    """Write the patched checkpoint `output` with its record, if it passes the check. An error leaves no partial output.

    `manifest` and `base` are those of `plan`; a base on the Hub is downloaded. Without `output`, the patched checkpoint
    is a folder of the current directory with the manifest's name, or the names of several with "+" between them. With
    `in_place`, the base itself becomes the patched checkpoint: only the changed bytes are overwritten, and no file is
    copied. If this manifest was the last one applied to the directory, nothing is written.

    `link` selects how files are copied: "auto" clones them if the file system can and copies them otherwise; "hard"
    makes hard links of the files without edits. `check` selects the sanity check: "auto" runs both checkpoints if torch
    is installed; "weights" only compares the stored bytes with the plan. With `for_publish`, only the small files and
    the shards with edits are downloaded, and `publish` copies the other files on the Hub. With `reuse_digests`, a file
    that an earlier run hashed is not hashed again if it has no edit and no pin (a required digest): its cached digest
    goes into the record, marked as unverified. Old bytes of changed regions go into the undo file if they have at most
    `undo_limit` bytes; undoing needs the base otherwise, so that `in_place` is refused.

    Raises TypeError, HubError, ManifestError, CheckpointError, PlanError, ModelError; TargetError if the output exists
    or cannot be written; CheckFailed if the patched checkpoint fails the check.
    """
    reporter, check = require_reporter(reporter), CheckOptions.of(check)
    require_choice("link", link, get_args(Link))
    for name, value in (("in_place", in_place), ("reuse_digests", reuse_digests), ("for_publish", for_publish)):
        require_type(name, value, bool)
    undo_limit = _require_limit(undo_limit)
    loaded = load_merged(manifest, base)
    where = find_base(loaded, base)
    if in_place:
        if output is not None or link != "auto" or reuse_digests or for_publish:
            raise SwsurgeryError(
                "--in-place writes no copy, so it cannot be combined with -o, --link, --reuse-digests or --for-publish"
            )
        from swsurgery.editing.in_place import apply_in_place

        return apply_in_place(loaded, where, check, undo_limit, reporter)
    target = Path.cwd() / loaded.path.stem if output is None else require_path("output", output)
    with held(open_location(where) if for_publish else download_checkpoint(where)) as root:
        plan = make_plan(loaded, read_base(root, loaded))
        refuse_inside(target, plan.checkpoint)
        combine_bounds(plan, check)  # raises before the copy, which may take an hour
        if check.controls:
            refuse_controls(plan)
        draft = draft_record(plan)
        for note in plan.notes:
            reporter.say(note)
        job = _make_job(plan, undo_limit, reporter)
        check_left_out(plan, job.names, job.pins, reporter)
        if for_publish:
            check = _restrict_check(plan, check)
            job = _download_touched(job, plan.checkpoint)
        own = (*OWN_FILES, job.undo_name) if job.undo_name else OWN_FILES
        with staging.stage_output(target, job.names, own, job.folder_mode) as stage:
            copied = write_checkpoint(
                job, stage, link=link, progress=reporter, digests=DigestCache(), reuse=reuse_digests
            )
            result = run_check(plan, stage, check, reporter, reporter.say)
            record = complete_record(draft, copied, result)
            write_own_files(stage, Patched(record, record.render(), plan.loaded.raw), job.own_mode)
    return Applied(target, copied, record, plan.notes, scalars=plan.checkpoint.scalars)


def _download_touched(job: CopyJob, base: Checkpoint) -> CopyJob:
    """Download the files that publishing needs on this machine, and return the copy job for them.

    These files are the shards with edits, small files, and files whose digest the Hub does not list. The remaining
    files stay in the base's repository, and the job lists them as `elsewhere`. Raises HubError, and PlanError if the
    base is not in a repository.
    """
    if base.repo_id is None or base.revision is None:
        raise PlanError(
            "--for-publish leaves files in the base's repository, so the base must be in a repository on the Hub",
            base.root,
            "give --base hf://ORG/NAME@REV",
        )
    touched = job.touched
    if base.is_gguf:
        touched |= {next(iter(base.shards))}  # the first part of a split file contains the metadata of the model
    stay = {f.name for f in job.files if f.name not in touched and f.size > SMALL_CHECKPOINT and f.digest}
    here = [f for f in job.files if f.name not in stay]
    if not base.in_cache:
        folder = fetch(Uri(base.repo_id, base.revision, base.sub), [f.name for f in here])
        there = list_cached_files(Path(os.path.realpath(folder)), (f.name for f in here))
        here = [replace(f, source=there[f.name].source) for f in here]
    return replace(job, files=tuple(here), elsewhere=tuple(f for f in job.files if f.name in stay), in_cache=True)


def _restrict_check(plan: Plan, options: CheckOptions) -> CheckOptions:
    """Replace the check "auto" by "weights", because most shards are not downloaded.

    Raises ModelError if the user asked for a forward check or for a bound on the perplexity ratio.
    """
    if options.kind == "forward" or combine_bounds(plan, options) != CheckedBounds():
        raise ModelError(
            "a forward check needs the whole model",
            plan.checkpoint.root,
            "leave out --for-publish, or the bounds and --check forward",
        )
    return replace(options, kind="weights" if options.kind == "auto" else options.kind)


def refuse_inside(output: Path, base: Checkpoint) -> None:
    """Raise TargetError if the directory `output` is inside the base, because writing it would change the base."""
    if base.is_here and Path(os.path.realpath(output)).is_relative_to(base.directory):
        raise TargetError("the output is inside the base", output, "choose another -o")


def _make_job(plan: Plan, undo_limit: int, progress: Progress) -> CopyJob:
    """Build the copy job of a plan: all files of the base except omitted files and swsurgery's own files."""
    leave = {*plan.omitted, *OWN_FILES}
    checkpoint = plan.checkpoint
    changes: Mapping[str, Sequence[RegionChange]] = {}
    if plan.rewrites or plan.protected_regions:
        from swsurgery.editing.measure import measure_changes

        changes = measure_changes(plan.rewrites, plan.protected_regions, checkpoint, plan.loaded, progress)
    return CopyJob(
        tuple(f for f in checkpoint.files if f.name not in leave),
        plan.splices,
        collect_known_digests(plan),
        checkpoint.in_cache,
        shards=checkpoint.shards,
        changes=changes,
        undo_name=make_undo_name(1 + plan.earlier_steps) if plan.rewrites else None,
        undo_limit=undo_limit,
    )


def write_own_files(stage: Folder, patched: Patched, mode: int) -> None:
    """Write the record, the manifest and SHA256SUMS of a patched checkpoint into the stage."""
    for name, data in patched.render_own_files().items():
        filesystem.write_file(stage / name, data, mode)
