"""Define the schema of known super weights and the vocabulary of their statuses.

Must not depend on files or on lookup.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from swsurgery.errors import LookupFailed

Status = Literal[
    "paper", "measured", "independent-detection", "code-only", "disputed", "refuted", "insufficient", "candidate"
]
Causal = Literal["catastrophic", "strong", "moderate", "weak", "inert", "untested"]
Count = Annotated[int, Field(ge=0)]
Expert = Count | Literal["shared"] | None
Finite = Annotated[float, Field(allow_inf_nan=False)]
Figure = Annotated[float, Field(ge=-math.inf)] | str  # the bound excludes NaN, which JSON cannot represent
"""A measured number (infinity if the source says so), or the source's words, such as "+3.18%"."""

STATUSES: dict[str, str] = {
    "paper": "printed in a paper, in a table or in a sentence",
    "measured": "found by `swsurgery scan`: by this project, or by you if it is marked as own scan",
    "independent-detection": "found by a third party's detector, in no paper",
    "code-only": "only in the code of the authors or of a fork",
    "disputed": "sources disagree about its position or its importance",
    "refuted": "a published test found no lasting effect, or the weight is not large",
    "insufficient": "doubted by its own author, untested, or not supported by the evidence",
    "candidate": "found by your own scan, whose causal test was not made or gave no verdict",
}
CAUSAL: dict[str, str] = {
    "catastrophic": "perplexity x30 or more",
    "strong": "perplexity x4 to x30",
    "moderate": "perplexity x2 to x4",
    "weak": "perplexity x1.05 to x2",
    "inert": "perplexity below x1.05",
    "untested": "no published test",
}
_FLOORS: dict[Causal, float] = {"catastrophic": 30.0, "strong": 4.0, "moderate": 2.0, "weak": 1.05}


def classify_ratio(ratio: float) -> Causal:
    """Return the word of CAUSAL for a perplexity ratio, patched / base. NaN and infinity are catastrophic."""
    if math.isnan(ratio):
        return "catastrophic"
    return next((word for word, floor in _FLOORS.items() if ratio >= floor), "inert")


def format_coordinate_id(layer: int, expert: Expert, row: int | None, col: int | None) -> str:
    """Return an id such as `L2.3968.7003`, `L1.E68.940.711` or `L1.Eshared.940.711`.

    `*` is the row of a whole column, and the column of a whole row.
    """
    return f"{_format_mlp(layer, expert)}.{'*' if row is None else row}.{'*' if col is None else col}"


def format_expert_id(layer: int, expert: Expert) -> str:
    """Return the id of a whole expert, such as `L1.E68` or `L8.Eshared`."""
    return _format_mlp(layer, expert)


def _format_mlp(layer: int, expert: Expert) -> str:
    return f"L{layer}" if expert is None else f"L{layer}.E{expert}"


class StrictValue(BaseModel):
    """A frozen pydantic model that rejects unknown fields and values of another type."""

    # Infinity is written as a constant, so that Python's json reads the saved value back unchanged.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True, ser_json_inf_nan="constants")


class Citation(StrictValue):
    """The source of a coordinate or of a measurement.

    `commit` is a commit of the repository in `cite`. A source of the kind `secondary` repeats another source. `scan` is
    a measurement by this project, and `own scan` a measurement by the user; `cite` is then the command to repeat it.
    `measured_on` describes the text of its measurements and how it was cut, such as "the test set of WikiText-2, 32
    windows of 2,048 tokens"; None if the source does not state it.
    """

    key: str
    kind: Literal[
        "paper",
        "code",
        "detection",
        "ablation",
        "detection+ablation",
        "structural",
        "notes",
        "blog",
        "secondary",
        "scan",
        "own scan",
    ]
    cite: str
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    measured_on: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        return f"{self.cite}@{self.commit}" if self.commit else self.cite


