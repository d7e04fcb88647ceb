"""Compare the layers of a model with one another, and with the numbers of layers and experts in config.json.

Layers of one kind have the same tensors with the same shapes. A layer that lacks a tensor of its peers is damaged,
unless a key of config.json, such as `first_k_dense_replace` or `layer_types`, gives it another kind. The comparison
needs no table of tensors for each model family. The family adds one rule, which also holds for a layer without peers:
the matrices of one MLP belong together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from swsurgery.checkpoint.damage import find_gaps
from swsurgery.checkpoint.declared import Declared
from swsurgery.checkpoint.family import ProjectionKind, Template
from swsurgery.checkpoint.model_config import find_known_families
from swsurgery.checkpoint.weight_files import MAX_LISTED
from swsurgery.errors import list_some, pluralise
from swsurgery.verifying.complete_names import LayerList, Member, Shape

K = TypeVar("K", bound=Hashable)

_NOT_IN_EVERY_LAYER = re.compile(
    r"(.*\.)?((relative_attention_bias|ln0|attn_norm|attention_input|shared_transf(ormer)?)\..*|router_states_scale)"
)
"""The pattern of tensors that only the first layer has (T5, RWKV) or lacks (ModernBERT, Inkling 2, Zaya), or that
layers share (Zamba)."""

_TABLE = re.compile(r"(.*\.)?rel_pos_[hw]")
"""The pattern of tables of relative positions. Layers with local and with global attention have tables of two sizes."""

_MLP = re.compile(r"mlp|ffn|feed_forward|moe|expert|(^|\.)fc|shared|router|gate")
_ATTENTION = re.compile(r"attn|attention|mixer|mamba|conv|temporal|ssm")

_STACKED = re.compile(r"(.*\.)?experts\.[a-z_0-9]+|(.*\.)?block_sparse_moe\.(in|out)put_linear\.weight")
"""The pattern of tensors that store all experts of a layer, with the experts as the first axis."""

MAX_MODULES = 5
"""Maximum number of modules that are named in a line about what was not examined."""

_COMPARED_CLASSES = 8
"""Maximum number of kinds of layers that are compared with each layer. It bounds the time for hostile files."""


@dataclass(frozen=True)
class Lack:
    """One thing that the checkpoint lacks or has in a wrong shape.

    `rule` is the name of the rule. `name` is the name of the tensor, or the prefix of the names of all tensors of a
    layer or an expert, or "" if it is unknown. `message` describes the fault. `near` is a stored tensor of the same
    layer, or None. `names` are the names that the tensor may have if `name` is unknown, without their prefixes.
    """

    rule: str
    name: str
    message: str
    near: str | None = None
    names: tuple[str, ...] = ()


def compare_layers(
    layers: LayerList, depth: int, declared: Declared, config: Mapping[str, object], side: str
) -> list[Lack]:
    """Compare the layers 0 to `depth` - 1 of one list. `side` is the key of `Declared.depths` for this list."""
    inside = {number: layer for number, layer in layers.layers.items() if number < depth}
    kinds = _Kinds(declared if not side else None)
    lacks = [*_list_missing_layers(layers.prefix, inside, depth, declared.source)]
    absent = dict(_list_absent(inside, kinds))
    groups = _list_groups(config)
    for number, matrices in _list_absent_in_mlps(inside, groups):
        absent[number] = dict.fromkeys(matrices, 0) | absent.get(number, {})
    for number, matrices in _list_absent_mlps(inside, groups):
        absent.setdefault(number, dict.fromkeys(matrices, 0))
    for number, patterns in sorted(absent.items()):
        for pattern, peers in sorted(patterns.items()):
            why = f"{_count(peers, 'similar layer')} it" if peers else "the layer has other tensors"
            near = _find_near(inside[number], pattern)
            lacks.append(
                Lack("tensor-missing", f"{layers.prefix}{number}.{pattern}", f"is not stored, but {why}", near)
            )
    lacks += _list_missing_experts(layers, inside, declared)
    lacks += _list_missing_scales(layers, inside)
    lacks += _list_other_shapes(inside, declared, kinds)
    lacks += _list_other_stacks(inside, declared)
    return lacks


def _find_near(layer: Mapping[str, Sequence[Member]], pattern: str) -> str | None:
    """Return the name of a stored tensor of a layer, preferably one of the same module."""
    top = pattern.partition(".")[0]
    found = [m[0].name for p, m in layer.items() if p.partition(".")[0] == top] or [m[0].name for m in layer.values()]
    return found[0] if found else None


class _Kinds:
    """The keys of config.json that divide the layers into kinds."""

    def __init__(self, declared: Declared | None):
        self._kinds = declared.kinds if declared else ()

    def sets_apart(self, layer: int, others: Iterable[int], patterns: Iterable[str]) -> bool:
        """Return True if one key that concerns all of `patterns` gives `layer` another kind than all of `others`."""
        others = list(others)
        parts = {_find_part(pattern) for pattern in patterns}
        for each in self._kinds:
            concerned = each.part == "any" or parts == {each.part}
            if concerned and each.kinds[layer] not in {each.kinds[other] for other in others}:
                return True
        return False


def _find_part(pattern: str) -> str:
    top = pattern.partition(".")[0]
    if _ATTENTION.search(top):
        return "attention"
    return "mlp" if _MLP.search(pattern) else "any"


# Layers -------------------------------------------------------------------------------------------------------------


def _list_missing_layers(prefix: str, inside: Mapping[int, object], depth: int, source: str) -> Iterator[Lack]:
    gaps, count = find_gaps(inside.keys(), 0, depth)
    for number in gaps:
        why = f"none of its tensors is stored, but {source} declares {pluralise(depth, 'layer')}"
        yield Lack("layer-missing", f"{prefix}{number}.", f"layer {number} is missing: {why}")
    if count > len(gaps):
        yield Lack("layer-missing", prefix, f"{count - len(gaps)} more layers are missing")


def _list_absent(inside: Mapping[int, Mapping[str, object]], kinds: _Kinds) -> Iterator[tuple[int, dict[str, int]]]:
    """Yield each damaged layer with the patterns that it lacks, and the number of peers that have them."""
    tops: dict[str, dict[int, set[str]]] = {}
    for number, layer in inside.items():
        for pattern in layer:
            if not _NOT_IN_EVERY_LAYER.fullmatch(pattern):
                tops.setdefault(pattern.partition(".")[0], {}).setdefault(number, set()).add(pattern)
    absent: dict[int, dict[str, int]] = {}
    whole = {number: frozenset(top for top in tops if number in tops[top]) for number in inside}
    for number, (missing, peers) in find_subsets(whole).items():
        patterns = {p for top in missing for p in Counter(frozenset(tops[top][n]) for n in peers).most_common(1)[0][0]}
        if not kinds.sets_apart(number, peers, patterns):
            absent.setdefault(number, {}).update(dict.fromkeys(patterns, len(peers)))
    for sets in tops.values():
        for number, (missing, peers) in find_subsets({n: frozenset(s) for n, s in sets.items()}).items():
            if not kinds.sets_apart(number, peers, missing):
                absent.setdefault(number, {}).update(dict.fromkeys(missing, len(peers)))
    yield from absent.items()


def find_subsets(sets: Mapping[K, frozenset[str]]) -> dict[K, tuple[frozenset[str], list[K]]]:
    """Find the members whose set lacks something that the set of more members contains.

    Returns a dict from each such member to what its set lacks, and to the members that have it. If only two sets of one
    member each exist, the smaller one lacks something.
    """
    classes: dict[frozenset[str], list[K]] = {}
    for key, each in sets.items():
        classes.setdefault(each, []).append(key)
    common = sorted(classes, key=lambda each: -len(classes[each]))[:_COMPARED_CLASSES]
    found: dict[K, tuple[frozenset[str], list[K]]] = {}
    for smaller, keys in classes.items():
        for larger in common:
            peers = classes[larger]
            if smaller < larger and (len(peers) > len(keys) or len(peers) == len(keys) == 1):
                found.update(dict.fromkeys(keys, (larger - smaller, peers)))
                break
    return found


# MLPs ---------------------------------------------------------------------------------------------------------------


Matrices = tuple[str, ...]
"""The patterns of the matrices of one MLP: its down projection and its input projections."""


def _list_groups(config: Mapping[str, object]) -> dict[Matrices, ProjectionKind]:
    """Return the MLPs that the layers of the model's family may have, with their kinds; {} for an unknown family."""
    templates = [template for family in find_known_families(config) for template in family.templates]
    return {_list_matrices(template): template.kind for template in templates if template.inputs is not None}


