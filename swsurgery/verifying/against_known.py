"""Check whether a checkpoint still has the known super weights of its model, with their values.

Works on any checkpoint, including fine-tuned, merged and quantised ones: one scalar is read for each known coordinate.
known_states.py decides what became of each of them. This module must not depend on the record: its callers pass the set
of edited coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.find import find_codes, find_matrix
from swsurgery.errors import ArchitectureError
from swsurgery.known import KnownCoordinate, KnownModel
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.numbers import format_exact, format_number
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.known_search import FoundElsewhere, find_elsewhere
from swsurgery.verifying.known_states import NOT_HELD, TOLERANCE, UNDECIDED, State, classify_weight, read_known_number
from swsurgery.verifying.stored_weight import CodedWeight, StoredWeight, Unreadable, read_weight


@dataclass(frozen=True)
class Kept:
    """State of one known coordinate in one checkpoint.

    `known` is the published value, and `stored` is the checkpoint's value, multiplied by its scale if it is quantised.
    `ratio` is stored / known, or the ratio of magnitudes if the published sign is unknown. `held` is False if the
    status is in NOT_HELD: then the state does not affect the answer. `reason` explains the state "unreadable".

    `step` is the distance from the stored value to the next value of its dtype or of its grid. `layout` describes how a
    quantised weight is stored, and `code` is its code; both are None for a plain float. `high_precision` is True for a
    plain float in a checkpoint that contains quantised weights. `found` is an element of the same matrix that has the
    value of a lost super weight.
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
    layout: str | None = None
    code: int | None = None
    step: float | None = None
    high_precision: bool = False
    found: FoundElsewhere | None = None

    def to_json(self) -> dict[str, Any]:
        document = asdict(self) | {"index": None if self.index is None else list(self.index)}
        document["found"] = self.found and self.found.to_json()
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

    def is_finding(self, kept: Kept) -> bool:
        """Return True if `list_findings` reports this coordinate."""
        return kept.held and kept.state in ("lost", *UNDECIDED)

    def list_findings(self) -> list[Finding]:
        """Return one finding for each lost, suspicious or unreadable coordinate whose `held` is True."""
        found = []
        for c in self.coordinates:
            if self.is_finding(c):
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
    value = format_number(kept.stored + 0.0, 6) if kept.layout else format_exact(kept.stored)
    stored = f"{value} ({_describe_storage(kept)})"
    if kept.known is None:
        return f"{kept.state}: {stored} is stored, and no value is known"
    parts = [f"{kept.state}: {format_exact(kept.known)} -> {stored}"]
    if kept.ratio is not None and kept.state != "kept":
        parts.append(f"x{format_number(kept.ratio + 0.0)}")  # -0.0 + 0.0 is 0.0
    if kept.step is not None and (kept.layout is not None or kept.state in ("close", "changed")):
        parts.append(f"grid step {format_number(kept.step)}")
    if kept.found is not None:
        parts.append(f"found at {list(kept.found.index)}")
    if kept.state == "suspicious":
        parts.append("so the stored numbers may not be weights")
    return ", ".join(parts)


def _describe_storage(kept: Kept) -> str:
    """Describe how a weight is stored: by its layout and its code, or by its dtype."""
    if kept.layout is not None:
        return kept.layout if kept.code is None else f"{kept.layout}, code {kept.code}"
    return f"kept in {kept.dtype}" if kept.high_precision else str(kept.dtype)


def survey(
    checkpoint: Checkpoint, model: KnownModel, declared: Collection[Coordinate] = (), tolerance: float = TOLERANCE
) -> Survival:
    """Read every known scalar of `model`. Scalars in `declared` were edited on purpose and get the state "declared".

    The result has no coordinates if none of the model is known completely, with its row and column.
    """
    coordinates = tuple(
        _read_known(c, c.col, checkpoint, declared, tolerance) for c in model.coordinates if c.col is not None
    )
    return Survival(model.hf_id, tolerance, coordinates, tuple(c.id for c in model.coordinates if c.col is None))


def find_moved(checkpoint: Checkpoint, model: KnownModel, survival: Survival) -> Survival:
    """Search the matrix of each lost super weight for an element with its value, and add what is found.

    This reads the whole matrix of each super weight that is lost and `held`, and nothing else.
    """
    entries = {entry.id: entry for entry in model.coordinates}
    places = {Coordinate(c.tensor, c.index) for c in survival.coordinates if c.tensor and c.index}
    found = tuple(_search(checkpoint, kept, entries[kept.id], places) for kept in survival.coordinates)
    return replace(survival, coordinates=found)


def _search(checkpoint: Checkpoint, kept: Kept, entry: KnownCoordinate, places: Collection[Coordinate]) -> Kept:
    """Return `kept` with the element that has its value, if it is lost and exactly one such element is found."""
    known = read_known_number(entry)
    if kept.state != "lost" or not kept.held or known is None or kept.tensor is None or kept.index is None:
        return kept
    return replace(kept, found=find_elsewhere(checkpoint, Coordinate(kept.tensor, kept.index), known, places))


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
        stored = read_weight(checkpoint, coordinate)
    except ArchitectureError as error:
        return replace(kept, reason=_explain_packed(checkpoint, entry) or str(error))
    except Unreadable as error:
        return replace(kept, reason=str(error))
    known = read_known_number(entry)
    kept = replace(
        _describe_stored(kept, stored, checkpoint),
        dtype=checkpoint.get_info(codes).dtype.name,
        known=None if known is None else known.value,
    )
    if known is not None and math.isfinite(stored.value):
        kept = replace(kept, ratio=stored.value / known.orient(stored.value))
    return replace(kept, state="declared" if coordinate in declared else classify_weight(known, stored, tolerance))


def _explain_packed(checkpoint: Checkpoint, entry: KnownCoordinate) -> str | None:
    """Explain why the layout of a packed matrix cannot be decided; None if no such matrix is stored."""
    if find_codes(checkpoint, entry.tensor) is None:
        return None
    try:
        find_matrix(checkpoint, entry.tensor)
    except CannotTell as error:
        return f"the matrix is packed in a way that cannot be read: {error}"
    return None


def _describe_stored(kept: Kept, stored: StoredWeight, checkpoint: Checkpoint) -> Kept:
    """Return `kept` with the stored value, and with the code and the grid step of a quantised weight."""
    step = stored.step or None
    if isinstance(stored, CodedWeight):
        return replace(kept, stored=stored.value, step=step, code=stored.code, layout=stored.layout)
    return replace(kept, stored=stored.value, step=step, high_precision=checkpoint.quantisation.has_codes)
