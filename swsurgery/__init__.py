"""Change single scalars of a checkpoint exactly, safely and with a proof.

    from pathlib import Path
    import swsurgery

    swsurgery.apply_manifest(Path("edits.yaml"), Path("patched"))
    assert swsurgery.verify_checkpoint(Path("patched"), swsurgery.Silent()).ok

Each package imports only packages below it:

    cli/           commands and their output
    sharing/       publishing, and exporting only the edits
    scanning/      finding super weights, confirming them, sweeping factors
    verifying/     proofs and checks of a checkpoint, of a manifest and of a signature
    editing/       applying a manifest: plan, copy, edit in place or in memory, revert, sanity check
    model/         running a model; only this package imports transformers
    known/         published and measured super weights
    checkpoint/    what a checkpoint contains: files, record, journal, projections, quantisation
    manifest/      what a user may request
    hub/           bytes on the Hub; only this package imports huggingface_hub
    storage/       bytes on disk: files, headers, dtypes, staging, hashing

Public names are loaded on first use, so importing this package is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swsurgery._version import __version__

if TYPE_CHECKING:
    from swsurgery.checkpoint.diff import diff as diff_checkpoints
    from swsurgery.checkpoint.opening import open_checkpoint
    from swsurgery.editing.apply import apply_manifest, plan_manifest
    from swsurgery.editing.in_memory import load_patched, patched_state_dict
    from swsurgery.editing.in_place import apply_in_place, revert_in_place
    from swsurgery.editing.revert import revert
    from swsurgery.editing.sanity import CheckOptions, check_checkpoint
    from swsurgery.errors import SwsurgeryError
    from swsurgery.known import lookup
    from swsurgery.manifest.load import load_manifest
    from swsurgery.progress import Silent
    from swsurgery.verifying.verify import verify_record as verify_checkpoint

# The name here -> the room, and the name there where it is another: `verify` and `diff` are rooms themselves.
_PUBLIC = {
    "CheckOptions": ("editing.sanity", "CheckOptions"),
    "Silent": ("progress", "Silent"),
    "SwsurgeryError": ("errors", "SwsurgeryError"),
    "apply_in_place": ("editing.in_place", "apply_in_place"),
    "apply_manifest": ("editing.apply", "apply_manifest"),
    "check_checkpoint": ("editing.sanity", "check_checkpoint"),
    "diff_checkpoints": ("checkpoint.diff", "diff"),
    "load_manifest": ("manifest.load", "load_manifest"),
    "load_patched": ("editing.in_memory", "load_patched"),
    "lookup": ("known", "lookup"),
    "open_checkpoint": ("checkpoint.opening", "open_checkpoint"),
    "patched_state_dict": ("editing.in_memory", "patched_state_dict"),
    "plan_manifest": ("editing.apply", "plan_manifest"),
    "revert": ("editing.revert", "revert"),
    "revert_in_place": ("editing.in_place", "revert_in_place"),
    "verify_checkpoint": ("verifying.verify", "verify_record"),
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
