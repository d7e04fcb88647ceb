"""Safetensors files, sound and odd, and the comparison of our reader with the official parser.

The promise: what we accept, the official parser accepts, and both read the same names, dtypes, shapes, data and
metadata. We may refuse more; each such refusal has a category, so that a new one is seen.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import safetensors

from fuzz.documents import NUMBERS, SCALARS, Object, Raw, damage, mutate, pick, spell
from swsurgery.errors import ShardError
from swsurgery.storage.shard import decode_header_length, parse_header

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""The format's own table, not the product's."""
DTYPES = tuple(BITS)
NEAR_DTYPES = tuple(
    Raw(text)
    for text in (
        '"F8"', '"F8_E4M3FN"', '"E8M0"', '"C128"', '"I4"', '"NF4"', '"f32"', '"F32 "', '""', '"BF8"', '"F128"',
        '"bool"',
        '{"F32":null}', '"\\u004632"', '"F6"', '"FP8"', "null", "0",
    )
)  # fmt: skip
NAMES = tuple(
    Raw(text)
    for text in (
        '"a"', '"b"', '"model.layers.0.mlp.down_proj.weight"', '"\\u0061"', '""', '"é"', '"e\u0301"', '"\\u0000"',
        '"c-1"',
        '"[-1"', '"\\ud83d\\ude00"', '"\U0001f600"', '"../../x\\u001b[2J"', '"\\""', '"\\/"',
    )
)  # fmt: skip
ODD_NAMES = (
    *NAMES,
    *(Raw(text) for text in ('"\\ud800"', '"__metadata__"', '"\x01"', '"\n"', '"\\x"', "a", "'a'", "1")),
)
_ROUND = NAMES + NAMES[:3]
FIELDS = tuple(Raw(text) for text in ('"dtype"', '"shape"', '"data_offsets"', '"x"', '"d\\u0074ype"', '"Dtype"'))
KEYS = FIELDS + ODD_NAMES
HEADER_SCALARS = (*SCALARS, *NUMBERS, *NEAR_DTYPES)
DATA = bytes(i * 7 % 251 for i in range(1024))
"""Every place differs from its neighbours, so equal data means equal offsets."""
FRAMES = (
    (" ", ""), ("\n", ""), ("\ufeff", ""), ("", " "), ("", "     "), ("", "\n\t\r "), ("", "\x00"), ("", "{}"),
    ("", "x"),
    ("[", "]"), ("", ","), ("/**/", ""), ("", "\x0c"), ("{", "}"), ('{"a":', "}"),
)  # fmt: skip
LENGTHS = (-8, -2, -1, 1, 2, 8, 10, 16, 100, 100_000_000, 100_000_001, 1 << 63, (1 << 64) - 8, (1 << 64) - 1)
"""What the first 8 bytes say: up to 9, by so much more or less than is true."""


def sound(random: Random) -> tuple[Object, int]:
    """A header and the size of its data: tensors that tile the data, in order or against it."""
    header, position = Object(), 0
    start = pick(random, range(len(NAMES)))
    for name in _ROUND[start : start + pick(random, (0, 1, 1, 1, 2, 2, 3))]:
        dtype = pick(random, DTYPES)
        bits = BITS[dtype]
        shape = [pick(random, (0, 1, 1, 2, 2, 3, 4)) for _ in range(pick(random, (0, 1, 1, 2, 3)))]
        for length in shape:
            bits *= length
        size = (bits + 7) // 8  # rounded up: sub-byte dtypes may not fill whole bytes, which is refused
        if position + size > len(DATA):
            break
        offsets = [Raw(position), Raw(position + size)]
        fields = Object([[FIELDS[0], Raw(f'"{dtype}"')], [FIELDS[1], [Raw(n) for n in shape]], [FIELDS[2], offsets]])
        header.append([name, fields])
        position += size
    if random.random() < 0.5:
        header.reverse()
    if random.random() < 0.2:
        metadata = Object([key, pick(random, NAMES)] for key in NAMES[: pick(random, (0, 1, 2))])
        header.insert(pick(random, range(len(header) + 1)), [Raw('"__metadata__"'), metadata])
    return header, position


def header_file(random: Random) -> bytes:
    """A whole file: sound in one case of ten, else with one to three things wrong with it."""
    header, size = sound(random)
    length = damages = 0
    prefix = suffix = ""
    for _ in range(pick(random, (0, 1, 1, 1, 1, 1, 1, 2, 2, 3))):
        what = random.random()
        if what < 0.65:
            mutate(random, header, HEADER_SCALARS, KEYS)
        elif what < 0.85:
            damages += 1
        elif what < 0.90:
            prefix, suffix = pick(random, FRAMES)
        elif what < 0.95:
            size = max(0, size + pick(random, (-1, 1, 2, 8)))
        else:
            length = pick(random, LENGTHS)
    text = (prefix + spell(header) + suffix).encode("utf-8", "surrogatepass")
    for _ in range(damages):
        text = damage(random, text)
    said = length if abs(length) > 9 else max(0, len(text) + length)
    content = struct.pack("<Q", said) + text + DATA[:size]
    return damage(random, content) if damages and random.random() < 0.05 else content


REASONS = (
    ("appears twice", "a name that stands twice"),
    ("does not begin with {", "white space before the header"),
    ("exactly the fields dtype, shape", "unknown fields of a tensor, or its fields as a list"),
    ("unknown dtype", "a dtype that is not plain text"),
    ("thousands of digits", "an unknown field with a number that is no 64-bit integer"),
    ("is not an unsigned 64-bit", "an unknown field with a number that is no 64-bit integer"),
    ("__metadata__ is not a map", "metadata"),
    ("overflows 64 bits", "a shape whose product overflows before a zero"),
    ("half a surrogate pair", "half a surrogate pair"),
)


class HeaderTarget:
    """Both parsers on one file."""

    name = "header"

    def __init__(self, folder: Path):
        self.path = folder / "model.safetensors"

    def close(self) -> None:
        pass

    make: Callable[[Random], bytes] = staticmethod(header_file)

    def verdict(self, content: bytes) -> str:
        """accepted, refused, lax, different, or `stricter: why`. Any exception but the two named ones escapes."""
        try:
            theirs = safetensors.deserialize(content)
        except safetensors.SafetensorError:
            theirs = None
        try:
            start = 8 + decode_header_length(content[:8], len(content), self.path)
            tensors, metadata = parse_header(content[8:start], len(content) - start)
        except (ShardError, ValueError) as error:
            line = str(error)
            if "\n" in line or len(line) > 1000:
                return "traceback: the message is not one line"
            if theirs is None:
                return "refused"
            return "stricter: " + next((why for words, why in REASONS if words in line), line)
        if theirs is None:
            return "lax"
        if len(theirs) != len(tensors):
            return "different"
        for name, stored in theirs:
            info = tensors.get(name)
            if (
                info is None
                or info.dtype.name != stored["dtype"]
                or list(info.shape) != stored["shape"]
                or content[start + info.data_offsets[0] : start + info.data_offsets[1]] != stored["data"]
            ):
                return "different"
        if b"__metadata__" in content or b"\\" in content[8:start] or metadata:
            self.path.write_bytes(content)
            with safetensors.safe_open(self.path, "np") as file:
                if (file.metadata() or {}) != metadata:
                    return "different"
        return "accepted"
