"""Set the scalars of largest magnitude to zero: the control experiment of arXiv:2411.07191 (table 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swsurgery.errors import NumberError, pluralise
from swsurgery.rewriting.function import CHUNK_SCALARS, Source
from swsurgery.rewriting.kept import KeptScalars
from swsurgery.rewriting.statistics import count_fraction, count_scalars, find_largest, read_pieces
from swsurgery.storage.arrays import (
    Words,
    decode_doubles,
    encode_doubles,
    find_magnitudes,
    get_word_type,
    require_float,
)
from swsurgery.storage.dtypes import Dtype, FloatDtype


class Cut(NamedTuple):
    """Which scalars of a source become zero.

    Those with a bit pattern of |w| above `magnitude`, and those equal to it up to the flat index `last`; -1 if none.
    """

    magnitude: int
    last: int = -1


@dataclass(frozen=True)
class PruneFunction:
    """Set the largest |w| of all sources together to zero: `count` of them, or `fraction` of all, rounded down.

    Among equal magnitudes, those of an earlier source and of a lower flat index become zero first. Protected scalars
    are neither counted nor changed.
    """

    count: int | None = None
    fraction: float | None = None
    cuts: Mapping[str, Cut] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sparse(self) -> bool:
        """True: most scalars keep their bits."""
        return True

    def find_height(self, shape: Sequence[int]) -> int:
        """Return 1: every scalar is independent of the others once the sources are measured."""
        return 1

    def measure(self, sources: Sequence[Source]) -> PruneFunction:
        """Return the function with the threshold of each source.

        Raises NumberError if a scalar is NaN or infinite, and if no scalar would remain.
        """
        total = sum(map(count_scalars, sources))
        if self.count is not None:
            count = self.count
        else:
            assert self.fraction is not None
            count = count_fraction(self.fraction, total)
        if count >= total:
            where = sources[0].name if len(sources) == 1 else f"{len(sources)} tensors"
            raise NumberError(f"pruning {count} of {pluralise(total, 'scalar')} removes everything", where)
        if not count:
            largest = {s.name: Cut(require_float(s.dtype, s.name).largest) for s in sources}
            return replace(self, cuts=largest)
        threshold = find_largest(sources, [count - 1])[0]
        cuts, equal = {}, []
        for source in sources:
            dtype = require_float(source.dtype, source.name)
            magnitude, exact = _round_down(dtype, threshold)
            cuts[source.name] = Cut(magnitude)
            count -= _count_larger(source, magnitude)
            if exact:
                equal.append(source)
        for source in equal:
            if not count:
                break
            cut = cuts[source.name]
            found, last = _find_equal(source, cut.magnitude, count)
            cuts[source.name] = cut._replace(last=last)
            count -= found
        return replace(self, cuts=cuts)

    def compute(self, name: str, dtype: Dtype, row: int, words: Words, out: Words | None = None) -> Words:
        """Return the block with its outliers set to zero."""
        floating = require_float(dtype, name)
        cut = self.cuts[name]
        flat = words.reshape(-1)
        magnitudes = find_magnitudes(floating, flat)
        pruned = magnitudes > cut.magnitude
        before = min(max(cut.last + 1 - row * words.shape[1], 0), flat.size)
        pruned[:before] |= magnitudes[:before] == cut.magnitude
        if out is None:
            out = words.copy()
        elif out is not words:
            np.copyto(out, words)
        out[pruned.reshape(words.shape)] = 0
        return out


def _read_marked(source: Source, mark: Callable[[Words], NDArray[np.bool_]]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield (first flat index, mark of the bit patterns of |w|) of pieces; protected scalars are not marked."""
    dtype = require_float(source.dtype, source.name)
    kept = KeptScalars.of_sources([source])
    for first, words in read_pieces(source, CHUNK_SCALARS):
        marked = mark(find_magnitudes(dtype, words))
        marked[kept.find(source.name, first, len(words))] = False
        yield first, marked


def _round_down(dtype: FloatDtype, threshold: float) -> tuple[int, bool]:
    """Return the bit pattern of the largest magnitude of the dtype up to `threshold`, and True if they are equal."""
    largest = float(decode_doubles(dtype, np.array([dtype.largest], get_word_type(dtype)))[0])
    words = encode_doubles(dtype, np.array([min(threshold, largest)]))
    value = float(decode_doubles(dtype, words)[0])
    return int(words[0]) - (value > threshold), value == threshold


def _count_larger(source: Source, magnitude: int) -> int:
    """Count the scalars whose |w| has a larger bit pattern than `magnitude`."""
    return sum(int(np.count_nonzero(m)) for _, m in _read_marked(source, lambda words: words > magnitude))


def _find_equal(source: Source, magnitude: int, count: int) -> tuple[int, int]:
    """Find the first `count` scalars whose |w| has the bit pattern `magnitude`.

    Returns their number, which is smaller if the source has fewer, and the flat index of the last one.
    """
    found, last = 0, -1
    for first, equal in _read_marked(source, lambda words: words == magnitude):
        places = np.flatnonzero(equal)[: count - found]
        if len(places):
            found += len(places)
            last = first + int(places[-1])
        if found == count:
            break
    return found, last
