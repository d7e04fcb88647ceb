"""Import numpy so that a shortage of memory or threads raises a Python exception.

numpy loads OpenBLAS, which calls exit(1) if it cannot allocate its buffers, and sends SIGINT if it cannot start a
thread. The caller of a command would take exit code 1 for an answer ("the checkpoints differ", "the check failed").
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

ADDRESS_SPACE = 96 << 20
"""Address space that `import numpy` needs with one OpenBLAS thread, in bytes (79 MiB measured, numpy 2, x86-64)."""

DATA = 48 << 20
"""Private writable memory that `import numpy` needs, in bytes (39 MiB measured)."""

BLAS_THREADS_VARIABLE = "OPENBLAS_NUM_THREADS"
"""Environment variable from which OpenBLAS reads its number of threads when it is loaded."""


def load_numpy() -> None:
    """Import numpy with one OpenBLAS thread, because swsurgery does no linear algebra with numpy.

    Raises MemoryError if a memory limit of this process leaves too little for numpy.
    """
    if "numpy" in sys.modules:
        return
    if not _has_memory():
        raise MemoryError("the limit on memory leaves no room for numpy")
    before = os.environ.get(BLAS_THREADS_VARIABLE)
    os.environ[BLAS_THREADS_VARIABLE] = "1"
    try:
        import numpy  # noqa: F401
    finally:  # torch may load its own OpenBLAS, which needs its threads
        if before is None:
            del os.environ[BLAS_THREADS_VARIABLE]
        else:
            os.environ[BLAS_THREADS_VARIABLE] = before


def _has_memory() -> bool:
    """Return False if a memory limit of this process leaves too little for numpy. Memory already in use counts."""
    try:
        pages = [int(count) for count in Path("/proc/self/statm").read_text().split()]
    except OSError:  # not Linux
        return True
    for which, used, needed in (
        (resource.RLIMIT_AS, pages[0], ADDRESS_SPACE),
        (resource.RLIMIT_DATA, pages[5], DATA),
    ):
        limit = resource.getrlimit(which)[0]
        if limit != resource.RLIM_INFINITY and limit - used * resource.getpagesize() < needed:
            return False
    return True
