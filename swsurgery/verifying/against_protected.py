"""Check whether a derived checkpoint still has the values of the scalars that a manifest protects.

Works on any checkpoint, such as a merged, fine-tuned or quantised one, and needs no record. The expected value of a
scalar is the edit's `expect`, or else the value in a given base, or else the known value of a super weight. Rows,
columns and other regions are compared with a base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.layouts.find import find_codes
from swsurgery.editing.targets import (
    Expected,
    KnownScalars,
    LayerScalar,
    Scope,
    StoredScalar,
    TargetPlace,
    expect_known,
    find_known,
    locate,
    read_target,
)
from swsurgery.errors import ArchitectureError, Fault, LookupFailed, NumberError, PlanError, pluralise
from swsurgery.known import KnownCoordinate, KnownModel, own
from swsurgery.manifest.load import LoadedManifest
from swsurgery.manifest.operations import explain_expectation
from swsurgery.manifest.targets import SCALAR_FORMS, MeasuredValue
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import Coordinate, is_valid_index
from swsurgery.storage.dtypes import Dtype
from swsurgery.storage.numbers import format_exact, format_number
from swsurgery.storage.region import Region
from swsurgery.verifying.against_manifest import point_at
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.known_states import read_known_value
from swsurgery.verifying.stored_weight import CodedWeight, PlainWeight, StoredWeight, Unreadable, read_weight

if TYPE_CHECKING:
    from swsurgery.verifying.guarded_regions import GuardedRegion

Origin = Literal["expect", "base", "known"]
"""Where an expected value comes from: the edit, the base that the user gave, or the known super weights."""

GuardState = Literal["kept", "lost", "unreadable"]
"""State of a protected scalar: it has the expected value, it has another one, or it cannot be read as one number."""


@dataclass(frozen=True)
class ExpectedValue:
    """The value that a protected scalar should have.

    `value` is the number, or None if only bits of another width are known. `exact` is the form in which it is compared
    exactly: a number, bits, or a number and its dtype; None if a paper printed a rounded number. `slack` is the
    uncertainty of such a number, and `signed` is False if its sign is unknown.
    """

    origin: Origin
    value: float | None
    exact: Expected
    slack: float = 0.0
    signed: bool = True


@dataclass(frozen=True)
class GuardedScalar:
    """One scalar that the manifest protects, and its state in the checkpoint.

    `number` is the position of the edit in the manifest, counted from 0. `message` describes the state. `dtype` is that
    of the stored number, or of the codes of a quantised weight. Such a weight also has a `layout`, a `code` unless one
    code stands for several elements, and the distance `step` to the next value of its grid.
    """

    number: int
    state: GuardState
    message: str
    coordinate: Coordinate | None = None
    file: str | None = None
    dtype: str | None = None
    layout: str | None = None
    code: int | None = None
    step: float | None = None
    stored: float | None = None
    expected: float | None = None
    origin: Origin | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the scalar as JSON. A number that is not finite becomes a text."""
        numbers = {"stored": self.stored, "expected": self.expected}
        return {
            "edit": self.number,
            "state": self.state,
            "tensor": self.coordinate.tensor if self.coordinate else None,
            "index": list(self.coordinate.index) if self.coordinate else None,
            "file": self.file,
            "dtype": self.dtype,
            "layout": self.layout,
            "code": self.code,
            "step": self.step,
            "origin": self.origin,
            "message": self.message,
            **{k: str(v) if v is not None and not math.isfinite(v) else v for k, v in numbers.items()},
        }


