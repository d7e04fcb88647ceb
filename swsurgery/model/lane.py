"""Read shards for one device, on threads that serve only this device.

On a CPU, shards are read directly into buffers. For CUDA, the bytes pass through pieces of pinned main memory, from
which the CUDA stream of each buffer copies them to the device. The threads read ahead: while pieces are free, they read
for buffers that are still in use.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from swsurgery.model import filling
from swsurgery.model.filling import Buffer, Filling, Job, Task
from swsurgery.storage.files import File, fill
from swsurgery.threads import Pool

SPARE_PIECES = 4
"""Number of pieces of pinned memory in addition to one for each thread. They are being copied, or wait to be copied."""

MOST_READERS = 16
"""Maximum number of threads that read shards for one device."""


def count_readers(devices: int = 1) -> int:
    """Return the number of reading threads for each of `devices` devices, which share this process's processors."""
    return max(2, min(MOST_READERS, len(os.sched_getaffinity(0)) // devices))


def compute_pinned_size(threads: int) -> int:
    """Return the size in bytes of the pinned memory that `threads` reading threads need."""
    return (threads + SPARE_PIECES) * filling.MOST_PIECE


def allocate_pinned_pieces(threads: int) -> list[Tensor]:
    """Allocate the pieces of pinned memory that `threads` reading threads need, of MOST_PIECE bytes each.

    CUDA can copy from pinned memory while the program continues. The pieces are parts of one allocation, because torch
    rounds the size of each up to a power of two.
    """
    whole = torch.empty(compute_pinned_size(threads), dtype=torch.uint8, pin_memory=True)
    return list(whole.view(-1, filling.MOST_PIECE).unbind())


class Lane:
    """The threads that read for one device, and the pieces of memory through which the bytes pass.

    Without `pieces`, the threads read into buffers directly, and not ahead.
    """

    def __init__(self, files: Files, threads: int, pieces: Sequence[HostPiece] = ()):
        self._files, self._pool = files, Pool(threads)
        self._tasks: queue.SimpleQueue[tuple[Filling, Task] | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[HostPiece] = queue.SimpleQueue()
        self._order = threading.Lock()
        self._streams: set[torch.cuda.Stream] = set()
        self._ahead = bool(pieces) and self._pool.started
        for piece in pieces or [HostPiece() for _ in range(max(1, threads))]:
            self._free.put(piece)
        for _ in range(threads if self._pool.started else 0):
            self._pool.submit(self._work)

    def prepare(self, job: Job) -> Filling:
        """Request a job whose buffer is not known yet. It is read after the jobs that were requested before."""
        request = Filling(job)
        if self._ahead:
            self._queue(request)
        return request

    def assign(self, request: Filling, buffer: Buffer) -> None:
        """Name the buffer of a request."""
        if buffer.stream is not None:
            self._streams.add(buffer.stream)
        request.assign(buffer)
        if not self._ahead:
            self._queue(request)

    def close(self) -> None:
        """End the threads, and wait until the copies are complete."""
        self._tasks.put(None)
        self._pool.shutdown()
        for stream in self._streams:
            stream.synchronize()

    def _queue(self, request: Filling) -> None:
        for task in request.tasks:
            self._tasks.put((request, task))
        if not self._pool.started:
            self._tasks.put(None)
            self._work()

    def _work(self) -> None:
        """Run the tasks in the queue, up to the entry None, which stays in the queue for the other threads."""
        while True:
            # Without the lock, a later task, whose buffer is in use, could take the last piece from an earlier task.
            with self._order:
                piece = self._free.get()
                entry = self._tasks.get()
                if entry is None:
                    self._free.put(piece)
                    if self._pool.started:
                        self._tasks.put(None)
                    return
            self._serve(piece, *entry)
            del entry  # otherwise the memory of its buffer would stay in use until the next task

    def _serve(self, piece: HostPiece, request: Filling, task: Task) -> None:
        """Read a task into a piece, and deliver it to its buffer as soon as the buffer is known."""

        def deliver(buffer: Buffer | None) -> None:
            try:
                if buffer is not None:
                    piece.deliver(task, buffer)
            finally:
                self._free.put(piece)

        request.run(lambda: piece.read(task, self._files, request.buffer), deliver)


class HostPiece:
    """Pinned memory for the bytes of one task at a time; no memory if tasks read into buffers directly."""

    def __init__(self, memory: Tensor | None = None, copied: torch.cuda.Event | None = None):
        self._memory, self._copied = memory, copied
        self._host = memory
        self._fits = True

    def read(self, task: Task, files: Files, buffer: Buffer | None) -> None:
        """Read a task, into the buffer if this piece has no memory. Raises CheckpointError."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._memory is None:
            assert buffer is not None
            _read(task, files, buffer.memory[task.begin : task.begin + task.length])
            return
        self._fits = task.length <= len(self._memory)
        self._host = self._memory[: task.length] if self._fits else torch.empty(task.length, dtype=torch.uint8)
        _read(task, files, self._host)

    def deliver(self, task: Task, buffer: Buffer) -> None:
        """Start copying the bytes of the task to their place in a buffer."""
        if self._memory is None or self._host is None:
            return
        with torch.cuda.stream(buffer.stream) if buffer.stream is not None else contextlib.nullcontext():
            there = buffer.memory[task.begin : task.begin + task.length]
            there.copy_(self._host, non_blocking=self._fits)
            if self._copied is not None:
                self._copied.record(buffer.stream)


def _read(task: Task, files: Files, memory: Tensor) -> None:
    """Read the bytes of a task into `memory`, a vector of bytes in main memory. Raises CheckpointError."""
    if task.part.dtype == task.dtype:
        files.read(task.part.file, task.offset, memory)
        return
    raw = torch.empty(task.size, dtype=torch.uint8)
    files.read(task.part.file, task.offset, raw)
    memory.copy_(raw.view(task.part.dtype).to(task.dtype).view(torch.uint8))


class Files:
    """The open shards. Each shard is opened when it is first read. Several threads may read at the same time."""

    def __init__(self) -> None:
        self._open: dict[File, File] = {}
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all shards. Raises CheckpointError if a shard was changed after its directory was listed."""
        self._open.clear()
        self._stack.close()

    def read(self, file: File, offset: int, memory: Tensor) -> None:
        """Fill `memory`, a uint8 vector in main memory, with the bytes of `file` from `offset` on.

        Raises CheckpointError.
        """
        with self._lock:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(file.open())
            opened = self._open[file]
        fill(opened, memory.numpy().data, offset)
