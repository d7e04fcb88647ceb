"""Load a checkpoint as a model, run it on text with some weights changed, and compare the results.

This is the only package that imports transformers. Only this package and `scanning` import torch. Importing the package
itself, or its module `bounds`, `check`, `report`, `refusals`, `text`, `intervals`, `stopwords` or `tokenizer`, loads
neither library. The package must not depend on the packages that edit, scan, verify or share, and it writes no files.
Tasks of lm-evaluation-harness are in `tasks/`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from swsurgery.storage.coordinate import Coordinate

Placement = Literal["auto", "whole", "streamed"]
"""Which weights are on the device at a time: "whole" means all of them, "streamed" those of two layers. "auto" means
"whole" if all weights fit in float32, else "streamed"."""


@dataclass(frozen=True)
class ScalarChange:
    """One edited scalar: its coordinate and its exact value in the base and in the patched checkpoint."""

    coordinate: Coordinate
    base: float
    patched: float


def explain_unavailable() -> str | None:
    """Return why no model can run here, such as "torch is not installed"; None if torch and transformers are installed.

    This function imports neither library, so it does not notice a broken installation.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
