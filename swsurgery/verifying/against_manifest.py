"""Manifest x registry -> differences: does the registry record exactly what the manifest asks?

Edits are resolved against the headers of the checkpoint, and the arithmetic is repeated on the registry's old bits,
which are the base's if `verify` finds nothing. This module must not import the planner, whose result it checks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.architectures import Expert
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import MANIFEST_NAME, REGISTRY_NAME, EditRecord, Patched, Registry, ScalarRecord
from swsurgery.errors import ArchitectureError, LookupFailed, ManifestError, NumberError, PlanError
from swsurgery.known import KnownModel, own, shipped
from swsurgery.manifest.load import LoadedManifest, parse_manifest
from swsurgery.manifest.operations import MeasuredValue, expectation_fault
from swsurgery.manifest.schema import Manifest
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.names import OWN_FILES
from swsurgery.verifying.findings import Finding


@dataclass(frozen=True)
class Asked:
    """One scalar that edit number `number` of a manifest names, and what it expects there."""

    number: int
    edit: Any
    expect: Any = None


@dataclass(frozen=True)
class Wishes:
    """What a manifest asks of this checkpoint: each scalar once, and the edits that have no meaning here."""

    loaded: LoadedManifest
    asked: dict[Coordinate, Asked]
    misfits: tuple[Finding, ...]

    def finding(self, message: str, coordinate: Coordinate | None = None, *, path: tuple | None = None) -> Finding:
        """A manifest-mismatch at the edit that names `coordinate`, or at the manifest's node `path`."""
        finding = Finding("manifest-mismatch", message)
        if coordinate is not None:
            finding = replace(finding, tensor=coordinate.tensor, index=coordinate.index)
        return self.at(finding, path if path is not None else ("edits",))

    def at(self, finding: Finding, path: tuple = ()) -> Finding:
        """The finding with its place in the manifest: the edit that names its scalar, else the node `path`, if any."""
        scalar = self.asked.get(Coordinate(finding.tensor, finding.index)) if finding.index is not None else None
        path = ("edits", scalar.number) if scalar else path
        return point_at(self.loaded, finding, path) if path else finding


def point_at(loaded: LoadedManifest, finding: Finding, path: tuple) -> Finding:
    """Return the finding with the line and column of the manifest's node `path`."""
    line, column = loaded.positions.get(path) or loaded.positions[()]
    return replace(finding, manifest=str(loaded.path), line=line, column=column)


def read_wishes(loaded: LoadedManifest, checkpoint: Checkpoint, repo_ids: tuple[str | None, ...] = ()) -> Wishes:
    """Resolve every edit against the headers of `checkpoint`. `repo_ids` are further names that its base may have."""
    base = loaded.manifest.base
    misfits = []
    try:
        model = own.lookup(base.model) if base.model else None
    except LookupFailed as error:
        model = None
        misfits = [point_at(loaded, Finding("manifest-mismatch", fault), ("base", "model")) for fault in error.faults]
    for repo_id in (base.repo_id, checkpoint.repo_id, *repo_ids):
        model = model or (own.of_repo(repo_id) if repo_id else None)
    asked, faults = resolve(loaded.manifest, checkpoint, _looked_up(model))
    misfits += [point_at(loaded, Finding("manifest-mismatch", fault), ("edits", number)) for number, fault in faults]
    return Wishes(loaded, asked, tuple(misfits))


class KnownPlace(Protocol):
    """What an edit that says `known:` needs of a known super weight. `col` is None if only the row is known."""

    @property
    def layer(self) -> int: ...
    @property
    def row(self) -> int: ...
    @property
    def col(self) -> int | None: ...
    @property
    def expert(self) -> Expert: ...
    @property
    def value(self) -> float | None: ...
    @property
    def dtype(self) -> str | None: ...


KnownPlaces = Callable[[str], Sequence[KnownPlace]]
"""What an edit's `known:` names, "all" or an id. Raises LookupFailed or PlanError if it names nothing."""


