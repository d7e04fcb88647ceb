"""Apply and revert where the files lie: a few bytes of each touched shard are written, and nothing else is copied.

There is no base left afterwards, so what it was must be vouched for beforehand: each touched shard is hashed once, and
the manifest or an earlier registry has to say the same digest. `journal.py` keeps the old bytes until all is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from swsurgery import fsops, journal
from swsurgery.apply import Applied, AppliedFile, hashed, hold_to, stream
from swsurgery.checkpoint import Checkpoint, is_cache_snapshot, open_as, open_checkpoint
from swsurgery.errors import CheckpointError, PlanError, TargetError
from swsurgery.folder import Entry
from swsurgery.hub import Uri
from swsurgery.manifest import load_manifest
from swsurgery.names import OWN_FILES
from swsurgery.pins import check_left_out, known_digests
from swsurgery.plan import make_plan
from swsurgery.progress import Progress, Silent
from swsurgery.registry import Patched, Registry, complete_registry, draft_registry, read_patched
from swsurgery.shard import opened
from swsurgery.splice import Splice
from swsurgery.surgery import (
    SMALL,
    Check,
    CheckOptions,
    Outcome,
    base_of,
    bounds_of,
    open_patched,
    reversion_notes,
    run_check,
    undoing,
)


def apply_in_place(
    manifest: Path,
    *,
    base: str | None = None,
    check: CheckOptions | Check | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Make the base itself the patched checkpoint, checked and with its registry, or leave it as it is.

    The manifest that was applied last is not applied again. Raises ManifestError, CheckpointError, PlanError,
    TargetError (this directory or file must not be written), ModelError; CheckFailed where the check says no.
    """
    progress, check = progress or Silent(), CheckOptions.of(check)
    loaded = load_manifest(manifest)
    with _editing(base_of(loaded, base)) as root:
        previous = read_patched(root)
        if previous and previous.registry.manifest_sha256 == hashlib.sha256(loaded.raw).hexdigest():
            outcome = _applied_already(root, previous.registry)
            say(*outcome.notes)
            return outcome
        plan = make_plan(loaded, open_as(root, loaded.manifest.base))
        if plan.omitted:
            raise PlanError("an edit in place leaves no file out", ", ".join(plan.omitted), "say base.copies: keep")
        bounds_of(plan, check)  # before anything is hashed or written
        draft = draft_registry(plan)
        for note in plan.notes:
            say(note)
        pins = known_digests(plan)
        check_left_out(plan, {f.name for f in plan.checkpoint.files} - {*OWN_FILES}, pins, progress)
        touched = _hash_touched(plan.checkpoint, plan.splices, pins, progress)
        stated = loaded.manifest.base.sha256
        rest = _untouched(plan.checkpoint, touched, previous.registry if previous else None, pins, stated, progress)
        edited = [AppliedFile(name, plan.checkpoint.file(name).size, *both, "place") for name, both in touched.items()]
        applied = Applied(tuple(sorted([*edited, *rest], key=lambda f: f.name)))
        with journal.edited(root, plan.splices) as own:
            result = run_check(plan, root, check, progress, say)
            registry = complete_registry(draft, applied, result)
            own |= Patched(registry, registry.render(), loaded.raw).own_files()
    return Outcome(root, applied, registry, plan.notes)


def revert_in_place(root: Path, progress: Progress | None = None) -> list[str]:
    """Give the base back where the patched checkpoint lies; of several manifests the last is undone. Returns notes.

    Where an edit had been cut off, undoing that is all that is done; a cut-off reversion is made anew. Raises
    CheckpointError, PlanError (a file was changed since), TargetError.
    """
    progress = progress or Silent()
    cut_off = journal.recover(_own_directory(root), moved=True)
    if cut_off and not cut_off.reverts:
        return ["only the edit that had been cut off was undone"]
    with _editing(root) as root:
        patched, checkpoint = open_patched(root)
        registry, previous = patched.registry, patched.previous()
        if hashlib.sha256(patched.manifest_raw).hexdigest() != registry.manifest_sha256:
            raise CheckpointError(
                "was changed since it was applied, and would be lost", root / OWN_FILES[1], "move it away"
            )
        splices = undoing(registry, checkpoint)
        names = {f.name: f.size for f in checkpoint.files}
        if wrong := [name for name, record in registry.files.items() if names.get(name) != record.size]:
            raise CheckpointError(f"cannot be reverted, for these were changed or removed since the edit: "
                                  f"{', '.join(wrong)}", root, "restore them")  # fmt: skip
        pins = {name: (record.sha256, "its registry") for name, record in registry.files.items() if record.sha256}
        touched = _hash_touched(checkpoint, splices, pins, progress)
        _untouched(checkpoint, touched, registry, pins, (), progress)
        for name, (_, restored) in touched.items():
            if restored != registry.files[name].base_sha256:
                raise CheckpointError("does not give the base back: the registry was changed", root / name)
        with journal.edited(root, splices, reverts=True) as own:
            own |= previous.own_files() if previous else dict.fromkeys(OWN_FILES)
    return reversion_notes(registry)


