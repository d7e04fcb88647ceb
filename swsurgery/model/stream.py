"""Give a model the weights of one layer at a time.

Two layers are in memory at a time, however large the model is: while one layer is computed, the next one is read.
Several devices take the layers in turn. The embedding stays in memory during a run.

`weight_reader.py` moves the bytes. This module binds them to the parameters of the model.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from swsurgery.model.filling import Buffer, Filling, Job
from swsurgery.model.slots import Slot, WeightPlan, compute_layout
from swsurgery.model.weight_reader import Loader, WeightReader


class StreamedWeights:
    """A source of weights that reads the layers of a model in order, one layer ahead.

    `devices` take the layers in turn; weights outside the layers are on the first device. Methods raise CheckpointError
    if a shard cannot be read, and torch.OutOfMemoryError if two layers do not fit into a device's memory.
    """

    def __init__(self, plan: WeightPlan, devices: Sequence[torch.device]):
        self.plan, self.devices = plan, list(devices)
        self.sizes = [sum(slot.size for slot in slots) for slots in plan.layers]
        self._head = tuple(slot for slot in plan.outside if slot.head)
        self._rest = tuple(slot for slot in plan.outside if not slot.head)
        self._meta = {id(s): getattr(s.module, s.name) for s in (*plan.outside, *(x for y in plan.layers for x in y))}
        self._reader: WeightReader | None = None
        self._loader: Loader | None = None
        self._next = 0
        self._ahead = False
        self._embedding: Filling | None = None
        self._bound: tuple[Slot, ...] | None = None

    def start(self) -> None:
        """Begin to read the weights that a run needs first: the embedding and the first layers."""
        if self._embedding is None:
            self._stop()  # layers that are read ahead could hold all pinned memory until the embedding has been used
            job = Job(self._rest, self.devices[0])
            self._embedding = self._open().request(job, Buffer(job.size, job.device))
        if self._loader is None:
            self._load_from(0)

    @contextlib.contextmanager
    def layer(self, number: int) -> Iterator[torch.device]:
        """Load the weights of one layer for the length of a `with` block, which receives the weights' device."""
        if self._loader is None or self._next != number:
            self._load_from(number)
        assert self._loader is not None
        self._next = number + 1
        buffer = self._loader.take()
        slots = self.plan.layers[number]
        try:
            set_parameters(slots, buffer.memory)
            yield buffer.device
        finally:
            self._unbind(slots)
            self._loader.give(buffer)

    @contextlib.contextmanager
    def outside(self, head: bool) -> Iterator[torch.device]:
        """Load the weights outside the layers for the length of a `with` block, which receives the weights' device.

        The weights of the language-model head are included if `head` is True; they stay loaded until a layer is
        requested. The other weights stay loaded until `close`.
        """
        if self._bound is None:
            self.start()
            assert self._embedding is not None
            set_parameters(self._rest, self._embedding.wait().memory)
            self._bound = self._rest
        if head and self._head and self._bound is self._rest:
            set_parameters(self._head, self._take_head())
            self._bound = self.plan.outside
        yield self.devices[0]

    def __del__(self) -> None:
        if not sys.is_finalizing():  # the threads no longer run when Python ends
            self.close()  # for a model that was opened but never run

    def close(self) -> None:
        """Stop reading ahead and free all memory. Layers can be loaded again afterwards."""
        self._unbind(self._bound or ())
        self._bound = self._embedding = None
        self._stop()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open(self) -> WeightReader:
        self._reader = self._reader or WeightReader(self.devices)
        return self._reader

    def _load_from(self, number: int) -> None:
        """Begin to read the layers from `number` on, and then the head if it fits into the memory of a layer."""
        self._stop()
        if self._bound is self.plan.outside:
            self._unbind(self._head)
            self._bound = self._rest
        layers = [Job(slots, self.devices[at % len(self.devices)]) for at, slots in enumerate(self.plan.layers)]
        head = Job(self._head, self.devices[0])
        self._ahead = bool(head.size) and head.size <= max(job.size for job in layers[number:])
        self._loader = Loader([*layers[number:], *([head] if self._ahead else [])], self._open())
        self._next = number

    def _take_head(self) -> Tensor:
        """Return the memory with the weights of the head."""
        if self._loader is not None and self._ahead and self._next == len(self.plan.layers):
            return self._loader.take().memory
        self._stop()
        return self._open().read(self._head, self.devices[0])

    def _stop(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None
            torch.cuda.empty_cache()  # otherwise torch keeps the freed blocks, which no later allocation fits

    def _unbind(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            for module, name in slot.owners:
                (module._parameters if name in module._parameters else module._buffers)[name] = self._meta[id(slot)]


def set_parameters(slots: Sequence[Slot], memory: Tensor) -> None:
    """Make the parameters and buffers of `slots` views of `memory`, which a `WeightReader` has filled."""
    for slot, begin in zip(slots, compute_layout(slots)[0], strict=True):
        view = memory[begin : begin + slot.size].view(slot.dtype).view(slot.shape)
        parameter = nn.Parameter(view, requires_grad=False)
        for module, name in slot.owners:
            if name in module._parameters:
                module._parameters[name] = parameter
            else:
                module._buffers[name] = view
