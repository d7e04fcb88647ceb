"""Measure the memory of this machine."""

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
