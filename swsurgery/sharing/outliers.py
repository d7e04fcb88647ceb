"""Export outliers: scalars that must stay exact, as positions and values, to put back after quantisation.

The scalars are the protected ones of a patched checkpoint or of a manifest, or the known super weights of any other
checkpoint. Protected rows, columns and other regions are exported scalar by scalar. The file is a safetensors file. Its
metadata lists tensors, and tensor number n of this list has two arrays: `n.indices` (I64, row-major positions in the
stored shape, in increasing order) and `n.values` (in the tensor's dtype).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import held, read_checkpoint
from swsurgery.checkpoint.record import Patched
from swsurgery.editing.base import find_base
from swsurgery.editing.copy_job import compute_outside_mode
from swsurgery.editing.plan import make_plan
from swsurgery.editing.targets import locate
from swsurgery.errors import ArchitectureError, CheckpointError, Fault, PlanError
from swsurgery.hub import RemoteTree, open_location
from swsurgery.known import list_addressable
from swsurgery.manifest.load import LoadedManifest
from swsurgery.manifest.patch import render_safetensors
from swsurgery.sharing.reading import identify_model, read_with_record
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import format_bits
from swsurgery.storage.folder import Folder
from swsurgery.storage.numeric import load_numpy
from swsurgery.storage.region import Region
from swsurgery.storage.shard import TensorInfo

OUTLIERS_FORMAT, OUTLIERS_VERSION = "swsurgery.outliers", "1"
"""Values of `format` and `format_version` in the metadata."""


MAX_OUTLIERS = 1 << 18
"""Maximum number of scalars in an export: 64 rows of 4096 scalars. Each takes 10 to 16 bytes of the file."""


@dataclass(frozen=True)
class Outliers:
    """Scalars to export: for each tensor, the row-major positions and the stored bytes of its scalars.

    `mode` is the permissions of the exported file: they permit no more than the permissions of the weights.
    """

    tensors: tuple[tuple[TensorInfo, Mapping[int, bytes]], ...]
    mode: int

    @property
    def scalars(self) -> int:
        """The number of scalars."""
        return sum(len(values) for _, values in self.tensors)


def read_manifest_outliers(loaded: LoadedManifest, base: str | Path | None) -> Outliers:
    """Read the scalars that a manifest protects, with their values in its base.

    Raises HubError, CheckpointError, PlanError.
    """
    with held(open_location(find_base(loaded, base))) as entered:
        checkpoint = read_checkpoint(entered, loaded.manifest.base)
        plan = make_plan(loaded, checkpoint)
        coordinates = [scalar.coordinate for scalar in plan.protected]
        return _collect(checkpoint, coordinates, str(loaded.path), [each.region for each in plan.protected_regions])


def read_checkpoint_outliers(root: Path | Folder | RemoteTree, model: str | None) -> Outliers:
    """Read the protected scalars of a patched checkpoint, or the known super weights of a checkpoint.

    The known super weights are read if there is no record, or if `model` names a known model. Raises HubError,
    CheckpointError, LookupFailed; PlanError for a scalar that is not a weight.
    """
    with held(root) as entered:
        checkpoint, patched = read_with_record(entered)
        if patched is None or model is not None:
            return _collect(checkpoint, _list_known(checkpoint, model, patched), str(checkpoint.root))
        return _collect_protected(checkpoint, patched)


def _collect_protected(checkpoint: Checkpoint, patched: Patched) -> Outliers:
    """Read the protected scalars and regions. Raises CheckpointError if one of them differs from the record."""
    record = patched.record
    every = (*record.protected, *(inherited for _, inherited in record.list_inherited()))
    # An earlier step may have protected scalars of another copy of the weights, which is not read here.
    protected = [each for each in every if each.file in checkpoint.shards or each.file in record.elsewhere]
    entries = [entry for _, entry in record.list_protected_regions()]
    entries = [each for each in entries if each.file in checkpoint.shards or each.file in record.elsewhere]
    regions = [entry.region for entry in entries]
    found = _collect(checkpoint, [each.coordinate for each in protected], str(checkpoint.root), regions)
    for entry in entries:
        if _hash_region(entry.region, checkpoint) != entry.sha256:
            where = f"{entry.region} in {entry.file}"
            raise CheckpointError("the stored region differs from its record", where, "run swsurgery verify")
    stored = {info.name: (info, values) for info, values in found.tensors}
    for each in protected:
        info, values = stored[each.tensor]
        if format_bits(values[info.flatten(each.index)]) != each.old_bits:
            where = f"{each.coordinate} in {each.file}"
            raise CheckpointError("the stored scalar differs from its record", where, "run swsurgery verify")
    return found


def _list_known(checkpoint: Checkpoint, name: str | None, patched: Patched | None) -> list[Coordinate]:
    model = identify_model(checkpoint, patched, name)
    if model is None:
        raise CheckpointError("cannot tell which known model this is", checkpoint.root, "name it with --model")
    found: list[Coordinate] = []
    faults: list[str] = []
    for entry in list_addressable(model):
        if entry.col is not None:
            try:
                found.append(locate(checkpoint, entry.layer, entry.row, entry.col, entry.expert))
            except ArchitectureError as error:
                faults += error.faults
    if faults:
        raise PlanError.of(faults)
    return found


def _read_region(region: Region, checkpoint: Checkpoint) -> Iterator[tuple[int, bytes]]:
    """Yield the flat index in the tensor and the bytes of each scalar of a region, in rising order."""
    load_numpy()
    import numpy as np

    from swsurgery.rewriting.rows import RegionRows, StoredMatrix

    info = checkpoint.get_info(region.tensor)
    shard = checkpoint.shards[checkpoint.weight_map[region.tensor]]
    matrix = StoredMatrix(info, shard.data_start + info.data_offsets[0], flat=len(info.shape) == 1)
    rows, at = RegionRows(matrix, region), 0
    for words in rows.read_all(shard.file):
        flat = rows.find_flat(at // rows.width, np.arange(len(words)))
        yield from ((position, word.tobytes()) for position, word in zip(flat.tolist(), words, strict=True))
        at += len(words)


def _hash_region(region: Region, checkpoint: Checkpoint) -> str:
    """Return the sha256 of a region's bytes in C order."""
    digest = hashlib.sha256()
    for _, data in _read_region(region, checkpoint):
        digest.update(data)
    return digest.hexdigest()


