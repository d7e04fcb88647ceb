"""Describe the documents of `lookup`."""

from __future__ import annotations

from swsurgery.cli.documents.document import ABSENT, Document, DocumentPart, ExpertNumber


class SourceItem(DocumentPart):
    """A source: its kind, its citation and its commit."""

    kind: str
    cite: str
    commit: str | None
    measured_on: str | None
    note: str | None


class ConditionsItem(DocumentPart):
    """The conditions of a scan's measurement."""

    text_sha256: str
    windows: int
    window_tokens: int
    scored_tokens: int = ABSENT
    protocol: str = ABSENT
    dtype: str
    device: str


class MeasuredEffect(DocumentPart):
    """A measurement before and after an edit. Fields without a value are absent. "inf" stands for infinity."""

    protocol: str
    metric: str
    before: float | str = ABSENT
    after: float | str = ABSENT
    ratio: float | str = ABSENT
    ci95: tuple[float, float] = ABSENT
    kl: float = ABSENT
    conditions: ConditionsItem = ABSENT
    measured_on: str = ABSENT
    dose: list[tuple[float, float]] = ABSENT
    dose_ratio: list[tuple[float, float]] = ABSENT
    note: str = ABSENT
    source: str


class IndependentGroups(DocumentPart):
    """The numbers of independent groups that reported the location and the value."""

    location: int
    value: int


class KnownScalarItem(DocumentPart):
    """One known super weight. `col` is null if only the row was published."""

    id: str
    layer: int
    row: int
    col: int | None
    expert: ExpertNumber
    tensor: str
    value: float | None
    dtype: str | None
    value_printed: str | None
    status: str
    causal_alone: str
    causal_scope: str
    role: str | None
    independent: IndependentGroups
    note: str | None
    own: bool
    located_by: list[str]
    value_read_by: list[str]
    effects: list[MeasuredEffect]
    sources: list[str]


class KnownPartItem(DocumentPart):
    """An expert or a column that was published as a whole. `col` exists for a column."""

    id: str
    layer: int
    status: str
    causal_alone: str
    note: str | None
    expert: ExpertNumber
    col: int = ABSENT
    effects: list[MeasuredEffect]
    sources: list[str]


class KnownJointItem(DocumentPart):
    """Coordinates that were edited together, and the effects."""

    name: str | None
    coordinates: list[str]
    note: str | None
    effects: list[MeasuredEffect]


class KnownActivationItem(DocumentPart):
    """The largest activation that was published."""

    value: float
    layer: int | None
    place: str
    from_layer: int | None
    measured_on: str | None
    fits_float16: bool
    source: str


class NegativeItem(DocumentPart):
    """Models in which a search or a test found nothing."""

    hf_ids: list[str]
    finding: str
    cite: str


class KnownModelItem(DocumentPart):
    """A known model with its sizes, super weights and sources."""

    hf_id: str
    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_experts: int | None
    vocab_size: int | None
    tensor: str
    transposed: bool
    revision_measured: str | None
    sizes_from: str
    slug: str
    own: bool
    aliases: list[str]
    coordinates: list[KnownScalarItem]
    experts: list[KnownPartItem]
    columns: list[KnownPartItem]
    joint_sets: list[KnownJointItem]
    effects: list[MeasuredEffect]
    max_activation: KnownActivationItem | None
    disputes: list[str]
    notes: list[str]
    sources: dict[str, SourceItem]
    negative_results: list[NegativeItem]


class KnownModelDocument(Document):
    """The known super weights of one model. `models` has one entry."""

    models: list[KnownModelItem]


class ListedModel(DocumentPart):
    """A known model: the numbers of its super weights, and how many have each status."""

    name: str
    model: str
    own: bool
    coordinates: int
    experts: int
    columns: int
    status: str | None
    max_activation: float | None
    fits_float16: bool | None
    statuses: dict[str, dict[str, int]]


class ModelListDocument(Document):
    """All known models."""

    models: list[ListedModel]


class ModulesDocument(Document):
    """The modules of a model that contain its super weights."""

    model: str
    modules: list[str]


class ForgottenDocument(Document):
    """The file with your own entry that was removed."""

    forgotten: str