class Conditions(StrictValue):
    """The conditions of a scan's measurement.

    The text with the sha256 `text_sha256` was run as `windows` windows of at most `window_tokens` tokens each, in
    `dtype` on `device`. `scored_tokens` is the number of scored predictions, and `protocol` describes how the text was
    cut and scored, such as "default: without overlap, without BOS". Version 0.1.0 stored neither of the two.
    """

    text_sha256: str
    windows: Count
    window_tokens: Count
    scored_tokens: Count | None = None
    protocol: str | None = None
    dtype: str
    device: str


class KnownEffect(StrictValue):
    """One measurement of `metric`: its values before and after the edit that `protocol` describes, such as "zero".

    `dose` contains pairs (scale factor, metric) and `dose_ratio` pairs (scale factor, ratio to `before`). `ci95` is the
    95% confidence interval of `ratio`. Only scans set `conditions` and `kl`, the mean KL(before || after) in nats per
    token.
    """

    protocol: str
    metric: str
    before: Figure | None = None
    after: Figure | None = None
    ratio: Figure | None = None
    ci95: tuple[Finite, Finite] | None = None
    kl: Finite | None = None
    conditions: Conditions | None = None
    dose: tuple[tuple[float, float], ...] = ()
    dose_ratio: tuple[tuple[float, float], ...] = ()
    note: str | None = None
    source: Citation

    @model_validator(mode="after")
    def _drop_interval_from_tokens(self) -> KnownEffect:
        """Drop an interval measured by version 0.1.0, which did not store the number of scored tokens.

        That version computed intervals from blocks of tokens; only about half of them contained the true ratio.
        """
        if self.conditions is not None and self.conditions.scored_tokens is None:
            object.__setattr__(self, "ci95", None)
        return self

    def describe_text(self) -> str | None:
        """Describe the measured text and how it was cut and scored; None if the source does not state it."""
        found = self.conditions
        if found is None:
            return self.source.measured_on
        protocol = f"{found.protocol}, " if found.protocol else ""
        return (
            f"{protocol}{found.windows} windows of {found.window_tokens} tokens, text sha256 {found.text_sha256[:12]}"
        )

    def to_json(self) -> dict[str, Any]:
        fields = self.model_dump(exclude_defaults=True, exclude={"source"}) | {"source": str(self.source)}
        if self.source.measured_on:
            fields["measured_on"] = self.source.measured_on
        return {name: str(f) if isinstance(f, float) and math.isinf(f) else f for name, f in fields.items()}


class Independent(StrictValue):
    """The numbers of independent groups that reported the location and the value. A paper and its code count once."""

    location: Count
    value: Count


class KnownCoordinate(StrictValue):
    """One coordinate, published or measured.

    `row` is the output channel (below hidden_size) and `col` the intermediate neuron (below intermediate_size). `col`
    is None if only a row was published; a manifest can name only the whole row. `tensor` is the published name of the
    stored tensor. `value` is exact in `dtype`, named as in safetensors; an inexact published value is `value_printed`.
    `causal_alone` is the effect of zeroing only this scalar or, if `col` is None, the whole row.
    """

    id: str
    layer: Count
    row: Count
    col: Count | None
    expert: Expert
    tensor: str
    value: Finite | None = None
    dtype: Literal["F16", "BF16", "F32"] | None = None
    value_printed: str | None = None
    status: Status
    causal_alone: Causal
    role: str | None = None
    located_by: tuple[str, ...]
    value_read_by: tuple[str, ...] = ()
    independent: Independent
    note: str | None = None
    effects: tuple[KnownEffect, ...] = ()
    sources: tuple[Citation, ...]

    @property
    def own(self) -> bool:
        """True if the sources include a scan by the user."""
        return any(source.kind == "own scan" for source in self.sources)

    @property
    def causal_scope(self) -> str:
        """What the tests for `causal_alone` zeroed: "scalar" or "row"."""
        return "row" if self.col is None else "scalar"

    @model_validator(mode="after")
    def _value_with_dtype(self) -> KnownCoordinate:
        if (self.value is None) != (self.dtype is None):
            raise ValueError(f"{self.id} must have both value and dtype, or neither")
        return self

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude={"sources", "effects", "located_by", "value_read_by"}) | {
            "causal_scope": self.causal_scope,
            "own": self.own,
            "located_by": list(self.located_by),
            "value_read_by": list(self.value_read_by),
            "effects": [e.to_json() for e in self.effects],
            "sources": [str(s) for s in self.sources],
        }


