"""Manifest x Checkpoint -> Plan: which bytes of which shard become which. Reads headers, the named scalars
and a few rows of tensors that may be tied, writes nothing, and reports every misfit at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Patched, read_patched
from swsurgery.checkpoint.tying import tied_faults, tied_partner
from swsurgery.errors import ArchitectureError, LookupFailed, NumberError, PlanError
from swsurgery.known import KnownCoordinate, KnownModel, own, shipped
from swsurgery.manifest.load import LoadedManifest
from swsurgery.manifest.operations import MeasuredValue, Scale, Target, expectation_fault
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.names import OWN_FILES
from swsurgery.storage.shard import TensorInfo
from swsurgery.storage.splice import Scalar, Splice

MAX_FAULTS = 100
"""Listed one by one."""

MAX_NOTES = 20


@dataclass(frozen=True)
class Plan:
    """All that applying needs to know. `omitted` are files of the base that do not go into the patched one; `previous`
    are the base's own records, where it was itself patched. `pins_checked` and `pins_unchecked` are the files whose
    digests a dry run compared with a pin, and those that it did not hash. `facts` is what is known of super
    weights, by coordinate."""

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

    def splices_of(self, file: str) -> list[Splice]:
        return sorted((s for s in self.splices if s.file == file), key=lambda s: s.offset)

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "splices": [s.to_json() for s in self.splices],
            "protected": [p.to_json() for p in self.protected],
            "omitted": list(self.omitted),
            "notes": list(self.notes),
        }
        if self.pins_checked or self.pins_unchecked:
            document["pins"] = {"checked": list(self.pins_checked), "not_checked": list(self.pins_unchecked)}
        return document


def make_plan(loaded: LoadedManifest, checkpoint: Checkpoint) -> Plan:
    """Turn every edit into splices and protected scalars. Raises PlanError with all misfits, CheckpointError where the
    base's own registry is damaged."""
    faults = _base_faults(loaded, checkpoint)
    manifest = loaded.manifest
    previous = read_patched(checkpoint)
    protectors = previous.registry.protectors() if previous else {}
    try:
        model = _known_model(loaded, checkpoint)
    except LookupFailed as error:
        faults += [f"{loaded.path}: base.model: {fault}" for fault in error.faults]
        model = None
    facts = _facts(model, checkpoint)
    scalars: dict[Coordinate, tuple[int, Scalar]] = {}
    # `known: all` stands for every known coordinate that no other edit names, so it goes last.
    for number, edit in sorted(enumerate(manifest.edits), key=lambda item: (item[1].known == "all", item[0])):
        where = loaded.where(number)
        try:
            targets = list(_targets(edit, checkpoint, model))
        except (ArchitectureError, LookupFailed, PlanError) as error:
            faults += [f"{where}: {fault}" for fault in error.faults]
            continue
        for coordinate, expect in targets:
            if coordinate in scalars:
                first = scalars[coordinate][0]
                # It yields to an edit that names the coordinate; of two that name all, neither may win in silence.
                if edit.known != "all" or manifest.edits[first].known == "all":
                    faults.append(f"{where}: {coordinate} has two operations (the other is edits[{first}])")
                continue
            if edit.writes and coordinate in protectors:
                faults.append(f"{where}: {coordinate} is protected by step {protectors[coordinate]} of the base's own "
                              "registry (revert that step, or start from the first base)")  # fmt: skip
            try:
                scalars[coordinate] = number, _scalar(edit, coordinate, expect, checkpoint)
            except (PlanError, NumberError) as error:
                faults += [f"{where}: {fault}" for fault in error.faults]
    splices = tuple(s for _, s in sorted(scalars.values(), key=lambda item: item[0]) if isinstance(s, Splice))
    protected = tuple(s for _, s in sorted(scalars.values(), key=lambda item: item[0]) if not isinstance(s, Splice))
    faults += tied_faults(splices, checkpoint)
    copies = manifest.base.copies
    if splices and checkpoint.copies and copies is None:
        faults.append(
            f"{loaded.path}: the edit would not reach further copies of the weights: {', '.join(checkpoint.copies)} "
            "(say base.copies: omit to leave them out, or keep to carry them along unedited)"
        )
    if faults:
        more = len(faults) - MAX_FAULTS
        raise PlanError.of(faults[:MAX_FAULTS] + ([f"{loaded.path}: and {more} more of these"] if more > 0 else []))
    notes = [*checkpoint.notes]
    disagreements = [f"index and shards disagree about {tensor}: {why}; both are carried along as they are, and verify "
                     "will find it" for tensor, why in checkpoint.disagreements.items()]  # fmt: skip
    more = len(disagreements) - MAX_NOTES
    notes += disagreements[:MAX_NOTES] + ([f"and {more} more of these"] if more > 0 else [])
    if checkpoint.copies and copies == "keep":
        notes.append(f"carried along unedited: {', '.join(checkpoint.copies)}")
    omitted = checkpoint.copies if copies == "omit" else ()
    if omitted:
        notes.append(f"left out, for they hold the unedited weights: {', '.join(omitted)}")
    if checkpoint.left_out:
        notes.append(f"left out, for they are no part of a checkpoint: {', '.join(checkpoint.left_out)}")
    return Plan(loaded, checkpoint, previous, model, splices, protected, omitted, tuple(notes), facts=facts)


