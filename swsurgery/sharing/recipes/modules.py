"""Find the modules that contain super weights: those of a known model, or those of a checkpoint.

A module is named as the checkpoint stores it, without the ending ".weight". Must not depend on quantisers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.architectures import ExpertChoice
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import open_for_reading
from swsurgery.checkpoint.record import Patched
from swsurgery.errors import ArchitectureError, CheckpointError, PlanError, pluralise
from swsurgery.known import KnownModel, own
from swsurgery.known.lookup import is_checkpoint
from swsurgery.progress import Reporter
from swsurgery.sharing.edit_source import list_steps
from swsurgery.sharing.reading import identify_model, read_with_record
from swsurgery.storage.region import Region

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last parts of the names of the linear layers that choose experts. Examples of quantisers keep them unquantised."""

_HEADS = ("lm_head", "embed_out")
"""Last parts of the names of output heads. GPT-NeoX calls its head `embed_out`."""

_SAFE = re.compile(r"[A-Za-z0-9_.\-]+")
"""Names that need no quoting in Python, JSON, a shell or a regular expression, except for the dots."""

_EXPERT = re.compile(r"(?P<block>.*)\.experts\.(?P<expert>\d+)\.\w+")
"""Name of one expert's matrix that is stored as a tensor of its own."""

_STACK = re.compile(r"(?P<block>.*)\.(?:experts\.\w+|output_linear|input_linear)")
"""Name of a tensor that contains the matrices of all experts of a layer."""

_PARTS = {
    "w1": ("gate_proj",),
    "w3": ("up_proj",),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "input_linear": ("gate_proj", "up_proj"),
}
"""Maps the last part of an expert's stored name to the names of its matrices in transformers. Any other name is that of
a down projection."""

_STORED_WRAPPER, _LOADED_WRAPPER = "language_model.model.", "model.language_model."
"""Prefix of the language model in the files of some vision-language models, and the same prefix in transformers."""


@dataclass(frozen=True)
class KeptModule:
    """A module that contains super weights.

    `name` is its stored name. `expert` is the expert in a mixture of experts. `stacked` is True if one tensor contains
    all experts of the layer. `dtype` is the stored dtype, named as in safetensors; None if it is unknown.
    """

    name: str
    expert: ExpertChoice = None
    stacked: bool = False
    dtype: str | None = None

    @property
    def stack(self) -> str | None:
        """The module in which transformers >= 5 stacks all experts of the layer; None if this is no routed expert."""
        match = (_STACK if self.stacked else _EXPERT).fullmatch(self.name)
        if match is None or not isinstance(self.expert, int):
            return None
        block = match["block"]
        # transformers renames the block of Mixtral, but not that of Granite-MoE, whose experts are stored as a stack.
        if not self.stacked and block.endswith(".block_sparse_moe"):
            block = block.removesuffix("block_sparse_moe") + "mlp"
        return f"{block}.experts"

    def list_names(self, *, split: bool) -> tuple[str, ...]:
        """List the names under which a tool that loads the model with transformers may find the module.

        The stored name is the first. If the module is a routed expert, the next name is that of the stack or, with
        `split`, that of the expert in a tool that splits stacks into one linear layer per expert.
        """
        names = [self.name]
        if self.stack is not None:
            parts = _PARTS.get(self.name.rpartition(".")[2], ("down_proj",))
            names += [f"{self.stack}.{self.expert}.{part}" for part in parts] if split else [self.stack]
        loaded = [_LOADED_WRAPPER + n.removeprefix(_STORED_WRAPPER) for n in names if n.startswith(_STORED_WRAPPER)]
        return tuple(dict.fromkeys((*names, *loaded)))


Modules = dict[tuple[str, ExpertChoice], KeptModule]
"""Maps (stored name, expert) to a module. One stored name may contain several experts."""


@dataclass(frozen=True)
class Subject:
    """The model that a recipe is for.

    `model` is the repository or the directory to load. `heads` are the names of the output head. `has_experts` is True
    for a mixture of experts. `notes` say what the search for modules left out.
    """

    model: str
    heads: tuple[str, ...]
    has_experts: bool
    modules: tuple[KeptModule, ...]
    notes: tuple[str, ...] = ()


def find_subject(subject: str | Path, model: str | None, reporter: Reporter) -> Subject:
    """Find the modules with super weights of a model's name, or of a checkpoint.

    For a name, these are the modules of the known super weights, except refuted ones. For a checkpoint, the modules of
    the edited and protected scalars, and of the protected and restored regions in its record are added; `model` names
    the known model if the checkpoint does not.

    Raises LookupFailed, HubError, CheckpointError; PlanError for a module whose name a recipe cannot contain.
    """
    if not is_checkpoint(subject) and not os.path.isdir(subject):
        if model is not None:
            raise PlanError("--model is only for a checkpoint; this is the name of a model", subject, "leave it out")
        return _read_known(own.find_model(str(subject)))
    with open_for_reading("subject", subject, reporter) as root:
        checkpoint, patched = read_with_record(root)
        return _read_checkpoint(str(subject), checkpoint, patched, model)


