"""Compute one score per neuron from stored bytes: how much it can add to the residual stream.

The matrices of an MLP are read in chunks of a few MB into reused buffers, so memory use does not depend on the size of
a layer. Each chunk is processed while it is in the processor's cache. This module must not import torch, because a scan
of 13.5 GB takes about as long as importing torch. by_weights.py finds the matrices of each MLP and decides which scores
are outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from swsurgery.scanning.blocks import SCORE_BLOCK, BlockReader, Matrix, Workspace, count_chunk_rows, split_range
from swsurgery.storage.dtypes import DTYPES, Dtype, decode

Numbers = NDArray[np.floating | np.unsignedinteger]

BOOST = 120
"""Exponent of the power of two that multiplies the weights of dot products with F16 matrices. Without it, the products
would be too small for float32, because `_widen` returns 2**-112 times each F16 value."""


class ScoreSide(NamedTuple):
    """The gate or up weights of an MLP. Neuron i is at index first + i * step on the neuron axis of the matrix."""

    matrix: Matrix
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class Mlp:
    """One MLP or expert: the input matrices `gate` and `up` and the down projection `down` of its `neurons`.

    `axis` is 0 if the input matrices are [neuron, channel] and the down projection is [channel, neuron], and 1 if both
    are transposed. `gate` and `up` are equal if the MLP has no gate. `gain`: (channels,) float64, the squared gain of
    the norm before the MLP. `behind`: (channels,) float32, the magnitudes of the gain of the norm after the down
    projection, or None.
    """

    neurons: int
    axis: Literal[0, 1]
    gate: ScoreSide
    up: ScoreSide
    down: Matrix
    gain: NDArray[np.float64]
    behind: NDArray[np.float32] | None = None

    @property
    def sources(self) -> tuple[ScoreSide, ...]:
        """The input matrices to read: `gate` alone if reading it also reads `up`, and both otherwise."""
        both = self.gate != self.up and (self.axis == 0 or self.gate.matrix != self.up.matrix)
        return (self.gate, self.up) if both else (self.gate,)

    @property
    def size(self) -> int:
        """Number of bytes that are read to score the neurons of the MLP."""
        rows = self.neurons if self.axis == 0 else self.gate.matrix.rows
        return rows * sum(side.matrix.row_bytes for side in self.sources) + self.down.size


class NeuronScores(NamedTuple):
    """The two factors whose product is the score of each neuron of an MLP.

    `dots`: (neurons,) float32, the sum of mlp.gain * gate * up over the channels. `peaks`: (neurons,) float32, the
    largest magnitude in each neuron's column of the down projection. If a norm follows the MLP, the magnitudes are
    multiplied by its gain first.
    """

    mlp: Mlp
    dots: NDArray[np.float32]
    peaks: NDArray[np.float32]


class _Sums:
    """The dot products and the largest magnitudes of the neurons of one MLP, over the rows read so far.

    `peaks` contains bit patterns of the stored dtype, or float32 values if the gain of a norm after the MLP multiplies
    them.
    """

    def __init__(self, mlp: Mlp):
        self.mlp = mlp
        self.dots = np.zeros(mlp.neurons)
        self.peaks = np.zeros(mlp.neurons, f"<u{mlp.down.dtype.size}" if mlp.behind is None else np.float32)

    def scores(self) -> NeuronScores:
        with np.errstate(over="ignore"):  # a value that overflows becomes infinite and is excluded later
            peaks = convert_patterns(self.peaks, self.mlp.down.dtype) if self.mlp.behind is None else self.peaks
            return NeuronScores(self.mlp, self.dots.astype(np.float32), peaks)


class _Part(NamedTuple):
    """A task: rows [first, end) of the input matrices of an MLP if `inputs` is True, else of its down projection.

    `last` is True for the last part of an MLP.
    """

    sums: _Sums
    inputs: bool
    first: int
    end: int
    last: bool = False


def score_neurons(reader: BlockReader, mlps: Iterable[Mlp], advance: Callable[[int], None]) -> Iterator[NeuronScores]:
    """Yield the scores of each MLP, in the order of `mlps`. After each chunk, call `advance` with its size in bytes.

    No matrix of an MLP may be empty. With any number of threads, sums are added in the order of the file, so repeated
    scans give exactly the same scores. Raises ShardError.
    """
    for part, (place, values, size) in reader.map(partial(_compute, reader), _split_mlps(reader, mlps)):
        sums = part.sums
        if part.inputs:
            sums.dots[place] += values
        else:
            np.maximum(sums.peaks[place], values, out=sums.peaks[place])
        advance(size)
        if part.last:
            yield sums.scores()


def read_columns(reader: BlockReader, mlp: Mlp, cols: Sequence[int]) -> NDArray[np.float32]:
    """Read the magnitudes in the columns `cols` of the down projection: (channels, len(cols)), float32."""

    def some_rows(space: Workspace, rows: tuple[int, int]) -> NDArray[np.unsignedinteger]:
        found = _clear_signs(reader.read_rows(space, 0, mlp.down, *rows))
        return found[:, list(cols)] if mlp.axis == 0 else found.T.copy()  # a copy, because the buffer is reused

    if mlp.axis == 0:
        parts = [part for _, part in reader.map(some_rows, mlp.down.split_rows())]
        return convert_patterns(np.concatenate(parts, axis=0), mlp.down.dtype)
    parts = [part for _, part in reader.map(some_rows, [(col, col + 1) for col in cols])]
    return convert_patterns(np.concatenate(parts, axis=1), mlp.down.dtype)


def count_ranks(reader: BlockReader, matrix: Matrix, magnitudes: Sequence[float]) -> list[int]:
    """Compute the rank of each of `magnitudes` in the matrix: 1 plus the number of larger magnitudes."""

    def larger(space: Workspace, rows: tuple[int, int]) -> list[int]:
        stored = convert_patterns(_clear_signs(reader.read_rows(space, 0, matrix, *rows)), matrix.dtype)
        return [int(np.count_nonzero(stored > np.float32(magnitude))) for magnitude in magnitudes]

    counts = [count for _, count in reader.map(larger, matrix.split_rows())]
    return [1 + sum(column) for column in zip(*counts, strict=True)]


def convert_patterns(patterns: NDArray[np.unsignedinteger], dtype: Dtype) -> NDArray[np.float32]:
    """Convert stored bit patterns to an array of float32 of the same shape.

    F64 values beyond the range of float32 become infinite. F16 infinities and NaN become positive infinity.
    """
    values = np.empty(patterns.shape, np.float32)
    with np.errstate(over="ignore"):
        _widen(patterns, dtype, values)
        values *= np.float32(2.0 ** _get_missing_exponent(dtype))
    if dtype.name == "F16":
        values[np.abs(values) >= 65536] = np.inf  # `_widen` converts infinity and NaN to large numbers
    return values


def _split_mlps(reader: BlockReader, mlps: Iterable[Mlp]) -> Iterator[_Part]:
    for mlp in mlps:
        reader.open((mlp.gate.matrix, mlp.up.matrix, mlp.down))
        sums = _Sums(mlp)
        rows = mlp.neurons if mlp.axis == 0 else mlp.gate.matrix.rows
        for first, end in split_range(rows, count_chunk_rows(mlp.gate.matrix)):
            yield _Part(sums, True, first, end)
        for first, end in mlp.down.split_rows():
            yield _Part(sums, False, first, end, last=end == mlp.down.rows)


def _compute(reader: BlockReader, space: Workspace, part: _Part) -> tuple[slice, Numbers, int]:
    """Compute what one part contributes to the sums of its MLP.

    Returns a slice of the neurons, a value for the `dots` or `peaks` of each of them, and the number of bytes read.
    """
    mlp, rows = part.sums.mlp, (part.first, part.end)
    if part.inputs:
        return (_score_neuron_rows if mlp.axis == 0 else _score_channel_rows)(reader, space, mlp, *rows)
    stored = reader.read_rows(space, 0, mlp.down, *rows)
    steps = list(split_range(len(stored), max(1, 4 * SCORE_BLOCK // stored.shape[1])))
    peaks = [
        _apply_gain(_clear_signs(stored[i:j]), mlp, part.first + i, part.first + j).max(axis=mlp.axis) for i, j in steps
    ]
    if mlp.axis == 1:
        return slice(*rows), np.concatenate(peaks), stored.nbytes
    return slice(None), np.maximum.reduce(peaks), stored.nbytes


def _apply_gain(magnitudes: NDArray[np.unsignedinteger], mlp: Mlp, first: int, end: int) -> Numbers:
    """Multiply the magnitudes in rows [first, end) of the down projection by the gain of the norm after the MLP.

    Returns float32 values. If no norm follows the MLP, returns the bit patterns unchanged.
    """
    if mlp.behind is None:
        return magnitudes
    gain = mlp.behind[first:end, None] if mlp.axis == 0 else mlp.behind
    with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are excluded and counted later
        return convert_patterns(magnitudes, mlp.down.dtype) * gain


def _clear_signs(stored: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """Clear the sign bit of each bit pattern, in place.

    The resulting integers have the same order as the magnitudes, and numpy finds a maximum of integers faster than a
    maximum of floats.
    """
    np.bitwise_and(stored, stored.dtype.type((1 << (8 * stored.itemsize - 1)) - 1), out=stored)
    return stored


def _score_neuron_rows(
    reader: BlockReader, space: Workspace, mlp: Mlp, first: int, end: int
) -> tuple[slice, Numbers, int]:
    """Compute the dot products of neurons [first, end), from input matrices [neuron, channel].

    Returns the same as `_compute`.
    """
    stored = [
        reader.read_rows(space, which, side.matrix, side.first + first, side.first + end)
        for which, side in enumerate(mlp.sources)
    ]
    channels = mlp.gate.matrix.cols
    weights, factor = _scale_gain(mlp)
    dots = np.empty(end - first, np.float32)
    for i, j in split_range(end - first, max(1, SCORE_BLOCK // channels)):
        gate, up = space.take_block(0, j - i, channels), space.take_block(1, j - i, channels)
        _widen(stored[0][i:j], mlp.gate.matrix.dtype, gate)
        if len(stored) > 1:
            _widen(stored[1][i:j], mlp.up.matrix.dtype, up)
        np.multiply(up if len(stored) > 1 else gate, weights, out=up)
        np.vecdot(gate, up, out=dots[i:j])
    return slice(first, end), dots * factor, sum(rows.nbytes for rows in stored)


def _score_channel_rows(
    reader: BlockReader, space: Workspace, mlp: Mlp, first: int, end: int
) -> tuple[slice, Numbers, int]:
    """Compute the terms that channels [first, end) add to the dot product of every neuron.

    The input matrices are [channel, neuron]. Returns the same as `_compute`.
    """
    stored = [reader.read_rows(space, which, side.matrix, first, end) for which, side in enumerate(mlp.sources)]
    gates, ups = (
        rows[:, side.first : side.first + mlp.neurons * side.step : side.step]
        for rows, side in ((stored[0], mlp.gate), (stored[-1], mlp.up))
    )
    weights, factor = _scale_gain(mlp)
    dots = np.zeros(mlp.neurons)
    for i, j in split_range(end - first, max(1, SCORE_BLOCK // mlp.neurons)):
        gate, up = space.take_block(0, j - i, mlp.neurons), space.take_block(1, j - i, mlp.neurons)
        _widen(gates[i:j], mlp.gate.matrix.dtype, gate)
        _widen(ups[i:j], mlp.up.matrix.dtype, up)
        np.multiply(up, weights[first + i : first + j, None], out=up)
        np.multiply(gate, up, out=gate)
        dots += gate.sum(axis=0)
    return slice(None), dots * factor, sum(rows.nbytes for rows in stored)


def _scale_gain(mlp: Mlp) -> tuple[NDArray[np.float32], float]:
    """Scale the squared gain so that float32 products neither overflow nor vanish.

    Returns the scaled gain, (channels,), and the factor that undoes the scaling in the dot products.
    """
    largest = float(mlp.gain.max(initial=0.0)) or 1.0
    missing = _get_missing_exponent(mlp.gate.matrix.dtype) + _get_missing_exponent(mlp.up.matrix.dtype)
    boost = BOOST if missing else 0
    return (mlp.gain / largest * 2.0**boost).astype(np.float32), largest * 2.0 ** (missing - boost)


def _widen(stored: NDArray[np.unsignedinteger], dtype: Dtype, out: NDArray[np.float32]) -> None:
    """Convert bit patterns to float32 values in `out`. For F16, the result is 2**-112 times each value.

    A shift converts a 16-bit pattern to a float32 pattern. This is twice as fast as numpy's own conversion. F16 has 5
    bits of exponent and float32 has 8. After a shift by 13, the mantissa is in its position, and the exponent is the
    exponent of 2**-112 times the value, also for subnormal numbers. The shift of a signed integer repeats the sign bit,
    so a mask clears the copies. F16 infinity becomes 65536 (times 2**-112), which is larger than any finite F16 value.
    """
    bits = out.view(np.int32)
    if dtype.name == "F16":
        np.copyto(bits, stored.view(np.int16))
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(bits, np.int32(0x8FFFE000 - (1 << 32)), out=bits)
    elif dtype.name == "BF16":
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    elif dtype.bits == 8:
        np.take(_build_table(dtype.name), stored, out=out, mode="clip")
    else:
        np.copyto(out, stored.view(f"<f{dtype.size}"), casting="same_kind")


def _get_missing_exponent(dtype: Dtype) -> int:
    """Return the number n for which `_widen` returns 2**-n times a value of this dtype."""
    return 112 if dtype.name == "F16" else 0


@cache
def _build_table(name: str) -> NDArray[np.float32]:
    """Return the values of all 256 bit patterns of the 8-bit float dtype `name`."""
    return np.array([decode(DTYPES[name], bytes([bits])) for bits in range(256)], np.float32)
