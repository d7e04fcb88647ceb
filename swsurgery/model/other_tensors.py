"""Give a model the tensors of other checkpoints while a variant runs.

Only the parameters that differ are read: one layer after the other, one layer ahead, whatever the number of variants.
This module moves weights, and must not depend on what a layer computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from swsurgery.model.filling import Job
from swsurgery.model.slots import Slot, WeightPlan
from swsurgery.model.stream import set_parameters
from swsurgery.model.weight_reader import Loader, WeightReader


class OtherTensors:
    """The changed parameters of all variants of one run, in files.

    `plans` has one entry per variant, with the slots to change, or None. `devices` take the layers in turn; weights
    outside the layers are on the first device. Layers must be requested in order, and in each layer the variants in
    order. Methods raise CheckpointError if a shard cannot be read.
    """

    def __init__(self, plans: Sequence[WeightPlan | None], devices: Sequence[torch.device]):
        self._plans, self._devices = plans, list(devices)
        count = max((len(plan.layers) for plan in plans if plan), default=0)
        self._due = [
            (number, index)
            for number in range(count)
            for index, plan in enumerate(plans)
            if plan is not None and plan.layers[number]
        ]
        self._reader: WeightReader | None = None
        self._loader: Loader | None = None
        self._kept: dict[int, Tensor] = {}
        self._all: tuple[int, dict[int | None, Tensor]] | None = None

    def has(self, index: int, where: int | None) -> bool:
        """Return True if variant `index` changes a parameter of layer `where` (None: outside the layers)."""
        return bool(self._list_slots(index, where))

    @contextlib.contextmanager
    def swap_layer(self, index: int, number: int) -> Iterator[None]:
        """Give layer `number` the parameters of variant `index` for the length of a block."""
        slots = self._list_slots(index, number)
        if not slots:
            yield
            return
        if self._loader is None:
            self._loader = Loader([self._make_job(*due) for due in self._due], self._open())
        assert self._due[0] == (number, index), "layers and variants are requested in order"
        del self._due[0]
        buffer = self._loader.take()
        try:
            with _swap(slots, buffer.memory):
                yield
        finally:
            self._loader.give(buffer)

    @contextlib.contextmanager
    def swap_outside(self, index: int, keep: bool = False) -> Iterator[None]:
        """Give the modules outside the layers the parameters of variant `index` for the length of a block.

        With `keep`, they stay in memory until `close`, so that later blocks do not read them again.
        """
        slots = self._list_slots(index, None)
        if not slots:
            yield
            return
        memory = self._kept[index] if index in self._kept else self._read(slots, self._devices[0])
        if keep:
            self._kept[index] = memory
        with _swap(slots, memory):
            yield

    @contextlib.contextmanager
    def swap_all(self, index: int) -> Iterator[None]:
        """Give the whole model the parameters of variant `index` for the length of a block.

        They stay in memory until another variant is requested.
        """
        plan = self._plans[index]
        if plan is None:
            yield
            return
        if self._all is None or self._all[0] != index:
            self._all = None
            places: list[int | None] = [None, *range(len(plan.layers))]
            self._all = (index, {at: self._read(self._list_slots(index, at), self._get_device(at)) for at in places})
        with contextlib.ExitStack() as stack:
            for where, memory in self._all[1].items():
                stack.enter_context(_swap(self._list_slots(index, where), memory))
            yield

    def close(self) -> None:
        """Stop reading ahead and free the memory."""
        self._kept.clear()
        self._all = None
        if self._loader is not None:
            self._loader.close()
            self._loader = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _list_slots(self, index: int, where: int | None) -> tuple[Slot, ...]:
        plan = self._plans[index]
        if plan is None:
            return ()
        return plan.outside if where is None else plan.layers[where]

    def _get_device(self, where: int | None) -> torch.device:
        return self._devices[(where or 0) % len(self._devices)]

    def _make_job(self, number: int, index: int) -> Job:
        return Job(self._list_slots(index, number), self._get_device(number))

    def _read(self, slots: tuple[Slot, ...], device: torch.device) -> Tensor:
        return self._open().read(slots, device)

    def _open(self) -> WeightReader:
        self._reader = self._reader or WeightReader(self._devices)
        return self._reader


def find_changed_by_loader(plan: WeightPlan, device: torch.device) -> str | None:
    """Compare the loaded parameters of `plan` with their stored bytes.

    Returns the stored name of a tensor whose loaded values differ from the stored ones, or None. One parameter at a
    time is read.
    """
    reader = WeightReader([device])
    try:
        for slot in plan.slots:
            stored = reader.read([slot], device)[: slot.size].view(slot.dtype).view(slot.shape)
            loaded = _get_tensors(slot.module, slot.name)[slot.name]
            assert loaded is not None
            if loaded.device.type == "meta" or loaded.dtype != slot.dtype:
                return slot.parts[0].tensor
            loaded = loaded.to(device)
            same = (loaded == stored) | ((loaded != loaded) & (stored != stored))
            if not bool(same.all()):
                return slot.parts[0].tensor
    finally:
        reader.close()
    return None


def replace_parameters(plan: WeightPlan) -> None:
    """Overwrite the loaded parameters of `plan` with their stored bytes, one parameter at a time."""
    cpu = torch.device("cpu")
    reader = WeightReader([cpu])
    try:
        for slot in plan.slots:
            memory = reader.read([slot], cpu)
            loaded = _get_tensors(slot.module, slot.name)[slot.name]
            assert loaded is not None
            loaded.data.copy_(memory[: slot.size].view(slot.dtype).view(slot.shape))
    finally:
        reader.close()


def _get_tensors(module: nn.Module, name: str) -> dict[str, nn.Parameter | None] | dict[str, Tensor | None]:
    return module._parameters if name in module._parameters else module._buffers


@contextlib.contextmanager
def _swap(slots: Sequence[Slot], memory: Tensor) -> Iterator[None]:
    """Make the parameters of `slots` views of `memory` for the length of a block."""
    kept = [(module, name, _get_tensors(module, name)[name]) for slot in slots for module, name in slot.owners]
    try:
        set_parameters(slots, memory)
        yield
    finally:
        for module, name, tensor in kept:
            if name in module._parameters:
                assert tensor is None or isinstance(tensor, nn.Parameter)
                module._parameters[name] = tensor
            else:
                module._buffers[name] = tensor