def _base_faults(loaded: LoadedManifest, checkpoint: Checkpoint) -> list[str]:
    """Everything by which this checkpoint is visibly not the base that the manifest means."""
    base, faults = loaded.manifest.base, []
    for said, found, what in (
        (base.repo_id, checkpoint.repo_id, "repo_id"),
        (base.revision, checkpoint.revision, "revision"),
    ):
        if said and found and said != found:
            faults.append(f"{loaded.path}: base.{what} is {said}, the checkpoint is {found} (give the right base)")
    names = {f.name: f for f in checkpoint.files}
    for name, digest in base.sha256.items():
        if name not in names:
            faults.append(f"{loaded.path}: base.sha256 names {name}, which the base does not have")
        elif names[name].digest not in (None, digest):
            faults.append(f"{loaded.path}: wrong base: {name} has digest {names[name].digest}, not {digest}")
    if "swsurgery.json" not in names:
        faults += [
            f"{checkpoint.root}/{name}: the base has a file of the name that swsurgery writes (rename it)"
            for name in OWN_FILES
            if any(n == name or n.startswith(f"{name}/") for n in names)
        ]
    return faults


def _known_model(loaded: LoadedManifest, checkpoint: Checkpoint) -> KnownModel | None:
    """The model of the registry that this base is. Only base.model has to be known: a repo_id need not be."""
    base = loaded.manifest.base
    if base.model:
        return own.lookup(base.model)
    models = (own.of_repo(repo_id) for repo_id in (base.repo_id, checkpoint.repo_id) if repo_id)
    return next((model for model in models if model), None)


def _facts(model: KnownModel | None, checkpoint: Checkpoint) -> dict[Coordinate, KnownCoordinate]:
    facts = {}
    for entry in model.coordinates if model else ():
        if entry.col is not None:
            try:
                facts[_located(entry, checkpoint)] = entry
            except ArchitectureError:
                continue  # the checkpoint is not quite that model; an edit that names the coordinate will say so
    return facts


def _located(target: Target | KnownCoordinate, checkpoint: Checkpoint) -> Coordinate:
    # With those that index and shards place differently: found here, they are refused for what is wrong with them.
    shapes = {t: s.tensors[t].shape for s in checkpoint.shards.values() for t in checkpoint.disagreements
              if t in s.tensors}  # fmt: skip
    return projections.locate(
        checkpoint.config,
        {**checkpoint.shapes, **shapes} if shapes else checkpoint.shapes,
        layer=target.layer,
        row=target.row,
        col=target.col,
        expert=target.expert,
    )


