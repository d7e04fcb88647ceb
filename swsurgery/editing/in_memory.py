"""Load a model, or its tensors, with the edits of a manifest made in memory; write nothing.

A manifest is planned, and its faults are reported, as by `apply`. `model/patched.py` reads the weights, because this
package must not import torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swsurgery.checkpoint.opening import held, read_checkpoint
from swsurgery.editing.base import collect_known_digests, find_base
from swsurgery.editing.overlay import overlay_checkpoint
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.errors import ModelError
from swsurgery.hub import download_checkpoint
from swsurgery.manifest.merge import ManifestsLike, load_merged
from swsurgery.model.variant import Variant
from swsurgery.progress import Reporter, require_reporter
from swsurgery.storage.hashing import check_digest, hash_file

if TYPE_CHECKING:
    from swsurgery.model.patched import PreTrainedModel
    from swsurgery.model.read_tensors import Tensor


def load_patched(
    manifest: ManifestsLike, base: str | Path | None = None, *, reporter: Reporter | None = None, **options: Any
) -> PreTrainedModel:
    """Load the model that transformers would load from the patched checkpoint, in evaluation mode; write nothing.

    `manifest` and `base` are those of `apply`; a base on the Hub is downloaded. `options` are passed to from_pretrained
    of transformers: dtype, device_map, attn_implementation and so on. New values are rounded to the dtype of the loaded
    model, as stored values are. The loaded value of each edited and protected scalar is compared with the stored one
    before the edit, and with the wanted one after it.

    Raises TypeError, HubError, ManifestError, CheckpointError, PlanError (a digest or an expected value differs),
    ModelError.
    """
    _refuse_without("torch", "transformers")
    from swsurgery.model import patched

    with _plan_held(manifest, base, require_reporter(reporter)) as plan:
        changed = None
        if tensors := frozenset(rewrite.region.tensor for rewrite in plan.rewrites):
            changed = Variant({}, tensors, overlay_checkpoint(plan, reporter))
        return patched.load(plan.checkpoint, plan.splices, plan.protected, options, changed)


def patched_state_dict(
    manifest: ManifestsLike, base: str | Path | None = None, *, reporter: Reporter | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for every tensor of the patched checkpoint; write nothing.

    `manifest` and `base` are those of `apply`; a base on the Hub is downloaded. Tensors have their stored dtype and
    shape, are on the CPU and come in the order of the shards. Only one tensor is in memory at a time.

    The call itself raises TypeError, HubError, ManifestError, CheckpointError, PlanError or ModelError if the tensors
    cannot be loaded. The iteration raises CheckpointError if a shard has changed since the call.
    """
    _refuse_without("torch")
    from swsurgery.model import read_tensors

    with contextlib.ExitStack() as stack:
        plan = stack.enter_context(_plan_held(manifest, base, require_reporter(reporter)))
        read_tensors.refuse_unreadable(plan.checkpoint)
        changed = overlay_checkpoint(replace(plan, splices=()), reporter)
        held = stack.pop_all()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with held:
            yield from read_tensors.load_tensors(changed, plan.splices)

    return tensors()


@contextlib.contextmanager
def _plan_held(manifest: ManifestsLike, base: str | Path | None, reporter: Reporter) -> Iterator[Plan]:
    """Plan a manifest, and lock its base during the block, so that no other run edits the base in place."""
    loaded = load_merged(manifest, base)
    with held(download_checkpoint(find_base(loaded, base))) as root:
        plan = make_plan(loaded, read_checkpoint(root, loaded.manifest.base))
        _check_digests(plan)
        for note in plan.notes:
            reporter.say(note)
        yield plan


def _check_digests(plan: Plan) -> None:
    """Compare digests with their pins, for the pinned shards with edits and for the files that the manifest pins.

    A pin is the digest that the manifest, or the base's own record, requires of a file. Raises PlanError if a digest
    differs from its pin.
    """
    pins = collect_known_digests(plan)
    touched = plan.touched | set(plan.loaded.manifest.base.sha256)
    for name in sorted(touched & set(pins)):
        file = plan.checkpoint.get_file(name)
        check_digest(file, hash_file(file.source), pins)


def _refuse_without(*names: str) -> None:
    """Raise ModelError if one of these packages is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError("not installed", " and ".join(missing), "pip install 'swsurgery[check]'")
