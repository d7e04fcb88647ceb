"""Find the massive hidden states that recur: they appear before layers with full attention, and do not persist.

In hybrid models, most layers mix tokens by linear attention, a state space or a convolution. There, massive states
appear before each layer with full attention, and the MLP of that layer or of the next removes them (arXiv:2608.12149).
Such a state is too brief to persist, so it is judged by the layers that it reaches. This module uses the hidden states
that spikes.py recorded, and runs no model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from swsurgery.scanning.activation_report import Appearance, PersistentActivation
from swsurgery.scanning.causes import Decomposer, find_cause
from swsurgery.scanning.persistence import Rise, find_end, find_peak, find_rises
from swsurgery.scanning.spikes import Trace

LEAST_TIMES, LEAST_SHARE = 2, 0.5
"""Minimum number of layers with full attention that receive a recurring state, and their share of all such layers. The
larger of the two numbers applies. A layer with full attention that is the first of the model does not count."""


class Recurrence(NamedTuple):
    """A massive state of one prompt, token and channel that appears before most layers with full attention."""

    rises: tuple[Rise, ...]

    @property
    def main(self) -> Rise:
        """The rise whose layer adds most to the state."""
        return max(self.rises, key=lambda rise: abs(rise.main.move.change))


def find_recurrences(traces: Sequence[Trace], attention: Sequence[int]) -> Iterator[Recurrence]:
    """Find the states that recur before `attention`, the numbers of the layers with full attention.

    There are none if `attention` is empty, which stands for a model that is no hybrid.
    """
    if not attention:
        return
    least = max(LEAST_TIMES, LEAST_SHARE * sum(layer > 0 for layer in attention))
    groups: dict[tuple[int, int, int], list[Rise]] = defaultdict(list)
    for rise in find_rises(traces, brief=True):
        if list_received(rise, attention):
            groups[rise.main.sequence, rise.main.move.token, rise.main.move.channel].append(rise)
    for rises in groups.values():
        if len({layer for rise in rises for layer in list_received(rise, attention)}) >= least:
            yield Recurrence(tuple(sorted(rises, key=lambda rise: rise.first)))


def list_received(rise: Rise, attention: Iterable[int]) -> tuple[int, ...]:
    """List the layers with full attention whose input contains the massive state of `rise`."""
    return tuple(layer for layer in attention if rise.first < layer <= rise.last + 1)


def merge_recurrences(
    traces: Sequence[Trace], recurrences: Iterable[Recurrence], attention: Sequence[int], decomposer: Decomposer
) -> Iterator[tuple[Recurrence, PersistentActivation]]:
    """Merge all recurrences with the same channel into one activation.

    Its values are those of the recurrence with the largest state, which is yielded with it.
    """
    groups: dict[int, list[Recurrence]] = defaultdict(list)
    for one in recurrences:
        groups[one.main.main.move.channel].append(one)
    for channel, group in sorted(groups.items()):
        found = [(one, *max((find_peak(traces, rise) for rise in one.rises), key=_get_magnitude)) for one in group]
        one, peak, value = max(found, key=lambda each: abs(each[2]))
        sequence, move, _ = one.main.main
        yield (
            one,
            PersistentActivation(
                move.layer,
                one.rises[-1].last,
                channel,
                value,
                peak,
                move.token,
                sequence,
                len({each.main.main.sequence for each in group}),
                first=one.rises[0].first,
                ratio=abs(value) / traces[sequence].medians[peak],
                causes=tuple(find_cause(spell.move, decomposer) for rise in one.rises for spell in rise.spells),
                recurring=True,
                appearances=tuple(describe_appearance(traces, rise, attention, decomposer) for rise in one.rises),
            ),
        )


def describe_appearance(
    traces: Sequence[Trace], rise: Rise, attention: Sequence[int], decomposer: Decomposer
) -> Appearance:
    """Describe one rise: the layers where it appears and disappears, and what makes and removes it."""
    end = find_end(traces, rise)
    return Appearance(
        rise.first,
        rise.last,
        find_peak(traces, rise)[1],
        list_received(rise, attention),
        find_cause(rise.main.move, decomposer),
        find_cause(end, decomposer) if end else None,
    )


def _get_magnitude(peak: tuple[int, float]) -> float:
    return abs(peak[1])
