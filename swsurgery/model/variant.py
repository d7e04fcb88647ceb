"""Describe how a variant of a checkpoint differs from it: other scalars, other tensors, or changed activations.

This module must not depend on torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError
from swsurgery.storage.arguments import require_choice, require_integer
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.region import Region

Scalars: TypeAlias = Mapping[Coordinate | Region, float]
"""Maps each scalar that differs from the stored checkpoint to its value; {} is the stored checkpoint itself.

A region stands for all of its scalars, which then have the same value, such as 0.0 in a zeroed expert.
"""

PerActivation = Literal["tensor", "token"]
"""The scalars that share one scale: the whole input of a linear layer, or one token of it."""

OTHER = "other checkpoint: "
"""What `Variant.merge` puts before the names of the other checkpoint's shards. No file name contains a colon there."""


@dataclass(frozen=True)
class Rounding:
    """Round to nearest of the inputs of linear layers in the decoder layers (arXiv:2411.07191, section 4.1).

    Values become integers of `bits` bits, symmetric about 0, times a scale: the largest |value| of the group divided by
    2**(bits - 1) - 1. A group is the input of one linear layer for one window of text (`per` "tensor"), or one token of
    it ("token"). With `hold_out`, the scalar of largest magnitude in each input of each window, the super activation,
    keeps its value and does not count for the scale.
    """

    bits: int
    per: PerActivation = "tensor"
    hold_out: bool = False


def list_roundings(bits: int | None, per: PerActivation) -> tuple[Rounding, ...]:
    """Return the roundings to measure: without and with the super activation held out; none if `bits` is None.

    Raises TypeError for a wrong type or choice, and ModelError for bits other than 2 to 16.
    """
    require_choice("activation_per", per, get_args(PerActivation))
    if bits is None:
        return ()
    count = require_integer("activation_bits", bits)
    if not 2 <= count <= 16:
        raise ModelError("activations cannot be rounded to this number of bits", count, "give 2 to 16")
    return Rounding(count, per), Rounding(count, per, hold_out=True)


def describe_rounding(rounding: Rounding | None) -> str:
    """Describe a rounding for a table, such as "8 bits per token, super activation held out"."""
    if rounding is None:
        return "as computed"
    held = ", super activation held out" if rounding.hold_out else ""
    return f"{rounding.bits} bits per {rounding.per}{held}"


@dataclass(frozen=True)
class Variant:
    """A loaded checkpoint with other values for `scalars`, and with `tensors` (stored names) read from `checkpoint`.

    The other checkpoint stores these tensors in the same shapes. It may be virtual: only the files of its shards are
    read. No scalar is in one of the tensors. `rounding` None leaves the activations as they are. The scalars in `held`
    are 0 in the variant, and an object that watches the run adds the means of their products instead (`held_means.py`).
    """

    scalars: Scalars = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()
    checkpoint: Checkpoint | None = None
    rounding: Rounding | None = None
    held: frozenset[Coordinate] = frozenset()

    def __post_init__(self) -> None:
        """Raise ValueError for tensors without a checkpoint, a scalar in one of the tensors, or a held scalar not 0."""
        if self.tensors and self.checkpoint is None:
            raise ValueError("tensors need a checkpoint from which they are read")
        if any(self.scalars.get(coordinate) != 0 for coordinate in self.held):
            raise ValueError("a held scalar is not 0")
        if any(coordinate.tensor in self.tensors for coordinate in self.scalars):
            raise ValueError("a scalar is in a tensor of the other checkpoint")

    @classmethod
    def of(cls, variant: AnyVariant) -> Variant:
        """Convert a mapping of scalars to a variant; a Variant is returned itself."""
        return variant if isinstance(variant, Variant) else cls(variant)

    @property
    def is_stored(self) -> bool:
        """True if the variant is the loaded checkpoint itself."""
        return not self.scalars and not self.tensors and self.rounding is None

    def without_tensors(self) -> Variant:
        """Return the variant without its tensors, for the checkpoint that `merge` returns."""
        return replace(self, tensors=frozenset(), checkpoint=None)

    def merge(self, loaded: Checkpoint) -> Checkpoint:
        """Return the checkpoint `loaded` with the variant's tensors in place of its own, without the scalars.

        Raises ModelError if one of the two has no such tensor, or if the shapes or the dtypes differ.
        """
        if self.checkpoint is None:
            return loaded
        other, weight_map = self.checkpoint, dict(loaded.weight_map)
        for tensor in sorted(self.tensors):
            if tensor not in loaded.shapes or tensor not in other.shapes:
                raise ModelError("no such tensor in both checkpoints", tensor)
            ours, theirs = loaded.get_info(tensor), other.get_info(tensor)
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                raise ModelError("the tensor has another shape or dtype in the other checkpoint", tensor)
            weight_map[tensor] = OTHER + other.weight_map[tensor]
        shards = {OTHER + name: shard for name, shard in other.shards.items()}
        return replace(loaded, shards={**loaded.shards, **shards}, weight_map=weight_map)


AnyVariant: TypeAlias = Variant | Scalars
"""A variant, or only its scalars."""
