"""Plan an edit: turn a manifest and a checkpoint into the bytes to change.

Reads the headers, the scalars that the edits name and a few rows of tensors that may be tied. Writes nothing, and
reports all faults at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Patched, find_record
from swsurgery.checkpoint.tying import find_tied_partner, list_tied_faults
from swsurgery.editing.resolve import Asked, Misfit, find_conflicts, find_known, locate, resolve
from swsurgery.errors import ArchitectureError, LookupFailed, NumberError, PlanError
from swsurgery.known import KnownCoordinate, KnownModel, own
from swsurgery.manifest.load import LoadedManifest
from swsurgery.manifest.operations import Protect, Scale, explain_expectation
from swsurgery.manifest.yaml_reader import MAX_FAULTS
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.names import OWN_FILES
from swsurgery.storage.result import TableResult
from swsurgery.storage.shard import TensorInfo
from swsurgery.storage.splice import Scalar, Splice, list_scalar_rows

MAX_NOTES = 20
"""Maximum number of notes, each about one tensor on whose shard the index and the headers disagree."""


@dataclass(frozen=True, repr=False)
class Plan(TableResult):
    """The changes that a manifest makes to a checkpoint, and what `apply` needs to make them.

    `omitted` contains the base's files that are not copied. If the base is a patched checkpoint, `previous` contains
    its record. A pin is a digest that the manifest or this record requires of a file. A dry run compares the files in
    `pins_checked` with their pins, and not the files in `pins_unchecked`. `facts` maps coordinates to known super
    weights.
    """

    loaded: LoadedManifest
    checkpoint: Checkpoint
    previous: Patched | None
    model: KnownModel | None
    splices: tuple[Splice, ...]
    protected: tuple[Scalar, ...]
    omitted: tuple[str, ...]
    notes: tuple[str, ...]
    pins_checked: tuple[str, ...] = ()
    pins_unchecked: tuple[str, ...] = ()
    facts: Mapping[Coordinate, KnownCoordinate] = field(default_factory=dict, repr=False)

    def get_splices(self, file: str) -> list[Splice]:
        """List the splices of one file in the order of their offsets."""
        return sorted((s for s in self.splices if s.file == file), key=lambda s: s.offset)

    def to_json(self) -> dict[str, Any]:
        """Build the JSON document that `apply --dry-run --json` prints."""
        document: dict[str, Any] = {
            "output": None,
            "splices": [s.to_json() for s in self.splices],
            "protected": [p.to_json() for p in self.protected],
            "omitted": list(self.omitted),
            "notes": list(self.notes),
            "check": None,
        }
        if self.pins_checked or self.pins_unchecked:
            document["pins"] = {"checked": list(self.pins_checked), "not_checked": list(self.pins_unchecked)}
        return document

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per changed and per protected scalar: op, tensor, index, dtype, old, new, file, offset."""
        document = self.to_json()
        return list_scalar_rows(document["splices"], document["protected"])


def make_plan(loaded: LoadedManifest, checkpoint: Checkpoint) -> Plan:
    """Turn every edit of a manifest into splices and protected scalars of a checkpoint.

    Raises PlanError with all faults, and CheckpointError if the base's own record is damaged.
    """
    faults = _check_base(loaded, checkpoint)
    previous = find_record(checkpoint)
    model, unknown = _identify_model(loaded, checkpoint)
    resolution = resolve(loaded.manifest, checkpoint, partial(find_known, model))
    read, misfits = _read_scalars(resolution.asked, checkpoint)
    # Edits of a scalar that cannot be read are not in conflict: each of them has its own fault.
    misfits += [*resolution.misfits, *find_conflicts((one.number, one.coordinate) for one, _ in read)]
    misfits += _check_protected(resolution.asked, previous)
    splices = tuple(scalar for _, scalar in read if isinstance(scalar, Splice))
    faults += unknown + [
        f"{loaded.describe_position(n)}: {message}" for n, message in sorted(misfits, key=lambda m: m.number)
    ]
    faults += list_tied_faults(splices, checkpoint) + _check_copies(loaded, checkpoint, splices)
    if faults:
        raise PlanError.of(_shorten(faults, MAX_FAULTS, f"{loaded.path}: "))
    omitted = checkpoint.copies if loaded.manifest.base.copies == "omit" else ()
    protected = tuple(scalar for _, scalar in read if not isinstance(scalar, Splice))
    notes = tuple(_collect_notes(loaded, checkpoint))
    facts = _locate_known(model, checkpoint)
    return Plan(loaded, checkpoint, previous, model, splices, protected, omitted, notes, facts=facts)


