"""Define what the causal tests of scalars, experts and parts share (confirm.py, confirm_experts.py, confirm_parts.py).

A bar is the effect that zeroing a part of the model must exceed to count as critical. This module contains the options
and limits of all tests, runs them on a text, and computes the bar from random parts. It must not choose parts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypedDict, TypeVar

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError
from swsurgery.model import load, tokens
from swsurgery.model.cutting import CutText, cut_text
from swsurgery.model.forward import LayeredModel
from swsurgery.model.intervals import LEAST_WINDOWS
from swsurgery.model.protocol import DEFAULT_PROTOCOL, Protocol
from swsurgery.model.text import choose_text
from swsurgery.model.windows import cut_text_windows
from swsurgery.progress import Progress
from swsurgery.scanning.causal_report import AnyTest, Families
from swsurgery.scanning.losses import Losses, Unit, compute_exp
from swsurgery.scanning.run_options import RunOptions
from swsurgery.storage.numbers import format_number

INERT = 1.05
"""Maximum perplexity ratio (without the scalar / with it) of an inert scalar. docs/known.md uses the same limit."""

PAIRS = 28
"""Maximum number of pairs of scalars that are tested. Eight candidates have 28 pairs."""

CONTEXT_NULLS = 6
"""Maximum number of null scalars that are also zeroed together with all candidates. The model may already be broken
without the candidates, and then any further change has a larger effect."""

Say = Callable[[str], None]

Windows = Sequence[Sequence[int]]
"""The token ids of each window of a text."""

Listed = TypeVar("Listed")
Result = TypeVar("Result", bound=AnyTest)


class TestConditions(TypedDict):
    """The fields of a CausalTest that state how it was measured."""

    base_perplexity: float
    windows: int
    window_tokens: int
    text_sha256: str
    dtype: str
    device: str
    scored_tokens: int
    protocol: Protocol
    families: Families


class NullTexts(NamedTuple, Generic[Unit]):
    """The words in which random parts of the model are described to the user.

    `alone` and `joint` state that such parts have effects, and `describe` names one of them.
    """

    alone: str
    joint: str
    describe: Callable[[Unit], str]


def say_nothing(line: str) -> None:
    """Discard a line for the user; the default of `say`."""


@dataclass(frozen=True)
class CausalOptions:
    """The options of a causal test, for units of any kind.

    `nulls` is the maximum number of random units that are zeroed for comparison; `seed` draws them. `progress` receives
    the progress of each run of the model, and `say` receives lines for the user. `others` contains the numbers of
    effects of the same scan that are tested elsewhere.
    """

    nulls: int = 16
    seed: int = 0
    progress: Progress | None = None
    say: Say = say_nothing
    others: Families = Families()


DEFAULT_OPTIONS = CausalOptions()


def refuse_text(checkpoint: Checkpoint, text: str | None, protocol: Protocol) -> None:
    """Raise ModelError if the tokenizer cannot be loaded, or if `text` is too short to fill one window.

    The scan calls this before it loads the model.
    """
    with load.hide_output():
        tokenizer = load.load_tokenizer(checkpoint.directory)
        cut_text(tokens.encode_text(tokenizer, choose_text(text, protocol), protocol))


@dataclass(frozen=True)
class Bench:
    """A loaded model and the windows of a text, on which causal tests are run."""

    model: LayeredModel
    cut: CutText

    def run(
        self,
        test: Callable[[LayeredModel, Sequence[Listed], Windows, CausalOptions], Result],
        listed: Sequence[Listed],
        options: CausalOptions = DEFAULT_OPTIONS,
    ) -> Result:
        """Run a test, such as `confirm_scalars`, of the units in `listed`. Raises ModelError as the test describes."""
        found = test(self.model, listed, self.cut.windows, options)
        return dataclasses.replace(
            found,
            window_tokens=self.cut.window_tokens,
            text_sha256=self.cut.sha256,
            protocol=self.cut.protocol,
        )


@contextmanager
def open_bench(checkpoint: Checkpoint, options: RunOptions, say: Say = say_nothing) -> Iterator[Bench]:
    """Load the model of a checkpoint for causal tests, and cut the text of `options` as `check.run_checks` does.

    Raises ModelError if the tokenizer or the model cannot be loaded.
    """
    with load.hide_output():
        tokenizer = load.load_tokenizer(checkpoint.directory)
        model = load.open_model(checkpoint, say=say, **options.on_device)
        yield Bench(model, cut_text_windows(model.model, tokenizer, options.text, options.protocol))


def refuse_untestable(candidates: Sequence[object], windows: Windows) -> None:
    """Raise ModelError if there is no candidate or no window, or if a window has fewer than two tokens."""
    if not candidates:
        raise ModelError("nothing to confirm: the list of candidates is empty")
    if not windows or any(len(window) < 2 for window in windows):
        raise ModelError(
            "no windows, or a window is too short",
            f"{len(windows)} windows",
            "give at least one window, each of at least two tokens",
        )


def list_conditions(losses: Losses[Unit], families: Families) -> TestConditions:
    """Return how the losses were measured, and how many effects were tested.

    `Bench.run` adds the digest of the text and the protocol.
    """
    return TestConditions(
        base_perplexity=losses.base_perplexity,
        windows=len(losses.windows),
        window_tokens=max(map(len, losses.windows)),
        text_sha256="",
        dtype=str(losses.model.dtype).removeprefix("torch."),
        device=load.get_device_name(losses.model.device),
        scored_tokens=sum(losses.scored),
        protocol=DEFAULT_PROTOCOL,
        families=families,
    )


def report_too_few_windows(losses: Losses[Unit], say: Say) -> Say:
    """Tell the user if there are fewer than LEAST_WINDOWS windows without overlap, and what to do.

    Returns the function that receives further lines about effects: `say`, or `say_nothing` if windows are too few.
    """
    if losses.enough:
        return say
    count = len(losses.scored)
    have = f"{count} window{'' if count == 1 else 's'}{'' if count == len(losses.windows) else ' without overlap'}"
    remedy = f"a verdict needs {LEAST_WINDOWS}: give a longer --text, more --windows or a shorter --window"
    say(f"too little text for intervals and verdicts: {have} ({remedy})")
    return say_nothing


def compute_floors(
    losses: Losses[Unit],
    together: frozenset[Unit],
    null: Iterable[Unit],
    crowded: Iterable[Unit],
    texts: NullTexts[Unit],
    say: Say,
) -> tuple[float, float]:
    """Compute two bars: for the effect of a unit, and for the effect of a group beyond that of its parts.

    Both are logarithms of perplexity ratios, computed from the effects of the random units in `null`. The units in
    `crowded` were also zeroed with all candidates, `together`. The first bar is at least the outer fence of the effects
    of random units: the third quartile plus three times the distance between the quartiles (J. W. Tukey, Exploratory
    Data Analysis, 1977). The largest of these effects would be a worse bar: one of the random units may be critical,
    and its effect would then hide the candidates. `say` receives a line about such a unit.
    """
    alone = {unit: losses.gain(frozenset({unit})) for unit in null}
    floor = max(math.log(INERT), compute_outer_fence([gain.log for gain in alone.values()]))
    if floor > math.log(INERT):
        say(f"{texts.alone}: only ratios above {format_number(compute_exp(floor), 3)} count")
    for unit, gain in alone.items():
        if gain.low > floor:
            ratio = f"x{format_number(compute_exp(gain.log), 3)} without it"
            name = texts.describe(unit)
            say(f"needed alone, but not a candidate: {name} (drawn for comparison; perplexity is {ratio})")
    common = [
        losses.gain(together | {unit}, [together, frozenset({unit})]).log
        for unit in crowded
        if alone[unit].low <= floor
    ]
    # An infinite value is ignored: the model without the candidates has infinite losses, so nothing can be compared.
    joint_floor = max([floor, *filter(math.isfinite, common)])
    if joint_floor > floor:
        say(f"{texts.joint}: only joint effects above x{format_number(compute_exp(joint_floor), 3)} count")
    return floor, joint_floor


def compute_outer_fence(values: Sequence[float]) -> float:
    """Compute the third quartile plus three times the distance between the quartiles; -inf without values."""
    if not values:
        return -math.inf
    low, high = (sorted(values)[round(share * (len(values) - 1))] for share in (0.25, 0.75))
    return high + 3 * (high - low) if math.isfinite(high) else math.inf
