"""Decide the state of a known super weight from its known and its stored value. This module reads nothing."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from swsurgery.editing.targets import expect_known
from swsurgery.known import KnownCoordinate
from swsurgery.manifest.operations import explain_expectation
from swsurgery.manifest.targets import MeasuredValue
from swsurgery.storage.dtypes import DTYPES
from swsurgery.verifying.stored_weight import PlainWeight, StoredWeight, compute_spacing

State = Literal["kept", "close", "changed", "suspicious", "lost", "present", "declared", "unreadable"]
"""State of a known super weight in a checkpoint.

"kept": the stored value is the known one after rounding it to what can be stored: to the dtype, or to the nearest code
of a quantised matrix. "close": it is at most one step of the dtype or of the grid away from the known value. "lost": it
is zero or not finite, has the opposite sign, or is smaller than TOLERANCE permits. "suspicious": it is larger than
SUSPICIOUS permits. "changed": it is none of these. "present": no value of it was published, so nothing is compared.
"declared": the record contains an edit of it. "unreadable": it cannot be read as one number.
"""

TOLERANCE = 0.25
"""Maximum fraction of its known value that a super weight may lose before it is reported as lost.

The shipped sweeps of Mistral-7B and OLMo-1B show where damage begins. If the super weight is scaled to 0.75 of its
value, perplexity is multiplied by 1.03; at 0.5 it is multiplied by 1.39 and 8.3, and at 0.25 by 83 and 279. A super
weight that became larger, up to SUSPICIOUS, is shown but is not a finding: at twice the value, zero-shot accuracy
changes by about half a point (Llama-7B 70.1 to 70.6, Mistral-7B 74.0 to 73.8). Rounding to FP8 changes a value by at
most 1/16 of it, which is permitted.
"""

NOT_HELD = ("disputed", "refuted", "insufficient", "candidate")
"""Statuses of known coordinates that never make the answer "no".

The sources disagree about such a coordinate, the weight there may never have been large, or no test has confirmed it.
"""

SUSPICIOUS = 4.0
"""A stored value larger than this multiple of the known value is suspicious.

No fine-tuning is known to change a super weight this much. The stored numbers are more probably the codes of a
quantiser, which are larger than the weights by the factor 1 / scale.
"""

UNDECIDED = ("suspicious", "unreadable")
"""States in which it remains unknown whether a super weight was kept or lost."""


@dataclass(frozen=True)
class KnownNumber:
    """The published value of a super weight.

    `exact` is the value with the dtype in which it was measured, or None for a value that a paper prints. `slack` is
    the uncertainty of a printed value, and 0 for a measured one. `signed` is False if the sign is unknown; `value` is
    then the magnitude.
    """

    value: float
    slack: float
    signed: bool
    exact: MeasuredValue | None

    def orient(self, stored: float) -> float:
        """Return the value with its sign. If the sign is unknown, it is that of the stored value."""
        return self.value if self.signed else math.copysign(self.value, stored)


def read_known_number(entry: KnownCoordinate) -> KnownNumber | None:
    """Return the published value of a super weight; None if none was published, or if it is zero."""
    value, slack, signed = read_known_value(entry)
    exact = expect_known(entry)
    return None if value is None else KnownNumber(value, 0.0 if exact else slack, signed, exact)


def read_known_value(entry: KnownCoordinate) -> tuple[float | None, float, bool]:
    """Return (known value, its uncertainty, True if its sign is known).

    A value printed in a paper is uncertain by half a unit of its last digit: 1.25 means 1.245 to 1.255.
    """
    if entry.value is not None and entry.dtype is not None:
        return entry.value or None, compute_spacing(DTYPES[entry.dtype], entry.value), True
    text = entry.value_printed or ""
    match = re.match(r"-?\d+(?:\.(\d+))?", text)
    if match is None or float(match[0]) == 0:
        return None, 0.0, True
    return float(match[0]), 0.5 * 10.0 ** -len(match[1] or ""), "sign" not in text


def classify_weight(known: KnownNumber | None, stored: StoredWeight, tolerance: float = TOLERANCE) -> State:
    """Return the state of a super weight that no edit of the record changed."""
    value = stored.value
    if not math.isfinite(value) or value == 0:
        return "lost"
    if known is None:
        return "present"
    wanted = known.orient(value)
    ratio, distance = value / wanted, abs(value - wanted)
    if _is_same(known, stored) and ratio >= 1 - max(tolerance, TOLERANCE) - known.slack / abs(wanted):
        return "kept"
    if ratio > SUSPICIOUS:
        return "suspicious"
    if ratio < 1 - tolerance:
        return "lost"
    return "close" if distance <= stored.step else "changed"


def _is_same(known: KnownNumber, stored: StoredWeight) -> bool:
    """Return True if a stored value differs from the known one by rounding alone."""
    wanted = known.orient(stored.value)
    if not isinstance(stored, PlainWeight):
        return stored.is_nearest(wanted, known.slack)
    if known.exact is not None:
        return explain_expectation(known.exact, stored.dtype, stored.raw) is None
    return abs(stored.value - wanted) <= known.slack + stored.step / 2
