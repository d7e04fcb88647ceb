"""The causal test of a scan: what does the model lose without each candidate, and without several of them at once?

Every candidate is zeroed alone, all together, all but one, and in pairs; so are scalars of the same matrices and of
like magnitude that nobody suspects, the null. All of these are variants of one run of the model. Scalars that share a
candidate's column, so its input, and are outliers in it are tested too, though no detector named them: Llama-2-7B's
best known super weight does little without such a companion (docs/known.md). Any large row of a spiking column may
change the loss, so a companion is compared with the other large rows of its own column.

This module asks `forward.py` for losses and passes verdicts. Companions and both nulls come from `suspects.py`, the
intervals from `intervals.py`. It does not look for candidates and shows nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError
from swsurgery.model import Placement, load, measure
from swsurgery.model.check import built_in_text
from swsurgery.model.forward import LayeredModel
from swsurgery.model.intervals import LEAST_WINDOWS, mean_interval, prediction_bound
from swsurgery.model.windows import variants_at_once, windows_of
from swsurgery.progress import Progress
from swsurgery.scanning.matrices import matrices_of
from swsurgery.scanning.report import Candidate, ColumnNull, Confirmation, Effect, JointSet, Trial, Verdict
from swsurgery.scanning.suspects import Column, column_of, column_rows, companions_of, draw_nulls, minor_scalars
from swsurgery.storage.coordinate import Coordinate

INERT = 1.05
"""A perplexity ratio up to which a scalar counts as inert; docs/known.md draws the same line."""

LEAST_ROWS = 3
"""Fewest other large rows of a column with which a companion can be compared."""

PAIRS = 28
"""Pairs that are tested at most: all of them up to eight candidates."""

CONTEXT_NULLS = 6
"""Nulls that are zeroed on top of all candidates too: in a broken model any change has a larger effect."""

Zeroed = frozenset[Coordinate]
"""Scalars that are zeroed together; the empty set is the model as it is stored."""

Say = Callable[[str], None]


def _ignore(line: str) -> None:
    """Say nothing."""


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
    """Test `candidates` on the first `windows` windows of `window` tokens of `text` (None: the built-in one).

    Windows, BOS and scored positions are those of `check.run_checks`. The rest is said at `confirm_windows`. Raises
    ModelError where tokenizer or model cannot be loaded or run.
    """
    text = built_in_text() if text is None else text
    with load.quiet():
        tokenizer = load.load_tokenizer(checkpoint.directory)
        model = load.open_model(checkpoint, device=device, placement=placement, say=say)
        pieces, longest = windows_of(model.model, tokenizer, text, windows, window)
        found = confirm_windows(model, candidates, pieces, nulls=nulls, seed=seed, progress=progress, say=say)
    return dataclasses.replace(found, window_tokens=longest, text_sha256=hashlib.sha256(text.encode()).hexdigest())


def refuse_text(checkpoint: Checkpoint, text: str | None, windows: int, window: int) -> None:
    """Raises ModelError where `confirm` could not even begin: no tokenizer, or a text without a window."""
    with load.quiet():
        tokenizer = load.load_tokenizer(checkpoint.directory)
        measure.cut_windows(measure.encode(tokenizer, built_in_text() if text is None else text), [], windows, window)


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
    """Test `candidates` on token ids, each of `windows` on its own.

    The effect of zeroing some scalars is the model's perplexity without them divided by that with them. Its 95%
    interval is computed from the mean losses of whole windows (`intervals.py`). With fewer than eight windows there is
    no interval, and every verdict is "untested". An effect is clear if the low end of its interval is above 1.05 and
    above what is common in the null: `nulls` scalars of the candidates' matrices in all, zeroed one at a time, drawn
    with `seed` from those within 10% of a candidate's magnitude, else the nearest magnitudes there are, and never from
    a candidate's column.

    A scalar is "critical alone" if its effect is clear. It is "critical jointly" if it is not, but leaving it out of
    all candidates, or out of a joint set, takes clearly more away than its effect alone; some of the null, zeroed on
    top of all candidates, set the bar for this too. A joint set is a group whose effect is clearly larger than the
    product of the effects of the smaller joint sets within it and of its other scalars. Tested for it are pairs of
    candidates and pairs within a column, and the group of all that matter for the effect of all candidates. A
    companion is tested alone, on top of all candidates (so that the effect without it is that of all candidates), and
    in pairs.

    The bar for a companion is also above what one more large row of its column may be expected to do, by the effects of
    the others, whether they raise the loss or lower it (`prediction_bound`). A companion whose column has fewer than
    three others is "untested".

    `say` gets a line if the text is too short, if a null raises the bar, for a companion that cannot be judged or
    whose loss helps, and for a scalar of the null that turns out to be critical.

    The same inputs on the same machine give the same result. Raises ModelError where there is no candidate or no
    window, where a candidate is not a scalar of the checkpoint's down projections, where the dtype has no single
    weights, and where the model as stored gives losses that are not finite.
    """
    if not candidates:
        raise ModelError("nothing to confirm", "no candidates")
    if not windows or any(len(window) < 2 for window in windows):
        raise ModelError("no room for text", f"{len(windows)} windows", "at least one, of at least two tokens each")
    listed = list({candidate.coordinate: candidate for candidate in candidates}.values())
    matrices = matrices_of(model.checkpoint, listed)
    tested = listed + companions_of(listed, matrices)
    null = draw_nulls(listed, tested, matrices, nulls, seed)
    columns = column_rows(listed, tested, matrices)
    minor = minor_scalars(listed, tested)

    losses = _Losses(model, windows, tested)
    names = [candidate.coordinate for candidate in tested]
    alone = {name: frozenset({name}) for name in (*names, *null)}
    together = frozenset(candidate.coordinate for candidate in listed)
    pairs = _pairs(tested, together)
    count = min(CONTEXT_NULLS, len(null)) if len(names) > 1 else 0
    crowded = [null[number * len(null) // count] for number in range(count)]
    losses.measure(
        [
            *alone.values(),
            *(group for name in names for group in (together | {name}, together - {name})),
            *pairs,
            *(together | {scalar} for scalar in crowded),
            *(
                group
                for column, rows in columns.items()
                for row in rows
                for group in (frozenset({row}), together | {row}, frozenset({_lead(tested, column), row}))
            ),
        ],
        progress,
    )
    enough = len(windows) >= LEAST_WINDOWS
    if not enough:
        have = f"{len(windows)} window{'' if len(windows) == 1 else 's'}"
        remedy = f"a verdict needs {LEAST_WINDOWS}: give a longer --text, more --windows or a shorter --window"
        say(f"too little text for intervals and verdicts: {have} ({remedy})")
        say = _ignore
    floor, joint_floor = _floors(losses, together, null, crowded, say)
    bars = {
        column: _column_bar(losses, together, _lead(tested, column), rows)
        for column, rows in columns.items()
        if len(rows) >= LEAST_ROWS
    }
    unjudged = {c.coordinate for c in tested if c.coordinate not in together and column_of(c) not in bars}
    bar_of = {c.coordinate: bars.get(column_of(c), _NO_BAR) for c in tested if c.coordinate in minor}

    def alone_bar(name: Coordinate) -> float:
        return max(floor, bar_of.get(name, _NO_BAR).alone)

    def joint_bar(group: Iterable[Coordinate]) -> float:
        return max([joint_floor, *(bar_of.get(name, _NO_BAR).joint for name in group)])

    # What adds to the others clearly more than its effect alone is part of something that they do together.
    added = {name: losses.gain(together | {name}, [together - {name}, alone[name]]) for name in names}
    core = frozenset(name for name in names if name not in unjudged and added[name].low > joint_bar([name]))
    groups = [group for group in dict.fromkeys([*pairs, core] if len(core) > 1 else pairs) if not group & unjudged]
    losses.measure(groups, progress)
    joint = _joint_sets(losses, groups, joint_bar)
    _say_companions(losses, tested, columns, together, unjudged, bar_of, say)

    def verdict(name: Coordinate) -> Verdict:
        if not enough or name in unjudged:
            return "untested"
        if losses.gain(alone[name]).low > alone_bar(name):
            return "critical alone"
        return "critical jointly" if name in core.union(*joint) else "inert"

    trials = [
        Trial(
            candidate,
            alone=losses.effect(alone[name]),
            without=losses.effect(together - {name}) if together - {name} else None,
            verdict=verdict(name),
            listed=name in together,
        )
        for name, candidate in zip(names, tested, strict=True)
    ]
    return Confirmation(
        trials=tuple(trials),
        together=losses.effect(together),
        joint_sets=tuple(JointSet(tuple(sorted(group, key=names.index)), losses.effect(group)) for group in joint),
        null=tuple(losses.effect(alone[scalar]).ratio for scalar in null),
        base_perplexity=losses.base_perplexity,
        windows=len(windows),
        window_tokens=max(map(len, windows)),
        text_sha256="",
        dtype=str(model.dtype).removeprefix("torch."),
        device=load.device_name(model.device),
        scored_tokens=sum(losses.scored),
        column_nulls=tuple(
            ColumnNull(
                *column,
                alone=tuple(losses.effect(frozenset({row})).ratio for row in rows),
                added=tuple(_exp(losses.gain(together | {row}, [together]).log) for row in rows),
            )
            for column, rows in columns.items()
        ),
    )


def _pairs(tested: Sequence[Candidate], listed: Zeroed) -> list[Zeroed]:
    """Pairs of listed scalars, and of all that share a column; at most PAIRS: first those that share a column, then
    those that share a row, then the best ranked."""

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


def _floors(
    losses: _Losses, together: Zeroed, null: Sequence[Coordinate], crowded: Sequence[Coordinate], say: Say
) -> tuple[float, float]:
    """What an effect, and what an effect beyond the sum of its parts, must exceed to be clear: logarithms of ratios.

    The first is the null's outer fence, the third quartile plus three times the distance between the quartiles
    (J. W. Tukey, Exploratory Data Analysis, 1977), and not its largest: among scalars of a super weight's magnitude
    there may be another super weight, which must not hide the first. Such a one is said.
    """
    alone = {scalar: losses.gain(frozenset({scalar})) for scalar in null}
    floor = max(math.log(INERT), _outer_fence([gain.log for gain in alone.values()]))
    if floor > math.log(INERT):
        say(f"random scalars of like magnitude change perplexity too: only ratios above {_exp(floor):.3g} count")
    for scalar in null:
        if alone[scalar].low > floor:
            ratio = f"x{_exp(alone[scalar].log):.3g} without it"
            say(f"critical, though no candidate: {scalar} (drawn for comparison; perplexity is {ratio})")
    common = [
        losses.gain(together | {scalar}, [together, frozenset({scalar})]).log
        for scalar in crowded
        if alone[scalar].low <= floor
    ]
    # In a model that is broken beyond numbers nothing is learnt from what one more scalar does.
    joint_floor = max([floor, *filter(math.isfinite, common)])
    if joint_floor > floor:
        least = f"x{_exp(joint_floor):.3g}"
        say(f"without the candidates random scalars matter more: only joint effects above {least} count")
    return floor, joint_floor


def _outer_fence(values: Sequence[float]) -> float:
    if not values:
        return -math.inf
    low, high = (sorted(values)[round(share * (len(values) - 1))] for share in (0.25, 0.75))
    return high + 3 * (high - low) if math.isfinite(high) else math.inf


def _joint_sets(losses: _Losses, groups: Sequence[Zeroed], bar: Callable[[Zeroed], float]) -> list[Zeroed]:
    """The groups that do clearly more than the product of their parts: smaller joint sets, strongest first, and the
    scalars that are in none of these. Strongest first."""
    found: list[Zeroed] = []
    for group in sorted(groups, key=len):
        parts: list[Zeroed] = []
        left = group
        for smaller in sorted(found, key=lambda known: -losses.gain(known).log):
            if smaller <= left:
                parts.append(smaller)
                left -= smaller
        if losses.gain(group, [*parts, *(frozenset({name}) for name in left)]).low > bar(group):
            found.append(group)
    return sorted(found, key=lambda known: -losses.gain(known).log)


# Companions ----------------------------------------------------------------------------------------------------------


class _Bar(NamedTuple):
    """How far one more row of a column may go, up or down: alone, and beyond the sum of the parts."""

    alone: float
    joint: float


_NO_BAR = _Bar(-math.inf, -math.inf)


def _lead(tested: Sequence[Candidate], column: Column) -> Coordinate:
    """Return the candidate to which the column owes its companions: the first tested one in it."""
    return next(candidate.coordinate for candidate in tested if column_of(candidate) == column)


def _column_bar(losses: _Losses, together: Zeroed, lead: Coordinate, rows: Sequence[Coordinate]) -> _Bar:
    alone = [losses.gain(frozenset({row})).log for row in rows]
    joint = [
        [losses.gain(group | {row}, [group, frozenset({row})]).log for row in rows]
        for group in (together, frozenset({lead}))
    ]
    # If the model is broken beyond numbers, nothing is learnt from what one more scalar does.
    finite = [gains for gains in joint if all(map(math.isfinite, gains))]
    return _Bar(prediction_bound(alone), max(map(prediction_bound, finite), default=math.inf))


def _say_companions(
    losses: _Losses,
    tested: Sequence[Candidate],
    columns: Mapping[Column, Sequence[Coordinate]],
    together: Zeroed,
    unjudged: set[Coordinate],
    bar_of: Mapping[Coordinate, _Bar],
    say: Say,
) -> None:
    """Report companions that cannot be judged, and those without which the model does better."""
    for candidate in tested:
        name, rows = candidate.coordinate, columns.get(column_of(candidate), ())
        if name in unjudged:
            lead = _lead(tested, column_of(candidate))
            both = _exp(losses.gain(frozenset({lead, name})).log)
            say(
                f"untested companion: {name} (other large rows in its column: {len(rows)}, at least {LEAST_ROWS} are "
                f"needed for comparison; perplexity is x{both:.3g} without it and {lead})"
            )
        elif name in bar_of and name not in together:
            added = losses.gain(together | {name}, [together])
            if added.high < -max(math.log(INERT), bar_of[name].joint):
                ratio = f"x{_exp(added.log):.3g}"
                say(f"companion that helps: {name} (zeroed on top of all candidates, perplexity is {ratio})")


# Losses --------------------------------------------------------------------------------------------------------------


class _Gain(NamedTuple):
    """How much the logarithm of the perplexity rises, with the ends of its interval; NaN if there is no interval."""

    log: float
    low: float
    high: float


class _Losses:
    """What the model loses on each window without some scalars, so that differences between any two sets have an
    interval. All scalars that will be zeroed are in matrices of `tested`."""

    def __init__(self, model: LayeredModel, windows: Sequence[Sequence[int]], tested: Sequence[Candidate]):
        self.model, self.windows = model, windows
        self.scored = [len(window) - 1 for window in windows]
        self._layers = {candidate.coordinate.tensor: candidate.layer for candidate in tested}
        # Taking out nothing has no effect, to the last digit.
        self._nothing = frozenset(candidate.coordinate for candidate in tested if candidate.value == 0)
        self._base: list[float] = []
        # For each set of scalars and each window, the additional loss per token.
        self._extra: dict[Zeroed, list[float]] = {frozenset(): [0.0] * len(windows)}
        self._kl: dict[Zeroed, float] = {frozenset(): 0.0}

    def measure(self, groups: Iterable[Zeroed], progress: Progress | None) -> None:
        """Zero each group that is not known yet, in as few readings of the model as its hidden states allow; groups
        whose first layer is late go together, for what comes before it is computed once."""
        wanted = [
            group for group in dict.fromkeys(group - self._nothing for group in groups) if group not in self._extra
        ]
        wanted.sort(key=lambda group: -min((self._layers[name.tensor] for name in group), default=0))
        if self._base and not wanted:
            return
        with load.running(self.model.device, self.model.weights is not None):
            at_once = variants_at_once(self.model, self.windows)
            for begin in range(0, max(1, len(wanted)), at_once):
                self._run(wanted[begin : begin + at_once], progress)

    def gain(self, group: Zeroed, parts: Iterable[Zeroed] = ()) -> _Gain:
        """How much zeroing `group` costs beyond what zeroing each of `parts` costs, in nats per token."""
        taken = [self._extra[part - self._nothing] for part in parts]
        extra = [
            value - sum(part[number] for part in taken)
            for number, value in enumerate(self._extra[group - self._nothing])
        ]
        mean, low, high = mean_interval(extra, self.scored)
        # NaN, like a difference of infinities, compares false to everything.
        return _Gain(mean, math.nan if low is None else low, math.nan if high is None else high)

    def effect(self, group: Zeroed) -> Effect:
        gain = self.gain(group)
        low, high = (None if math.isnan(end) else _exp(end) for end in (gain.low, gain.high))
        return Effect(_exp(gain.log), low, high, self._kl[group - self._nothing])

    @property
    def base_perplexity(self) -> float:
        return _exp(mean_interval(self._base, self.scored).mean)

    def _run(self, groups: Sequence[Zeroed], progress: Progress | None) -> None:
        totals = measure.Totals([], 1 + len(groups))
        variants = [{}, *({name: 0.0 for name in group} for group in groups)]
        for outcomes in self.model.run(self.windows, variants, progress=progress):
            totals.add_window(self.windows[outcomes.sequence], outcomes)
        base = totals.token_nll[0]
        if not all(bool(window.isfinite().all()) for window in base):
            raise ModelError(
                "losses of the model as it is stored are not finite", self.model.checkpoint.root, "try another dtype"
            )
        self._base = [float(window.mean()) for window in base]
        for number, group in enumerate(groups, start=1):
            self._extra[group] = [
                float((nll.nan_to_num(nan=math.inf, posinf=math.inf) - stored).mean())
                for nll, stored in zip(totals.token_nll[number], base, strict=True)
            ]
            kl = totals.mean_kl(number)
            self._kl[group] = math.inf if math.isnan(kl) else kl


def _exp(log: float) -> float:
    return math.exp(log) if not log > 709 else math.inf  # beyond it math.exp raises; a NaN passes through
