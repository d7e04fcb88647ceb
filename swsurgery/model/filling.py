"""Fill buffers with stored weights. A request (`Filling`) is split into tasks, each of which reads bytes of one shard.

Reading may begin before the buffer of a request is free. Until then, the bytes wait in pieces of pinned memory.
`lane.py` has the threads and the pieces.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from swsurgery.model.slots import Part, Slot, compute_layout

LEAST_PIECE, MOST_PIECE = 4 << 20, 48 << 20
"""Minimum and maximum number of bytes that one task reads. A piece of pinned memory has MOST_PIECE bytes. Each
task interrupts the thread that computes several times, so few large tasks are better than many small ones."""

LEAST_TASKS = 8
"""Number of tasks into which a job is split if LEAST_PIECE and MOST_PIECE allow it."""

PAGE = 4096
"""The size of a task is a multiple of this many bytes, except the last task of a run."""

new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event
"""The constructors of torch's CUDA streams and events, with the annotations that torch lacks."""


class Job(NamedTuple):
    """The slots that are read into one buffer, and the device that needs them."""

    slots: tuple[Slot, ...]
    device: torch.device

    @property
    def size(self) -> int:
        """Size of the buffer that the slots need, in bytes."""
        return compute_layout(self.slots)[1]


class Buffer:
    """Memory on one device, for the slots of one job at a time.

    On CUDA, `stream` copies bytes into the memory, and the event `used` occurs when the layer has been computed.
    """

    def __init__(self, size: int, device: torch.device):
        self.device = device
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.stream = new_stream(device) if device.type == "cuda" else None
        self.used = new_event() if device.type == "cuda" else None
        self.mark_used()

    def mark_used(self) -> None:
        """Make later copies into the memory wait for the work that is queued in the device's current stream."""
        if self.used is not None:
            self.used.record(torch.cuda.current_stream(self.device))


@dataclass(frozen=True)
class Task:
    """One read from a shard, for the bytes of a buffer from `begin` on.

    The `size` bytes lie at `offset` of the part's shard. `dtype` is the parameter's dtype. If the part is stored in
    another dtype, its values are converted.
    """

    part: Part
    offset: int
    size: int
    begin: int
    dtype: torch.dtype

    def is_followed_by(self, other: Task) -> bool:
        """Return True if this read and `other` can be one read: their bytes adjoin, and no value is converted."""
        same = self.part.file == other.part.file and self.part.dtype == self.dtype == other.dtype == other.part.dtype
        return same and (self.offset + self.size, self.begin + self.size) == (other.offset, other.begin)

    @property
    def length(self) -> int:
        """Number of bytes in the buffer."""
        return self.size // self.part.dtype.itemsize * self.dtype.itemsize


Deliver = Callable[[Buffer | None], None]
"""Moves the bytes that a task has read into a buffer, or drops them if the buffer is None."""


class Filling:
    """A request to read the slots of a job into a buffer, which `assign` may name after reading has begun."""

    def __init__(self, job: Job):
        self.job = job
        self.buffer: Buffer | None = None
        self.tasks = list(_split(_list_runs(job.slots), job.size))
        self._left = len(self.tasks)
        self._read: list[Deliver] = []
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._copied: torch.cuda.Event | None = None

    def assign(self, buffer: Buffer) -> None:
        """Name the buffer. Copies into it wait until its previous contents have been used."""
        if buffer.stream is not None and buffer.used is not None:
            buffer.stream.wait_event(buffer.used)
            self._copied = new_event()
        with self._lock:
            self.buffer = buffer
            read, self._read = self._read, []
        for deliver in read:
            self._deliver(deliver)
        if not self.tasks:
            self._finish()

    def run(self, read: Callable[[], None], deliver: Deliver) -> None:
        """Run one task: read its bytes unless another task has failed, and deliver them once the buffer is known."""
        try:
            if self._error is None:
                read()
        except BaseException as error:  # noqa: BLE001 (`wait` raises it again)
            self._error = error
        with self._lock:
            if self.buffer is None and self._error is None:
                self._read.append(deliver)
                return
        self._deliver(deliver)

    def wait(self) -> Buffer:
        """Return the buffer once its bytes are read. Later work on the device's current stream waits for the copies.

        Raises CheckpointError if a shard cannot be read.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        assert self.buffer is not None
        if self._copied is not None:
            torch.cuda.current_stream(self.buffer.device).wait_event(self._copied)
        return self.buffer

    def cancel(self) -> None:
        """Skip the tasks that have not begun, and drop the bytes that wait for a buffer."""
        with self._lock:
            self._error = self._error or _Cancelled()
            read, self._read = self._read, []
        for deliver in read:
            self._deliver(deliver)

    def settle(self) -> None:
        """Wait until no thread uses the buffer of a request that was cancelled."""
        if self.buffer is None:
            return
        self._done.wait()
        if self.buffer.stream is not None:
            self.buffer.stream.synchronize()  # no copy may arrive in memory that is used for something else

    def _deliver(self, deliver: Deliver) -> None:
        try:
            deliver(self.buffer if self._error is None else None)
        except BaseException as error:  # noqa: BLE001 (`wait` raises it again)
            self._error = error
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._finish()

    def _finish(self) -> None:
        if self._copied is not None and self.buffer is not None:
            self._copied.record(self.buffer.stream)
        self._done.set()


class _Cancelled(Exception):
    """The error of a filling that is no longer needed."""


def _list_runs(slots: Sequence[Slot]) -> list[Task]:
    """List the reads of all parts of the slots. Parts that adjoin in both shard and buffer are one read."""
    runs: list[Task] = []
    for slot, begin in zip(slots, compute_layout(slots)[0], strict=True):
        for part in slot.parts:
            run = Task(part, part.offset, part.size, begin + part.element * slot.dtype.itemsize, slot.dtype)
            if runs and runs[-1].is_followed_by(run):
                runs[-1] = replace(runs[-1], size=runs[-1].size + run.size)
            else:
                runs.append(run)
    return runs


def _split(runs: Sequence[Task], total: int) -> Iterator[Task]:
    """Split reads into tasks of equal sizes of at most MOST_PIECE bytes; `total` is the size of the buffer in bytes."""
    most = max(LEAST_PIECE, min(MOST_PIECE, total // LEAST_TASKS))
    for run in runs:
        count = -(-run.size // most)
        step = max(1, -(-run.size // max(1, count) // PAGE)) * PAGE
        for at in range(0, run.size, step):
            begin = run.begin + at // run.part.dtype.itemsize * run.dtype.itemsize
            yield replace(run, offset=run.offset + at, size=min(step, run.size - at), begin=begin)