def _read_scalars(asked: Sequence[Asked], checkpoint: Checkpoint) -> tuple[list[tuple[Asked, Scalar]], list[Misfit]]:
    """Read every scalar that the edits name.

    Returns the scalars that can be edited, in the manifest's order, and a fault for each of the other scalars.
    """
    read: list[tuple[Asked, Scalar]] = []
    misfits: list[Misfit] = []
    for one in asked:
        try:
            read.append((one, _read_scalar(one, checkpoint)))
        except (PlanError, NumberError) as error:
            misfits += [Misfit(one.number, fault) for fault in error.faults]
    return read, misfits


def _check_protected(asked: Sequence[Asked], previous: Patched | None) -> Iterator[Misfit]:
    """Report every edit that would change a scalar protected by the base's own record."""
    protectors = previous.record.map_protectors() if previous else {}
    for one in asked:
        if one.edit.writes and one.coordinate in protectors:
            message = f"{one.coordinate} is protected by step {protectors[one.coordinate]} of the base's record"
            yield Misfit(one.number, f"{message} (revert that step, or start from the first base)")


def _check_copies(loaded: LoadedManifest, checkpoint: Checkpoint, splices: Sequence[Splice]) -> list[str]:
    """Report other copies of the weights in the base, such as pytorch_model.bin, if base.copies is not set."""
    if not splices or not checkpoint.copies or loaded.manifest.base.copies is not None:
        return []
    return [
        f"{loaded.path}: the base contains more copies of the weights, which would not be edited: "
        f"{', '.join(checkpoint.copies)} "
        "(set base.copies to omit to leave them out, or to keep to copy them unedited)"
    ]


def _shorten(lines: list[str], limit: int, prefix: str = "") -> list[str]:
    """Keep the first `limit` messages, and replace the rest by one line that begins with `prefix` and counts them."""
    if len(lines) <= limit:
        return lines
    return [*lines[:limit], f"{prefix}and {len(lines) - limit} more of these"]


def _collect_notes(loaded: LoadedManifest, checkpoint: Checkpoint) -> list[str]:
    """List facts about the checkpoint that do not prevent the edit but that the user should know."""
    copies = loaded.manifest.base.copies
    disagreements = [
        f"index and shards disagree about {tensor}: {why}; both are copied unchanged, and verify will report it"
        for tensor, why in checkpoint.disagreements.items()
    ]
    notes = [*checkpoint.notes, *_shorten(disagreements, MAX_NOTES)]
    if checkpoint.copies and copies == "keep":
        notes.append(f"copied unedited: {', '.join(checkpoint.copies)}")
    if checkpoint.copies and copies == "omit":
        notes.append(f"left out, because they contain the unedited weights: {', '.join(checkpoint.copies)}")
    if checkpoint.left_out:
        notes.append(f"left out, because they are not part of a checkpoint: {', '.join(checkpoint.left_out)}")
    return notes


def _check_base(loaded: LoadedManifest, checkpoint: Checkpoint) -> list[str]:
    """List the signs that this checkpoint is not the base that the manifest means, and files with swsurgery's names."""
    base = loaded.manifest.base
    faults: list[str] = []
    for said, found, what in (
        (base.repo_id, checkpoint.repo_id, "repo_id"),
        (base.revision, checkpoint.revision, "revision"),
    ):
        if said and found and said != found:
            faults.append(f"{loaded.path}: base.{what} is {said}, but the checkpoint has {found} (give the right base)")
    names = {f.name: f for f in checkpoint.files}
    for name, digest in base.sha256.items():
        if name not in names:
            faults.append(f"{loaded.path}: base.sha256 names {name}, which the base does not have")
        elif names[name].digest not in (None, digest):
            faults.append(f"{loaded.path}: wrong base: {name} has digest {names[name].digest}, not {digest}")
    if "swsurgery.json" not in names:
        faults += [
            f"{checkpoint.root}/{name}: the base already has a file with this name, which swsurgery writes (rename it)"
            for name in OWN_FILES
            if any(n == name or n.startswith(f"{name}/") for n in names)
        ]
    return faults


def _identify_model(loaded: LoadedManifest, checkpoint: Checkpoint) -> tuple[KnownModel | None, list[str]]:
    """Return the known model that the base is (None if no known model matches), and the faults of `base.model`."""
    base = loaded.manifest.base
    try:
        return own.identify(base.model, (base.repo_id, checkpoint.repo_id)), []
    except LookupFailed as error:
        return None, [f"{loaded.path}: base.model: {fault}" for fault in error.faults]


