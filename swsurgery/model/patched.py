"""Load the model of a checkpoint and apply planned splices in memory.

A splice replaces the stored bytes of one scalar. This module must not depend on the planner, and it writes no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor as Tensor
from torch import nn
from transformers import AutoConfig
from transformers import PreTrainedModel as PreTrainedModel

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError, add_remedy
from swsurgery.model.load import cast_module, get_auto_class, hide_output
from swsurgery.model.load_errors import (
    LOADING_ERRORS,
    make_load_error,
    make_option_error,
    refuse_codes,
    refuse_invented,
)
from swsurgery.model.other_tensors import find_changed_by_loader, replace_parameters
from swsurgery.model.places import Places, find_decoder_layers
from swsurgery.model.torch_dtypes import TORCH_DTYPES
from swsurgery.model.variant import Variant
from swsurgery.model.weight_plan import plan_tensors
from swsurgery.storage.dtypes import format_bits
from swsurgery.storage.splice import Scalar, Splice


def load(
    checkpoint: Checkpoint,
    splices: Sequence[Splice],
    protected: Sequence[Scalar],
    options: dict[str, Any],
    changed: Variant | None = None,
) -> PreTrainedModel:
    """Load the model of `checkpoint` and apply every splice to its parameters; `options` go to from_pretrained.

    `changed` contains the tensors that are read from another checkpoint, with all splices in them. Raises ModelError if
    transformers cannot load the model or would load other weights, if a parameter does not have the stored value, or if
    it is not in memory.
    """
    changed = changed or Variant()
    root = checkpoint.directory
    fixed = {"local_files_only": True, "use_safetensors": True, "variant": checkpoint.variant}
    if options.pop("trust_remote_code", False):
        raise ModelError("code that comes with a checkpoint is not run", root, "leave out trust_remote_code")
    if checkpoint.choice == "index":
        what = f"transformers would load {checkpoint.single}, not the shards that the index lists"
        raise ModelError(what, root, "apply the manifest with base.copies: omit, and load the result")
    try:
        with hide_output():
            config = options.get("config") or AutoConfig.from_pretrained(
                root, local_files_only=True, trust_remote_code=False
            )
            if options.get("quantization_config") is None:
                refuse_codes(checkpoint, config)
            elif getattr(config, "quantization_config", None) is None:
                what = "a model that is quantised while it is loaded cannot be edited"
                raise ModelError(what, root, "write the patched checkpoint with apply, and quantise that")
            model, info = get_auto_class(config).from_pretrained(
                root,
                trust_remote_code=False,
                **{**options, **fixed, "config": config, "output_loading_info": True, "ignore_mismatched_sizes": True},
            )
    except LOADING_ERRORS as error:
        raise make_option_error(error, options) or make_load_error(error, root) from error
    refuse_invented(info, checkpoint)
    checkpoint.refuse_changed()  # transformers opens files by path, so they may have been replaced
    layers = find_decoder_layers(model)
    places = Places(model, layers, checkpoint)
    if changed.tensors:
        _replace_tensors(model, layers, checkpoint, changed)
    for scalar in (*(s for s in splices if s.coordinate.tensor not in changed.tensors), *protected):
        new = scalar.new if isinstance(scalar, Splice) else scalar.old
        _set(places, scalar, new)
    cast_module(model).eval()
    return model


def _replace_tensors(
    model: PreTrainedModel, layers: Sequence[nn.Module], checkpoint: Checkpoint, changed: Variant
) -> None:
    """Give the loaded model the tensors of `changed`, converted to the dtype in which their parameters were loaded."""
    remedy = "apply the manifest and load the result"
    with add_remedy(remedy):
        loaded = plan_tensors(model, layers, checkpoint, changed.tensors, only_text=False)
        new = plan_tensors(model, layers, changed.merge(checkpoint), changed.tensors, only_text=False)
    if tensor := find_changed_by_loader(loaded, torch.device("cpu")):
        what = "the loaded model does not hold the stored values: the loader changes this weight, or it is offloaded"
        raise ModelError(what, tensor, remedy)
    replace_parameters(new)


def _set(places: Places, scalar: Scalar, new: bytes) -> None:
    """Set a stored scalar to `new` in the loaded model, rounded to the dtype in which the weight was loaded.

    `new` contains bytes in the stored dtype. Raises ModelError if the loaded value is not the stored one.
    """
    place = places.find_place(scalar.coordinate)
    weight = place.weight
    if weight.device.type == "meta":
        raise ModelError(
            "the weight is offloaded, so it cannot be edited in memory",
            scalar.coordinate,
            "choose a device_map that keeps it in memory",
        )
    old, wanted = (_make_scalar(scalar.dtype.name, data).to(weight.dtype) for data in (scalar.old, new))
    _check_expected(weight[place.index], old, scalar)
    weight[place.index] = wanted.to(weight.device)
    _check_expected(weight[place.index], wanted, scalar)


def _check_expected(found: Tensor, wanted: Tensor, scalar: Scalar) -> None:
    held, due = (_view_bits(tensor.detach().cpu()) for tensor in (found, wanted))
    if held != due:
        what = f"the loaded model holds {format_bits(held)} ({found.dtype}), not {format_bits(due)}"
        raise ModelError(
            what, scalar.coordinate, "the loader changes this weight: apply the manifest and load the result"
        )


def _make_scalar(dtype: str, data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype])[0]


def _view_bits(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(1).view(torch.uint8).tolist())
