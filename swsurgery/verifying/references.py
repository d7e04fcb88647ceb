"""Open what `verify` reads: the checkpoint, its record, the manifest and the base."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import held, open_checkpoint, read_checkpoint, refuse_other_weights
from swsurgery.checkpoint.record import RECORD_NAME, Patched, find_record, read_record
from swsurgery.errors import CheckpointError, SwsurgeryError
from swsurgery.hub import RemoteTree, open_location, parse_location
from swsurgery.progress import Progress
from swsurgery.storage.folder import Folder
from swsurgery.verifying.question import Question

if TYPE_CHECKING:  # each of these modules does one optional check and is imported only for this check
    from swsurgery.manifest.load import LoadedManifest
    from swsurgery.verifying.complete import Completeness


@dataclass(frozen=True)
class References:
    """What a checkpoint is compared with. Each field is None if there is none or it was not requested.

    `root` is the checkpoint itself, not yet opened. `question` has the weights that the record or the manifest names.
    `patched` is the record, `loaded` the manifest that the user gave, and `base` the open base.
    """

    root: Folder | RemoteTree
    question: Question
    patched: Patched | None
    loaded: LoadedManifest | None
    base: Checkpoint | None

    @property
    def repo_ids(self) -> tuple[str | None, ...]:
        """The repository ids in the record: that of the base, and that of the known model that the record quotes."""
        if self.patched is None:
            return ()
        facts = self.patched.record.known or {}
        return self.patched.record.base.repo_id, facts.get("hf_id")

    @property
    def has_shards(self) -> bool:
        """True if the checkpoint is a local directory that contains safetensors files."""
        return not isinstance(self.root, RemoteTree) and any(self.root.path.glob("*.safetensors"))


def read_references(root: Folder | RemoteTree, question: Question, bases: contextlib.ExitStack) -> References:
    """Read the record and the manifest, and open the base. `bases` keeps the base open and locked.

    Raises SwsurgeryError for a signature without a public key. Raises CheckpointError if there is nothing to check
    against, if the user chose other weights than the record, or if the base cannot be opened. Raises ManifestError.
    """
    patched = _read_record(root, question)
    loaded = _load_manifest(question)
    question = _choose_weights(question, patched, loaded)
    return References(root, question, patched, loaded, _open_base(root, question, loaded, patched, bases))


def open_subject(references: References, progress: Progress) -> tuple[Checkpoint, Completeness | None]:
    """Open the checkpoint itself. With `complete`, compare it with its config.json too. Raises CheckpointError."""
    question = references.question
    elsewhere = references.patched.record.elsewhere if references.patched else ()
    if not question.complete:
        return read_checkpoint(references.root, question, elsewhere=elsewhere, gguf=True), None
    from swsurgery.verifying.complete import open_and_check

    return open_and_check(
        references.root,
        question.weights,
        question.variant,
        elsewhere,
        transformers=question.transformers,
        progress=progress,
    )


def _read_record(root: Folder | RemoteTree, question: Question) -> Patched | None:
    """Read the record. Returns None if there is none and a requested check works without it.

    Raises SwsurgeryError for a signature without a public key. Raises CheckpointError if the record is damaged, or if
    it is missing and every requested check needs it.
    """
    if (question.signature is None) != (question.public_key is None):
        raise SwsurgeryError("--signature and --public-key must be given together")
    return find_record(root) if question.needs_no_record else read_record(root)


def _load_manifest(question: Question) -> LoadedManifest | None:
    if question.manifest is None:
        return None
    from swsurgery.manifest.load import load_manifest

    return load_manifest(question.manifest, question.base)


def _choose_weights(question: Question, patched: Patched | None, loaded: LoadedManifest | None) -> Question:
    """Return `question` with `weights` and `variant` from the record or, without a record, from the manifest.

    Raises CheckpointError if the user chose other weights.
    """
    said = patched.record.base if patched else loaded.manifest.base if loaded else None
    if said is None:
        return question
    who = RECORD_NAME if patched or loaded is None else str(loaded.path)
    refuse_other_weights(question.weights, said.weights, who, question.variant, said.variant)
    return replace(question, weights=said.weights or question.weights, variant=said.variant or question.variant)


def _open_base(
    root: Folder | RemoteTree,
    question: Question,
    loaded: LoadedManifest | None,
    patched: Patched | None,
    bases: contextlib.ExitStack,
) -> Checkpoint | None:
    """Open the base that `question` names, or else the manifest's base. `bases` keeps the base open and locked.

    Returns None if no base is named. If the checkpoint has a record, also returns None if the manifest's base is not
    available, or is the checkpoint itself because it was edited in place. Raises CheckpointError if there is no record
    and the manifest's base cannot be opened, because nothing can then be proved.
    """
    if question.base is not None:
        base = bases.enter_context(held(open_location(parse_location(question.base))))
        return open_checkpoint(base, question.weights, question.variant, gguf=True)
    if loaded is None:
        return None
    from swsurgery.editing.base import find_base

    try:
        where = open_location(find_base(loaded, None))
        if patched and _is_same(where, root):
            return None
        return open_checkpoint(bases.enter_context(held(where)), question.weights, question.variant, gguf=True)
    except CheckpointError:
        if patched is None:
            raise
        return None


def _is_same(first: Path | RemoteTree, second: Folder | RemoteTree) -> bool:
    """Return True if both are the same local directory."""
    if isinstance(first, RemoteTree) or isinstance(second, RemoteTree):
        return False
    return Path(os.path.realpath(first)) == second.path
