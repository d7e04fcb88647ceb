"""Write the undo file while a base is copied: the old bytes of all changed regions, or nothing if they are too many.

The threads that copy files append old bytes to temporary files without a name, one for each file. An edit in place
keeps them in memory instead. When all files are read, the parts are put in order. The result does not depend on the
number of threads or the sizes of the segments.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from swsurgery.checkpoint.record_entries import UndoRecord
from swsurgery.rewriting.segments import RegionChange, RegionPart, make_rows
from swsurgery.rewriting.undo import UndoTensor, list_undo_tensors, render_header, sort_tensors
from swsurgery.storage import filesystem
from swsurgery.storage.arrays import Words
from swsurgery.storage.files import CHUNK
from swsurgery.storage.folder import Folder


class _Unnamed:
    """A temporary file without a name."""

    def __init__(self, folder: Folder):
        self.folder = folder
        with filesystem.convert_os_errors(folder):
            self.fd = filesystem.create_unnamed(folder)

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes at the end, which is `offset`."""
        with filesystem.convert_os_errors(self.folder):
            filesystem.write_at(self.fd, data, offset)

    def read(self, size: int, offset: int) -> bytes:
        """Return stored bytes."""
        return filesystem.read_at(self.fd, size, offset)

    def close(self) -> None:
        """Delete the file."""
        os.close(self.fd)


class _Memory:
    """Bytes in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes at the end, which is `offset`."""
        self.data += data

    def read(self, size: int, offset: int) -> bytes:
        """Return stored bytes."""
        return bytes(self.data[offset : offset + size])

    def close(self) -> None:
        """Forget the bytes."""
        self.data = bytearray()


Store = _Unnamed | _Memory
"""Where the old bytes of one file are kept until all files are read."""

Piece = tuple[Store, int, int]
"""Bytes in a store: (store, offset, size)."""


def is_sparse(change: RegionChange) -> bool:
    """Return True if only the changed scalars of a region are stored."""
    return change.function.sparse


class UndoWriter:
    """Collects the old bytes of `changes` and writes them to the file `name`, if they have at most `limit` bytes.

    They are collected in temporary files in `folder`, or in memory if it is None.
    """

    def __init__(self, name: str, changes: Sequence[RegionChange], limit: int, folder: Folder | None):
        self.name, self.changes, self.limit, self.folder = name, changes, limit, folder
        dense = sum(c.region.scalars * c.info.dtype.size for c in changes if not is_sparse(c))
        self.fits = dense <= limit
        self.size = 0
        self.lock = threading.Lock()
        self.pieces: dict[str, list[Piece]] = {}
        self.stores: list[Store] = []

    def __enter__(self) -> UndoWriter:
        return self

    def __exit__(self, *fault: object) -> None:
        for store in self.stores:
            store.close()

    @contextlib.contextmanager
    def open_spool(self) -> Iterator[Spool]:
        """Collect the old bytes of one file during the block. They are dropped unless the block calls `keep`."""
        store = _Memory() if self.folder is None else _Unnamed(self.folder)
        spool = Spool(self, store)
        try:
            yield spool
        finally:
            with self.lock:
                if spool.kept:
                    self.pieces |= spool.pieces
                    self.stores.append(store)
                else:
                    self.size -= spool.size
                    store.close()

    def count(self, size: int) -> bool:
        """Count bytes that are about to be stored. Returns False if all together exceed the limit."""
        with self.lock:
            self.size += size
            self.fits = self.fits and self.size <= self.limit
            return self.fits

    def write(self, stage: Folder, mode: int) -> UndoRecord | None:
        """Write the undo file; return None, and write nothing, if the old bytes exceed the limit."""
        tensors = self._list_tensors() if self.fits else []
        header = render_header(tensors) if tensors else None
        if header is None:
            return None
        digest, size = hashlib.sha256(), 0
        entry = stage / self.name
        with filesystem.convert_os_errors(entry):
            fd = filesystem.create(entry, mode)
            try:
                for data in self._read(header, tensors):
                    digest.update(data)
                    filesystem.write_all(fd, data)
                    size += len(data)
                filesystem.sync(fd)
            finally:
                os.close(fd)
        return UndoRecord(sha256=digest.hexdigest(), size=size)

    def render(self) -> bytes | None:
        """Return the bytes of the undo file; None if the old bytes exceed the limit."""
        tensors = self._list_tensors() if self.fits else []
        header = render_header(tensors) if tensors else None
        return None if header is None else b"".join(self._read(header, tensors))

    def _list_tensors(self) -> list[UndoTensor]:
        """Return the tensors of the file in their order: by dtype, then by edit and region."""
        tensors: list[UndoTensor] = []
        for change in sorted(self.changes, key=lambda c: c.order):
            count = sum(size for _, _, size in self.pieces.get(f"{change.name}.index", ())) // 8
            [rows] = make_rows([change])
            tensors += list_undo_tensors(
                change.name, change.info.dtype.name, rows, count if is_sparse(change) else None
            )
        return sort_tensors(tensors)

    def _read(self, header: bytes, tensors: Sequence[UndoTensor]) -> Iterator[bytes]:
        """Yield the bytes of the file in chunks."""
        yield header
        for tensor in tensors:
            for store, offset, size in self.pieces.get(tensor.name, ()):
                for at in range(offset, offset + size, CHUNK):
                    yield store.read(min(CHUNK, offset + size - at), at)


class Spool:
    """The old bytes of the changed regions of one file, in a store."""

    def __init__(self, writer: UndoWriter, store: Store):
        self.writer, self.store, self.size, self.kept = writer, store, 0, False
        self.pieces: dict[str, list[Piece]] = {}
        self.end = 0

    def keep(self) -> None:
        """Keep what was added, because the file is complete."""
        self.kept = True

    def add(self, part: RegionPart, old: Words, new: Words) -> None:
        """Store the old bit patterns of a part of a region, unless the limit is exceeded."""
        if not self.writer.fits:
            return
        name = part.change.name
        if not is_sparse(part.change):
            self._append(f"{name}.old", np.ascontiguousarray(old))
            return
        places = np.flatnonzero(old.reshape(-1) != new.reshape(-1))
        if len(places):
            flat = part.rows.find_flat(part.row, places.astype(np.int64))
            self._append(f"{name}.index", flat.astype("<i8"))
            self._append(f"{name}.old", old.reshape(-1)[places])

    def _append(self, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> None:
        self.size += array.nbytes
        if self.writer.count(array.nbytes):
            self.store.write(array.reshape(-1).view(np.uint8).data, self.end)
            self.pieces.setdefault(name, []).append((self.store, self.end, array.nbytes))
            self.end += array.nbytes
