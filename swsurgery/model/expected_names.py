"""Ask transformers which tensors it expects in a checkpoint, without loading weights.

The model is built on the meta device of torch, which has shapes and no values. Every stored tensor is represented by a
tensor of the same shape on this device. Transformers loads these tensors as it would load the checkpoint, with its own
renaming and conversion, and reports what is missing, left over or of another shape.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import Unrunnable
from swsurgery.model.load import hide_output
from swsurgery.model.load_errors import LOADING_ERRORS, get_first_line, make_load_error
from swsurgery.model.refusals import refuse_dtype, refuse_pointers
from swsurgery.model.torch_dtypes import get_streamed_dtype
from swsurgery.model.transformers_private import get_declared_class

MAX_FAULTY_NAMES = 20
"""Maximum number of names of each kind that are reported one by one."""

_LAYER = re.compile(r"(?:^|\.)((?:layers|layer|h|blocks|block)\.\d+\..*)")


@dataclass(frozen=True)
class Expectation:
    """The names for which a checkpoint and the model of transformers disagree.

    `missing` and `misfits` have names of the model's parameters, `unexpected` has names of stored tensors. `failure` is
    the reason if transformers could not convert the stored tensors, otherwise None.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misfits: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    failure: str | None = None

    @property
    def agrees(self) -> bool:
        """True if transformers finds every parameter, each with its shape, and no other tensor."""
        return not (self.missing or self.unexpected or self.misfits or self.failure)

    def to_json(self) -> dict[str, Any]:
        """Return the names as JSON."""
        return {
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "other_shapes": [{"name": n, "stored": list(s), "expected": list(e)} for n, s, e in self.misfits],
            "failure": self.failure,
        }

    def list_faults(self, covered: Collection[str]) -> Iterator[tuple[str, str, None, str | None]]:
        """Yield (rule, message, None, tensor) for each fault that the names in `covered` do not explain already.

        A name in `covered` that ends in a period is a prefix. The name of a tensor outside the layers may lack its
        prefix.
        """
        known = [_get_tail(name) for name in covered]
        missing = [name for name in self.missing if not _is_covered(name, known)]
        for name in missing[:MAX_FAULTY_NAMES]:
            yield "transformers-missing", "the model of transformers has it, but it is not stored", None, name
        yield from _count_more("transformers-missing", missing)
        misfits = [misfit for misfit in self.misfits if not _is_covered(misfit[0], known)]
        for name, stored, wanted in misfits[:MAX_FAULTY_NAMES]:
            what = f"is loaded as {list(stored)}, but the model of transformers has {list(wanted)}"
            yield "transformers-shape", what, None, name
        yield from _count_more("transformers-shape", misfits)
        for name in self.unexpected[:MAX_FAULTY_NAMES]:
            yield "transformers-unexpected", "is stored, but transformers does not load it", None, name
        yield from _count_more("transformers-unexpected", self.unexpected)
        if self.failure and not known:
            yield "transformers-missing", f"transformers cannot convert the stored tensors: {self.failure}", None, None


def _count_more(rule: str, names: Collection[object]) -> Iterator[tuple[str, str, None, None]]:
    if len(names) > MAX_FAULTY_NAMES:
        yield rule, f"and {len(names) - MAX_FAULTY_NAMES} more of these", None, None


def _get_tail(name: str) -> str:
    """Return a name from its layer on, because prefixes of stored and loaded names differ."""
    match = _LAYER.search(name)
    return match[1] if match else name


def _is_covered(name: str, known: Collection[str]) -> bool:
    """Return True if the fault of a loaded parameter follows from a fault that is reported for stored tensors."""
    tail = _get_tail(name)
    return any(
        tail == each
        or tail.endswith(f".{each}")
        or (each.endswith(".") and tail.startswith(each))
        or _is_joined(tail, each)
        for each in known
    )


def _is_joined(loaded: str, stored: str) -> bool:
    """Return True if the stored tensor is a part of the loaded parameter, which joins all experts of its layer."""
    layer = re.match(r"\w+\.\d+\.", stored)
    return bool(layer and "experts." in stored and loaded.startswith(layer[0]) and "experts." in loaded)


def compare_with_transformers(checkpoint: Checkpoint) -> Expectation:
    """Let transformers load the stored names and shapes on the meta device, and report what does not fit.

    Raises Unrunnable if transformers does not know the model type or cannot build the model, or if the checkpoint is
    quantised. Code that comes with the checkpoint is never run.
    """
    directory = checkpoint.directory
    refuse_pointers(directory)
    refuse_dtype(directory)
    if checkpoint.quantisation.declared is not None:
        what = f"--transformers cannot compare a quantised checkpoint ({checkpoint.quantisation.declared})"
        raise Unrunnable(what, directory, "use --complete alone")
    try:
        with hide_output():
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            return _load_on_meta(checkpoint, config)
    except LOADING_ERRORS as error:
        if "accelerate" in str(error):
            raise Unrunnable("accelerate is not installed", directory, "pip install accelerate") from error
        raise make_load_error(error, directory) from error


def _load_on_meta(checkpoint: Checkpoint, config: transformers.PreTrainedConfig) -> Expectation:
    """Load empty tensors into the model of `config`. Raises any of LOADING_ERRORS, and Unrunnable."""
    model_class = get_declared_class(config)
    if model_class is None:
        raise Unrunnable(f"transformers has no model of model_type {config.model_type}", checkpoint.directory)
    try:
        _, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(_make_empty(checkpoint)),
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except RuntimeError as error:
        return Expectation((), (), (), get_first_line(error))
    return Expectation(
        tuple(sorted(info["missing_keys"])),
        tuple(sorted(info["unexpected_keys"])),
        tuple(sorted((name, tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"])),
    )


def _make_empty(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield each stored tensor as a tensor of the same shape on the meta device, which takes no memory."""
    for name, shape in checkpoint.shapes.items():
        dtype = get_streamed_dtype(checkpoint.get_info(name).dtype.name) or torch.bfloat16
        yield name, torch.empty(shape, dtype=dtype, device="meta")
