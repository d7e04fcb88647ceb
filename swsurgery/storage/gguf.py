"""Read the header of a GGUF file strictly: its metadata, and the type, shape and place of each tensor.

The reader of the package `gguf` maps the whole file, and truncating a mapped file kills the process that reads it. So
this module reads the header with pread. It accepts little-endian files of versions 2 and 3 with the rules that
llama.cpp checks, and it bounds every count and length before it allocates memory.

Source: docs/gguf.md of ggml, and ggml/src/gguf.cpp of llama.cpp.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from swsurgery.errors import ShardError
from swsurgery.storage.dtypes import Dtype
from swsurgery.storage.files import File, read_exactly
from swsurgery.storage.ggml import GGML_TYPES, BlockDtype
from swsurgery.storage.shard import Shard, TensorInfo
from swsurgery.storage.strict_json import quote

MAX_GGUF_HEADER = 32 << 20
"""Maximum size of a header in bytes. Published files have headers of up to 20 MB, most of which is the tokenizer."""

MAX_KEYS, MAX_GGUF_TENSORS = 1 << 14, 1 << 16
"""Maximum number of keys of the metadata, and of tensors. Published files have fewer than 100 keys and 3,000
tensors.
"""

MAX_GGUF_NAME = 1024
"""Maximum length of a key or of a tensor's name in bytes. llama.cpp accepts names of tensors below 64 bytes."""

LONGEST_KEPT, MAX_KEPT_NUMBERS = 4096, 1 << 16
"""Maximum number of elements of an array that is kept, and of all kept arrays together. For longer arrays and for
arrays of texts, only the number of elements is kept. They belong to the tokenizer.
"""

FIRST_READ, LARGEST_READ = 64 << 10, 1 << 20
"""Number of bytes that are read first, and maximum number of each further read.

A further read doubles the number of bytes read, up to this maximum. So at most 1 MiB after the header is read. The list
of tensors follows the tokenizer, whose texts state only their own lengths, so it cannot be found without reading them.
"""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats (of `struct`) of the metadata types that are single numbers."""

_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class SkippedArray:
    """An array of the metadata whose elements were skipped; `count` is their number."""

    count: int


MetadataValue = int | float | str | tuple[int | float, ...] | SkippedArray


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file: its tensors as a `Shard`, and its metadata.

    The shapes of the tensors are row-major: [rows, cols] for a matrix that GGUF describes as cols x rows.
    """

    shard: Shard
    metadata: dict[str, MetadataValue] = field(repr=False)


def open_gguf(file: File) -> GgufFile:
    """Read and check the header of a GGUF file, without reading tensor data. Raises ShardError."""
    try:
        found, short = open_truncated_gguf(file)
    except HeaderCutOff as error:
        raise ShardError(f"malformed GGUF header: {error}", file) from None
    if short:
        size = found.shard.size
        what = f"is truncated: its tensors end at byte {size + short}, but the file has only {size} bytes"
        raise ShardError(what, file, "download it again")
    return found


def open_truncated_gguf(file: File) -> tuple[GgufFile, int]:
    """Read and check the header of a GGUF file whose end may be missing, as after an interrupted download.

    Returns the header and the number of bytes that are missing at the end of the file: 0 for a whole file. Raises
    HeaderCutOff if the file ends in its header, and ShardError for any other fault.
    """
    with file.open() as opened:
        size = opened.size
        reader = _Reader(opened, size)
        try:
            metadata, tensors = _read_header(reader)
            start = _align(reader.position, _read_alignment(metadata))
            infos = _place_tensors(tensors, _read_alignment(metadata))
            before_data = min(start, size)
            reader.require(before_data - reader.position)
        except HeaderCutOff:
            raise
        except ValueError as error:
            raise ShardError(f"malformed GGUF header: {error}", file) from None
    needed = start + infos[-1].data_offsets[1] if infos else 0
    digest = hashlib.sha256(reader.data[:before_data]).hexdigest()
    shard = Shard(file, size, start - 8, {info.name: info for info in infos}, {}, digest)
    return GgufFile(shard, metadata), max(0, needed - size)


