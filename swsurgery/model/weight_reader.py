"""Read weights from the shards into memory, on several threads per device.

On a CPU, shards are read directly into a buffer. For CUDA, the bytes pass through small pieces of pinned main memory,
from which separate CUDA streams copy them to the device. Reading, copying and computing overlap: a buffer is requested
as soon as it is free, its bytes are read in the order of the requests, and no thread waits for the end of a layer.

`weight_plan.py` decides which stored bytes make up each parameter. This module moves the bytes, and must not depend on
what a layer computes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from swsurgery.model.slots import Part, Slot, compute_layout
from swsurgery.storage.files import File, fill
from swsurgery.threads import Pool

STREAM_PIECE = 32 << 20
"""Maximum number of bytes that one task reads, and size of a piece of pinned memory. Python needs about 0.1 ms for a
task, during which no other thread can run Python code."""

SPARE_PIECES = 4
"""Number of pieces of pinned memory that are copied to a device while each reading thread fills another one."""

MOST_READERS = 16
"""Maximum number of threads that read shards for one device. They read cached files faster than a device receives
copies."""

SWITCH_SECONDS = 0.0005
"""Time in seconds for which a thread may run Python code while another one waits, during streaming to CUDA devices.
Python's own value is 5 ms, in which a device receives 200 MB."""

_new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
_new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event
"""The constructors of torch's CUDA streams and events, with the annotations that torch lacks."""


