"""Headers of safetensors files, sound and hostile: what we accept, the official parser accepts and sees alike.

`assets/headers.json` holds whole small files (base64), with the verdict of safetensors 0.8.0 and ours.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from swsurgery.errors import CheckpointError, ShardError
from swsurgery.storage.coordinate import is_valid_index
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.files import LocalFile
from swsurgery.storage.shard import MAX_HEADER, open_shard, parse_header

CASES = json.loads((Path(__file__).parents[1] / "assets" / "headers.json").read_text())


def file_of(header: bytes | dict, data: bytes = b"") -> bytes:
    """A whole file from header and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def bytes_of(case: dict) -> bytes:
    if case["bytes"] is not None:
        return base64.b64decode(case["bytes"])
    # Kept out of the assets for its size: a field with a number of a million digits.
    digits = b"1" * 1_000_000
    return file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + digits + b"}}", bytes(4))


def official(content: bytes) -> list | None:
    """What safetensors reads, as (name, dtype, shape, data), or None where it refuses."""
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return sorted((name, t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found)


def ours(content: bytes) -> list | None:
    """The same through parse_header."""
    (size,) = struct.unpack("<Q", content[:8])
    data = content[8 + size :]
    try:
        tensors, _ = parse_header(content[8 : 8 + size], len(data))
    except ValueError:
        return None
    return sorted(
        (name, info.dtype.name, info.shape, data[info.data_offsets[0] : info.data_offsets[1]])
        for name, info in tensors.items()
    )


@pytest.fixture
def written(tmp_path):
    """content -> path of a file that holds it."""

    def write(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write


def test_the_list_of_cases_is_whole():
    assert len(CASES) == len({case["name"] for case in CASES}) == 95
    assert {case["ours"] for case in CASES} == {case["official"] for case in CASES} == {"accept", "reject"}
    assert [c["name"] for c in CASES if c["ours"] == "accept" and c["official"] == "reject"] == []


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_each_case_gets_its_verdict_and_what_is_accepted_reads_as_the_official_parser_reads_it(case, written):
    content = bytes_of(case)
    theirs = official(content)
    assert (theirs is not None) == (case["official"] == "accept")
    path = written(content)
    if case["ours"] == "reject":
        with pytest.raises(ShardError) as caught:
            open_shard(LocalFile(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        return
    shard = open_shard(LocalFile(path))
    data = content[shard.data_start :]
    assert shard.size == len(content)
    read = sorted((i.name, i.dtype.name, i.shape, data[slice(*i.data_offsets)]) for i in shard.tensors.values())
    assert read == theirs
    with safetensors.safe_open(path, "np") as file:
        assert (file.metadata() or {}) == shard.metadata


PLACES = st.integers(-1, 9) | st.sampled_from([0, 4, 8, 12, 1 << 63, (1 << 64) - 1, 1 << 64, True, 0.0, "4", None])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F32", "F32", "U8", "U8", "f32", "F128"]),
        "shape": st.lists(PLACES, max_size=3),
        "data_offsets": st.lists(PLACES, min_size=1, max_size=3),
    },
    optional={"x": st.none()},
)


@st.composite
def tiled(draw):
    """Mostly sound files: tensors that tile their data, stored in any order of the header."""
    entries, position = [], 0
    for name in draw(st.lists(st.text(max_size=4), unique=True, max_size=5)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        bits = DTYPES[dtype].bits * int(np.prod(shape, dtype=int))
        size = bits // 8 + draw(st.sampled_from([0] * 30 + [1]))
        entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}))
        position += size
    entries = draw(st.permutations(entries))
    if draw(st.booleans()):
        entries.append(("__metadata__", draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))))
    data = bytes(i % 251 for i in range(position + draw(st.sampled_from([0] * 20 + [1]))))
    text = json.dumps(dict(entries), ensure_ascii=draw(st.booleans()))
    return file_of(text.encode("utf-8", "surrogatepass") + b" " * draw(st.integers(0, 3)), data)


@settings(max_examples=400, deadline=None)
@given(tiled())
def test_sound_files_of_any_shape_read_as_the_official_parser_reads_them(content):
    assert ours(content) == official(content)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRY, max_size=3), st.integers(0, 16))
