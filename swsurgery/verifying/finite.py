"""NaN and infinities among the stored values, found on the raw bytes while somebody else reads them.

Exact for every float of the format, whose bit patterns come from the table of dtypes; memory is one chunk. Integers,
and the sub-byte floats of OCP MX (which have neither NaN nor infinity), have nothing to find.
"""

from __future__ import annotations

from swsurgery.storage import dtypes
from swsurgery.storage.dtypes import DTYPES, Dtype
from swsurgery.storage.numeric import load_numpy
from swsurgery.storage.shard import Shard, TensorInfo
from swsurgery.verifying.findings import Finding

MAX_NAMED = 20


class FiniteScan:
    """Feed it a shard's bytes in order, in pieces of any size; then ask for its findings."""

    def __init__(self, name: str, shard: Shard):
        self._name, self._shard = name, shard
        self._tensors = [t for t in shard.tensors.values() if t.size and _words(t.dtype) is not None]
        self._next = 0  # the first tensor that is not wholly behind us
        self._tail = b""  # the bytes of an element whose rest is in the next piece
        self._bad: dict[str, tuple[int, int, bytes]] = {}

    def feed(self, offset: int, chunk: bytes | bytearray) -> None:
        """The bytes of the file from `offset` on, which is where the last piece ended."""
        start = offset - len(self._tail)
        data = bytes(self._tail) + chunk if self._tail else chunk
        end, self._tail = start + len(data), b""
        while self._next < len(self._tensors):
            info = self._tensors[self._next]
            begin, stop = (self._shard.data_start + at for at in info.data_offsets)
            if begin >= end:
                return
            first, last = max(begin, start), min(stop, end)
            whole = first + (last - first) // _word_size(info) * _word_size(info)
            if whole > first:
                self._search(info, first - begin, memoryview(data)[first - start : whole - start])
            if stop > end:
                self._tail = bytes(data[whole - start :])
                return
            self._next += 1

    def findings(self) -> list[Finding]:
        """One for each tensor that holds such values, with their number and the first of them."""
        found = []
        for name, (count, flat, data) in self._bad.items():
            info = self._shard.tensors[name]
            value = "NaN or infinite" if info.dtype.kind == "opaque" else str(dtypes.decode(info.dtype, data))
            more = f", and {count - 1} more of this tensor" if count > 1 else ""
            found.append(Finding("non-finite", f"it is {value} ({dtypes.bits_of(data)}){more}", self._name, name,
                                 info.index(flat)))  # fmt: skip
        if len(found) > MAX_NAMED:
            more = len(found) - MAX_NAMED
            found = [*found[:MAX_NAMED], Finding("non-finite", f"and {more} more tensors of this file", self._name)]
        return found

    def _search(self, info: TensorInfo, start: int, data: memoryview) -> None:
        """Look through whole words that begin `start` bytes into the tensor."""
        load_numpy()
        import numpy as np

        size, mask, low, high = _words(info.dtype)
        words = np.frombuffer(data, f"<u{size}")
        magnitudes = words & words.dtype.type(mask)
        bad = magnitudes >= words.dtype.type(low)
        if high is not None:
            bad &= magnitudes <= words.dtype.type(high)
        count = int(np.count_nonzero(bad))
        if not count:
            return
        before, *first = self._bad.get(info.name, (0,))
        if not first:
            element = (start + int(np.argmax(bad)) * size) // info.dtype.size
            at = element * info.dtype.size - start
            # The first half of a complex number may lie in the piece before: then only this half is shown.
            first = [element, bytes(data[max(at, 0) : at + info.dtype.size])]
        self._bad[info.name] = (before + count, *first)


def _words(dtype: Dtype) -> tuple[int, int, int, int | None] | None:
    """(bytes, mask, lowest, highest) such that a masked word between the two is not finite; None where all are."""
    if dtype.name == "C64":
        dtype = DTYPES["F32"]  # two of them
    if dtype.name == "F8_E8M0":
        return 1, 0xFF, 0xFF, None  # OCP MX 1.0, section 5.4.1: the scale that is all ones is NaN
    fmt = dtype.float_format
    if fmt is None:
        return None
    sign = 1 << (fmt.bits - 1)
    if fmt.special == "fnuz":
        return dtype.size, 2 * sign - 1, sign, sign
    return dtype.size, sign - 1, fmt.largest + 1, None


def _word_size(info: TensorInfo) -> int:
    return _words(info.dtype)[0]
