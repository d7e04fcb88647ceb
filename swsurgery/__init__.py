"""Change single scalars of a checkpoint exactly, safely and with a proof.

    import swsurgery

    swsurgery.apply("edits.yaml", output="patched")
    assert swsurgery.verify("patched").ok

A function and the command of the same name do the same: `swsurgery.verify` does what `swsurgery verify` does.
docs/python.md has an example of each function.

Each package imports only packages below it:

    cli/           commands and their output
    sharing/       publishing, exporting only the edits, recipes for quantisers, HTML pages
    scanning/      finding super weights, confirming them, sweeping factors
    verifying/     proofs and checks of a checkpoint, of a manifest and of a signature
    editing/       applying a manifest: plan, copy, edit in place or in memory, revert, sanity check
    model/         running a model; only this package imports transformers
    known/         published and measured super weights
    checkpoint/    what a checkpoint contains: files, record, journal, projections, quantisation
    manifest/      what a user may request
    rewriting/     new values for whole regions: statistics, rounding, clipping, reading and hashing regions
    hub/           bytes on the Hub; only this package imports huggingface_hub
    storage/       bytes on disk: files, headers, dtypes, staging, hashing

Public names are loaded on first use, so importing this package is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from swsurgery._version import __version__

if TYPE_CHECKING:
    from swsurgery.checkpoint.diff import diff
    from swsurgery.checkpoint.inspect import inspect
    from swsurgery.checkpoint.opening import open_checkpoint
    from swsurgery.editing.apply import apply, plan
    from swsurgery.editing.check_options import CheckOptions
    from swsurgery.editing.in_memory import load_patched, patched_state_dict
    from swsurgery.editing.pin import pin
    from swsurgery.editing.revert import revert
    from swsurgery.editing.sanity import check
    from swsurgery.errors import SwsurgeryError
    from swsurgery.known.lookup import lookup
    from swsurgery.manifest.load import load_manifest
    from swsurgery.progress import Reporter, Silent
    from swsurgery.scanning.compare import compare
    from swsurgery.scanning.scan import scan
    from swsurgery.scanning.sweep import sweep
    from swsurgery.sharing.export import export
    from swsurgery.sharing.publish import publish
    from swsurgery.sharing.recipes.recipe import recipe
    from swsurgery.verifying.lint import lint
    from swsurgery.verifying.preflight import preflight
    from swsurgery.verifying.signature import sign
    from swsurgery.verifying.verify import verify

_MODULES = {
    "CheckOptions": "editing.check_options",
    "Reporter": "progress",
    "Silent": "progress",
    "SwsurgeryError": "errors",
    "apply": "editing.apply",
    "check": "editing.sanity",
    "compare": "scanning.compare",
    "diff": "checkpoint.diff",
    "export": "sharing.export",
    "inspect": "checkpoint.inspect",
    "lint": "verifying.lint",
    "load_manifest": "manifest.load",
    "load_patched": "editing.in_memory",
    "lookup": "known.lookup",
    "open_checkpoint": "checkpoint.opening",
    "patched_state_dict": "editing.in_memory",
    "pin": "editing.pin",
    "plan": "editing.apply",
    "preflight": "verifying.preflight",
    "publish": "sharing.publish",
    "recipe": "sharing.recipes.recipe",
    "revert": "editing.revert",
    "scan": "scanning.scan",
    "sign": "verifying.signature",
    "sweep": "scanning.sweep",
    "verify": "verifying.verify",
}
"""Maps each public name to the module (below `swsurgery.`) from which it is loaded on first use."""

__all__ = [  # written out for tools that read this file without running it
    "CheckOptions",
    "Reporter",
    "Silent",
    "SwsurgeryError",
    "__version__",
    "apply",
    "check",
    "compare",
    "diff",
    "export",
    "inspect",
    "lint",
    "load_manifest",
    "load_patched",
    "lookup",
    "open_checkpoint",
    "patched_state_dict",
    "pin",
    "plan",
    "preflight",
    "publish",
    "recipe",
    "revert",
    "scan",
    "sign",
    "sweep",
    "verify",
]


if not TYPE_CHECKING:  # type checkers use the imports above, and report any other name as an error

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
