"""Check one checkpoint against its record, its base, a manifest, known super weights and a signature.

`against_record.py` contains the proof from the record alone. This module adds the other checks and combines them.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import (
    held,
    open_checkpoint,
    open_for_reading,
    read_checkpoint,
    refuse_other_weights,
)
from swsurgery.checkpoint.record import RECORD_NAME, Patched, find_record, read_record
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import AmbiguousWeights, CheckpointError, SwsurgeryError, Unidentified
from swsurgery.hub import RemoteTree, open_location, parse_location
from swsurgery.progress import Progress, Reporter, require_reporter
from swsurgery.storage.arguments import (
    require_choice,
    require_location,
    require_number,
    require_path,
    require_type,
)
from swsurgery.storage.folder import Folder
from swsurgery.storage.ggml import BlockDtype
from swsurgery.storage.numeric import load_numpy
from swsurgery.verifying.against_record import RecordProof, check_structure, scan_values, verify_patched
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.manifest_check import check_manifest, resolve_own_manifest, resolve_wishes
from swsurgery.verifying.verification import Proof, Verification

if TYPE_CHECKING:  # each of these modules does one optional check and is imported only for this check
    from swsurgery.manifest.load import LoadedManifest, ManifestLike
    from swsurgery.verifying.against_known import Survival
    from swsurgery.verifying.against_protected import Guard
    from swsurgery.verifying.identification import Identification
    from swsurgery.verifying.value_findings import ValueReport
    from swsurgery.verifying.value_search import ValueSearch


@dataclass(frozen=True)
class _Question:
    """The options of `verify`: what to check a checkpoint against.

    `base` is a directory or hf://ORG/NAME[@REV]. `model` and `tolerance` apply only if `known` is set, and
    `protected_tolerance` only if `protected`, a manifest, is given. `public_key` (PEM) is required with `signature`.
    `transformers` applies only if `complete` is set. `strict` turns warnings and the answer "undecided" into "no".
    `weights` and `variant` choose the weights if the checkpoint has several sets and neither the record nor the
    manifest names a set.
    """

    base: str | Path | None = None
    manifest: ManifestLike | None = None
    known: bool = False
    model: str | None = None
    tolerance: float = 0.25
    finite: bool = False
    signature: Path | None = None
    public_key: Path | None = None
    weights: Weights | None = None
    variant: str | None = None
    protected: ManifestLike | None = None
    protected_tolerance: float = 0.0
    values: bool = False
    complete: bool = False
    transformers: bool = False
    strict: bool = False

    @property
    def reads_gguf(self) -> bool:
        """True if every requested check can read a GGUF file. The others compare files that swsurgery could edit."""
        with_base = self.base is None or self.protected is not None
        return self.manifest is None and self.signature is None and with_base

    @property
    def needs_no_record(self) -> bool:
        """True if any requested check also works for a checkpoint without a record."""
        manifests = (self.manifest, self.protected)
        return bool(
            self.known or manifests != (None, None) or self.finite or self.values or self.signature or self.complete
        )


def verify(
    checkpoint: str | Path,
    *,
    manifest: ManifestLike | None = None,
    base: str | Path | None = None,
    known: bool = False,
    model: str | None = None,
    tolerance: float = 0.25,
    finite: bool = False,
    values: bool = False,
    signature: str | Path | None = None,
    public_key: str | Path | None = None,
    weights: Weights | None = None,
    variant: str | None = None,
    protected: ManifestLike | None = None,
    protected_tolerance: float = 0.0,
    complete: bool = False,
    transformers: bool = False,
    strict: bool = False,
    reporter: Reporter | None = None,
) -> Verification:
    """Check a checkpoint against its record, and against a base, a manifest, known super weights and a signature.

    `checkpoint` is a directory, a GGUF file or `hf://ORG/NAME[@REV][/sub]`. From a repository, only headers, edited
    scalars and small files are read; for large files, the digests that the Hub lists are used. The record alone,
    without the base, proves that the checkpoint is its base with exactly the declared scalars changed. `base` is
    compared byte by byte. `manifest`, in any form that `apply` takes, must describe exactly this checkpoint. With
    `known`, no known super weight of the checkpoint's model, or of `model`, may have lost more than the fraction
    `tolerance` of its value. A model that neither `model` nor the files name is identified from its sizes and from its
    values.
    With `finite`, all values are searched for NaN and infinities. With `values`, also for constant and identical
    matrices, values outside float16's range and subnormal values, and the result has the figures of all tensors.
    `signature` is checked with `public_key` (PEM).
    The scalars that the manifest `protected` protects must have their expected values: those of its `expect`, of
    `base`, or of the known super weights, up to the relative difference `protected_tolerance`.
    With `complete`, the checkpoint must contain all layers, experts and other tensors that its config.json declares.
    With `transformers` too, the names and shapes must be those of the model of transformers, which loads torch.
    With `strict`, a warning makes the answer no, as an error does, and so do known super weights or completeness that
    could not be compared.
    `weights` and `variant` choose between several sets of weights if neither the record nor the manifest does.

    Raises TypeError; CheckpointError if there is nothing to check against, if a file cannot be read, or if `model` has
    other sizes than the checkpoint; HubError;
    ManifestError; LookupFailed for an unknown model; SwsurgeryError for a signature without a public key, for a
    `tolerance` that is not between 0 and 1, for a `protected_tolerance` that is negative or not finite, and for
    `transformers` without `complete`; Unrunnable if transformers cannot build the model.
    """
    reporter = require_reporter(reporter)
    require_type("known", known, bool)
    require_type("finite", finite, bool)
    require_type("values", values, bool)
    require_type("complete", complete, bool)
    require_type("transformers", transformers, bool)
    require_type("strict", strict, bool)
    if transformers and not complete:
        raise SwsurgeryError("--transformers applies to --complete, which was not given", remedy="add --complete")
    require_type("model", model, str, optional=True)
    require_choice("weights", weights, get_args(Weights), optional=True)
    require_type("variant", variant, str, optional=True)
    loss = require_number("tolerance", tolerance)
    if not 0 <= loss <= 1:  # with NaN or more than 1, no super weight would ever be lost
        raise SwsurgeryError("tolerance must be between 0 and 1", loss)
    difference = require_number("protected_tolerance", protected_tolerance)
    if not 0 <= difference < math.inf:
        raise SwsurgeryError("protected_tolerance must be a finite number from 0", difference)
    question = _Question(
        None if base is None else require_location("base", base),
        manifest,
        known or model is not None,
        model,
        loss,
        finite or values,
        None if signature is None else require_path("signature", signature),
        None if public_key is None else require_path("public_key", public_key),
        weights,
        variant,
        protected,
        difference,
        values,
        complete,
        transformers,
        strict,
    )
    with open_for_reading("checkpoint", checkpoint, reporter) as root, contextlib.ExitStack() as bases:
        return _prove(root, question, reporter, bases).report(str(checkpoint))


def _prove(root: Folder | RemoteTree, question: _Question, progress: Progress, bases: contextlib.ExitStack) -> Proof:
    """Check a checkpoint against its record and everything in `question`. `bases` keeps the base open and locked."""
    patched = _read_record(root, question)
    loaded = _load_manifest(question)
    question = _choose_weights(question, patched, loaded)
    base = _open_base(root, question, loaded, patched, bases)
    elsewhere = patched.record.elsewhere if patched else ()
    completeness = None
    try:
        if question.complete:
            from swsurgery.verifying.complete import open_and_check

            checkpoint, completeness = open_and_check(
                root, question.weights, question.variant, elsewhere, transformers=question.transformers
            )
        else:
            checkpoint = read_checkpoint(root, question, elsewhere=elsewhere, gguf=question.reads_gguf)
    except CheckpointError as error:
        if patched is None and (isinstance(error, AmbiguousWeights) or not _has_shards(root)):
            raise
        faults = tuple(Finding("structure", fault) for fault in error.faults)
        return Proof(faults, ("structure",), manifest=loaded, strict=question.strict)
    if completeness is not None and completeness.damaged:
        return Proof(
            completeness.findings,
            completeness.rules,
            manifest=loaded,
            complete=completeness,
            strict=question.strict,
        )
    repo_ids = _list_repo_ids(patched)
    wishes = resolve_wishes(loaded, checkpoint, repo_ids)
    verification = None
    search = _begin_search(checkpoint) if question.finite else None
    if patched is not None:
        verification = _verify_with_manifest(patched, checkpoint, progress, base, search)
        findings, rules = [*verification.findings], verification.rules
        if any(f.index is not None for f in findings):
            wanted = wishes or resolve_own_manifest(root, patched, checkpoint, repo_ids)
            findings = [wanted.attach_position(f) for f in findings] if wanted else findings
    else:
        findings, rules = _check_files(checkpoint, search, progress)
    if wishes is not None:
        right = None if any(f.rule == "base" for f in findings) else base
        findings += check_manifest(wishes, patched, checkpoint, right, progress)
        rules += ("manifest-mismatch", "undeclared-change", "file-missing", "file-undeclared", "base")
    figures = None
    if search is not None and question.values:
        figures, found = _examine_values(search, patched, progress)
        findings += found
        rules += ("constant-weights", "identical-weights", "dtype-overflow", "subnormal-weights")
    identified = kept = None
    unidentified = ""
    if question.known:
        try:
            identified, kept = _survey_known(question, checkpoint, patched, repo_ids)
            findings += kept.list_findings()
        except Unidentified as error:
            unidentified = "; ".join(f"{fault.what} ({fault.remedy})" for fault in error.faults)
        rules += ("known-lost", "known-unreadable", "known-suspicious") if kept else ()
    guard = None
    if question.protected is not None:
        guard = _check_protected(question, question.protected, checkpoint, base, repo_ids)
        findings += guard.list_findings()
        rules += ("protected-lost", "protected-unreadable")
    if completeness is not None:
        findings = [*completeness.merge(findings)]
        rules += completeness.rules
    if question.signature is not None and question.public_key is not None:
        findings += _check_signature(root, question.signature, question.public_key)
        rules += ("signature",)
    proof = Proof(
        tuple(findings),
        rules,
        verification,
        kept,
        loaded,
        base.root if base else None,
        question.finite,
        question.signature,
        checkpoint.notes,
        guard,
        figures,
        identified,
        completeness,
        question.strict,
        unidentified,
    )
    return proof.refuse_undecided() if question.strict else proof


def _verify_with_manifest(
    patched: Patched, checkpoint: Checkpoint, progress: Progress, base: Checkpoint | None, search: ValueSearch | None
) -> RecordProof:
    """Verify an open checkpoint against its record, and the record against the manifest in the checkpoint."""
    from swsurgery.verifying.against_manifest import find_own_differences

    differences = find_own_differences(patched, checkpoint)
    return verify_patched(patched, checkpoint, progress, base, search, differences)


def _read_record(root: Folder | RemoteTree, question: _Question) -> Patched | None:
    """Read the record. Returns None if there is none and a requested check works without it.

    Raises SwsurgeryError for a signature without a public key. Raises CheckpointError if the record is damaged, or if
    it is missing and every requested check needs it.
    """
    if (question.signature is None) != (question.public_key is None):
        raise SwsurgeryError("--signature and --public-key must be given together")
    return find_record(root) if question.needs_no_record else read_record(root)


def _choose_weights(question: _Question, patched: Patched | None, loaded: LoadedManifest | None) -> _Question:
    """Return `question` with `weights` and `variant` from the record or, without a record, from the manifest.

    Raises CheckpointError if the user chose other weights.
    """
    said = patched.record.base if patched else loaded.manifest.base if loaded else None
    if said is None:
        return question
    who = RECORD_NAME if patched or loaded is None else str(loaded.path)
    refuse_other_weights(question.weights, said.weights, who, question.variant, said.variant)
    return replace(question, weights=said.weights or question.weights, variant=said.variant or question.variant)


def _has_shards(root: Folder | RemoteTree) -> bool:
    """Return True if `root` is a local directory that contains safetensors files."""
    return not isinstance(root, RemoteTree) and any(root.path.glob("*.safetensors"))


def _check_files(
    checkpoint: Checkpoint, search: ValueSearch | None, progress: Progress
) -> tuple[list[Finding], tuple[str, ...]]:
    """Check a checkpoint that has no record. Returns the findings and the rules that were checked."""
    findings, rules = check_structure(checkpoint), ("structure", "duplicate-weights")
    if search is None:
        return findings, rules
    findings += scan_values(search, progress)
    if any(isinstance(info.dtype, BlockDtype) for info in checkpoint.infos.values()):
        from swsurgery.verifying.block_values import list_blocks_not_finite

        findings += list_blocks_not_finite(checkpoint, progress)
    return findings, (*rules, "non-finite")


def _begin_search(checkpoint: Checkpoint) -> ValueSearch:
    """Return the search of all values of a checkpoint, which has read nothing yet."""
    load_numpy()
    from swsurgery.verifying.value_search import ValueSearch

    return ValueSearch(checkpoint)


def _examine_values(
    search: ValueSearch, patched: Patched | None, progress: Progress
) -> tuple[ValueReport, list[Finding]]:
    """Return the figures of all tensors, and what is wrong with their values besides NaN and infinities."""
    from swsurgery.verifying.value_findings import list_findings, make_report

    edited = frozenset(change.tensor for change in patched.record.changes) if patched else frozenset()
    return make_report(search), list_findings(search, edited, progress)


def _check_signature(root: Folder | RemoteTree, signature: Path, public_key: Path) -> list[Finding]:
    """Check the signature of a local checkpoint. Raises SwsurgeryError for a checkpoint on the Hub."""
    from swsurgery.verifying.signature import verify_signature

    if isinstance(root, RemoteTree):
        raise SwsurgeryError("a signature can only be checked on a local copy", root, "download it with hf download")
    return verify_signature(root, signature, public_key)


def _load_manifest(question: _Question) -> LoadedManifest | None:
    if question.manifest is None:
        return None
    from swsurgery.manifest.load import load_manifest

    return load_manifest(question.manifest, question.base)


def _survey_known(
    question: _Question, checkpoint: Checkpoint, patched: Patched | None, repo_ids: tuple[str | None, ...]
) -> tuple[Identification, Survival]:
    """Identify the model and read its known super weights. Raises Unidentified."""
    from swsurgery.verifying import against_known
    from swsurgery.verifying.identification import identify_checkpoint

    declared = {e.coordinate for e in patched.record.edits} if patched else set()
    declared |= {code.coordinate for code in patched.record.codes} if patched else set()
    names = (*repo_ids, checkpoint.repo_id, checkpoint.config.get("_name_or_path"))
    identified = identify_checkpoint(checkpoint, question.model, names, declared)
    survival = against_known.survey(checkpoint, identified.model, declared, question.tolerance)
    survival = against_known.find_moved(checkpoint, identified.model, survival)
    return identified, survival


def _check_protected(
    question: _Question,
    manifest: ManifestLike,
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    repo_ids: tuple[str | None, ...],
) -> Guard:
    from swsurgery.manifest.load import load_manifest
    from swsurgery.verifying.against_protected import check_protected

    loaded = load_manifest(manifest, question.base)
    return check_protected(loaded, checkpoint, base, question.protected_tolerance, repo_ids)


def _open_base(
    root: Folder | RemoteTree,
    question: _Question,
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
        return open_checkpoint(base, question.weights, question.variant)
    if loaded is None:
        return None
    from swsurgery.editing.base import find_base

    try:
        where = open_location(find_base(loaded, None))
        if patched and _is_same(where, root):
            return None
        return open_checkpoint(bases.enter_context(held(where)), question.weights, question.variant)
    except CheckpointError:
        if patched is None:
            raise
        return None


def _is_same(first: Path | RemoteTree, second: Folder | RemoteTree) -> bool:
    """Return True if both are the same local directory."""
    if isinstance(first, RemoteTree) or isinstance(second, RemoteTree):
        return False
    return Path(os.path.realpath(first)) == second.path


def _list_repo_ids(patched: Patched | None) -> tuple[str | None, ...]:
    """Return the repository ids in a record: that of the base, and that of the known model that the record quotes."""
    if patched is None:
        return ()
    facts = patched.record.known or {}
    return patched.record.base.repo_id, facts.get("hf_id")
