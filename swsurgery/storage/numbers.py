"""Format numbers for people, and round them for JSON documents.

Every number that is printed with a chosen number of digits is formatted here. Must not depend on dtypes or files.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from swsurgery.errors import NumberError

if TYPE_CHECKING:
    from fractions import Fraction

JSON_NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?"
"""Pattern of a number in JSON's grammar."""

NO_COMMAS = (math.inf, math.inf)
"""Pass this as `commas` to `format_number` to write no number with commas."""


UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
"""Bytes in a unit of size, by its lowercase name without the final b."""


class Written(float):
    """A float that keeps the decimal text from which it was read, such as 1e-3. The text is in JSON's grammar.

    The value of the float is the float64 nearest to the text. To round to a dtype, start from `exact`: rounding the
    float64 would round twice.
    """

    __slots__ = ("_text",)
    _text: str

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number._text = text
        return number

    @property
    def text(self) -> str:
        """The decimal text."""
        return self._text

    @property
    def exact(self) -> Fraction:
        """The exact number, such as 1/1000 for 1e-3.

        If a non-zero number underflows or overflows float64, the result is 2**-1080 with the sign of the number. This
        result underflows every dtype.
        """
        from fractions import Fraction  # slow to import, and most commands need only the functions below

        if self and math.isfinite(self):
            return Fraction(self._text)
        # The text of an infinity or an underflow may have an exponent of any length, so it is not expanded.
        digits = self._text.lower().partition("e")[0].strip("-0.")
        return Fraction(-1 if self._text.startswith("-") else 1, 1 << 1080) if digits else Fraction(0)


def format_exact(value: float | Fraction) -> str:
    """Format a value as the shortest decimal that is read back as the same float."""
    if isinstance(value, int):
        return str(value)
    try:
        number = float(value)
    except OverflowError:
        return "a number beyond 1e308"
    if not number and (value.exact if isinstance(value, Written) else value):
        return "a number nearer to zero than 5e-324"
    return repr(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def format_number(value: float, digits: int = 4, commas: tuple[float, float] = (1000, 1e7)) -> str:
    """Format a measured number with `digits` significant digits.

    If the magnitude is at least `commas[0]` and below `commas[1]`, the number is rounded to a whole number and written
    with commas: 23,941.
    """
    return f"{value:,.0f}" if commas[0] <= abs(value) < commas[1] else f"{value:.{digits}g}"


def format_ratio(value: float) -> str:
    """Format a ratio with four significant digits: 1.500.

    A ratio of 1,000 or more becomes a whole number with commas: 23,941. A ratio of a million or more has two digits:
    1.2e+06.
    """
    if 1e6 <= value < math.inf:
        return f"{value:.1e}"
    return f"{value:,.0f}" if 999.95 <= value < 1e6 else f"{value:#.4g}"


def format_size(count: int) -> str:
    """Format a number of bytes with a unit, in powers of 1000: 512 B, 1.5 GB."""
    number, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if number >= 1000:
            number, unit = number / 1000, larger
    return f"{count} B" if unit == "B" else f"{number:.1f} {unit}"


def parse_size(text: str) -> int:
    """Read a number of bytes with an optional unit: 4096, 256MB, 1.5G or 2GiB. kB, MB and GB are powers of 1000.

    Raises NumberError if the text is anything else.
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([kmgt]i?)?b?", text.strip(), re.IGNORECASE | re.ASCII)
    if found is None:
        raise NumberError("not a size", repr(text[:40]), "give bytes, or a number with a unit such as 256MB or 2G")
    number, unit = found[1], UNITS[(found[2] or "").lower()]
    whole, _, part = number.partition(".")
    return int(whole) * unit + int(part or "0") * unit // int("1" + "0" * len(part))


def round_number(value: float) -> float:
    """Round a measured number to the six significant digits that JSON documents contain."""
    return float(f"{value:.6g}")
