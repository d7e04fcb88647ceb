"""Define the result of `apply`, for a copy and for an edit in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swsurgery.checkpoint.record import Record
from swsurgery.editing.copy_job import Copied
from swsurgery.storage.result import TableResult

SMALL_CHECKPOINT = 64 << 20
"""Maximum size in bytes of a small file.

Files without edits are downloaded for publishing, and hashed by an edit in place, only if they are small.
"""


@dataclass(frozen=True, repr=False)
class Applied(TableResult):
    """The result of `apply`: the patched checkpoint in the directory `output`.

    `copied` lists its files, and `record` is the content of its swsurgery.json. `written` is False if an earlier edit
    in place had already applied the manifest, so that nothing was written. `scalars` is the number of scalars that all
    tensors of the checkpoint store.
    """

    output: Path
    copied: Copied
    record: Record
    notes: tuple[str, ...] = ()
    written: bool = True
    scalars: int | None = None

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
        later = ("changes", "protected_regions", "undo", "codes")
        regions: dict[str, Any] = {name: document[name] for name in later if name in document}
        return {
            "output": str(self.output),
            "scalars": self.scalars,
            "splices": edits,
            "protected": protected,
            "omitted": document["omitted"],
            "notes": list(self.notes),
            "check": document["check"],
            "files": files,
            **regions,
        }

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per edited scalar, protected scalar, changed region and protected region."""
        return self.record.to_rows()
