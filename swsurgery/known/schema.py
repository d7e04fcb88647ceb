"""The schema of the shipped facts, and the vocabulary of their statuses. Knows neither files nor names."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from swsurgery.errors import LookupFailed

Status = Literal["paper", "independent-detection", "code-only", "disputed", "refuted", "insufficient"]
Causal = Literal["catastrophic", "strong", "moderate", "weak", "inert", "untested"]
Count = Annotated[int, Field(ge=0)]
Figure = float | str
"""A published figure: a number (infinity where the source says so), or its words ("+3.18%")."""

STATUSES: dict[str, str] = {
    "paper": "printed in a paper, in a table or in a sentence",
    "independent-detection": "found by a third party's detector, in no paper",
    "code-only": "only in the code of the authors or of a fork",
    "disputed": "sources disagree on where it is or whether it matters",
    "refuted": "a published test found no lasting effect, or no large weight is there",
    "insufficient": "doubted by its own author, untested, or not borne out by the evidence",
}
CAUSAL: dict[str, str] = {
    "catastrophic": "perplexity x30 or more",
    "strong": "perplexity x4 to x30",
    "moderate": "perplexity x2 to x4",
    "weak": "perplexity x1.05 to x2",
    "inert": "perplexity below x1.05",
    "untested": "no published test",
}


class Strict(BaseModel):
    """No coercion, no unknown field, no change after loading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)


class Source(Strict):
    """Something citable. `commit` is of the repository that `cite` names; `secondary` means known second-hand."""

    key: str
    kind: Literal[
        "paper", "code", "detection", "ablation", "detection+ablation", "structural", "notes", "blog", "secondary"
    ]
    cite: str
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    note: str | None = None

    def __str__(self) -> str:
        return f"{self.cite}@{self.commit}" if self.commit else self.cite


class Effect(Strict):
    """One published measurement. `dose` pairs a scale factor with the metric, `dose_ratio` with its ratio to before."""

    protocol: str
    metric: str
    before: Figure | None = None
    after: Figure | None = None
    ratio: Figure | None = None
    ci95: tuple[float, float] | None = None
    dose: tuple[tuple[float, float], ...] = ()
    dose_ratio: tuple[tuple[float, float], ...] = ()
    note: str | None = None
    source: Source

    def to_json(self) -> dict[str, Any]:
        fields = self.model_dump(exclude_defaults=True, exclude={"source"}) | {"source": str(self.source)}
        return {name: str(f) if isinstance(f, float) and math.isinf(f) else f for name, f in fields.items()}


class Independent(Strict):
    """How many separate groups reported the exact scalar, and how many its value. A paper and its code are one."""

    location: Count
    value: Count


class KnownCoordinate(Strict):
    """One published coordinate.

    `row` is the output channel (below hidden_size) and `col` the intermediate neuron (below intermediate_size), None
    where only a row was published; such a row cannot be addressed. `tensor` is the stored tensor's published name.
    `value` is exact in `dtype`, in the spelling of safetensors; a print that is not exact is `value_printed`.
    `causal_alone` is the effect of zeroing this scalar alone; where `col` is None, of zeroing the whole row.
    """

    id: str
    layer: Count
    row: Count
    col: Count | None
    expert: Count | None
    tensor: str
    value: float | None = None
    dtype: Literal["F16", "BF16", "F32"] | None = None
    value_printed: str | None = None
    status: Status
    causal_alone: Causal
    role: str | None = None
    located_by: tuple[str, ...]
    value_read_by: tuple[str, ...] = ()
    independent: Independent
    note: str | None = None
    effects: tuple[Effect, ...] = ()
    sources: tuple[Source, ...]

    @property
    def causal_scope(self) -> str:
        """What the tests behind `causal_alone` zeroed: "scalar" or "row"."""
        return "row" if self.col is None else "scalar"

    @model_validator(mode="after")
    def _value_with_dtype(self) -> KnownCoordinate:
        if (self.value is None) != (self.dtype is None):
            raise ValueError(f"{self.id} needs value and dtype, both or neither")
        return self

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude={"sources", "effects", "located_by", "value_read_by"}) | {
            "causal_scope": self.causal_scope,
            "located_by": list(self.located_by),
            "value_read_by": list(self.value_read_by),
            "effects": [e.to_json() for e in self.effects],
            "sources": [str(s) for s in self.sources],
        }


