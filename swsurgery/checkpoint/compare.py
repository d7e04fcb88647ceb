"""Compare a checkpoint with its base byte by byte, and name the scalar to which each differing byte belongs.

The caller declares which bytes may differ. This module must not read the record.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.progress import Progress
from swsurgery.storage.files import BaseFile, fill
from swsurgery.storage.shard import Shard, TensorInfo

COMPARE_CHUNK = 1 << 20
"""Number of bytes read from a file at a time."""

MAX_DIFFERENCES = 10
"""Maximum number of differences listed for each file. A last line counts the further ones."""

MAX_DIFFERENT_BYTES = 4096
"""Number of differing bytes in one file at which the comparison stops collecting them, because the file is evidently
not an edited copy of the base's file."""


@dataclass(frozen=True)
class ByteDifference:
    """One difference between a checkpoint and its base that was not declared.

    `kind` is "base" if the sizes of the files differ, otherwise "undeclared-change". `tensor` is None if the differing
    byte is not in the data of a tensor. `index` is None in that case too, and if the elements are smaller than a byte.
    """

    kind: Literal["base", "undeclared-change"]
    message: str
    file: str
    tensor: str | None = None
    index: tuple[int, ...] | None = None


def find_undeclared_changes(
    checkpoint: Checkpoint, base: Checkpoint, names: list[str], declared: dict[str, set[int]], progress: Progress
) -> list[ByteDifference]:
    """Compare the files `names` of both checkpoints byte by byte and return the differences that were not declared.

    `declared` maps the name of a file to the offsets of the bytes that may differ. Raises CheckpointError.
    """
    findings = []
    progress.start(sum(checkpoint.get_file(n).size for n in names), "B", "comparing with the base")
    try:
        for name in names:
            ours, theirs = checkpoint.get_file(name), base.get_file(name)
            if ours.size != theirs.size:
                findings.append(ByteDifference("base", f"it has {ours.size} bytes, in the base {theirs.size}", name))
                continue
            places = _find_differences(ours, theirs, declared.get(name, set()), progress)
            findings += _name_bytes(name, places, checkpoint)
    finally:
        progress.close()
    return findings


def read_chunks(file: BaseFile, places: list[tuple[int, int]]) -> Iterator[tuple[int, bytearray]]:
    """Yield (offset, bytes) for successive chunks of the file, each of at most COMPARE_CHUNK bytes.

    `places` are (offset, size) in rising order, and no chunk ends inside a place. The next chunk may overwrite the
    memory of the one before it. Raises CheckpointError.
    """
    buffer, offset = bytearray(), 0
    with file.source.open() as opened:
        while offset < file.size:
            end = min(offset + COMPARE_CHUNK, file.size)
            before = bisect.bisect_left(places, (end,)) - 1
            if before >= 0 and offset < places[before][0] and end < sum(places[before]):
                end = places[before][0]
            if len(buffer) != end - offset:
                buffer = bytearray(end - offset)
            fill(opened, buffer, offset)
            yield offset, buffer
            offset = end


def _find_differences(file: BaseFile, other: BaseFile, declared: set[int], progress: Progress) -> list[int]:
    """Return the offsets of the bytes that differ between two files and are not in `declared`.

    Stops collecting at about MAX_DIFFERENT_BYTES offsets, but reads both files to the end.
    """
    places: list[int] = []
    for (offset, ours), (_, theirs) in zip(read_chunks(file, []), read_chunks(other, []), strict=True):
        if ours != theirs and len(places) < MAX_DIFFERENT_BYTES:
            differing = (offset + i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            places += [at for at in differing if at not in declared]
        progress.advance(len(ours))
    return places


def _find_tensor_at(shard: Shard, at: int) -> TensorInfo | None:
    """Return the tensor whose data contain the byte at offset `at` of the file; None if no tensor's data contain it.

    A tensor of blocks is returned as its bytes.
    """
    for info in shard.tensors.values():
        if info.data_offsets[0] <= at - shard.data_start < info.data_offsets[1]:
            return info.stored
    return None


def _name_bytes(name: str, places: list[int], checkpoint: Checkpoint) -> list[ByteDifference]:
    """Return one difference for each scalar of the file `name` that contains a byte at one of the offsets `places`.

    Bytes outside the tensors count as one difference, and so does a tensor with elements smaller than a byte.
    """
    shard = checkpoint.shards.get(name)
    found: dict[tuple[object, ...], ByteDifference] = {}
    for at in places:
        info = _find_tensor_at(shard, at) if shard else None
        if shard is None or info is None:
            found.setdefault((), ByteDifference("undeclared-change", f"byte {at} is not the base's", name))
        elif info.dtype.bits % 8:
            found.setdefault((info.name,), ByteDifference("undeclared-change", "it is not the base's", name, info.name))
        else:
            index = info.unflatten((at - shard.data_start - info.data_offsets[0]) // info.dtype.size)
            message = "it is not the base's, and no declared scalar"
            found.setdefault((info.name, index), ByteDifference("undeclared-change", message, name, info.name, index))
    findings = list(found.values())
    if len(findings) > MAX_DIFFERENCES:
        more = len(findings) - MAX_DIFFERENCES
        findings = [
            *findings[:MAX_DIFFERENCES],
            ByteDifference("undeclared-change", f"and at least {more} more of these", name),
        ]
    return findings