def _locate_known(model: KnownModel | None, checkpoint: Checkpoint) -> dict[Coordinate, KnownCoordinate]:
    """Map coordinates of the checkpoint to the known super weights of its model."""
    facts: dict[Coordinate, KnownCoordinate] = {}
    for entry in model.coordinates if model else ():
        if entry.col is not None:
            try:
                facts[locate(checkpoint, entry.layer, entry.row, entry.col, entry.expert)] = entry
            except ArchitectureError:
                continue  # The checkpoint has no such scalar. An edit that names this super weight reports it.
    return facts


def _read_scalar(asked: Asked, checkpoint: Checkpoint) -> Scalar:
    """Read one scalar, compare it with the value that the edit expects, and compute its new bytes.

    Raises PlanError or NumberError if the scalar does not exist, differs, or cannot be edited.
    """
    edit, coordinate, expect = asked.edit, asked.coordinate, asked.expect
    info = _find_tensor(coordinate, checkpoint)
    name, index = coordinate
    if edit.writes:
        _refuse_quantised(name, checkpoint)
    if not _check_index(info, index):
        where = f"{name} of shape {list(info.shape)}"
        raise PlanError(f"index {list(index)} is out of range", where, _explain_index(info, index))
    if info.dtype.bits % 8:
        raise PlanError(f"{info.dtype.name} {info.dtype.refusal}", coordinate)
    file = checkpoint.weight_map[name]
    shard = checkpoint.shards[file]
    old = shard.read_scalar(name, index)
    if expect is not None and (fault := explain_expectation(expect, info.dtype, old)):
        hint = "is this the right base?"
        swapped = index[::-1]
        if len(index) == 2 and _check_index(info, swapped):
            other = shard.read_scalar(name, swapped)
            if explain_expectation(expect, info.dtype, other) is None:
                hint = f"row and col look swapped: {list(swapped)} has this value"
        raise PlanError(fault, coordinate, hint)
    offset = shard.find_offset(name, index)
    if isinstance(edit, Protect):
        return Scalar(file, coordinate, info.dtype, offset, old)
    try:
        new = edit.compute_bytes(info.dtype, old)
    except NumberError as error:
        raise PlanError.of(f"cannot {edit.op} {coordinate}: {fault}" for fault in error.faults) from None
    factor = edit.factor if isinstance(edit, Scale) else None
    return Splice(file, coordinate, info.dtype, offset, old, op=edit.op, new=new, factor=factor)


def _find_tensor(coordinate: Coordinate, checkpoint: Checkpoint) -> TensorInfo:
    """Find the header entry of the tensor that a coordinate names.

    Raises PlanError if the tensor is not stored, or if the index and the headers place it in different shards.
    """
    name = coordinate.tensor
    if name in checkpoint.disagreements:
        raise PlanError(f"index and shards disagree about {name}", checkpoint.disagreements[name])
    if name not in checkpoint.weight_map:
        if partner := find_tied_partner(name, checkpoint):
            raise PlanError(f"{name} is tied to {partner} and not stored", remedy=f"edit {partner}")
        raise PlanError("no such tensor", name, _suggest_tensor(name, checkpoint))
    return checkpoint.get_info(name)


def _suggest_tensor(name: str, checkpoint: Checkpoint) -> str:
    """Suggest the tensor with the most similar name, as in "did you mean ...?"; "" if no name is similar.

    Only names with the same last two parts, such as `down_proj.weight`, are compared, or all names if no name has them.
    At most 500 names are compared, because comparing more would be slow.
    """
    ending = name.rsplit(".", 2)[-2:]
    alike = [t for t in checkpoint.weight_map if t.rsplit(".", 2)[-2:] == ending] or list(checkpoint.weight_map)
    near = difflib.get_close_matches(name, alike[:500], 1, 0.8)
    return f"did you mean {near[0]}?" if near else ""


def _check_index(info: TensorInfo, index: tuple[int, ...]) -> bool:
    """Return True if an index has one number for each axis of the tensor and each number is below the axis's length."""
    return len(index) == len(info.shape) and all(i < n for i, n in zip(index, info.shape, strict=True))


def _explain_index(info: TensorInfo, index: tuple[int, ...]) -> str:
    """Explain why an index is out of range, as in "row and col look swapped"; "" if the reason is not obvious."""
    if 0 in info.shape:
        return "the tensor has no elements"
    if len(index) == 2 and _check_index(info, index[::-1]):
        return f"row and col look swapped: {list(index[::-1])} would fit"
    return ""


def _refuse_quantised(name: str, checkpoint: Checkpoint) -> None:
    """Raise PlanError if a tensor does not store plain weights."""
    if why := checkpoint.quantisation.explain_refusal(name):
        raise PlanError(why, name, "edit the model before it is quantised")
