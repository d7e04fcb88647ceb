"""Define what the module of a tool returns, and format the parts that several tools share.

Must not depend on files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from swsurgery.sharing.recipes.modules import Subject


@dataclass(frozen=True)
class Rendered:
    """The configuration of one tool.

    `patterns` are the texts that the tool compares with the names of modules or tensors. `text` is ready to paste and
    contains every pattern. `notes` are facts that the user must know.
    """

    patterns: tuple[str, ...]
    text: str
    notes: tuple[str, ...] = ()


def format_list(patterns: Iterable[str], indent: int = 8) -> str:
    """Format the items of a Python list, one per line, each with a comma. Backslashes make an item a raw string."""
    pad = " " * indent
    return "\n".join(f'{pad}{"r" if chr(92) in pattern else ""}"{pattern}",' for pattern in patterns)


def choose_output(subject: Subject, ending: str) -> str:
    """Return the name of a directory for the quantised model: the last part of the model's name, and an ending."""
    return f"{re.split(r'[/@]', subject.model.rstrip('/'))[-1] or 'model'}-{ending}"


def explain_experts(subject: Subject, explanation: str) -> tuple[str, ...]:
    """Return a note with the routed experts of the recipe and an explanation; no note if there is no such expert."""
    experts = [module.name for module in subject.modules if isinstance(module.expert, int)]
    return (f"{', '.join(experts)}: {explanation}",) if experts else ()


STACKED_NOTE = (
    "transformers >= 5 stacks all experts of a layer in one module, so a single expert cannot be excluded: "
    "the recipe keeps all experts of the layer"
)
"""Explanation for tools that exclude whole modules of a model loaded by transformers."""

SPLIT_NOTE = "the recipe names one expert; an engine that fuses the experts of a layer may need all of them in one form"
"""Explanation for tools that split stacked experts into one linear layer per expert."""
