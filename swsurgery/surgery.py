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

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from swsurgery import fsops, model, staging
from swsurgery.apply import Applied, Link, Source, write_checkpoint
from swsurgery.arguments import require_choice, require_strings, require_type
from swsurgery.checkpoint import Checkpoint, Weights, held, open_as
from swsurgery.digests import DigestCache
from swsurgery.dtypes import DTYPES, decode
from swsurgery.errors import (
    CheckFailed,
    CheckpointError,
    ModelError,
    NumberError,
    PlanError,
    TargetError,
    Unrunnable,
    or_else,
)
from swsurgery.folder import Folder
from swsurgery.hints import hub_hint
from swsurgery.hub import Repo, Uri, fetch, local, named, place
from swsurgery.listing import cached_files
from swsurgery.manifest import LoadedManifest, load_manifest
from swsurgery.model import Placement
from swsurgery.model.check import run_checks
from swsurgery.names import OWN_FILES
from swsurgery.pins import check_left_out, check_planned, known_digests
from swsurgery.plan import Plan, make_plan
from swsurgery.progress import Progress, Silent
from swsurgery.registry import (
    REGISTRY_NAME,
    Patched,
    Registry,
    complete_registry,
    draft_registry,
    open_chosen,
    read_patched,
    refuse_other_weights,
)
from swsurgery.report import Bounds, CheckReport
from swsurgery.splice import Splice
from swsurgery.verify import undeclared_changes

SMALL = 64 << 20
"""Bytes. Untouched files up to this size are downloaded for publishing, and hashed by an edit in place."""

Check = Literal["auto", "off", "weights", "forward"]


@dataclass(frozen=True)
class CheckOptions:
    """How the sanity check is made. `text` None is the built-in passage; a bound that is None is the manifest's."""

    kind: Check = "auto"
    device: str = "auto"
    placement: Placement = "auto"
    text: str | None = None
    prompts: Sequence[str] | None = None
    bounds: Bounds | None = None
    windows: int = 16
    window: int = 512

    def __post_init__(self) -> None:
        """Raise TypeError for a field of a wrong type."""
        require_choice("kind", self.kind, get_args(Check))
        require_type("device", self.device, str)
        require_choice("placement", self.placement, get_args(Placement))
        require_type("text", self.text, str, optional=True)
        require_strings("prompts", self.prompts)
        require_type("bounds", self.bounds, Bounds, optional=True)

    @classmethod
    def of(cls, check: CheckOptions | Check | None) -> CheckOptions:
        """Return the options that the argument `check` of a public function means. Raises TypeError."""
        if check is None:
            return cls()
        if isinstance(check, cls):
            return check
        if isinstance(check, str) and check in get_args(Check):
            return cls(check)
        kinds = ", ".join(map(repr, get_args(Check)))
        raise TypeError(f"check must be a CheckOptions, None, or one of {kinds}, not {check!r:.80}")

    @property
    def asked(self) -> bool:
        """Whether the user said how the model is to be run, and so that it is."""
        given = (self.device, self.placement, self.text, self.prompts, self.windows, self.window)
        return given != ("auto", "auto", None, None, 16, 512)


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


def revert(root: Path, output: Path, *, link: Link = "auto", progress: Progress | None = None) -> list[str]:
    """Write the base of the patched checkpoint `root` into `output`, byte for byte; of several manifests the last is
    undone. Returns notes. Raises CheckpointError, PlanError (a file was changed since), TargetError."""
    require_choice("link", link, ("auto", "clone", "copy"))
    with held(root) as root:
        patched, checkpoint = open_patched(root)
        _refuse_inside(output, checkpoint.root)
        registry, previous = patched.registry, patched.previous()
        names = {f.name for f in checkpoint.files}
        if missing := [name for name in registry.files if name not in names]:
            raise CheckpointError(f"cannot be reverted, for it lacks {', '.join(missing)}", checkpoint.root,
                                  "restore what was removed since the edit")  # fmt: skip
        source = Source(
            files=tuple(f for f in checkpoint.files if f.name in registry.files),
            splices=undoing(registry, checkpoint),
            pins={name: (record.sha256, "its registry") for name, record in registry.files.items() if record.sha256},
            in_cache=checkpoint.in_cache,
            shards=checkpoint.shards,
        )
        with staging.staged(output, source.names, OWN_FILES, source.folder_mode) as stage:
            applied = write_checkpoint(source, stage, link=link, progress=progress or Silent())
            for file in applied.files:
                if file.patched_digest != (registry.files[file.name].base_sha256 or file.patched_digest):
                    raise CheckpointError("does not give the base back: the registry was changed", file.name)
            if previous:
                _write_own_files(stage, previous, source.own_mode)
    return reversion_notes(registry)


