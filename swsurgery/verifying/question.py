"""Define the options of `verify`, and refuse options that contradict each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import SwsurgeryError
from swsurgery.storage.arguments import require_choice, require_type

if TYPE_CHECKING:  # at run time it is imported only to read a manifest
    from swsurgery.manifest.load import ManifestLike


@dataclass(frozen=True)
class Question:
    """The options of `verify`: what to check a checkpoint against.

    `base` is a directory or hf://ORG/NAME[@REV]. `model` and `tolerance` apply only to known super weights, and
    `protected_tolerance` only if `protected`, a manifest, is given. `public_key` (PEM) is required with `signature`.
    `transformers` applies only if `complete` is set. `strict` turns warnings and the answer "undecided" into "no".
    `weights` and `variant` choose the weights if the checkpoint has several sets and neither the record nor the
    manifest names a set.

    Raises TypeError for an option of another type, and SwsurgeryError for a tolerance out of range and for
    `transformers` without `complete`.
    """

    base: str | Path | None = None
    manifest: ManifestLike | None = None
    known: bool = False
    model: str | None = None
    tolerance: float = 0.25
    finite: bool = False
    values: bool = False
    signature: Path | None = None
    public_key: Path | None = None
    weights: Weights | None = None
    variant: str | None = None
    protected: ManifestLike | None = None
    protected_tolerance: float = 0.0
    complete: bool = False
    transformers: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("known", "finite", "values", "complete", "transformers", "strict"):
            require_type(name, getattr(self, name), bool)
        if self.transformers and not self.complete:
            raise SwsurgeryError("--transformers applies to --complete, which was not given", remedy="add --complete")
        require_type("model", self.model, str, optional=True)
        require_choice("weights", self.weights, get_args(Weights), optional=True)
        require_type("variant", self.variant, str, optional=True)
        if not 0 <= self.tolerance <= 1:  # with NaN or more than 1, no super weight would ever be lost
            raise SwsurgeryError("tolerance must be between 0 and 1", self.tolerance)
        if not 0 <= self.protected_tolerance < math.inf:
            raise SwsurgeryError("protected_tolerance must be a finite number from 0", self.protected_tolerance)

    @property
    def checks_known(self) -> bool:
        """True if the known super weights are to be read: those of `model`, or of the model that is identified."""
        return self.known or self.model is not None

    @property
    def reads_values(self) -> bool:
        """True if all values are to be searched."""
        return self.finite or self.values

    @property
    def needs_no_record(self) -> bool:
        """True if any requested check also works for a checkpoint without a record."""
        manifests = (self.manifest, self.protected)
        return bool(
            self.checks_known or manifests != (None, None) or self.reads_values or self.signature or self.complete
        )
