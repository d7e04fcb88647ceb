"""Define the result of `apply`, whether it wrote a copy or edited in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swsurgery.checkpoint.record import Record
from swsurgery.editing.copy import Copied
from swsurgery.storage.result import TableResult

SMALL_CHECKPOINT = 64 << 20
"""Maximum size, in bytes, of an unedited file that is downloaded for publishing and hashed by an edit in place."""


@dataclass(frozen=True, repr=False)
class Applied(TableResult):
    """A patched checkpoint that was made.

    `record` is the record in swsurgery.json. `written` is False if the directory was the patched checkpoint already
    and nothing had to be done.
    """

    output: Path
    copied: Copied
    record: Record
    notes: tuple[str, ...] = ()
    written: bool = True

    def to_json(self) -> dict[str, Any]:
        """Build the JSON document that `apply --json` prints."""
        files = {
            f.name: {"size": f.size, "base_sha256": f.base_digest, "sha256": f.patched_digest, "how": f.how}
            | ({"unverified": True} if f.unverified else {})
            for f in self.copied.files
        }
        document = self.record.model_dump(mode="json")
        records = (document["edits"], document["protected"])
        edits, protected = ([{k: v for k, v in r.items() if k != "known"} for r in each] for each in records)
        return {
            "output": str(self.output),
            "splices": edits,
            "protected": protected,
            "omitted": document["omitted"],
            "notes": list(self.notes),
            "check": document["check"],
            "files": files,
        }

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per edited scalar: tensor, index, dtype, old and new value, file and offset in bytes."""
        return self.record.to_rows()