def undoing(registry: Registry, checkpoint: Checkpoint) -> tuple[Splice, ...]:
    """The splices that take a registry's edits back. Raises CheckpointError where they are not scalars of the
    checkpoint's tensors: a registry that was changed could name any byte."""
    splices = []
    for e in registry.edits:
        shard = checkpoint.shards.get(e.file)
        try:
            info = shard.tensors[e.tensor]
            splice = Splice(e.file, e.coordinate, info.dtype, e.offset, e.new_bytes, op="set", new=e.old_bytes)
            sound = (info.dtype.name, shard.offset(e.tensor, e.index)) == (
                e.dtype,
                e.offset,
            ) and e.file in registry.files
        except (AttributeError, KeyError, IndexError, NumberError):
            sound = False
        if not sound:
            raise CheckpointError("the registry names a scalar that is not there", f"{e.coordinate} in {e.file}",
                                  "restore swsurgery.json")  # fmt: skip
        splices.append(splice)
    return tuple(splices)


def reversion_notes(registry: Registry) -> list[str]:
    """What a reversion cannot give back."""
    if registry.omitted:
        return [f"the base also had {', '.join(registry.omitted)}, which had been left out"]
    return []


def check_checkpoint(
    root: Path,
    options: CheckOptions | Check | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
    weights: Weights | None = None,
    variant: str | None = None,
) -> CheckReport:
    """Run a checkpoint and, if its registry says what its base was, compare it with the base.

    Without a registry there is nothing to compare with: the report has `compared` False, and bounds are refused.
    `weights` and `variant` say which to read if there are several sets of weights, and no registry. `options`
    of the kinds "off" and "weights" are refused, for the model is always run.

    Raises CheckpointError, ModelError, PlanError (bounds and nothing to compare with), TargetError while another run is
    editing the checkpoint in place.
    """
    options = CheckOptions.of(options)
    if options.kind in ("off", "weights"):
        raise TypeError(
            f"check_checkpoint runs the model, so the kind must be 'auto' or 'forward', not {options.kind!r}"
        )
    require_choice("weights", weights, get_args(Weights), optional=True)
    require_type("variant", variant, str, optional=True)
    with held(root):
        patched = read_patched(root)
        _refuse_bounds_without_base(root, patched, options.bounds)
        registry = patched.registry if patched else None
        said = registry.base if registry else None
        if said is not None:
            refuse_other_weights(weights, said.weights, REGISTRY_NAME, variant, said.variant)
            weights, variant = said.weights or weights, said.variant or variant
        checkpoint = open_chosen(root, weights, variant)
        changes = [
            model.ScalarChange(
                e.coordinate, float(decode(DTYPES[e.dtype], e.old_bytes)), float(decode(DTYPES[e.dtype], e.new_bytes))
            )
            for e in (registry.edits if registry else ())
        ]
        with or_else("swsurgery verify, which runs none") if patched else contextlib.nullcontext():
            report = run_checks(
                checkpoint, changes, text=options.text, prompts=options.prompts, bounds=options.bounds,
                device=options.device, placement=options.placement, windows=options.windows, window=options.window,
                progress=progress, say=say,
            )  # fmt: skip
        return replace(report, compared=patched is not None)


def refuse_bounds_without_base(root: Path | Repo, bounds: Bounds | None) -> None:
    """Raise PlanError if bounds were given for a checkpoint whose base nothing names, CheckpointError for a damaged
    registry. For a repository this is known before the weights are downloaded."""
    if bounds not in (None, Bounds()):
        _refuse_bounds_without_base(root, read_patched(root), bounds)


def _refuse_bounds_without_base(root: Path | Repo, patched: Patched | None, bounds: Bounds | None) -> None:
    if patched is None and bounds not in (None, Bounds()):
        raise PlanError(
            "a bound on the perplexity ratio needs a base to compare with, and no registry says what it was",
            root,
            "leave out the bounds, or give a patched checkpoint",
        )


def read_records(root: Path | Folder | Repo) -> Patched:
    """The records of a patched checkpoint. Raises CheckpointError where it has none."""
    patched = read_patched(root)
    if patched is None:
        raise CheckpointError(
            "no registry", f"{root}/{OWN_FILES[0]}", "only a checkpoint that swsurgery patched has one"
        )
    return patched


def open_patched(root: Path) -> tuple[Patched, Checkpoint]:
    """A patched checkpoint and its records. Raises CheckpointError where it has none."""
    patched = read_records(root)
    return patched, open_as(root, patched.registry.base)


def base_of(loaded: LoadedManifest, base: str | None) -> Path | Uri:
    """What the base is: `base` if given, else what the manifest says.

    Raises HubError for a name that is none, CheckpointError for a path that looks like a repository of the Hub.
    """
    said = loaded.manifest.base
    if base is not None:
        return named(base)
    if said.path is not None:
        where = loaded.path.parent / said.path
        if not os.path.lexists(where) and hub_hint(said.path):
            raise CheckpointError("no such checkpoint", where, "name a repository of the Hub with base.repo_id")
        return where
    return Uri(said.repo_id, said.revision, "")


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
        fsops.write_file(stage / name, data, mode)


