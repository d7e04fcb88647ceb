"""Test causally which candidates of a scan matter: zero them and measure the model's perplexity.

Each candidate is zeroed alone and in pairs. All candidates are zeroed together, and all candidates but one. For
comparison, null scalars are zeroed: random scalars of the same matrices with similar magnitudes. All of these variants
of the model run at once, or in several runs if memory requires it.

Companions are tested too. A companion is an outlier in a candidate's column of the down projection that no detector
lists. Llama-2-7B's best known super weight has little effect when it is zeroed without its companion (docs/known.md).
If the input of a column is very large, any large scalar of the column may change the loss. A companion is therefore
compared with the other large scalars of its column.

A bar is the effect that a scalar must exceed to count as critical. This module measures losses, sets the bars and
decides the verdicts. `suspects.py` chooses the companions and the null scalars, and `model/intervals.py` computes
intervals. This module does not search for candidates and prints nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, NamedTuple, TypeVar

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError
from swsurgery.model import Placement, load, measure
from swsurgery.model.check import read_built_in_text
from swsurgery.model.forward import LayeredModel
from swsurgery.model.intervals import LEAST_WINDOWS, compute_mean_interval, compute_prediction_bound
from swsurgery.model.variant import Scalars
from swsurgery.model.windows import count_variants_at_once, cut_text_windows
from swsurgery.progress import Progress
from swsurgery.scanning.matrices import find_projections
from swsurgery.scanning.report import Candidate, ColumnNull, Confirmation, Effect, JointSet, Trial, Verdict
from swsurgery.scanning.suspects import (
    Column,
    choose_column_rows,
    draw_nulls,
    find_companions,
    find_minor_scalars,
    get_column,
)
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.numbers import format_number
from swsurgery.storage.region import Region

INERT = 1.05
"""Maximum perplexity ratio (without the scalar / with it) of an inert scalar. docs/known.md uses the same limit."""

LEAST_ROWS = 3
"""Minimum number of other large scalars in a companion's column. With fewer, the companion gets no verdict."""

PAIRS = 28
"""Maximum number of pairs of scalars that are tested. Eight candidates have 28 pairs."""

CONTEXT_NULLS = 6
"""Maximum number of null scalars that are also zeroed together with all candidates. The model may already be broken
without the candidates, and then any further change has a larger effect."""

Zeroed = frozenset[Coordinate]
"""A set of scalars that are zeroed together. The empty set stands for the model as stored."""

Unit = TypeVar("Unit", bound=Hashable)
"""A part of the model that is zeroed or kept as a whole: a scalar, or an expert."""

Say = Callable[[str], None]


def _ignore(line: str) -> None:
    """Discard a line for the user; the default of `say`."""


def confirm(
    checkpoint: Checkpoint,
    candidates: Sequence[Candidate],
    *,
    text: str | None = None,
    device: str = "auto",
    placement: Placement = "auto",
    windows: int = 16,
    window: int = 512,
    nulls: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    say: Say = _ignore,
) -> Confirmation:
    """Test `candidates` on the first `windows` windows of `window` tokens of `text` (None: the built-in text).

    The text is cut into windows and scored as by `check.run_checks`. `confirm_windows` describes the test and the other
    arguments. Raises ModelError if the tokenizer or the model cannot be loaded or run.
    """
    text = read_built_in_text() if text is None else text
    with load.hide_output():
        tokenizer = load.load_tokenizer(checkpoint.directory)
        model = load.open_model(checkpoint, device=device, placement=placement, say=say)
        pieces, longest = cut_text_windows(model.model, tokenizer, text, windows, window)
        found = confirm_windows(model, candidates, pieces, nulls=nulls, seed=seed, progress=progress, say=say)
    return dataclasses.replace(found, window_tokens=longest, text_sha256=hashlib.sha256(text.encode()).hexdigest())


def refuse_text(checkpoint: Checkpoint, text: str | None, windows: int, window: int) -> None:
    """Raise ModelError if the tokenizer cannot be loaded, or if `text` is too short to fill one window.

    The scan calls this before it loads the model.
    """
    with load.hide_output():
        tokenizer = load.load_tokenizer(checkpoint.directory)
        measure.cut_windows(
            measure.encode(tokenizer, read_built_in_text() if text is None else text), [], windows, window
        )