def _list_absent_mlps(
    inside: Mapping[int, Mapping[str, object]], groups: Mapping[Matrices, ProjectionKind]
) -> Iterator[tuple[int, Matrices]]:
    """Yield the layer without an MLP if all others have one, with the patterns of the dense MLP of the family."""
    dense = [group for group, kind in groups.items() if kind == "dense"]
    without = [n for n, layer in inside.items() if not any(pattern in layer for group in groups for pattern in group)]
    if len(dense) == 1 and len(without) == 1 and len(inside) > 1:
        yield without[0], dense[0]


def _list_absent_in_mlps(
    inside: Mapping[int, Mapping[str, object]], groups: Collection[Matrices]
) -> Iterator[tuple[int, Matrices]]:
    """Yield each layer that stores some matrices of an MLP but not all, with the patterns that it lacks."""
    if not groups:
        return
    for number, layer in inside.items():
        partial = [group for group in groups if any(p in layer for p in group)]
        whole = {p for group in partial if all(p in layer for p in group) for p in group}
        broken = [group for group in partial if whole.isdisjoint(group)]
        if broken:
            best = min(broken, key=lambda group: sum(p not in layer for p in group))
            yield number, tuple(p for p in best if p not in layer)


def _list_matrices(template: Template) -> Matrices:
    """Return the patterns of the down projection and the input projections of one template."""
    down = template.name.partition("{layer}.")[2].replace("{expert}", "*")
    module, _, weight = down.removesuffix(".weight").rpartition(".")
    names = template.inputs.names if template.inputs else ()
    ending = ".weight" if down.endswith(".weight") else ""
    return (down, *(f"{module}.{name}{ending}" if module else f"{name}{ending}" for name in names))


