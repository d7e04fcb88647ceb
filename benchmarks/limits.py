"""Measure the limits of a machine: how fast it reads cached files, and how fast it copies to a CUDA device.

The other benchmarks call these functions, so that each table states the limits of the same run.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

PIECE = 8 << 20
"""Number of bytes that one call of `preadv` reads."""

ROOM = 64 << 20
"""Size of the memory of a thread, which it fills again and again: larger than its share of the processor's cache, as
the memory for a whole model is."""


def measure_reads(files: Sequence[Path], threads: int, most: int = 16 << 30) -> float:
    """Return the rate in GB/s at which `threads` threads read `files` with `preadv`, up to `most` bytes in total."""
    pieces = [(file, at) for file in files for at in range(0, file.stat().st_size - PIECE + 1, PIECE)][: most // PIECE]
    opened = {file: os.open(file, os.O_RDONLY) for file in files}
    waiting = iter(pieces)
    lock = threading.Lock()

    def read() -> None:
        memory = bytearray(ROOM)
        memory[::4096] = b"\1" * len(range(0, ROOM, 4096))  # so that the memory exists before the clock starts
        rooms = itertools.cycle(memoryview(memory)[at : at + PIECE] for at in range(0, ROOM, PIECE))
        barrier.wait()
        while True:
            with lock:
                piece = next(waiting, None)
            if piece is None:
                return
            os.preadv(opened[piece[0]], [next(rooms)], piece[1])

    barrier = threading.Barrier(threads + 1)
    workers = [threading.Thread(target=read) for _ in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    begin = time.perf_counter()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - begin
    for descriptor in opened.values():
        os.close(descriptor)
    return len(pieces) * PIECE / seconds / 1e9


def measure_copies(devices: Sequence[int] = (0,), total: int = 8 << 30) -> float:
    """Return the rate in GB/s at which `devices` together receive copies from pinned memory: the best of 3 rounds.

    Each device receives `total` bytes in pieces of PIECE bytes.
    """
    import torch

    pinned = {device: torch.empty(8, PIECE, dtype=torch.uint8, pin_memory=True) for device in devices}
    there = {device: torch.empty(8, PIECE, dtype=torch.uint8, device=f"cuda:{device}") for device in devices}
    rates = []
    for _ in range(3):
        begin = time.perf_counter()
        for number in range(total // PIECE):
            for device in devices:
                there[device][number % 8].copy_(pinned[device][number % 8], non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)
        rates.append(len(devices) * (total // PIECE) * PIECE / (time.perf_counter() - begin) / 1e9)
    return max(rates)
