"""Divide the sequences of a run into readings of the weights, so that the hidden states of each reading fit in memory.

This module must not depend on torch or on models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

STATES = 2 << 30
"""Maximum size in bytes of the hidden states in one reading of the weights. For a 7B model in bfloat16, this allows 64
windows of 2,048 tokens for base and patched model together. Further windows take another reading. A reading of this
size takes longer to compute than to read, so a larger one would save little time."""


def divide_sequences(lengths: Sequence[int], size: int, count_rows: Callable[[int], int]) -> list[range]:
    """Divide consecutive sequences into readings whose hidden states fit in STATES.

    `lengths` contains the number of tokens of each sequence, and `size` is the size of the hidden states of a token in
    all variants, in bytes. A sequence that does not fit is a reading of its own. A layer computes up to
    `count_rows(length)` sequences of one length together. No reading divides such a batch, so all sums are rounded as
    without a limit, and the results have the same bits. The exception is a reading in whose second half no batch ends:
    it divides a batch.
    """
    most = max(1, STATES // size)
    last = {length: at for at, length in enumerate(lengths)}
    readings: list[range] = []
    begin = 0
    while begin < len(lengths):
        end = _find_end(lengths, begin, last, most, count_rows)
        readings.append(range(begin, end))
        begin = end
    return readings


def _find_end(
    lengths: Sequence[int], begin: int, last: dict[int, int], most: int, count_rows: Callable[[int], int]
) -> int:
    """Return the end of the reading that starts at sequence `begin`. `last` has the last sequence of each length."""
    counts: dict[int, int] = {}
    divided: set[int] = set()
    size, best, best_size = 0, begin, 0
    for at in range(begin, len(lengths)):
        length = lengths[at]
        if at > begin and size + length > most:
            return best if 2 * best_size >= most else at
        size += length
        counts[length] = counts.get(length, 0) + 1
        divided.add(length)
        if counts[length] % count_rows(length) == 0 or at == last[length]:
            divided.remove(length)
        if not divided:
            best, best_size = at + 1, size
    return len(lengths)
