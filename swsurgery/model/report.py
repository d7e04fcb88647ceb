"""Report the result of the sanity check: the figures of base and patched, and whether they are within the bounds.

The bounds come from the manifest or the command line. The record (swsurgery.json) contains the result of `to_record`.
This module must not depend on torch or on models.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from swsurgery.model.bounds import CheckedBounds
from swsurgery.model.controls import ControlResult
from swsurgery.model.protocol import DEFAULT_PROTOCOL, Protocol
from swsurgery.model.tasks.report import TaskReport
from swsurgery.storage.numbers import round_number
from swsurgery.storage.result import Result

ENOUGH_TOKENS = 500
"""Number of scored tokens below which a report contains a note that its figures are uncertain."""


@dataclass(frozen=True)
class SuperActivation:
    """The hidden state of largest magnitude after any decoder layer, over the whole text (arXiv:2411.07191).

    `token` is its position in the input, including BOS, and `window` the number of the window; both count from 0. A
    non-finite value counts as larger than any finite one.
    """

    layer: int
    token: int
    channel: int
    value: float
    window: int


@dataclass(frozen=True)
class Side:
    """The figures of one model, base or patched.

    `stopword_mass` is the mean probability of all stop words together. `finite` is True if every logit of the text and
    the prompts was finite. `super_activation` is None if the model has no list of decoder layers. `largest_by_layer`
    contains the hidden state of largest magnitude after each layer, with its sign, over the whole text.
    `word_perplexity` is exp of the negative log-likelihood per word; None if the protocol does not count words.
    """

    perplexity: float
    stopword_mass: float
    finite: bool
    super_activation: SuperActivation | None
    largest_by_layer: tuple[float, ...] = ()
    word_perplexity: float | None = None


@dataclass(frozen=True)
class Continuations:
    """The most likely next tokens after a prompt, from base and from patched, each as (text, probability).

    The most likely token is first. The tuple of a model is empty if a logit after the prompt is not finite.
    """

    prompt: str
    base: tuple[tuple[str, float], ...]
    patched: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Generation:
    """The greedy continuations of a prompt by base and by patched, without the prompt.

    `base` is None if there was no base to compare with.
    """

    prompt: str
    base: str | None
    patched: str


@dataclass(frozen=True)
class RoundedSide:
    """The figures of one model with the inputs of its linear layers rounded (arXiv:2411.07191, section 4.1).

    `side` is "base" or "patched", and `activations` describes the rounding. `ratio` is the perplexity divided by that
    of the base with exact activations, and `kl` the mean KL from that base in nats per token.
    """

    side: str
    activations: str
    perplexity: float
    ratio: float
    kl: float
    stopword_mass: float
    finite: bool


@dataclass(frozen=True, repr=False)
class CheckReport(Result):
    """The figures of the forward check, how they were measured, and the verdict.

    `kl` is the mean KL(base || patched) per scored token in nats. `ratio_low` and `ratio_high` are the ends of the 95%
    interval of `perplexity_ratio`, or None if the text has fewer than eight windows. The text had `windows` windows of
    at most `window_tokens` tokens, in which `scored_tokens` predictions were scored by `protocol`, and `words` words if
    the protocol counts them. If there was no base to compare with, `compared` is False and `base` equals `patched`.
    `method` is "layer by layer" (both models side by side), "streamed" (side by side with two layers at a time in
    memory) or "whole passes" (one model after the other). The report contains no date and no duration, so the same
    inputs give the same report.
    """

    base: Side
    patched: Side
    perplexity_ratio: float
    kl: float
    prompts: tuple[Continuations, ...]
    windows: int
    window_tokens: int
    scored_tokens: int
    text_sha256: str
    method: str
    device: str
    dtype: str
    torch: str
    transformers: str
    bounds: CheckedBounds = field(default_factory=CheckedBounds)
    compared: bool = True
    rounded: tuple[RoundedSide, ...] = ()
    ratio_low: float | None = None
    ratio_high: float | None = None
    generations: tuple[Generation, ...] = ()
    tasks: TaskReport | None = None
    protocol: Protocol = DEFAULT_PROTOCOL
    words: int | None = None
    controls: tuple[ControlResult, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What limits the figures, one line each; usually empty."""
        if self.scored_tokens >= ENOUGH_TOKENS:
            return ()
        few = f"only {self.scored_tokens} tokens were scored, so the figures are uncertain"
        return (f"{few} (give a longer text or more windows: at least {ENOUGH_TOKENS} tokens)",)

    @property
    def failures(self) -> tuple[str, ...]:
        """The reasons to reject the patched model, one line each; empty if it passed.

        Non-finite logits of the patched model always fail. A non-finite perplexity ratio fails every bound; non-finite
        logits of the base also make the ratio non-finite.
        """
        lines = []
        # Weaker edits help only if the logits of the base are finite.
        sound = self.base.finite or not self.compared
        base_fault = "those of the base are not finite either, so check the base: verify --finite"
        if not self.patched.finite and self.compared:
            remedy = "weaken the edits" if sound else base_fault
            lines.append(f"logits of the patched model are not finite: text or prompts ({remedy})")
        elif not self.patched.finite:
            lines.append("logits of the model are not finite: text or prompts (search its weights: verify --finite)")
        ratio, most, least = self.perplexity_ratio, self.bounds.max_perplexity_ratio, self.bounds.min_perplexity_ratio
        # A NaN must fail, and every comparison with it is false.
        if most is not None and not (math.isfinite(ratio) and ratio <= most):
            lines.append(
                f"perplexity ratio above the bound: {ratio:.6g}, at most {most:g} allowed "
                f"({'weaken the edits or raise max_perplexity_ratio' if sound else base_fault})"
            )
        if least is not None and not (math.isfinite(ratio) and ratio >= least):
            lines.append(
                f"perplexity ratio below the bound: {ratio:.6g}, at least {least:g} wanted "
                f"({'strengthen the edits or lower min_perplexity_ratio' if sound else base_fault})"
            )
        return tuple(lines)

    @property
    def ok(self) -> bool:
        """True if the patched model passed, so that `failures` is empty."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Return the document that `check --json` prints: that of `to_record`, always with the field `compared`."""
        return self.to_record() | {"compared": self.compared}

    def to_record(self) -> dict[str, Any]:
        """Return the report as the record contains it, in types of strict JSON.

        Figures have 6 significant digits, because further digits depend on the number of threads, which changes the
        order of float32 sums. NaN and infinities, which JSON does not have, become None. If there was no base to
        compare with, `compared` is false and the figures that need a base are null or empty. Otherwise the field
        `compared` is absent, so that the bytes of existing records do not change.
        """
        prompts = [
            {"prompt": p.prompt, "base": _encode_tokens(p.base), "patched": _encode_tokens(p.patched)}
            for p in self.prompts
        ]
        document: dict[str, Any] = {
            "base": _encode_side(self.base),
            "patched": _encode_side(self.patched),
            "perplexity_ratio": _encode_number(self.perplexity_ratio),
            "ratio_low": _encode_number(self.ratio_low),
            "ratio_high": _encode_number(self.ratio_high),
            "kl": _encode_number(self.kl),
            "stopword_mass": {
                "base": _encode_number(self.base.stopword_mass),
                "patched": _encode_number(self.patched.stopword_mass),
            },
            "prompts": prompts,
            "text": {
                "sha256": self.text_sha256,
                "windows": self.windows,
                "window_tokens": self.window_tokens,
                "scored_tokens": self.scored_tokens,
                "protocol": self.protocol.to_json(),
                **({"words": self.words} if self.words else {}),
            },
            "bounds": {
                name: bound if bound is not None and math.isfinite(bound) else None
                for name, bound in asdict(self.bounds).items()
            },
            "failures": list(self.failures),
            "ok": self.ok,
            "method": self.method,
            "device": self.device,
            "dtype": self.dtype,
            "versions": {"torch": self.torch, "transformers": self.transformers},
        }
        if self.rounded:
            document["rounded_activations"] = [
                {key: _encode_number(v) if isinstance(v, float) else v for key, v in vars(side).items()}
                for side in self.rounded
            ]
        if self.generations:
            document["generations"] = [dict(vars(each)) for each in self.generations]
        if self.tasks is not None:
            document["tasks"] = self.tasks.to_json()
        if self.controls:
            document["controls"] = [control.to_json() for control in self.controls]
        if self.notes:
            document["notes"] = list(self.notes)
        if not self.compared:
            names = ("base", "perplexity_ratio", "ratio_low", "ratio_high", "kl")
            document |= {"compared": False, **dict.fromkeys(names)}
            document["stopword_mass"] = {"base": None, "patched": _encode_number(self.patched.stopword_mass)}
            document["prompts"] = [{**prompt, "base": []} for prompt in prompts]
        return document


def _encode_number(value: float | None) -> float | None:
    return round_number(value) if value is not None and math.isfinite(value) else None


def _encode_side(side: Side) -> dict[str, Any]:
    peak = side.super_activation
    return {
        "perplexity": _encode_number(side.perplexity),
        **({} if side.word_perplexity is None else {"word_perplexity": _encode_number(side.word_perplexity)}),
        "finite": side.finite,
        "super_activation": peak
        and {
            "layer": peak.layer,
            "token": peak.token,
            "channel": peak.channel,
            "value": _encode_number(peak.value),
            "window": peak.window,
        },
        "largest_by_layer": [_encode_number(value) for value in side.largest_by_layer],
    }


def _encode_tokens(tokens: tuple[tuple[str, float], ...]) -> list[list[Any]]:
    return [[token, _encode_number(probability)] for token, probability in tokens]
