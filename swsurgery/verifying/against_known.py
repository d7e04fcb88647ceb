"""Whether a checkpoint still has the known super weights of its model, and still has their values.

Any checkpoint will do, be it fine-tuned, merged or quantised: what is read is one scalar for each known coordinate.
quantised.py decides how the stored numbers are read: as weights, through a scale, or not at all. Nothing is guessed.
Knows no registry of edits beyond the set of coordinates that it declares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ArchitectureError, CheckpointError
from swsurgery.known import KnownCoordinate, KnownModel, own
from swsurgery.manifest.operations import MeasuredValue, expectation_fault
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import DTYPES, Dtype
from swsurgery.verifying.findings import Finding

State = Literal["kept", "changed", "suspicious", "lost", "present", "declared", "unreadable"]

TOLERANCE = 0.25
"""How much of its known value a super weight may have lost. The shipped sweeps say where harm begins: at 0.75 of its
value perplexity is x1.03 (Mistral-7B, OLMo-1B), at 0.5 it is x1.39 and x8.3, at 0.25 x83 and x279; at twice its value
zero-shot accuracy moves by less than half a point (Llama-7B 70.1 to 70.6, Mistral-7B 74.0 to 73.8), so growth is told
and not held against it. FP8 rounds by 1/16 at most."""

NOT_HELD = ("disputed", "refuted", "insufficient")
"""Statuses that are no ground for a no: places where sources disagree, or where no large weight may ever have been."""

SUSPICIOUS = 4.0
"""From more than this many times the known value on, a value is suspicious: no fine-tuning is known to move a super
weight so far, but codes read as if they were weights are larger by one over their scale."""

UNDECIDED = ("suspicious", "unreadable")
"""States that neither prove a super weight nor show that it is lost."""


@dataclass(frozen=True)
class Kept:
    """One known coordinate in one checkpoint.

    `known` and `stored` are values, `ratio` is stored / known (of magnitudes, where the sign is not known). `held` is
    False where the registry of facts itself doubts the coordinate. `reason` says why it is unreadable.
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
    """All known coordinates of one model in one checkpoint; `rows` are ids of which only the row is known."""

    model: str
    tolerance: float
    coordinates: tuple[Kept, ...]
    rows: tuple[str, ...]

    @property
    def decided(self) -> bool:
        """True if any coordinate that counts is neither unreadable nor suspicious."""
        return any(c.held and c.state not in UNDECIDED for c in self.coordinates)

    def findings(self) -> list[Finding]:
        found = []
        for c in self.coordinates:
            if c.held and c.state in ("lost", *UNDECIDED):
                message = f"{c.id} ({c.status}, zeroed alone: {c.causal_alone}): {told(c)}"
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


def told(kept: Kept) -> str:
    """The state of one coordinate in words."""
    if kept.state == "unreadable":
        return f"cannot be read as one scalar: {kept.reason}"
    stored = f"{dtypes.show(kept.stored)} ({kept.dtype})"
    if kept.known is None:
        return f"{kept.state}: {stored} is stored, no value is known"
    ratio = "" if kept.ratio is None or kept.state == "kept" else f", x{kept.ratio:.4g}"
    doubt = ", so the stored numbers may be no weights" if kept.state == "suspicious" else ""
    return f"{kept.state}: {dtypes.show(kept.known)} -> {stored}{ratio}{doubt}"


def identify(checkpoint: Checkpoint, name: str | None, repo_ids: Iterable[str | None] = ()) -> KnownModel:
    """The known model that a checkpoint is: by `name`, else by the first of `repo_ids`, of the cache that it lies in,
    and of config.json's _name_or_path that is known. Raises LookupFailed, CheckpointError where nothing says."""
    if name is not None:
        return own.lookup(name)
    for repo_id in (*repo_ids, checkpoint.repo_id, checkpoint.config.get("_name_or_path")):
        if isinstance(repo_id, str) and re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?", repo_id):
            model = own.of_repo(repo_id)
            if model:
                return model
    raise CheckpointError("nothing says which known model it is", checkpoint.root, "say which: --model NAME")