# Experts and scales -------------------------------------------------------------------------------------------------


def _list_missing_experts(
    layers: LayerList, inside: Mapping[int, Mapping[str, Sequence[Member]]], declared: Declared
) -> Iterator[Lack]:
    """Yield each expert that is missing, and each tensor that one expert lacks."""
    stacks = _sort_experts(inside)
    counts: dict[str, int] = {}
    for (stem, _), experts in stacks.items():
        counts[stem] = max(counts.get(stem, 0), max(experts) + 1)
    for (stem, number), experts in stacks.items():
        # LongCat stores matrices for its zero experts too, which config.json does not count.
        count = max((n for n in declared.experts if n <= counts[stem]), default=min(declared.experts, default=0))
        yield from _list_lacks_of_experts(f"{layers.prefix}{number}.{stem}", experts, count or counts[stem])


def _sort_experts(
    inside: Mapping[int, Mapping[str, Sequence[Member]]],
) -> dict[tuple[str, int], dict[int, dict[str, str]]]:
    """Return the experts of each mixture, by (name up to the expert's number, layer): the stored names by leaf."""
    stacks: dict[tuple[str, int], dict[int, dict[str, str]]] = {}
    for number, layer in inside.items():
        for pattern, members in layer.items():
            stem, _, leaf = pattern.partition("*.")
            numbered = [(member.expert, member.name) for member in members if member.expert is not None]
            for expert, name in numbered:
                stacks.setdefault((stem, number), {}).setdefault(expert, {})[leaf] = name
    return stacks


def _list_lacks_of_experts(prefix: str, experts: Mapping[int, Mapping[str, str]], count: int) -> Iterator[Lack]:
    """Yield what is missing in the experts 0 to `count` - 1 of one layer. `experts` maps leaves to stored names."""
    near = next(iter(experts[min(experts)].values()))
    gaps, missing = find_gaps(experts.keys(), 0, count)
    for expert in gaps:
        what = f"expert {expert} is missing: none of its tensors is stored, but the layer has {count} experts"
        yield Lack("expert-missing", f"{prefix}{expert}.", what, near)
    if missing > len(gaps):
        yield Lack("expert-missing", prefix, f"{missing - len(gaps)} more experts are missing", near)
    inside = {expert: frozenset(leaves) for expert, leaves in experts.items() if expert < count}
    for expert, (leaves, peers) in find_subsets(inside).items():
        for leaf in sorted(leaves):
            why = f"is not stored, but {_count(len(peers), 'other expert')} it"
            yield Lack("tensor-missing", f"{prefix}{expert}.{leaf}", why, next(iter(experts[expert].values())))


def _list_missing_scales(layers: LayerList, inside: Mapping[int, Mapping[str, Sequence[Member]]]) -> Iterator[Lack]:
    """Yield the scales that a quantised module lacks although the same module of most layers has them."""
    coded: dict[str, dict[tuple[int, int | None], frozenset[str]]] = {}
    names: dict[tuple[str, int, int | None], str] = {}
    if not layers.scales:
        return
    for number, layer in inside.items():
        for pattern, members in layer.items():
            for member in members:
                if member.coded:
                    module = pattern.removesuffix(".weight")
                    found = layers.scales.get((number, member.expert, module), set())
                    coded.setdefault(module, {})[number, member.expert] = frozenset(found)
                    names[module, number, member.expert] = member.name
    for module, sets in coded.items():
        for (number, expert), (missing, peers) in find_subsets(sets).items():
            name = names[module, number, expert]
            why = f"beside the codes is missing, but {_count(len(peers), 'similar module')} it"
            for last in sorted(missing):
                yield Lack("tensor-missing", f"{name.rpartition('.')[0]}.{last}", why, name)


