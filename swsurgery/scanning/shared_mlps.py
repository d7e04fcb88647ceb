"""Find the massive outputs of MLPs that several layers share, in Zamba and Zamba 2.

The layers of Zamba with full attention use one transformer block, or a few in turn. A block is stored in the first
layer that uses it. The output of its MLP is not added to the residual stream: a matrix of the layer multiplies it, and
only the Mamba mixer of the layer reads the product. So an output that is massive in one channel exists only within a
layer, and cannot persist. Instead, it recurs if the same channel of the same token is massive in most of the layers
that use the MLP. It also counts if the Mamba mixer that reads it makes a state of the same token that persists.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from swsurgery.checkpoint.projections import has_residual_rows, list_down_projections
from swsurgery.model.forward import LayeredModel
from swsurgery.scanning.activation_report import Appearance, PersistentActivation
from swsurgery.scanning.causes import Decomposer, find_cause
from swsurgery.scanning.persistence import Rise
from swsurgery.scanning.recurring import LEAST_SHARE, LEAST_TIMES
from swsurgery.scanning.sources import LinearSource, find_loaded_module
from swsurgery.scanning.spikes import Move, Trace


def find_shared_mlps(model: LayeredModel) -> list[list[LinearSource]]:
    """Find the modules of the MLPs that several layers share, for each layer.

    In each source, the layer of the projection is the layer that stores the MLP.
    """
    config, shapes = model.checkpoint.config, model.checkpoint.shapes
    found: list[list[LinearSource]] = [[] for _ in model.layers]
    modules = dict(model.model.named_modules(remove_duplicate=False))
    for projection in list_down_projections(config, shapes):
        if projection.expert is not None or has_residual_rows(config, projection):
            continue
        _, module, name = find_loaded_module(modules, config, shapes, projection)
        weight = None if module is None else module._parameters[name]
        uses = [
            (number, used)
            for number, layer in enumerate(model.layers)
            for used in layer.modules()
            if weight is not None and any(one is weight for one in used._parameters.values())
        ]
        for number, used in uses if len(uses) >= LEAST_TIMES else ():
            found[number].append(LinearSource(projection, used, None))
    return found


class SharedRecurrence(NamedTuple):
    """An output of the MLP stored in layer `stored` that is massive in most layers that use the MLP.

    One such layer is enough if its mixer makes a persistent state. The token and channel are the same in all `moves`.
    There is one move for each layer in which the output is massive, in the order of the layers.
    """

    sequence: int
    stored: int
    moves: tuple[Move, ...]

    @property
    def main(self) -> Move:
        """The move with the largest output."""
        return max(self.moves, key=lambda move: abs(move.after))


def find_shared_recurrences(
    traces: Sequence[Trace], rises: Iterable[Rise], uses: Mapping[int, int]
) -> Iterator[SharedRecurrence]:
    """Find the outputs of shared MLPs that recur, and those from which a mixer makes a persistent state of `rises`.

    `uses` maps each layer that uses a shared MLP to the layer that stores it.
    """
    spells = [spell for rise in rises for spell in rise.spells if not spell.move.made_by_mlp]
    fed = {(spell.sequence, spell.move.layer, spell.move.token) for spell in spells}
    groups: dict[tuple[int, int, int, int], list[Move]] = defaultdict(list)
    for sequence, trace in enumerate(traces):
        for move in trace.shared.values():
            groups[sequence, uses[move.layer], move.token, move.channel].append(move)
    times = Counter(uses.values())
    for (sequence, stored, _, _), moves in groups.items():
        recurs = len(moves) >= max(LEAST_TIMES, LEAST_SHARE * times[stored])
        if recurs or any((sequence, move.layer, move.token) in fed for move in moves):
            yield SharedRecurrence(sequence, stored, tuple(sorted(moves, key=lambda move: move.layer)))


def merge_shared(recurrences: Iterable[SharedRecurrence], decomposer: Decomposer) -> Iterator[PersistentActivation]:
    """Merge all recurrences of the same MLP and channel into one activation, with the values of the largest output.

    Its layer, and the layer of its causes, is the layer that stores the MLP.
    """
    groups: dict[tuple[int, int], list[SharedRecurrence]] = defaultdict(list)
    for one in recurrences:
        groups[one.stored, one.main.channel].append(one)
    for (stored, channel), group in sorted(groups.items()):
        one = max(group, key=lambda each: abs(each.main.after))
        causes = [dataclasses.replace(find_cause(move, decomposer), layer=stored) for move in one.moves]
        move = one.main
        yield PersistentActivation(
            stored,
            one.moves[-1].layer,
            channel,
            move.after,
            move.layer,
            move.token,
            one.sequence,
            len({each.sequence for each in group}),
            first=one.moves[0].layer,
            ratio=abs(move.after) / move.median,
            causes=(causes[one.moves.index(move)],),
            recurring=True,
            appearances=tuple(
                Appearance(each.layer, each.layer, each.after, made_by=cause)
                for each, cause in zip(one.moves, causes, strict=True)
            ),
            stream="shared MLP",
        )
