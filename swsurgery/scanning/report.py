"""Define the results of scans and sweeps, from which tables, figures, manifests and JSON are made.

A detector lists super activations and candidates (`Candidate`), the causal test, if it is run, measures them
(`Trial`), and `ScanReport` contains both. All results are frozen. This module must not import torch and reads no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from swsurgery.checkpoint.architectures import ExpertChoice
from swsurgery.storage.coordinate import Coordinate

Method = Literal["activations", "weights"]
Answer = Literal["found", "none", "undecided"]
Verdict = Literal["critical alone", "critical jointly", "inert", "untested"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""All verdicts, in the order in which they are counted. "untested" means that the measurement allowed no verdict."""


@dataclass(frozen=True)
class PersistentActivation:
    """A residual channel that is massive from `layer` through `last`.

    `value` is its signed hidden state with the largest magnitude, at `token` of prompt number `prompt` after layer
    `peak`. `prompts` is the number of prompts in which the channel is massive.
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
        return {key: _to_plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class Candidate:
    """One scalar that a detector lists as a possible super weight.

    `score` is the method's own measure, and `rank` that of its magnitude in its matrix, 1 for the largest. Fields that
    the method does not measure are None. From activations: `input_spike` = x[col], `output_spike` = y[row] and `share`
    = x[col] * W[row, col] / y[row] for the prompt with the largest score, the number of `prompts` that agree, and the
    `round` in which it was found, counted from 1. From weights: `z`, the robust z-score of the score's logarithm among
    those of all neurons of its layer.
    """

    coordinate: Coordinate
    layer: int
    row: int
    col: int
    expert: ExpertChoice
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
        fields = {key: _to_plain(value) for key, value in vars(self).items() if key != "coordinate"}
        return {"tensor": self.coordinate.tensor, "index": list(self.coordinate.index), **fields}


@dataclass(frozen=True)
class Effect:
    """The effect of zeroing a set of scalars: patched / base perplexity with its 95% interval, and mean KL in nats.

    `low` and `high` are None if the text has too few windows for an interval.
    """

    ratio: float
    low: float | None
    high: float | None
    kl: float

    def to_json(self) -> dict[str, Any]:
        return {key: _to_plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class Trial:
    """The causal test of one candidate.

    `alone` is the effect of zeroing it, and `without` that of zeroing all other candidates (None if it is the only
    one). `listed` is False for a companion, which no detector lists but which is in the column of a candidate.
    """

    candidate: Candidate
    alone: Effect
    without: Effect | None
    verdict: Verdict
    listed: bool = True


@dataclass(frozen=True)
class JointSet:
    """Scalars that matter together: zeroing all of them has more effect than the product of their single effects."""

    coordinates: tuple[Coordinate, ...]
    effect: Effect

    def to_json(self) -> dict[str, Any]:
        return {
            "coordinates": [{"tensor": c.tensor, "index": list(c.index)} for c in self.coordinates],
            "effect": self.effect.to_json(),
        }


@dataclass(frozen=True)
class ColumnNull:
    """The effects of zeroing the other large rows of a column, with which its companions are compared.

    Both are perplexity ratios, one per row: of the row `alone`, and `added` by the row to the effect of all candidates.
    """

    layer: int
    expert: ExpertChoice
    col: int
    alone: tuple[float, ...]
    added: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {key: _to_plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class Confirmation:
    """The whole causal test.

    `together` is the effect of zeroing all candidates. `null` contains the perplexity ratios for zeroing random scalars
    of similar magnitude in the same matrices, one at a time. The text had `windows` windows of `window_tokens` tokens,
    in which `scored_tokens` predictions were scored.
    """

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
    """The largest values in each layer of the unedited model, over all prompts.

    Each is the signed value with the largest magnitude, by layer: in the input and in the output of the down
    projection, and in the residual stream after the layer. NaN means that the layer has no such value.
    """

    inputs: tuple[float, ...]
    outputs: tuple[float, ...]
    residuals: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {key: [_to_plain(v) for v in values] for key, values in vars(self).items()}


@dataclass(frozen=True)
class UnreadLayer:
    """A layer with matrices that may belong to an MLP and that the scan did not read.

    `experts` are the numbers of the unread experts. In the names `tensors`, * replaces that number.
    """

    layer: int
    experts: tuple[int, ...]
    tensors: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"layer": self.layer, "experts": list(self.experts), "tensors": list(self.tensors)}


@dataclass(frozen=True)
class ScanReport:
    """The result of one scan.

    `notes` are lines for the user, such as the reason why nothing was found. `layers` is the number of layers of the
    model, including those that were not read.
    """

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
        """The critical scalars, and the candidates on which no verdict was possible."""
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
        """True if the causal test was run, on enough text for verdicts."""
        return self.confirmation is not None and any(t.verdict != "untested" for t in self.confirmation.trials)

    @property
    def answer(self) -> Answer:
        """The answer of the scan; "none" only if every layer was read."""
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
            "super_weights": [_merge_trial(c, trials.get(c.coordinate)) for c in self.super_weights],
            "candidates": [_merge_trial(c, trials.get(c.coordinate)) for c in tested],
            "super_activations": [a.to_json() for a in self.activations],
            "joint_sets": [s.to_json() for s in (self.confirmation.joint_sets if self.confirmation else ())],
            "notes": list(self.notes),
            "settings": {key: _to_plain(value) for key, value in self.settings.items()},
        }
        if self.profile:
            document |= {"profile": self.profile.to_json(), "prompts": list(self.prompts)}
        if self.confirmation:
            keys = ("base_perplexity", "windows", "window_tokens", "scored_tokens", "text_sha256", "dtype", "device")
            document["confirmation"] = {
                "together": self.confirmation.together.to_json(),
                "null_ratios": [_to_plain(ratio) for ratio in self.confirmation.null],
                "column_nulls": [column.to_json() for column in self.confirmation.column_nulls],
                **{key: _to_plain(getattr(self.confirmation, key)) for key in keys},
            }
        return document


@dataclass(frozen=True)
class SweepPoint:
    """The measurements of the model with the swept scalars at `factor` times their stored values.

    `kl` is KL(base || this) in nats per token. `peak` is the signed hidden state with the largest magnitude after any
    layer (NaN if the model's layers cannot be observed).
    """

    factor: float
    perplexity: float
    ratio: float
    kl: float
    stopword_mass: float
    finite: bool
    peak: float

    def to_json(self) -> dict[str, Any]:
        return {key: _to_plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class SweepReport:
    """The quality of a model as a function of the factor; `base` is the model as stored."""

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


def _merge_trial(candidate: Candidate, trial: Trial | None) -> dict[str, Any]:
    if trial is None:
        return candidate.to_json()
    return candidate.to_json() | {
        "verdict": trial.verdict,
        "alone": trial.alone.to_json(),
        "without": trial.without.to_json() if trial.without else None,
        "listed": trial.listed,
    }


def _to_plain(value: object) -> Any:
    """Convert a value to strict JSON: numbers that are not finite become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_to_plain(v) for v in value]
    return value
