"""Explain why transformers cannot load a model, and refuse a model that it would load with other weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedConfig

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError, Unrunnable
from swsurgery.hub import get_config_error
from swsurgery.model.refusals import make_missing_error
from swsurgery.model.transformers_private import LoadingInfo, has_quantiser
from swsurgery.storage.memory import is_memory_shortage

LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    ArithmeticError,
    AssertionError,
    SafetensorError,
    get_config_error(),
)
"""Exceptions that transformers raises for a directory that it cannot load. torch raises RuntimeError if memory is
insufficient."""


def make_load_error(error: Exception, directory: Path) -> Unrunnable:
    """Make the error for an exception that transformers raised while it loaded the model in `directory`."""
    if is_memory_shortage(error):
        return Unrunnable("not enough memory to load the model", directory, "free memory, or raise the limit on memory")
    if "can't start new thread" in str(error):
        return Unrunnable("cannot start a thread to load the model", directory, "raise the limit on processes")
    return Unrunnable(
        f"transformers cannot load the model: {get_first_line(error)}",
        directory,
        "repair its config.json, or upgrade transformers",
    )


def make_option_error(error: Exception, options: Mapping[str, object]) -> ModelError | None:
    """Make the error for options that transformers refuses; None if the exception does not name one of `options`."""
    text = get_first_line(error)
    named = [name for name in options if re.search(rf"\b{re.escape(name)}\b", text)]
    if not named:
        return None
    if "unexpected keyword argument" in text:
        remedy = "give device_map" if named == ["device"] else "see from_pretrained of transformers"
        return ModelError("transformers does not know this argument of load_patched", named[0], remedy)
    return ModelError(f"transformers refuses an argument of load_patched: {text}", ", ".join(named), "change it")


def refuse_codes(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Raise Unrunnable if transformers would use the codes of quantised weights as the weights themselves.

    Transformers dequantises only weights that the config declares as quantised, with a method that it knows. Otherwise
    it ignores a `.scale` tensor beside an FP8 weight and only warns. Raises ValueError if no method is declared.
    """
    both = (getattr(one, "quantization_config", None) for one in (config, config.get_text_config()))
    declared = next(filter(None, both), None)
    if declared is None:
        if name := checkpoint.quantisation.find_codes():
            why = checkpoint.quantisation.explain_refusal(name)
            raise Unrunnable(f"transformers would use its codes as weights: {why}", name, "load an unquantised copy")
        return
    if isinstance(declared, dict) and not has_quantiser(declared):
        what = f"transformers cannot load models that were quantised with {declared['quant_method']!r:.40}"
        raise Unrunnable(what, checkpoint.root, "load an unquantised copy")


def refuse_invented(info: LoadingInfo, checkpoint: Checkpoint) -> None:
    """Raise Unrunnable if transformers initialised weights at random, because they are missing or have another shape.

    Also raise it if transformers ignored a tensor of a quantised layer, such as its scale, and took the codes for
    weights. `info` is what from_pretrained reports with output_loading_info=True and ignore_mismatched_sizes=True.
    """
    directory = checkpoint.directory
    misfits = sorted((name, list(stored), list(wanted)) for name, stored, wanted in info["mismatched_keys"])
    for name, stored, wanted in misfits[:1]:
        more = f", and {len(misfits) - 1} more tensors do not fit it" if len(misfits) > 1 else ""
        what = f"{name} is stored as {stored}, but config.json asks for {wanted}{more}"
        raise Unrunnable(what, directory, "repair its config.json")
    if missing := sorted(info["missing_keys"]):
        raise make_missing_error(missing, directory)
    if ignored := _find_ignored(frozenset(info["unexpected_keys"]), checkpoint):
        what = "transformers ignores a tensor that quantised weights depend on"
        raise Unrunnable(what, ignored, "repair quantization_config in config.json")


def _find_ignored(unexpected: frozenset[str], checkpoint: Checkpoint) -> str | None:
    """Find a tensor of a quantised layer that transformers ignored although it loaded the layer; None without one."""
    for name in sorted(unexpected & checkpoint.shapes.keys()):
        module = name.rpartition(".")[0]
        rest = [other for other in checkpoint.shapes if other.rpartition(".")[0] == module]
        if checkpoint.quantisation.has_effect_on_weights(name) and not unexpected.issuperset(rest):
            return name
    return None


def get_first_line(error: Exception) -> str:
    """Return the first non-empty line of the message of `error`, at most 160 characters.

    A line that ends in a colon is joined with the next one. If the message is empty, return the name of the error's
    type.
    """
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    return (lines[0].rstrip(":") if lines else type(error).__name__)[:160]
