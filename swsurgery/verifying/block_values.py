"""Search the matrices of a GGUF file for values that are NaN or infinite.

Such a value comes from the scales of its block, so the stored bytes alone do not show it. The matrices are dequantised
a few rows at a time.
"""

from __future__ import annotations

import math

import numpy as np

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.layouts.cells import CannotTell, QuantisedMatrix
from swsurgery.checkpoint.layouts.find import find_matrix
from swsurgery.errors import pluralise
from swsurgery.progress import Progress
from swsurgery.storage.ggml import BlockDtype
from swsurgery.verifying.findings import Finding

ELEMENTS_AT_ONCE = 1 << 20
"""Number of elements that are dequantised at once; float64 values of these take 8 MB."""


def list_blocks_not_finite(checkpoint: Checkpoint, progress: Progress) -> list[Finding]:
    """Return one finding for each matrix of blocks with NaN or infinities, and for each that cannot be dequantised.

    Raises CheckpointError if the package gguf is not installed.
    """
    infos = [info for info in checkpoint.infos.values() if isinstance(info.dtype, BlockDtype)]
    found = []
    progress.start(sum(info.size for info in infos), "B", "dequantising")
    try:
        for info in infos:
            message, index = _examine_matrix(checkpoint, info.name)
            if message:
                found.append(Finding("non-finite", message, checkpoint.weight_map[info.name], info.name, index))
            progress.advance(info.size)
    finally:
        progress.close()
    return found


def _examine_matrix(checkpoint: Checkpoint, name: str) -> tuple[str, tuple[int, ...] | None]:
    """Return (message, index of the first value that is not finite) for a matrix; ("", None) if there is none."""
    try:
        matrix = find_matrix(checkpoint, name)
        return ("", None) if matrix is None else _examine_rows(matrix)
    except CannotTell as error:
        return f"the values cannot be computed: {error}", None


def _examine_rows(matrix: QuantisedMatrix) -> tuple[str, tuple[int, ...] | None]:
    *above, cols = matrix.shape
    rows, at_once = math.prod(above), max(1, ELEMENTS_AT_ONCE // cols)
    first, count = -1, 0
    for begin in range(0, rows, at_once):
        bad = ~np.isfinite(matrix.dequantise(begin, min(begin + at_once, rows)))
        if first < 0 and bad.any():
            first = begin * cols + int(bad.argmax())
        count += int(np.count_nonzero(bad))
    if not count:
        return "", None
    index = tuple(int(i) for i in np.unravel_index(first, matrix.shape))
    verb = "is" if count == 1 else "are"
    return f"{pluralise(count, 'value')} of this matrix {verb} NaN or infinite, because a stored scale is", index
