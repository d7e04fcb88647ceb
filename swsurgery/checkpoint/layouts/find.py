"""Find the layout of a quantised weight, and the shapes of all weights of a checkpoint, quantised ones included.

`LAYOUTS` lists one function for each layout. To add a layout, write a module with such a function and a row here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Protocol

from swsurgery.checkpoint.quantised import Quantisation
from swsurgery.storage.numeric import load_numpy

load_numpy()

from swsurgery.checkpoint.layouts.auto_round import find_auto_round  # noqa: E402
from swsurgery.checkpoint.layouts.awq import find_awq  # noqa: E402
from swsurgery.checkpoint.layouts.bitsandbytes import find_bitsandbytes  # noqa: E402
from swsurgery.checkpoint.layouts.cells import CannotTell, QuantisedMatrix, ReadBytes  # noqa: E402
from swsurgery.checkpoint.layouts.compressed import find_pack_quantized, find_plain_codes  # noqa: E402
from swsurgery.checkpoint.layouts.fp4 import (  # noqa: E402
    find_fp4_in_bytes,
    find_modelopt_fp4,
    find_packed_fp4,
    find_stacked_fp4,
)
from swsurgery.checkpoint.layouts.gguf import find_gguf  # noqa: E402
from swsurgery.checkpoint.layouts.gptq import find_gptq  # noqa: E402
from swsurgery.checkpoint.layouts.module import QuantisedModule  # noqa: E402
from swsurgery.checkpoint.layouts.quanto import find_quanto  # noqa: E402
from swsurgery.checkpoint.layouts.scaled import find_scaled  # noqa: E402
from swsurgery.checkpoint.layouts.torchao import find_torchao  # noqa: E402
from swsurgery.storage.files import read_exactly  # noqa: E402
from swsurgery.storage.shard import Shard, TensorInfo  # noqa: E402


class StoredTensors(Protocol):
    """What this module needs of an opened checkpoint; `checkpoint.Checkpoint` documents the properties."""

    @property
    def config(self) -> Mapping[str, object]: ...

    @property
    def shards(self) -> Mapping[str, Shard]: ...

    @property
    def weight_map(self) -> Mapping[str, str]: ...

    @property
    def disagreements(self) -> Mapping[str, str]: ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    @property
    def all_shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def quantisation(self) -> Quantisation: ...


FindLayout = Callable[[QuantisedModule], QuantisedMatrix | None]
"""Type of a function that recognises one layout. It returns None for a module of another layout.

It raises CannotTell if the module has this layout, but the stored tensors do not decide what the weight is.
"""

LAYOUTS: tuple[FindLayout, ...] = (
    find_scaled,
    find_pack_quantized,
    find_plain_codes,
    find_packed_fp4,
    find_modelopt_fp4,
    find_fp4_in_bytes,
    find_stacked_fp4,
    find_gptq,
    find_awq,
    find_auto_round,
    find_bitsandbytes,
    find_gguf,
    find_torchao,
    find_quanto,
)

WEIGHT_ENDINGS = (
    (".weight_packed", ".weight"),
    (".qweight", ".weight"),
    ("_blocks", ""),
    ("._weight_qdata", ".weight"),
    (".weight._data", ".weight"),
    (".weight._data._data", ".weight"),
)
"""Endings of the names of tensors of codes, with the ending of the name of the weight in a loaded model."""


_LEFT_OUT = (*WEIGHT_ENDINGS, (".weight.absmax", ".weight"))
"""WEIGHT_ENDINGS, and the same for a tensor beside codes that shows by its name that they are packed."""


def find_matrix(checkpoint: StoredTensors, weight: str, read: ReadBytes | None = None) -> QuantisedMatrix | None:
    """Find how the weight of this name is quantised. Returns None if it is stored as a plain tensor or not at all.

    `read` may be given to read the data of the tensors with changes that are not written yet.

    Raises CannotTell if no layout, or more than one, describes the tensors of its module, or if they do not decide what
    the weight is.
    """
    if weight in checkpoint.disagreements:
        raise CannotTell(f"index and shards disagree about {weight}")
    module = _read_module(checkpoint, weight, read or make_reader(checkpoint))
    if module is None:
        return None
    found = [matrix for find in LAYOUTS if (matrix := find(module)) is not None]
    if len(found) > 1:
        raise CannotTell(f"{weight} may be {' or '.join(matrix.layout for matrix in found)}")
    if not found:
        raise CannotTell(_explain_unknown(checkpoint, weight))
    return found[0]


def _read_module(checkpoint: StoredTensors, weight: str, read: ReadBytes) -> QuantisedModule | None:
    """Return the module with a quantised weight; None if the weight is plain or not stored."""
    coded = find_codes(checkpoint, weight)
    if coded is None:
        return None
    reading = checkpoint.quantisation.get_reading(coded)
    shard = checkpoint.shards[checkpoint.weight_map[coded]]
    scale = reading.scale if coded == weight and reading.kind == "scaled" else None
    others = tuple(name for name in checkpoint.quantisation.list_others(weight) if name != coded)
    return QuantisedModule(weight, checkpoint.config, shard.metadata, checkpoint.infos, read, scale, others)


def find_codes(checkpoint: StoredTensors, weight: str) -> str | None:
    """Return the name of the tensor that stores the codes of a weight; None if the weight is plain or not stored."""
    for ending, rest in WEIGHT_ENDINGS:
        if weight.endswith(rest) and (name := weight.removesuffix(rest) + ending) in checkpoint.infos:
            return name
    if weight in checkpoint.infos and checkpoint.quantisation.get_reading(weight).kind in ("scaled", "unreadable"):
        return weight
    return None


def is_readable(checkpoint: StoredTensors, weight: str) -> bool:
    """Return True if a weight is quantised and its layout can be decided."""
    try:
        return find_matrix(checkpoint, weight) is not None
    except CannotTell:
        return False


def make_reader(checkpoint: StoredTensors) -> ReadBytes:
    """Return a function that reads the data of the tensors of a checkpoint: (name, first byte, bytes to read)."""

    def read(name: str, begin: int, size: int) -> bytes:
        shard = checkpoint.shards[checkpoint.weight_map[name]]
        return read_exactly(shard.file, size, shard.data_start + shard.tensors[name].data_offsets[0] + begin)

    return read


def _explain_unknown(checkpoint: StoredTensors, weight: str) -> str:
    """Explain why no layout describes a quantised weight."""
    coded = find_codes(checkpoint, weight) or weight
    return f"{coded} is quantised: {checkpoint.quantisation.get_reading(coded).reason}"


_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


def get_role(name: str) -> str:
    """Return a tensor's name with * for each number, such as "model.layers.*.mlp.down_proj.weight"."""
    return _NUMBER.sub("*", name)


