"""Show the bits of a stored value: sign, exponent and fraction, with the changed bits marked."""

from __future__ import annotations

from itertools import groupby

from swsurgery.errors import NumberError
from swsurgery.sharing.page.markup import Markup, escape, join, make_tag
from swsurgery.storage.dtypes import DTYPES, FloatDtype, parse_bits


def show_bits(dtype_name: str, bits: str, other: str) -> Markup:
    """Render the bits of a scalar, such as "0x40bc" of a BF16 scalar, in their fields.

    Bits that differ from those of `other`, which has the same dtype, are marked. If the dtype or the bits are not
    valid, the text `bits` is returned.
    """
    dtype = DTYPES.get(dtype_name)
    try:
        if dtype is None:
            raise NumberError("no such dtype", dtype_name)
        digits = [
            format(int.from_bytes(parse_bits(dtype, each), "little"), f"0{dtype.bits}b") for each in (bits, other)
        ]
    except (NumberError, ValueError):
        return escape(bits)
    fields: list[Markup] = []
    at = 0
    for name, width in list_fields(dtype_name):
        here, there = (each[at : at + width] for each in digits)
        at += width
        runs = groupby(zip(here, there, strict=True), key=lambda pair: pair[0] != pair[1])
        parts: list[object] = []
        for changed, pairs in runs:
            text = "".join(bit for bit, _ in pairs)
            parts.append(make_tag("b", text) if changed else text)
        fields.append(make_tag("span", *parts, class_=name, title=f"{name}: {here}"))
    return make_tag("code", join(fields, " "), class_="bits")


def list_fields(dtype_name: str) -> list[tuple[str, int]]:
    """Return the fields of a dtype, each as (name, number of bits), from the most significant bit on."""
    dtype = DTYPES[dtype_name]
    if isinstance(dtype, FloatDtype):
        return [("sign", 1), ("exponent", dtype.exponent), ("fraction", dtype.mantissa)]
    return [("integer", dtype.bits)]
