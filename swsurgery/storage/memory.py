"""Measure the memory of this machine, and recognise the errors that too little of it causes."""

from __future__ import annotations

import contextlib
import os


def measure_available_memory() -> int:
    """Return the number of bytes that programs can still use without swapping."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS has the second
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "annot allocate memory",
    "failed to map segment",
    "std::bad_alloc",
)
"""Parts of the messages by which torch, the dynamic linker and C++ report that memory ran out.

Their errors have no type of their own. numpy raises MemoryError, and system calls raise OSError.
"""


def is_memory_shortage(error: BaseException) -> bool:
    """Return True if too little memory, or a limit on it, caused the error."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
