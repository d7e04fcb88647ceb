"""Read matrices from shards block by block, with several threads, for the scan by weights.

This module reads bytes and computes nothing from them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ArchitectureError
from swsurgery.storage.dtypes import Dtype
from swsurgery.storage.files import File, fill
from swsurgery.threads import Pool

T = TypeVar("T")
R = TypeVar("R")

SCORE_CHUNK = 4 << 20
"""Size in bytes of the chunks in which a matrix is read (one row if a row is longer)."""

SCORE_BLOCK = 256 << 10
"""Number of elements that are converted to float32 at a time. Blocks of an eighth of this size would fit into the
second-level cache. But with two threads they would take twice as long, because each numpy call releases the
interpreter's lock."""

READ_THREADS = 2
"""Default number of threads: one reads while the other computes. A third thread would wait for the interpreter's
lock."""


@dataclass(frozen=True)
class Matrix:
    """A matrix in a shard: a tensor, or one expert of a stacked tensor. Row-major from byte `offset` of the file."""

    name: str
    file: File
    offset: int
    dtype: Dtype
    rows: int
    cols: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, tensor: str, expert: int | None = None) -> Matrix:
        """Locate a stored tensor of rank 2, or matrix number `expert` of a tensor of rank 3.

        Raises ArchitectureError if the tensor has another rank or a dtype that is not a float, or if its elements are
        not plain weights (they are codes, or another tensor scales them).
        """
        shard, info = checkpoint.shards[checkpoint.weight_map[tensor]], checkpoint.get_info(tensor)
        if len(info.shape) != (2 if expert is None else 3):
            raise ArchitectureError(f"a matrix of an MLP cannot have the shape {list(info.shape)}", tensor)
        if info.dtype.kind != "float":
            raise ArchitectureError(f"{info.dtype.name} numbers are not weights", tensor, "scan an unquantised copy")
        if why := checkpoint.quantisation.explain_refusal(tensor):
            raise ArchitectureError(why, tensor, "scan an unquantised copy, or by activations")
        rows, cols = info.shape[-2:]
        start = shard.data_start + info.data_offsets[0] + (expert or 0) * rows * cols * info.dtype.size
        return cls(tensor, shard.file, start, info.dtype, rows, cols)

    @property
    def row_bytes(self) -> int:
        return self.cols * self.dtype.size

    @property
    def size(self) -> int:
        """The size of the matrix in bytes."""
        return self.rows * self.row_bytes

    def split_rows(self) -> Iterator[tuple[int, int]]:
        """Yield the range of rows [first, end) of each chunk of `SCORE_CHUNK` bytes."""
        return split_range(self.rows, count_chunk_rows(self))


class Workspace:
    """The reusable buffers of one thread: two for the bytes of chunks, and two for blocks of float32 values."""

    def __init__(self) -> None:
        self.raw = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self.blocks = [np.empty(0, np.float32)] * 2

    def take_block(self, which: int, rows: int, cols: int) -> NDArray[np.float32]:
        if self.blocks[which].size < rows * cols:
            self.blocks[which] = np.empty(max(rows * cols, SCORE_BLOCK), np.float32)
        return self.blocks[which][: rows * cols].reshape(rows, cols)

    def take_bytes(self, which: int, size: int) -> NDArray[np.uint8]:
        if self.raw[which].size < size:
            self.raw[which] = np.empty(max(size, SCORE_CHUNK), np.uint8)
        return self.raw[which][:size]


class BlockReader:
    """Opens shards, reads chunks of their matrices and computes on the chunks, with several threads.

    A context manager: it starts the threads on entry, and stops them and closes the shards on exit. While one thread
    waits for a chunk from the disk, another computes.
    """

    def __init__(self, threads: int):
        self._threads = threads
        self._files: dict[File, File] = {}
        self._spare: SimpleQueue[Workspace] = SimpleQueue()
        self._stack = ExitStack()

    def __enter__(self) -> BlockReader:
        self._pool = Pool(self._threads, "swsurgery-scan")
        for _ in range(self._threads):
            self._spare.put(Workspace())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel=True)  # the threads must end before the files are closed
        self._stack.__exit__(kind, error, trace)

    def open(self, matrices: Iterable[Matrix]) -> None:
        """Open the shards that contain `matrices`, except open ones. Raises ShardError if a shard cannot be opened."""
        for matrix in matrices:
            if matrix.file not in self._files:
                self._files[matrix.file] = self._stack.enter_context(matrix.file.open())

    def read_rows(
        self, space: Workspace, which: int, matrix: Matrix, first: int, end: int
    ) -> NDArray[np.unsignedinteger]:
        """Read rows [first, end) of a matrix into buffer number `which` of `space`.

        Returns the stored bit patterns, (end - first, cols), as unsigned integers of the dtype's width. They are valid
        until the buffer is used again. Raises ShardError.
        """
        raw = space.take_bytes(which, (end - first) * matrix.row_bytes)
        fill(self._files[matrix.file], raw.data, matrix.offset + first * matrix.row_bytes)
        return raw.view(f"<u{matrix.dtype.size}").reshape(end - first, matrix.cols)

    def map(self, function: Callable[[Workspace, T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Run `function` on the threads, and yield (item, function(workspace, item)) in the order of the items.

        At most 2 * threads + 1 items are in progress at a time, so memory use is bounded.
        """
        pending: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            pending.append((item, self._pool.submit(self._run, function, item)))
            if len(pending) > 2 * self._threads:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()

    def _run(self, function: Callable[[Workspace, T], R], item: T) -> R:
        space = self._spare.get()
        try:
            return function(space, item)
        finally:
            self._spare.put(space)


def count_chunk_rows(matrix: Matrix) -> int:
    """Compute the number of rows of one chunk, which is at least 1."""
    return max(1, SCORE_CHUNK // matrix.row_bytes)


def split_range(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges [first, end) of at most `step` numbers that cover [0, total)."""
    for first in range(0, total, step):
        yield first, min(first + step, total)