def _targets(edit: Target, checkpoint: Checkpoint, model: KnownModel | None) -> Iterator[tuple[Coordinate, Any]]:
    """(coordinate, expected value) for each scalar that the edit names."""
    if edit.tensor is not None:
        yield Coordinate(edit.tensor, edit.index), edit.expect
    elif edit.layer is not None:
        yield _located(edit, checkpoint), edit.expect
    else:
        if model is None:
            raise PlanError("the registry knows nothing of this base", edit.known,
                            "say which known model it is: base.model")  # fmt: skip
        entries = shipped.addressable(model) if edit.known == "all" else [shipped.find(model, edit.known)]
        if not entries:
            raise PlanError(f"the registry has no whole coordinate of {model.hf_id}", edit.known)
        for entry in entries:
            if entry.col is None:
                raise PlanError(f"only the row of {entry.id} is known, not the scalar", model.hf_id)
            guard = MeasuredValue(value=entry.value, dtype=entry.dtype) if entry.dtype else None
            yield _located(entry, checkpoint), guard


def _scalar(edit: Any, coordinate: Coordinate, expect: Any, checkpoint: Checkpoint) -> Scalar:
    """Check one coordinate and read it. Raises PlanError, NumberError."""
    info = _info(coordinate, checkpoint)
    name, index = coordinate
    if edit.writes:
        _refuse_quantised(name, checkpoint)
    if not _fits(info, index):
        raise PlanError(f"index {list(index)} is out of range", f"{name} of shape {list(info.shape)}",
                        _swap_hint(info, index))  # fmt: skip
    if info.dtype.bits % 8:
        raise PlanError(f"{info.dtype.name} {info.dtype.refusal}", coordinate)
    file = checkpoint.weight_map[name]
    shard = checkpoint.shards[file]
    old = shard.read_scalar(name, index)
    if expect is not None and (fault := expectation_fault(expect, info.dtype, old)):
        hint = "is this the right base?"
        swapped = index[::-1]
        if len(index) == 2 and _fits(info, swapped):
            other = shard.read_scalar(name, swapped)
            if expectation_fault(expect, info.dtype, other) is None:
                hint = f"row and col look swapped: {list(swapped)} holds it"
        raise PlanError(fault, coordinate, hint)
    common = dict(file=file, coordinate=coordinate, dtype=info.dtype, offset=shard.offset(name, index), old=old)
    if not edit.writes:
        return Scalar(**common)
    try:
        new = edit.new_bytes(info.dtype, old)
    except NumberError as error:
        raise PlanError.of(f"cannot {edit.op} {coordinate}: {fault}" for fault in error.faults) from None
    factor = edit.factor if isinstance(edit, Scale) else None
    return Splice(**common, op=edit.op, new=new, factor=factor)


def _info(coordinate: Coordinate, checkpoint: Checkpoint) -> TensorInfo:
    name = coordinate.tensor
    if name in checkpoint.disagreements:
        raise PlanError(f"index and shards disagree about {name}", checkpoint.disagreements[name])
    if name not in checkpoint.weight_map:
        if partner := tied_partner(name, checkpoint):
            raise PlanError(f"{name} is tied to {partner} and not stored", remedy=f"edit {partner}")
        raise PlanError("no such tensor", name, _hint(name, checkpoint))
    return checkpoint.info(name)


def _hint(name: str, checkpoint: Checkpoint) -> str:
    """The nearest tensor's name. Sought among those of the same ending: among thousands it takes half a second."""
    ending = name.rsplit(".", 2)[-2:]
    alike = [t for t in checkpoint.weight_map if t.rsplit(".", 2)[-2:] == ending] or list(checkpoint.weight_map)
    near = difflib.get_close_matches(name, alike[:500], 1, 0.8)
    return f"did you mean {near[0]}?" if near else ""


def _fits(info: TensorInfo, index: tuple[int, ...]) -> bool:
    return len(index) == len(info.shape) and all(i < n for i, n in zip(index, info.shape, strict=True))


def _swap_hint(info: TensorInfo, index: tuple[int, ...]) -> str:
    if 0 in info.shape:
        return "the tensor has no elements"
    if len(index) == 2 and _fits(info, index[::-1]):
        return f"row and col look swapped: {list(index[::-1])} would fit"
    return ""


def _refuse_quantised(name: str, checkpoint: Checkpoint) -> None:
    if why := checkpoint.quantisation.refusal(name):
        raise PlanError(why, name, "edit the model before it is quantised")
