"""An edit without its checkpoint, in a form that others read: sparse (ours, which `apply` takes back), peft (a LoRA
adapter) and vllm (the fields of vLLM's checkpoint patches).

Bytes are made here without torch. What is read of the source are headers and single scalars, and of a directory that
is no patched checkpoint the touched shards once, for their digests.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import open_as
from swsurgery.checkpoint.record import MANIFEST_NAME, Patched, Registry, read_records
from swsurgery.editing.base import base_of, known_digests
from swsurgery.editing.copy import outside_mode
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.errors import CheckpointError, PlanError, TargetError
from swsurgery.hub import Repo, Uri, named, place
from swsurgery.manifest import patch as patch_module
from swsurgery.manifest.load import load_manifest, parse_manifest
from swsurgery.manifest.patch import Patch, PatchBase, PatchBounds, PatchScalar, safetensors_bytes
from swsurgery.manifest.schema import Manifest
from swsurgery.progress import Progress, Silent
from swsurgery.sharing import lora
from swsurgery.storage import filesystem, staging
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.hashing import hashed, hold_to

Format = Literal["sparse", "peft", "vllm"]

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""Floating-point dtypes, as torch calls them."""


@dataclass(frozen=True)
class Source:
    """What to export, and the config.json of its model."""

    patch: Patch
    config: dict[str, Any]
    mode: int
    """Permissions of the files that are written: no more than the weights have."""
    notes: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    """Edits of numbers that are no weights, which records of 0.1.0 may hold, one line for each."""


@dataclass(frozen=True)
class Exported:
    """What was written: `files` are names, relative to `output` where that is a folder, and sizes in bytes."""

    output: Path
    format: Format
    files: dict[str, int]
    scalars: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "format": self.format,
            "files": self.files,
            "scalars": self.scalars,
            "notes": list(self.notes),
        }