@dataclass(frozen=True)
class Guard:
    """The states of all scalars and regions that a manifest protects.

    `tolerance` is the permitted relative difference.
    """

    loaded: LoadedManifest
    tolerance: float
    scalars: tuple[GuardedScalar, ...]
    regions: tuple[GuardedRegion, ...] = ()

    def list_findings(self) -> list[Finding]:
        """Return one finding, with its position in the manifest, for each scalar that was not kept.

        For a region, some lost scalars have a finding each, and one more finding counts the others.
        """
        found = []
        for scalar in self.scalars:
            if scalar.state != "kept":
                tensor, index = scalar.coordinate or (None, None)
                finding = Finding(f"protected-{scalar.state}", scalar.message, scalar.file, tensor, index)
                found.append(point_at(self.loaded, finding, ("edits", scalar.number)))
        for region in self.regions:
            found += [point_at(self.loaded, finding, ("edits", region.number)) for finding in region.list_findings()]
        return found

    def describe(self) -> str:
        """Return the line that `verify` prints."""
        kept = sum(scalar.state == "kept" for scalar in self.scalars) + sum(region.kept for region in self.regions)
        count = len(self.scalars) + sum(region.scalars for region in self.regions)
        permitted = f", within {format_number(self.tolerance)} of the expected value" if self.tolerance else ""
        return f"kept      {kept} of {pluralise(count, 'scalar')} that {self.loaded.path} protects{permitted}"

    def to_json(self) -> dict[str, Any]:
        """Return the states as JSON."""
        document: dict[str, Any] = {
            "manifest": str(self.loaded.path),
            "tolerance": self.tolerance,
            "scalars": [scalar.to_json() for scalar in self.scalars],
        }
        if self.regions:
            document["regions"] = [region.to_json() for region in self.regions]
        return document


def check_protected(
    loaded: LoadedManifest,
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    tolerance: float,
    repo_ids: tuple[str | None, ...] = (),
) -> Guard:
    """Compare every scalar and region that a protect edit of the manifest names with its expected values.

    The expected values of a region are those of the base.

    A value is kept if it equals the expected one after rounding to the stored dtype, or if their difference is at most
    the fraction `tolerance` of the expected value. `repo_ids` may name the known model.

    Raises LookupFailed; PlanError if the manifest protects nothing, or if the expected value of a scalar or region is
    not known.
    """
    manifest = loaded.manifest
    names = (manifest.base.repo_id, checkpoint.repo_id, *repo_ids, checkpoint.config.get("_name_or_path"))
    model = own.identify(manifest.base.model, names)
    scalars: list[GuardedScalar] = []
    regions: list[GuardedRegion] = []
    faults: list[str] = []
    edited = set(_list_edited(loaded, checkpoint, model))
    for number, edit in enumerate(manifest.edits):
        if edit.op != "protect":
            continue
        where = loaded.describe_position(number)
        places, misfits = _resolve(loaded, number, checkpoint, model)
        if not places and not misfits:
            if base is None:
                what = f"the values of {read_target(edit)} are not known"
                faults.append(Fault(what, remedy="give --base", position=where))
            else:
                regions += _compare_regions(loaded, number, (checkpoint, base), model, tolerance)
        scalars += [GuardedScalar(number, "unreadable", misfit) for misfit in misfits]
        for place in places:
            if edit.known == "all" and place.coordinate in edited:
                continue
            expected = _find_expected(place, checkpoint, base, model)
            if expected is None:
                remedy = "give --base, or expect in the manifest"
                faults.append(Fault(f"no value of {place.coordinate} is known", remedy=remedy, position=where))
            else:
                scalars.append(_compare(number, place.coordinate, expected, checkpoint, tolerance))
    if faults:
        raise PlanError.of(faults)
    if not scalars and not regions:
        raise PlanError("the manifest protects no scalar", loaded.path, "add an edit with op protect")
    return Guard(loaded, tolerance, tuple(scalars), tuple(regions))


def _compare_regions(
    loaded: LoadedManifest,
    number: int,
    checkpoints: tuple[Checkpoint, Checkpoint],
    model: KnownModel | None,
    tolerance: float,
) -> Iterator[GuardedRegion]:
    """Compare the regions that an edit names in a checkpoint with those in its base.

    Both pairs begin with the checkpoint. Raises PlanError if the base does not have what the edit names.
    """
    from swsurgery.verifying.guarded_regions import GuardedRegion, compare_region  # imports numpy

    checkpoint, base = checkpoints
    target = read_target(loaded.manifest.edits[number])
    find = partial(find_known, model)
    ours, theirs = (
        [place for place in target.resolve(Scope(one, find)) if isinstance(place, Region)] for one in checkpoints
    )
    pairs: list[tuple[Region | None, Region]] = [*zip(ours, theirs, strict=False)]
    if [region.shape for region in ours] != [region.shape for region in theirs]:
        pairs = [(region if region in ours else None, region) for region in theirs]

    def compare_one(coordinate: Coordinate, there: Coordinate) -> tuple[bool, str]:
        expected = _read_expected(there, base)
        if expected is None:
            return False, f"{coordinate}: the base's value cannot be read as a finite number"
        scalar = _compare(number, coordinate, expected, checkpoint, tolerance)
        return scalar.state == "kept", scalar.message

    for our, their in pairs:
        if our is None:
            reason = f"the checkpoint does not have {their}"
            yield GuardedRegion(number, str(target), their, None, their.scalars, reason=reason)
        else:
            yield compare_region(number, str(target), (our, their), checkpoints, tolerance, compare_one)


