"""Decide whether a patched checkpoint may be published: findings of verify, the sanity check, and secrets.

This module reads files and sends nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from swsurgery.checkpoint.listing import LEFT_OUT
from swsurgery.checkpoint.opening import held
from swsurgery.checkpoint.record import RECORD_NAME, Record, read_record
from swsurgery.errors import CheckFailed, SwsurgeryError
from swsurgery.hub import commit as hub
from swsurgery.progress import Reporter
from swsurgery.sharing.plan_checkpoint import SMALL_FILE
from swsurgery.sharing.publication import Publication
from swsurgery.verifying.findings import RULES, Finding
from swsurgery.verifying.verify import verify

TOKEN_BYTES = re.compile(rb"hf_(?:jwt_|oauth_)?[A-Za-z0-9]{20,}")
"""Matches text in the bytes of a file that has the form of an access token of the Hub.

Shorter strings that begin with hf_ are not matched, because they are identifiers in program code.
"""


def find_early(root: Path) -> list[Finding]:
    """Find a failed or missing sanity check, and tokens in small files. Reads no weights.

    Raises CheckpointError if the directory has no record.
    """
    with held(root) as entered:
        findings = _check_sanity(read_record(entered).record)
        names = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
        small = (name for name in names if name.parts[0] not in LEFT_OUT and (root / name).stat().st_size <= SMALL_FILE)
        return findings + find_secrets((name.as_posix(), (root / name).read_bytes()) for name in small)


def _check_sanity(record: Record) -> list[Finding]:
    """Report a sanity check that failed, or that never ran the edited model."""
    check = record.check
    if check.get("kind") == "forward":
        failures = check.get("failures")
        if check.get("ok") is True and not failures:
            return []
        said = "; ".join(map(str, failures)) if isinstance(failures, list) and failures else "the check failed"
        return [Finding("check-failed", said, RECORD_NAME)]
    if not record.edits and not record.changes:
        return []
    reason = check.get("reason")
    why = f" ({reason})" if isinstance(reason, str) else ""
    return [Finding("check-missing", f"the edited model was never run{why}", RECORD_NAME)]


def find_secrets(files: Iterable[tuple[str, bytes]]) -> list[Finding]:
    """Find tokens in files, given as (name, content). The findings do not contain the token."""
    return [
        Finding("secret", "the text contains what looks like a token of the Hub", name)
        for name, data in files
        if TOKEN_BYTES.search(data) or hub.has_token(data)
    ]


def check_gate(root: Path, accept: Collection[str], early: Sequence[Finding], reporter: Reporter) -> list[Finding]:
    """Verify the directory before it is published.

    Returns the accepted findings. A finding is accepted if its rule is in `accept`. Further copies of the weights are
    ignored, because they are not published. Raises CheckFailed, which lists the findings that are not accepted,
    SwsurgeryError for a rule that does not exist, and CheckpointError.
    """
    if unknown := sorted(set(accept) - set(RULES)):
        raise SwsurgeryError(
            "no rule has this name", ", ".join(unknown), "give the name of a rule, as publish and verify print it"
        )
    findings = [*early, *verify(root, reporter=reporter).findings]
    findings = [f for f in findings if f.rule != "duplicate-weights"]
    if any(f.rule not in accept for f in findings):
        raise make_refusal([f for f in findings if f.rule not in accept])
    return findings


def make_refusal(findings: Iterable[Finding]) -> SwsurgeryError:
    """Make the error that refuses to publish and lists the findings (exit code 1)."""
    faults = [f"not published: {f.rule}: {f.file or f.tensor or '-'}: {f.message}" for f in findings]
    return CheckFailed.of(
        [
            *faults,
            "to publish despite a finding, give --accept with the name of its rule; the card then lists the finding",
        ]
    )


def refuse_secrets(plan: Publication) -> None:
    """Raise CheckFailed if the message or a generated file, such as the card, contains a token.

    `check_gate` could not search these texts, because the plan that contains them was made later.
    """
    made = [(item.name, item.content) for item in plan.items if isinstance(item.content, bytes)]
    found = find_secrets([("the commit's message", plan.message.encode()), *made])
    if found and not any(f.rule == "secret" for f in plan.accepted):
        raise make_refusal(found)