def _read_known(known: KnownModel) -> Subject:
    modules: Modules = {}
    for entry in known.coordinates:
        if entry.status != "refuted":
            stacked = entry.expert is not None and _EXPERT.fullmatch(_strip(entry.tensor)) is None
            stacked = stacked and isinstance(entry.expert, int)
            _add(modules, KeptModule(_strip(entry.tensor), entry.expert, stacked, entry.dtype))
    if not modules:
        raise CheckpointError("no super weight of this model is known", known.hf_id, "find them with swsurgery scan")
    head = "embed_out" if known.tensor.startswith("gpt_neox.") else "lm_head"
    return Subject(known.hf_id, (head,), bool(known.num_experts), tuple(modules.values()))


def _read_checkpoint(name: str, checkpoint: Checkpoint, patched: Patched | None, model: str | None) -> Subject:
    modules: Modules = {}
    others = 0
    for record in list_steps(patched):
        for scalar in (*record.edits, *record.protected):
            if scalar.tensor in checkpoint.shapes:
                place = projections.find_short_form(checkpoint.config, checkpoint.shapes, scalar.coordinate)
                _add(modules, _make_module(checkpoint, scalar.tensor, place[3] if place else None))
        restored = [change for change in record.changes if change.op == "restore"]
        for region in (entry.region for entry in (*record.protected_regions, *restored)):
            for expert in _list_experts(region):
                if len(checkpoint.shapes.get(region.tensor, ())) > 1:  # vectors, such as norms, are not quantised
                    _add(modules, _make_module(checkpoint, region.tensor, expert))
        others += len({change.edit for change in record.changes}) - len({change.edit for change in restored})
    known = identify_model(checkpoint, patched, model)
    notes: list[str] = []
    if others:
        what = f"{pluralise(others, 'edit')} of rows, columns, experts or tensors"
        notes.append(f"the modules of {what} are not in the recipe: protect or restore what must stay exact")
    for entry in known.coordinates if known else ():
        if entry.status == "refuted":
            continue
        try:
            found = projections.find_down_projection(checkpoint.config, checkpoint.shapes, entry.layer, entry.expert)
        except ArchitectureError as error:
            notes.append(f"{entry.id} is not in the recipe: {error}")
        else:
            _add(modules, _make_module(checkpoint, found.tensor, entry.expert))
    if not modules:
        without = "its record protects and restores nothing" if patched else "the checkpoint has no record"
        raise CheckpointError(
            f"no module with a super weight was found, because {without} and its model is not known",
            name,
            "name the model with --model, or find super weights with swsurgery scan",
        )
    stored = [_strip(tensor) for tensor in checkpoint.shapes]
    heads = [tensor for tensor in stored if tensor.rpartition(".")[2] in _HEADS]
    loaded = [head.rpartition(".")[2] for head in heads] or ["lm_head"]  # a tied head is not stored
    experts = any(_EXPERT.fullmatch(tensor) or ".experts." in tensor for tensor in stored)
    repository = checkpoint.repo_id if not checkpoint.is_here else None
    return Subject(
        repository or name, tuple(dict.fromkeys((*loaded, *heads))), experts, tuple(modules.values()), tuple(notes)
    )


def _list_experts(region: Region) -> Sequence[ExpertChoice]:
    """Return the experts to which a region belongs; [None] if it belongs to none."""
    if match := _EXPERT.fullmatch(_strip(region.tensor)):
        return [int(match["expert"])]
    return range(*region.bounds[0]) if len(region.bounds) == 3 else [None]


def _make_module(checkpoint: Checkpoint, tensor: str, expert: ExpertChoice) -> KeptModule:
    info = checkpoint.get_info(tensor)
    return KeptModule(_strip(tensor), expert, len(info.shape) == 3, info.dtype.name)


def _add(modules: Modules, module: KeptModule) -> None:
    """Add a module, unless it was added before. Raises PlanError if a recipe cannot contain its name."""
    if not _SAFE.fullmatch(module.name):
        raise PlanError(
            "a recipe cannot contain this name, which is not made of letters, digits, _, - and dots", repr(module.name)
        )
    modules.setdefault((module.name, module.expert), module)


def _strip(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def list_all_names(modules: Iterable[KeptModule], *, split: bool) -> tuple[str, ...]:
    """List the names of all modules in a tool that loads the model with transformers, each name once."""
    return tuple(dict.fromkeys(name for module in modules for name in module.list_names(split=split)))
