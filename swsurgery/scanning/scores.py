"""From stored bytes to one score per neuron: how strongly an MLP's neuron can write into the residual stream.

Reads the matrices of an MLP in chunks of a few MB, each into a buffer that is used again, and computes on a chunk while
it is still in the processor's cache; so memory does not depend on the size of a layer. numpy only: a scan of 13.5 GB
takes about as long as importing torch. Which matrices belong together, and which scores are remarkable, is decided
elsewhere.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from queue import SimpleQueue
from types import TracebackType
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ArchitectureError, ShardError
from swsurgery.storage.dtypes import DTYPES, Dtype, decode
from swsurgery.storage.files import Place, opened
from swsurgery.threads import Pool

T = TypeVar("T")
R = TypeVar("R")

Numbers = NDArray[np.floating | np.unsignedinteger]

CHUNK = 4 << 20
"""Bytes of one matrix that are read at a time (or one row, where that is longer)."""

BLOCK = 256 << 10
"""Elements that are turned into float32 at a time. Blocks of an eighth fit the second-level cache, yet with two threads
they cost twice as much: each numpy call passes the interpreter's lock on, and few large calls pass it on seldom."""

THREADS = 2
"""By default: while one reads, another computes. A third waits for the interpreter's lock more than it helps."""

BOOST = 120
"""Power of two that is multiplied into F16 operands, whose widened form is 2**-112 of the value; see `_widen`."""


@dataclass(frozen=True)
class Matrix:
    """A two-dimensional piece of one shard, row-major from byte `offset` of the file: a tensor, or one expert of it."""

    name: str
    path: Place
    offset: int
    dtype: Dtype
    rows: int
    cols: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, tensor: str, expert: int | None = None) -> Matrix:
        """A stored tensor of rank 2, or number `expert` of one of rank 3. Raises ArchitectureError for another rank,
        for numbers that are no floats and for those that another tensor scales."""
        shard, info = checkpoint.shards[checkpoint.weight_map[tensor]], checkpoint.info(tensor)
        if len(info.shape) != (2 if expert is None else 3):
            raise ArchitectureError(f"shape {list(info.shape)} is not that of an MLP's matrix", tensor)
        if info.dtype.kind != "float":
            raise ArchitectureError(f"{info.dtype.name} numbers are not weights", tensor, "scan an unquantised copy")
        if why := checkpoint.quantisation.refusal(tensor):
            raise ArchitectureError(why, tensor, "scan an unquantised copy, or by activations")
        rows, cols = info.shape[-2:]
        start = shard.data_start + info.data_offsets[0] + (expert or 0) * rows * cols * info.dtype.size
        return cls(tensor, shard.path, start, info.dtype, rows, cols)

    @property
    def row_bytes(self) -> int:
        return self.cols * self.dtype.size

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * self.row_bytes

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """(first, end) of the rows of each chunk."""
        return _ranges(self.rows, _chunk_rows(self))


class Side(NamedTuple):
    """The input weights of a layer's neurons: neuron i is number first + i * step along the neurons' axis."""

    matrix: Matrix
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class Mlp:
    """One MLP or expert: `gate` and `up` feed its `neurons`, `down` carries them away.

    `axis`: 0 where the input matrices are [neuron, channel] and the down projection [channel, neuron], 1 where both
    are the other way round. `gate` and `up` are the same where there is no gate. `gain`: (channels,) float64, the
    squared gain of the norm before. `behind`: (channels,) float32, the magnitudes of the gain of the norm that follows
    the down projection, or None.
    """

    neurons: int
    axis: Literal[0, 1]
    gate: Side
    up: Side
    down: Matrix
    gain: NDArray[np.float64]
    behind: NDArray[np.float32] | None = None

    @property
    def sources(self) -> tuple[Side, ...]:
        """What is read for the inputs: a tensor that holds gate and up side by side is read once."""
        both = self.gate != self.up and (self.axis == 0 or self.gate.matrix != self.up.matrix)
        return (self.gate, self.up) if both else (self.gate,)

    @property
    def size(self) -> int:
        """Bytes that scoring reads."""
        rows = self.neurons if self.axis == 0 else self.gate.matrix.rows
        return rows * sum(side.matrix.row_bytes for side in self.sources) + self.down.size


class NeuronScores(NamedTuple):
    """`dots`: (neurons,) float32, sum of gain * gate * up over the channels. `peaks`: (neurons,) float32, the largest
    magnitude in each neuron's column of the down projection, times the gain behind if there is one."""

    mlp: Mlp
    dots: NDArray[np.float32]
    peaks: NDArray[np.float32]