class KnownPart(StrictValue):
    """A part of a layer that was published as a whole; no scalar is meant.

    `causal_alone` is the effect of zeroing the whole part.
    """

    id: str
    layer: Count
    status: Status
    causal_alone: Causal = "untested"
    note: str | None = None
    effects: tuple[KnownEffect, ...] = ()
    sources: Annotated[tuple[Citation, ...], Field(min_length=1)]

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude={"sources", "effects"}) | {
            "effects": [e.to_json() for e in self.effects],
            "sources": [str(s) for s in self.sources],
        }


class KnownExpert(KnownPart):
    """One expert of a mixture of experts, such as a super expert: every matrix of it. Its id is such as `L1.E68`."""

    expert: Count | Literal["shared"]

    @model_validator(mode="after")
    def _id_agrees(self) -> KnownExpert:
        if self.id != format_expert_id(self.layer, self.expert):
            raise ValueError(f"{self.id} is not the id of expert {self.expert} of layer {self.layer}")
        return self


class KnownColumn(KnownPart):
    """One column of a down projection: all weights that read one neuron. Its id is such as `L1.*.7890`."""

    col: Count
    expert: Expert = None

    @model_validator(mode="after")
    def _id_agrees(self) -> KnownColumn:
        if self.id != format_coordinate_id(self.layer, self.expert, None, self.col):
            raise ValueError(f"{self.id} is not the id of column {self.col} of layer {self.layer}")
        return self


KnownEntry = KnownCoordinate | KnownExpert | KnownColumn
"""Everything that the text after `known:` can name by an id."""

LARGEST_FLOAT16 = 65504.0
"""Largest finite number in float16 (IEEE 754 binary16)."""

E = TypeVar("E", KnownCoordinate, KnownExpert, KnownColumn)


class KnownJointSet(StrictValue):
    """The ids of coordinates that were edited together, and the measured effects."""

    name: str | None = None
    coordinates: tuple[str, ...]
    note: str | None = None
    effects: tuple[KnownEffect, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "coordinates": list(self.coordinates),
            "note": self.note,
            "effects": [e.to_json() for e in self.effects],
        }


class MaxActivation(StrictValue):
    """The largest activation that a published measurement saw in a model.

    `value` has the sign of that activation. `place` is where it was seen, such as "hidden state" or "mlp output", and
    `layer` the number of the layer; None if the source gives no number. `from_layer` is the first layer whose hidden
    state reaches half of the magnitude of `value`.
    """

    value: Finite
    layer: Count | None = None
    place: str
    from_layer: Count | None = None
    source: Citation

    @property
    def fits_float16(self) -> bool:
        """True if float16 can represent the value."""
        return abs(self.value) <= LARGEST_FLOAT16

    def to_json(self) -> dict[str, Any]:
        fields = self.model_dump(exclude={"source"}) | {"measured_on": self.source.measured_on}
        return fields | {"fits_float16": self.fits_float16, "source": str(self.source)}


