"""Define the results of a scan for super experts.

All results are frozen. This module must not import torch and reads no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from swsurgery.scanning.causal_report import (
    EFFECT_COLUMNS,
    CausalTest,
    Effect,
    UnitTrial,
    convert_to_plain,
    make_row,
    merge_trial,
)
from swsurgery.scanning.report import Answer, Candidate, Scan

ExpertName: TypeAlias = tuple[int, int | Literal["shared"]]
"""The layer and the number of a routed expert, or "shared" for the expert that processes every token."""


@dataclass(frozen=True)
class ExpertCandidate:
    """One expert whose down projection has a large enough output to be a super expert.

    `output` is the signed output of largest magnitude, before the router's weight. It occurs in channel `row` at
    `token` of prompt number `prompt`. `prompts` is the number of prompts in which the expert has an output above both
    bars. `state` is the largest magnitude of the hidden state at the same token and channel after this layer or a later
    one, in medians of that layer. `cause` is the scalar with the largest share of the output. The score of `cause` is
    the magnitude of what it adds to the output.
    """

    layer: int
    expert: int | Literal["shared"]
    output: float
    row: int
    token: int
    prompt: int
    prompts: int
    state: float
    cause: Candidate

    @property
    def name(self) -> ExpertName:
        return self.layer, self.expert

    @property
    def unit(self) -> ExpertName:
        return self.name

    def to_json(self) -> dict[str, Any]:
        fields = {key: convert_to_plain(value) for key, value in vars(self).items() if key != "cause"}
        return fields | {"cause": self.cause.to_json()}


@dataclass(frozen=True)
class ExpertMaximum:
    """The signed output of largest magnitude of one expert's down projection, over all tokens of all prompts."""

    layer: int
    expert: int | Literal["shared"]
    output: float

    def to_json(self) -> dict[str, Any]:
        return {key: convert_to_plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class ExpertTrial(UnitTrial[ExpertCandidate]):
    """The causal test of one expert."""


@dataclass(frozen=True)
class ExpertJointSet:
    """Experts that matter together: zeroing all of them has more effect than the product of their single effects."""

    experts: tuple[ExpertName, ...]
    effect: Effect

    @property
    def units(self) -> tuple[ExpertName, ...]:
        return self.experts

    def to_json(self) -> dict[str, Any]:
        experts = [{"layer": layer, "expert": expert} for layer, expert in self.experts]
        return {"experts": experts, "effect": self.effect.to_json()}


@dataclass(frozen=True)
class ExpertConfirmation(CausalTest[ExpertTrial, ExpertJointSet]):
    """The causal test of experts.

    The experts of `null` are random experts of the same layers. `joint_null` contains one ratio for each random set
    with as many experts in each layer as the candidates, zeroed together.
    """

    joint_null: tuple[float, ...] = ()

    def list_further_nulls(self) -> dict[str, Any]:
        return {"joint_null_ratios": convert_to_plain(self.joint_null)}


@dataclass(frozen=True, repr=False)
class ExpertScan(Scan):
    """The result of one scan for super experts.

    `experts` contains the candidates, the largest output first, and `largest` the experts with the largest outputs
    whether they are candidates or not. The fields of single scalars, such as `candidates`, are empty.
    """

    experts: tuple[ExpertCandidate, ...] = ()
    largest: tuple[ExpertMaximum, ...] = ()
    expert_confirmation: ExpertConfirmation | None = None
    shown: ClassVar[tuple[str, ...]] = ("answer", "super_experts")

    @property
    def super_experts(self) -> tuple[ExpertCandidate, ...]:
        """The critical experts and those without a verdict; all candidates if there was no causal test."""
        if self.expert_confirmation is None:
            return self.experts
        return tuple(t.candidate for t in self.expert_confirmation.trials if t.verdict != "inert")

    @property
    def confirmed(self) -> bool:
        """True if there was a causal test with enough text for verdicts."""
        return self.expert_confirmation is not None and self.expert_confirmation.has_verdicts

    @property
    def answer(self) -> Answer:
        """The answer of the scan. If nothing was found it is "none" or, if a layer was not read, "undecided"."""
        return "found" if self.super_experts else super().answer

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per candidate: its place, output, state and verdict, and the effect of zeroing it alone."""
        return [make_row(self.list_columns(), entry) for entry in self.to_json()["experts"]]

    def list_columns(self) -> tuple[str, ...]:
        """Return the keys of the rows."""
        return ("layer", "expert", "output", "row", "token", "prompts", "state", "verdict", *EFFECT_COLUMNS)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `scan --method experts --json` prints."""
        test = self.expert_confirmation
        trials = {t.candidate.name: t for t in (test.trials if test else ())}
        document = super().to_json() | {
            "super_experts": [merge_trial(e, trials.get(e.name)) for e in self.super_experts],
            "experts": [merge_trial(e, trials.get(e.name)) for e in self.experts],
            "largest": [one.to_json() for one in self.largest],
            "joint_sets": [s.to_json() for s in (test.joint_sets if test else ())],
        }
        return document | {"confirmation": test.to_json()} if test else document
