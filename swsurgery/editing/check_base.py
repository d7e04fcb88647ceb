"""Find what `check` compares a checkpoint with: the base of its record, or any checkpoint of the same architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import held, open_checkpoint
from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.sizes import ModelSizes, read_sizes
from swsurgery.errors import PlanError, pluralise
from swsurgery.hub import download_checkpoint, parse_location
from swsurgery.model.variant import Variant
from swsurgery.storage.arguments import require_location
from swsurgery.storage.files import has_same_bytes


def find_checked_base(
    patched: Checkpoint,
    record: Record | None,
    base: str | Path | None,
    opened: contextlib.ExitStack,
    say: Callable[[str], None],
) -> Variant | Checkpoint | None:
    """Return the base to compare a checkpoint with, or None if only scalars of the record differ, or nothing is known.

    If `base` is given, the result is this checkpoint: as the tensors of it that differ, or as a checkpoint of its own
    if names, shapes or dtypes of the tensors differ. Otherwise it is the tensors with changed regions or codes, with
    the old bytes of the record and of the undo file. `opened` keeps the base open and locked. `say` receives a line if
    the base differs in more than the record lists.

    Raises PlanError if the base has another architecture or other sizes, and CheckpointError if the old bytes are
    missing.
    """
    if base is not None:
        root = download_checkpoint(parse_location(require_location("base", base)))
        return _compare(patched, record, open_checkpoint(opened.enter_context(held(root))), say)
    if record is None:
        return None
    tensors = frozenset(change.tensor for change in record.changes)
    tensors |= find_coded((edit.tensor for edit in record.edits), patched)
    if not tensors:
        return None
    from swsurgery.editing.overlay_undone import overlay_undone

    return Variant({}, tensors, overlay_undone(patched, record))


def find_coded(tensors: Iterable[str], checkpoint: Checkpoint) -> frozenset[str]:
    """Return those of the tensors that store no plain weights, such as codes and scales of quantised layers.

    A model loaded from them does not contain them, so one loaded model cannot stand for base and patched checkpoint.
    """
    stored = {name for name in tensors if name in checkpoint.shapes}
    return frozenset(name for name in stored if checkpoint.quantisation.explain_refusal(name))


def _compare(
    patched: Checkpoint, record: Record | None, base: Checkpoint, say: Callable[[str], None]
) -> Variant | Checkpoint:
    """Find the tensors of `base` that differ. Raises PlanError if the checkpoints are not of one architecture."""
    _refuse_other_architecture(patched, base)
    if _list_headers(patched) != _list_headers(base):
        return base
    differing = frozenset(name for name in patched.shapes if not _is_same_tensor(name, patched, base))
    listed = {e.tensor for e in record.edits} | {c.tensor for c in record.changes} if record else differing
    if more := sorted(differing - listed):
        count = pluralise(len(more), "tensor")
        say(f"{base.root} is not the base of the record: {count} more differ, such as {more[0]}")
    return Variant({}, differing, base)


def _list_headers(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], str]]:
    """Map the name of each tensor to its shape and dtype."""
    infos = {name: checkpoint.get_info(name) for name in checkpoint.shapes}
    return {name: (tuple(info.shape), info.dtype.name) for name, info in infos.items()}


def _is_same_tensor(name: str, one: Checkpoint, other: Checkpoint) -> bool:
    """Return True if both checkpoints store the same bytes for a tensor of the same size."""
    a, b = (each.shards[each.weight_map[name]] for each in (one, other))
    at, begin = (s.data_start + each.get_info(name).data_offsets[0] for s, each in ((a, one), (b, other)))
    with a.file.open() as ours, b.file.open() as theirs:
        return has_same_bytes(ours, theirs, one.get_info(name).size, at, begin)


def _refuse_other_architecture(patched: Checkpoint, base: Checkpoint) -> None:
    """Raise PlanError if the model types, the sizes, or the shapes of a tensor differ between two checkpoints."""
    types = [each.config.get("model_type") for each in (patched, base)]
    if all(types) and types[0] != types[1]:
        raise PlanError(
            f"the checkpoints have different architectures: {types[0]} in {patched.root}, {types[1]} in {base.root}"
        )
    sizes = [read_sizes(each) for each in (patched, base)]
    if _differ(*sizes):
        raise PlanError(
            f"the checkpoints have different sizes: {sizes[0]} in {patched.root}; {sizes[1]} in {base.root}"
        )
    quantised = [each.quantisation for each in (patched, base)]
    for name in sorted(set(patched.shapes) & set(base.shapes)):
        shapes = [list(each.shapes[name]) for each in (patched, base)]
        if shapes[0] != shapes[1] and not any(each.explain_refusal(name) for each in quantised):
            raise PlanError(
                f"the shapes of a tensor differ: {shapes[0]} in {patched.root}, {shapes[1]} in {base.root}", name
            )


def _differ(one: ModelSizes, other: ModelSizes) -> bool:
    """Return True if a size that is known of both models differs."""
    pairs = ((one.layers, other.layers), (one.hidden, other.hidden), (one.vocabulary, other.vocabulary))
    inner = one.intermediate and other.intermediate and one.intermediate != other.intermediate
    return bool(inner) or any(a and b and a != b for a, b in pairs)
