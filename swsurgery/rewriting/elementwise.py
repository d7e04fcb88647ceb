"""Zero, scale and set the scalars of a region."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swsurgery.errors import NumberError, pluralise
from swsurgery.rewriting.function import CHUNK_SCALARS, ScalarwiseFunction, Source
from swsurgery.rewriting.kept import KeptScalars
from swsurgery.rewriting.statistics import read_pieces
from swsurgery.storage import dtypes
from swsurgery.storage.arrays import Words, get_word_type, require_float
from swsurgery.storage.dtypes import Dtype, FloatDtype


@dataclass(frozen=True)
class ZeroFunction(ScalarwiseFunction):
    """Set all bits to zero."""

    def measure(self, sources: Sequence[Source]) -> ZeroFunction:
        """Return the function itself. Raises NumberError for a dtype without a zero."""
        _check(dtypes.make_zero, sources)
        return self

    def compute(self, name: str, dtype: Dtype, row: int, words: Words, out: Words | None = None) -> Words:
        """Return zeros. Raises NumberError for a dtype without a zero."""
        return _fill(dtypes.make_zero(dtype), dtype, words, out)


@dataclass(frozen=True)
class SetFunction(ScalarwiseFunction):
    """Store `value`, rounded once to the stored dtype, or `bits` such as "0x40bc" as they are."""

    value: dtypes.Value | None = None
    bits: str | None = None

    def measure(self, sources: Sequence[Source]) -> SetFunction:
        """Return the function itself. Raises NumberError for a dtype that cannot represent the value."""
        _check(self._encode, sources)
        return self

    def compute(self, name: str, dtype: Dtype, row: int, words: Words, out: Words | None = None) -> Words:
        """Return the value in every scalar. Raises NumberError if the dtype cannot represent it."""
        return _fill(self._encode(dtype), dtype, words, out)

    def _encode(self, dtype: Dtype) -> bytes:
        if self.bits is None:
            assert self.value is not None
            return dtypes.encode(dtype, self.value)
        data = dtypes.parse_bits(dtype, self.bits)
        value = dtypes.decode(dtype, data)
        if value != value or value in (float("inf"), float("-inf")):
            raise NumberError(f"{self.bits} is {value} in {dtype.name}", remedy="only finite values are set")
        return data


_UNKNOWN, _GOOD, _BAD = 0, 1, 2


@dataclass
class _Table:
    """The scaled bit patterns of a dtype of 8 or 16 bits, computed when they first occur.

    Threads may share a table: they write equal entries, and the state of an entry after its value.
    """

    words: Words
    states: NDArray[np.uint8]
    refusals: dict[int, NumberError] = field(default_factory=dict)


@dataclass(frozen=True)
class ScaleFunction(ScalarwiseFunction):
    """Multiply by the float64 `factor`: the exact product, rounded once to the stored dtype, half to even.

    An overflow, an underflow to zero and a stored value that is not finite are errors, as in
    `storage.dtypes.scale_value`, which defines the result of every scalar.
    """

    factor: float
    kept: KeptScalars = field(default_factory=KeptScalars, repr=False, compare=False)
    _tables: dict[str, _Table] = field(default_factory=dict, repr=False, compare=False)

    def measure(self, sources: Sequence[Source]) -> ScaleFunction:
        """Scale all sources, and return the function with their protected scalars.

        Raises NumberError if products cannot be represented, with their number and the first index.
        """
        function = ScaleFunction(self.factor, KeptScalars.of_sources(sources), self._tables)
        for source in sources:
            dtype = require_float(source.dtype, source.name)
            function._raise_for(source.name, _Refused.join(function._find_refused(source, dtype)))
        return function

    def compute(self, name: str, dtype: Dtype, row: int, words: Words, out: Words | None = None) -> Words:
        """Return the products. Raises NumberError if some of them cannot be represented."""
        first, number = row * words.shape[1], require_float(dtype, name)
        new, refused = self._scale(number, words.reshape(-1))
        if len(refused.places):
            kept = self.kept.find(name, first, words.size)
            self._raise_for(name, self._leave_out(kept, refused, number, words.reshape(-1)).move(first))
        new = new.reshape(words.shape)
        if out is None:
            return new
        np.copyto(out, new)
        return out

    def _find_refused(self, source: Source, dtype: FloatDtype) -> Iterator[_Refused]:
        for first, words in read_pieces(source, CHUNK_SCALARS):
            refused = self._scale(dtype, words)[1]
            if len(refused.places):
                kept = self.kept.find(source.name, first, len(words))
                yield self._leave_out(kept, refused, dtype, words).move(first)

    def _leave_out(self, kept: NDArray[np.int64], refused: _Refused, dtype: FloatDtype, words: Words) -> _Refused:
        """Leave out the protected scalars `kept`; the error becomes that of the first scalar that remains."""
        if not len(kept):
            return refused
        places = np.setdiff1d(refused.places, kept)
        return self._scale(dtype, words[places])[1].replace_places(places)

    def _raise_for(self, name: str, refused: _Refused) -> None:
        if len(refused.places):
            index = self.kept.format_index(name, int(refused.places[0]))
            what = f"{pluralise(len(refused.places), 'scalar')} of {name} cannot be scaled by {self.factor:g}"
            raise NumberError(f"{what}; the first, {index}: {refused.error}")

    def _scale(self, dtype: FloatDtype, words: Words) -> tuple[Words, _Refused]:
        """Scale a flat array, and find the places of the scalars that cannot be scaled."""
        if dtype.bits <= 16:
            return self._look_up(dtype, words)
        with np.errstate(all="ignore"):
            new, hard = (_scale_float32 if dtype.bits == 32 else _scale_float64)(words, self.factor)
        places, error = [], None
        for place in np.flatnonzero(hard).tolist():
            try:
                product = dtypes.scale_value(dtype, words[place].tobytes(), self.factor)
                new[place] = int.from_bytes(product, "little")
            except NumberError as refusal:
                error = error or refusal
                places.append(place)
        return new, _Refused(np.array(places, np.int64), error)

    def _look_up(self, dtype: FloatDtype, words: Words) -> tuple[Words, _Refused]:
        table = self._tables.get(dtype.name)
        if table is None:
            size = 1 << dtype.bits
            table = _Table(np.zeros(size, get_word_type(dtype)), np.zeros(size, np.uint8))
            table = self._tables.setdefault(dtype.name, table)
        states = np.take(table.states, words, mode="wrap")
        if not states.all():
            for bits in np.unique(words[states == _UNKNOWN]).tolist():
                self._add(dtype, table, bits)
            states = np.take(table.states, words, mode="wrap")
        new = np.take(table.words, words, mode="wrap")
        if states.max(initial=_GOOD) == _GOOD:
            return new, _NOTHING_REFUSED
        places = np.flatnonzero(states == _BAD)
        return new, _Refused(places, table.refusals[int(words[places[0]])])

    def _add(self, dtype: FloatDtype, table: _Table, bits: int) -> None:
        try:
            product = dtypes.scale_value(dtype, bits.to_bytes(dtype.size, "little"), self.factor)
        except NumberError as refusal:
            table.refusals[bits] = refusal
            table.states[bits] = _BAD
        else:
            table.words[bits] = int.from_bytes(product, "little")
            table.states[bits] = _GOOD


@dataclass(frozen=True)
class _Refused:
    """The places of scalars that cannot be scaled, in rising order, and the error of the first one."""

    places: NDArray[np.int64]
    error: NumberError | None = None

    @classmethod
    def join(cls, parts: Iterator[_Refused]) -> _Refused:
        given = [part for part in parts if len(part.places)]
        return cls(np.concatenate([part.places for part in given]), given[0].error) if given else _NOTHING_REFUSED

    def replace_places(self, places: NDArray[np.int64]) -> _Refused:
        return _Refused(places, self.error)

    def move(self, first: int) -> _Refused:
        return _Refused(self.places + first, self.error)


_NOTHING_REFUSED = _Refused(np.empty(0, np.int64))


def _scale_float32(words: Words, factor: float) -> tuple[Words, NDArray[np.bool_]]:
    """Scale F32 scalars, and mark those that need exact arithmetic.

    The float64 product is rounded twice, first to float64 and then to float32. This differs from one rounding only if
    the float64 product is half-way between two float32 values. Results that are not normal numbers are also marked.
    """
    product = words.view(np.float32).astype(np.float64)
    zero = product == 0
    product *= factor
    new = product.astype(np.float32)
    half_way = (product.view(np.uint64) & np.uint64((1 << 29) - 1)) == 1 << 28
    magnitude = np.abs(new)
    normal = (magnitude >= np.finfo(np.float32).tiny) & (magnitude <= np.finfo(np.float32).max)
    return new.view(np.uint32), ~(normal | zero) | half_way


def _scale_float64(words: Words, factor: float) -> tuple[Words, NDArray[np.bool_]]:
    """Scale F64 scalars: a float64 product is rounded once. Marks results that are not normal numbers."""
    values = words.view(np.float64)
    new = values * factor
    magnitude = np.abs(new)
    normal = (magnitude >= np.finfo(np.float64).tiny) & (magnitude <= np.finfo(np.float64).max)
    return new.view(np.uint64), ~(normal | (values == 0))


def _check(encode: Callable[[Dtype], bytes], sources: Sequence[Source]) -> None:
    """Encode a constant for the dtype of every source. Raises NumberError, with the source, for one that refuses it."""
    for source in sources:
        try:
            encode(source.dtype)
        except NumberError as error:
            raise NumberError(str(error), source.name) from error


def _fill(data: bytes, dtype: Dtype, words: Words, out: Words | None) -> Words:
    if out is None:
        out = np.empty(words.shape, get_word_type(dtype))
    out[...] = int.from_bytes(data, "little")
    return out