class KnownModel(StrictValue):
    """One model and its known super weights.

    The first alias is the short name. `tensor` is a template for tensor names with {layer} (and {expert}). `transposed`
    is True if the checkpoint stores [col, row]. `revision_measured` is the commit that was measured. If it is None,
    manifests pin `revision`, a commit of the repository that no source measured. `path` is the directory of a
    checkpoint that is not in a repository. `scans` contains the scans of the whole model, including scans that found
    nothing. `experts` and `columns` were published as a whole. `vocab_size` is None if no config.json that states it
    was read. A model may have a `max_activation` and no coordinates.
    """

    aliases: Annotated[tuple[str, ...], Field(min_length=1)]
    hf_id: str
    family: str
    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_experts: Count | None = None
    vocab_size: Count | None = None
    sizes_from: str
    tensor: str
    transposed: bool = False
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    revision_measured: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    path: str | None = None
    scans: tuple[Citation, ...] = ()
    disputes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    effects: tuple[KnownEffect, ...] = ()
    coordinates: tuple[KnownCoordinate, ...]
    joint_sets: tuple[KnownJointSet, ...] = ()
    experts: tuple[KnownExpert, ...] = ()
    columns: tuple[KnownColumn, ...] = ()
    max_activation: MaxActivation | None = None

    @property
    def pinned_revision(self) -> str | None:
        """The commit that manifests of this model name; None if no commit is known."""
        return self.revision_measured or self.revision

    @property
    def slug(self) -> str:
        return self.aliases[0]

    @property
    def own(self) -> bool:
        """True if this entry includes a scan by the user, even a scan that found nothing."""
        return any(source.kind == "own scan" for source in self.sources)

    @property
    def parts(self) -> tuple[KnownExpert | KnownColumn, ...]:
        """Everything that was published as a whole: experts, then columns."""
        return (*self.experts, *self.columns)

    @property
    def entries(self) -> tuple[KnownEntry, ...]:
        """Everything that has an id: coordinates, then experts and columns."""
        return (*self.coordinates, *self.parts)

    @property
    def sources(self) -> tuple[Citation, ...]:
        """All sources cited by this model, in order of first use."""
        effects = [*self.effects, *(e for j in self.joint_sets for e in j.effects)]
        cited = [s for c in self.entries for s in (*(e.source for e in c.effects), *c.sources)]
        measured = [self.max_activation.source] if self.max_activation else []
        return tuple({s.key: s for s in [*cited, *(e.source for e in effects), *self.scans, *measured]}.values())

    @model_validator(mode="after")
    def _ids(self) -> KnownModel:
        ids = [c.id for c in self.entries]
        if len(set(ids)) != len(ids):
            raise ValueError(f"{self.hf_id} has a coordinate twice")
        strangers = {i for j in self.joint_sets for i in j.coordinates} - {c.id for c in self.coordinates}
        if strangers:
            raise ValueError(f"{self.hf_id} has a joint set of unknown coordinates: {', '.join(sorted(strangers))}")
        return self

    def to_json(self, status: str | Collection[str] | None = None) -> dict[str, Any]:
        return {
            **self.model_dump(include={"hf_id", "family", "hidden_size", "intermediate_size", "num_layers"}),
            **self.model_dump(
                include={"num_experts", "vocab_size", "tensor", "transposed", "revision_measured", "sizes_from"}
            ),
            "slug": self.slug,
            "own": self.own,
            "aliases": list(self.aliases),
            "coordinates": [c.to_json() for c in select_by_status(self, status)],
            "experts": [e.to_json() for e in select_entries(self.experts, status)],
            "columns": [c.to_json() for c in select_entries(self.columns, status)],
            "joint_sets": [j.to_json() for j in self.joint_sets],
            "effects": [e.to_json() for e in self.effects],
            "max_activation": self.max_activation and self.max_activation.to_json(),
            "disputes": list(self.disputes),
            "notes": list(self.notes),
            "sources": {s.key: s.model_dump(exclude={"key"}) for s in self.sources},
        }


def select_by_status(model: KnownModel, status: str | Collection[str] | None = None) -> tuple[KnownCoordinate, ...]:
    """Return the coordinates with one of the given statuses, or all coordinates if `status` is None.

    Raises LookupFailed for an unknown status.
    """
    return select_entries(model.coordinates, status)


def select_entries(entries: tuple[E, ...], status: str | Collection[str] | None = None) -> tuple[E, ...]:
    """Return the entries with one of the given statuses, or all entries if `status` is None.

    Raises LookupFailed for an unknown status.
    """
    if status is None:
        return entries
    wanted = {status} if isinstance(status, str) else set(status)
    for word in sorted(wanted - set(STATUSES)):
        raise LookupFailed("no such status", word, f"give one of {', '.join(STATUSES)}")
    return tuple(entry for entry in entries if entry.status in wanted)
