"""Our reader of headers and the official parser on files that are mostly not sound: a short run of the long one."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest
from fuzz import headers
from fuzz.headers import HeaderTarget, header_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.shard import TensorInfo

SHORT = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
GOOD = ("accepted", "refused", "stricter: ")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return HeaderTarget(tmp_path_factory.mktemp("header"))


def verdicts(target: HeaderTarget, count: int, seed: int = 0) -> Counter[str]:
    random = Random(seed)
    return Counter(target.verdict(header_file(random)) for _ in range(count))


@SHORT
@given(st.randoms(use_true_random=False))
def test_what_we_accept_the_official_parser_accepts_and_reads_alike(target, random):
    assert target.verdict(header_file(random)).startswith(GOOD)


def test_five_thousand_files_show_every_reason_to_be_stricter_and_no_other(target):
    found = verdicts(target, 5_000)
    assert set(found) <= {"accepted", "refused", *(f"stricter: {why}" for _, why in headers.REASONS)}
    assert found["accepted"] > 500 and found["refused"] > 3000
    assert found["stricter: a name that stands twice"] > 15
    assert sum(found.values()) == 5_000


def test_the_same_seed_gives_the_same_files_and_another_seed_others():
    first, again, other = ([header_file(random) for _ in range(50)] for random in map(Random, (1, 1, 2)))
    assert first == again != other


def loose(raw: bytes, data_size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """A reader as most are written: json.loads and no checks."""
    header = json.loads(raw)
    metadata = header.pop("__metadata__", {}) or {}
    return {
        name: TensorInfo(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), tuple(entry["data_offsets"]))
        for name, entry in header.items()
    }, metadata


def half_checked(raw: bytes, data_size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The same with ranges and sizes checked; Python's JSON is still laxer than the format's."""
    tensors, metadata = loose(raw, data_size)
    for info in tensors.values():
        bits = info.dtype.bits
        for length in info.shape:
            bits *= length
        if not 0 <= info.data_offsets[0] <= info.data_offsets[1] <= data_size or bits != 8 * info.size:
            raise ValueError("size")
    return tensors, metadata


@pytest.mark.parametrize("reader", [loose, half_checked])
def test_the_comparison_sees_a_reader_that_is_too_lax(reader, target, monkeypatch):
    monkeypatch.setattr(headers, "parse_header", reader)
    random, found = Random(0), Counter()
    for _ in range(2500):
        try:
            found[target.verdict(header_file(random))] += 1
        except (LookupError, TypeError, AttributeError):
            found["traceback"] += 1
    assert found["lax"] > 10 and found["accepted"] > 200


def test_the_comparison_sees_a_tensor_that_is_read_from_elsewhere(target, monkeypatch):
    parse = headers.parse_header

    def shifted(raw: bytes, data_size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        tensors, metadata = parse(raw, data_size)
        return {n: TensorInfo(n, i.dtype, i.shape, (i.data_offsets[0] + 1, i.data_offsets[1] + 1))
                for n, i in tensors.items()}, metadata  # fmt: skip

    monkeypatch.setattr(headers, "parse_header", shifted)
    assert verdicts(target, 2000)["different"] > 100


def test_the_comparison_sees_metadata_that_is_lost(target, monkeypatch):
    parse = headers.parse_header
    monkeypatch.setattr(headers, "parse_header", lambda raw, size: (parse(raw, size)[0], {}))
    assert verdicts(target, 2000)["different"] > 10