def confirm_windows(
    model: LayeredModel,
    candidates: Sequence[Candidate],
    windows: Sequence[Sequence[int]],
    *,
    nulls: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    say: Say = _ignore,
) -> Confirmation:
    """Test `candidates` on windows of token ids. The model runs on each window separately.

    The effect of zeroing some scalars is the model's perplexity without them divided by its perplexity with them. The
    95% interval of an effect is computed from the mean losses of whole windows (`intervals.py`). If there are fewer
    than eight windows, no interval is computed and every verdict is "untested".

    The effect of zeroing a scalar is the perplexity without it divided by the perplexity with it. The effect is clear
    if the low end of its interval is above 1.05 and above the usual effects of null scalars. Null scalars are `nulls`
    random scalars of the candidates' matrices, outside the columns of all tested scalars, zeroed one at a time. They
    are drawn with `seed` from the scalars within 10% of a candidate's magnitude. If there are too few, the scalars with
    the nearest magnitudes are added.

    A scalar is "critical alone" if its effect is clear. Any other scalar is "critical jointly" if it is in a joint set,
    or if zeroing it together with all other candidates clearly adds more than zeroing it alone. To set the bar for this
    addition, some null scalars are zeroed together with all candidates.

    A joint set is a group of scalars whose effect is clearly larger than the product of the effects of its parts. The
    parts are smaller joint sets and single scalars. Three kinds of groups are tested: pairs of candidates, pairs within
    a column, and the group of all scalars that add to the effect of all candidates.

    A companion is tested alone, in pairs, and together with all candidates. Its effect must also exceed the effect
    predicted for one more large scalar of its column (`model/intervals.py`). The prediction allows for scalars that
    raise the loss and scalars that lower it. A companion is "untested" if its column contains fewer than three other
    large scalars.

    `say` receives a line for the user if the text is too short, if null scalars raise a bar, if a companion gets no
    verdict, if zeroing a companion lowers the loss, or if a null scalar is critical.

    The same inputs on the same machine give the same result. Raises ModelError if no candidate or no window is given,
    if a window has fewer than two tokens, if a candidate is not a scalar of the checkpoint's down projections, if the
    elements of such a projection are not weights, or if the losses of the stored model are not finite.
    """
    if not candidates:
        raise ModelError("nothing to confirm: the list of candidates is empty")
    if not windows or any(len(window) < 2 for window in windows):
        raise ModelError(
            "no windows, or a window is too short",
            f"{len(windows)} windows",
            "give at least one window, each of at least two tokens",
        )
    suspects = _choose_suspects(model.checkpoint, candidates, nulls, seed)
    layers = {candidate.coordinate.tensor: candidate.layer for candidate in suspects.tested}
    losses = Losses[Coordinate](
        model,
        windows,
        lambda name: layers[name.tensor],
        lambda name: (name,),
        # Zeroing a scalar that is zero has no effect at all, so such scalars are left out of every set.
        frozenset(candidate.coordinate for candidate in suspects.tested if candidate.value == 0),
    )
    losses.measure(suspects.groups(), progress)
    enough = len(windows) >= LEAST_WINDOWS
    if not enough:
        report_too_few_windows(windows, say)
        say = _ignore
    bars = _set_bars(losses, suspects, say)
    core = _find_core(losses, suspects, bars)
    pairs = suspects.pairs
    groups = [g for g in dict.fromkeys([*pairs, core] if len(core) > 1 else pairs) if not g & bars.unjudged]
    losses.measure(groups, progress)
    joint = find_joint_sets(losses, groups, bars.joint)
    _report_companions(losses, suspects, bars, say)
    judge = _Judge(losses, bars, core.union(*joint), enough)
    together = suspects.together
    return Confirmation(
        trials=tuple(judge.try_out(candidate, together) for candidate in suspects.tested),
        together=losses.effect(together),
        joint_sets=tuple(
            JointSet(tuple(sorted(group, key=suspects.names.index)), losses.effect(group)) for group in joint
        ),
        null=tuple(losses.effect(frozenset({scalar})).ratio for scalar in suspects.null),
        base_perplexity=losses.base_perplexity,
        windows=len(windows),
        window_tokens=max(map(len, windows)),
        text_sha256="",
        dtype=str(model.dtype).removeprefix("torch."),
        device=load.get_device_name(model.device),
        scored_tokens=sum(losses.scored),
        column_nulls=tuple(_measure_column_null(losses, together, *item) for item in suspects.columns.items()),
    )


