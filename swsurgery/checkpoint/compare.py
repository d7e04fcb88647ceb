"""Two checkpoints byte by byte, and every byte that differs as the scalar it belongs to. Knows no registry."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.progress import Progress
from swsurgery.storage.files import BaseFile, opened, read_exactly
from swsurgery.storage.shard import Shard, TensorInfo

CHUNK = 1 << 20
MAX_NAMED = 10
MAX_BYTES = 4096
"""Differing bytes that are kept of one file; beyond that it is another file and no list would help."""


@dataclass(frozen=True)
class Difference:
    """One place in which a checkpoint is not its base. `kind` is "base" if a whole file is another one."""

    kind: Literal["base", "undeclared-change"]
    message: str
    file: str
    tensor: str | None = None
    index: tuple[int, ...] | None = None


def undeclared_changes(
    checkpoint: Checkpoint, base: Checkpoint, names: list[str], declared: dict[str, set[int]], progress: Progress
) -> list[Difference]:
    """Compare the named files of both byte by byte. `declared` maps a file to the offsets that may differ."""
    findings = []
    progress.start(sum(checkpoint.file(n).size for n in names), "B", "comparing with the base")
    try:
        for name in names:
            ours, theirs = checkpoint.file(name), base.file(name)
            if ours.size != theirs.size:
                findings.append(Difference("base", f"it has {ours.size} bytes, in the base {theirs.size}", name))
                continue
            places = _differences(ours, theirs, declared.get(name, set()), progress)
            findings += _name_bytes(name, places, checkpoint)
    finally:
        progress.close()
    return findings


def chunks(file: BaseFile, places: list[tuple[int, int]]) -> Iterator[tuple[int, bytearray]]:
    """(offset, bytes) over the file; none of the (offset, size) places, in rising order, lies across two chunks."""
    with opened(file.path) as fd:
        offset = 0
        while offset < file.size:
            end = min(offset + CHUNK, file.size)
            before = bisect.bisect_left(places, (end,)) - 1
            if before >= 0 and offset < places[before][0] and end < sum(places[before]):
                end = places[before][0]
            yield offset, bytearray(read_exactly(fd, end - offset, offset, file.path))
            offset = end


def _differences(file: BaseFile, other: BaseFile, declared: set[int], progress: Progress) -> list[int]:
    """Offsets of the bytes that differ and may not (about MAX_BYTES at most)."""
    places: list[int] = []
    for (offset, ours), (_, theirs) in zip(chunks(file, []), chunks(other, []), strict=True):
        if ours != theirs and len(places) < MAX_BYTES:
            differing = (offset + i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            places += [at for at in differing if at not in declared]
        progress.advance(len(ours))
    return places


def _tensor_at(shard: Shard, at: int) -> TensorInfo | None:
    """Return the tensor whose data contain byte `at` of the file; None for a byte of the header."""
    for info in shard.tensors.values():
        if info.data_offsets[0] <= at - shard.data_start < info.data_offsets[1]:
            return info
    return None


def _name_bytes(name: str, places: list[int], checkpoint: Checkpoint) -> list[Difference]:
    """Undeclared bytes as the scalars they belong to."""
    shard = checkpoint.shards.get(name)
    found: dict[tuple[object, ...], Difference] = {}
    for at in places:
        info = _tensor_at(shard, at) if shard else None
        if shard is None or info is None:
            found.setdefault((), Difference("undeclared-change", f"byte {at} is not the base's", name))
        elif info.dtype.bits % 8:
            found.setdefault((info.name,), Difference("undeclared-change", "it is not the base's", name, info.name))
        else:
            index = info.index((at - shard.data_start - info.data_offsets[0]) // info.dtype.size)
            message = "it is not the base's, and no declared scalar"
            found.setdefault((info.name, index), Difference("undeclared-change", message, name, info.name, index))
    findings = list(found.values())
    if len(findings) > MAX_NAMED:
        more = len(findings) - MAX_NAMED
        findings = [*findings[:MAX_NAMED], Difference("undeclared-change", f"and at least {more} more of these", name)]
    return findings
