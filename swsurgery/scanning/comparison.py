"""Report the quality of several edits of one base. Must not depend on torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from swsurgery.model.protocol import DEFAULT_PROTOCOL, Protocol
from swsurgery.model.tasks.report import TaskReport
from swsurgery.storage.numbers import round_number
from swsurgery.storage.result import TableResult


@dataclass(frozen=True)
class ComparedModel:
    """The measurements of one model: the base (`manifest` None) or the base with the edits of one manifest.

    `activations` is "as computed", or says how the inputs of linear layers were rounded. `changed_scalars` counts the
    scalars with other bits, and `changed_bytes` the bytes that store them. `norm` is the Frobenius norm of new minus
    old over all tensors with a change, and `relative_norm` the same divided by the norm of these tensors in the base.

    `ratio` is the perplexity divided by that of the base with activations as computed, and `kl` the mean KL(base ||
    model) in nats per token. `low` and `high` are the ends of their 95% intervals; None if there are fewer than eight
    windows.
    """

    manifest: str | None
    activations: str
    changed_scalars: int
    changed_bytes: int
    norm: float
    relative_norm: float
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

    @property
    def name(self) -> str:
        """The path of the manifest or "base", and how activations were rounded."""
        name = "base" if self.manifest is None else self.manifest
        return name if self.activations == "as computed" else f"{name}, {self.activations}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as strict JSON types, with 6 significant digits; NaN and infinities become None.

        The perplexity per word is absent if the protocol does not count words.
        """
        return {
            key: (round_number(value) if math.isfinite(value) else None) if isinstance(value, float) else value
            for key, value in vars(self).items()
            if key != "word_perplexity" or value is not None
        }


@dataclass(frozen=True, repr=False)
class Comparison(TableResult):
    """The measurements of a base and of several edits of it, on the same text in one run.

    `models` begins with the base; the others are in the order of the manifests.
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
        return [
            model.to_json() | ({} if self.tasks is None else self.tasks.to_columns(number))
            for number, model in enumerate(self.models)
        ]

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
