"""Answer from headers and the index alone whether a checkpoint is complete, before a long download or job.

The library function `preflight` is the same check as `verify` with `complete`, without all checks that read weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from swsurgery.checkpoint.opening import open_for_reading, survey_checkpoint
from swsurgery.checkpoint.record import find_record
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import escape_control
from swsurgery.hub.remote import RemoteTree
from swsurgery.progress import Reporter, require_reporter
from swsurgery.storage.arguments import require_choice, require_type
from swsurgery.storage.folder import Folder
from swsurgery.verifying.against_record import check_structure
from swsurgery.verifying.complete import Completeness, check_complete
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.verification import Verification


def preflight(
    checkpoint: str | Path,
    *,
    weights: Weights | None = None,
    variant: str | None = None,
    reporter: Reporter | None = None,
) -> Verification:
    """Check whether a checkpoint contains all that its config.json declares, from headers and the index alone.

    `checkpoint` is a directory or `hf://ORG/NAME[@REV][/sub]`. `weights` and `variant` choose between several sets of
    weights. The answer is in `headline`, such as "complete: 30 layers, 272 tensors in 5 shards, 269.0 MB". `exit_code`
    is 2 if config.json does not state the number of layers.

    Raises TypeError, CheckpointError if there are no weights or several sets of them, and HubError.
    """
    require_choice("weights", weights, get_args(Weights), optional=True)
    require_type("variant", variant, str, optional=True)
    with open_for_reading("checkpoint", checkpoint, require_reporter(reporter)) as root:
        completeness, findings = _check(root, weights, variant)
    return Verification(
        str(checkpoint),
        "preflight",
        findings,
        "\n".join(f"not examined: {escape_control(what)}" for what in completeness.unexamined),
        {"complete": completeness.to_json()},
        completeness.rules,
        completeness.decided,
        headline=escape_control(completeness.summarise(findings)),
        complete=completeness,
        reason=escape_control(completeness.undecided or ""),
    )


def _check(
    root: Folder | RemoteTree, weights: Weights | None, variant: str | None
) -> tuple[Completeness, tuple[Finding, ...]]:
    """Check an open checkpoint. Returns the result, and its findings with those about the index."""
    patched = find_record(root)
    if patched is not None and weights is None and variant is None:
        weights, variant = patched.record.base.weights, patched.record.base.variant
    survey = survey_checkpoint(root, weights, variant, patched.record.elsewhere if patched else ())
    completeness = check_complete(survey)
    return completeness, completeness.merge([f for f in check_structure(survey.checkpoint) if f.rule == "structure"])
