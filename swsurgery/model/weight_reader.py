"""Read weights from the shards into memory, ahead of the layer that is computed.

Reading, copying to a device and computing overlap: shards are read in the order of the layers, a buffer is filled as
soon as it is free, and no thread waits for the end of a layer.

    weight_plan.py    which stored bytes make up each parameter
    filling.py        a buffer, and one request to fill it
    lane.py           the threads and the pinned memory of one device

These modules move bytes, and must not depend on what a layer computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from swsurgery.model.filling import Buffer, Filling, Job, new_event
from swsurgery.model.lane import Files, HostPiece, Lane, allocate_pinned_pieces, count_readers
from swsurgery.model.slots import Slot

JOBS_AHEAD = 2
"""Maximum number of jobs per device that are read while its buffers are in use. Pinned memory may allow fewer."""


class WeightReader:
    """Reads shards into memory. Each device has reading threads of its own."""

    def __init__(self, devices: Sequence[torch.device]):
        self._files = Files()
        distinct = list(dict.fromkeys(devices))
        threads = count_readers(len(distinct))
        self._lanes = {device: Lane(self._files, threads, _make_pieces(device, threads)) for device in distinct}

    def prepare(self, job: Job) -> Filling:
        """Request a job whose buffer is not known yet. Jobs of one device are read in the order of their requests."""
        return self._lanes[job.device].prepare(job)

    def assign(self, request: Filling, buffer: Buffer) -> None:
        """Name the buffer of a request. Copies wait until the previous contents of the buffer have been used."""
        self._lanes[buffer.device].assign(request, buffer)

    def request(self, job: Job, buffer: Buffer) -> Filling:
        """Request a job for a buffer."""
        request = self.prepare(job)
        self.assign(request, buffer)
        return request

    def read(self, slots: Sequence[Slot], device: torch.device) -> Tensor:
        """Read slots into new memory on `device`, and return it. Raises CheckpointError."""
        job = Job(tuple(slots), device)
        return self.request(job, Buffer(job.size, device)).wait().memory

    def close(self) -> None:
        """Wait until the copies are complete, end the threads and close the shards."""
        for lane in self._lanes.values():
            lane.close()
        self._files.close()


class Loader:
    """Reads jobs in order, ahead of the job that is used, into two buffers per device."""

    def __init__(self, jobs: Sequence[Job], reader: WeightReader):
        self._reader = reader
        self._requests: dict[int, Filling] = {}
        self._taken = 0
        self._jobs: dict[torch.device, deque[tuple[int, Job]]] = {}
        self._without_buffer: dict[torch.device, deque[Filling]] = {}
        for number, job in enumerate(jobs):
            self._jobs.setdefault(job.device, deque()).append((number, job))
        for device, mine in self._jobs.items():
            self._without_buffer[device] = deque()
            largest, count = max(job.size for _, job in mine), min(2, len(mine))
            for _ in range(count):
                self._assign(Buffer(largest, device))

    def take(self) -> Buffer:
        """Return the buffer of the next job once it is read. Raises CheckpointError if a shard cannot be read."""
        request = self._requests.pop(self._taken)
        self._taken += 1
        return request.wait()

    def give(self, buffer: Buffer) -> None:
        """Release a buffer that was taken, so that another job can be read into it."""
        buffer.mark_used()
        self._assign(buffer)

    def close(self) -> None:
        """Stop reading, and wait until no thread uses a buffer."""
        for request in self._requests.values():
            request.cancel()
        for request in self._requests.values():
            request.settle()
        self._requests.clear()

    def _assign(self, buffer: Buffer) -> None:
        """Name `buffer` as that of the next job of its device, if there is one, and read ahead."""
        ready, jobs = self._without_buffer[buffer.device], self._jobs[buffer.device]
        while jobs and len(ready) <= JOBS_AHEAD:
            number, job = jobs.popleft()
            self._requests[number] = self._reader.prepare(job)
            ready.append(self._requests[number])
        if ready:
            self._reader.assign(ready.popleft(), buffer)


def _make_pieces(device: torch.device, threads: int) -> list[HostPiece]:
    """Make the pieces of pinned memory for a CUDA device. A CPU needs none."""
    if device.type != "cuda":
        return []
    return [HostPiece(memory, new_event(blocking=True)) for memory in allocate_pinned_pieces(threads)]
