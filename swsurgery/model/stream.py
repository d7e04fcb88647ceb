"""The weights of one layer at a time, read from the shards into buffers that are used again.

Memory is two layers, whatever the model's size: while one is computed the next is read. On a CPU the shards are read
straight into the buffer that the layer's parameters are views of; for CUDA they go through small pinned pieces, and the
copies run on a stream of their own. Several devices take the layers in turn.

`plan_weights` says which stored tensors make up which parameter. Where one cannot be told (packed weights, fusions that
are not known here) the model cannot be streamed, and says so. This room knows parameters and bytes, and no layer's
meaning.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swsurgery.architectures import loaded_candidates, name_prefixes
from swsurgery.checkpoint import Checkpoint
from swsurgery.coordinate import Coordinate
from swsurgery.errors import CheckpointError, ModelError
from swsurgery.shard import open_regular

PIECE = 8 << 20
"""Bytes read in one call."""

READERS = max(2, min(8, os.cpu_count() or 2))
"""Threads that read."""

ALIGNMENT = 256

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip

#: How checkpoints name what transformers calls otherwise: (loaded, stored).
RENAMED = (
    (".mlp.", ".block_sparse_moe."),
    (".mlp.router.", ".block_sparse_moe.gate."),
    ("lm_head.", "embed_out."),
)

#: What transformers stacks over the experts, and joins along an expert's rows: its name, and those of the parts.
STACKED = {
    "experts.gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "experts.down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class Part:
    """Stored bytes that make up some rows of a parameter, all of it for most: where they lie, and from which element
    of the parameter on they belong."""

    path: Path
    offset: int
    size: int
    dtype: torch.dtype
    element: int


@dataclass(frozen=True)
class Slot:
    """One parameter or buffer of a module, and what it is read from. `head` says that only the head needs it."""

    module: nn.Module
    name: str
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[Part, ...]
    owners: tuple[tuple[nn.Module, str], ...]
    head: bool

    @property
    def size(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def plan_weights(model: PreTrainedModel, layers: Sequence[nn.Module], checkpoint: Checkpoint) -> WeightPlan:
    """What each layer, and what is outside of them, is read from. Raises ModelError where a weight that is needed is
    not stored in a form that can be read as it is."""
    prefixes = ("", *name_prefixes(checkpoint.config))
    layer_of = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
    # A model that also sees images never needs what sees them here.
    needed = {id(module) for root in (model.get_decoder(), model.get_output_embeddings()) if root is not None
              for module in root.modules()}  # fmt: skip
    head = {id(model.get_output_embeddings())}
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set and id(module) in needed:
                owners.setdefault(id(tensor), []).append((f"{path}.{name}" if path else name, module, name))
    in_layers: list[list[Slot]] = [[] for _ in layers]
    outside: list[Slot] = []
    for holders in owners.values():
        places = {layer_of.get(id(module)) for _, module, _ in holders}
        _, module, name = holders[0]
        tensor = getattr(module, name)
        for path, _, _ in holders:  # tied: it is stored under one of its names
            parts = _parts(path, tensor.shape, checkpoint, prefixes)
            if parts:
                break
        else:
            raise ModelError("cannot be read layer by layer: no stored form is known", holders[0][0])
        dtype = _loaded_dtype(model, holders[0][0], tensor)
        if any(
            part.dtype != dtype and not (part.dtype.is_floating_point and dtype.is_floating_point) for part in parts
        ):
            raise ModelError(f"cannot be read layer by layer: stored as {parts[0].dtype}", holders[0][0])
        for place in places:
            mine = tuple((m, n) for _, m, n in holders if layer_of.get(id(m)) == place)
            slot = Slot(*mine[0], tensor.shape, dtype, parts, mine, all(id(module) in head for module, _ in mine))
            (outside if place is None else in_layers[place]).append(slot)
    return WeightPlan(tuple(tuple(slots) for slots in in_layers), tuple(outside))


@dataclass(frozen=True)
class WeightPlan:
    """The slots of each layer, and those outside of the layers."""

    layers: tuple[tuple[Slot, ...], ...]
    outside: tuple[Slot, ...]

    @property
    def largest(self) -> int:
        """Bytes that the largest layer takes in a buffer."""
        return max(_layout(slots)[1] for slots in self.layers)


def _layout(slots: Sequence[Slot]) -> tuple[list[int], int]:
    """Where each slot begins in a buffer, and how long the buffer must be."""
    begins, end = [], 0
    for slot in slots:
        begins.append(end)
        end += -(-slot.size // ALIGNMENT) * ALIGNMENT
    return begins, end


def _loaded_dtype(model: PreTrainedModel, path: str, tensor: Tensor) -> torch.dtype:
    """The dtype in which transformers would load it: some modules are kept in float32."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    half = getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = (*strict, *(half if tensor.dtype == torch.float16 else ()))
    if tensor.is_floating_point() and any(re.search(rf"(?:^|\.){re.escape(name)}(?:$|\.)", path) for name in kept):
        return torch.float32
    return tensor.dtype