def resolve(
    manifest: Manifest, checkpoint: Checkpoint, known_places: KnownPlaces
) -> tuple[dict[Coordinate, Asked], list[tuple[int, str]]]:
    """Resolve every edit: what is asked of each scalar, and (number of the edit, fault) of what has no meaning here."""
    asked: dict[Coordinate, Asked] = {}
    faults: list[tuple[int, str]] = []
    # `known: all` stands for every known coordinate that no other edit names, so it goes last.
    for number, edit in sorted(enumerate(manifest.edits), key=lambda item: (item[1].known == "all", item[0])):
        for coordinate, expect in _targets(edit, checkpoint, known_places):
            if isinstance(coordinate, str):
                faults.append((number, coordinate))
            elif coordinate not in asked:
                asked[coordinate] = Asked(number, edit, expect)
            elif edit.known != "all":
                message = f"{coordinate} has two operations (the other is edits[{asked[coordinate].number}])"
                faults.append((number, message))
    return asked, faults


def _looked_up(model: KnownModel | None) -> KnownPlaces:
    """The known super weights of a model, as this version knows them."""

    def places(word: str) -> Sequence[KnownPlace]:
        if model is None:
            raise PlanError("nothing says which known model this is", word, "say which: base.model")
        return shipped.addressable(model) if word == "all" else [shipped.find(model, word)]

    return places


def _targets(edit: Any, checkpoint: Checkpoint, known_places: KnownPlaces) -> Iterator[tuple[Coordinate | str, Any]]:
    """Each scalar that an edit names, with what is expected there; or what is wrong with it, in words."""
    if edit.tensor is not None:
        yield Coordinate(edit.tensor, edit.index), edit.expect
        return
    try:
        if edit.layer is not None:
            places, expects = [edit], [edit.expect]
        else:
            places = [place for place in known_places(edit.known) if place.col is not None]
            expects = [MeasuredValue(value=p.value, dtype=p.dtype) if p.dtype else None for p in places]
    except (LookupFailed, PlanError) as error:
        yield from ((fault, None) for fault in error.faults)
        return
    except ValueError:  # of MeasuredValue: the registry was changed by hand
        yield f"the value that the registry recorded of {edit.known} is none", None
        return
    for place, expect in zip(places, expects, strict=True):
        try:
            coordinate = projections.locate(
                checkpoint.config,
                checkpoint.shapes,
                layer=place.layer,
                row=place.row,
                col=place.col,
                expert=place.expert,
            )
        except ArchitectureError as error:
            yield from ((fault, None) for fault in error.faults)
        else:
            yield coordinate, expect


def by_registry(wishes: Wishes, registry: Registry) -> list[Finding]:
    """The registry records exactly what the manifest asks: the same scalars, operations, factors and pins, and new
    bits that the arithmetic gives for the old ones."""
    identity = [wishes.finding(message, path=path) for path, message in _identity(wishes.loaded.manifest, registry)]
    unlike = [wishes.finding(message, record) for record, message in _unlike_records(wishes.asked, registry)]
    return [*wishes.misfits, *identity, *unlike]


def _unlike_records(asked: Mapping[Coordinate, Asked], registry: Registry) -> Iterator[tuple[Coordinate, str]]:
    """Yield each scalar whose record differs from the manifest, and the difference in words."""
    recorded = {r.coordinate: r for r in (*registry.edits, *registry.protected)}
    for coordinate, wish in asked.items():
        record = recorded.get(coordinate)
        message = "nothing was done to it" if record is None else _unlike(wish, record)
        if message:
            yield coordinate, f"{wish.edit.op} was asked: {message}"
    for coordinate, record in recorded.items():
        if coordinate not in asked:
            yield coordinate, f"{_done(record)}, and the manifest does not ask for it"


def _done(record: ScalarRecord) -> str:
    return f"{record.op} was done" if isinstance(record, EditRecord) else "it was protected"


def _unlike(asked: Asked, record: ScalarRecord) -> str | None:
    """How a record differs from what the edit makes of its old bits; None where it does not."""
    edit, dtype = asked.edit, DTYPES[record.dtype]
    done = record.op if isinstance(record, EditRecord) else "protect"
    if done != edit.op:
        return f"{done} was done"
    try:
        if asked.expect is not None and (fault := expectation_fault(asked.expect, dtype, record.old_bytes)):
            return f"the base does not fit: {fault}"
        if not isinstance(record, EditRecord):
            return None
        factor = getattr(edit, "factor", None)
        if factor != record.factor:
            return f"the factor is {factor}, {record.factor} was used"
        new = edit.new_bytes(dtype, record.old_bytes)
        return None if new == record.new_bytes else f"it makes {dtypes.bits_of(new)}, not {record.new_bits}"
    except NumberError as error:
        return str(error)


