"""Load a checkpoint as a model, run variants of it on text and compare the results.

The only package that imports transformers, and one of two that import torch; importing it, `check`, `report`,
`refusals`, `text`, `intervals`, `stopwords` or `tokenizer` loads neither. It must not depend on the packages that edit,
scan, verify or share, and it writes nothing.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from swsurgery.storage.coordinate import Coordinate

Placement = Literal["auto", "whole", "streamed"]
"""How many weights are on the device at a time: "whole" is all of them, "streamed" is two layers, and "auto" is whole
if all of them fit in float32."""


@dataclass(frozen=True)
class ScalarChange:
    """One edited scalar: its coordinate and its exact value in the base and in the patched checkpoint."""

    coordinate: Coordinate
    base: float
    patched: float


def explain_unavailable() -> str | None:
    """Return why no model can run here, such as "torch is not installed"; None if torch and transformers are installed.

    Imports neither library, so a broken installation is not noticed.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
