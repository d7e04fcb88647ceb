"""Read matrices of GGUF files: blocks of elements that share scales, as llama.cpp stores them.

The package `gguf` computes all values. This module knows where the bits of one code are in a block. To get the value of
a code, it puts the code into a copy of the block and lets the package dequantise the copy. A test compares the places
of the bits with the package for every type. In the types of `_FORMS`, each element has a code of its own. In the other
types, a code stands for several elements, so such an element has a value but no grid.

Source of the places of the bits: ggml/src/ggml-quants.c of llama.cpp, functions `dequantize_row_*`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swsurgery.checkpoint.layouts.cells import BitField, CannotTell, Cell
from swsurgery.checkpoint.layouts.module import ModuleTensor, QuantisedModule
from swsurgery.errors import CheckpointError
from swsurgery.storage.arrays import Doubles, Singles
from swsurgery.storage.ggml import BlockDtype

Blocks = NDArray[np.uint8]
"""The bytes of blocks, [number of blocks, bytes of a block]."""

Bits = tuple[tuple[int, int], ...]
"""The bits of a code in its block, the least significant first: (number of the first bit, number of bits)."""


@dataclass(frozen=True)
class _Form:
    """How a type stores the codes of its elements.

    `find_bits` returns the bits of the code of the element at a position in its block. `step` is (first code, second
    code, distance): the values of the two codes differ by `distance` times the scale.
    """

    find_bits: Callable[[int], Bits]
    step: tuple[int, int, int] = (0, 1, 1)


def _find_nibble(first: int, half: int, at: int) -> tuple[int, int]:
    """Find 4 bits. Groups of `half` bytes store 2 * `half` elements: first all low nibbles, then all high ones."""
    group, rest = divmod(at, 2 * half)
    return 8 * (first + group * half + rest % half) + 4 * (rest // half), 4


def _find_pair(first: int, at: int) -> tuple[int, int]:
    """Find 2 bits. Groups of 32 bytes store 128 elements: the lowest two bits of all bytes, then the next two."""
    group, rest = divmod(at, 128)
    return 8 * (first + group * 32 + rest % 32) + 2 * (rest // 32), 2


def _find_bit(first: int, at: int) -> tuple[int, int]:
    """Find 1 bit. 32 bytes store 256 elements: the lowest bit of all bytes, then the next bit."""
    return 8 * (first + at % 32) + at // 32, 1


_E2M1_STEP, _NL_STEP = (0, 2, 1), (7, 8, 11)
"""Codes 0 and 2 of E2M1 have the values 0 and 1. Codes 7 and 8 of IQ4_NL have the values -10 and 1."""

_FORMS = {
    "Q8_0": _Form(lambda at: ((8 * (2 + at), 8),)),
    "Q4_0": _Form(lambda at: (_find_nibble(2, 16, at),)),
    "Q4_1": _Form(lambda at: (_find_nibble(4, 16, at),)),
    "Q5_0": _Form(lambda at: (_find_nibble(6, 16, at), (8 * 2 + at, 1))),
    "Q5_1": _Form(lambda at: (_find_nibble(8, 16, at), (8 * 4 + at, 1))),
    "Q2_K": _Form(lambda at: (_find_pair(16, at),)),
    "Q3_K": _Form(lambda at: (_find_pair(32, at), _find_bit(0, at))),
    "Q4_K": _Form(lambda at: (_find_nibble(16, 32, at),)),
    "Q5_K": _Form(lambda at: (_find_nibble(48, 32, at), _find_bit(16, at))),
    "Q6_K": _Form(lambda at: (_find_nibble(0, 64, at), _find_pair(128, at))),
    "MXFP4": _Form(lambda at: (_find_nibble(1, 16, at),), _E2M1_STEP),
    "NVFP4": _Form(lambda at: (_find_nibble(4, 8, at),), _E2M1_STEP),
    "IQ4_NL": _Form(lambda at: (_find_nibble(2, 16, at),), _NL_STEP),
    "IQ4_XS": _Form(lambda at: (_find_nibble(8, 16, at),), _NL_STEP),
    "TQ2_0": _Form(lambda at: (_find_pair(0, at),)),
}
"""The types in which each element has a code of its own."""


@dataclass(frozen=True)
class GgufMatrix:
    """A matrix, or a stack of matrices, of a GGUF file. `codes` is the tensor with the blocks; `dtype` is its type."""

    codes: ModuleTensor
    dtype: BlockDtype

    @property
    def layout(self) -> str:
        """Name of the layout, such as "GGUF Q4_K"."""
        return f"GGUF {self.dtype.name}"

    @property
    def weight(self) -> str:
        """Name of the weight: the name of the tensor in the file."""
        return self.codes.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.shape

    def find_cell(self, index: tuple[int, ...]) -> Cell:
        number, at = divmod(self.codes.info.flatten(index), self.dtype.block)
        size = self.dtype.block_size
        block = np.frombuffer(self.codes.read(self.codes.name, number * size, size), np.uint8)
        form = _FORMS.get(self.dtype.name)
        if form is None:
            refusal = f"{self.dtype.name} stores one code for several elements, so no single element has a code"
            return Cell((), self._dequantise_blocks(block[None])[:, at].tolist(), 1.0, refusal)
        bits = form.find_bits(at)
        values = self._dequantise_blocks(_put_all_codes(block, bits))[:, at].tolist()
        low, high, distance = form.step
        fields = tuple(BitField(self.codes.name, 8 * number * size + start, width) for start, width in bits)
        return Cell(fields, values, (values[high] - values[low]) / distance)

    def dequantise(self, begin: int, end: int) -> Doubles:
        cols = self.shape[-1]
        row = cols // self.dtype.block * self.dtype.block_size
        data = self.codes.read(self.codes.name, begin * row, (end - begin) * row)
        blocks = np.frombuffer(data, np.uint8).reshape(-1, self.dtype.block_size)
        return self._dequantise_blocks(blocks).reshape(end - begin, cols)

    def _dequantise_blocks(self, blocks: Blocks) -> Doubles:
        """Return the values of blocks as float64 [number of blocks, elements of a block]. Raises CannotTell."""
        if not len(blocks):
            return np.empty((0, self.dtype.block))
        dequantise = _load_package()
        try:
            with np.errstate(all="ignore"):  # an infinite or NaN scale makes the values infinite or NaN
                values = dequantise(blocks, self.dtype.name)
        except (KeyError, NotImplementedError):
            raise CannotTell(f"the installed package gguf cannot dequantise the type {self.dtype.name}") from None
        return np.asarray(values, np.float64).reshape(len(blocks), self.dtype.block)


def find_gguf(module: QuantisedModule) -> GgufMatrix | None:
    """Recognise a matrix of a GGUF file by the type of its tensor.

    Raises CannotTell if a scale is stored beside the matrix, as for some ternary models and NVFP4.
    """
    info = module.tensors.get(module.weight)
    if info is None or not isinstance(info.dtype, BlockDtype):
        return None
    if (scale := module.find(".scale")) is not None:
        raise CannotTell(f"{scale.name} is stored beside {module.weight}, and may multiply its elements")
    return GgufMatrix(ModuleTensor(info, module.read), info.dtype)


def _put_all_codes(block: Blocks, bits: Bits) -> Blocks:
    """Return one copy of a block for each code, in the order of the codes, with this code stored in `bits`."""
    places = np.concatenate([np.arange(start, start + width) for start, width in bits])
    codes = np.arange(1 << len(places))
    copies = np.tile(np.unpackbits(block, bitorder="little"), (len(codes), 1))
    copies[:, places] = codes[:, None] >> np.arange(len(places)) & 1
    return np.packbits(copies, axis=1, bitorder="little")


def _load_package() -> Callable[[Blocks, str], Singles]:
    """Return the function of the package gguf that dequantises blocks of the type with a given name.

    Raises CheckpointError if the package is not installed. The function raises KeyError for an unknown name, and
    NotImplementedError for a type that the package does not dequantise.
    """
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        what = "the package gguf, which computes the values of a GGUF file, cannot be imported"
        raise CheckpointError(what, error, "run pip install 'swsurgery[gguf]'") from None
    return lambda blocks, name: dequantize(blocks, GGMLQuantizationType[name])
