"""Plan an edit: turn a manifest and a checkpoint into the bytes to change.

Reads the headers, the scalars that the edits name and a few rows of tensors that may be tied. Writes nothing, and
reports all faults at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Patched, find_record
from swsurgery.checkpoint.region_summary import describe_operation
from swsurgery.checkpoint.sizes import read_sizes
from swsurgery.checkpoint.tying import list_tied_faults
from swsurgery.editing.asked import Asked, Misfit
from swsurgery.editing.code_edit import CodeEdit, name_stored
from swsurgery.editing.compose import drop_repeated
from swsurgery.editing.conflicts import find_conflicts, find_region_conflicts
from swsurgery.editing.plan_regions import make_signature, plan_regions
from swsurgery.editing.plan_scalars import plan_elements, read_scalars
from swsurgery.editing.resolve import resolve
from swsurgery.editing.rewrite import ProtectedRegion, Rewrite
from swsurgery.editing.sources import Sources
from swsurgery.editing.targets import find_known, locate
from swsurgery.errors import ArchitectureError, Fault, LookupFailed, PlanError, list_some, pluralise
from swsurgery.manifest.load import LoadedManifest
from swsurgery.manifest.yaml_reader import MAX_FAULTS
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.names import OWN_FILES, UNDO_NAME, make_undo_name
from swsurgery.storage.numbers import format_size
from swsurgery.storage.region import Region
from swsurgery.storage.result import TableResult
from swsurgery.storage.splice import Scalar, Splice, list_rows

if TYPE_CHECKING:
    from swsurgery.known import KnownCoordinate, KnownModel

MAX_NOTES = 20
"""Maximum number of notes, each about one tensor on whose shard the index and the headers disagree."""


OUTSIDE = ("out of range", "beyond the model")
"""Words of a fault of an edit that names a layer, row or column which the checkpoint does not have."""


MAX_TENSOR_NAMES = 3
"""Maximum number of tensors that are named in the line of an edit."""


@dataclass(frozen=True, repr=False)
class Plan(TableResult):
    """The changes that a manifest makes to a checkpoint, and what `apply` needs to make them.

    `omitted` contains the base's files that are not copied. If the base is a patched checkpoint, `previous` contains
    its record. A pin is a digest that the manifest or this record requires of a file. A dry run compares the files in
    `pins_checked` with their pins, and not the files in `pins_unchecked`. `facts` maps coordinates to known super
    weights. `rewrites` are changes of regions, whose new bytes are computed while the files are copied. `codes` are the
    edits of elements of quantised matrices; `splices` contains the stored numbers that they change.
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
    rewrites: tuple[Rewrite, ...] = ()
    protected_regions: tuple[ProtectedRegion, ...] = ()
    codes: tuple[CodeEdit, ...] = ()

    @property
    def touched(self) -> set[str]:
        """Names of the files that the edits change."""
        return {splice.file for splice in self.splices} | {rewrite.file for rewrite in self.rewrites}

    @property
    def earlier_steps(self) -> int:
        """The number of edits that were applied to the base before this one."""
        return len(self.previous.record.history) + 1 if self.previous else 0

    def get_splices(self, file: str) -> list[Splice]:
        """List the splices of one file in the order of their offsets."""
        return sorted((s for s in self.splices if s.file == file), key=lambda s: s.offset)

    def to_json(self) -> dict[str, Any]:
        """Build the JSON document that `apply --dry-run --json` prints."""
        document: dict[str, Any] = {
            "output": None,
            "scalars": self.checkpoint.scalars,
            "splices": [s.to_json() for s in self.splices],
            "protected": [p.to_json() for p in self.protected],
            "omitted": list(self.omitted),
            "notes": list(self.notes),
            "check": None,
        }
        if self.codes:
            document["codes"] = [edit.to_json() | {"error": edit.error} for edit in self.codes]
        if self.rewrites or self.protected_regions:
            document["rewrites"] = [r.to_json() | {"bytes": r.size} for r in self.rewrites]
            document["protected_regions"] = [p.to_json() | {"bytes": p.size} for p in self.protected_regions]
        if self.pins_checked or self.pins_unchecked:
            document["pins"] = {"checked": list(self.pins_checked), "not_checked": list(self.pins_unchecked)}
        return document

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per changed scalar, protected scalar, region to change and protected region."""
        document = self.to_json()
        regions = (document.get(name, ()) for name in ("rewrites", "protected_regions"))
        return list_rows(document["splices"], document["protected"], *regions)

    def to_lines(self) -> list[str]:
        """Return one line per edit of regions: its operation and target, the number of scalars and bytes, the tensors.

        At most MAX_TENSOR_NAMES tensors are named.
        """
        groups: dict[tuple[int, str, str], list[ProtectedRegion]] = {}
        for rewrite in self.rewrites:
            operation = describe_operation(rewrite.op, rewrite.options)
            groups.setdefault((rewrite.number, operation, rewrite.target), []).append(rewrite)
        for region in self.protected_regions:
            groups.setdefault((len(self.rewrites), "protect", region.target), []).append(region)
        return [f"{op} {target}: {_describe_regions(target, parts)}" for (_, op, target), parts in groups.items()]


def _describe_regions(target: str, parts: Sequence[ProtectedRegion]) -> str:
    """Return the size of regions and their tensors: "4096 scalars (8.2 kB) in model.layers.3.mlp.down_proj.weight"."""
    scalars = pluralise(sum(part.region.scalars for part in parts), "scalar")
    names = list(dict.fromkeys(part.region.tensor for part in parts))
    amount = f"{scalars} ({format_size(sum(part.size for part in parts))})"
    if len(names) == 1:
        return amount if target.startswith(names[0]) else f"{amount} in {names[0]}"
    return f"{amount} in {len(names)} tensors: {list_some(names, MAX_TENSOR_NAMES)}"


def make_plan(loaded: LoadedManifest, checkpoint: Checkpoint) -> Plan:
    """Turn every edit of a manifest into splices and protected scalars of a checkpoint.

    If several manifests were merged, an edit that only repeats a change of an earlier one is left out.

    Raises PlanError with all faults, and CheckpointError if the base's own record is damaged.
    """
    faults = _check_base(loaded, checkpoint)
    previous = find_record(checkpoint)
    model, unknown = _identify_model(loaded, checkpoint)
    find = partial(find_known, model)
    if loaded.parts:
        loaded, hidden = drop_repeated(loaded, checkpoint, find)
        faults += hidden
    resolution = resolve(loaded.manifest, checkpoint, find)
    sources = Sources(loaded.path.parent)
    plain, codes = plan_elements(resolution.asked, checkpoint, sources)
    read, misfits = read_scalars(plain, checkpoint, sources)
    # Edits of a scalar that cannot be read are not in conflict: each of them has its own fault.
    misfits += [*resolution.misfits, *find_conflicts((one.number, one.coordinate) for one, _ in read)]
    misfits += find_region_conflicts([one for one, _ in read], resolution.regions)
    misfits += codes.list_misfits(read, checkpoint.infos)
    idle = {one.coordinate for one, new in read if one.edit.known == "all" and _is_idle(new)}
    changed = [(one.number, one.coordinate) for one in plain if one.edit.writes and one.coordinate not in idle]
    changed += [(number, splice.coordinate) for number, splice in codes.splices]
    misfits += _check_protected(changed, loaded, previous, checkpoint)
    changes = [*((one.number, scalar) for one, scalar in read), *codes.splices]
    misfits += _check_protected_codes(changes, previous, checkpoint)
    splices = tuple(scalar for _, scalar in changes if isinstance(scalar, Splice))
    protected = tuple(scalar for _, scalar in [*read, *codes.protected] if not isinstance(scalar, Splice))
    unfit = {misfit.number for misfit in misfits}
    regions = plan_regions(
        [one for one in resolution.regions if one.number not in unfit],
        (scalar.coordinate for scalar in protected),
        previous.record if previous else None,
        checkpoint,
        sources,
    )
    misfits += regions.misfits
    if any(words in misfit.message for misfit in misfits for words in OUTSIDE):
        faults += _explain_sizes(loaded, model, checkpoint)
    faults += unknown + [
        Fault.parse(misfit.explain(loaded.name_edit), loaded.describe_position(misfit.number))
        for misfit in sorted(misfits, key=lambda m: m.number)
    ]
    signed = {(r.region, make_signature(r)) for r in regions.rewrites}
    faults += list_tied_faults(splices, checkpoint, signed)
    faults += _check_copies(loaded, checkpoint, changes=bool(splices or regions.rewrites))
    if previous and regions.rewrites:
        faults += _list_taken_names([make_undo_name(len(previous.record.history) + 2)], checkpoint)
    if faults:
        raise PlanError.of(_shorten(faults, MAX_FAULTS, f"{loaded.path}: "))
    omitted = checkpoint.copies if loaded.manifest.base.copies == "omit" else ()
    without = _list_idle(loaded, read, codes.edits)
    notes = (*_collect_notes(loaded, checkpoint), *resolution.notes, *without)
    return Plan(
        loaded,
        checkpoint,
        previous,
        model,
        splices,
        protected,
        omitted,
        notes,
        facts=locate_known(model, checkpoint),
        rewrites=regions.rewrites,
        protected_regions=regions.protected,
        codes=tuple(codes.edits),
    )


def _list_idle(loaded: LoadedManifest, scalars: Iterable[tuple[Asked, Scalar]], codes: Iterable[CodeEdit]) -> list[str]:
    """Return a note for each edit of a scalar that writes the bits or the code that is stored already."""
    plain = [(asked.number, one) for asked, one in scalars if _is_idle(one)]
    idle = [(number, splice.op, splice.coordinate) for number, splice in plain]
    coded = (edit for edit in codes if edit.op != "protect" and edit.new_code == edit.old_code)
    idle += [(edit.number, edit.op, edit.coordinate) for edit in coded]
    notes = [
        f"{loaded.describe_position(number)}: {op} has no effect: {coordinate} already has this value"
        for number, op, coordinate in idle
    ]
    return _shorten(notes, MAX_NOTES)


def _is_idle(scalar: Scalar) -> TypeGuard[Splice]:
    """Return True if an edit writes the bits that are stored already."""
    return isinstance(scalar, Splice) and scalar.new == scalar.old


def _check_protected(
    changed: Iterable[tuple[int, Coordinate]], loaded: LoadedManifest, previous: Patched | None, checkpoint: Checkpoint
) -> Iterator[Misfit]:
    """Report every edit that would change a scalar protected by the base's own record.

    `changed` contains the number of each edit and the stored scalar that it changes.
    """
    protectors = previous.record.map_protectors() if previous else {}
    regions: dict[str, list[tuple[int, Region]]] = {}
    for step, entry in previous.record.list_protected_regions() if previous else ():
        regions.setdefault(entry.tensor, []).append((step, entry.region))
    for number, coordinate in changed:
        around = regions.get(coordinate.tensor, ())
        by_region = next((n for n, region in around if region.contains(coordinate)), None)
        protector = protectors.get(coordinate, by_region)
        if protector is not None:
            stored = name_stored(coordinate, checkpoint.infos)
            message = f"{stored} is protected by step {protector} of the base's record"
            others = "name the others with known: ID, " if loaded.manifest.edits[number].known == "all" else ""
            yield Misfit(number, f"{message} ({others}revert that step, or start from the first base)")


def _check_protected_codes(
    changes: Iterable[tuple[int, Scalar]], previous: Patched | None, checkpoint: Checkpoint
) -> Sequence[Misfit]:
    """Report every edit that would change the value of a quantised element that the base's own record protects."""
    if previous is None or not previous.record.list_protected_codes():
        return ()
    from swsurgery.editing.protected_codes import find_changed_codes  # imports numpy

    splices = [(number, scalar) for number, scalar in changes if isinstance(scalar, Splice)]
    return list(find_changed_codes(splices, previous.record, checkpoint))