def write(
    source: str | Path,
    form: Format,
    output: Path,
    *,
    base: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Export a patched checkpoint (a directory or hf://…), or a manifest or patch together with its base, into the new
    file `output` (sparse) or the new folder `output` (peft, vllm).

    Raises TargetError where the target exists or cannot be written, PlanError for what the format cannot hold, and
    what `read` raises.
    """
    if filesystem.is_there(output):
        raise TargetError("the target exists", output, "give another -o, or remove it")
    found = read(source, base, progress)
    files, notes = render(found, form)
    if form == "sparse":
        _write_new(output, files[""], found.mode)
    else:
        may_read = found.mode & 0o444
        with staging.staged(output, (), files, found.mode | may_read >> 2) as stage:
            for name, data in files.items():
                filesystem.write_file(stage / name, data, found.mode)
    sizes = {name or output.name: len(data) for name, data in sorted(files.items())}
    return Exported(output, form, sizes, len(found.patch.scalars), (*found.notes, *notes))


def render(source: Source, form: Format) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """(file name -> bytes, notes). The sparse form is one file, without a name. Raises PlanError, ManifestError."""
    if form == "sparse":
        return {"": patch_module.render(source.patch)}, ()
    if form == "peft":
        if source.codes:
            raise PlanError.of(source.codes)
        return lora.adapter(source.patch, source.config)
    return _vllm(source.patch), ()


def read(source: str | Path, base: str | None = None, progress: Progress | None = None) -> Source:
    """The edits of a patched checkpoint, since its first base where it was patched several times; or those that a
    manifest plans. Raises HubError, ManifestError, CheckpointError, PlanError."""
    where = named(source)
    if isinstance(where, Path) and not where.is_dir():
        return _planned(where, base, progress or Silent())
    if base is not None:
        raise PlanError("the base of a patched checkpoint is in its registry", source, "leave --base away")
    return _recorded(place(where) if isinstance(where, Uri) else where)


def _planned(path: Path, base: str | None, progress: Progress) -> Source:
    loaded = load_manifest(path)
    checkpoint = open_as(place(base_of(loaded, base)), loaded.manifest.base)
    plan = make_plan(loaded, checkpoint)
    digests = _digests(plan, progress)
    said = loaded.manifest.base
    identity = checkpoint.repo_id or said.repo_id, checkpoint.revision or said.revision
    scalars = [_scalar(checkpoint, s.coordinate, s.old, s.new, s.op, s.factor) for s in plan.splices]
    manifest_sha256 = hashlib.sha256(loaded.raw).hexdigest()
    return _source(checkpoint, loaded.manifest, identity, digests, manifest_sha256, scalars)


def _digests(plan: Plan, progress: Progress) -> dict[str, str]:
    """sha256 of each touched shard: of its bytes, or for a base on the Hub what the Hub lists.

    Raises PlanError where it is not what the manifest, or the base's own registry, says.
    """
    pins, found = known_digests(plan), {}
    for name in sorted({s.file for s in plan.splices}):
        file = plan.checkpoint.file(name)
        digest = hashed(file, progress) if file.is_here else file.digest
        if digest:
            hold_to(file, digest, pins)
        elif name in pins:
            digest = pins[name][0]
        if digest:
            found[name] = digest
    return found


def _recorded(root: Path | Repo) -> Source:
    patched = read_records(root)
    checkpoint = open_as(root, patched.registry.base, elsewhere=patched.registry.elsewhere)
    steps = steps_of(patched)
    changed: dict[Coordinate, PatchScalar] = {}
    for registry in steps:
        for e in registry.edits:
            if e.tensor not in checkpoint.shapes or e.dtype != checkpoint.info(e.tensor).dtype.name:
                raise CheckpointError("the registry names a scalar that is not there", f"{e.coordinate} in {e.file}",
                                      "restore swsurgery.json")  # fmt: skip
            earlier = changed.get(e.coordinate)
            if earlier:  # what two operations make of it together is a value
                changed[e.coordinate] = _scalar(checkpoint, e.coordinate, earlier.old, e.new_bytes, "set", None)
            else:
                changed[e.coordinate] = _scalar(checkpoint, e.coordinate, e.old_bytes, e.new_bytes, e.op, e.factor)
    scalars = [s for s in changed.values() if s.old != s.new or len(steps) == 1]
    for s in scalars:
        stored = checkpoint.shards[s.file].read_scalar(*s.coordinate)
        if stored != s.new:
            raise CheckpointError("is not what its registry says", f"{s.coordinate} in {s.file}",
                                  "swsurgery verify says more")  # fmt: skip
    first, last = steps[0], steps[-1]
    digests = {s.file: first.files[s.file].base_sha256 for s in scalars}
    manifest = parse_manifest(patched.manifest_raw, Path(MANIFEST_NAME)).manifest
    return _source(
        checkpoint, manifest, (first.base.repo_id, first.base.revision), {n: d for n, d in digests.items() if d},
        last.manifest_sha256, scalars,
    )  # fmt: skip


def steps_of(patched: Patched | None) -> list[Registry]:
    """The registries of a checkpoint that was patched once or several times, the first one first."""
    steps: list[Registry] = []
    while patched is not None:
        steps.append(patched.registry)
        patched = patched.previous()
    return steps[::-1]


def _scalar(
    checkpoint: Checkpoint, coordinate: Coordinate, old: bytes, new: bytes, op: str, factor: float | None
) -> PatchScalar:
    info = checkpoint.info(coordinate.tensor)
    try:
        flat = info.flat(coordinate.index)
    except IndexError as error:
        raise CheckpointError(str(error), coordinate.tensor, "restore swsurgery.json") from None
    file = checkpoint.weight_map[coordinate.tensor]
    return PatchScalar(coordinate.tensor, info.shape, info.dtype, flat, file, old, new, op, factor)


def _source(
    checkpoint: Checkpoint,
    manifest: Manifest,
    identity: tuple[str | None, str | None],
    digests: dict[str, str],
    manifest_sha256: str,
    scalars: Sequence[PatchScalar],
) -> Source:
    if not scalars:
        raise PlanError("nothing is changed, so there is nothing to export", checkpoint.root)
    repo_id, revision = identity
    base = PatchBase(
        repo_id=repo_id,
        revision=revision if repo_id else None,
        model=manifest.base.model,
        sha256=digests,
        weights=manifest.base.weights,
        variant=manifest.base.variant,
        copies=manifest.base.copies,
    )
    missing = sorted({s.file for s in scalars} - set(digests))
    notes = [f"bound to its base by old values only, for no digest is known of {name}" for name in missing]
    ordered = tuple(sorted(scalars, key=lambda s: (s.tensor, s.flat)))
    bounds = PatchBounds(**manifest.check.model_dump())
    codes = [
        f"a LoRA adapter cannot hold this edit: {s.coordinate} is no weight ({why})"
        for s in ordered
        if (why := checkpoint.quantisation.refusal(s.tensor))
    ]
    return Source(
        Patch(base, bounds, manifest_sha256, ordered),
        checkpoint.config,
        outside_mode(checkpoint.files),
        tuple(notes),
        tuple(codes),
    )


def _vllm(patch: Patch) -> dict[str, bytes]:
    """The arguments of vLLM's CheckpointWeightPatch for each tensor, in patches.json; its `values` and `indices` name
    arrays of patches.safetensors. vLLM has no file format for them; source: vllm/model_executor/model_loader/
    checkpoint_weight_patch.py, which also says that values must be floating-point numbers and indices int64."""
    faults = [
        f"vLLM's patches hold floating-point values only, not {s.dtype.name}: {s.coordinate}"
        for s in patch.scalars
        if s.dtype.name not in TORCH_NAMES
    ]
    if faults:
        raise PlanError.of(faults)
    entries, arrays = [], {}
    for number, group in enumerate(patch.by_tensor()):
        first, count = group[0], (len(group),)
        names = {part: f"{number}.{part}" for part in ("values", "indices")}
        entries.append(
            {"name": first.tensor, "shape": list(first.shape), "dtype": TORCH_NAMES[first.dtype.name], **names}
        )
        arrays[names["values"]] = first.dtype.name, count, b"".join(s.new for s in group)
        arrays[names["indices"]] = "I64", count, b"".join(s.flat.to_bytes(8, "little") for s in group)
    document = {"patches": entries, **patch.origin()}
    return {
        "patches.json": patch_module.json_bytes(document),
        "patches.safetensors": safetensors_bytes(arrays, {"format": "pt"}),
    }


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """A new file that is whole or absent, and never replaces another."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        filesystem.write_file(temporary, data, mode)
        with filesystem.reported(path):
            filesystem.rename_new(temporary, path)
            filesystem.sync_directory(path.parent)
    except BaseException:
        with filesystem.reported(path):
            filesystem.remove_file(temporary)
        raise
