"""One pass over a file gives both digests and the patched bytes, for every division into buffers and threads."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.errors import CheckpointError
from swsurgery.storage import filesystem, pipeline
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.files import BaseFile, LocalFile
from swsurgery.storage.splice import Splice

FLOAT = next(dtype for dtype in DTYPES.values() if dtype.name == "F32")


def splice(offset: int, old: bytes, new: bytes) -> Splice:
    return Splice("file", Coordinate("tensor", (0,)), FLOAT, offset, old, op="set", new=new)


def open_base(folder: Path, data: bytes) -> BaseFile:
    path = folder / "file"
    path.write_bytes(data)
    return BaseFile("file", LocalFile(path), len(data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@given(
    st.binary(max_size=400), st.sets(st.integers(0, 99), max_size=6), st.integers(1, 70),
    st.builds(pipeline.Share, st.integers(1, 5), st.booleans()), st.sampled_from(["1", "4"]),
)  # fmt: skip
def test_both_digests_and_all_bytes_are_right(folder, data, places, size, share, threads):
    """The places are multiples of four, but the buffers have any size, so that scalars are in two of them."""
    splices = [splice(4 * p, data[4 * p : 4 * p + 4], b"\1\2\3\4") for p in sorted(places) if 4 * p + 4 <= len(data)]
    patched = bytearray(data)
    for one in splices:
        patched[one.offset : one.end] = one.new
    written, lengths, lock = bytearray(len(data)), [], threading.Lock()

    def sink(chunk: memoryview, offset: int) -> None:
        with lock:
            written[offset : offset + len(chunk)] = chunk
            lengths.append(len(chunk))

    base, read = open_base(folder, data), []
    with pytest.MonkeyPatch.context() as patch, base.source.open() as opened:
        patch.setattr(pipeline, "BUFFER_SIZE", size)
        patch.setenv("SWSURGERY_THREADS", threads)
        digests = pipeline.stream(opened, base, splices, read.append, sink, share=share)
        assert digests == pipeline.stream(opened, base, splices, read.append)
    assert digests == (hashlib.sha256(data).hexdigest(), hashlib.sha256(patched).hexdigest())
    assert written == patched
    assert sum(lengths) == len(data) and sum(read) == 2 * len(data)


@pytest.mark.parametrize("threads", ["1", "4"])
@pytest.mark.parametrize("at", [0, 60, 396])
def test_other_old_bytes_are_refused(tmp_path, monkeypatch, threads, at):
    monkeypatch.setattr(pipeline, "BUFFER_SIZE", 64)
    monkeypatch.setenv("SWSURGERY_THREADS", threads)
    base = open_base(tmp_path, bytes(400))
    with base.source.open() as opened:
        pipeline.stream(opened, base, [splice(at, bytes(4), b"abcd")], lambda _: None)
        with pytest.raises(CheckpointError, match=re.escape("tensor[0] does not have the bits 0x00000001")):
            pipeline.stream(opened, base, [splice(at, b"\1\0\0\0", b"abcd")], lambda _: None, lambda *_: None)


@pytest.mark.parametrize("threads", ["1", "4"])
@pytest.mark.parametrize("at", [0, 128, 384])
def test_an_error_of_a_write_ends_the_pass(tmp_path, monkeypatch, threads, at):
    monkeypatch.setattr(pipeline, "BUFFER_SIZE", 64)
    monkeypatch.setenv("SWSURGERY_THREADS", threads)

    def sink(_: memoryview, offset: int) -> None:
        if offset == at:
            raise OSError(errno.ENOSPC, "full")

    base, before = open_base(tmp_path, bytes(400)), threading.active_count()
    with base.source.open() as opened, pytest.raises(OSError, match="full"):
        pipeline.stream(opened, base, [], lambda _: None, sink)
    assert threading.active_count() == before


def test_equal_bytes_are_hashed_once(tmp_path, monkeypatch):
    """A file without edits has one digest; the digests of an edited file part at the buffer of its first edit."""
    monkeypatch.setattr(pipeline, "BUFFER_SIZE", 64)
    monkeypatch.setenv("SWSURGERY_THREADS", "1")
    hashed: list[int] = []

    class Counted:
        def __init__(self, digest: object = None) -> None:
            self.digest = digest or hashlib.sha256()

        def update(self, data: memoryview) -> None:
            hashed.append(len(data))
            self.digest.update(data)

        def copy(self) -> Counted:
            return Counted(self.digest.copy())

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    monkeypatch.setattr(pipeline, "hashlib", type("hashes", (), {"sha256": staticmethod(Counted)}))
    base = open_base(tmp_path, bytes(640))
    with base.source.open() as opened:
        pipeline.stream(opened, base, [], lambda _: None)
        assert sum(hashed) == 640
        hashed.clear()
        pipeline.stream(opened, base, [splice(512, bytes(4), b"abcd")], lambda _: None)
        assert sum(hashed) == 640 + 128


@pytest.mark.parametrize(("files", "buffers"), [(0, 8), (1, 8), (2, 6), (3, 4), (4, 3), (64, 3)])
def test_many_files_have_fewer_buffers_each_and_share_the_cores(monkeypatch, files, buffers):
    monkeypatch.setattr(pipeline, "count_cores", lambda: 2)
    assert pipeline.compute_share(files) == pipeline.Share(buffers, files < 2)


def test_two_threads_end_a_file_past_the_cache(tmp_path, monkeypatch):
    """Both last writes are refused before either of them makes the file use the cache again."""
    fd, true, refused = filesystem.create(tmp_path / "file"), os.pwrite, threading.Barrier(2)

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if not hasattr(mine, "done"):
            mine.done = True
            refused.wait(5)
            raise OSError(errno.EINVAL, "past the cache only whole sectors are written")
        return true(fd, data, offset)

    mine = threading.local()
    filesystem.disable_cache(fd)
    monkeypatch.setattr(filesystem.os, "pwrite", pwrite)
    writers = [
        threading.Thread(target=filesystem.write_at, args=(fd, text, at)) for text, at in ((b"ab", 0), (b"c", 2))
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"abc"
