"""Read the header of a safetensors file strictly, and single scalars of its tensors.

This reader accepts fewer files than the official parser (safetensors 0.8.0). It reads every file that it accepts as the
official parser does. It refuses a header that contains the same name twice (the official parser would use the last
entry), and forms that the specification does not define: an editor must not guess which tensor is meant. Files are read
with pread and never mapped, because truncating a mapped file kills the process that reads it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from swsurgery.errors import ShardError
from swsurgery.storage.dtypes import DTYPES, Dtype
from swsurgery.storage.files import File, read_exactly, recognise_format
from swsurgery.storage.ggml import BlockDtype
from swsurgery.storage.strict_json import quote, refuse_duplicates

MAX_HEADER = 16 << 20
"""Maximum size of a header in bytes. The format allows 100 MB. The largest headers of published checkpoints are below
1 MB. Parsing a hostile header of 68 MB takes seconds and a gigabyte of memory."""

MAX_HEADER_COMMAS, COMMAS_WITHOUT_DATA = 1 << 19, 1 << 17
"""Maximum number of commas in a header, and the maximum for a file with little data. Counting commas before parsing
bounds the number of JSON values. The entry of a two-dimensional tensor takes five commas, so the first maximum allows
about 100,000 tensors and the second about 26,000. (A published checkpoint of 92,000 tensors has 163 files.) For a file
in between, the maximum is one comma per 512 bytes of data."""

_FIELDS = {"dtype", "shape", "data_offsets"}
_INTEGER = {int}
_NEGATIVE = re.compile(rb"[\[,:][ \t\n\r]*-")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header. `data_offsets` contains (begin, end) relative to the data section, as stored."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def size(self) -> int:
        """Size of the data in bytes."""
        return self.data_offsets[1] - self.data_offsets[0]

    @property
    def stored(self) -> TensorInfo:
        """The same data as numbers that have bytes of their own.

        A tensor of blocks becomes its bytes: U8 with the shape [..., bytes of a row]. Any other tensor stays as it is.
        """
        if not isinstance(self.dtype, BlockDtype):
            return self
        row = self.shape[-1] // self.dtype.block * self.dtype.block_size
        return TensorInfo(self.name, DTYPES["U8"], (*self.shape[:-1], row), self.data_offsets)

    def flatten(self, index: tuple[int, ...]) -> int:
        """Return the row-major position of `index`. Raises IndexError for an index out of range or of another rank."""
        if len(index) != len(self.shape):
            shape = f"shape {list(self.shape)} has rank {len(self.shape)}"
            raise IndexError(f"index {list(index)} has {len(index)} numbers, but {shape}")
        position = 0
        for i, length in zip(index, self.shape, strict=True):
            if not 0 <= i < length:
                raise IndexError(f"index {list(index)} is out of range for shape {list(self.shape)}")
            position = position * length + i
        return position

    def unflatten(self, flat: int) -> tuple[int, ...]:
        """Return the index of a row-major position; the inverse of `flatten`."""
        index = []
        for length in reversed(self.shape):
            flat, i = divmod(flat, length)
            index.append(i)
        return tuple(reversed(index))


@dataclass(frozen=True)
class Shard:
    """The header of one safetensors file.

    `size` is the size of the file. `header_size` is the size of the JSON header, without the 8 bytes before it that
    contain this size. `tensors` is sorted by data offset. `header_sha256` is the digest of all bytes before the data
    section.
    """

    file: File
    size: int
    header_size: int
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    header_sha256: str = ""

    @property
    def data_start(self) -> int:
        """Offset of the data section in the file: the size of the header plus the 8 bytes before it."""
        return 8 + self.header_size

    @property
    def data_size(self) -> int:
        """Size that the header gives to the data section, in bytes."""
        return max((info.data_offsets[1] for info in self.tensors.values()), default=0)

    def find_offset(self, name: str, index: tuple[int, ...]) -> int:
        """Return the byte offset of one scalar in the file. Raises KeyError, IndexError.

        In a tensor of blocks, a scalar is one byte, and `index` counts the bytes of each row (`TensorInfo.stored`).
        """
        info = self.tensors[name].stored
        return self.data_start + info.data_offsets[0] + info.flatten(index) * info.dtype.size

    def read_scalar(self, name: str, index: tuple[int, ...]) -> bytes:
        """Read the stored bytes of one scalar, little-endian. `index` is as in `find_offset`.

        Raises ShardError, KeyError, IndexError.
        """
        return read_exactly(self.file, self.tensors[name].stored.dtype.size, self.find_offset(name, index))


def open_shard(file: File) -> Shard:
    """Read and check the header of one safetensors file, without reading tensor data.

    Raises ShardError, which names the violated rule.
    """
    with file.open() as opened:
        size = opened.size
        length = read_exactly(opened, min(size, 8), 0)
        header_size = decode_header_length(length, size, file)
        raw = read_exactly(opened, header_size, 8)
    return _build_shard(file, size, length, raw, may_be_truncated=False)


def open_truncated_shard(file: File) -> tuple[Shard | None, int]:
    """Read and check the header of a safetensors file whose end may be missing, as after an interrupted download.

    Returns the shard and the number of bytes that are missing at its end: 0 for a whole file. If the header itself is
    cut off, the shard is None, and at least the returned number of bytes is missing. Raises ShardError for any other
    fault.
    """
    with file.open() as opened:
        size = opened.size
        length = read_exactly(opened, min(size, 8), 0)
        needed = 8 + int.from_bytes(length, "little")
        if size < 8:
            return None, 8 - size
        if size < needed <= 8 + MAX_HEADER and not recognise_format(length):
            return None, needed - size
        header_size = decode_header_length(length, size, file)
        raw = read_exactly(opened, header_size, 8)
    shard = _build_shard(file, size, length, raw, may_be_truncated=True)
    return shard, max(0, shard.data_start + shard.data_size - size)


def _build_shard(file: File, size: int, length: bytes, raw: bytes, may_be_truncated: bool) -> Shard:
    """Parse the header of a file of `size` bytes. `length` are the 8 bytes before the JSON header `raw`.

    Raises ShardError, which names the violated rule.
    """
    try:
        tensors, metadata = parse_header(raw, size - 8 - len(raw), may_be_truncated)
    except ValueError as error:
        raise ShardError(f"malformed safetensors header: {error}", file) from None
    return Shard(file, size, len(raw), tensors, metadata, hashlib.sha256(length + raw).hexdigest())


def decode_header_length(start: bytes, size: int, file: object) -> int:
    """Decode the header size from the first 8 bytes of a file of `size` bytes. Only messages use `file`.

    Raises ShardError if the file has another format, is truncated, or has a header larger than MAX_HEADER.
    """
    if size < 8:
        raise ShardError(f"is too short for a safetensors file ({size} bytes)", file, "download it again")
    length = int.from_bytes(start, "little")
    if length > size - 8:
        # Not checked earlier, because a valid header length may consist of the same bytes.
        if found := recognise_format(start):
            raise ShardError(found[0], file, found[1])
        reason = f"is truncated: its header should have {length} bytes, but the file has only {size}"
        raise ShardError(reason, file, "download it again")
    if length > MAX_HEADER:
        raise ShardError(f"has a header of {length} bytes, more than the {MAX_HEADER} accepted", file)
    return length


def parse_header(
    raw: bytes, data_size: int, may_be_truncated: bool = False
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Parse the JSON header. Returns the tensors by name, sorted by data offset, and the metadata.

    `data_size` is the size of the data section in bytes. If `may_be_truncated` is True, it may be smaller than the
    tensors need. Raises ValueError, which names the violated rule.
    """
    if not raw.startswith(b"{"):
        raise ValueError("the header does not begin with {")
    limit = max(COMMAS_WITHOUT_DATA, min(MAX_HEADER_COMMAS, data_size >> 9))
    if raw.count(b",") > limit:
        raise ValueError(f"the header has more than {limit} values")
    header = _parse_object(raw)
    metadata = header.pop("__metadata__", {})
    if metadata is None:  # the official parser reads null as absent
        metadata = {}
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        raise ValueError("__metadata__ is not a map from string to string")
    if b"\\u" in raw:  # only an escape can encode half a surrogate pair; UTF-8 cannot
        _refuse_surrogates(metadata.keys())
        _refuse_surrogates(metadata.values())
        _refuse_surrogates(header)
    infos = sorted((_parse_tensor(name, entry) for name, entry in header.items()), key=lambda info: info.data_offsets)
    end = _check_layout(infos)
    if end != data_size and not (may_be_truncated and end > data_size):
        raise ValueError(f"the tensors end at byte {end} of the data section, which has {data_size} bytes")
    return {info.name: info for info in infos}, metadata


