"""Bring files into the page cache in the background, while the program does something else, such as an import."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

from swsurgery.errors import SwsurgeryError
from swsurgery.storage.files import File, LocalFile
from swsurgery.storage.memory import measure_available_memory

READ_AHEAD = 8 << 20
"""Number of bytes of one read."""

MEMORY_SHARE = 0.5
"""Maximum share of the available memory that is read: more could displace other files from the page cache."""


def read_ahead(files: Sequence[File], threads: int) -> None:
    """Start to read files in order, on `threads` threads that end with the program.

    Files on the Hub are left out, and so are bytes that are in the page cache already. Errors are ignored: whoever
    needs the bytes reads them later, and meets the error then.
    """
    pieces = _list_pieces([file for file in files if isinstance(file, LocalFile)])
    lock = threading.Lock()

    def read() -> None:
        buffer = bytearray(READ_AHEAD)
        with contextlib.suppress(OSError, SwsurgeryError):
            while True:
                with lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                file, begin, last = piece
                with file.open() as opened:
                    if not (_is_cached(opened.fd, begin) and _is_cached(opened.fd, last)):
                        os.preadv(opened.fd, [buffer], begin)

    with contextlib.suppress(RuntimeError, MemoryError):  # no thread can start
        for _ in range(threads):
            threading.Thread(target=read, name="swsurgery-read-ahead", daemon=True).start()


def _list_pieces(files: Sequence[LocalFile]) -> Iterator[tuple[LocalFile, int, int]]:
    """Yield each piece of each file, as (file, offset of its first byte, of its last one).

    The pieces end when they fill their share of the memory. Looking at both ends matters: when another piece is read,
    the kernel may read the first bytes of this one too.
    """
    left = int(measure_available_memory() * MEMORY_SHARE)
    for file in files:
        size = file.size
        for begin in range(0, size, READ_AHEAD):
            left -= READ_AHEAD
            if left < 0:
                return
            yield file, begin, min(begin + READ_AHEAD, size) - 1


def _is_cached(descriptor: int, offset: int) -> bool:
    """Return True if the byte at `offset` can be read without waiting for the disk.

    Returns False if the file system cannot tell.
    """
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT))
    except OSError:  # BlockingIOError: the byte is not in the page cache
        return False