def _list_region_faults(regions: Iterable[Region], checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the reasons why regions cannot be exported."""
    total = 0
    for region in regions:
        total += region.scalars
        info = checkpoint.get_info(region.tensor) if region.tensor in checkpoint.shapes else None
        if info is None:
            yield f"the shard with {region} is not here: export from the base's repository"
        elif refusal := checkpoint.quantisation.explain_refusal(region.tensor):
            yield f"{region} cannot be put back, because it is not a weight ({refusal})"
        elif info.dtype.bits % 8 or len(region.bounds) != len(info.shape):
            yield f"{region} is no region of {info.dtype.name} {list(info.shape)}: restore swsurgery.json"
        elif any(end > size for (_, end), size in zip(region.bounds, info.shape, strict=True)):
            yield f"{region} is outside of a tensor of shape {list(info.shape)}: restore swsurgery.json"
    if total > MAX_OUTLIERS:
        yield f"{total} scalars are protected, but an export has at most {MAX_OUTLIERS}: protect rows or single scalars"


def _collect(
    checkpoint: Checkpoint, coordinates: Iterable[Coordinate], where: str, regions: Sequence[Region] = ()
) -> Outliers:
    """Read scalars and regions, and group the scalars by tensor.

    Raises PlanError if there are none or too many, or if one of them is not a weight.
    """
    groups: dict[str, dict[int, bytes]] = {}
    faults = [*_list_region_faults(regions, checkpoint)]
    for region in regions if not faults else ():
        groups.setdefault(region.tensor, {}).update(_read_region(region, checkpoint))
    for coordinate in dict.fromkeys(coordinates):
        if coordinate.tensor not in checkpoint.shapes:
            faults.append(f"the shard with {coordinate} is not here: export from the base's repository")
        elif refusal := checkpoint.quantisation.explain_refusal(coordinate.tensor):
            faults.append(Fault(f"{coordinate} cannot be put back, because it is not a weight ({refusal})"))
        else:
            info = checkpoint.get_info(coordinate.tensor)
            shard = checkpoint.shards[checkpoint.weight_map[coordinate.tensor]]
            flat = info.flatten(coordinate.index)
            groups.setdefault(coordinate.tensor, {})[flat] = shard.read_scalar(*coordinate)
    if faults:
        raise PlanError.of(faults)
    if not groups:
        raise PlanError(
            "no scalar is protected",
            where,
            "add {op: protect, known: all} to the manifest, or name the known model of a checkpoint with --model",
        )
    tensors = ((checkpoint.get_info(tensor), dict(sorted(groups[tensor].items()))) for tensor in sorted(groups))
    return Outliers(tuple(tensors), compute_outside_mode(checkpoint.files))


def render(outliers: Outliers) -> bytes:
    """Render the bytes of the file. The same scalars give the same bytes."""
    arrays: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for number, (info, values) in enumerate(outliers.tensors):
        count = len(values)
        arrays[f"{number}.indices"] = "I64", (count,), struct.pack(f"<{count}q", *values)
        arrays[f"{number}.values"] = info.dtype.name, (count,), b"".join(values.values())
    tensors = [{"name": i.name, "dtype": i.dtype.name, "shape": list(i.shape)} for i, _ in outliers.tensors]
    text = json.dumps(tensors, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return render_safetensors(arrays, {"format": OUTLIERS_FORMAT, "format_version": OUTLIERS_VERSION, "tensors": text})