def survey(
    checkpoint: Checkpoint, model: KnownModel, declared: Collection[Coordinate] = (), tolerance: float = TOLERANCE
) -> Survival:
    """Read every known scalar of `model`. Those in `declared` were edited on purpose and count as such."""
    coordinates = tuple(_kept(c, checkpoint, declared, tolerance) for c in model.coordinates if c.col is not None)
    if not coordinates:
        raise CheckpointError("no whole coordinate is known", model.hf_id, "swsurgery scan finds them")
    return Survival(model.hf_id, tolerance, coordinates, tuple(c.id for c in model.coordinates if c.col is None))


def _kept(
    entry: KnownCoordinate, checkpoint: Checkpoint, declared: Collection[Coordinate], tolerance: float
) -> Kept:  # fmt: skip
    fields: dict[str, Any] = {"id": entry.id, "status": entry.status, "causal_alone": entry.causal_alone,
                              "held": entry.status not in NOT_HELD}  # fmt: skip
    try:
        coordinate = projections.locate(
            checkpoint.config, checkpoint.shapes, layer=entry.layer, row=entry.row, col=entry.col, expert=entry.expert
        )
        fields |= {"tensor": coordinate.tensor, "index": coordinate.index,
                   "file": checkpoint.weight_map[coordinate.tensor]}  # fmt: skip
        value, step, raw = _read(checkpoint, coordinate)
    except (ArchitectureError, _Unreadable) as error:
        return Kept(**fields, state="unreadable", reason=str(error))
    dtype = checkpoint.info(coordinate.tensor).dtype
    number, slack, signed = _expected(entry)
    fields |= {"stored": value, "dtype": dtype.name, "known": number}
    if number is not None and math.isfinite(value):
        fields["ratio"] = value / number if signed else abs(value / number)
    if coordinate in declared:
        return Kept(**fields, state="declared")
    if not math.isfinite(value) or value == 0:
        return Kept(**fields, state="lost")
    if number is None:
        return Kept(**fields, state="present")
    distance = abs(value - number) if signed else abs(abs(value) - abs(number))
    if step is None and entry.value is not None:
        same = expectation_fault(MeasuredValue(value=entry.value, dtype=entry.dtype), dtype, raw) is None
    else:
        same = distance <= slack + (step if step is not None else _spacing(dtype, value))
    if same:
        return Kept(**fields, state="kept")
    if fields["ratio"] > SUSPICIOUS:
        return Kept(**fields, state="suspicious")
    return Kept(**fields, state="lost" if fields["ratio"] < 1 - tolerance else "changed")


class _Unreadable(Exception):
    """Why no single number is stored there."""


def _read(checkpoint: Checkpoint, coordinate: Coordinate) -> tuple[float, float | None, bytes]:
    """(value, step, stored bytes). `step` is the distance of neighbouring values of a scaled format at this value,
    None where the stored scalar is the weight itself. Raises _Unreadable."""
    name, index = coordinate
    info = checkpoint.info(name)
    reading = checkpoint.quantisation.reading(name)
    if reading.kind == "internal":
        raise _Unreadable(f"{name} holds no weights: {reading.reason}")
    if reading.kind == "unreadable":
        raise _Unreadable(f"{name} is quantised: {reading.reason}")
    if info.dtype.kind == "opaque" or (info.dtype.kind != "float" and reading.scale is None):
        raise _Unreadable(f"{name} holds {info.dtype.name}, and no scale says what that means")
    raw = checkpoint.shards[checkpoint.weight_map[name]].read_scalar(name, index)
    value = dtypes.decode(info.dtype, raw)
    if reading.scale is None or not math.isfinite(value):
        return float(value), None, raw
    factor = _scale(checkpoint, reading.scale, info.shape, index)
    step = abs(float(factor)) * (_spacing(info.dtype, value) if info.dtype.kind == "float" else 1)
    return float(Fraction(value) * factor), step, raw


