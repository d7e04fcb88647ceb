"""Check whether a checkpoint still has the known super weights of its model, with their values.

Works on any checkpoint, including fine-tuned, merged and quantised ones: one scalar is read for each known coordinate.
checkpoint/quantised.py decides whether a stored number is a weight, must be multiplied by a scale, or cannot be read.
Nothing is guessed. This module must not depend on the record: its callers pass the set of edited coordinates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.find import find_codes, find_matrix, make_reader
from swsurgery.editing.targets import expect_known
from swsurgery.errors import ArchitectureError, CheckpointError
from swsurgery.known import KnownCoordinate, KnownModel
from swsurgery.manifest.operations import explain_expectation
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import DTYPES, Dtype, FloatDtype
from swsurgery.storage.numbers import format_exact, format_number
from swsurgery.verifying.findings import Finding

State = Literal["kept", "changed", "suspicious", "lost", "present", "declared", "unreadable"]
"""State of a known super weight in a checkpoint.

"kept": it has its known value, except for rounding. "changed": it has another value of the same sign, which is neither
lost nor suspicious. "lost": it is zero or not finite, has the opposite sign, or is smaller than TOLERANCE permits.
"suspicious": it is larger than SUSPICIOUS permits. "present": no value of it was published, so nothing is
compared. "declared": the record contains an edit of it. "unreadable": it cannot be read as one number.
"""

TOLERANCE = 0.25
"""Maximum fraction of its known value that a super weight may lose before it is reported as lost.

The shipped sweeps of Mistral-7B and OLMo-1B show where damage begins. If the super weight is scaled to 0.75 of its
value, perplexity is multiplied by 1.03; at 0.5 it is multiplied by 1.39 and 8.3, and at 0.25 by 83 and 279. A super
weight that became larger, up to SUSPICIOUS, is shown but is not a finding: at twice the value, zero-shot accuracy
changes by about half a point (Llama-7B 70.1 to 70.6, Mistral-7B 74.0 to 73.8). Rounding to FP8 changes a value by at
most 1/16 of it, which is permitted.
"""

NOT_HELD = ("disputed", "refuted", "insufficient")
"""Statuses of known coordinates that never make the answer "no".

The sources disagree about such a coordinate, or the weight there may never have been large.
"""

SUSPICIOUS = 4.0
"""A stored value larger than this multiple of the known value is suspicious.