def count_readers(devices: int = 1) -> int:
    """Return the number of reading threads for each of `devices` devices, which share this process's processors."""
    return max(2, min(MOST_READERS, len(os.sched_getaffinity(0)) // devices))


def compute_pinned_size(threads: int) -> int:
    """Return the size in bytes of the pinned memory that `threads` reading threads need."""
    return (threads + SPARE_PIECES) * STREAM_PIECE


def allocate_pinned_pieces(threads: int) -> list[Tensor]:
    """Allocate the pieces of pinned memory that `threads` reading threads need, of STREAM_PIECE bytes each.

    CUDA can copy from pinned memory while the program continues.
    """
    return [torch.empty(STREAM_PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(threads + SPARE_PIECES)]


class Job(NamedTuple):
    """What a loader reads into one buffer: the slots, and the device on which they are needed."""

    slots: tuple[Slot, ...]
    device: torch.device

    @property
    def size(self) -> int:
        """Size of the buffer that the slots need, in bytes."""
        return compute_layout(self.slots)[1]


class Buffer:
    """Memory on one device, for the slots of one job at a time.

    For CUDA, `stream` copies bytes into the memory, and the event `used` occurs when the layer has been computed.
    """

    def __init__(self, size: int, device: torch.device):
        self.device = device
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.stream = _new_stream(device) if device.type == "cuda" else None
        self.used = _new_event() if device.type == "cuda" else None
        if self.used is not None:
            self.used.record(torch.cuda.current_stream(device))


class Filling:
    """A request to read the slots of a job into a buffer. `wait` returns when later work may use the buffer."""

    def __init__(self, job: Job, buffer: Buffer):
        self.job, self.buffer = job, buffer
        begins, _ = compute_layout(job.slots)
        self.tasks = [task for slot, begin in zip(job.slots, begins, strict=True) for task in _split_tasks(slot, begin)]
        self._left = len(self.tasks)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._copied = None if buffer.stream is None else _new_event()
        if not self.tasks:
            self._finish()

    def wait(self) -> Buffer:
        """Return the buffer once its bytes are read. Later work on the device's current stream waits for the copies.

        Raises CheckpointError if a shard cannot be read.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        if self._copied is not None:
            torch.cuda.current_stream(self.buffer.device).wait_event(self._copied)
        return self.buffer

    def run(self, task: _Task, move: Callable[[_Task, Buffer], None]) -> None:
        """Make `move` read one task, unless another task has failed, and record how it ended."""
        try:
            if self._error is None:
                move(task, self.buffer)
        except BaseException as error:  # noqa: BLE001 (`wait` raises it again)
            self._error = error
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._finish()

    def cancel(self) -> None:
        """Make the tasks that have not begun return at once."""
        self._error = self._error or _Cancelled()

    def _finish(self) -> None:
        if self._copied is not None:
            self._copied.record(self.buffer.stream)
        self._done.set()


class _Cancelled(Exception):
    """The error of a filling that is no longer needed."""


class WeightReader:
    """Reads shards into memory on several threads, which each device has for itself."""

    def __init__(self, devices: Sequence[torch.device]):
        self._files = _Files()
        self._switch: float | None = None  # the former value, if this reader changed it
        if any(device.type == "cuda" for device in devices) and sys.getswitchinterval() > SWITCH_SECONDS:
            self._switch = sys.getswitchinterval()
            sys.setswitchinterval(SWITCH_SECONDS)
        distinct = list(dict.fromkeys(devices))
        self._lanes = {device: _Lane(device, self._files, count_readers(len(distinct))) for device in distinct}

    def request(self, job: Job, buffer: Buffer) -> Filling:
        """Begin to read a job into a buffer. The copies wait until the buffer's former content has been used."""
        return self._lanes[job.device].request(Filling(job, buffer))

    def read(self, slots: Sequence[Slot], device: torch.device) -> Tensor:
        """Read slots into new memory on `device`, and return it. Raises CheckpointError."""
        job = Job(tuple(slots), device)
        return self.request(job, Buffer(job.size, device)).wait().memory

    def close(self) -> None:
        """Wait until the copies are complete, end the threads and close the shards."""
        for lane in self._lanes.values():
            lane.close()
        if self._switch is not None:
            sys.setswitchinterval(self._switch)
        self._files.close()


class Loader:
    """Reads jobs in order, ahead of the job that is used, into two buffers per device."""

    def __init__(self, jobs: Sequence[Job], reader: WeightReader):
        self._reader = reader
        self._begun: dict[int, Filling] = {}
        self._taken = 0
        self._waiting: dict[torch.device, list[tuple[int, Job]]] = {}
        for number, job in enumerate(jobs):
            self._waiting.setdefault(job.device, []).append((number, job))
        for device, mine in self._waiting.items():
            largest = max(job.size for _, job in mine)
            mine.reverse()
            for _ in range(min(2, len(mine))):
                self._request(Buffer(largest, device))

    def take(self) -> Buffer:
        """Return the buffer of the next job. Raises the error of reading it."""
        filling = self._begun.pop(self._taken)
        self._taken += 1
        return filling.wait()

    def give(self, buffer: Buffer) -> None:
        """Release a buffer that was taken, so that another job can be read into it."""
        if buffer.used is not None:
            buffer.used.record(torch.cuda.current_stream(buffer.device))
        self._request(buffer)

    def close(self) -> None:
        """Stop reading, and wait until no thread uses a buffer."""
        for filling in self._begun.values():
            filling.cancel()
        for filling in self._begun.values():
            with contextlib.suppress(Exception):
                filling.wait()
            if filling.buffer.stream is not None:
                filling.buffer.stream.synchronize()  # no copy may arrive in memory that is used for something else
        self._begun.clear()

    def _request(self, buffer: Buffer) -> None:
        """Request the next job of the buffer's device, if there is one."""
        if waiting := self._waiting[buffer.device]:
            number, job = waiting.pop()
            self._begun[number] = self._reader.request(job, buffer)


class _Lane:
    """The threads that read for one device, and its pinned memory."""

    def __init__(self, device: torch.device, files: _Files, threads: int):
        self._files, self._threads = files, Pool(threads)
        self._pinned: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        self._streams: set[torch.cuda.Stream] = set()
        for piece in allocate_pinned_pieces(threads) if device.type == "cuda" else ():
            self._pinned.put((piece, _new_event(blocking=True)))

    def request(self, filling: Filling) -> Filling:
        """Let the threads read a filling, after the fillings that were requested before it."""
        buffer = filling.buffer
        if buffer.stream is not None:
            assert buffer.used is not None
            buffer.stream.wait_event(buffer.used)
            self._streams.add(buffer.stream)
        for task in filling.tasks:
            self._threads.submit(filling.run, task, self._move)
        return filling

    def close(self) -> None:
        """End the threads, and wait until the copies are complete."""
        self._threads.shutdown()
        for stream in self._streams:
            stream.synchronize()

    def _move(self, task: _Task, buffer: Buffer) -> None:
        """Read a task into a buffer; for CUDA, read it into pinned memory and start its copy to the buffer."""
        if buffer.stream is None:
            task.read(self._files, buffer.memory)
            return
        pinned, copied = self._pinned.get()
        try:
            copied.synchronize()
            size = task.size // task.part.dtype.itemsize * task.dtype.itemsize
            host = pinned if size <= STREAM_PIECE else torch.empty(size, dtype=torch.uint8)
            _Task(task.part, task.offset, task.size, 0, task.dtype).read(self._files, host)
            with torch.cuda.stream(buffer.stream):
                buffer.memory[task.begin : task.begin + size].copy_(host[:size], non_blocking=host is pinned)
                copied.record(buffer.stream)
        finally:
            self._pinned.put((pinned, copied))


@dataclass(frozen=True)
class _Task:
    """One read of at most STREAM_PIECE bytes from a shard into a buffer.

    The `size` bytes at `offset` of the part's shard are written to the buffer from byte `begin` on. `dtype` is the
    parameter's dtype. If the part is stored in another dtype, its values are converted.
    """

    part: Part
    offset: int
    size: int
    begin: int
    dtype: torch.dtype

    def read(self, files: _Files, memory: Tensor) -> None:
        """Read the bytes into `memory`, a tensor of bytes in main memory. Raises CheckpointError."""
        if self.part.dtype == self.dtype:
            files.read(self.part.file, self.offset, memory[self.begin : self.begin + self.size])
            return
        raw = torch.empty(self.size, dtype=torch.uint8)
        files.read(self.part.file, self.offset, raw)
        values = raw.view(self.part.dtype).to(self.dtype).view(torch.uint8)
        memory[self.begin : self.begin + len(values)] = values


def _split_tasks(slot: Slot, begin: int) -> Iterator[_Task]:
    """Split the parts of a slot, which begins at `begin` in a buffer, into tasks of at most STREAM_PIECE bytes."""
    for part in slot.parts:
        at, end = part.offset, part.offset + part.size
        while at < end:
            size = min(STREAM_PIECE, end - at)
            element = part.element + (at - part.offset) // part.dtype.itemsize
            yield _Task(part, at, size, begin + element * slot.dtype.itemsize, slot.dtype)
            at += size


class _Files:
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