def _scale(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], index: tuple[int, ...]) -> Fraction:
    """The one factor of the scalar at `index`: of the tensor, of its row, or of its block. Raises _Unreadable."""
    if name in checkpoint.disagreements:
        raise _Unreadable(f"index and shards disagree about {name}")
    info = checkpoint.info(name)
    if info.dtype.kind != "float":
        raise _Unreadable(f"{name} holds {info.dtype.name}")
    _refuse_turned(checkpoint, name)
    scale_shape = info.shape
    if math.prod(scale_shape) == 1:
        place = (0,) * len(scale_shape)
    elif len(scale_shape) == 1 and scale_shape == shape[:1]:
        place = index[:1]
    elif len(scale_shape) == len(shape):
        blocks = _blocks(checkpoint, shape, scale_shape)
        if blocks is None:
            raise _Unreadable(f"{name} of shape {list(scale_shape)} does not say which block scales what")
        place = tuple(i // block for i, block in zip(index, blocks, strict=True))
    else:
        raise _Unreadable(f"{name} of shape {list(scale_shape)} does not fit {list(shape)}")
    value = dtypes.decode(info.dtype, checkpoint.shards[checkpoint.weight_map[name]].read_scalar(name, place))
    if not math.isfinite(value):
        raise _Unreadable(f"{name} holds {value}")
    # LLM.int8 stores the largest magnitude of a row, which is 127 steps (arXiv:2208.07339, section 2.1).
    return Fraction(value) / 127 if name.endswith(".SCB") else Fraction(value)


def _refuse_turned(checkpoint: Checkpoint, scale: str) -> None:
    """Raise _Unreadable if bitsandbytes says that an int8 matrix is not stored row by row (`weight_format` 0)."""
    form = scale.removesuffix("SCB") + "weight_format"
    if not scale.endswith(".SCB") or form not in checkpoint.shapes:
        return
    if math.prod(checkpoint.shapes[form]) != 1:
        raise _Unreadable(f"{form} is not one number")
    data = checkpoint.shards[checkpoint.weight_map[form]].read_scalar(form, (0,) * len(checkpoint.shapes[form]))
    if any(data):
        raise _Unreadable(f"{form} says that the matrix is not stored row by row")


def _blocks(checkpoint: Checkpoint, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """Elements along each axis that share a scale; None where the shapes leave it open."""
    config = checkpoint.config.get("quantization_config")
    said = config.get("weight_block_size") if isinstance(config, dict) else None
    if isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said):
        blocks = (*(1,) * (len(shape) - 2), *said)
        if all(-(-n // block) == count for n, block, count in zip(shape, blocks, scales, strict=True)):
            return blocks
    if any(count == 0 or n % count for n, count in zip(shape, scales, strict=True)):
        return None
    return tuple(n // count for n, count in zip(shape, scales, strict=True))


def _spacing(dtype: Dtype, value: float) -> float:
    """Distance of neighbouring values of a float dtype around `value`."""
    fmt = dtype.float_format
    exponent = max(math.frexp(value)[1] - 1, 1 - fmt.bias) if value else 1 - fmt.bias
    return math.ldexp(1.0, exponent - fmt.mantissa)


def _expected(entry: KnownCoordinate) -> tuple[float | None, float, bool]:
    """(known value, how inexact it is, whether its sign is known). A print is exact to half its last digit."""
    if entry.value is not None:
        return entry.value or None, _spacing(DTYPES[entry.dtype], entry.value), True
    text = entry.value_printed or ""
    match = re.match(r"-?\d+(?:\.(\d+))?", text)
    if match is None or float(match[0]) == 0:
        return None, 0.0, True
    return float(match[0]), 0.5 * 10.0 ** -len(match[1] or ""), "sign" not in text