@contextlib.contextmanager
def _editing(root: Path | Uri) -> Iterator[Path]:
    """The directory to edit, held against everyone else from before it is read. Raises TargetError."""
    root = _own_directory(root)
    if not root.is_dir():
        open_checkpoint(root)  # which says what is wrong
    journal.recover(root)
    with fsops.locked(root, exclusive=True):
        yield root


def _own_directory(root: Path | Uri) -> Path:
    """The directory to edit. Raises TargetError where others would see the change too."""
    if isinstance(root, Uri):
        raise TargetError("an edit in place needs a directory of your own", root, "give one with --base")
    if root.is_symlink():
        raise TargetError("is a symbolic link", root, "give the directory itself")
    real = Path(os.path.realpath(root))
    if is_cache_snapshot(real):
        raise TargetError("lies in a Hugging Face cache, which shares its files with other revisions and repos", root,
                          "apply with -o")  # fmt: skip
    return real


def _hash_touched(
    checkpoint: Checkpoint, splices: tuple[Splice, ...], pins: dict[str, tuple[str, str]], progress: Progress
) -> dict[str, tuple[str, str]]:
    """(sha256 before, sha256 after) of each file with splices, from one reading of it.

    Raises TargetError for a file that must not be written, PlanError where its digest is not what it must be.
    """
    files = [checkpoint.file(name) for name in sorted({s.file for s in splices})]
    for file in files:
        _refuse_shared(file.path)
    touched, unknown = {}, []
    progress.start(sum(f.size for f in files), "B", "hashing")
    try:
        for file in files:
            with opened(file.path) as fd:
                mine = sorted((s for s in splices if s.file == file.name), key=lambda s: s.offset)
                touched[file.name] = stream(fd, file, mine, progress.advance)
            digest = touched[file.name][0]
            hold_to(file, digest, pins)
            if file.name not in pins:
                unknown.append(f'"{file.name}": "{digest}"')
    finally:
        progress.close()
    if unknown:
        raise PlanError("nothing vouches for what it was before the edit, so it could not be proved afterwards",
                        checkpoint.root,
                        f"if it is the right base, add base.sha256: {{{', '.join(unknown)}}}")  # fmt: skip
    return touched


def _refuse_shared(path: Path | Entry) -> None:
    status = path.stat()
    if status.st_nlink > 1:
        raise TargetError(f"has {status.st_nlink} hard links, so the change would show under other names too", path,
                          "apply with -o")  # fmt: skip
    if not status.st_mode & stat.S_IWUSR:
        raise TargetError("is marked read-only", path, "apply with -o, or chmod u+w it")


def _untouched(
    checkpoint: Checkpoint,
    touched: Collection[str],
    before: Registry | None,
    pins: dict[str, tuple[str, str]],
    stated: Collection[str],
    progress: Progress,
) -> list[AppliedFile]:
    """Describe the files without splices. Small files, and files whose digest the manifest has `stated`, are hashed.
    The digests of others are copied from the earlier record and marked as unverified, or are None.

    Raises PlanError if a digest is not what it must be.
    """
    found = []
    for file in checkpoint.files:
        if file.name in OWN_FILES or file.name in touched:
            continue
        record = before.files.get(file.name) if before else None
        large = file.size > SMALL or file.name in {*checkpoint.shards, *checkpoint.copies}
        if large and file.name not in stated:
            digest = record.sha256 if record and record.size == file.size else None
            found.append(AppliedFile(file.name, file.size, digest, digest, "place", unverified=digest is not None))
            continue
        digest = hashed(file, progress if large else None)
        hold_to(file, digest, pins)
        found.append(AppliedFile(file.name, file.size, digest, digest, "place"))
    return found


def _applied_already(root: Path, registry: Registry) -> Outcome:
    """What the same command says that found its work done: a killed run may have got that far."""
    checkpoint = open_as(root, registry.base)
    for name in sorted({s.file for s in undoing(registry, checkpoint)}):
        file = checkpoint.file(name)
        if hashed(file) != registry.files[name].sha256:
            raise CheckpointError("the registry says that this manifest was applied, but the file was changed since",
                                  file.path, "see swsurgery verify")  # fmt: skip
    with fsops.reported(root):
        fsops.sync_directory(root)
    files = tuple(
        AppliedFile(n, r.size, r.base_sha256, r.sha256, "place", r.unverified) for n, r in registry.files.items()
    )
    return Outcome(root, Applied(files), registry, ("it was applied already; nothing was written",), written=False)
