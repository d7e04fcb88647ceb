"""Show the base of a patched checkpoint as a checkpoint whose shards are undone while they are read."""

from __future__ import annotations

from dataclasses import replace

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Record
from swsurgery.editing.overlay import PatchedFile
from swsurgery.editing.undo import build_undo
from swsurgery.errors import CheckpointError
from swsurgery.storage.hashing import hash_file
from swsurgery.storage.numeric import load_numpy
from swsurgery.storage.shard import open_shard
from swsurgery.storage.splice import group_by_file

load_numpy()

from swsurgery.rewriting.segments import RegionChange, list_segments  # noqa: E402
from swsurgery.rewriting.stored import RegionPlace  # noqa: E402
from swsurgery.rewriting.undo import make_undo_function  # noqa: E402


def overlay_undone(patched: Checkpoint, record: Record) -> Checkpoint:
    """Return `patched` with shards that contain the bytes before the edits of its record.

    Raises CheckpointError if the undo file is missing, was modified or does not fit, or if the old bytes of a changed
    region were not stored.
    """
    changes = _list_changes(patched, record) if record.changes else {}
    splices = group_by_file(build_undo(record, patched))
    shards = dict(patched.shards)
    for name in {*splices, *changes}:
        segments = list_segments(changes[name]) if name in changes else []
        file = PatchedFile(shards[name].file, splices.get(name, ()), segments)
        shards[name] = replace(shards[name], file=file)
    return replace(patched, shards=shards)


def _list_changes(patched: Checkpoint, record: Record) -> dict[str, list[RegionChange]]:
    """Return the changes that put old bytes back, for each file."""
    name = record.undo_name
    if name is None or record.undo is None or any(change.undo is None for change in record.changes):
        raise CheckpointError("the old bytes were not stored", patched.root, "give the base: --base")
    file = next((f for f in patched.files if f.name == name), None)
    if file is None:
        raise CheckpointError("the undo file is missing", f"{patched.root}/{name}", "give the base: --base")
    if hash_file(file.source) != record.undo.sha256:
        raise CheckpointError("the undo file was modified", file.source, "give the base: --base")
    undo = open_shard(file.source)
    changes: dict[str, list[RegionChange]] = {}
    for number, change in enumerate(record.changes):
        shard = patched.shards[change.file]
        info = shard.tensors[change.tensor]
        start = shard.data_start + info.data_offsets[0]
        function = make_undo_function(undo, str(change.undo), RegionPlace(info, start, change.region))
        undone = RegionChange(str(change.undo), "restore", info, start, change.region, function, order=(number, 0))
        changes.setdefault(change.file, []).append(undone)
    return changes
