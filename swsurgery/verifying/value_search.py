"""Read the values of all tensors of a checkpoint once, and keep the figures of each tensor.

The bytes arrive in one of two ways. If a file is read for its digests, the reader feeds its bytes to a ShardScan. All
other shards are read in blocks by several threads. Neither the way, the block size nor the number of threads changes
the figures. Memory use is one block for each thread, and does not depend on the size of the checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.progress import Progress
from swsurgery.storage.files import BaseFile, File, fill
from swsurgery.storage.hashing import count_threads
from swsurgery.storage.shard import Shard, TensorInfo
from swsurgery.threads import Pool
from swsurgery.verifying.figures import SUM_WORD, Figures, count_values

VALUE_BLOCK = 2 << 20
"""Bytes that one thread reads and counts at a time: few enough to stay in the cache of a core."""


@dataclass(frozen=True)
class _Part:
    """The bytes from `begin` to `end` of the data of one tensor."""

    info: TensorInfo
    begin: int
    end: int


_Parts = Sequence[_Part]
_Apply = Callable[[Callable[[_Parts], list[Figures]], Iterable[_Parts]], Iterator[list[Figures]]]
"""Type of a function that applies a function to each item, and yields the results in order: `map` or `Pool.map`."""


class ShardScan:
    """The figures of the tensors of one shard. `figures` maps the name of a tensor to its figures.

    Feed the bytes of the file in order, in pieces of any size. A tensor without elements has no figures.
    """

    def __init__(self, shard: Shard):
        self.figures: dict[str, Figures] = {}
        self._shard = shard
        self._tensors = [info for info in shard.tensors.values() if info.size]
        self._next = 0  # number of the first tensor that is not completely counted
        self._tail = b""  # bytes that are counted together with the next piece

    @property
    def complete(self) -> bool:
        """True if all tensors of the shard are counted."""
        return self._next == len(self._tensors)

    def feed(self, offset: int, chunk: bytes | bytearray) -> None:
        """Count the next bytes of the file. `offset` must be the end of the previous piece."""
        start = offset - len(self._tail)
        data = bytes(self._tail) + chunk if self._tail else chunk
        end, self._tail = start + len(data), b""
        while self._next < len(self._tensors):
            info = self._tensors[self._next]
            begin, stop = (self._shard.data_start + at for at in info.data_offsets)
            if begin >= end:
                return
            first, last = max(begin, start), min(stop, end)
            if last < stop:
                last = first + (last - first) // SUM_WORD * SUM_WORD
            if last > first:
                part = memoryview(data)[first - start : last - start]
                self.add(info, count_values(info, first - begin, part))
            if stop > end:
                self._tail = bytes(data[last - start :])
                return
            self._next += 1

    def add(self, info: TensorInfo, figures: Figures) -> None:
        """Add the figures of a part of a tensor."""
        before = self.figures.get(info.name)
        self.figures[info.name] = before.merge(figures) if before else figures

    def finish(self) -> None:
        """Mark all tensors as counted, after `add` has got all their parts."""
        self._next = len(self._tensors)


class ValueSearch:
    """The figures of all tensors of a checkpoint. `scans` maps the name of each shard that was read to its scan."""

    def __init__(self, checkpoint: Checkpoint, block: int = VALUE_BLOCK, threads: int | None = None):
        self.checkpoint = checkpoint
        self.scans: dict[str, ShardScan] = {}
        self._block = block
        self._threads = threads

    def follow(self, name: str) -> ShardScan | None:
        """Begin the scan of a file that the caller reads and feeds to the scan; None if the file is no shard."""
        shard = self.checkpoint.shards.get(name)
        if shard is None:
            return None
        self.scans[name] = ShardScan(shard)
        return self.scans[name]

    def read_rest(self, progress: Progress) -> None:
        """Read all shards that the caller did not feed completely to a scan.

        Raises the errors of `File.open` and `fill`.
        """
        names = [n for n in self.checkpoint.shards if n not in self.scans or not self.scans[n].complete]
        if not names:
            return
        progress.start(sum(self.checkpoint.shards[n].size for n in names), "B", "examining values")
        try:
            local = all(self.checkpoint.get_file(name).is_here for name in names)
            threads = (self._threads or count_threads()) if local else 1
            with Pool(threads) as pool:
                apply = pool.map if threads > 1 else map  # without threads, Pool.map shows no progress until its end
                for name in names:
                    file, shard = self.checkpoint.get_file(name), self.checkpoint.shards[name]
                    self.scans[name] = _scan_shard(file, shard, self._block, apply, progress)
        finally:
            progress.close()

    def list_figures(self) -> Iterator[tuple[str, TensorInfo, Figures]]:
        """Yield (name of the shard, tensor, figures) of each tensor with elements, in the order of the files."""
        for name, scan in self.scans.items():
            tensors = self.checkpoint.shards[name].tensors
            yield from ((name, tensors[tensor], figures) for tensor, figures in scan.figures.items())


def _scan_shard(file: BaseFile, shard: Shard, block: int, apply: _Apply, progress: Progress) -> ShardScan:
    """Count the values of all tensors of a shard. `apply` calls a function for each block, perhaps in threads."""
    scan, buffers = ShardScan(shard), threading.local()

    def count_block(parts: _Parts) -> list[Figures]:
        if not hasattr(buffers, "view"):
            buffers.view = memoryview(bytearray(block))
        return list(_count_parts(opened, shard, parts, buffers.view))

    progress.advance(shard.data_start)
    blocks = list(_divide(shard, block))
    with file.source.open() as opened:
        for parts, counted in zip(blocks, apply(count_block, blocks), strict=True):
            for part, figures in zip(parts, counted, strict=True):
                scan.add(part.info, figures)
            progress.advance(sum(part.end - part.begin for part in parts))
    scan.finish()
    return scan


def _count_parts(opened: File, shard: Shard, parts: _Parts, buffer: memoryview) -> Iterator[Figures]:
    """Read adjacent parts of a file into the buffer at once, and yield the figures of each."""
    first = parts[0].info.data_offsets[0] + parts[0].begin
    view = buffer[: sum(part.end - part.begin for part in parts)]
    fill(opened, view, shard.data_start + first)
    at = 0
    for part in parts:
        size = part.end - part.begin
        yield count_values(part.info, part.begin, view[at : at + size])
        at += size


def _divide(shard: Shard, block: int) -> Iterator[list[_Part]]:
    """Yield adjacent parts of tensors, together at most `block` bytes, until all tensors are divided.

    A tensor is divided at multiples of `block` only. `block` is a multiple of SUM_WORD.
    """
    parts: list[_Part] = []
    size = 0
    for info in shard.tensors.values():
        for begin in range(0, info.size, block):
            part = _Part(info, begin, min(begin + block, info.size))
            if parts and size + part.end - part.begin > block:
                yield parts
                parts, size = [], 0
            parts.append(part)
            size += part.end - part.begin
    if parts:
        yield parts