def test_what_we_accept_of_odd_headers_the_official_parser_accepts_alike(header, size):
    content = file_of(header, bytes(range(size)))
    found = ours(content)
    assert found is None or found == official(content)


@settings(max_examples=400, deadline=None)
@given(tiled(), st.data())
def test_what_we_accept_of_damaged_headers_the_official_parser_accepts_alike(content, data):
    place = data.draw(st.integers(8, max(8, len(content) - 1)))
    damaged = content[:place] + bytes([data.draw(st.integers(0, 255))]) + content[place + 1 :]
    found = ours(damaged)
    assert found is None or found == official(damaged)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_give_anything_but_a_header_or_a_value_error(raw):
    ours(file_of(raw))
    ours(file_of(b"{" + raw + b"}"))


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
RULES = [
    (b"[]", 0, "the header does not begin with {"),
    (b" {}", 0, "the header does not begin with {"),
    (b'{"\xff":1}', 0, "it is not UTF-8 at byte 2"),
    (b'{"a":}', 0, "it is not JSON"),
    (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 0, "it is nested too deeply"),
    (b'{"a":1,"a":2}', 0, "'a' appears twice"),
    (b'{"a":-1}', 0, "-1 is not an unsigned 64-bit integer"),
    (json.dumps({"a": ONE | {"shape": [1 << 64]}}).encode(), 4, "tensor 'a' has a number that is not an unsigned 64"),
    (b'{"a":' + b"1" * 5000 + b"}", 0, "it has a number of thousands of digits"),
    (b'{"a":[' + b"1," * (1 << 17) + b"1,1]}", 0, "the header has more than 131072 values"),
    (b'{"a":1e3}', 0, "1e3 is not an unsigned"),
    (b'{"a":NaN}', 0, "NaN is not an unsigned"),
    (b'{"__metadata__":{"a":1}}', 0, "__metadata__ is not a map from string to string"),
    (b'{"__metadata__":{"a":"\\ud800"}}', 0, "half a surrogate pair"),
    (json.dumps({"\ud800": ONE}).encode(), 4, "half a surrogate pair"),
    (json.dumps({"a": ONE | {"x": 1}}).encode(), 4, "tensor 'a' does not have exactly the fields dtype, shape"),
    (json.dumps({"a": ONE | {"dtype": "F33"}}).encode(), 4, "tensor 'a' has an unknown dtype 'F33'"),
    (json.dumps({"a": ONE | {"shape": [True]}}).encode(), 4, "shape that is not a list of integers"),
    (json.dumps({"a": ONE | {"data_offsets": [0, 4, 8]}}).encode(), 4, "data_offsets that are not two integers"),
    (json.dumps({"a": ONE, "b": ONE}).encode(), 4, "tensor 'b' has data_offsets [0, 4], expected to start at 4"),
    (json.dumps({"a": ONE | {"data_offsets": [1, 5]}}).encode(), 5, "[1, 5], expected to start at 0"),
    (json.dumps({"a": ONE | {"shape": [1 << 40, 1 << 40]}}).encode(), 4, "shape that overflows 64 bits"),
    (json.dumps({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 0]}}).encode(), 0, "does not fill whole bytes"),
    (json.dumps({"a": ONE | {"shape": [2]}}).encode(), 4, "has 4 bytes, but its shape needs 8"),
    (json.dumps({"a": ONE}).encode(), 5, "the tensors end at byte 4 of the data section, which has 5 bytes"),
]


@pytest.mark.parametrize("raw,data_size,message", RULES, ids=[rule[2] for rule in RULES])
def test_each_rule_names_itself(raw, data_size, message, written):
    with pytest.raises(ShardError) as caught:
        open_shard(LocalFile(written(file_of(raw, bytes(data_size)))))
    assert message in str(caught.value)
    assert str(caught.value).startswith("malformed safetensors header: ")


def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER + 1))
    os.truncate(path, 8 + MAX_HEADER + 1)  # sparse
    before = time.perf_counter()
    with pytest.raises(ShardError, match=f"has a header of {MAX_HEADER + 1} bytes, more than the {MAX_HEADER}"):
        open_shard(LocalFile(path))
    assert time.perf_counter() - before < 0.5


