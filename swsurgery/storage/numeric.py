"""Import numpy so that a lack of memory or of threads is an error of Python's.

numpy loads OpenBLAS, which calls exit(1) if it gets no memory for its buffers, and sends SIGINT if it gets no thread.
Exit code 1 would be read as an answer ("they differ", "the check says no").
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

ADDRESS_SPACE = 96 << 20
"""Bytes that `import numpy` needs with one thread of OpenBLAS; 79 MiB were measured with numpy 2 on x86-64."""

DATA = 48 << 20
"""The part of them that is private and writable; 39 MiB were measured."""

THREADS = "OPENBLAS_NUM_THREADS"


def load_numpy() -> None:
    """Import numpy, without threads of OpenBLAS: no linear algebra is done with it. Raises MemoryError."""
    if "numpy" in sys.modules:
        return
    if not _has_room():
        raise MemoryError("the limit on memory leaves no room for numpy")
    said = os.environ.get(THREADS)
    os.environ[THREADS] = "1"
    try:
        import numpy  # noqa: F401
    finally:  # torch may have an OpenBLAS of its own, which needs its threads
        if said is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = said


def _has_room() -> bool:
    """Return False if a limit of this process is too low for what it has in use and numpy besides."""
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
