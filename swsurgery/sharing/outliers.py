"""Export outliers: scalars that must stay exact, as positions and values, to put back after quantisation.

The scalars are the protected ones of a patched checkpoint or of a manifest, or the known super weights of any other
checkpoint. The file is a safetensors file. Its metadata lists tensors, and tensor number n of this list has two arrays:
`n.indices` (I64, row-major positions in the stored shape, in increasing order) and `n.values` (in the tensor's dtype).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import held, read_checkpoint
from swsurgery.checkpoint.record import Patched
from swsurgery.editing.base import find_base
from swsurgery.editing.copy_job import compute_outside_mode
from swsurgery.editing.plan import make_plan
from swsurgery.editing.targets import locate
from swsurgery.errors import ArchitectureError, CheckpointError, PlanError
from swsurgery.hub import RemoteTree, open_location
from swsurgery.known import list_addressable
from swsurgery.manifest.load import LoadedManifest
from swsurgery.manifest.patch import render_safetensors
from swsurgery.sharing.reading import identify_model, read_with_record
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import format_bits
from swsurgery.storage.folder import Folder
from swsurgery.storage.shard import TensorInfo

OUTLIERS_FORMAT, OUTLIERS_VERSION = "swsurgery.outliers", "1"
"""Values of `format` and `format_version` in the metadata."""


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
        return _collect(checkpoint, [scalar.coordinate for scalar in plan.protected], str(loaded.path))


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
    """Read the protected scalars. Raises CheckpointError if one of them differs from the record."""
    record = patched.record
    every = (*record.protected, *(inherited for _, inherited in record.list_inherited()))
    # An earlier step may have protected scalars of another copy of the weights, which is not read here.
    protected = [each for each in every if each.file in checkpoint.shards or each.file in record.elsewhere]
    found = _collect(checkpoint, [each.coordinate for each in protected], str(checkpoint.root))
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


def _collect(checkpoint: Checkpoint, coordinates: Iterable[Coordinate], where: str) -> Outliers:
    """Read scalars and group them by tensor. Raises PlanError if there are none, or if one of them is not a weight."""
    groups: dict[str, dict[int, bytes]] = {}
    faults: list[str] = []
    for coordinate in dict.fromkeys(coordinates):
        if coordinate.tensor not in checkpoint.shapes:
            faults.append(f"the shard with {coordinate} is not here: export from the base's repository")
        elif refusal := checkpoint.quantisation.explain_refusal(coordinate.tensor):
            faults.append(f"{coordinate} cannot be put back, because it is not a weight ({refusal})")
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
