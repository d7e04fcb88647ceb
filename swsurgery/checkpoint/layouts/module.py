"""Define what a layout may look at: the config, and the tensors that are stored for one module."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from swsurgery.checkpoint.layouts.cells import CannotTell, Cell, ReadBytes
from swsurgery.storage.arrays import Doubles, Words, decode_doubles, get_word_type
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import FloatDtype, decode
from swsurgery.storage.shard import TensorInfo

_ACTIVATIONS = re.compile(
    r"\.((input|output|[qkv]|kv)_(global_)?(scale|zero_point)|activation_scale|scale_input|weight_format)|_bias"
)
"""The pattern of endings of names of tensors that do not change the value of the weight beside them."""


@dataclass(frozen=True)
class ModuleTensor:
    """One stored tensor: its header entry, and a function that reads its data."""

    info: TensorInfo
    read: ReadBytes

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def dtype(self) -> str:
        """Name of the dtype, such as "I32"."""
        return self.info.dtype.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.info.shape)

    def read_number(self, index: tuple[int, ...]) -> float:
        """Read one element as a number. Raises CannotTell if the dtype stores no numbers, or the number is not finite.

        F8_E8M0 is read as a power of two.
        """
        size = self.info.dtype.size
        data = self.read(self.name, self.info.flatten(index) * size, size)
        if self.dtype == "F8_E8M0":
            value = decode_exponent(data[0])
        elif self.info.dtype.kind == "opaque":
            raise CannotTell(f"{self.name} is stored as {self.dtype}, which is not a number")
        else:
            value = float(decode(self.info.dtype, data))
        if not math.isfinite(value):
            raise CannotTell(f"{self.name} contains {value}, which is not finite")
        return value

    def read_words(self, begin: int, end: int) -> Words:
        """Read the elements `begin` to `end` (excluded) in row-major order as unsigned bit patterns [end - begin]."""
        word = get_word_type(self.info.dtype)
        return np.frombuffer(self.read(self.name, begin * word.itemsize, (end - begin) * word.itemsize), word)

    def read_numbers(self, begin: int, end: int) -> Doubles:
        """Read the elements `begin` to `end` (excluded) in row-major order as float64 [end - begin]."""
        words = self.read_words(begin, end)
        dtype = self.info.dtype
        if isinstance(dtype, FloatDtype):
            return decode_doubles(dtype, words)
        if self.dtype == "F8_E8M0":
            return np.ldexp(1.0, words.astype(np.int32) - 127) + np.where(words == 255, np.nan, 0.0)
        signed = words.view(f"<i{dtype.size}") if dtype.kind == "int" else words
        return signed.astype(np.float64)


def decode_exponent(byte: int) -> float:
    """Return the power of two that an E8M0 byte encodes (OCP Microscaling Formats 1.0, section 5.4.1); NaN for 255."""
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


def list_elements(cell: Cell, infos: Mapping[str, TensorInfo]) -> list[Coordinate]:
    """List the stored numbers that contain bits of the code of `cell`. In a tensor of blocks, these are bytes.

    `infos` are the headers of all stored tensors.
    """
    places: dict[Coordinate, None] = {}
    for bits in cell.fields:
        info = infos[bits.tensor].stored
        first, last = bits.start // info.dtype.bits, (bits.start + bits.width - 1) // info.dtype.bits
        places |= {Coordinate(bits.tensor, info.unflatten(n)): None for n in range(first, last + 1)}
    return list(places)


@dataclass(frozen=True)
class QuantisedModule:
    """A module with a quantised weight, with all that a layout may read.

    `weight` is the name that the weight has in a loaded model, such as "model.layers.2.mlp.down_proj.weight" or
    "model.layers.2.mlp.experts.down_proj". `config` is config.json, and `metadata` the metadata of the shard with the
    module. `tensors` are the headers of all stored tensors. `scale` is the name of the tensor that multiplies the
    weight, if checkpoint/quantised.py recognises one. `others` are the names of all other tensors of the module except
    its bias.
    """

    weight: str
    config: Mapping[str, object]
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    read: ReadBytes
    scale: str | None = None
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the module: the name of the weight without ".weight"."""
        return self.weight.removesuffix(".weight")

    @property
    def quantisation(self) -> Mapping[str, object]:
        """The section of config.json that declares quantisation, at the top level or below; empty if there is none.

        Raises CannotTell if there are several sections that differ.
        """
        sections = [self.config, *(v for v in self.config.values() if isinstance(v, Mapping))]
        keys = ("quantization_config", "compression_config")
        found = [section[key] for section in sections for key in keys if isinstance(section.get(key), Mapping)]
        if any(each != found[0] for each in found):
            raise CannotTell("config.json declares quantisation in several places, which differ")
        return found[0] if found else {}

    @property
    def method(self) -> str:
        """The quantisation method that config.json declares, such as "gptq"; "" if it declares none."""
        method = self.quantisation.get("quant_method")
        return method if isinstance(method, str) else ""

    def refuse_others(self, endings: Collection[str]) -> None:
        """Raise CannotTell if the module has a tensor whose ending is not in `endings` and that may change the weight.

        Scales of activations do not change it.
        """
        for name in self.others:
            ending = name.removeprefix(self.name)
            if ending not in endings and not _ACTIVATIONS.fullmatch(ending):
                raise CannotTell(f"{name} is stored too, and may change what the codes mean")

    def find(self, ending: str) -> ModuleTensor | None:
        """Return the tensor with the module's name and `ending`, such as ".weight_packed"; None if it is not stored."""
        info = self.tensors.get(self.name + ending)
        return None if info is None else ModuleTensor(info, self.read)

    def require(self, ending: str) -> ModuleTensor:
        """Return the tensor with the module's name and `ending`. Raises CannotTell if it is not stored."""
        found = self.find(ending)
        if found is None:
            raise CannotTell(f"{self.name}{ending} is not stored")
        return found
