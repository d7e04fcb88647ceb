"""Headers of GGUF files, built byte by byte: what is read, and one bad header for each rule."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsurgery.errors import ShardError
from swsurgery.storage import gguf as reader
from swsurgery.storage.files import LocalFile
from swsurgery.storage.gguf import SkippedArray, open_gguf

U32, TEXT, ARRAY, F32_TYPE, Q8_0 = 4, 8, 9, 0, 8


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: str | bytes, lengths: tuple[int, ...], kind: int = F32_TYPE, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(lengths)}QIQ", len(lengths), *lengths, kind, offset)


KEYS = (key("general.architecture", TEXT, text("llama")), key("llama.block_count", U32, struct.pack("<I", 2)))
TENSORS = (tensor("a", (3, 2)), tensor("b", (32, 1), Q8_0, 32))
"""Tensor "a" has 24 bytes at byte 0, and "b" has 34 bytes at byte 32."""


def make(
    keys: tuple[bytes, ...] = KEYS,
    tensors: tuple[bytes, ...] = TENSORS,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 66,
    alignment: int = 32,
) -> bytes:
    """The bytes of a file. `counts` are the numbers of tensors and keys that it states."""
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys)))) + b"".join((*keys, *tensors))
    return head + bytes(-len(head) % alignment) + bytes(data)


def read(folder: Path, raw: bytes) -> reader.GgufFile:
    (folder / "m.gguf").write_bytes(raw)
    return open_gguf(LocalFile(folder / "m.gguf"))


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_is_read(version, tmp_path):
    found = read(tmp_path, make(version=version))
    assert found.metadata == {"general.architecture": "llama", "llama.block_count": 2}
    shapes = {info.name: (info.dtype.name, info.shape, info.data_offsets) for info in found.shard.tensors.values()}
    assert shapes == {"a": ("F32", (2, 3), (0, 24)), "b": ("Q8_0", (1, 32), (32, 66))}
    assert found.shard.data_start == len(make(data=0)) and found.shard.size == len(make())
    assert found.shard.find_offset("a", (1, 2)) == found.shard.data_start + 20


def test_every_type_of_value_is_read(tmp_path):
    numbers = {0: ("B", 200), 1: ("b", -3), 2: ("H", 60_000), 3: ("h", -9), 4: ("I", 1 << 31), 5: ("i", -1)}
    numbers |= {6: ("f", 0.5), 7: ("?", True), 10: ("Q", 1 << 63), 11: ("q", -(1 << 62)), 12: ("d", 0.1)}
    keys = [key(f"k{kind}", kind, struct.pack(f"<{form}", value)) for kind, (form, value) in numbers.items()]
    keys += [
        key("few", ARRAY, array(U32, 3, struct.pack("<3I", 7, 8, 9))),
        key("many", ARRAY, array(0, 5000, bytes(5000))),
        key("texts", ARRAY, array(TEXT, 3, text("a") + text("") + text("é" * 40_000))),
        key("broken", TEXT, text(b"a\xff")),
    ]
    found = read(tmp_path, make(tuple(keys))).metadata
    assert {name: value for name, value in found.items() if name[1:].isdigit()} == {
        f"k{kind}": value for kind, (_, value) in numbers.items()
    }
    assert found["few"] == (7, 8, 9) and found["broken"] == "a\ufffd"
    assert found["many"] == SkippedArray(5000) and found["texts"] == SkippedArray(3)


def test_another_alignment_is_used(tmp_path):
    aligned = key("general.alignment", U32, struct.pack("<I", 64))
    tensors = (tensor("a", (3, 2)), tensor("b", (32, 1), Q8_0, 64))
    found = read(tmp_path, make((aligned,), tensors, data=98, alignment=64))
    assert found.shard.data_start % 64 == 0 and found.shard.tensors["b"].data_offsets == (64, 98)


def test_a_file_without_tensors_is_read(tmp_path):
    assert read(tmp_path, make((), (), data=0)).shard.tensors == {}


HUGE = (1 << 64) - 1
BAD = {
    "empty": (b"", "continues to byte 24, but the file has only 0 bytes"),
    "another format": (make(magic=b"GGML"), "begins with b'GGML' instead of GGUF"),
    "version 1": (make(version=1), "has version 1, and only versions 2 and 3 are read"),
    "version 4": (make(version=4), "has version 4, and only versions 2 and 3 are read"),
    "big-endian": (make(version=3 << 24), "is big-endian, and only little-endian files are read"),
    "tensors": (make(counts=(1 << 19, 0)), "has 524288 tensors, and at most 65536 are accepted"),
    "keys": (make(counts=(0, 1 << 17)), "has 131072 keys, and at most 16384 are accepted"),
    "more keys than stored": (make(counts=(2, 3)), "has the unknown type|continues to byte|text of"),
    "same key": (make((KEYS[0], KEYS[0])), "has the key 'general.architecture' twice"),
    "long key": (make((key("k" * 1025, U32, bytes(4)),)), "has a text of 1025 bytes, but at most 1024 are accepted"),
    "key not UTF-8": (make((key(b"\xff", U32, bytes(4)),)), "has a name that is not UTF-8"),
    "unknown value": (make((key("k", 13, bytes(8)),)), "the key 'k' has the unknown type 13"),
    "array of arrays": (
        make((key("k", ARRAY, array(ARRAY, 1, bytes(16))),)),
        "the key 'k' is an array of the type 9",
    ),
    "huge text": (make((key("k", TEXT, struct.pack("<Q", HUGE)),)), "has a text of 18446744073709551615 bytes"),
    "text beyond the file": (make((key("k", TEXT, struct.pack("<Q", 1 << 20)),)), "continues to byte"),
    "huge array": (make((key("k", ARRAY, array(12, HUGE, b"")),)), "continues to byte"),
    "huge array of texts": (make((key("k", ARRAY, array(TEXT, HUGE, b"")),)), "texts, which do not fit into the file"),
    "huge text in array": (
        make((key("k", ARRAY, array(TEXT, 1, struct.pack("<Q", HUGE))),)), "continues to byte",
    ),
    "alignment": (make((key("general.alignment", U32, struct.pack("<I", 48)),)), "is not a power of two"),
    "alignment 0": (make((key("general.alignment", U32, bytes(4)),)), "is not a power of two"),
    "alignment of text": (make((key("general.alignment", TEXT, text("32")),)), "is not a power of two"),
    "no axes": (make(tensors=(tensor("a", ()),)), "tensor 'a' has 0 axes, and 1 to 4 are accepted"),
    "five axes": (make(tensors=(tensor("a", (1,) * 5),)), "tensor 'a' has 5 axes, and 1 to 4 are accepted"),
    "unknown type": (make(tensors=(tensor("a", (32,), 4),)), "tensor 'a' has the unknown type 4"),
    "same tensor": (make(tensors=(tensor("a", (8,)), tensor("a", (8,), 0, 32))), "has the tensor 'a' twice"),
    "overlap": (
        make(tensors=(tensor("a", (9,)), tensor("b", (8,), 0, 32))),
        "'b' starts at byte 32 of the data, expected 64",
    ),
    "gap": (
        make(tensors=(tensor("a", (8,)), tensor("b", (8,), 0, 64))),
        "'b' starts at byte 64 of the data, expected 32",
    ),
    "not aligned": (
        make(tensors=(tensor("a", (7,)), tensor("b", (8,), 0, 28))),
        "'b' starts at byte 28 of the data, expected 32",
    ),
    "empty tensor": (
        make(tensors=(tensor("a", (0, 8)),)),
        r"'a' has the shape \[8, 0\], which is empty or too large",
    ),
    "overflow": (make(tensors=(tensor("a", (1 << 40, 1 << 40)),)), "which is empty or too large"),
    "part of a block": (
        make(tensors=(tensor("a", (48,), Q8_0),)),
        "'a' has rows of 48 elements, which is not a multiple of the 32",
    ),
    "tensor not UTF-8": (make(tensors=(tensor(b"\xc3", (8,)),)), "has a name that is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("why", BAD)
def test_a_bad_header_is_one_line(why, tmp_path):
    raw, message = BAD[why]
    with pytest.raises(ShardError, match=message) as caught:
        read(tmp_path, raw)
    assert len(caught.value.faults) == 1 and "\n" not in str(caught.value)
    assert str(caught.value).startswith("malformed GGUF header: ")


def test_the_arrays_that_are_kept_have_a_total_size(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_KEPT_NUMBERS", 5)
    keys = tuple(key(name, ARRAY, array(0, 3, b"\1\2\3")) for name in "ab")
    assert read(tmp_path, make(keys)).metadata == {"a": (1, 2, 3), "b": SkippedArray(3)}


def test_a_truncated_file_is_one_line(tmp_path):
    with pytest.raises(ShardError, match=r"is truncated: its tensors end at byte \d+, but the file has only \d+ bytes"):
        read(tmp_path, make()[:-1])


def test_a_header_has_a_maximum_size(tmp_path, monkeypatch):
    keys = (key("k", TEXT, text("x" * 100_000)),)
    assert read(tmp_path, make(keys)).metadata["k"] == "x" * 100_000
    monkeypatch.setattr(reader, "MAX_GGUF_HEADER", 100_000)
    with pytest.raises(ShardError, match="text of 100000 bytes|more than the 100000 bytes accepted"):
        read(tmp_path, make(keys))
    with pytest.raises(ShardError, match="more than the 100000 bytes accepted"):
        read(tmp_path, make((key("k", ARRAY, array(0, 99_999, bytes(99_999))),)))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(make()) - 1), st.binary(min_size=1, max_size=8), st.integers(0, len(make())))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, at: int, new: bytes, size: int):
    raw = make()
    for damaged in (raw[:at] + new + raw[at + len(new) :], raw[:size]):
        try:
            found = read(tmp_path_factory.getbasetemp(), damaged)
        except ShardError as error:
            assert len(error.faults) == 1
            continue
        end = max((info.data_offsets[1] for info in found.shard.tensors.values()), default=0)
        assert found.shard.data_start + end <= len(damaged)
