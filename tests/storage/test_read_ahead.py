"""storage/read_ahead.py: files come into the page cache without delaying or disturbing anything."""

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path

import pytest

from swsurgery.storage import read_ahead as module
from swsurgery.storage.files import LocalFile
from swsurgery.storage.read_ahead import read_ahead

SIZE = 3 * module.READ_AHEAD + 4096


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "swsurgery-read-ahead":
            thread.join(30)


def count_cached_pages(path: Path) -> int:
    """Ask the kernel with mincore(2) how many pages of a file are in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * pages)()
        begin = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.byref(begin), ctypes.c_size_t(len(mapped)), states) == 0
        del begin
        return sum(state & 1 for state in states)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file of which no byte is in the page cache."""
    path = tmp_path / "shard"
    path.write_bytes(os.urandom(SIZE))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if count_cached_pages(path):
        pytest.skip("this file system keeps everything in its cache")
    return path


@pytest.mark.parametrize("threads", [1, 3])
def test_a_cold_file_is_in_the_page_cache_afterwards(cold: Path, threads: int) -> None:
    read_ahead([LocalFile(cold)], threads)
    wait_for_threads()
    assert count_cached_pages(cold) == SIZE // mmap.PAGESIZE


def test_a_piece_of_which_only_the_first_bytes_are_cached_is_read(cold: Path) -> None:
    with cold.open("rb") as file:
        os.pread(file.fileno(), 1, module.READ_AHEAD)
    assert 0 < count_cached_pages(cold) < module.READ_AHEAD // mmap.PAGESIZE
    read_ahead([LocalFile(cold)], 1)
    wait_for_threads()
    assert count_cached_pages(cold) == SIZE // mmap.PAGESIZE


def test_cached_bytes_are_not_read_again(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cold.read_bytes()
    sizes = []
    preadv = os.preadv

    def record(descriptor: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        sizes.append(len(buffers[0]))
        return preadv(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", record)
    read_ahead([LocalFile(cold)], 1)
    wait_for_threads()
    assert sizes == [1] * 8  # the first and the last byte of each piece, to ask whether it is cached


def test_no_more_is_read_than_a_share_of_the_memory(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_available_memory", lambda: int(1.5 * module.READ_AHEAD / module.MEMORY_SHARE))
    read_ahead([LocalFile(cold)], 1)
    wait_for_threads()
    assert 0 < count_cached_pages(cold) < SIZE // mmap.PAGESIZE


def test_errors_are_left_to_whoever_reads_the_file_later(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read_ahead([LocalFile(tmp_path / "missing"), LocalFile(tmp_path)], 2)
    wait_for_threads()
    assert capfd.readouterr() == ("", "")


def test_the_caller_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slow"
    path.write_bytes(bytes(100))
    monkeypatch.setattr(os, "preadv", lambda *_: time.sleep(0.5) or 0)
    begin = time.perf_counter()
    read_ahead([LocalFile(path)], 1)
    assert time.perf_counter() - begin < 0.4
    wait_for_threads()