def _check_copies(loaded: LoadedManifest, checkpoint: Checkpoint, *, changes: bool) -> list[str]:
    """Report other copies of the weights in the base, such as pytorch_model.bin, if base.copies is not set."""
    if not changes or not checkpoint.copies or loaded.manifest.base.copies is not None:
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
            what = f"base.{what} is {said}, but the checkpoint has {found}"
            faults.append(Fault(what, remedy="give the right base", position=str(loaded.path)))
    names = {f.name: f for f in checkpoint.files}
    for name, digest in base.sha256.items():
        if name not in names:
            what = f"base.sha256 names {name}, which the base does not have"
            faults.append(Fault(what, position=str(loaded.path)))
        elif names[name].digest not in (None, digest):
            what = f"wrong base: {name} has digest {names[name].digest}, not {digest}"
            faults.append(Fault(what, position=str(loaded.path)))
    return faults if "swsurgery.json" in names else [*faults, *_list_taken_names((*OWN_FILES, UNDO_NAME), checkpoint)]


def _list_taken_names(ours: Iterable[str], checkpoint: Checkpoint) -> list[str]:
    """Return a fault for each of the names `ours`, of files that swsurgery writes, that a file of the base has."""
    return [
        f"{checkpoint.root}/{name}: the base already has a file with this name, which swsurgery writes (rename it)"
        for name in ours
        if any(file.name == name or file.name.startswith(f"{name}/") for file in checkpoint.files)
    ]


