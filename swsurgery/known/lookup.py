"""Look up the known super weights of a model, the list of known models, or the record of a patched checkpoint.

Must not load anything slow: `swsurgery lookup` answers in a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swsurgery.errors import LookupFailed, SwsurgeryError
from swsurgery.known import own, shipped
from swsurgery.known.listing import KnownModels, list_models
from swsurgery.known.schema import KnownModel, select_by_status
from swsurgery.progress import Reporter, require_reporter
from swsurgery.storage.arguments import require_location, require_strings
from swsurgery.storage.result import TableResult

if TYPE_CHECKING:
    from swsurgery.checkpoint.record import Record


@dataclass(frozen=True, repr=False)
class KnownSuperWeights(TableResult):
    """The known super weights of models. If `statuses` is not None, only coordinates with one of them are included."""

    models: tuple[KnownModel, ...]
    statuses: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the document that `lookup --json` prints."""
        return shipped.build_json(self.models, self.statuses)

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per coordinate: its model, id, position, tensor, value, dtype, status and `causal_alone`."""
        return [
            {"model": model.hf_id, **{column: getattr(found, column) for column in self.list_columns()[1:]}}
            for model in self.models
            for found in select_by_status(model, self.statuses)
        ]

    def list_columns(self) -> tuple[str, ...]:
        """Return the keys of the rows."""
        return ("model", "id", "layer", "expert", "row", "col", "tensor", "value", "dtype", "status", "causal_alone")


def lookup(
    model: str | Path | None = None, *, status: str | Sequence[str] | None = None, reporter: Reporter | None = None
) -> KnownSuperWeights | KnownModels | Record:
    """Return the known super weights of a model, the user's own scans included, or the record of a checkpoint.

    `model` is a model's name ("llama-7b"), or a patched checkpoint: a directory or `hf://ORG/NAME[@REV][/sub]`. Without
    `model`, all known models are listed. `status` selects coordinates: one status or several. The docstring of
    `swsurgery.known` explains the statuses.

    Raises TypeError; LookupFailed for an unknown status or an unknown name (the message suggests similar names);
    CheckpointError or HubError for a checkpoint without a record; SwsurgeryError for a checkpoint with a `status`.
    """
    reporter = require_reporter(reporter)
    statuses = (status,) if isinstance(status, str) else status
    if model is None:
        require_strings("status", statuses)
        return list_models(statuses)
    require_location("model", model)
    require_strings("status", statuses)
    if not is_checkpoint(model):
        found = _find_model(str(model))
        select_by_status(found, statuses)  # refuses an unknown status
        return KnownSuperWeights((found,), None if statuses is None else tuple(statuses))
    if statuses is not None:
        raise SwsurgeryError("--status, --manifest and --factor need the name of a model, not a checkpoint", model)
    from swsurgery.checkpoint.opening import open_for_reading
    from swsurgery.checkpoint.record import read_record

    with open_for_reading("model", model, reporter) as root:
        return read_record(root).record


def _find_model(name: str) -> KnownModel:
    """Return the known model called `name`. Raises LookupFailed, which also mentions a directory of this name."""
    try:
        return own.find_model(name)
    except LookupFailed as error:
        if os.path.isdir(name):
            fault = error.faults[0]
            more = "; the directory of this name has no record, swsurgery scan finds its super weights"
            raise LookupFailed(fault.what, fault.where, fault.remedy + more) from None
        raise


def is_checkpoint(model: str | Path) -> bool:
    """Return True for the location of a checkpoint, False for the name of a model."""
    if not isinstance(model, str) or model.startswith("hf://"):
        return True
    try:
        return (os.sep in model and Path(model).is_dir()) or Path(model, "swsurgery.json").is_file()
    except OSError:  # the name is too long, or a folder above it is not readable
        return os.sep in model