def _identity(manifest: Manifest, registry: Registry) -> Iterator[tuple[tuple[str, ...], str]]:
    """Compare what the manifest says of its base with the base that the registry names: (node of the manifest, how they
    differ)."""
    base = manifest.base
    for name in ("repo_id", "revision", "weights", "variant"):
        said, found = getattr(base, name), getattr(registry.base, name)
        if said is not None and found is not None and said != found:
            yield ("base", name), f"base.{name} is {said}, the base was {found}"
    for name, digest in base.sha256.items():
        record = registry.files.get(name)
        found = record.base_sha256 if record else None
        if found != digest:
            what = f"the base's was {found}" if found else "the registry does not know the base's"
            yield ("base", "sha256", name), f"base.sha256 of {name} is {digest}, {what}"


@dataclass(frozen=True)
class _RecordedPlace:
    """A known super weight as the registry of an edit recorded it."""

    id: str
    status: str
    layer: int
    row: int
    col: int | None
    expert: Expert
    value: float | None
    dtype: str | None


def own_findings(patched: Patched, checkpoint: Checkpoint) -> list[Finding]:
    """Compare the manifest beside the registry, and those of earlier steps, with what the registry says was done.

    A later version may know other super weights, so `known:` means those that the registry recorded.
    """
    registry = patched.registry
    if hashlib.sha256(patched.manifest_raw).hexdigest() != registry.manifest_sha256:
        return [Finding("manifest", "it is not the manifest that the registry was made from", MANIFEST_NAME)]
    findings = [
        Finding("manifest", message, MANIFEST_NAME, *(place or ()))
        for place, message in _own_differences(patched.manifest_raw, registry, registry.elsewhere, checkpoint)
    ]
    for number, step in enumerate(registry.history, 1):
        earlier, raw = step.read(), step.manifest.encode()
        if hashlib.sha256(raw).hexdigest() != earlier.manifest_sha256:
            message = f"the manifest of step {number} is not the one that the registry of that step was made from"
            findings.append(Finding("manifest", message, REGISTRY_NAME))
        elif (earlier.base.weights, earlier.base.variant) == (registry.base.weights, registry.base.variant):
            findings += [
                Finding("manifest", f"step {number}: {message}", REGISTRY_NAME, *(place or ()))
                for place, message in _own_differences(raw, earlier, registry.elsewhere, checkpoint)
            ]
    return findings


def _own_differences(
    raw: bytes, registry: Registry, elsewhere: Collection[str], checkpoint: Checkpoint
) -> Iterator[tuple[Coordinate | None, str]]:
    """How a registry differs from the manifest that it was made from."""
    try:
        manifest = parse_manifest(raw, Path(MANIFEST_NAME)).manifest
    except ManifestError as error:
        yield None, f"it is no sound manifest: {error.faults[0].removeprefix(f'{MANIFEST_NAME}:')}"
        return
    asked, faults = resolve(manifest, checkpoint, _recorded_places(registry))
    # A protected scalar of a shard that stayed in the base's repository: there is no header here to resolve it with.
    afar = {r.coordinate for r in registry.protected if r.file in elsewhere and r.file not in checkpoint.shards}
    unresolved = {number for number, _ in faults if afar and manifest.edits[number].op == "protect"}
    yield from ((None, f"edits[{number}]: {fault}") for number, fault in faults if number not in unresolved)
    for coordinate, message in _unlike_records(asked, registry):
        if coordinate in asked or coordinate not in afar or not unresolved:
            yield coordinate, message
    for path, message in _identity(manifest, registry):
        if path[-1] not in {*registry.omitted, *OWN_FILES}:  # these are no part of what was written
            yield None, message


def _recorded_places(registry: Registry) -> KnownPlaces:
    """The known super weights that the registry recorded when the edit was made."""

    def places(word: str) -> Sequence[KnownPlace]:
        fields = _RecordedPlace.__dataclass_fields__
        try:
            found = [_RecordedPlace(**{f: c[f] for f in fields}) for c in (registry.known or {})["coordinates"]]
        except (KeyError, TypeError):
            raise PlanError("the registry does not say which super weights were known", word) from None
        wanted = word.rpartition(":")[2]
        chosen = [p for p in found if (p.status != "refuted" if word == "all" else p.id == wanted)]
        if not chosen:
            raise PlanError("the registry recorded no such known super weight", word)
        return chosen

    return places