def _parts(path: str, shape: torch.Size, checkpoint: Checkpoint, prefixes: Sequence[str]) -> tuple[Part, ...]:
    """The stored bytes of one parameter, or nothing where they are not found in its very shape."""
    longest = max((prefix for prefix in prefixes if path.startswith(prefix)), key=len)
    bare = path.removeprefix(longest)
    names = [prefix + rest for rest in dict.fromkeys((path, bare)) for prefix in ("", longest, *prefixes)]
    names = list(dict.fromkeys(names + [n.replace(*pair) for n in names for pair in RENAMED if pair[0] in n]))
    for name in names:
        if checkpoint.shapes.get(name) == tuple(shape) and _as_stored(name, path, checkpoint):
            return (_part(name, 0, checkpoint),)
    for ending, choices in STACKED.items():
        for name in names:
            if name.endswith(ending) and len(shape) == 3:
                stem = name.removesuffix(ending) + "experts."
                for parts in choices:
                    found = _stacked(stem, parts, shape, checkpoint)
                    if found:
                        return found
    return ()


def _stacked(stem: str, names: Sequence[str], shape: torch.Size, checkpoint: Checkpoint) -> tuple[Part, ...]:
    experts, rows, columns = shape
    wanted = (rows // len(names), columns)
    found = []
    for expert in range(experts):
        for number, name in enumerate(names):
            stored = f"{stem}{expert}.{name}.weight"
            if checkpoint.shapes.get(stored) != wanted or rows % len(names):
                return ()
            found.append(_part(stored, (expert * rows + number * wanted[0]) * columns, checkpoint))
    return tuple(found)


def _as_stored(name: str, path: str, checkpoint: Checkpoint) -> bool:
    """Is a down projection loaded the way round in which it is stored? Any other weight is taken to be."""
    index = tuple(range(len(checkpoint.shapes[name])))
    candidates = loaded_candidates(checkpoint.config, Coordinate(name, index), checkpoint.shapes)
    turned = [c for c in candidates if c.tensor == path and c.index != index]
    return not turned


def _part(name: str, element: int, checkpoint: Checkpoint) -> Part:
    info, shard = checkpoint.info(name), checkpoint.shards[checkpoint.weight_map[name]]
    dtype = STORED.get(info.dtype.name)
    if dtype is None:
        raise ModelError(f"cannot be read layer by layer: stored as {info.dtype.name}", name)
    return Part(shard.path, shard.data_start + info.data_offsets[0], info.size, dtype, element)


class StreamedWeights:
    """Gives each layer its weights while it runs, in the order of the layers, reading ahead.

    `devices` take the layers in turn; what is outside of them is on the first. Raises CheckpointError where a shard
    cannot be read, and what torch raises where a device has no room for two layers.
    """

    def __init__(self, plan: WeightPlan, devices: Sequence[torch.device]):
        self.plan, self.devices = plan, list(devices)
        self.sizes = [sum(slot.size for slot in slots) for slots in plan.layers]
        self._meta = {id(s): getattr(s.module, s.name) for s in (*plan.outside, *(x for y in plan.layers for x in y))}
        self._reader: _Reader | None = None
        self._loader: _Loader | None = None
        self._bound: tuple[Slot, ...] = ()
        self._in_use = 0

    @contextlib.contextmanager
    def layer(self, number: int) -> Iterator[torch.device]:
        if not self._in_use:
            self._release()
        if self._loader is None or self._loader.next != number:
            self._stop()
            self._loader = _Loader(self.plan, self.devices, number, self._open())
        buffer = self._loader.take()
        slots = self.plan.layers[number]
        try:
            self._bind(slots, buffer.memory)
            yield buffer.memory.device
        finally:
            self._unbind(slots)
            self._loader.give(buffer)
            if self._loader.next == len(self.plan.layers):
                self._stop()

    @contextlib.contextmanager
    def outside(self, head: bool) -> Iterator[torch.device]:
        """They stay until a layer is asked for, so that one use after another costs one reading."""
        wanted = tuple(slot for slot in self.plan.outside if head or not slot.head)
        if wanted != self._bound:
            self._release()
            memory = torch.empty(_layout(wanted)[1], dtype=torch.uint8, device=self.devices[0])
            self._open().fill(wanted, memory, self.devices[0])
            self._bind(wanted, memory)
            self._bound = wanted
        self._in_use += 1
        try:
            yield self.devices[0]
        finally:
            self._in_use -= 1

    def __del__(self) -> None:
        self.close()  # of a model that was opened and refused before it ran

    def close(self) -> None:
        """Stop reading ahead and give all memory back."""
        self._release()
        self._stop()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open(self) -> _Reader:
        self._reader = self._reader or _Reader(self.devices)
        return self._reader

    def _stop(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None
            torch.cuda.empty_cache()

    def _release(self) -> None:
        if self._bound:
            self._unbind(self._bound)
            self._bound = ()
            torch.cuda.empty_cache()  # what was freed fits nothing that comes next

    def _bind(self, slots: Sequence[Slot], memory: Tensor) -> None:
        for slot, begin in zip(slots, _layout(slots)[0], strict=True):
            view = memory[begin : begin + slot.size].view(slot.dtype).view(slot.shape)
            for module, name in slot.owners:
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(view, requires_grad=False)
                else:
                    module._buffers[name] = view

    def _unbind(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            for module, name in slot.owners:
                (module._parameters if name in module._parameters else module._buffers)[name] = self._meta[id(slot)]


@dataclass(frozen=True)
class _Task:
    """One read: bytes of a file into bytes of a buffer, converted where the dtypes differ."""

    part: Part
    offset: int
    size: int
    begin: int
    dtype: torch.dtype

    def read(self, files: _Files, memory: Tensor) -> None:
        if self.part.dtype == self.dtype:
            files.read(self.part.path, self.offset, memory[self.begin : self.begin + self.size])
            return
        raw = torch.empty(self.size, dtype=torch.uint8)
        files.read(self.part.path, self.offset, raw)
        values = raw.view(self.part.dtype).to(self.dtype).view(torch.uint8)
        memory[self.begin : self.begin + len(values)] = values


def _tasks(slot: Slot, begin: int) -> Iterator[_Task]:
    for part in slot.parts:
        at, end = part.offset, part.offset + part.size
        while at < end:
            size = min(PIECE, end - at)
            element = part.element + (at - part.offset) // part.dtype.itemsize
            yield _Task(part, at, size, begin + element * slot.dtype.itemsize, slot.dtype)
            at += size


class _Files:
    """Descriptors of shards, opened when first read. May be used from several threads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def read(self, path: Path, offset: int, memory: Tensor) -> None:
        """Fill one-dimensional bytes in main memory. Raises CheckpointError."""
        with self._lock:
            fd = self._open.get(path)
            if fd is None:
                fd = self._open[path] = open_regular(path)
        view = memoryview(memory.numpy())
        while view:
            try:
                count = os.preadv(fd, [view], offset)
            except OSError as error:
                raise CheckpointError(f"cannot read ({os.strerror(error.errno or 0)})", path) from error
            if not count:
                raise CheckpointError("the file ended while it was read", path, "it was truncated meanwhile")
            view, offset = view[count:], offset + count


def pinned_pieces() -> list[Tensor]:
    """Room in main memory that CUDA can copy from by itself: two pieces for each thread that reads."""
    return [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2 * READERS)]


class _Reader:
    """Fills memory from the shards, on several threads. For CUDA the bytes go through pinned pieces, and the copies
    run on a stream of their own."""

    def __init__(self, devices: Sequence[torch.device]):
        self._files = _Files()
        self._threads = ThreadPoolExecutor(READERS)
        self._streams = {device: torch.cuda.Stream(device) for device in devices if device.type == "cuda"}
        self._pinned: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        for piece in pinned_pieces() if self._streams else ():
            self._pinned.put((piece, torch.cuda.Event()))

    def fill(self, slots: Sequence[Slot], memory: Tensor, device: torch.device) -> None:
        """Read `slots` into `memory` on `device`; work that the current stream is given later finds it there."""
        copied = self.start(slots, memory, device, None)
        if copied is not None:
            torch.cuda.current_stream(device).wait_event(copied)

    def start(
        self, slots: Sequence[Slot], memory: Tensor, device: torch.device, free: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """As `fill`, but copying waits for the event `free`, and whoever uses the memory for the event returned."""
        begins, _ = _layout(slots)
        tasks = [task for slot, begin in zip(slots, begins, strict=True) for task in _tasks(slot, begin)]
        stream = self._streams.get(device)
        if stream is None:
            list(self._threads.map(lambda task: task.read(self._files, memory), tasks))
            return None
        if free is None:  # memory that was just allocated may still be in use by what was given to the device before
            stream.wait_stream(torch.cuda.current_stream(device))
        else:
            stream.wait_event(free)
        list(self._threads.map(lambda task: self._through_pinned(task, memory, stream), tasks))
        copied = torch.cuda.Event()
        copied.record(stream)
        return copied

    def close(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()
        self._threads.shutdown()
        self._files.close()

    def _through_pinned(self, task: _Task, memory: Tensor, stream: torch.cuda.Stream) -> None:
        pinned, copied = self._pinned.get()
        try:
            copied.synchronize()
            size = task.size // task.part.dtype.itemsize * task.dtype.itemsize
            host = pinned if size <= PIECE else torch.empty(size, dtype=torch.uint8)
            _Task(task.part, task.offset, task.size, 0, task.dtype).read(self._files, host)
            with torch.cuda.stream(stream):
                memory[task.begin : task.begin + size].copy_(host[:size], non_blocking=host is pinned)
            copied = stream.record_event()  # a new one: an event stays with the device that it was first recorded on
        finally:
            self._pinned.put((pinned, copied))


class _Buffer:
    """Room for one layer on one device. For CUDA, `copied` is when its bytes are there and `used` when the layer that
    it last held has been computed."""

    def __init__(self, size: int, device: torch.device):
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.copied: torch.cuda.Event | None = None
        self.used = torch.cuda.Event() if device.type == "cuda" else None
        if self.used is not None:
            self.used.record(torch.cuda.current_stream(device))


class _Loader:
    """Reads layers in order on a thread of its own, two buffers for each device. `take` gives the next, `give` returns
    it to be filled again."""

    def __init__(self, plan: WeightPlan, devices: Sequence[torch.device], first: int, reader: _Reader):
        self.next = first
        self._layers, self._devices, self._reader = plan.layers, devices, reader
        self._free: list[queue.SimpleQueue[_Buffer | None]] = [queue.SimpleQueue() for _ in devices]
        self._ready: queue.SimpleQueue[_Buffer | BaseException] = queue.SimpleQueue()
        for device, free in zip(devices, self._free, strict=True):
            for _ in range(2):
                free.put(_Buffer(plan.largest, device))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_all, args=(first,), daemon=True)
        self._thread.start()

    def take(self) -> _Buffer:
        buffer = self._ready.get()
        if isinstance(buffer, BaseException):
            raise buffer
        if buffer.copied is not None:
            torch.cuda.current_stream(buffer.memory.device).wait_event(buffer.copied)
        self.next += 1
        return buffer

    def give(self, buffer: _Buffer) -> None:
        if buffer.used is not None:
            buffer.used.record(torch.cuda.current_stream(buffer.memory.device))
        self._free[(self.next - 1) % len(self._devices)].put(buffer)

    def close(self) -> None:
        self._stopped.set()
        for free in self._free:
            free.put(None)
        self._thread.join()

    def _read_all(self, first: int) -> None:
        try:
            for number in range(first, len(self._layers)):
                at = number % len(self._devices)
                buffer = self._free[at].get()
                if buffer is None or self._stopped.is_set():
                    return
                device = self._devices[at]
                buffer.copied = self._reader.start(self._layers[number], buffer.memory, device, buffer.used)
                self._ready.put(buffer)
        except BaseException as error:  # noqa: BLE001 (it is raised again where the layer is taken)
            self._ready.put(error)