def test_a_header_of_exactly_the_limit_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(b"{}" + b" " * (MAX_HEADER - 2)))
    assert open_shard(LocalFile(path)).header_size == MAX_HEADER


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "too short for a safetensors file (0 bytes)"),
        (b"1234567", "too short for a safetensors file (7 bytes)"),
        (struct.pack("<Q", 100) + b"{}", "is truncated: its header should have 100 bytes, but the file has only 10"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>404</html>", "is an HTML page"),
        (b"<html><body>Not found</body></html>", "is an HTML page"),
        (gzip.compress(b"weights", mtime=0), "is a gzip file"),
        (b"PK\x03\x04\x14\x00\x00\x08" + bytes(40), "is a zip file"),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), "is a GGUF file"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_other_files_are_told_by_what_they_are(content, message, written):
    with pytest.raises(ShardError) as caught:
        open_shard(LocalFile(written(content)))
    assert message in str(caught.value)


@pytest.mark.parametrize("magic", [b"GGUF", b"PK\x03\x04", b"<htm"])
def test_a_file_is_not_taken_for_another_format_where_its_first_bytes_are_a_length_it_has(magic, tmp_path):
    path = tmp_path / "model.safetensors"
    length = struct.unpack("<Q", magic + bytes(4))[0]
    path.write_bytes(struct.pack("<Q", length))
    os.truncate(path, 8 + length)
    with pytest.raises(ShardError, match="more than the"):
        open_shard(LocalFile(path))


def test_every_truncation_of_a_sound_file_is_refused(written):
    content = safetensors.numpy.save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float16)})
    assert set(open_shard(LocalFile(written(content))).tensors) == {"a", "b"}
    for length in range(len(content)):
        with pytest.raises(ShardError):
            open_shard(LocalFile(written(content[:length])))


def test_a_fifo_does_not_hang_and_a_directory_and_a_link_are_no_shards(tmp_path, written):
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(written(file_of(b"{}")))
    before = time.perf_counter()
    for path, message in [
        (fifo, "is not a regular file"),
        (tmp_path, "is not a regular file"),
        (link, "is a symbolic link: .*give the directory that holds the real files"),
        (tmp_path / "missing", "No such file"),
    ]:
        with pytest.raises(ShardError, match=message) as caught:
            open_shard(LocalFile(path))
        assert isinstance(caught.value, CheckpointError)
    assert time.perf_counter() - before < 1


def test_scalars_are_read_where_numpy_wrote_them(written):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    path = written(safetensors.numpy.save({"w": array, "v": np.arange(5, dtype=np.int64)}))
    shard = open_shard(LocalFile(path))
    info = shard.tensors["w"]
    for index in np.ndindex(array.shape):
        data = shard.read_scalar("w", index)
        assert data == array[index].tobytes()
        start = shard.find_offset("w", index)
        assert path.read_bytes()[start : start + 4] == data
        assert info.unflatten(info.flatten(index)) == index
        assert is_valid_index(index, array.shape)
    assert info.size == array.nbytes
    assert shard.read_scalar("v", (4,)) == struct.pack("<q", 4)


@pytest.mark.parametrize(
    "index,message",
    [((0, 0), "rank 3"), ((0, 0, 0, 0), "rank 3"), ((2, 0, 0), "out of range"), ((0, -1, 0), "out of range")],
)
def test_an_index_outside_the_tensor_is_refused(index, message, written):
    shard = open_shard(LocalFile(written(safetensors.numpy.save({"w": np.zeros((2, 3, 4), np.float32)}))))
    with pytest.raises(IndexError, match=message):
        shard.read_scalar("w", index)
    assert not is_valid_index(index, (2, 3, 4))


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_and_no_crash(written):
    path = written(safetensors.numpy.save({"w": np.zeros(1000, np.float32)}))
    shard = open_shard(LocalFile(path))
    os.truncate(path, shard.data_start + 100)
    with pytest.raises(ShardError, match="ended while it was read"):
        shard.read_scalar("w", (999,))


def test_tensors_come_in_the_order_of_their_data(written):
    header = {"b": ONE | {"data_offsets": [4, 8]}, "a": ONE | {"data_offsets": [8, 12]}, "c": ONE}
    assert list(open_shard(LocalFile(written(file_of(header, bytes(12))))).tensors) == ["c", "b", "a"]
