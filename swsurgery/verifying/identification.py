"""Decide which known model a checkpoint is or was made from.

The caller may name the model. Otherwise the files may name it: the record, the Hugging Face cache or config.json. If
nothing names it, the sizes of the checkpoint select candidates, and the values stored at their known coordinates
decide. Equal sizes prove nothing, because unrelated models have the same sizes. So a model is never identified without
a stored value that fits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.sizes import ModelSizes, read_sizes
from swsurgery.errors import CheckpointError, Unidentified, pluralise
from swsurgery.known import KnownModel, own
from swsurgery.storage.coordinate import Coordinate
from swsurgery.verifying.against_known import Kept, survey
from swsurgery.verifying.known_states import TOLERANCE

TELLING = 0.1
"""Minimum magnitude of a known value that can identify a model.

The weights of a trained projection have a standard deviation of about 0.02, so an unrelated model rarely stores a value
near 0.1 or larger at the same place. It often stores one near 0.002.
"""

CLOSE = TOLERANCE
"""A stored value fits a known one if it differs by at most this fraction of the known value."""

RESIZED = 1024
"""Maximum difference between the vocabulary sizes of two versions of a model, which may add tokens or pad the
embedding.
"""

_REMEDY = "name it with --model if you know it"


@dataclass(frozen=True)
class Identification:
    """The known model that a checkpoint is made from, and how it was identified.

    `by` is "name" (the caller named it), "repository" (the files name its repository) or "values". In the last case
    `fitting` of `compared` stored values fit the known ones, and `twins` are the repositories of models with the same
    known values, for which every answer is the same.
    """

    model: KnownModel = field(repr=False)
    by: Literal["name", "repository", "values"]
    sizes: ModelSizes
    fitting: int = 0
    compared: int = 0
    twins: tuple[str, ...] = ()

    def describe(self) -> str:
        """Describe the identification in one line."""
        if self.by == "name":
            return f"identified as {self.model.hf_id} by the given name"
        if self.by == "repository":
            return f"identified as {self.model.hf_id} by the repository that its files name"
        names = " or ".join((self.model.hf_id, *self.twins))
        values = f"{self.fitting} of {pluralise(self.compared, 'value')}"
        return f"identified as {names} from its sizes and {values}"

    def to_json(self) -> dict[str, Any]:
        """Return the identification as JSON: by, text and sizes, and fitting, compared and twins if by is "values"."""
        document: dict[str, Any] = {"by": self.by, "text": self.describe(), "sizes": self.sizes.to_json()}
        if self.by == "values":
            document |= {"fitting": self.fitting, "compared": self.compared, "twins": list(self.twins)}
        return document


@dataclass(frozen=True)
class Evidence:
    """The values that a checkpoint stores at the known coordinates of one model, as evidence for this model.

    `kept` are the coordinates that have the known value except for rounding, `close` those that differ by at most
    CLOSE, and `other` those that have another value. Only known values from TELLING are compared.
    `distances` maps each compared coordinate to |stored - known| / |known|.
    """

    model: KnownModel
    kept: frozenset[str]
    close: frozenset[str]
    other: frozenset[str]
    distances: dict[str, float]
    states: tuple[tuple[str, str, bool], ...]

    @property
    def fitting(self) -> frozenset[str]:
        """The compared coordinates whose stored value fits the known one."""
        return self.kept | self.close

    @property
    def compared(self) -> frozenset[str]:
        """The coordinates whose known value is compared with the stored one."""
        return self.fitting | self.other

    @property
    def viable(self) -> bool:
        """True if a value is kept, or if at least half of the compared values are close."""
        return bool(self.kept) or bool(self.close) and 2 * len(self.close) >= len(self.compared)


def collect_evidence(model: KnownModel, coordinates: Iterable[Kept]) -> Evidence:
    """Judge the states of the known coordinates of `model` in a checkpoint as evidence for this model."""
    listed = tuple(coordinates)
    distances = {
        each.id: abs(each.ratio - 1)
        for each in listed
        if each.known is not None and each.ratio is not None and abs(each.known) >= TELLING and each.state != "declared"
    }
    near = {name for name, distance in distances.items() if distance <= CLOSE}
    states = {each.id: _simplify_state(each) for each in listed}
    kept = frozenset(name for name in near if states[name] == "kept")
    return Evidence(
        model,
        kept,
        frozenset(near) - kept,
        frozenset(distances) - near,
        distances,
        tuple((each.id, states[each.id], each.held) for each in listed),
    )


def _simplify_state(kept: Kept) -> str:
    """Return the state of a coordinate, with "kept" or "changed" instead of "close".

    Quantisers do not all round to the nearest code, so a close value of a quantised matrix counts as kept.
    """
    if kept.state == "close":
        return "changed" if kept.layout is None else "kept"
    return kept.state


def choose(evidence: Sequence[Evidence]) -> tuple[Evidence, ...]:
    """Return the models that explain the stored values best.

    The result is empty if no value of any model fits. It contains several models if the values do not decide between
    them. Models with the same coordinates in the same states are indistinguishable and all returned.
    """
    viable = tuple(each for each in evidence if each.viable)
    best = tuple(one for one in viable if not any(is_better(other, one) for other in viable))
    return best or viable  # each of three models may be better than the next one, and then none is the best


def is_better(first: Evidence, second: Evidence) -> bool:
    """Return True if the stored values are explained better by `first` than by `second`.

    First, only the coordinates that both models have are compared. The model with more kept values is better. If these
    numbers are equal, the model with fewer other values is better. If these are equal too, the model is better whose
    sum of distances is less than half of the other sum. If that does not decide, the remaining coordinates of each
    model are counted: the number of fitting values minus the number of other values.
    """
    shared = first.compared & second.compared
    for ours, theirs in (
        (len(first.kept & shared), len(second.kept & shared)),
        (len(second.other & shared), len(first.other & shared)),
    ):
        if ours != theirs:
            return ours > theirs
    near, far = (sum(each.distances[name] for name in shared) for each in (first, second))
    if near != far and (2 * near < far or 2 * far < near):
        return near < far
    return _weigh(first, shared) > _weigh(second, shared)


def _weigh(evidence: Evidence, shared: frozenset[str]) -> int:
    return len(evidence.fitting - shared) - len(evidence.other - shared)


def identify_checkpoint(
    checkpoint: Checkpoint, name: str | None, repo_ids: Iterable[object], declared: Collection[Coordinate] = ()
) -> Identification:
    """Identify the known model of a checkpoint: by `name`, by a repository in `repo_ids`, or from sizes and values.

    A repository whose model has other sizes is ignored, because the files may name a model that was reshaped later.
    Values in `declared` were edited on purpose and are no evidence. Raises LookupFailed for an unknown name,
    CheckpointError if the named model has other sizes, and Unidentified if no model can be identified.
    """
    sizes = read_sizes(checkpoint)
    if name is not None:
        model = own.find_model(name)
        if not has_sizes(model, sizes, whole=False):
            what = f"its sizes are not those of {model.hf_id}: it has {sizes}; {model.hf_id} has {_get_sizes(model)}"
            raise CheckpointError(what, checkpoint.root, "name the model that it is made from")
        return Identification(model, "name", sizes)
    named = own.identify(None, repo_ids)
    if named is not None and has_sizes(named, sizes, whole=False):
        return Identification(named, "repository", sizes)
    return _identify_by_values(checkpoint, sizes, declared)


def has_sizes(model: KnownModel, sizes: ModelSizes, whole: bool = True) -> bool:
    """Return True if a known model has these layers, hidden and intermediate size and, if `whole`, this vocabulary.

    If `whole`, the layers, the hidden and the intermediate size must be known. Otherwise, a size that is not known
    fits. A vocabulary that is not known fits, and so does one that differs by at most RESIZED.
    """
    pairs = ((sizes.layers, model.num_layers), (sizes.hidden, model.hidden_size))
    if any(whole if stored is None else stored != known for stored, known in pairs):
        return False
    if model.intermediate_size not in sizes.intermediate and (whole or sizes.intermediate):
        return False
    if not whole or sizes.vocabulary is None or model.vocab_size is None:
        return True
    return abs(sizes.vocabulary - model.vocab_size) <= RESIZED


def _identify_by_values(checkpoint: Checkpoint, sizes: ModelSizes, declared: Collection[Coordinate]) -> Identification:
    alike = [model for model in own.list_all_models() if has_sizes(model, sizes)]
    if not alike:
        what = f"not identified: no known model has its sizes ({sizes})"
        raise Unidentified(what, checkpoint.root, _REMEDY)
    readable = [model for model in alike if any(c.col is not None for c in model.coordinates)]
    evidence = [collect_evidence(model, survey(checkpoint, model, declared).coordinates) for model in readable]
    best = choose(evidence)
    if not best:
        names = _join([model.hf_id for model in alike])
        what = f"not identified: it has the sizes of {names}, but no known value is stored at its place"
        raise Unidentified(what, checkpoint.root, _REMEDY)
    first, *others = best
    if any(each.states != first.states for each in others):
        names = _join([each.model.hf_id for each in best])
        what = f"not identified: its sizes and values fit {names}"
        raise Unidentified(what, checkpoint.root, "name one of them with --model")
    twins = tuple(each.model.hf_id for each in others)
    return Identification(first.model, "values", sizes, len(first.fitting), len(first.compared), twins)


def _get_sizes(model: KnownModel) -> ModelSizes:
    return ModelSizes(model.num_layers, model.hidden_size, (model.intermediate_size,), model.vocab_size)


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
