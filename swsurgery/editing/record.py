"""Build the record of a patched checkpoint (swsurgery.json) from a plan and the digests of the files.

`checkpoint/record.py` reads a record.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from swsurgery._version import __version__
from swsurgery.checkpoint.record import LATER_OPERATIONS, HistoryStep, Record
from swsurgery.checkpoint.record_entries import (
    BaseRecord,
    ChangeRecord,
    CodeRecord,
    EditRecord,
    FileRecord,
    RegionRecord,
    ScalarRecord,
)
from swsurgery.errors import PlanError, TargetError
from swsurgery.storage.ggml import BlockDtype
from swsurgery.storage.strict_json import MAX_JSON, RECORD, Limits

if TYPE_CHECKING:  # for annotations only
    from swsurgery.editing.copy_job import Copied
    from swsurgery.editing.plan import Plan
    from swsurgery.known import KnownModel
    from swsurgery.storage.splice import Scalar


LATER = Limits(1 << 20, 10_000)
"""Bytes and commas reserved in a record for the report of the check, which a draft does not contain, and a margin."""

PER_FILE = 300
"""Bytes reserved in a record for each file, in addition to its name: its size and two digests, indented."""


NO_DIGEST = "0" * 64
"""A digest in a draft, before the files are copied."""

NOT_MEASURED = {"changed": (1 << 63) - 1, "base_sha256": NO_DIGEST, "sha256": NO_DIGEST, "undo": "edit.000000.000000"}
"""What a draft says about a changed region before the files are copied. It is as long as the final text may be."""


def draft_record(plan: Plan) -> Record:
    """Build the record of a plan that is not applied yet, without digests and without the report of the check.

    Raises PlanError if the finished record or the manifest would be larger than any command accepts, and TargetError if
    SOURCE_DATE_EPOCH is not a number.
    """
    base, checkpoint = plan.loaded.manifest.base, plan.checkpoint
    named_by: Literal["cache", "manifest"] | None = None
    if checkpoint.repo_id or base.repo_id:
        named_by = "cache" if checkpoint.repo_id else "manifest"
    history = plan.previous.extend_history() if plan.previous else []
    draft = Record(
        registry_version=_choose_version(plan, history),
        swsurgery_version=__version__,
        created=read_source_date_epoch(),
        base=BaseRecord(
            repo_id=checkpoint.repo_id or base.repo_id,
            revision=checkpoint.revision or base.revision,
            named_by=named_by,
            sub=checkpoint.sub,
            weights=base.weights,
            variant=base.variant,
        ),
        files={},
        omitted=list(plan.omitted),
        edits=[EditRecord.model_validate(_describe(s, plan)) for s in plan.splices],
        protected=[ScalarRecord.model_validate(_describe(s, plan)) for s in plan.protected],
        known=_describe_known(plan.model) if plan.model else None,
        check={},
        manifest_sha256=hashlib.sha256(plan.loaded.raw).hexdigest(),
        history=history,
        changes=[ChangeRecord.model_validate(r.to_json() | NOT_MEASURED) for r in plan.rewrites],
        protected_regions=[
            RegionRecord.model_validate(p.to_json() | {"sha256": NO_DIGEST}) for p in plan.protected_regions
        ],
        codes=[CodeRecord.model_validate(edit.to_json()) for edit in plan.codes],
    )
    _refuse_unreadable(draft, plan)
    return draft


def _describe_known(model: KnownModel) -> dict[str, Any]:
    """Return the entry of a known model as JSON."""
    from swsurgery.known import shipped  # a base that is no known model needs none of this

    entry: dict[str, Any] = shipped.build_json(model)["models"][0]
    return entry


def _choose_version(plan: Plan, history: Sequence[HistoryStep]) -> Literal[1, 2]:
    """Return the version of the record's format: 1 if it suffices for this step and the earlier ones."""
    later = plan.rewrites or plan.protected_regions or plan.codes or any(s.op in LATER_OPERATIONS for s in plan.splices)
    return 2 if later or any(step.is_later for step in history) else 1


def complete_record(draft: Record, copied: Copied, check: dict[str, Any]) -> Record:
    """Add the digests of all files and changed regions, the undo file and the report of the check to a draft."""
    files = {
        f.name: FileRecord(size=f.size, base_sha256=f.base_digest, sha256=f.patched_digest, unverified=f.unverified)
        for f in copied.files
    }
    elsewhere = [f.name for f in copied.files if f.how == "elsewhere"]
    found: dict[str, Any] = {"files": files, "elsewhere": elsewhere, "check": check}
    if draft.registry_version == 2:
        found["changes"] = [
            change.model_copy(
                update={
                    "changed": tally.changed,
                    "base_sha256": tally.base_sha256,
                    "sha256": tally.sha256,
                    "undo": tally.name if copied.undo else None,
                }
            )
            for change, tally in zip(draft.changes, copied.changes, strict=True)
        ]
        found["protected_regions"] = [
            region.model_copy(update={"sha256": tally.sha256})
            for region, tally in zip(draft.protected_regions, copied.protected, strict=True)
        ]
        found["undo"] = copied.undo
    return draft.model_copy(update=found)


def _refuse_unreadable(draft: Record, plan: Plan) -> None:
    """Raise PlanError if the finished record or the manifest would be larger than `read_record` accepts."""
    size, commas = LATER.size, LATER.commas
    for piece in draft.render_pieces():
        size += len(piece)
        commas += piece.count(",")
    for file in plan.checkpoint.files:
        size += len(json.dumps(file.name)) * 2 + PER_FILE
        commas += 5
    count = len(draft.edits) + len(draft.protected)
    remedy = "make fewer edits"
    if draft.history:
        remedy = "apply one manifest with all edits to the first base, or revert a step first"
    if fault := RECORD.describe_excess(size, commas):
        what = f"the record of {count} scalars and {len(draft.history)} earlier steps would have {fault}"
        raise PlanError(what, plan.loaded.path, remedy)
    if len(plan.loaded.raw) > MAX_JSON:
        what = f"the manifest is too large to be stored in the patched checkpoint: it has more than {MAX_JSON} bytes"
        raise PlanError(what, plan.loaded.path, remedy)


def read_source_date_epoch() -> int | None:
    """Read the environment variable SOURCE_DATE_EPOCH, in seconds since 1970; None if it is not set.

    Raises TargetError if it is not a number.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if text and not re.fullmatch(r"[0-9]{1,18}", text):
        raise TargetError(
            f"SOURCE_DATE_EPOCH is {text[:40]!r}, not a number", "the environment", "give seconds since 1970"
        )
    return int(text) if text else None


def _describe(scalar: Scalar, plan: Plan) -> dict[str, Any]:
    """Describe one scalar, and the known super weight at its coordinate, as JSON."""
    is_byte = isinstance(plan.checkpoint.get_info(scalar.coordinate.tensor).dtype, BlockDtype)
    entry = None if is_byte else plan.facts.get(scalar.coordinate)  # the index of a byte is no place of a weight
    known = None
    if entry is not None:
        known = {
            "id": entry.id,
            "status": entry.status,
            "causal_alone": entry.causal_alone,
            "sources": [source.model_dump(mode="json") for source in entry.sources],
        }
    return scalar.to_json() | {"known": known}