def describe_headers(checkpoint: StoredTensors, weight: str) -> object:
    """Return the role of a weight, and the names, dtypes and shapes of the tensors of its module.

    Weights for which this is equal have the same layout, unless an author stored them in different ways on purpose.
    """
    module = weight.removesuffix(".weight")
    names = (find_codes(checkpoint, weight) or weight, *checkpoint.quantisation.list_others(weight))
    infos = [checkpoint.infos[name] for name in names if name in checkpoint.infos]
    return get_role(weight), tuple((info.name.removeprefix(module), info.dtype.name, info.shape) for info in infos)


def name_weight(name: str) -> str:
    """Return the name of the weight whose codes a tensor of this name would store, or `name` itself."""
    for ending, rest in _LEFT_OUT:
        if name.endswith(ending):
            return name.removesuffix(ending) + rest
    return name


class WeightShapes(Mapping[str, tuple[int, ...]]):
    """The shapes of the weights of a checkpoint, by name.

    A quantised weight has the name and the shape that it has in a loaded model, if its layout can be decided.
    The tensors that store its codes, and the scales of bitsandbytes, are then left out. All other tensors have their
    stored shapes. Looking up one name reads a few bytes of this one module. Iteration reads a few bytes of one module
    of each role, and takes the others with the same headers to be stored in the same way.
    """

    def __init__(self, checkpoint: StoredTensors):
        self._checkpoint = checkpoint
        self._found: dict[str, tuple[int, ...] | None] = {}
        self._alike: dict[object, bool] = {}

    def __getitem__(self, name: str) -> tuple[int, ...]:
        weight = name_weight(name)
        shape = self._read_shape(weight)
        if shape is None:
            shape = self._checkpoint.all_shapes.get(name)
        elif weight != name:
            shape = None
        if shape is None:
            raise KeyError(name)
        return shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _names(self) -> list[str]:
        listed = self._checkpoint.all_shapes
        return list(dict.fromkeys(name_weight(n) if self._is_readable(name_weight(n)) else n for n in listed))

    def _is_readable(self, weight: str) -> bool:
        """Return True if a weight is quantised and its layout can be decided, or that of a weight like it."""
        if find_codes(self._checkpoint, weight) is None:
            return False
        alike = describe_headers(self._checkpoint, weight)
        if alike not in self._alike:
            self._alike[alike] = self._read_shape(weight) is not None
        return self._alike[alike]

    def _read_shape(self, weight: str) -> tuple[int, ...] | None:
        """Return the shape of a quantised weight; None if it is not quantised, or if its layout cannot be decided."""
        if weight not in self._found:
            try:
                matrix = find_matrix(self._checkpoint, weight)
            except CannotTell:
                matrix = None
            self._found[weight] = None if matrix is None else matrix.shape
        return self._found[weight]