def run_check(
    plan: Plan, patched: Path | Folder, options: CheckOptions, progress: Progress, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check the checkpoint that is not yet done, staged or edited in place; what is returned goes into the registry.
    Raises CheckFailed, ModelError."""
    bounds = bounds_of(plan, options)
    if options.kind == "off":
        return {"kind": "off", "reason": "the check was turned off"}
    weights = _check_weights(plan, patched, progress)
    reason = None
    if options.kind == "weights":
        reason = "only the weights were to be checked"
    elif not plan.splices:
        # Base and patched are one, so the ratio is 1 whatever the model.
        if bounds.min_perplexity_ratio is not None and bounds.min_perplexity_ratio > 1:
            raise CheckFailed("check failed: nothing was changed, so the perplexity ratio is 1",
                              f"at least {bounds.min_perplexity_ratio:g} wanted")  # fmt: skip
        if bounds.max_perplexity_ratio is not None and bounds.max_perplexity_ratio < 1:
            raise CheckFailed("check failed: nothing was changed, so the perplexity ratio is 1",
                              f"at most {bounds.max_perplexity_ratio:g} allowed")  # fmt: skip
        reason = "nothing was changed"
    if reason is None:
        try:
            report = _check_forward(plan, patched, options, bounds, progress, say)
        except ModelError as error:
            # What was asked for is done or refused; without bounds and wishes the check is a courtesy.
            if options.kind == "forward" or bounds != Bounds() or options.asked:
                if isinstance(error, Unrunnable) and options.bounds is None:
                    raise error.or_else("--check weights") from error
                raise
            # The directory has this name only until it is done, and the registry does not depend on where it was made.
            reason = model.available() or str(error).replace(
                str(patched if isinstance(patched, Folder) else Path(os.path.realpath(patched))), "the checkpoint"
            )
        else:
            if not report.ok:
                raise CheckFailed.of(f"check failed: {line}" for line in report.failures)
            return {"kind": "forward", "reason": None, "weights": weights, **report.to_json()}
    if plan.splices:
        say(f"no forward check was made: {reason}")
    return {"kind": "weights", "reason": reason, "weights": weights}


def bounds_of(plan: Plan, options: CheckOptions) -> Bounds:
    """The manifest's bounds; of each of them, the options' where they give it. Raises PlanError where no ratio can
    hold both, or where the check that was chosen measures none."""
    if options.kind in ("off", "weights") and options.bounds:
        raise PlanError(f"--check {options.kind} measures no perplexity, and a bound on it was given",
                        remedy="leave out one of the two")  # fmt: skip
    given, said = options.bounds or Bounds(), plan.loaded.manifest.check
    most = said.max_perplexity_ratio if given.max_perplexity_ratio is None else given.max_perplexity_ratio
    least = said.min_perplexity_ratio if given.min_perplexity_ratio is None else given.min_perplexity_ratio
    if most is not None and least is not None and least > most:
        raise PlanError(f"no perplexity ratio is at least {least:g} and at most {most:g}", plan.loaded.path)
    return Bounds(most, least)


def _check_forward(
    plan: Plan,
    patched: Path | Folder,
    options: CheckOptions,
    bounds: Bounds,
    progress: Progress,
    say: Callable[[str], None],
) -> CheckReport:
    changes = [
        model.ScalarChange(s.coordinate, float(decode(s.dtype, s.old)), float(decode(s.dtype, s.new)))
        for s in plan.splices
    ]
    return run_checks(
        open_as(patched, plan.loaded.manifest.base, editing=True), changes, text=options.text,
        prompts=options.prompts, bounds=bounds, device=options.device, placement=options.placement,
        windows=options.windows, window=options.window, progress=progress, say=say,
    )  # fmt: skip


def _check_weights(plan: Plan, patched: Path | Folder, progress: Progress) -> dict[str, Any]:
    """Re-read the touched shards: exactly the planned scalars differ from the base, and have the planned values. Of
    an edit in place only the latter, for there is no base left to compare with, and where the base is on the Hub."""
    touched = sorted({s.file for s in plan.splices})
    there = set(os.listdir(patched.fd if isinstance(patched, Folder) else patched))
    elsewhere = [name for name in plan.checkpoint.shards if name not in there]
    result = open_as(patched, plan.loaded.manifest.base, editing=True, elsewhere=elsewhere)
    declared: dict[str, set[int]] = {}
    for splice in plan.splices:
        declared.setdefault(splice.file, set()).update(range(splice.offset, splice.offset + len(splice.new)))
    compared = isinstance(plan.checkpoint.root, Path) and result.root != plan.checkpoint.root
    findings = [] if not compared else undeclared_changes(result, plan.checkpoint, touched, declared, progress)
    wrong = [f"{f.file}: {f.message}" for f in findings]
    for scalar in (*plan.splices, *plan.protected):
        if scalar.file in elsewhere:
            continue
        stored = result.shards[scalar.file].read_scalar(*scalar.coordinate)
        if stored != (scalar.new if isinstance(scalar, Splice) else scalar.old):
            wrong.append(f"{scalar.coordinate} holds 0x{stored[::-1].hex()} after the edit")
    if wrong:
        raise CheckFailed.of(f"check failed: {line}" for line in wrong)
    return {"changed_scalars": len(plan.splices), "protected_scalars": len(plan.protected), "shards": touched}