# Shapes -------------------------------------------------------------------------------------------------------------


def _list_other_shapes(
    inside: Mapping[int, Mapping[str, Sequence[Member]]], declared: Declared, kinds: _Kinds
) -> Iterator[Lack]:
    """Yield each tensor whose shape differs from the shape that most of its peers have."""
    members: dict[str, list[Member]] = {}
    for layer in inside.values():
        for pattern, each in layer.items():
            if not _TABLE.fullmatch(pattern):
                members.setdefault(pattern, []).extend(m for m in each if m.shape is not None)
    for pattern, each in members.items():
        shapes: dict[Shape, list[Member]] = {}
        for member in each:
            shapes.setdefault(member.shape or (), []).append(member)
        if len(shapes) > 1:
            yield from _list_deviations(pattern, shapes, declared.numbers, kinds)


def _list_deviations(
    pattern: str, shapes: Mapping[Shape, Sequence[Member]], numbers: Collection[int], kinds: _Kinds
) -> Iterator[Lack]:
    """Yield the tensors of one pattern that have another shape than most. A tie is decided by config.json's numbers."""
    ranked = sorted(shapes, key=lambda s: (-len(shapes[s]), sum(n not in numbers for n in s), shapes[s][0].layer))
    usual, peers = ranked[0], shapes[ranked[0]]
    for shape in ranked[1:]:
        if len(shapes[shape]) == len(peers) > 1:
            continue
        for member in shapes[shape]:
            if not kinds.sets_apart(member.layer, {peer.layer for peer in peers}, [pattern]):
                what = f"is stored as {list(shape)}, but {_count(len(peers), 'comparable tensor')} {list(usual)}"
                yield Lack("shape-mismatch", member.name, what, member.name)


def _list_other_stacks(inside: Mapping[int, Mapping[str, Sequence[Member]]], declared: Declared) -> Iterator[Lack]:
    """Yield the tensors that store all experts, if the number of their experts is not one that config.json states."""
    seen: set[str] = set()
    for layer in inside.values():
        for pattern, members in layer.items():
            shape = members[0].shape
            if pattern in seen or shape is None or len(shape) < 3 or not _STACKED.fullmatch(pattern):
                continue
            seen.add(pattern)
            if declared.experts and declared.experts.isdisjoint((shape[0], shape[0] - declared.zero_experts)):
                stated = " or ".join(map(str, sorted(declared.experts)))
                what = f"is stored as {list(shape)} with {shape[0]} experts, but config.json declares {stated}"
                yield Lack("shape-mismatch", members[0].name, what, members[0].name)


def _count(number: int, noun: str) -> str:
    """Return a counted noun and its verb, as in "1 peer has" and "2 peers have"."""
    return f"{pluralise(number, noun)} {'has' if number == 1 else 'have'}"


def list_incomparable(layers: LayerList, depth: int, config: Mapping[str, object]) -> str | None:
    """Describe the modules that only one of the layers 0 to `depth` - 1 has in this form; None if there are none.

    Nothing shows whether such a module lacks a tensor, except in the MLPs of a known family.
    """
    known = {pattern for group in _list_groups(config) for pattern in group}
    forms: dict[tuple[str, frozenset[str]], list[int]] = {}
    for number, layer in layers.layers.items():
        tops: dict[str, set[str]] = {}
        for pattern in layer:
            if number < depth and not _NOT_IN_EVERY_LAYER.fullmatch(pattern):
                tops.setdefault(pattern.partition(".")[0], set()).add(pattern)
        for top, patterns in tops.items():
            if not patterns <= known:
                forms.setdefault((top, frozenset(patterns)), []).append(number)
    alone = sorted((numbers[0], top) for (top, _), numbers in forms.items() if len(numbers) == 1)
    if not alone:
        return None
    named = [f"{layers.prefix}{number}.{top}" for number, top in alone]
    listed = list_some(named, MAX_MODULES)
    return (
        f"whether {listed} {'is' if len(named) == 1 else 'are'} complete, because no other layer has the same tensors"
    )


def select_listed(lacks: Iterable[Lack]) -> list[Lack]:
    """Return at most MAX_LISTED findings of each rule, and one more finding that counts the others of the rule."""
    kept: list[Lack] = []
    counts: Counter[str] = Counter()
    for lack in lacks:
        counts[lack.rule] += 1
        if counts[lack.rule] <= MAX_LISTED:
            kept.append(lack)
    more = {rule: count - MAX_LISTED for rule, count in counts.items() if count > MAX_LISTED}
    return kept + [Lack(rule, "", f"and {count} more of these") for rule, count in more.items()]