def _identify_model(loaded: LoadedManifest, checkpoint: Checkpoint) -> tuple[KnownModel | None, list[str]]:
    """Return the known model that the base is (None if no known model matches), and the faults of `base.model`."""
    base = loaded.manifest.base
    if base.model is None and base.repo_id is None and checkpoint.repo_id is None:
        return None, []
    from swsurgery.known import own  # reading the known models takes time

    try:
        return own.identify(base.model, (base.repo_id, checkpoint.repo_id)), []
    except LookupFailed as error:
        return None, [Fault.parse(fault, f"{loaded.path}: base.model") for fault in error.faults]


def _explain_sizes(loaded: LoadedManifest, model: KnownModel | None, checkpoint: Checkpoint) -> list[Fault]:
    """Return a fault if the base has other sizes than the known model of the manifest, so that edits do not fit."""
    sizes = read_sizes(checkpoint)
    pairs = ((sizes.layers, model.num_layers), (sizes.hidden, model.hidden_size)) if model else ()
    if model is None or not any(stored and stored != known for stored, known in pairs):
        return []
    known = f"{model.num_layers} layers, hidden {model.hidden_size}, intermediate {model.intermediate_size}"
    what = f"the base is not {model.hf_id}: it has {sizes}; {model.hf_id} has {known}"
    return [Fault(what, position=str(loaded.path))]


def locate_known(model: KnownModel | None, checkpoint: Checkpoint) -> dict[Coordinate, KnownCoordinate]:
    """Map coordinates of the checkpoint to the known super weights of its model."""
    facts: dict[Coordinate, KnownCoordinate] = {}
    for entry in model.coordinates if model else ():
        if entry.col is not None:
            try:
                facts[locate(checkpoint, entry.layer, entry.row, entry.col, entry.expert)] = entry
            except ArchitectureError:
                continue  # The checkpoint has no such scalar. An edit that names this super weight reports it.
    return facts