class Workspace:
    """The buffers of one thread: bytes of two chunks, and two blocks of float32."""

    def __init__(self) -> None:
        self.raw = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self.blocks = [np.empty(0, np.float32)] * 2

    def block(self, which: int, rows: int, cols: int) -> NDArray[np.float32]:
        if self.blocks[which].size < rows * cols:
            self.blocks[which] = np.empty(max(rows * cols, BLOCK), np.float32)
        return self.blocks[which][: rows * cols].reshape(rows, cols)

    def room(self, which: int, size: int) -> NDArray[np.uint8]:
        if self.raw[which].size < size:
            self.raw[which] = np.empty(max(size, CHUNK), np.uint8)
        return self.raw[which][:size]


class Reader:
    """Open shards and a few threads, each of which reads a chunk and then computes on it, so that reading and
    arithmetic overlap and results still come in order. A context manager."""

    def __init__(self, threads: int):
        self._threads = threads
        self._files: dict[Place, int] = {}
        self._spare: SimpleQueue[Workspace] = SimpleQueue()
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        self._pool = Pool(self._threads, "swsurgery-scan")
        for _ in range(self._threads):
            self._spare.put(Workspace())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel=True)  # before the files are closed under it
        self._stack.__exit__(kind, error, trace)

    def open(self, matrices: Iterable[Matrix]) -> None:
        """Open the shards of these matrices. Raises ShardError."""
        for matrix in matrices:
            if matrix.path not in self._files:
                file = self._stack.enter_context(opened(matrix.path))
                if not isinstance(file, int):
                    raise TypeError(f"{matrix.path} is not a file on this machine")
                self._files[matrix.path] = file

    def rows(self, space: Workspace, which: int, matrix: Matrix, first: int, end: int) -> NDArray[np.unsignedinteger]:
        """Rows [first, end) as unsigned integers of the dtype's width, in a buffer of `space`. Raises ShardError."""
        raw = space.room(which, (end - first) * matrix.row_bytes)
        left, offset = raw.data, matrix.offset + first * matrix.row_bytes
        while left:
            try:
                count = os.preadv(self._files[matrix.path], [left], offset)
            except OSError as error:
                raise ShardError(f"cannot read ({os.strerror(error.errno or 0)})", matrix.path) from error
            if not count:
                raise ShardError("the file ended while it was read", matrix.path, "it was changed meanwhile")
            left, offset = left[count:], offset + count
        return raw.view(f"<u{matrix.dtype.size}").reshape(end - first, matrix.cols)

    def map(self, function: Callable[[Workspace, T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """(item, function(workspace, item)) in the order of the items, which are drawn only a little ahead."""
        pending: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            pending.append((item, self._pool.submit(self._run, function, item)))
            if len(pending) > 2 * self._threads:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()

    def _run(self, function: Callable[[Workspace, T], R], item: T) -> R:
        space = self._spare.get()
        try:
            return function(space, item)
        finally:
            self._spare.put(space)


class _Sums:
    """What is known so far of one MLP's neurons: dot products, and the largest magnitudes.

    The magnitudes are bit patterns, or float32 if a gain multiplies them.
    """

    def __init__(self, mlp: Mlp):
        self.mlp = mlp
        self.dots = np.zeros(mlp.neurons)
        self.peaks = np.zeros(mlp.neurons, f"<u{mlp.down.dtype.size}" if mlp.behind is None else np.float32)

    def scores(self) -> NeuronScores:
        with np.errstate(over="ignore"):  # beyond float32 is infinite, which nobody takes for a score
            peaks = values_of(self.peaks, self.mlp.down.dtype) if self.mlp.behind is None else self.peaks
            return NeuronScores(self.mlp, self.dots.astype(np.float32), peaks)


class _Part(NamedTuple):
    """Rows [first, end) of the input matrices, or of the down projection, of one MLP."""

    sums: _Sums
    inputs: bool
    first: int
    end: int
    last: bool = False


def score_neurons(reader: Reader, mlps: Iterable[Mlp], advance: Callable[[int], None]) -> Iterator[NeuronScores]:
    """The scores of each MLP, in order; tells `advance` of the bytes read. No MLP may be empty.

    Sums are made in the order of the file whatever the number of threads, so a scan repeats bit for bit.
    """
    for part, (place, values, size) in reader.map(partial(_compute, reader), _parts(reader, mlps)):
        sums = part.sums
        if part.inputs:
            sums.dots[place] += values
        else:
            np.maximum(sums.peaks[place], values, out=sums.peaks[place])
        advance(size)
        if part.last:
            yield sums.scores()


def columns_of(reader: Reader, mlp: Mlp, cols: Sequence[int]) -> NDArray[np.float32]:
    """(channels, columns): the magnitudes in these neurons' columns of the down projection."""

    def some_rows(space: Workspace, rows: tuple[int, int]) -> NDArray[np.unsignedinteger]:
        found = _magnitudes(reader.rows(space, 0, mlp.down, *rows))
        return found[:, list(cols)] if mlp.axis == 0 else found.T.copy()  # a copy: the buffer is used again

    if mlp.axis == 0:
        parts = [part for _, part in reader.map(some_rows, mlp.down.row_ranges())]
        return values_of(np.concatenate(parts, axis=0), mlp.down.dtype)
    parts = [part for _, part in reader.map(some_rows, [(col, col + 1) for col in cols])]
    return values_of(np.concatenate(parts, axis=1), mlp.down.dtype)


def ranks_in(reader: Reader, matrix: Matrix, magnitudes: Sequence[float]) -> list[int]:
    """How many magnitudes of the matrix are larger than each of these stored ones, plus 1."""

    def larger(space: Workspace, rows: tuple[int, int]) -> list[int]:
        stored = values_of(_magnitudes(reader.rows(space, 0, matrix, *rows)), matrix.dtype)
        return [int(np.count_nonzero(stored > np.float32(magnitude))) for magnitude in magnitudes]

    counts = [count for _, count in reader.map(larger, matrix.row_ranges())]
    return [1 + sum(column) for column in zip(*counts, strict=True)]


def values_of(patterns: NDArray[np.unsignedinteger], dtype: Dtype) -> NDArray[np.float32]:
    """Stored bit patterns as numbers, of the same shape. What float32 does not hold is infinite."""
    values = np.empty(patterns.shape, np.float32)
    with np.errstate(over="ignore"):
        _widen(patterns, dtype, values)
        values *= np.float32(2.0 ** _missing_exponent(dtype))
    if dtype.name == "F16":
        values[np.abs(values) >= 65536] = np.inf  # here an infinity or NaN must not pass for a number; see `_widen`
    return values


def _parts(reader: Reader, mlps: Iterable[Mlp]) -> Iterator[_Part]:
    for mlp in mlps:
        reader.open((mlp.gate.matrix, mlp.up.matrix, mlp.down))
        sums = _Sums(mlp)
        rows = mlp.neurons if mlp.axis == 0 else mlp.gate.matrix.rows
        for first, end in _ranges(rows, _chunk_rows(mlp.gate.matrix)):
            yield _Part(sums, True, first, end)
        for first, end in mlp.down.row_ranges():
            yield _Part(sums, False, first, end, last=end == mlp.down.rows)


def _compute(reader: Reader, space: Workspace, part: _Part) -> tuple[slice, Numbers, int]:
    """(which neurons, what these rows say of their dots or peaks, bytes read)."""
    mlp, rows = part.sums.mlp, (part.first, part.end)
    if part.inputs:
        return (_neuron_rows if mlp.axis == 0 else _channel_rows)(reader, space, mlp, *rows)
    stored = reader.rows(space, 0, mlp.down, *rows)
    steps = list(_ranges(len(stored), max(1, 4 * BLOCK // stored.shape[1])))
    peaks = [
        _weighted(_magnitudes(stored[i:j]), mlp, part.first + i, part.first + j).max(axis=mlp.axis) for i, j in steps
    ]
    if mlp.axis == 1:
        return slice(*rows), np.concatenate(peaks), stored.nbytes
    return slice(None), np.maximum.reduce(peaks), stored.nbytes


def _weighted(magnitudes: NDArray[np.unsignedinteger], mlp: Mlp, first: int, end: int) -> Numbers:
    """Multiply rows [first, end) of the down projection by the gain behind it; without one they stay bit patterns."""
    if mlp.behind is None:
        return magnitudes
    gain = mlp.behind[first:end, None] if mlp.axis == 0 else mlp.behind
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is left out later, and counted
        return values_of(magnitudes, mlp.down.dtype) * gain


def _magnitudes(stored: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """The same patterns without their sign bit, in place. As integers they are ordered like the magnitudes, so that
    the largest is a maximum of integers, of which a register of the processor holds many."""
    np.bitwise_and(stored, stored.dtype.type((1 << (8 * stored.itemsize - 1)) - 1), out=stored)
    return stored


def _neuron_rows(reader: Reader, space: Workspace, mlp: Mlp, first: int, end: int) -> tuple[slice, Numbers, int]:
    """Input matrices [neuron, channel]: the whole dot product of some neurons."""
    stored = [
        reader.rows(space, which, side.matrix, side.first + first, side.first + end)
        for which, side in enumerate(mlp.sources)
    ]
    channels = mlp.gate.matrix.cols
    weights, factor = _gain(mlp)
    dots = np.empty(end - first, np.float32)
    for i, j in _ranges(end - first, max(1, BLOCK // channels)):
        gate, up = space.block(0, j - i, channels), space.block(1, j - i, channels)
        _widen(stored[0][i:j], mlp.gate.matrix.dtype, gate)
        if len(stored) > 1:
            _widen(stored[1][i:j], mlp.up.matrix.dtype, up)
        np.multiply(up if len(stored) > 1 else gate, weights, out=up)
        np.vecdot(gate, up, out=dots[i:j])
    return slice(first, end), dots * factor, sum(rows.nbytes for rows in stored)


def _channel_rows(reader: Reader, space: Workspace, mlp: Mlp, first: int, end: int) -> tuple[slice, Numbers, int]:
    """Input matrices [channel, neuron]: what some channels add to the dot product of every neuron."""
    stored = [reader.rows(space, which, side.matrix, first, end) for which, side in enumerate(mlp.sources)]
    gates, ups = (
        rows[:, side.first : side.first + mlp.neurons * side.step : side.step]
        for rows, side in ((stored[0], mlp.gate), (stored[-1], mlp.up))
    )
    weights, factor = _gain(mlp)
    dots = np.zeros(mlp.neurons)
    for i, j in _ranges(end - first, max(1, BLOCK // mlp.neurons)):
        gate, up = space.block(0, j - i, mlp.neurons), space.block(1, j - i, mlp.neurons)
        _widen(gates[i:j], mlp.gate.matrix.dtype, gate)
        _widen(ups[i:j], mlp.up.matrix.dtype, up)
        np.multiply(up, weights[first + i : first + j, None], out=up)
        np.multiply(gate, up, out=gate)
        dots += gate.sum(axis=0)
    return slice(None), dots * factor, sum(rows.nbytes for rows in stored)


def _gain(mlp: Mlp) -> tuple[NDArray[np.float32], float]:
    """(float32 weight of each channel, what a dot product made with it must be multiplied with)."""
    largest = float(mlp.gain.max(initial=0.0)) or 1.0
    missing = _missing_exponent(mlp.gate.matrix.dtype) + _missing_exponent(mlp.up.matrix.dtype)
    boost = BOOST if missing else 0
    return (mlp.gain / largest * 2.0**boost).astype(np.float32), largest * 2.0 ** (missing - boost)


def _widen(stored: NDArray[np.unsignedinteger], dtype: Dtype, out: NDArray[np.float32]) -> None:
    """Bit patterns -> float32 values, but those of F16 2**-112 times the value.

    A 16-bit pattern becomes a float32 pattern by a shift. F16 has 5 bits of exponent where float32 has 8: shifted by
    13 the mantissa is in place, the exponent is that of 2**-112 times the value, subnormal numbers included, and the
    copies of the sign that the shift of a signed integer leaves in between are masked away. This is twice as fast as
    numpy's own conversion. An F16 infinity becomes 65536, which no weight reaches.
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
        np.take(_table(dtype.name), stored, out=out, mode="clip")
    else:
        np.copyto(out, stored.view(f"<f{dtype.size}"), casting="same_kind")


def _missing_exponent(dtype: Dtype) -> int:
    """`_widen` gives 2**-this times the value."""
    return 112 if dtype.name == "F16" else 0


@cache
def _table(name: str) -> NDArray[np.float32]:
    """The value of each pattern of an 8-bit float."""
    return np.array([decode(DTYPES[name], bytes([bits])) for bits in range(256)], np.float32)


def _chunk_rows(matrix: Matrix) -> int:
    return max(1, CHUNK // matrix.row_bytes)


def _ranges(total: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, total, step):
        yield first, min(first + step, total)