class HeaderCutOff(ValueError):
    """Raised if a GGUF file ends in its header. The message says where."""


class _Tensor(NamedTuple):
    """The entry of one tensor in the header. `offset` counts from the start of the data section."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int


class _Reader:
    """A reader that parses a header from its start.

    `data` contains the bytes read so far, and `position` is the next byte to parse. `kept` is the number of elements of
    the arrays kept so far. The methods raise ValueError if the file ends, or if the header is too large.
    """

    def __init__(self, file: File, size: int):
        self.file, self.size = file, size
        self.data = bytearray()
        self.position = self.kept = 0

    def require(self, count: int) -> None:
        """Read from the file until `data` contains `count` bytes after `position`."""
        end = self.position + count
        if end <= len(self.data):
            return
        if end > self.size:
            raise HeaderCutOff(f"it continues to byte {end}, but the file has only {self.size} bytes")
        if end > MAX_GGUF_HEADER:
            raise ValueError(f"it has more than the {MAX_GGUF_HEADER} bytes accepted")
        wanted = max(end, len(self.data) + min(max(len(self.data), FIRST_READ), LARGEST_READ))
        more = min(wanted, self.size, MAX_GGUF_HEADER) - len(self.data)
        self.data += read_exactly(self.file, more, len(self.data))

    def read_numbers(self, form: str, count: int = 1) -> tuple[int | float, ...]:
        """Read `count` numbers of the format `form` of `struct`."""
        layout = struct.Struct(f"<{count}{form}")
        self.require(layout.size)
        values = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return values

    def read_count(self, form: str = "Q") -> int:
        """Read one unsigned integer."""
        return int(self.read_numbers(form)[0])

    def read_bytes(self, limit: int) -> bytes:
        """Read a text of at most `limit` bytes. The header stores its length before it."""
        length = self.read_count()
        if length > limit:
            raise ValueError(f"it has a text of {length} bytes, but at most {limit} are accepted")
        self.require(length)
        found = bytes(self.data[self.position : self.position + length])
        self.position += length
        return found

    def read_name(self) -> str:
        """Read a key of the metadata or the name of a tensor."""
        raw = self.read_bytes(MAX_GGUF_NAME)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("it has a name that is not UTF-8") from None

    def skip(self, count: int) -> None:
        """Skip `count` bytes."""
        self.require(count)
        self.position += count

    def skip_texts(self, count: int) -> None:
        """Skip `count` texts."""
        if self.position + 8 * count > min(self.size, MAX_GGUF_HEADER):
            raise ValueError(f"it has an array of {count} texts, which do not fit into the file")
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if self.position + 8 > len(self.data):
                self.require(8)
            self.position += 8 + unpack(self.data, self.position)[0]
            if self.position > len(self.data):
                self.require(0)


def _read_header(reader: _Reader) -> tuple[dict[str, MetadataValue], list[_Tensor]]:
    """Read the metadata and the entries of the tensors. Raises ValueError, which names the violated rule."""
    reader.require(24)
    if reader.data[:4] != b"GGUF":
        raise ValueError(f"it begins with {bytes(reader.data[:4])!r} instead of GGUF")
    reader.skip(4)
    version = reader.read_count("I")
    if version and version & 0xFFFF == 0:
        raise ValueError("it is big-endian, and only little-endian files are read")
    if version not in (2, 3):
        raise ValueError(f"it has version {version}, and only versions 2 and 3 are read")
    tensors, keys = reader.read_count(), reader.read_count()
    for count, limit, what in ((tensors, MAX_GGUF_TENSORS, "tensors"), (keys, MAX_KEYS, "keys")):
        if count > limit:
            raise ValueError(f"it has {count} {what}, and at most {limit} are accepted")
    metadata: dict[str, MetadataValue] = {}
    for _ in range(keys):
        key = reader.read_name()
        if key in metadata:
            raise ValueError(f"it has the key {quote(key)} twice")
        metadata[key] = _read_value(reader, key)
    return metadata, [_read_tensor(reader) for _ in range(tensors)]


def _read_value(reader: _Reader, key: str) -> MetadataValue:
    """Read one value of the metadata, after its type. Raises ValueError."""
    kind = reader.read_count("I")
    if kind == _TEXT:
        return reader.read_bytes(MAX_GGUF_HEADER).decode("utf-8", "replace")
    if kind == _ARRAY:
        return _read_array(reader, key)
    if kind not in _SCALARS:
        raise ValueError(f"the key {quote(key)} has the unknown type {kind}")
    return reader.read_numbers(_SCALARS[kind])[0]


def _read_array(reader: _Reader, key: str) -> MetadataValue:
    """Read an array of the metadata, or skip it if it is long or has texts. Raises ValueError."""
    kind, count = reader.read_count("I"), reader.read_count()
    if kind == _TEXT:
        reader.skip_texts(count)
        return SkippedArray(count)
    if kind not in _SCALARS:
        raise ValueError(f"the key {quote(key)} is an array of the type {kind}, which is not read")
    if count <= LONGEST_KEPT and reader.kept + count <= MAX_KEPT_NUMBERS:
        reader.kept += count
        return reader.read_numbers(_SCALARS[kind], count)
    reader.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
    return SkippedArray(count)


def _read_alignment(metadata: dict[str, MetadataValue]) -> int:
    """Return the alignment in bytes: the place of each tensor is a multiple of it. Raises ValueError."""
    found = metadata.get("general.alignment", 32)
    if type(found) is not int or not 8 <= found <= 1 << 20 or found & (found - 1):
        raise ValueError("general.alignment is not a power of two from 8 to 1048576")
    return found


def _read_tensor(reader: _Reader) -> _Tensor:
    """Read the entry of one tensor. Raises ValueError."""
    name = reader.read_name()
    axes = reader.read_count("I")
    if not 1 <= axes <= 4:
        raise ValueError(f"tensor {quote(name)} has {axes} axes, and 1 to 4 are accepted")
    lengths = [reader.read_count() for _ in range(axes)]
    number = reader.read_count("I")
    if number not in GGML_TYPES:
        raise ValueError(f"tensor {quote(name)} has the unknown type {number}")
    return _Tensor(name, GGML_TYPES[number], tuple(reversed(lengths)), reader.read_count())


def _place_tensors(tensors: list[_Tensor], alignment: int) -> list[TensorInfo]:
    """Check that the tensors follow each other in the data section. Returns their infos. Raises ValueError."""
    infos, names, position = [], set(), 0
    for name, dtype, shape, offset in tensors:
        if name in names:
            raise ValueError(f"it has the tensor {quote(name)} twice")
        names.add(name)
        if offset != position:
            raise ValueError(f"tensor {quote(name)} starts at byte {offset} of the data, expected {position}")
        end = offset + _compute_size(name, dtype, shape)
        infos.append(TensorInfo(name, dtype, shape, (offset, end)))
        position = _align(end, alignment)
    return infos


def _compute_size(name: str, dtype: Dtype, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor in bytes. Raises ValueError."""
    count = 1
    for length in shape:
        count *= length
        if not 0 < count < 1 << 60:
            raise ValueError(f"tensor {quote(name)} has the shape {list(shape)}, which is empty or too large")
    if not isinstance(dtype, BlockDtype):
        return count * dtype.size
    if shape[-1] % dtype.block:
        what = f"tensor {quote(name)} has rows of {shape[-1]} elements"
        raise ValueError(f"{what}, which is not a multiple of the {dtype.block} in a block of {dtype.name}")
    return count // dtype.block * dtype.block_size


def _align(position: int, alignment: int) -> int:
    """Return the next multiple of `alignment` from `position`."""
    return -(-position // alignment) * alignment