def report_too_few_windows(windows: Sequence[Sequence[int]], say: Say) -> None:
    """Report that there are fewer than LEAST_WINDOWS windows, and what to do."""
    have = f"{len(windows)} window{'' if len(windows) == 1 else 's'}"
    remedy = f"a verdict needs {LEAST_WINDOWS}: give a longer --text, more --windows or a shorter --window"
    say(f"too little text for intervals and verdicts: {have} ({remedy})")


# The scalars that are tested -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Suspects:
    """The scalars that the causal test zeroes.

    `tested` contains the candidates, followed by their companions. `together` contains the candidates only. `null`
    contains random scalars for comparison, and `crowded` the null scalars that are also zeroed together with all
    candidates. `minor` contains the scalars that may have an effect only because the input of their column is large.
    `columns` contains, for each column of a minor scalar, other large scalars of the column for comparison. `pairs`
    contains the pairs that are tested as joint sets.
    """

    tested: list[Candidate]
    together: Zeroed
    null: list[Coordinate]
    crowded: list[Coordinate]
    columns: dict[Column, list[Coordinate]]
    minor: set[Coordinate]
    pairs: list[Zeroed]

    @property
    def names(self) -> list[Coordinate]:
        return [candidate.coordinate for candidate in self.tested]

    def lead(self, column: Column) -> Coordinate:
        """Return the first candidate in `column`. The other tested scalars of the column are compared with it."""
        return next(candidate.coordinate for candidate in self.tested if get_column(candidate) == column)

    def groups(self) -> list[Zeroed]:
        """List the sets of scalars that are zeroed first. Larger joint sets are chosen from their results."""
        groups = [frozenset({name}) for name in (*self.names, *self.null)]
        for name in self.names:
            groups += [self.together | {name}, self.together - {name}]
        groups += [*self.pairs, *(self.together | {scalar} for scalar in self.crowded)]
        for column, rows in self.columns.items():
            for row in rows:
                groups += [frozenset({row}), self.together | {row}, frozenset({self.lead(column), row})]
        return groups


