"""model/weight_reader.py: jobs are read exactly, in order, into two buffers, and errors reach the one who waits."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from swsurgery.errors import SwsurgeryError
from swsurgery.model import wake, weight_reader
from swsurgery.model.slots import Part, Slot
from swsurgery.model.weight_reader import Job, Loader, WeightReader, count_readers
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
@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=9), piece=st.sampled_from([4, 64, 1000, 1 << 20]))
def test_every_job_is_read_exactly_and_in_order(tmp_path, monkeypatch, sizes, piece) -> None:
    monkeypatch.setattr(weight_reader, "STREAM_PIECE", piece // 4 * 4)
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


@pytest.mark.parametrize(
    ("cores", "devices", "expected"), [(1, 1, 2), (2, 1, 2), (16, 1, 16), (32, 1, 16), (32, 2, 16), (16, 4, 4)]
)
def test_each_device_has_readers_of_its_own(monkeypatch, cores: int, devices: int, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert count_readers(devices) == expected


@pytest.mark.parametrize("first_closed", [0, 1])
def test_readers_of_devices_restore_how_often_threads_take_turns(monkeypatch, first_closed: int) -> None:
    """Two readers overlap, and are closed in either order."""

    class Lane:
        def __init__(self, *_) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(weight_reader, "_Lane", Lane)
    before = sys.getswitchinterval()
    readers = [WeightReader([torch.device("cuda", 0)]) for _ in range(2)]
    assert sys.getswitchinterval() == pytest.approx(weight_reader.SWITCH_SECONDS)
    readers.pop(first_closed).close()
    readers.pop().close()
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize(("size", "allocated"), [(1 << 40, [2, 2]), (1 << 20, [])])
def test_memory_is_pinned_only_for_a_model_that_is_larger(monkeypatch, size: int, allocated: list[int]) -> None:
    pinned, ready = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(wake, "count_readers", lambda devices: devices)
    monkeypatch.setattr(wake, "allocate_pinned_pieces", pinned.append)
    monkeypatch.setattr(wake, "_load_kernels", lambda device, dtype: ready.append((device.index, dtype)))
    for thread in wake.start_device("cuda", torch.float16, size):
        thread.join()
    assert pinned == allocated
    assert ready == [(0, torch.float16), (1, torch.float16)]
