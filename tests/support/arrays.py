"""Arrays of bit patterns of any floating-point dtype, and the plain values that oracles compute with."""

from __future__ import annotations

import math

import numpy as np

from swsurgery.rewriting.apply import Array, make_source
from swsurgery.rewriting.function import Source
from swsurgery.storage.arrays import decode_doubles, encode_doubles, find_not_finite, get_word_type
from swsurgery.storage.dtypes import DTYPES, Dtype

FLOATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


def draw_weights(name: str, shape: tuple[int, ...], seed: int = 0, outliers: int = 3) -> np.ndarray:
    """Bit patterns of normal weights with a standard deviation of about 0.5 and a few outliers."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.5, shape)
    flat = values.reshape(-1)
    places = rng.integers(0, max(flat.size, 1), min(outliers, flat.size))
    flat[places] = rng.choice([-1, 1], len(places)) * rng.uniform(4, 100, len(places))
    return encode_doubles(DTYPES[name], values)


def draw_patterns(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bit patterns of finite values, of every magnitude."""
    dtype = DTYPES[name]
    rng = np.random.default_rng(seed)
    words = rng.integers(0, (1 << dtype.bits) - 1, shape, np.uint64, endpoint=True).astype(get_word_type(dtype))
    words[find_not_finite(dtype, words)] = 0
    return words


def words_of(name: str, values: object) -> np.ndarray:
    """The bit patterns nearest to `values`."""
    return encode_doubles(DTYPES[name], np.array(values, np.float64))


def values_of(name: str, words: np.ndarray) -> np.ndarray:
    """The float64 values of bit patterns."""
    return decode_doubles(DTYPES[name], words)


def source_of(name: str, words: np.ndarray, kept: tuple[int, ...] = (), pieces: int | None = None) -> Source:
    """A source named "w" that is read in arrays of `pieces` scalars, in one buffer as files are."""
    dtype: Dtype = DTYPES[name]
    source = make_source("w", Array(dtype, words, kept))
    if pieces is None:
        return source
    flat = words.reshape(-1)

    def read():
        buffer = np.empty(pieces, flat.dtype)
        for begin in range(0, len(flat), pieces):
            part = flat[begin : begin + pieces]
            buffer[: len(part)] = part
            yield buffer[: len(part)]
            buffer[:] = 0  # nobody may use a piece after it asked for the next one

    return Source(source.name, source.dtype, source.shape, read, source.kept)


def list_groups(options: dict, shape: tuple[int, int]) -> list[np.ndarray]:
    """The flat indices of each group of a matrix."""
    flat = np.arange(math.prod(shape)).reshape(shape)
    if "block" in options:
        block = options["block"]
        rows, columns = block if isinstance(block, list) else (1, block)
    else:
        rows, columns = (1, shape[1]) if options.get("per") == "channel" else (max(shape[0], 1), shape[1])
    return [
        flat[r : r + rows, c : c + columns].reshape(-1)
        for r in range(0, shape[0], rows)
        for c in range(0, shape[1], columns)
    ]
