"""Check that a record contains exactly what a manifest requests.

Edits are resolved against the checkpoint's headers, and the arithmetic is repeated on the record's old bits, which
`verify` proves to be the base's. This module must not import the planner, whose result it checks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import MANIFEST_NAME, RECORD_NAME, Patched, Record
from swsurgery.editing.asked import Asked, AskedRegion
from swsurgery.editing.recorded import (
    explain_unlike_bases,
    find_misnumbered_codes,
    find_unlike_records,
    find_unlike_regions,
)
from swsurgery.editing.resolve import resolve
from swsurgery.editing.targets import KnownPlace, find_known
from swsurgery.errors import LookupFailed, ManifestError
from swsurgery.known import own
from swsurgery.manifest.load import LoadedManifest, parse_manifest
from swsurgery.manifest.targets import MeasuredValue
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.names import OWN_FILES
from swsurgery.storage.schema import Position
from swsurgery.verifying.findings import Finding

Node = tuple[str | int, ...]
"""Path of a node in a manifest, such as ("edits", 0, "factor")."""


@dataclass(frozen=True)
class Wishes:
    """What a manifest requests of a checkpoint.

    `asked` maps the coordinate of each scalar to what the edits request for it. `misfits` are findings about edits that
    do not fit the checkpoint's headers, and about a model name that is not known. `regions` are the regions that the
    edits name.
    """

    loaded: LoadedManifest
    asked: dict[Coordinate, Asked]
    misfits: tuple[Finding, ...]
    regions: tuple[AskedRegion, ...] = ()

    def make_finding(self, message: str, coordinate: Coordinate | None = None, *, path: Node | None = None) -> Finding:
        """Make a manifest-mismatch finding at the edit of `coordinate`, or else at the manifest's node `path`."""
        finding = Finding("manifest-mismatch", message)
        if coordinate is not None:
            finding = replace(finding, tensor=coordinate.tensor, index=coordinate.index)
        return self.attach_position(finding, path if path is not None else ("edits",))

    def attach_position(self, finding: Finding, path: Node = ()) -> Finding:
        """Add to a finding the line and column of the edit that names its scalar.

        If no edit names the scalar, the position of the node `path` is added. An empty `path` adds no position.
        """
        if finding.tensor is not None and finding.index is not None:
            scalar = self.asked.get(Coordinate(finding.tensor, finding.index))
            path = ("edits", scalar.number) if scalar else path
        return point_at(self.loaded, finding, path) if path else finding


def point_at(loaded: LoadedManifest, finding: Finding, path: Node) -> Finding:
    """Return the finding with the line and column of the manifest's node `path`."""
    line, column = loaded.positions.get(path) or loaded.positions[()]
    return replace(finding, manifest=str(loaded.path), line=line, column=column)


def read_wishes(loaded: LoadedManifest, checkpoint: Checkpoint, repo_ids: tuple[str | None, ...] = ()) -> Wishes:
    """Resolve every edit against the headers of `checkpoint`.

    The known model is the one that the manifest names. If it names none, the model is looked up by repository id: that
    of the base, that of the checkpoint, then `repo_ids`. Raises LookupFailed if the user's own entry of the model is
    damaged.
    """
    base = loaded.manifest.base
    repo_ids = (base.repo_id, checkpoint.repo_id, *repo_ids)
    misfits: list[Finding] = []
    try:
        model = own.identify(base.model, repo_ids)
    except LookupFailed as error:
        if not base.model:
            raise
        misfits = [point_at(loaded, Finding("manifest-mismatch", fault), ("base", "model")) for fault in error.faults]
        model = own.identify(None, repo_ids)
    resolution = resolve(loaded.manifest, checkpoint, partial(find_known, model))
    for misfit in resolution.list_misfits():
        found = Finding("manifest-mismatch", misfit.explain(loaded.name_edit))
        misfits.append(point_at(loaded, found, ("edits", misfit.number)))
    return Wishes(loaded, resolution.group_by_coordinate(), tuple(misfits), resolution.regions)


def check_by_record(wishes: Wishes, record: Record) -> list[Finding]:
    """Check that the record contains exactly what the manifest requests.

    Compares the scalars, the operations and factors, and the base's revision and digests. Also computes the new bits
    again from the record's old bits.
    """
    identity = [
        wishes.make_finding(message, path=path)
        for path, message in explain_unlike_bases(wishes.loaded.manifest, record)
    ]
    unlike = [wishes.make_finding(message, entry) for entry, message in find_unlike_records(wishes.asked, record)]
    unlike += [
        wishes.make_finding(message, path=("edits",) if number is None else ("edits", number))
        for number, message in find_unlike_regions(wishes.regions, record)
    ]
    return [*wishes.misfits, *identity, *unlike]


class _RecordedPart(BaseModel):
    """A known expert or column, with the fields that the record quotes from the data of `lookup`."""

    model_config = ConfigDict(strict=True, frozen=True)
    id: str
    layer: Position
    col: Position | None = None
    expert: Position | Literal["shared"] | None


