"""model/weight_reader.py: jobs are read exactly, in order, into two buffers, and errors reach the one who waits."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from swsurgery.errors import SwsurgeryError
from swsurgery.model import filling, wake, weight_reader
from swsurgery.model.filling import Filling, Job
from swsurgery.model.lane import HostPiece, count_readers
from swsurgery.model.slots import Part, Slot
from swsurgery.model.weight_reader import Loader, WeightReader
from swsurgery.storage.files import LocalFile

CPU = torch.device("cpu")


def make_slot(file: Path, offset: int, values: int, dtype: torch.dtype = torch.int32) -> Slot:
    part = Part("t", LocalFile(file), offset, values * dtype.itemsize, dtype, 0)
    module = nn.Module()
    return Slot(module, "weight", torch.Size([values]), dtype, (part,), ((module, "weight"),), False)


@pytest.fixture
def reader():
    reader = WeightReader([CPU])
    yield reader
    reader.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=9),
    piece=st.sampled_from([4, 64, 1000, 1 << 20]),
    pieces=st.sampled_from([0, 1, 3, 50]),
)
def test_every_job_is_read_exactly_and_in_order(tmp_path, monkeypatch, sizes, piece, pieces) -> None:
    """With pieces of memory, jobs are read before their buffer is free, as for a CUDA device."""
    monkeypatch.setattr(filling, "PAGE", 4)
    monkeypatch.setattr(filling, "LEAST_PIECE", 4)
    monkeypatch.setattr(filling, "MOST_PIECE", piece // 4 * 4)
    make_pieces = lambda *_: [HostPiece(torch.empty(piece, dtype=torch.uint8)) for _ in range(pieces)]  # noqa: E731
    monkeypatch.setattr(weight_reader, "_make_pieces", make_pieces)
    values = torch.arange(sum(sizes), dtype=torch.int32)
    file = tmp_path / "shard"
    file.write_bytes(b"head" + values.numpy().tobytes())
    begins = [sum(sizes[:number]) for number in range(len(sizes))]
    jobs = [Job((make_slot(file, 4 + 4 * at, size),), CPU) for at, size in zip(begins, sizes, strict=True)]
    reader = WeightReader([CPU])
    loader = Loader(jobs, reader)
    try:
        for at, size in zip(begins, sizes, strict=True):
            buffer = loader.take()
            assert buffer.memory[: 4 * size].view(torch.int32).tolist() == list(range(at, at + size))
            loader.give(buffer)
    finally:
        loader.close()
        reader.close()


@pytest.mark.parametrize(
    ("offsets", "stored", "sizes"),
    [
        ((0, 1024, 2048), torch.int32, [3072]),
        ((0, 1024, 4096), torch.int32, [2048, 1024]),
        ((1024, 0, 2048), torch.int32, [1024, 1024, 1024]),
        ((0, 512, 1024), torch.int16, [512, 512, 512]),
    ],
)
def test_parts_that_adjoin_are_read_together(tmp_path, offsets, stored, sizes) -> None:
    """Values that must be converted are read part by part."""
    parts = [Part("t", LocalFile(tmp_path / "shard"), at, 256 * stored.itemsize, stored, 0) for at in offsets]
    owners = ((nn.Module(), "weight"),)
    slots = [Slot(nn.Module(), "weight", torch.Size([256]), torch.int32, (part,), owners, False) for part in parts]
    request = Filling(Job(tuple(slots), CPU))
    assert [task.size for task in request.tasks] == sizes
    assert [task.begin for task in request.tasks] == [
        sum(sizes[:at]) * 4 // stored.itemsize for at in range(len(sizes))
    ]


@pytest.mark.parametrize(("files", "stored"), [("ab", (torch.int32,) * 2), ("aa", (torch.float32, torch.int32))])
def test_parts_of_other_shards_or_dtypes_are_read_apart(tmp_path, files, stored) -> None:
    """Their offsets in the shards and in the buffer adjoin."""
    parts = [
        Part("t", LocalFile(tmp_path / file), at, 1024, dtype, 0)
        for file, at, dtype in zip(files, (0, 1024), stored, strict=True)
    ]
    owners = ((nn.Module(), "weight"),)
    slots = [Slot(nn.Module(), "weight", torch.Size([256]), torch.int32, (part,), owners, False) for part in parts]
    assert [(task.part, task.size) for task in Filling(Job(tuple(slots), CPU)).tasks] == [
        (part, 1024) for part in parts
    ]


def test_a_job_without_slots_is_ready_at_once(reader) -> None:
    loader = Loader([Job((), CPU), Job((), CPU), Job((), CPU)], reader)
    for _ in range(3):
        loader.give(loader.take())
    loader.close()


def test_the_error_of_a_read_is_raised_by_the_one_who_waits(tmp_path, reader) -> None:
    file = tmp_path / "short"
    file.write_bytes(bytes(10))
    loader = Loader([Job((make_slot(file, 0, 100),), CPU)], reader)
    with pytest.raises(SwsurgeryError, match="ended while it was read"):
        loader.take()
    loader.close()


def test_a_loader_can_be_closed_before_its_jobs_are_read(tmp_path, reader) -> None:
    file = tmp_path / "shard"
    file.write_bytes(bytes(1 << 20))
    slots = tuple(make_slot(file, 0, 1 << 18) for _ in range(50))
    loader = Loader([Job(slots, CPU)] * 5, reader)
    loader.close()
    after = Loader([Job(slots[:1], CPU)], reader)  # the reader serves the next loader
    assert not after.take().memory.any()
    after.close()


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_loader_that_reads_ahead_can_be_closed(tmp_path, monkeypatch, taken) -> None:
    """The bytes that wait for a buffer hold all pieces, which the reader then needs again."""
    monkeypatch.setattr(filling, "MOST_PIECE", 1 << 12)
    make_pieces = lambda *_: [HostPiece(torch.empty(1 << 12, dtype=torch.uint8)) for _ in range(4)]  # noqa: E731
    monkeypatch.setattr(weight_reader, "_make_pieces", make_pieces)
    file = tmp_path / "shard"
    file.write_bytes(bytes(range(256)) * 64)
    slots = (make_slot(file, 0, 1 << 12),)
    reader = WeightReader([CPU])
    for _ in range(3):
        loader = Loader([Job(slots, CPU)] * 8, reader)
        for _ in range(taken):
            loader.give(loader.take())
        loader.close()
    assert bytes(reader.read(slots, CPU).tolist()) == file.read_bytes()
    reader.close()


def test_an_error_of_reading_ahead_is_raised_by_the_one_who_waits(tmp_path, monkeypatch) -> None:
    make_pieces = lambda *_: [HostPiece(torch.empty(1 << 12, dtype=torch.uint8)) for _ in range(4)]  # noqa: E731
    monkeypatch.setattr(weight_reader, "_make_pieces", make_pieces)
    file = tmp_path / "short"
    file.write_bytes(bytes(400))
    good, bad = make_slot(file, 0, 100), make_slot(file, 4, 100)
    reader = WeightReader([CPU])
    loader = Loader([Job((slot,), CPU) for slot in (good, good, good, bad, good)], reader)
    for _ in range(3):
        loader.give(loader.take())
    with pytest.raises(SwsurgeryError, match="ended while it was read"):
        loader.take()
    loader.close()
    reader.close()


@pytest.mark.parametrize(
    ("cores", "devices", "expected"), [(1, 1, 2), (2, 1, 2), (8, 1, 8), (32, 1, 16), (32, 2, 16), (16, 4, 4)]
)
def test_each_device_has_readers_of_its_own(monkeypatch, cores: int, devices: int, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert count_readers(devices) == expected


@pytest.mark.parametrize(
    ("size", "allocated", "dtype"), [(1 << 40, [2, 2], torch.float16), (1 << 20, [], torch.float32)]
)
def test_memory_is_pinned_only_for_a_model_that_is_larger(monkeypatch, size, allocated, dtype) -> None:
    pinned, ready = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(wake, "count_readers", lambda devices: devices)
    monkeypatch.setattr(wake, "allocate_pinned_pieces", pinned.append)
    monkeypatch.setattr(wake, "load_kernels", lambda device, dtype, *_: ready.append((device.index, dtype)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (64 << 30, 64 << 30))
    wake.prepare_device("cuda", "auto", torch.float16, [(size // 2,)])
    assert pinned == allocated
    assert ready == [(0, dtype), (1, dtype)][: 1 if dtype == torch.float32 else 2]


def test_the_kernels_of_a_decoder_are_loaded_for_each_shape(monkeypatch) -> None:
    """The operations run on the CPU here. Vectors and very large matrices are left out."""
    products = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: products.append(tuple(w.shape)) or linear(x, w))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    shapes = [(8, 4), (8,), (8, 4), (3, 8), (2, 2, 2), (1 << 20, 1 << 20)]
    wake.load_kernels(CPU, torch.float32, shapes, 8)
    assert set(products) == {(3, 8), (8, 4)}