def _choose_suspects(checkpoint: Checkpoint, candidates: Sequence[Candidate], nulls: int, seed: int) -> _Suspects:
    listed = list({candidate.coordinate: candidate for candidate in candidates}.values())
    matrices = find_projections(checkpoint, listed)
    tested = listed + find_companions(listed, matrices)
    null = draw_nulls(listed, tested, matrices, nulls, seed)
    together = frozenset(candidate.coordinate for candidate in listed)
    count = min(CONTEXT_NULLS, len(null)) if len(tested) > 1 else 0
    return _Suspects(
        tested=tested,
        together=together,
        null=null,
        crowded=[null[number * len(null) // count] for number in range(count)],
        columns=choose_column_rows(listed, tested, matrices),
        minor=find_minor_scalars(listed, tested),
        pairs=_choose_pairs(tested, together),
    )


def _choose_pairs(tested: Sequence[Candidate], listed: Zeroed) -> list[Zeroed]:
    """Choose at most PAIRS pairs to test: two candidates, or any two tested scalars of the same column.

    Pairs in one column come first, then pairs in one row, then the pairs that are earliest in the list of scalars.
    """

    def same_column(one: Candidate, other: Candidate) -> bool:
        return (one.layer, one.expert, one.col) == (other.layer, other.expert, other.col)

    def order(pair: tuple[int, int]) -> tuple[bool, bool, int]:
        one, other = (tested[place] for place in pair)
        return not same_column(one, other), one.row != other.row, sum(pair)

    chosen = [
        frozenset({tested[one].coordinate, tested[other].coordinate})
        for one, other in sorted(combinations(range(len(tested)), 2), key=order)
        if same_column(tested[one], tested[other]) or {tested[one].coordinate, tested[other].coordinate} <= listed
    ]
    return chosen[:PAIRS]


# Bars ----------------------------------------------------------------------------------------------------------------


class _Bar(NamedTuple):
    """The largest rise or fall of the loss predicted for zeroing one more large scalar of a column.

    Both fields are logarithms of perplexity ratios. `alone` is the effect of zeroing the scalar alone. `joint` is the
    effect of zeroing it together with candidates, minus the effects of zeroing the scalar and the candidates apart.
    """

    alone: float
    joint: float


_NO_BAR = _Bar(-math.inf, -math.inf)


@dataclass(frozen=True)
class _Bars:
    """The bars for all tested scalars: logarithms of the perplexity ratios that a clear effect exceeds.

    `floor` is the bar for the effect of a scalar. `joint_floor` is the bar for the effect of a group beyond the sum of
    the effects of its parts. `of_minor` contains additional bars for minor scalars. `unjudged` contains the companions
    that get no verdict, because their columns contain too few large scalars to compute a bar.
    """

    floor: float
    joint_floor: float
    of_minor: dict[Coordinate, _Bar]
    unjudged: set[Coordinate]

    def alone(self, name: Coordinate) -> float:
        return max(self.floor, self.of_minor.get(name, _NO_BAR).alone)

    def joint(self, group: Iterable[Coordinate]) -> float:
        return max([self.joint_floor, *(self.of_minor.get(name, _NO_BAR).joint for name in group)])


def _set_bars(losses: Losses[Coordinate], suspects: _Suspects, say: Say) -> _Bars:
    floor, joint_floor = _compute_floors(losses, suspects, say)
    bars = {
        column: _set_column_bar(losses, suspects.together, suspects.lead(column), rows)
        for column, rows in suspects.columns.items()
        if len(rows) >= LEAST_ROWS
    }
    companions = [c for c in suspects.tested if c.coordinate not in suspects.together]
    return _Bars(
        floor,
        joint_floor,
        of_minor={
            c.coordinate: bars.get(get_column(c), _NO_BAR) for c in suspects.tested if c.coordinate in suspects.minor
        },
        unjudged={c.coordinate for c in companions if get_column(c) not in bars},
    )


def _compute_floors(losses: Losses[Coordinate], suspects: _Suspects, say: Say) -> tuple[float, float]:
    """Compute `floor` and `joint_floor` of `_Bars` from the effects of null scalars.

    `floor` is at least the outer fence of the effects of null scalars: the third quartile plus three times the distance
    between the quartiles (J. W. Tukey, Exploratory Data Analysis, 1977). The largest of these effects would be a worse
    bar: one of the random scalars may be a super weight, and its effect would then hide the candidates. `say` receives
    a line about such a null scalar.
    """
    together = suspects.together
    alone = {scalar: losses.gain(frozenset({scalar})) for scalar in suspects.null}
    floor = max(math.log(INERT), compute_outer_fence([gain.log for gain in alone.values()]))
    if floor > math.log(INERT):
        least = format_number(compute_exp(floor), 3)
        say(f"random scalars of similar magnitude change perplexity too: only ratios above {least} count")
    for scalar in suspects.null:
        if alone[scalar].low > floor:
            ratio = f"x{format_number(compute_exp(alone[scalar].log), 3)} without it"
            say(f"critical, but not a candidate: {scalar} (drawn for comparison; perplexity is {ratio})")
    common = [
        losses.gain(together | {scalar}, [together, frozenset({scalar})]).log
        for scalar in suspects.crowded
        if alone[scalar].low <= floor
    ]
    # An infinite value means that the model without the candidates has infinite losses, and then shows nothing.
    joint_floor = max([floor, *filter(math.isfinite, common)])
    if joint_floor > floor:
        least = f"x{format_number(compute_exp(joint_floor), 3)}"
        say(
            f"random scalars have larger effects once the candidates are zeroed: only joint effects above {least} count"
        )
    return floor, joint_floor


def compute_outer_fence(values: Sequence[float]) -> float:
    if not values:
        return -math.inf
    low, high = (sorted(values)[round(share * (len(values) - 1))] for share in (0.25, 0.75))
    return high + 3 * (high - low) if math.isfinite(high) else math.inf


def _set_column_bar(losses: Losses[Coordinate], together: Zeroed, lead: Coordinate, rows: Sequence[Coordinate]) -> _Bar:
    alone = [losses.gain(frozenset({row})).log for row in rows]
    joint = [
        [losses.gain(group | {row}, [group, frozenset({row})]).log for row in rows]
        for group in (together, frozenset({lead}))
    ]
    # A value that is not finite means that the model without the candidates has infinite losses, so it shows nothing.
    finite = [gains for gains in joint if all(map(math.isfinite, gains))]
    return _Bar(compute_prediction_bound(alone), max(map(compute_prediction_bound, finite), default=math.inf))


# Verdicts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judge:
    """Decides the verdict of each scalar from the measured losses and the bars.

    `jointly` contains the scalars that matter together with others. `enough` is True if the text has enough windows for
    verdicts.
    """

    losses: Losses[Coordinate]
    bars: _Bars
    jointly: Zeroed
    enough: bool

    def try_out(self, candidate: Candidate, together: Zeroed) -> Trial:
        """Make the report of the test of one scalar. `together` contains all candidates that a detector lists."""
        name = candidate.coordinate
        others = together - {name}
        return Trial(
            candidate,
            alone=self.losses.effect(frozenset({name})),
            without=self.losses.effect(others) if others else None,
            verdict=self._decide(name),
            listed=name in together,
        )

    def _decide(self, name: Coordinate) -> Verdict:
        if not self.enough or name in self.bars.unjudged:
            return "untested"
        if self.losses.gain(frozenset({name})).low > self.bars.alone(name):
            return "critical alone"
        return "critical jointly" if name in self.jointly else "inert"


def _find_core(losses: Losses[Coordinate], suspects: _Suspects, bars: _Bars) -> Zeroed:
    """Find the scalars whose zeroing clearly adds more to zeroing all other candidates than it does alone."""
    together = suspects.together
    added = {n: losses.gain(together | {n}, [together - {n}, frozenset({n})]) for n in suspects.names}
    return frozenset(n for n in suspects.names if n not in bars.unjudged and added[n].low > bars.joint([n]))


def find_joint_sets(
    losses: Losses[Unit], groups: Sequence[frozenset[Unit]], bar: Callable[[frozenset[Unit]], float]
) -> list[frozenset[Unit]]:
    """Find the groups whose effect is clearly larger than the product of the effects of their parts, strongest first.

    The parts of a group are the smaller joint sets in the group, chosen from the strongest to the weakest without
    overlap, and the remaining single scalars.
    """
    found: list[frozenset[Unit]] = []
    for group in sorted(groups, key=len):
        parts: list[frozenset[Unit]] = []
        left = group
        for smaller in sorted(found, key=lambda known: -losses.gain(known).log):
            if smaller <= left:
                parts.append(smaller)
                left -= smaller
        if losses.gain(group, [*parts, *(frozenset({name}) for name in left)]).low > bar(group):
            found.append(group)
    return sorted(found, key=lambda known: -losses.gain(known).log)


def _measure_column_null(
    losses: Losses[Coordinate], together: Zeroed, column: Column, rows: Sequence[Coordinate]
) -> ColumnNull:
    return ColumnNull(
        *column,
        alone=tuple(losses.effect(frozenset({row})).ratio for row in rows),
        added=tuple(compute_exp(losses.gain(together | {row}, [together]).log) for row in rows),
    )


def _report_companions(losses: Losses[Coordinate], suspects: _Suspects, bars: _Bars, say: Say) -> None:
    """Tell the user which companions get no verdict, and which companions lower the loss when they are zeroed."""
    together = suspects.together
    for candidate in suspects.tested:
        name, rows = candidate.coordinate, suspects.columns.get(get_column(candidate), ())
        if name in bars.unjudged:
            lead = suspects.lead(get_column(candidate))
            both = compute_exp(losses.gain(frozenset({lead, name})).log)
            say(
                f"untested companion: {name} (other large rows in its column: {len(rows)}, at least {LEAST_ROWS} are "
                f"needed for comparison; perplexity is x{format_number(both, 3)} without it and {lead})"
            )
        elif name in bars.of_minor and name not in together:
            added = losses.gain(together | {name}, [together])
            if added.high < -max(math.log(INERT), bars.of_minor[name].joint):
                ratio = f"x{format_number(compute_exp(added.log), 3)}"
                say(f"companion that helps: {name} (zeroed on top of all candidates, perplexity is {ratio})")


# Losses --------------------------------------------------------------------------------------------------------------


class Gain(NamedTuple):
    """The rise `log` of the logarithm of the perplexity, and the ends `low` and `high` of its 95% interval.

    The ends are NaN if the text has too few windows for an interval.
    """

    log: float
    low: float
    high: float


class Losses(Generic[Unit]):
    """Measures and stores the losses of the model on each window with sets of units zeroed.

    A unit is a scalar or an expert. Losses are stored by window, so that the difference between the losses of any two
    sets has an interval. `find_layer` returns the number of the layer that contains a unit, and `list_targets` the
    scalars and regions that are zeroed for it. Units in `nothing` are left out of every set.
    """

    def __init__(
        self,
        model: LayeredModel,
        windows: Sequence[Sequence[int]],
        find_layer: Callable[[Unit], int],
        list_targets: Callable[[Unit], Collection[Coordinate | Region]],
        nothing: frozenset[Unit] = frozenset(),
    ):
        self.model, self.windows = model, windows
        self.scored = [len(window) - 1 for window in windows]
        self._find_layer, self._list_targets, self._nothing = find_layer, list_targets, nothing
        self._base: list[float] = []
        # The loss in nats per token minus that of the stored model, by set of zeroed scalars, one value per window.
        self._extra: dict[frozenset[Unit], list[float]] = {frozenset(): [0.0] * len(windows)}
        self._kl: dict[frozenset[Unit], float] = {frozenset(): 0.0}

    def measure(self, groups: Iterable[frozenset[Unit]], progress: Progress | None) -> None:
        """Measure the loss of each group of scalars that has not been measured, in few runs of the model.

        The number of groups in one run is limited by memory. Groups whose first edited layer is late run first. Groups
        with similar first layers thus share a run, which computes the layers before the first edited layer only once.
        """
        wanted = [
            group for group in dict.fromkeys(group - self._nothing for group in groups) if group not in self._extra
        ]
        wanted.sort(key=lambda group: -min(map(self._find_layer, group), default=0))
        if self._base and not wanted:
            return
        with load.convert_run_errors(self.model.device, self.model.weights is not None):
            at_once = count_variants_at_once(self.model, self.windows)
            for begin in range(0, max(1, len(wanted)), at_once):
                self._run(wanted[begin : begin + at_once], progress)

    def gain(self, group: frozenset[Unit], parts: Iterable[frozenset[Unit]] = ()) -> Gain:
        """Compute the rise in loss from zeroing `group`, minus the rises from zeroing each of `parts`.

        The unit is nats per token, so this is also the rise of the logarithm of the perplexity.
        """
        taken = [self._extra[part - self._nothing] for part in parts]
        extra = [
            value - sum(part[number] for part in taken)
            for number, value in enumerate(self._extra[group - self._nothing])
        ]
        mean, low, high = compute_mean_interval(extra, self.scored)
        # The difference of two infinite losses is NaN. No comparison with NaN is true, so it never exceeds a bar.
        return Gain(mean, math.nan if low is None else low, math.nan if high is None else high)

    def effect(self, group: frozenset[Unit]) -> Effect:
        """Compute the effect of zeroing `group`: perplexity ratio, 95% interval, and mean KL in nats per token."""
        gain = self.gain(group)
        low, high = (None if math.isnan(end) else compute_exp(end) for end in (gain.low, gain.high))
        return Effect(compute_exp(gain.log), low, high, self._kl[group - self._nothing])

    @property
    def base_perplexity(self) -> float:
        return compute_exp(compute_mean_interval(self._base, self.scored).mean)

    def _run(self, groups: Sequence[frozenset[Unit]], progress: Progress | None) -> None:
        totals = measure.Totals([], 1 + len(groups))
        variants: list[Scalars] = [{}]
        variants += [{target: 0.0 for unit in group for target in self._list_targets(unit)} for group in groups]
        for outcomes in self.model.run(self.windows, variants, progress=progress):
            totals.add_window(self.windows[outcomes.sequence], outcomes)
        base = totals.token_nll[0]
        if not all(bool(window.isfinite().all()) for window in base):
            raise ModelError(
                "losses of the stored model are not finite", self.model.checkpoint.root, "try another dtype"
            )
        self._base = [float(window.mean()) for window in base]
        for number, group in enumerate(groups, start=1):
            self._extra[group] = [
                float((nll.nan_to_num(nan=math.inf, posinf=math.inf) - stored).mean())
                for nll, stored in zip(totals.token_nll[number], base, strict=True)
            ]
            kl = totals.compute_mean_kl(number)
            self._kl[group] = math.inf if math.isnan(kl) else kl


def compute_exp(log: float) -> float:
    return math.exp(log) if not log > 709 else math.inf  # math.exp raises above 709; NaN stays NaN
