"""A model, or its tensors, with the edits of a manifest made in memory: nothing patched is written anywhere.

Plans and refuses as `apply` does. Reading the weights is left to `model/patched.py`, which knows torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swsurgery.checkpoint.opening import held, open_as
from swsurgery.editing.base import base_of, known_digests
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.errors import ModelError
from swsurgery.hub import local
from swsurgery.manifest.load import LoadedManifest, load_manifest, parse_manifest
from swsurgery.storage.hashing import hashed, hold_to

if TYPE_CHECKING:
    from swsurgery.model.patched import PreTrainedModel, Tensor

Given = Path | str | bytes | dict[str, Any] | LoadedManifest
"""A manifest: a path to one or to a patch, its text as bytes, its content as a dict, or one that was loaded."""


def load_patched(base: str | Path | None, manifest: Given, **options: Any) -> PreTrainedModel:
    """The model that transformers would load from the patched checkpoint, in evaluation mode.

    `base` is a directory or "hf://ORG/NAME[@REV]", and None the manifest's own. `options` go to transformers'
    from_pretrained: dtype, device_map, attn_implementation and so on. A value is rounded to the dtype that the model is
    loaded in as a stored one is. Each edited and protected scalar is looked at before and after.

    Raises HubError, ManifestError, CheckpointError, PlanError (a digest or an expected value is another), ModelError.
    """
    _refuse_without("torch", "transformers")
    from swsurgery.model import patched

    with _planned(base, manifest) as plan:
        return patched.load(plan.checkpoint, plan.splices, plan.protected, options)


def patched_state_dict(base: str | Path | None, manifest: Given) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every stored tensor, as the patched checkpoint would hold it: in its own dtype and shape, on
    the CPU, in the order of the shards. One tensor is in memory at a time. `base` and `manifest` as for `load_patched`.

    What is wrong with the request is raised at once: HubError, ManifestError, CheckpointError, PlanError, ModelError.
    While it is iterated, CheckpointError where a shard is changed meanwhile.
    """
    _refuse_without("torch")
    from swsurgery.model import patched

    with contextlib.ExitStack() as stack:
        plan = stack.enter_context(_planned(base, manifest))
        patched.refuse_unreadable(plan.checkpoint)
        held = stack.pop_all()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with held:
            yield from patched.tensors(plan.checkpoint, plan.splices)

    return tensors()


@contextlib.contextmanager
def _planned(base: str | Path | None, manifest: Given) -> Iterator[Plan]:
    """The plan, while its base is held against an edit in place."""
    loaded = _loaded(manifest)
    root = local(base_of(loaded, str(base) if base is not None else None))
    with held(root):
        plan = make_plan(loaded, open_as(root, loaded.manifest.base))
        _hold_to_digests(plan)
        yield plan


def _loaded(manifest: Given) -> LoadedManifest:
    if isinstance(manifest, LoadedManifest):
        return manifest
    if isinstance(manifest, dict):
        manifest = json.dumps(manifest).encode()
    if isinstance(manifest, bytes):
        return parse_manifest(manifest, Path("manifest"))  # so that its base.path is relative to where we are
    return load_manifest(Path(manifest))


def _hold_to_digests(plan: Plan) -> None:
    """Hold the touched shards, and what else the manifest pins, to their digests. Raises PlanError."""
    pins = known_digests(plan)
    touched = {s.file for s in plan.splices} | set(plan.loaded.manifest.base.sha256)
    for name in sorted(touched & set(pins)):
        file = plan.checkpoint.file(name)
        hold_to(file, hashed(file), pins)


def _refuse_without(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError("not installed", " and ".join(missing), "pip install 'swsurgery[check]'")