class _RecordedPlace(BaseModel):
    """A known super weight, with the fields that the record quotes from the data of `lookup`."""

    model_config = ConfigDict(strict=True, frozen=True)
    id: str
    status: str
    layer: Position
    row: Position
    col: Position | None
    expert: Position | Literal["shared"] | None
    value: object
    dtype: object


def find_own_differences(patched: Patched, checkpoint: Checkpoint) -> list[Finding]:
    """Compare the manifest stored in the checkpoint with its record, and each earlier step's manifest with its record.

    An edit with `known:` stands for the super weights that the record quotes, because this version of swsurgery may
    know different ones.
    """
    record = patched.record
    if hashlib.sha256(patched.manifest_raw).hexdigest() != record.manifest_sha256:
        return [Finding("manifest", "this is not the manifest that the record was made from", MANIFEST_NAME)]
    findings = [
        Finding("manifest", message, MANIFEST_NAME, *(place or ()))
        for place, message in _compare_own_manifest(patched.manifest_raw, record, record.elsewhere, checkpoint)
    ]
    for number, step in enumerate(record.history, 1):
        earlier, raw = step.read(), step.manifest.encode()
        if hashlib.sha256(raw).hexdigest() != earlier.manifest_sha256:
            message = f"the manifest of step {number} is not the one that the record of that step was made from"
            findings.append(Finding("manifest", message, RECORD_NAME))
        elif (earlier.base.weights, earlier.base.variant) == (record.base.weights, record.base.variant):
            findings += [
                Finding("manifest", f"step {number}: {message}", RECORD_NAME, *(place or ()))
                for place, message in _compare_own_manifest(raw, earlier, record.elsewhere, checkpoint)
            ]
    return findings


def _compare_own_manifest(
    raw: bytes, record: Record, elsewhere: Collection[str], checkpoint: Checkpoint
) -> Iterator[tuple[Coordinate | None, str]]:
    """Yield (scalar or None, message) for each difference between a record and the manifest that it was made from."""
    try:
        manifest = parse_manifest(raw, Path(MANIFEST_NAME)).manifest
    except ManifestError as error:
        yield None, f"the manifest is invalid: {error.faults[0].removeprefix(f'{MANIFEST_NAME}:')}"
        return
    resolution = resolve(manifest, checkpoint, partial(_find_recorded, record))
    asked, faults = resolution.group_by_coordinate(), resolution.list_misfits()
    # Protected scalars of shards that stay in the base's repository cannot be resolved without the shard's header.
    afar = {r.coordinate for r in record.protected if r.file in elsewhere and r.file not in checkpoint.shards}
    unresolved = {fault.number for fault in faults if afar and manifest.edits[fault.number].op == "protect"}
    yield from ((None, f"edits[{f.number}]: {f.explain()}") for f in faults if f.number not in unresolved)
    for coordinate, message in find_unlike_records(asked, record):
        if coordinate in asked or coordinate not in afar or not unresolved:
            yield coordinate, message
    yield from find_misnumbered_codes(asked, record)
    shards = {*checkpoint.shards}
    here = [one for one in resolution.regions if checkpoint.weight_map.get(one.region.tensor) in shards]
    yield from ((None, message) for _, message in find_unlike_regions(here, record))
    for path, message in explain_unlike_bases(manifest, record):
        if path[-1] not in {*record.omitted, *OWN_FILES}:  # these files were not written
            yield None, message


def _find_recorded(record: Record, name: str) -> list[KnownPlace]:
    """Find the super weights, or the larger part, that `known: NAME` meant when the edit was made.

    They are read from what the record quotes. Raises LookupFailed if it quotes nothing of this name.
    """
    quotes = record.known or {}
    try:
        found = [_RecordedPlace.model_validate(quoted) for quoted in quotes["coordinates"]]
        parts = [  # earlier versions quoted neither experts nor columns
            _RecordedPart.model_validate(quoted) for key in ("experts", "columns") for quoted in quotes.get(key, ())
        ]
    except (KeyError, TypeError, ValidationError):
        raise LookupFailed("the record does not list the known super weights", name) from None
    wanted = name.rpartition(":")[2]
    whole = [KnownPlace(p.layer, None, p.col, p.expert) for p in parts if p.id == wanted]
    if whole:
        return whole
    chosen = [p for p in found if (p.status != "refuted" if name == "all" else p.id == wanted)]
    if not chosen:
        raise LookupFailed("the record has no such known super weight", name)
    try:
        return [
            KnownPlace(p.layer, p.row, p.col, p.expert, _read_expected(p))
            for p in chosen
            if p.col is not None or name != "all"
        ]
    except ValidationError:
        raise LookupFailed(f"the record has no valid value of {name}") from None


def _read_expected(quoted: _RecordedPlace) -> MeasuredValue | None:
    """Return the value that the edit expected to find in the base, or None if none was known.

    Raises ValidationError if the quoted value is invalid.
    """
    if quoted.dtype is None:
        return None
    return MeasuredValue.model_validate({"value": quoted.value, "dtype": quoted.dtype})
