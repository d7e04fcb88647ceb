"""Define what is known of an edit that the sanity check rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swsurgery.editing.plan import Plan
from swsurgery.storage.result import Result


@dataclass(frozen=True, repr=False)
class Rejected(Result):
    """The plan of an edit that was not made, and the report of the check that rejected it, as JSON."""

    plan: Plan
    check: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Build the document of the plan with the report. It has no output, because nothing was written."""
        return self.plan.to_json() | {"check": self.check}
