"""Read the weights of one layer at a time from the shards into reused buffers.

Two layers are in memory at a time, however large the model is: while one layer is computed, the next one is read. On a
CPU, shards are read directly into a buffer, and the parameters are views of it. For CUDA, the bytes pass through small
pieces of pinned main memory, from which a separate CUDA stream copies them to the device. Several devices take the
layers in turn.

`weight_plan.py` decides which stored bytes make up each parameter. This module moves the bytes, and must not depend on
what a layer computes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from swsurgery.model.weight_plan import Part, Slot, WeightPlan, compute_layout
from swsurgery.storage.files import File, fill
from swsurgery.threads import Pool

STREAM_PIECE = 8 << 20
"""Maximum number of bytes that one task reads, and size of a piece of pinned memory."""

READERS = max(2, min(8, os.cpu_count() or 2))
"""Number of threads that read shards."""


_new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
_new_event: Callable[[], torch.cuda.Event] = torch.cuda.Event
"""The constructors of torch's CUDA streams and events, with the annotations that torch lacks."""


class StreamedWeights:
    """A source of weights that reads the layers of a model in order, one layer ahead.

    `devices` take the layers in turn; weights outside the layers are on the first device. Methods raise CheckpointError
    if a shard cannot be read, and torch.OutOfMemoryError if two layers do not fit into a device's memory.
    """

    def __init__(self, plan: WeightPlan, devices: Sequence[torch.device]):
        self.plan, self.devices = plan, list(devices)
        self.sizes = [sum(slot.size for slot in slots) for slots in plan.layers]
        self._meta = {id(s): getattr(s.module, s.name) for s in (*plan.outside, *(x for y in plan.layers for x in y))}
        self._reader: WeightReader | None = None
        self._loader: Loader | None = None
        self._next = 0
        self._bound: tuple[Slot, ...] = ()
        self._in_use = 0

    @contextlib.contextmanager
    def layer(self, number: int) -> Iterator[torch.device]:
        """Load the weights of one layer for the length of a `with` block, which receives the weights' device."""
        if not self._in_use:
            self._release()
        if self._loader is None or self._next != number:
            self._stop()
            self._loader = Loader([self._make_job(at) for at in range(number, len(self.plan.layers))], self._open())
        self._next = number + 1
        buffer = self._loader.take()
        slots = self.plan.layers[number]
        try:
            set_parameters(slots, buffer.memory)
            yield buffer.memory.device
        finally:
            self._unbind(slots)
            self._loader.give(buffer)
            if self._next == len(self.plan.layers):
                self._stop()

    @contextlib.contextmanager
    def outside(self, head: bool) -> Iterator[torch.device]:
        """Load the weights outside the layers for the length of a `with` block, which receives the weights' device.

        The weights of the language-model head are included if `head` is True. The weights stay loaded until a layer is
        requested, so that consecutive blocks read them once.
        """
        wanted = tuple(slot for slot in self.plan.outside if head or not slot.head)
        if wanted != self._bound:
            self._release()
            memory = torch.empty(compute_layout(wanted)[1], dtype=torch.uint8, device=self.devices[0])
            self._open().fill(wanted, memory, self.devices[0])
            set_parameters(wanted, memory)
            self._bound = wanted
        self._in_use += 1
        try:
            yield self.devices[0]
        finally:
            self._in_use -= 1

    def __del__(self) -> None:
        self.close()  # for a model that was opened but never run

    def close(self) -> None:
        """Stop reading ahead and free all memory. Layers can be loaded again afterwards."""
        self._release()
        self._stop()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open(self) -> WeightReader:
        self._reader = self._reader or WeightReader(self.devices)
        return self._reader

    def _make_job(self, number: int) -> Job:
        return Job(self.plan.layers[number], self.devices[number % len(self.devices)])

    def _stop(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None
            torch.cuda.empty_cache()

    def _release(self) -> None:
        if self._bound:
            self._unbind(self._bound)
            self._bound = ()
            torch.cuda.empty_cache()  # otherwise torch keeps the freed block, which no later allocation fits

    def _unbind(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            for module, name in slot.owners:
                (module._parameters if name in module._parameters else module._buffers)[name] = self._meta[id(slot)]


def set_parameters(slots: Sequence[Slot], memory: Tensor) -> None:
    """Make the parameters and buffers of `slots` views of `memory`, which `WeightReader.fill` has filled."""
    for slot, begin in zip(slots, compute_layout(slots)[0], strict=True):
        view = memory[begin : begin + slot.size].view(slot.dtype).view(slot.shape)
        parameter = nn.Parameter(view, requires_grad=False)
        for module, name in slot.owners:
            if name in module._parameters:
                module._parameters[name] = parameter
            else:
                module._buffers[name] = view


class Job(NamedTuple):
    """What a loader reads into one buffer: the slots, and the device on which they are needed."""

    slots: tuple[Slot, ...]
    device: torch.device


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


def allocate_pinned_pieces() -> list[Tensor]:
    """Allocate two pieces of pinned memory, of STREAM_PIECE bytes each, per reading thread.

    CUDA can copy from pinned memory while the program continues.
    """
    return [torch.empty(STREAM_PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2 * READERS)]


class WeightReader:
    """Reads shards into memory on several threads.

    For CUDA, the bytes pass through pieces of pinned memory, from which a separate CUDA stream copies them.
    """

    def __init__(self, devices: Sequence[torch.device]):
        self._files = _Files()
        self._threads = Pool(READERS)
        self._streams = {device: _new_stream(device) for device in devices if device.type == "cuda"}
        self._pinned: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        for piece in allocate_pinned_pieces() if self._streams else ():
            self._pinned.put((piece, _new_event()))

    def fill(self, slots: Sequence[Slot], memory: Tensor, device: torch.device) -> None:
        """Read `slots` into `memory` on `device`. Later work on the device's current stream waits for the copies."""
        copied = self.start(slots, memory, device, None)
        if copied is not None:
            torch.cuda.current_stream(device).wait_event(copied)

    def start(
        self, slots: Sequence[Slot], memory: Tensor, device: torch.device, free: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """Read `slots` and start to copy them to `memory` on `device`.

        The copies wait for the event `free`, if it is given. Returns the event after which `memory` may be used, or
        None if it can be used now.
        """
        begins, _ = compute_layout(slots)
        tasks = [task for slot, begin in zip(slots, begins, strict=True) for task in _split_tasks(slot, begin)]
        stream = self._streams.get(device)
        if stream is None:
            list(self._threads.map(lambda task: task.read(self._files, memory), tasks))
            return None
        if free is None:  # earlier work on the device may still use the memory that torch has just reused
            stream.wait_stream(torch.cuda.current_stream(device))
        else:
            stream.wait_event(free)
        list(self._threads.map(lambda task: self._through_pinned(task, memory, stream), tasks))
        copied = _new_event()
        copied.record(stream)
        return copied

    def close(self) -> None:
        """Wait until the copies are complete, end the threads and close the shards."""
        for stream in self._streams.values():
            stream.synchronize()
        self._threads.shutdown()
        self._files.close()

    def _through_pinned(self, task: _Task, memory: Tensor, stream: torch.cuda.Stream) -> None:
        """Read a task into a piece of pinned memory and start its copy to `memory` on `stream`."""
        pinned, copied = self._pinned.get()
        try:
            copied.synchronize()
            size = task.size // task.part.dtype.itemsize * task.dtype.itemsize
            host = pinned if size <= STREAM_PIECE else torch.empty(size, dtype=torch.uint8)
            _Task(task.part, task.offset, task.size, 0, task.dtype).read(self._files, host)
            with torch.cuda.stream(stream):
                memory[task.begin : task.begin + size].copy_(host[:size], non_blocking=host is pinned)
            copied = stream.record_event()  # a new event, because an event belongs to the device that first recorded it
        finally:
            self._pinned.put((pinned, copied))


class Buffer:
    """Memory for one layer on one device.

    For CUDA, the event `copied` occurs when the layer's bytes have arrived, and `used` when the layer has been
    computed.
    """

    def __init__(self, size: int, device: torch.device):
        self.device = device
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.copied: torch.cuda.Event | None = None
        self.used = _new_event() if device.type == "cuda" else None
        if self.used is not None:
            self.used.record(torch.cuda.current_stream(device))


class Loader:
    """Reads jobs in order, one ahead of the job that is used, on a separate thread, into two buffers per device."""

    def __init__(self, jobs: Sequence[Job], reader: WeightReader):
        self._jobs, self._reader = jobs, reader
        self._free: dict[torch.device, queue.SimpleQueue[Buffer | None]] = {}
        self._ready: queue.SimpleQueue[Buffer | BaseException] = queue.SimpleQueue()
        for device in dict.fromkeys(job.device for job in jobs):
            self._free[device] = queue.SimpleQueue()
            mine = [job for job in jobs if job.device == device]
            largest = max(compute_layout(job.slots)[1] for job in mine)
            for _ in mine[:2]:
                self._free[device].put(Buffer(largest, device))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_all, daemon=True)
        self._thread.start()

    def take(self) -> Buffer:
        """Return the buffer of the next job. Raises the exception that ended the thread."""
        buffer = self._ready.get()
        if isinstance(buffer, BaseException):
            raise buffer
        if buffer.copied is not None:
            torch.cuda.current_stream(buffer.memory.device).wait_event(buffer.copied)
        return buffer

    def give(self, buffer: Buffer) -> None:
        """Release a buffer that was taken, so that another job can be read into it."""
        if buffer.used is not None:
            buffer.used.record(torch.cuda.current_stream(buffer.memory.device))
        self._free[buffer.device].put(buffer)

    def close(self) -> None:
        """Stop reading and wait until the thread has ended."""
        self._stopped.set()
        for free in self._free.values():
            free.put(None)
        self._thread.join()

    def _read_all(self) -> None:
        try:
            for slots, device in self._jobs:
                buffer = self._free[device].get()
                if buffer is None or self._stopped.is_set():
                    return
                buffer.copied = self._reader.start(slots, buffer.memory, device, buffer.used)
                self._ready.put(buffer)
        except BaseException as error:  # noqa: BLE001 (`take` raises it again)
            self._ready.put(error)
