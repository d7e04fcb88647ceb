"""Write the files that the user wants of a scan: a manifest, a figure, and an entry for the command lookup.

Files that cannot be written are refused before the scan. `outputs.py` and `expert_manifest.py` make the contents.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.editing.copy_job import compute_outside_mode
from swsurgery.editing.pin import pin_manifest
from swsurgery.errors import Interrupted, LookupFailed, TargetError, report_done
from swsurgery.known import own
from swsurgery.manifest.load import parse_manifest
from swsurgery.manifest.writer import refuse_unfit
from swsurgery.progress import Reporter
from swsurgery.scanning import figures, outputs
from swsurgery.scanning.expert_manifest import write_expert_manifest
from swsurgery.scanning.expert_report import ExpertScan
from swsurgery.scanning.report import Method, Scan
from swsurgery.storage import filesystem

ManifestOp = Literal["zero", "scale", "protect"]


@dataclass(frozen=True)
class ScanFiles:
    """The files that the user wants a scan to write.

    `manifest` is the path of a manifest that applies `op` (with `factor`) to what was found. `plot` is the path of a
    figure. `register` is the model name under which the command lookup will find the super weights. The stored entry
    cites `command` as its source.
    """

    manifest: Path | None = None
    op: ManifestOp = "zero"
    factor: float | None = None
    plot: Path | None = None
    register: str | None = None
    command: str = "swsurgery scan"


def refuse_files(files: ScanFiles, checkpoint: Checkpoint, method: Method) -> None:
    """Refuse files that cannot be written, before the scan.

    Raises ManifestError for an impossible operation, LookupFailed for a name that cannot be registered, and TargetError
    for a path that exists, is unusable, or is given twice.
    """
    refuse_unfit(files.op, files.factor)
    if files.register is not None and method == "experts":
        raise LookupFailed("super experts cannot be saved for lookup", files.register, "leave out --register")
    if files.register is not None:
        own.refuse_name(files.register, outputs.read_sizes(checkpoint))
    if files.plot is not None:
        figures.check_figure_path(files.plot)
    if files.manifest is not None:
        if files.plot is not None and os.path.abspath(files.manifest) == os.path.abspath(files.plot):
            raise TargetError("the manifest and the figure have the same name", files.manifest, "give two names")
        _refuse_manifest_path(files.manifest)


def _refuse_manifest_path(manifest: Path) -> None:
    """Raise TargetError if the path exists, or if no file can be made in its directory."""
    if filesystem.is_there(manifest):
        raise TargetError("the manifest already exists", manifest, "choose another --manifest")
    directory = manifest.absolute().parent
    if not directory.is_dir():
        raise TargetError("no such directory", directory, "make it first")
    if not os.access(directory, os.W_OK):
        raise TargetError("cannot write", directory, "choose a place where you may write")


def write_files(found: Scan, checkpoint: Checkpoint, files: ScanFiles, reporter: Reporter) -> None:
    """Write the files that `files` names.

    The reporter gets a line about each file as soon as it is written. After a failure the user thus knows which files
    exist. Raises TargetError if a file cannot be written, LookupFailed if the name belongs to another model, and
    Interrupted, which names the files written.
    """
    written: list[str] = []

    def report(line: str) -> None:
        written.append(line)
        report_done("; ".join(written))
        reporter.say(line)

    try:
        if files.plot is not None:
            figures.plot_scan(found, files.plot, files.register or choose_name(checkpoint))
            report(f"figure: {files.plot}")
        if files.manifest is not None and found.answer != "found":
            why = "the scan is undecided" if found.answer == "undecided" else "nothing was found"
            report(f"{why}, so no manifest was written: {files.manifest}")
        elif files.manifest is not None:
            _write_manifest(found, checkpoint, files.manifest, files, reporter)
            report(f"manifest: {files.manifest}")
        if files.register is not None:
            entry = outputs.make_known_entry(
                found, checkpoint, hf_id=files.register, revision=checkpoint.revision, command=files.command
            )
            own.save(entry, compute_outside_mode(checkpoint.files))
            report(f"registered: swsurgery lookup {entry.hf_id}")
    except Interrupted as interrupted:
        if not written:
            raise
        raise interrupted.replace_left("what was written stays") from interrupted


def _write_manifest(found: Scan, checkpoint: Checkpoint, manifest: Path, files: ScanFiles, reporter: Reporter) -> None:
    """Write a manifest that applies an operation to what was found. It pins the digests of the files that it edits."""
    base = make_base(checkpoint, manifest)
    if isinstance(found, ExpertScan):
        text = write_expert_manifest(found, base=base, op=files.op, factor=files.factor)
    else:
        text = outputs.scan_manifest(found, base=base, op=files.op, factor=files.factor)
    text = pin_manifest(parse_manifest(text.encode(), manifest), checkpoint, reporter).text
    filesystem.write_file(manifest, text.encode(), compute_outside_mode(checkpoint.files))


def choose_name(checkpoint: Checkpoint) -> str:
    """Return the name of a checkpoint for a figure: its repository, or else the name of its directory."""
    return checkpoint.repo_id or checkpoint.directory.name


def make_base(checkpoint: Checkpoint, manifest: Path) -> dict[str, Any]:
    """Return the fields of `base:` in a manifest for the checkpoint.

    They are repo_id and revision if both are known. Otherwise the field is path, relative to the manifest's directory.
    If the user chose a set of weights, the fields weights and variant are added.
    """
    chosen = {"weights": checkpoint.choice, "variant": checkpoint.variant}
    chosen = {key: value for key, value in chosen.items() if value}
    if checkpoint.repo_id and checkpoint.revision:
        return {"repo_id": checkpoint.repo_id, "revision": checkpoint.revision, **chosen}
    return {"path": os.path.relpath(checkpoint.directory, os.path.realpath(manifest.absolute().parent)), **chosen}
