"""Make a recipe: a quantiser's configuration that keeps the modules with super weights in high precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from swsurgery.progress import Reporter, require_reporter
from swsurgery.sharing.recipes.modules import find_subject
from swsurgery.sharing.recipes.names import ToolName
from swsurgery.sharing.recipes.tools import TOOLS
from swsurgery.storage.arguments import require_choice, require_location, require_type
from swsurgery.storage.result import Result


@dataclass(frozen=True, repr=False)
class Recipe(Result):
    """A quantiser's configuration.

    `modules` are the stored names of the modules that contain super weights. `patterns` are the texts that the tool
    compares with names, the default skips included. `text` is the configuration, ready to paste.
    """

    tool: ToolName
    model: str
    modules: tuple[str, ...]
    patterns: tuple[str, ...]
    text: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Return the document that `recipe --json` prints."""
        return {
            "tool": self.tool,
            "model": self.model,
            "modules": list(self.modules),
            "patterns": list(self.patterns),
            "text": self.text,
            "notes": list(self.notes),
        }


def recipe(
    subject: str | Path, tool: ToolName, *, model: str | None = None, reporter: Reporter | None = None
) -> Recipe:
    """Return the configuration of a quantiser that keeps the modules with super weights in high precision.

    `subject` is the name of a known model ("llama-7b"), or a checkpoint: a directory or `hf://ORG/NAME[@REV][/sub]`. If
    the checkpoint has a record, the modules of the edited and protected scalars, and of the protected and restored
    regions, are kept too. `model` names the known model of a checkpoint whose files do not name it.

    Raises TypeError; LookupFailed for an unknown model; HubError; CheckpointError if no super weight is known, or a
    file cannot be read; PlanError for a module that the tool cannot name.
    """
    reporter = require_reporter(reporter)
    require_location("subject", subject)
    require_choice("tool", tool, get_args(ToolName))
    require_type("model", model, str, optional=True)
    found = find_subject(subject, model, reporter)
    chosen = next(each for each in TOOLS if each.name == tool)
    rendered = chosen.render(found)
    names = tuple(dict.fromkeys(module.name for module in found.modules))
    return Recipe(tool, found.model, names, rendered.patterns, rendered.text, (*found.notes, *rendered.notes))
