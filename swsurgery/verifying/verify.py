"""Check one checkpoint against its record, its base, a manifest, known super weights and a signature.

    Question           the options                                           question.py
    read_references    the record, the manifest and the base                 references.py
    open_subject       the checkpoint itself                                 references.py
    run_checks         the findings of all requested checks                  checks.py
    Proof.report       the result that the output formats render             verification.py

This module imports nothing that only one optional check needs.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from swsurgery.checkpoint.opening import open_for_reading
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import AmbiguousWeights, CheckpointError, Fault
from swsurgery.progress import Progress, Reporter, require_reporter
from swsurgery.storage.arguments import require_location, require_number, require_path
from swsurgery.storage.folder import Folder
from swsurgery.verifying.checks import run_checks
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.question import Question
from swsurgery.verifying.references import References, open_subject, read_references
from swsurgery.verifying.verification import Proof, Verification

if TYPE_CHECKING:  # at run time it is imported only to read a manifest
    from swsurgery.manifest.load import ManifestLike


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
    other sizes than the checkpoint; HubError; ManifestError; LookupFailed for an unknown model; SwsurgeryError for a
    signature without a public key, for a `tolerance` that is not between 0 and 1, for a `protected_tolerance` that is
    negative or not finite, and for `transformers` without `complete`; Unrunnable if transformers cannot build the
    model.
    """
    reporter = require_reporter(reporter)
    question = Question(
        base=None if base is None else require_location("base", base),
        manifest=manifest,
        known=known,
        model=model,
        tolerance=require_number("tolerance", tolerance),
        finite=finite,
        values=values,
        signature=None if signature is None else require_path("signature", signature),
        public_key=None if public_key is None else require_path("public_key", public_key),
        weights=weights,
        variant=variant,
        protected=protected,
        protected_tolerance=require_number("protected_tolerance", protected_tolerance),
        complete=complete,
        transformers=transformers,
        strict=strict,
    )
    with open_for_reading("checkpoint", checkpoint, reporter) as root, contextlib.ExitStack() as bases:
        return _prove(read_references(root, question, bases), reporter).report(str(checkpoint))


def _locate_damage(fault: Fault, references: References) -> Finding:
    """Make a finding of an error about the files. If the error names a file of the checkpoint, the finding does too."""
    root = references.root
    if not isinstance(root, Folder):
        return Finding("structure", fault)
    line = Fault.parse(fault)
    what, _, name = str(Fault(line.what, line.where)).rpartition(f": {root.path}/")
    return Finding("structure", Fault(what, remedy=line.remedy), name) if what else Finding("structure", fault)


def _prove(references: References, progress: Progress) -> Proof:
    """Open the checkpoint and check it. Files that are missing or damaged are findings, and end the checks."""
    patched, manifest, strict = references.patched, references.loaded, references.question.strict
    try:
        checkpoint, completeness = open_subject(references, progress)
    except CheckpointError as error:
        if patched is None and (isinstance(error, AmbiguousWeights) or not references.has_shards):
            raise
        faults = tuple(_locate_damage(fault, references) for fault in error.faults)
        return Proof(faults, ("structure",), manifest=manifest, strict=strict)
    if completeness is not None and completeness.damaged:
        found = completeness.findings
        return Proof(found, completeness.rules, manifest=manifest, complete=completeness, strict=strict)
    return run_checks(references, checkpoint, completeness, progress)
