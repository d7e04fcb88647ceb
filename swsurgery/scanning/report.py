"""What a scan found: frozen values that the detectors make, and that tables, figures, manifests and JSON are made of.

Three stages, each optional after the first: a detector lists super activations and candidates (`Candidate`), the
causal test measures them (`Trial`), and the report (`ScanReport`) puts both together. Knows neither torch nor files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from swsurgery.storage.coordinate import Coordinate

Expert = int | Literal["shared"] | None
Method = Literal["activations", "weights"]
Answer = Literal["found", "none", "undecided"]
Verdict = Literal["critical alone", "critical jointly", "inert", "untested"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""In the order in which they are counted. "untested": measured, but there was nothing to judge it by."""


@dataclass(frozen=True)
class PersistentActivation:
    """A residual channel that is massive from `layer` on, through `last`, in `prompts` of the prompts.

    `value` is its largest hidden state by magnitude, signed, at `token` of prompt number `prompt` after layer `peak`.
    """

    layer: int
    last: int
    channel: int
    value: float
    peak: int
    token: int
    prompt: int
    prompts: int

    def to_json(self) -> dict[str, Any]:
        return {key: _plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class Candidate:
    """One scalar that a detector takes for a super weight. What its method does not measure is None.

    `score` is the method's own measure; `rank` is that of its magnitude in its matrix, 1 the largest. From
    activations: `input_spike` = x[col], `output_spike` = y[row] and `share` = x[col] * W[row, col] / y[row] where the
    spike is largest, `prompts` that agree, and `round` 1 for what was found first. From weights: `z`, the robust
    z-score of the score's logarithm among those of all neurons of its layer.
    """

    coordinate: Coordinate
    layer: int
    row: int
    col: int
    expert: Expert
    value: float
    score: float
    rank: int
    z: float | None = None
    input_spike: float | None = None
    output_spike: float | None = None
    share: float | None = None
    prompts: int | None = None
    round: int | None = None

    def to_json(self) -> dict[str, Any]:
        fields = {key: _plain(value) for key, value in vars(self).items() if key != "coordinate"}
        return {"tensor": self.coordinate.tensor, "index": list(self.coordinate.index), **fields}


@dataclass(frozen=True)
class Effect:
    """What zeroing a set of scalars did: patched / base perplexity with its 95% interval, and mean KL in nats.

    `low` and `high` are None if the text has too few windows for an interval.
    """

    ratio: float
    low: float | None
    high: float | None
    kl: float

    def to_json(self) -> dict[str, Any]:
        return {key: _plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class Trial:
    """The causal test of one candidate: zeroed alone, and all others zeroed but not it (None where it is the only
    one). `listed` is False for a companion that no detector named but that shares the column of a candidate."""

    candidate: Candidate
    alone: Effect
    without: Effect | None
    verdict: Verdict
    listed: bool = True


@dataclass(frozen=True)
class JointSet:
    """Scalars that matter together: zeroing all of them does more than their effects alone explain."""

    coordinates: tuple[Coordinate, ...]
    effect: Effect

    def to_json(self) -> dict[str, Any]:
        return {
            "coordinates": [{"tensor": c.tensor, "index": list(c.index)} for c in self.coordinates],
            "effect": self.effect.to_json(),
        }


@dataclass(frozen=True)
class ColumnNull:
    """What zeroing the other large rows of a column does, with which its companions are compared.

    Perplexity ratios, one per row: `alone`, and `added` by the row to the effect of all candidates.
    """

    layer: int
    expert: Expert
    col: int
    alone: tuple[float, ...]
    added: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {key: _plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class Confirmation:
    """The causal test as a whole: trials, all candidates zeroed together, joint sets, and what zeroing random scalars
    of like magnitude in the same matrices does (`null`, perplexity ratios). `windows` of `window_tokens` tokens of text
    were read and `scored_tokens` predictions in them scored."""

    trials: tuple[Trial, ...]
    together: Effect
    joint_sets: tuple[JointSet, ...]
    null: tuple[float, ...]
    base_perplexity: float
    windows: int
    window_tokens: int
    text_sha256: str
    dtype: str
    device: str
    scored_tokens: int
    column_nulls: tuple[ColumnNull, ...] = ()


@dataclass(frozen=True)
class Profile:
    """By layer, over all prompts: the signed value that is largest by magnitude in the input and in the output of the
    down projection and in the residual stream after the layer. NaN where a layer has none. Made before any scalar is
    taken out."""

    inputs: tuple[float, ...]
    outputs: tuple[float, ...]
    residuals: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {key: [_plain(v) for v in values] for key, values in vars(self).items()}


@dataclass(frozen=True)
class UnreadLayer:
    """A layer with matrices that may belong to an MLP and that the scan did not read.

    `experts` are the numbers of those among them that are experts; in `tensors` a * stands for that number.
    """

    layer: int
    experts: tuple[int, ...]
    tensors: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"layer": self.layer, "experts": list(self.experts), "tensors": list(self.tensors)}


@dataclass(frozen=True)
class ScanReport:
    """Everything that one scan says. `notes` are lines for a person, such as why nothing was found. `layers` is the
    number of layers of the model, read or not."""

    method: Method
    model_type: str
    layers: int
    candidates: tuple[Candidate, ...]
    activations: tuple[PersistentActivation, ...] = ()
    profile: Profile | None = None
    prompts: tuple[str, ...] = ()
    confirmation: Confirmation | None = None
    notes: tuple[str, ...] = ()
    unread: tuple[UnreadLayer, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def super_weights(self) -> tuple[Candidate, ...]:
        """What the scan stands for: the critical ones, and the candidates on which no verdict was possible."""
        if self.confirmation is None:
            return self.candidates
        critical = ("critical alone", "critical jointly")
        return tuple(
            t.candidate
            for t in self.confirmation.trials
            if t.verdict in critical or (t.verdict == "untested" and t.listed)
        )

    @property
    def confirmed(self) -> bool:
        """True if the causal test was made, on enough text for verdicts."""
        return self.confirmation is not None and any(t.verdict != "untested" for t in self.confirmation.trials)

    @property
    def answer(self) -> Answer:
        """What the scan answers: "none" only if nothing was left unread."""
        if self.super_weights:
            return "found"
        return "undecided" if self.unread else "none"

    def to_json(self) -> dict[str, Any]:
        trials = {t.candidate.coordinate: t for t in (self.confirmation.trials if self.confirmation else ())}
        tested = [t.candidate for t in trials.values()] or list(self.candidates)
        document: dict[str, Any] = {
            "method": self.method,
            "model_type": self.model_type,
            "layers": self.layers,
            "answer": self.answer,
            "unread": [layer.to_json() for layer in self.unread],
            "super_weights": [_with_trial(c, trials.get(c.coordinate)) for c in self.super_weights],
            "candidates": [_with_trial(c, trials.get(c.coordinate)) for c in tested],
            "super_activations": [a.to_json() for a in self.activations],
            "joint_sets": [s.to_json() for s in (self.confirmation.joint_sets if self.confirmation else ())],
            "notes": list(self.notes),
            "settings": {key: _plain(value) for key, value in self.settings.items()},
        }
        if self.profile:
            document |= {"profile": self.profile.to_json(), "prompts": list(self.prompts)}
        if self.confirmation:
            keys = ("base_perplexity", "windows", "window_tokens", "scored_tokens", "text_sha256", "dtype", "device")
            document["confirmation"] = {
                "together": self.confirmation.together.to_json(),
                "null_ratios": [_plain(ratio) for ratio in self.confirmation.null],
                "column_nulls": [column.to_json() for column in self.confirmation.column_nulls],
                **{key: _plain(getattr(self.confirmation, key)) for key in keys},
            }
        return document


@dataclass(frozen=True)
class SweepPoint:
    """The model with the swept scalars at `factor` times their stored values. KL(base || this) is in nats; `peak` is
    the signed largest hidden state after any layer (NaN where the model has no layers to look at)."""

    factor: float
    perplexity: float
    ratio: float
    kl: float
    stopword_mass: float
    finite: bool
    peak: float

    def to_json(self) -> dict[str, Any]:
        return {key: _plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class SweepReport:
    """Quality as a function of the factor; `base` is the same at factor 1, as stored."""

    coordinates: tuple[Coordinate, ...]
    base: SweepPoint
    points: tuple[SweepPoint, ...]
    windows: int
    window_tokens: int
    text_sha256: str
    dtype: str
    device: str
    method: str
    scored_tokens: int

    def to_json(self) -> dict[str, Any]:
        return {
            "coordinates": [{"tensor": c.tensor, "index": list(c.index)} for c in self.coordinates],
            "base": self.base.to_json(),
            "points": [point.to_json() for point in self.points],
            **{
                key: getattr(self, key)
                for key in (
                    "windows",
                    "window_tokens",
                    "scored_tokens",
                    "text_sha256",
                    "dtype",
                    "device",
                    "method",
                )
            },
        }


def _with_trial(candidate: Candidate, trial: Trial | None) -> dict[str, Any]:
    if trial is None:
        return candidate.to_json()
    return candidate.to_json() | {
        "verdict": trial.verdict,
        "alone": trial.alone.to_json(),
        "without": trial.without.to_json() if trial.without else None,
        "listed": trial.listed,
    }


def _plain(value: Any) -> Any:
    """For strict JSON: what is not finite becomes a string."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value
