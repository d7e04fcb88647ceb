"""Hold what belongs together."""

from __future__ import annotations

from pathlib import Path

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import held, open_patched
from swsurgery.checkpoint.record import Registry
from swsurgery.editing.apply import _refuse_inside, _write_own_files
from swsurgery.editing.copy import Link, Source, write_checkpoint
from swsurgery.errors import (
    CheckpointError,
    NumberError,
)
from swsurgery.progress import Progress, Silent
from swsurgery.storage import staging
from swsurgery.storage.arguments import require_choice
from swsurgery.storage.names import OWN_FILES
from swsurgery.storage.splice import Splice


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
