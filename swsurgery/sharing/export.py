"""Export edits as small files in the format sparse (a patch for `apply`), peft (a LoRA adapter) or vllm (for vLLM).

The format outliers exports the scalars that must stay exact instead; outliers.py describes it.

The files are made without torch. From a patched checkpoint, only headers, single scalars and changed regions are read.
If the source is a manifest, the shards of its base that it edits are also read once, to compute their digests. The
first base of a checkpoint that was patched in several steps is the checkpoint before the first step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from swsurgery.errors import PlanError, TargetError
from swsurgery.hub import open_location
from swsurgery.manifest import patch as patch_module
from swsurgery.manifest.load import ManifestLike, load_manifest
from swsurgery.manifest.patch import (
    Patch,
    render_safetensors,
)
from swsurgery.progress import Reporter, require_reporter
from swsurgery.sharing import lora, outliers
from swsurgery.sharing.edit_source import EditSource, find_checkpoint
from swsurgery.sharing.edit_source import read as read_source
from swsurgery.storage import filesystem, staging
from swsurgery.storage.arguments import require_choice, require_path, require_type
from swsurgery.storage.result import Result

ExportFormat = Literal["sparse", "peft", "vllm", "outliers"]

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""Maps the name of each floating-point dtype in safetensors to its name in torch."""


@dataclass(frozen=True, repr=False)
class Exported(Result):
    """Result of `export`. `scalars` is the number of exported scalars.

    `files` maps the name of each file to its size in bytes. If `output` is a folder, the names are relative to it.
    """

    output: Path
    format: ExportFormat
    files: dict[str, int]
    scalars: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the document that `export --json` prints."""
        return {
            "output": str(self.output),
            "format": self.format,
            "files": self.files,
            "scalars": self.scalars,
            "notes": list(self.notes),
        }


def export(
    source: ManifestLike,
    output: str | Path,
    *,
    format: ExportFormat,
    base: str | Path | None = None,
    model: str | None = None,
    reporter: Reporter | None = None,
) -> Exported:
    """Export edits without their checkpoint, as files of a few kilobytes.

    `source` is a patched checkpoint (a directory or `hf://ORG/NAME[@REV][/sub]`), or a manifest in any form that
    `apply` takes; `base` replaces the manifest's base. The format "sparse" makes one new file that `apply` takes,
    "peft" a new folder with a LoRA adapter, and "vllm" a new folder with arrays for vLLM's checkpoint patches. The
    format "outliers" makes one new file with the protected scalars instead of the edits; of a checkpoint without a
    record, or if `model` names a known model, it contains the known super weights. Only headers, single scalars and
    changed regions are read, but for a manifest, each shard with an edit is also hashed.

    Raises TypeError, HubError, ManifestError, CheckpointError; TargetError if the output exists or cannot be written;
    PlanError for an edit that the format does not support.
    """
    reporter, target = require_reporter(reporter), require_path("output", output)
    require_choice("format", format, get_args(ExportFormat))
    require_type("model", model, str, optional=True)
    if model is not None and format != "outliers":
        raise PlanError("--model is only for --format outliers", model, "leave it out")
    if filesystem.is_there(target):
        raise TargetError("the output already exists", target, "choose another -o")
    if format == "outliers":
        return _export_outliers(source, target, base, model)
    found = read_source(source, base, reporter, for_adapter=format == "peft")
    files, notes = render(found, format)
    if format == "sparse":
        _write_new(target, files[""], found.mode)
    else:
        may_read = found.mode & 0o444
        with staging.stage_output(target, (), files, found.mode | may_read >> 2) as stage:
            for name, data in files.items():
                filesystem.write_file(stage / name, data, found.mode)
    sizes = {name or target.name: len(data) for name, data in sorted(files.items())}
    return Exported(target, format, sizes, len(found.patch.scalars), (*found.notes, *notes))


def _export_outliers(source: ManifestLike, target: Path, base: str | Path | None, model: str | None) -> Exported:
    where = find_checkpoint(source, base)
    if where is not None:
        found = outliers.read_checkpoint_outliers(open_location(where), model)
    elif model is not None:
        raise PlanError("--model is only for a checkpoint; a manifest names its model", model, "set base.model")
    else:
        found = outliers.read_manifest_outliers(load_manifest(source, base), base)
    data = outliers.render(found)
    _write_new(target, data, found.mode)
    return Exported(target, "outliers", {target.name: len(data)}, found.scalars, ())


def render(source: EditSource, form: ExportFormat) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Render the files of a format. Returns (file name -> bytes, notes). Raises PlanError, ManifestError.

    The sparse format makes a single file, whose name in the dict is "".
    """
    if form == "sparse":
        return {"": patch_module.render(source.patch)}, ()
    if form == "peft":
        if source.codes:
            raise PlanError.of(source.codes)
        return lora.render_adapter(source.patch, source.config, source.zeros)
    return _render_vllm(source.patch), ()


def _render_vllm(patch: Patch) -> dict[str, bytes]:
    """Render the arguments of vLLM's CheckpointWeightPatch for each tensor. Raises PlanError.

    vLLM has no file format for these arguments. Here patches.json contains them, and its `values` and `indices` are
    names of arrays in patches.safetensors. Source: vllm/model_executor/model_loader/checkpoint_weight_patch.py, which
    requires floating-point values and int64 indices; PlanError lists the scalars that have another dtype.
    """
    faults = [
        f"a vLLM patch contains only floating-point values, not {s.dtype.name}: {s.coordinate}"
        for s in patch.scalars
        if s.dtype.name not in TORCH_NAMES
    ]
    if faults:
        raise PlanError.of(faults)
    entries, arrays = [], {}
    for number, group in enumerate(patch.group_by_tensor()):
        first, count = group[0], (len(group),)
        names = {part: f"{number}.{part}" for part in ("values", "indices")}
        entries.append(
            {"name": first.tensor, "shape": list(first.shape), "dtype": TORCH_NAMES[first.dtype.name], **names}
        )
        arrays[names["values"]] = first.dtype.name, count, b"".join(s.new for s in group)
        arrays[names["indices"]] = "I64", count, b"".join(s.flat.to_bytes(8, "little") for s in group)
    document = {"patches": entries, **patch.describe_origin()}
    return {
        "patches.json": patch_module.render_json(document),
        "patches.safetensors": render_safetensors(arrays, {"format": "pt"}),
    }


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a new file atomically. Raises TargetError if a file of this name exists."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        filesystem.write_file(temporary, data, mode)
        with filesystem.convert_os_errors(path):
            filesystem.rename_new(temporary, path)
            filesystem.sync_directory(path.parent)
    except BaseException:
        with filesystem.convert_os_errors(path):
            filesystem.remove_file(temporary)
        raise
