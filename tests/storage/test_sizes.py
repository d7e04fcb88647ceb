"""Sizes on the command line: bytes, or a number with a unit."""

from __future__ import annotations

import pytest

from swsurgery.errors import NumberError
from swsurgery.storage.numbers import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1 B", 1),
        ("256MB", 256_000_000),
        ("256m", 256_000_000),
        ("1.5G", 1_500_000_000),
        ("2GiB", 2_147_483_648),
        ("0.5Ki", 512),
        ("3 kB", 3000),
        ("1.0015k", 1001),
        ("2TB", 2_000_000_000_000),
    ],
)
def test_a_size_is_a_number_with_an_optional_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e9", "1,5G", "5X", "1.5.2", "nan", "٣", "1 M B", "0x10", "9" * 40])
def test_any_other_text_is_refused(text):
    with pytest.raises(NumberError, match="not a size"):
        parse_size(text)
