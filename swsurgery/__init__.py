"""Change single scalars of a checkpoint: exactly, safely and provably.

    from pathlib import Path
    import swsurgery

    swsurgery.apply_manifest(Path("edits.yaml"), Path("patched"))
    assert swsurgery.verify_checkpoint(Path("patched"), swsurgery.Silent()).ok

Rooms, each of which knows only those below it:

    cli/, output.py              commands; show.py, show_scan.py and figures.py are what people see
    surgery.py                   the whole operation on one page: apply, revert, check. Start here
    scanning.py                  finding super weights and sweeping factors, on another
    findings.py, entry.py        what a scan found, and what lookup and apply take of it; coverage.py: what it left out
    intervals.py, text.py        confidence intervals from windows of text, and how much text was read
    publishing.py                one commit on the Hub, gated and read back; card.py is its model card
    publish_plan.py              what goes into it, as a publication.py; publish_patch.py: of the edits alone
    proving.py                   all that can be proved of a checkpoint: manifest_record.py, manifest_proof.py,
                                 survival.py, finite.py
    formats.py, rules.py         findings as text, JSON, JUnit, SARIF, GitHub commands; the table of their rules
    lint.py                      what is wrong with a manifest, without a checkpoint
    signing.py                   signatures of a whole checkpoint
    verify.py, comparison.py     what changed, from the registry and the files, or byte by byte
    diff.py                      ... or from two checkpoints, by tensor and index
    export.py, lora.py           the edits alone: a sparse patch, a LoRA adapter, the fields of vLLM's patches
    loading.py                   a model, or its tensors, edited in memory
    inplace.py, journal.py       apply and revert where the files lie, undone after any fault; journal_format.py
    model/                       the only torch: what the edited model computes
    pins.py                      a base against the digests that it must have
    apply.py, plan.py            splices, and the copy that makes them; tying.py: tensors that loaders hold as one
    registry.py                  the record that proves a patched checkpoint and undoes it
    hub/                         the only huggingface_hub
    known/                       the super weights that were published or measured
    manifest.py, edits.py        what a user may ask for; patches.py is the same as a small binary file
    projections.py               layer, row and column -> tensor and index, by the table in architectures.py
    checkpoint.py, shard.py      the files, and the header of one of them; copies.py: those with the weights once more
    quantised.py                 which stored numbers are weights, and which are codes or internals of a quantiser
    weight_files.py              which of the files hold the weights, and of which variant
    hints.py                     what was probably meant by a path or a file that is none of a checkpoint's
    listing.py, folder.py        the files of a directory that is held open, as they were when they were listed
    dtypes.py                    numbers and their bits
    threads.py                   a pool that works with fewer threads than it was given
    numeric.py                   numpy, imported only if the limits on memory leave room for it
    staging.py, room.py          a new directory that gets its name at the end; whether there is room for it
    fsops.py, errors.py          every write to the disk, and every error on purpose

The names below load their room when they are first used. Importing the package loads none, and none loads torch
before a model is run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from swsurgery.checkpoint import open_checkpoint
    from swsurgery.diff import diff as diff_checkpoints
    from swsurgery.errors import SwsurgeryError
    from swsurgery.inplace import apply_in_place, revert_in_place
    from swsurgery.known import lookup
    from swsurgery.loading import load_patched, patched_state_dict
    from swsurgery.manifest import load_manifest
    from swsurgery.progress import Silent
    from swsurgery.surgery import CheckOptions, apply_manifest, check_checkpoint, plan_manifest, revert
    from swsurgery.verify import verify as verify_checkpoint

# The name here -> the room, and the name there where it is another: `verify` and `diff` are rooms themselves.
_PUBLIC = {
    "CheckOptions": ("surgery", "CheckOptions"),
    "Silent": ("progress", "Silent"),
    "SwsurgeryError": ("errors", "SwsurgeryError"),
    "apply_in_place": ("inplace", "apply_in_place"),
    "apply_manifest": ("surgery", "apply_manifest"),
    "check_checkpoint": ("surgery", "check_checkpoint"),
    "diff_checkpoints": ("diff", "diff"),
    "load_manifest": ("manifest", "load_manifest"),
    "load_patched": ("loading", "load_patched"),
    "lookup": ("known", "lookup"),
    "open_checkpoint": ("checkpoint", "open_checkpoint"),
    "patched_state_dict": ("loading", "patched_state_dict"),
    "plan_manifest": ("surgery", "plan_manifest"),
    "revert": ("surgery", "revert"),
    "revert_in_place": ("inplace", "revert_in_place"),
    "verify_checkpoint": ("verify", "verify"),
}

__all__ = [  # written out, for tools that read and do not run
    "CheckOptions",
    "Silent",
    "SwsurgeryError",
    "__version__",
    "apply_in_place",
    "apply_manifest",
    "check_checkpoint",
    "diff_checkpoints",
    "load_manifest",
    "load_patched",
    "lookup",
    "open_checkpoint",
    "patched_state_dict",
    "plan_manifest",
    "revert",
    "revert_in_place",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room, there = _PUBLIC[name]
    return getattr(import_module(f"{__name__}.{room}"), there)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