class JointSet(Strict):
    """Coordinates that were edited together, and what came of it."""

    name: str | None = None
    coordinates: tuple[str, ...]
    note: str | None = None
    effects: tuple[Effect, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "coordinates": list(self.coordinates),
            "note": self.note,
            "effects": [e.to_json() for e in self.effects],
        }


class KnownModel(Strict):
    """One model. The first alias is its short name. `tensor` is a template with {layer} (and {expert});
    `transposed` says that the checkpoint stores [col, row]; `revision_measured` is the commit that was measured."""

    aliases: Annotated[tuple[str, ...], Field(min_length=1)]
    hf_id: str
    family: str
    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_experts: Count | None = None
    sizes_from: str
    tensor: str
    transposed: bool = False
    revision_measured: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    disputes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    effects: tuple[Effect, ...] = ()
    coordinates: tuple[KnownCoordinate, ...]
    joint_sets: tuple[JointSet, ...] = ()

    @property
    def slug(self) -> str:
        return self.aliases[0]

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source that this model cites, in order of first use."""
        effects = [*self.effects, *(e for j in self.joint_sets for e in j.effects)]
        cited = [s for c in self.coordinates for s in (*(e.source for e in c.effects), *c.sources)]
        return tuple({s.key: s for s in [*cited, *(e.source for e in effects)]}.values())

    @model_validator(mode="after")
    def _ids(self) -> KnownModel:
        ids = [c.id for c in self.coordinates]
        if len(set(ids)) != len(ids):
            raise ValueError(f"{self.hf_id} has a coordinate twice")
        strangers = {i for j in self.joint_sets for i in j.coordinates} - set(ids)
        if strangers:
            raise ValueError(f"{self.hf_id} has a joint set of unknown coordinates: {', '.join(sorted(strangers))}")
        return self

    def to_json(self, status: str | Collection[str] | None = None) -> dict[str, Any]:
        return {
            **self.model_dump(include={"hf_id", "family", "hidden_size", "intermediate_size", "num_layers"}),
            **self.model_dump(include={"num_experts", "tensor", "transposed", "revision_measured", "sizes_from"}),
            "slug": self.slug,
            "aliases": list(self.aliases),
            "coordinates": [c.to_json() for c in with_status(self, status)],
            "joint_sets": [j.to_json() for j in self.joint_sets],
            "effects": [e.to_json() for e in self.effects],
            "disputes": list(self.disputes),
            "notes": list(self.notes),
            "sources": {s.key: s.model_dump(exclude={"key"}) for s in self.sources},
        }


class SuperExperts(Strict):
    """Experts of a mixture-of-experts model whose removal breaks it; no scalar is published for most."""

    hf_id: str
    also: tuple[str, ...] = ()
    experts: tuple[str, ...]
    effects: tuple[str, ...]
    cite: str
    note: str | None = None


class SinkNeurons(Strict):
    """Columns of a down projection that feed attention sinks; which rows matter is not published."""

    model: str
    layer: Count
    columns: tuple[Count, ...]
    cite: str


class NegativeResult(Strict):
    """Models in which a search or a test found nothing."""

    hf_ids: tuple[str, ...]
    finding: str
    cite: str


class Related(Strict):
    """What is published around super weights without naming a scalar."""

    super_experts: tuple[SuperExperts, ...]
    sink_neurons: tuple[SinkNeurons, ...]
    negative_results: tuple[NegativeResult, ...]
    open_questions: tuple[str, ...]


def with_status(model: KnownModel, status: str | Collection[str] | None = None) -> tuple[KnownCoordinate, ...]:
    """The coordinates of the given status or statuses; all of them without one. Raises LookupFailed for a word that
    is no status."""
    if status is None:
        return model.coordinates
    wanted = {status} if isinstance(status, str) else set(status)
    for word in sorted(wanted - set(STATUSES)):
        raise LookupFailed("no such status", word, f"one of {', '.join(STATUSES)}")
    return tuple(c for c in model.coordinates if c.status in wanted)
