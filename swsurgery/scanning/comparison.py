"""Report the quality of several edits of one base. Must not depend on torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from swsurgery.model.protocol import DEFAULT_PROTOCOL, Protocol
from swsurgery.model.tasks.report import TaskReport
from swsurgery.storage.numbers import round_number
from swsurgery.storage.result import TableResult

_OPTIONAL = frozenset({"word_perplexity", "control", "meaning"})
"""The fields of a model that are absent from its JSON if they are None."""


@dataclass(frozen=True)
class ComparedModel:
    """The measurements of one model: the base (`manifest` None) or the base with the edits of one manifest.

    `activations` is "as computed", or says how the inputs of linear layers were rounded. `changed_scalars` counts the
    scalars with other bits, and `changed_bytes` the bytes that store them. `norm` is the Frobenius norm of new minus
    old over all tensors with a change, and `relative_norm` the same divided by the norm of these tensors in the base.

    `ratio` is the perplexity divided by that of the base with activations as computed, and `kl` the mean KL(base ||
    model) in nats per token. `low` and `high` are the ends of their 95% intervals; None if there are fewer than eight
    windows.

    `control` is None, or names a control of the edit of this manifest, such as "28 other outliers zeroed". The model is
    then the base with this control: `changed_scalars` counts the zeroed scalars, and `changed_bytes` and both norms are
    None, because a control is no checkpoint. `meaning` says what the control means for the edit.
    """

    manifest: str | None
    activations: str
    changed_scalars: int
    changed_bytes: int | None
    norm: float | None
    relative_norm: float | None
    perplexity: float
    ratio: float
    ratio_low: float | None
    ratio_high: float | None
    kl: float
    kl_low: float | None
    kl_high: float | None
    stopword_mass: float
    finite: bool
    word_perplexity: float | None = None
    control: str | None = None
    meaning: str | None = None

    @property
    def name(self) -> str:
        """The path of the manifest or "base", and how activations were rounded or what the control does."""
        name = "base" if self.manifest is None else self.manifest
        if self.control is not None:
            return f"{name}, control: {self.control}"
        return name if self.activations == "as computed" else f"{name}, {self.activations}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as strict JSON types, with 6 significant digits; NaN and infinities become None.

        The perplexity per word is absent if the protocol does not count words, and the fields of a control are absent
        from other models.
        """
        return {
            key: (round_number(value) if math.isfinite(value) else None) if isinstance(value, float) else value
            for key, value in vars(self).items()
            if key not in _OPTIONAL or value is not None
        }


@dataclass(frozen=True, repr=False)
class Comparison(TableResult):
    """The measurements of a base and of several edits of it, on the same text in one run.

    `models` begins with the base; the others are in the order of the manifests, each followed by its controls.
    """

    base: str
    models: tuple[ComparedModel, ...]
    windows: int
    window_tokens: int
    scored_tokens: int
    text_sha256: str
    dtype: str
    device: str
    method: str
    tasks: TaskReport | None = None
    protocol: Protocol = DEFAULT_PROTOCOL

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per model: the fields of a ComparedModel, and its scores on tasks."""
        rows = [model.to_json() for model in self.models]
        if any(model.control is not None for model in self.models):
            rows = [row | {"control": row.get("control"), "meaning": row.get("meaning")} for row in rows]
        if self.tasks is None:
            return rows
        none = dict.fromkeys(self.tasks.to_columns(0))  # controls answer no tasks
        answered = [at for at, model in enumerate(self.models) if model.control is None]
        columns = {at: self.tasks.to_columns(number) for number, at in enumerate(answered)}
        return [row | columns.get(at, none) for at, row in enumerate(rows)]

    def to_json(self) -> dict[str, Any]:
        """Return the document that `compare --json` prints."""
        document: dict[str, Any] = {
            "version": 1,
            "base": self.base,
            "models": [model.to_json() for model in self.models],
        }
        names = ("windows", "window_tokens", "scored_tokens", "text_sha256", "dtype", "device", "method")
        if self.tasks is not None:
            document["tasks"] = self.tasks.to_json()
        return document | {name: getattr(self, name) for name in names} | {"protocol": self.protocol.to_json()}