No fine-tuning is known to change a super weight this much. The stored numbers are more probably the codes of a
quantiser, which are larger than the weights by the factor 1 / scale.
"""

UNDECIDED = ("suspicious", "unreadable")
"""States in which it remains unknown whether a super weight was kept or lost."""


@dataclass(frozen=True)
class Kept:
    """State of one known coordinate in one checkpoint.

    `known` is the published value, and `stored` is the checkpoint's value, multiplied by its scale if it is quantised.
    `ratio` is stored / known, or the ratio of magnitudes if the published sign is unknown. `held` is False if the
    status is in NOT_HELD: then the state does not affect the answer. `reason` explains the state "unreadable".
    """

    id: str
    status: str
    causal_alone: str
    state: State
    held: bool
    tensor: str | None = None
    index: tuple[int, ...] | None = None
    file: str | None = None
    known: float | None = None
    stored: float | None = None
    dtype: str | None = None
    ratio: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = asdict(self) | {"index": None if self.index is None else list(self.index)}
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in document.items()}


@dataclass(frozen=True)
class Survival:
    """States of all known coordinates of one model in one checkpoint.

    `tolerance` is the fraction of its value that a super weight may lose. `rows` are the ids of the super weights of
    which only the row is known, without a column; they are not read.
    """

    model: str
    tolerance: float
    coordinates: tuple[Kept, ...]
    rows: tuple[str, ...]

    @property
    def decided(self) -> bool:
        """True if at least one coordinate gives an answer: it is `held`, and its state is not in UNDECIDED."""
        return any(c.held and c.state not in UNDECIDED for c in self.coordinates)

    def list_findings(self) -> list[Finding]:
        """Return one finding for each lost, suspicious or unreadable coordinate whose `held` is True."""
        found = []
        for c in self.coordinates:
            if c.held and c.state in ("lost", *UNDECIDED):
                message = f"{c.id} ({c.status}, zeroed alone: {c.causal_alone}): {describe_kept(c)}"
                found.append(Finding(f"known-{c.state}", message, c.file, c.tensor, c.index))
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "tolerance": self.tolerance,
            "decided": self.decided,
            "coordinates": [c.to_json() for c in self.coordinates],
            "rows": list(self.rows),
        }


def describe_kept(kept: Kept) -> str:
    """Describe the state of one coordinate as text, such as "kept: 3.5 -> 3.5 (BF16)"."""
    if kept.stored is None:
        return f"cannot be read as one scalar: {kept.reason}"
    stored = f"{format_exact(kept.stored)} ({kept.dtype})"
    if kept.known is None:
        return f"{kept.state}: {stored} is stored, and no value is known"
    ratio = "" if kept.ratio is None or kept.state == "kept" else f", x{format_number(kept.ratio)}"
    doubt = ", so the stored numbers may not be weights" if kept.state == "suspicious" else ""
    return f"{kept.state}: {format_exact(kept.known)} -> {stored}{ratio}{doubt}"


def survey(
    checkpoint: Checkpoint, model: KnownModel, declared: Collection[Coordinate] = (), tolerance: float = TOLERANCE
) -> Survival:
    """Read every known scalar of `model`. Scalars in `declared` were edited on purpose and get the state "declared".

    Raises CheckpointError if no coordinate of the model is known completely, with its row and column.
    """
    coordinates = tuple(
        _read_known(c, c.col, checkpoint, declared, tolerance) for c in model.coordinates if c.col is not None
    )
    if not coordinates:
        raise CheckpointError(
            "no complete coordinate (row and column) of this model is known",
            model.hf_id,
            "find them with swsurgery scan",
        )
    return Survival(model.hf_id, tolerance, coordinates, tuple(c.id for c in model.coordinates if c.col is None))


def _read_known(
    entry: KnownCoordinate, col: int, checkpoint: Checkpoint, declared: Collection[Coordinate], tolerance: float
) -> Kept:
    """Read one known scalar, whose column is `col`, and decide its state."""
    kept = Kept(entry.id, entry.status, entry.causal_alone, "unreadable", entry.status not in NOT_HELD)
    try:
        coordinate = projections.locate(
            checkpoint.config, checkpoint.weight_shapes, layer=entry.layer, row=entry.row, col=col, expert=entry.expert
        )
        codes = find_codes(checkpoint, coordinate.tensor) or coordinate.tensor
        file = checkpoint.weight_map[codes]
        kept = replace(kept, tensor=coordinate.tensor, index=coordinate.index, file=file)
        value, step, raw = read_weight(checkpoint, coordinate)
    except (ArchitectureError, Unreadable) as error:
        return replace(kept, reason=str(error))
    dtype = checkpoint.get_info(codes).dtype
    number, slack, signed = read_known_value(entry)
    kept = replace(kept, stored=value, dtype=dtype.name, known=number)
    ratio = None
    if number is not None and math.isfinite(value):
        ratio = value / number if signed else abs(value / number)
        kept = replace(kept, ratio=ratio)
    if coordinate in declared:
        return replace(kept, state="declared")
    if not math.isfinite(value) or value == 0:
        return replace(kept, state="lost")
    if number is None or ratio is None:
        return replace(kept, state="present")
    if step is None and (expected := expect_known(entry)) is not None:
        same = explain_expectation(expected, dtype, raw) is None
    else:
        distance = abs(value - number) if signed else abs(abs(value) - abs(number))
        same = distance <= slack + (step if step is not None else compute_spacing(dtype, value))
    return replace(kept, state="kept" if same else _judge(ratio, tolerance))


def _judge(ratio: float, tolerance: float) -> State:
    """Return the state of a scalar that is not "kept" and whose value is `ratio` times the known value."""
    if ratio > SUSPICIOUS:
        return "suspicious"
    return "lost" if ratio < 1 - tolerance else "changed"


class Unreadable(Exception):
    """Raised if a coordinate cannot be read as one number. The message gives the reason."""


def read_weight(checkpoint: Checkpoint, coordinate: Coordinate) -> tuple[float, float | None, bytes]:
    """Read one scalar. Returns (value, step, stored bytes). Raises Unreadable.

    If the weight is quantised, `step` is the distance from this value to the next value that can be stored with the
    same scale, and the bytes are empty. Otherwise `step` is None.
    """
    name, index = coordinate
    try:
        matrix = find_matrix(checkpoint, name)
        if matrix is not None:
            cell = matrix.find_cell(index)
            value = cell.values[cell.read_code(make_reader(checkpoint))]
            return value, cell.compute_step(value), b""
    except CannotTell as error:
        raise Unreadable(str(error)) from None
    info = checkpoint.get_info(name)
    reading = checkpoint.quantisation.get_reading(name)
    if reading.kind == "internal":
        raise Unreadable(f"{name} does not contain weights: {reading.reason}")
    if info.dtype.kind != "float":
        raise Unreadable(f"{name} is stored as {info.dtype.name} and has no scale, so its values are unknown")
    raw = checkpoint.shards[checkpoint.weight_map[name]].read_scalar(name, index)
    return float(dtypes.decode(info.dtype, raw)), None, raw


def compute_spacing(dtype: Dtype, value: float) -> float:
    """Return the distance from `value` to the next larger magnitude in a float dtype."""
    if not isinstance(dtype, FloatDtype):
        raise ValueError(f"{dtype.name} is not a floating-point dtype")
    exponent = max(math.frexp(value)[1] - 1, 1 - dtype.bias) if value else 1 - dtype.bias
    return math.ldexp(1.0, exponent - dtype.mantissa)


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
