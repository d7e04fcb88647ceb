"""Run the checks that the user asked for on an open checkpoint.

Each check takes the proof so far, and returns it with its findings, its rules and its result.
`against_record.py` contains the proof from the record alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Patched, Record
from swsurgery.errors import SwsurgeryError, Unidentified
from swsurgery.hub import RemoteTree
from swsurgery.progress import Progress
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.folder import SingleFile
from swsurgery.storage.ggml import BlockDtype
from swsurgery.storage.numeric import load_numpy
from swsurgery.verifying.against_record import check_structure, scan_values, verify_patched
from swsurgery.verifying.manifest_check import check_manifest, resolve_own_manifest, resolve_wishes
from swsurgery.verifying.references import References
from swsurgery.verifying.verification import Proof

if TYPE_CHECKING:  # each of these modules does one optional check and is imported only for this check
    from swsurgery.verifying.against_manifest import Wishes
    from swsurgery.verifying.complete import Completeness
    from swsurgery.verifying.value_search import ValueSearch


def run_checks(
    references: References, checkpoint: Checkpoint, completeness: Completeness | None, progress: Progress
) -> Proof:
    """Check an open checkpoint against all references. Returns the findings of all checks in order."""
    question = references.question
    wishes = resolve_wishes(references.loaded, checkpoint, references.repo_ids)
    search = _begin_search(checkpoint) if question.reads_values else None
    proof = Proof(
        (),
        (),
        manifest=references.loaded,
        base=references.base.root if references.base else None,
        finite=question.reads_values,
        signature=question.signature,
        notes=checkpoint.notes,
        complete=completeness,
        strict=question.strict,
    )
    if references.patched is None:
        proof = _check_files(proof, checkpoint, search, progress)
    else:
        proof = _check_record(proof, references, references.patched, checkpoint, wishes, search, progress)
    if search is not None:
        proof = _search_blocks(proof, checkpoint, progress)
    if wishes is not None:
        proof = _check_wishes(proof, wishes, references, checkpoint, progress)
    if search is not None and question.values:
        proof = _examine_values(proof, search, references.patched, progress)
    if question.checks_known:
        proof = _survey_known(proof, references, checkpoint)
    if question.protected is not None:
        proof = _check_protected(proof, references, checkpoint)
    if completeness is not None:
        rules = (*proof.rules, *completeness.rules)
        proof = replace(proof, findings=completeness.merge(proof.findings), rules=rules)
    if question.signature is not None:
        proof = _check_signature(proof, references, progress)
    return proof.refuse_undecided() if question.strict else proof


def _check_record(
    proof: Proof,
    references: References,
    patched: Patched,
    checkpoint: Checkpoint,
    wishes: Wishes | None,
    search: ValueSearch | None,
    progress: Progress,
) -> Proof:
    """Verify a checkpoint against its record, and the record against the manifest in the checkpoint.

    Findings about scalars get their positions in the manifest that the user gave, or else in the checkpoint's own.
    """
    from swsurgery.verifying.against_manifest import find_own_differences

    differences = find_own_differences(patched, checkpoint)
    verification = verify_patched(patched, checkpoint, progress, references.base, search, differences)
    findings = verification.findings
    if any(finding.index is not None for finding in findings):
        wanted = wishes or resolve_own_manifest(references.root, patched, checkpoint, references.repo_ids)
        findings = tuple(map(wanted.attach_position, findings)) if wanted else findings
    return replace(proof.add(findings, verification.rules), verification=verification)


def _check_files(proof: Proof, checkpoint: Checkpoint, search: ValueSearch | None, progress: Progress) -> Proof:
    """Check a checkpoint that has no record."""
    proof = proof.add(check_structure(checkpoint), ("structure", "duplicate-weights"))
    if search is None:
        return proof
    return proof.add(scan_values(search, progress), ("non-finite",))


def _search_blocks(proof: Proof, checkpoint: Checkpoint, progress: Progress) -> Proof:
    """Search the matrices of a GGUF file that are stored in blocks for NaN and infinities."""
    if not any(isinstance(info.dtype, BlockDtype) for info in checkpoint.infos.values()):
        return proof
    from swsurgery.verifying.block_values import list_blocks_not_finite

    return proof.add(list_blocks_not_finite(checkpoint, progress), ())


def _check_wishes(
    proof: Proof, wishes: Wishes, references: References, checkpoint: Checkpoint, progress: Progress
) -> Proof:
    """Check that the manifest that the user gave describes exactly this checkpoint. A wrong base is not used."""
    base = None if any(finding.rule == "base" for finding in proof.findings) else references.base
    findings = check_manifest(wishes, references.patched, checkpoint, base, progress)
    return proof.add(findings, ("manifest-mismatch", "undeclared-change", "file-missing", "file-undeclared", "base"))


def _begin_search(checkpoint: Checkpoint) -> ValueSearch:
    """Return the search of all values of a checkpoint, which has read nothing yet."""
    load_numpy()
    from swsurgery.verifying.value_search import ValueSearch

    return ValueSearch(checkpoint)


def _examine_values(proof: Proof, search: ValueSearch, patched: Patched | None, progress: Progress) -> Proof:
    """Add the figures of all tensors, and what is wrong with their values besides NaN and infinities."""
    from swsurgery.verifying.value_findings import list_findings, make_report

    edited = frozenset(change.tensor for change in patched.record.changes) if patched else frozenset()
    figures = make_report(search)
    findings = list_findings(search, edited, progress)
    rules = ("constant-weights", "identical-weights", "dtype-overflow", "subnormal-weights")
    return replace(proof.add(findings, rules), values=figures)


def _survey_known(proof: Proof, references: References, checkpoint: Checkpoint) -> Proof:
    """Identify the model and read its known super weights. If no model can be identified, add the reason."""
    from swsurgery.verifying import against_known
    from swsurgery.verifying.identification import identify_checkpoint

    question, patched = references.question, references.patched
    declared = _list_declared(patched.record) if patched else set()
    names = (*references.repo_ids, checkpoint.repo_id, checkpoint.config.get("_name_or_path"))
    try:
        identified = identify_checkpoint(checkpoint, question.model, names, declared)
    except Unidentified as error:
        return replace(proof, unidentified="; ".join(f"{fault.what} ({fault.remedy})" for fault in error.faults))
    survival = against_known.survey(checkpoint, identified.model, declared, question.tolerance)
    survival = against_known.find_moved(checkpoint, identified.model, survival)
    rules = ("known-lost", "known-unreadable", "known-suspicious")
    return replace(proof.add(survival.list_findings(), rules), survival=survival, identified=identified)


def _list_declared(record: Record) -> set[Coordinate]:
    """Return the coordinates of the weights that the edits of a record name.

    Stored numbers that only contain their codes are left out: in a GGUF file, their index counts bytes.
    """
    elements = {element.coordinate for code in record.codes for element in code.elements}
    declared = {edit.coordinate for edit in record.edits} - elements
    return declared | {code.coordinate for code in record.codes}


def _check_protected(proof: Proof, references: References, checkpoint: Checkpoint) -> Proof:
    """Check that the scalars that the manifest `protected` protects have their expected values."""
    from swsurgery.manifest.load import load_manifest
    from swsurgery.verifying.against_protected import check_protected

    question = references.question
    assert question.protected is not None
    loaded = load_manifest(question.protected, question.base)
    guard = check_protected(loaded, checkpoint, references.base, question.protected_tolerance, references.repo_ids)
    return replace(proof.add(guard.list_findings(), ("protected-lost", "protected-unreadable")), guard=guard)


def _check_signature(proof: Proof, references: References, progress: Progress) -> Proof:
    """Check the signature of a local checkpoint. Raises SwsurgeryError for a checkpoint on the Hub."""
    from swsurgery.verifying.signature import verify_signature

    root, question = references.root, references.question
    assert question.signature is not None and question.public_key is not None
    if isinstance(root, RemoteTree):
        raise SwsurgeryError("a signature can only be checked on a local copy", root, "download it with hf download")
    if isinstance(root, SingleFile):
        raise SwsurgeryError("a signature covers all files of a directory", root, f"give {root.path}")
    return proof.add(verify_signature(root, question.signature, question.public_key, progress), ("signature",))