def _parse_object(raw: bytes) -> dict[str, Any]:
    """Parse the JSON object of a header. Raises ValueError, which names the violated rule."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    try:
        header: dict[str, Any] = json.loads(
            text,
            object_pairs_hook=refuse_duplicates,
            # A hook for each integer doubles the time. It is needed only to refuse -0, which would be read as 0.
            parse_int=_parse_integer if _NEGATIVE.search(raw) else None,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.pos})") from None
    except ValueError as error:  # Python's limit of 4300 digits, or one of the hooks
        reason = "it has a number of thousands of digits" if "digits" in str(error) else str(error)
        raise ValueError(reason) from None
    return header


def _parse_integer(digits: str) -> int:
    return _refuse_number(digits) if digits.startswith("-") else int(digits)


def _refuse_number(digits: str) -> NoReturn:
    raise ValueError(f"{digits[:24]} is not an unsigned 64-bit integer")


def _refuse_surrogates(texts: Iterable[str]) -> None:
    """Raise ValueError if a text contains half a surrogate pair, which UTF-8 cannot encode."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{quote(text)} contains half a surrogate pair") from None


def _parse_tensor(name: str, entry: Any) -> TensorInfo:
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise ValueError(f"tensor {quote(name)} does not have exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"tensor {quote(name)} has an unknown dtype {quote(dtype)}")
    # isinstance would accept the JSON value true as the integer 1.
    if type(shape) is not list or not _INTEGER.issuperset(map(type, shape)):
        raise ValueError(f"tensor {quote(name)} has a shape that is not a list of integers")
    if type(offsets) is not list or len(offsets) != 2 or not _INTEGER.issuperset(map(type, offsets)):
        raise ValueError(f"tensor {quote(name)} has data_offsets that are not two integers")
    if max(shape, default=0) >> 64 or max(offsets) >> 64:
        raise ValueError(f"tensor {quote(name)} has a number that is not an unsigned 64-bit integer")
    return TensorInfo(name, DTYPES[dtype], tuple(shape), (offsets[0], offsets[1]))


def _check_layout(infos: list[TensorInfo]) -> int:
    """Check that tensors follow one another without gaps or overlaps and that each size matches its shape.

    `infos` is sorted by data offset. Returns the size in bytes that the data section must have. Raises ValueError.
    """
    position = 0
    for info in infos:
        begin, end = info.data_offsets
        if begin != position or end < begin:
            raise ValueError(
                f"tensor {quote(info.name)} has data_offsets [{begin}, {end}], expected to start at {position}"
            )
        bits = info.dtype.bits
        for length in info.shape:
            bits *= length
            if bits >= 1 << 64:
                raise ValueError(f"tensor {quote(info.name)} has a shape that overflows 64 bits")
        if bits % 8:
            raise ValueError(f"tensor {quote(info.name)} does not fill whole bytes")
        if bits // 8 != end - begin:
            raise ValueError(f"tensor {quote(info.name)} has {end - begin} bytes, but its shape needs {bits // 8}")
        position = end
    return position