def _list_edited(loaded: LoadedManifest, checkpoint: Checkpoint, model: KnownModel | None) -> Iterator[Coordinate]:
    """Yield the scalars that edits other than `known: all` name; `known: all` does not protect these."""
    for number, edit in enumerate(loaded.manifest.edits):
        if edit.form.name in SCALAR_FORMS and edit.known != "all":
            yield from (place.coordinate for place in _resolve(loaded, number, checkpoint, model)[0])


def _resolve(
    loaded: LoadedManifest, number: int, checkpoint: Checkpoint, model: KnownModel | None
) -> tuple[list[TargetPlace], tuple[str, ...]]:
    """Return the scalars of an edit that the checkpoint has, and one message for each scalar that it does not have."""
    target = read_target(loaded.manifest.edits[number])
    places: list[TargetPlace] = []
    try:
        for place in target.resolve(Scope(checkpoint, partial(find_known, model))):
            if isinstance(place, Region):  # `known:` with the id of a row, column or expert
                continue
            # The value that `known:` expects is found later, because the value in a base takes precedence over it.
            places.append(place._replace(expect=None) if isinstance(target, KnownScalars) else place)
    except (ArchitectureError, PlanError) as error:
        return places, error.faults
    except LookupFailed as error:
        raise PlanError.of(Fault.parse(f, loaded.describe_position(number)) for f in error.faults) from None
    return places, ()


def _find_expected(
    place: TargetPlace, checkpoint: Checkpoint, base: Checkpoint | None, model: KnownModel | None
) -> ExpectedValue | None:
    """Find the expected value of a scalar. Returns None if neither the edit nor the base nor a source has one."""
    if place.expect is not None:
        info = checkpoint.shapes.get(place.coordinate.tensor)
        dtype = checkpoint.get_info(place.coordinate.tensor).dtype if info is not None else None
        return ExpectedValue("expect", _to_number(place.expect, dtype), place.expect)
    short = projections.find_short_form(checkpoint.config, checkpoint.shapes, place.coordinate)
    if base is not None and (found := _read_base(place.coordinate, short, base)) is not None:
        return found
    entry = _find_entry(place.coordinate, short, model)
    if entry is None:
        return None
    number, slack, signed = read_known_value(entry)
    return None if number is None else ExpectedValue("known", number, expect_known(entry), slack, signed)


def _to_number(expect: Expected, dtype: Dtype | None) -> float | None:
    """Return an expected value as a number; None for bits that do not have the width of the dtype."""
    if isinstance(expect, MeasuredValue):
        return float(expect.value)
    if not isinstance(expect, str):
        return None if expect is None else float(expect)
    try:
        return None if dtype is None else float(dtypes.decode(dtype, dtypes.parse_bits(dtype, expect)))
    except (NumberError, ValueError):
        return None


def _read_base(
    coordinate: Coordinate, short: tuple[int, int, int, Any] | None, base: Checkpoint
) -> ExpectedValue | None:
    """Read the value in the base, whose tensors may have other names. Returns None if it has no finite one."""
    try:
        return _read_expected(locate(base, *short) if short else coordinate, base)
    except ArchitectureError:
        return None


def _read_expected(there: Coordinate, base: Checkpoint) -> ExpectedValue | None:
    """Read the value at a coordinate of the base. Returns None if it is not finite or cannot be read as a number."""
    try:
        stored = _read_stored(base, there)
    except Unreadable:
        return None
    if not math.isfinite(stored.value):
        return None
    if not isinstance(stored, PlainWeight):
        return ExpectedValue("base", stored.value, None, slack=stored.step)
    measured = MeasuredValue.model_validate({"value": stored.value, "dtype": stored.dtype.name})
    return ExpectedValue("base", stored.value, measured)


