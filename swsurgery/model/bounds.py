"""Define the limits that a sanity check has to meet.

`report.py` compares them with the figures. This module is apart from it because it loads faster.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckedBounds:
    """Limits on the perplexity of patched divided by that of base.

    A ratio equal to a limit passes. None sets no limit.
    """

    max_perplexity_ratio: float | None = None
    min_perplexity_ratio: float | None = None
