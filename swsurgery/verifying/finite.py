"""Find NaN and infinities in the raw bytes of a shard while another function reads them.

The search is exact for every floating-point dtype: the table of dtypes contains the bit patterns. Only one chunk of the
shard is in memory. Integers and the sub-byte floats of OCP MX have neither NaN nor infinity and are skipped.
"""

from __future__ import annotations

from swsurgery.storage import dtypes
from swsurgery.storage.dtypes import DTYPES, Dtype, FloatDtype
from swsurgery.storage.numeric import load_numpy
from swsurgery.storage.shard import Shard, TensorInfo
from swsurgery.verifying.findings import Finding

MAX_NONFINITE = 20
"""Maximum number of tensors reported individually for one file."""


class FiniteScan:
    """Searches one shard for NaN and infinities. Feed its bytes in order, in pieces of any size."""

    def __init__(self, name: str, shard: Shard):
        self._name, self._shard = name, shard
        self._tensors = [t for t in shard.tensors.values() if t.size and _describe_words(t.dtype) is not None]
        self._next = 0  # number of the first tensor that is not completely searched
        self._tail = b""  # first bytes of an element that continues in the next piece
        self._bad: dict[str, tuple[int, int, bytes]] = {}

    def feed(self, offset: int, chunk: bytes | bytearray) -> None:
        """Search the next bytes of the file. `offset` must be the end of the previous piece."""
        start = offset - len(self._tail)
        data = bytes(self._tail) + chunk if self._tail else chunk
        end, self._tail = start + len(data), b""
        while self._next < len(self._tensors):
            info = self._tensors[self._next]
            begin, stop = (self._shard.data_start + at for at in info.data_offsets)
            if begin >= end:
                return
            first, last = max(begin, start), min(stop, end)
            whole = first + (last - first) // _get_word_size(info) * _get_word_size(info)
            if whole > first:
                self._search(info, first - begin, memoryview(data)[first - start : whole - start])
            if stop > end:
                self._tail = bytes(data[whole - start :])
                return
            self._next += 1

    def list_findings(self) -> list[Finding]:
        """Return one finding for each tensor that contains NaN or infinities.

        It gives the first such value and the number of the others. If there are more than MAX_NONFINITE such tensors,
        one last finding gives the number of the remaining tensors.
        """
        found = []
        for name, (count, flat, data) in self._bad.items():
            info = self._shard.tensors[name]
            value = "NaN or infinite" if info.dtype.kind == "opaque" else str(dtypes.decode(info.dtype, data))
            more = f", and {count - 1} more values in this tensor are not finite" if count > 1 else ""
            message = f"the value is {value} ({dtypes.format_bits(data)}){more}"
            found.append(Finding("non-finite", message, self._name, name, info.unflatten(flat)))
        if len(found) > MAX_NONFINITE:
            rest = len(found) - MAX_NONFINITE
            found = [
                *found[:MAX_NONFINITE],
                Finding("non-finite", f"{rest} more tensors of this file contain NaN or infinite values", self._name),
            ]
        return found

    def _search(self, info: TensorInfo, start: int, data: memoryview) -> None:
        """Search whole words: elements, or halves of complex ones. `data` begins `start` bytes into the tensor."""
        load_numpy()
        import numpy as np

        pattern = _describe_words(info.dtype)
        if pattern is None:
            return
        size, mask, low, high = pattern
        words = np.frombuffer(data, f"<u{size}")
        magnitudes = words & words.dtype.type(mask)
        bad = magnitudes >= words.dtype.type(low)
        if high is not None:
            bad &= magnitudes <= words.dtype.type(high)
        count = int(np.count_nonzero(bad))
        if not count:
            return
        if info.name in self._bad:
            before, element, stored = self._bad[info.name]
        else:
            element = (start + int(np.argmax(bad)) * size) // info.dtype.size
            at = element * info.dtype.size - start
            # The first half of a complex number may be in the previous piece. Then only the second half is shown.
            before, stored = 0, bytes(data[max(at, 0) : at + info.dtype.size])
        self._bad[info.name] = (before + count, element, stored)


def _describe_words(dtype: Dtype) -> tuple[int, int, int, int | None] | None:
    """Return (bytes per word, mask, lowest, highest). A word is not finite if `lowest` <= word & mask <= `highest`.

    Returns None if every value of the dtype is finite. `highest` is None if there is no upper limit.
    """
    if dtype.name == "C64":
        dtype = DTYPES["F32"]  # a C64 consists of two F32 numbers
    if dtype.name == "F8_E8M0":
        return 1, 0xFF, 0xFF, None  # OCP MX 1.0, section 5.4.1: the scale with all bits set is NaN
    if not isinstance(dtype, FloatDtype):
        return None
    sign = 1 << (dtype.bits - 1)
    if dtype.special == "fnuz":
        return dtype.size, 2 * sign - 1, sign, sign
    return dtype.size, sign - 1, dtype.largest + 1, None


def _get_word_size(info: TensorInfo) -> int:
    pattern = _describe_words(info.dtype)
    return pattern[0] if pattern else 1