def _read_stored(checkpoint: Checkpoint, coordinate: Coordinate) -> StoredWeight:
    """Read a weight as against_known.py does. Raises Unreadable if the checkpoint does not have it."""
    name, index = coordinate
    codes = find_codes(checkpoint, name)
    if name not in checkpoint.shapes and codes is None:
        raise Unreadable("the checkpoint has no tensor of this name")
    # The layout of a quantised weight may be undecided. It has no shape then, and read_weight gives the reason.
    shape = checkpoint.weight_shapes.get(name) if codes else checkpoint.shapes[name]
    if shape is not None and not is_valid_index(index, shape):
        raise Unreadable(f"index {list(index)} is out of range for shape {list(shape)}")
    return read_weight(checkpoint, coordinate)


def _find_entry(
    coordinate: Coordinate, short: tuple[int, int, int, Any] | None, model: KnownModel | None
) -> KnownCoordinate | None:
    """Return the known super weight at a coordinate."""
    if model is None:
        return None
    if short is not None:
        layer, row, col, expert = short
        return LayerScalar(layer, row, col, expert, None).find_entry(model)
    return StoredScalar(coordinate, None).find_entry(model)


def _compare(
    number: int, coordinate: Coordinate, expected: ExpectedValue, checkpoint: Checkpoint, tolerance: float
) -> GuardedScalar:
    """Read one scalar and compare it with its expected value."""
    scalar = GuardedScalar(number, "unreadable", "", coordinate, expected=expected.value, origin=expected.origin)
    try:
        stored = _read_stored(checkpoint, coordinate)
    except Unreadable as error:
        return replace(scalar, message=f"the scalar cannot be read as one number: {error}")
    name = find_codes(checkpoint, coordinate.tensor) or coordinate.tensor
    scalar = _describe_stored(scalar, stored, name, checkpoint)
    if scalar.layout and isinstance(expected.exact, str):
        return replace(scalar, message="expect names bits, but the weight is quantised (expect a number)")
    value = stored.value
    kept = _is_exact(expected, stored) or _is_near(expected, value, tolerance)
    wanted = expected.exact if expected.value is None else format_exact(expected.value)
    ratio = f", x{format_number(value / expected.value)}" if expected.value and math.isfinite(value) else ""
    stored_as = scalar.layout or scalar.dtype
    message = f"{wanted} ({expected.origin}) -> {format_exact(value)} ({stored_as}){'' if kept else ratio}"
    return replace(scalar, state="kept" if kept else "lost", message=message)


def _describe_stored(scalar: GuardedScalar, stored: StoredWeight, name: str, checkpoint: Checkpoint) -> GuardedScalar:
    """Return `scalar` with its value, and with the file and the dtype of the tensor `name` that stores it."""
    found = replace(
        scalar, file=checkpoint.weight_map[name], dtype=checkpoint.get_info(name).dtype.name, stored=stored.value
    )
    if isinstance(stored, CodedWeight):
        return replace(found, layout=stored.layout, code=stored.code, step=stored.step or None)
    return found


def _is_exact(expected: ExpectedValue, stored: StoredWeight) -> bool:
    """Return True if a stored value is the expected one, except for rounding to what the checkpoint can store."""
    if isinstance(stored, PlainWeight) and expected.exact is not None:
        return explain_expectation(expected.exact, stored.dtype, stored.raw) is None
    return _measure_distance(expected, stored.value) <= expected.slack + stored.step


def _is_near(expected: ExpectedValue, value: float, tolerance: float) -> bool:
    """Return True if the relative difference from the expected value is at most `tolerance`, which may be 0."""
    if not tolerance or expected.value is None:
        return False
    return _measure_distance(expected, value) <= expected.slack + tolerance * abs(expected.value)


def _measure_distance(expected: ExpectedValue, value: float) -> float:
    """Return the distance from the expected value, of magnitudes if its sign is unknown; infinity if undefined."""
    if expected.value is None or not math.isfinite(value):
        return math.inf
    return abs(value - expected.value) if expected.signed else abs(abs(value) - abs(expected.value))
