"""Wrap the private names of transformers that this package uses.

No other module uses such names. If a release of transformers drops one of them, one function breaks, and the test of
that function fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from os import PathLike
from typing import Any, Protocol, cast

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

__all__ = [
    "AutoClass",
    "get_declared_class",
    "get_language_model_class",
    "serve_metadata",
    "has_quantiser",
    "list_names_kept_in_float32",
    "no_init_weights",
]

LoadingInfo = Mapping[str, Collection[Any]]
"""What from_pretrained reports if called with output_loading_info=True. It maps a kind of problem, such as
"missing_keys", to the names of the weights concerned; "mismatched_keys" is mapped to tuples of a name and two
shapes."""


class AutoClass(Protocol):
    """An automatic class of transformers, such as AutoModelForCausalLM: the two methods used here, with types."""

    def from_config(self, config: PreTrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
        """Build a model of `config` without reading weights."""

    def from_pretrained(
        self, directory: str | PathLike[str] | None, /, **options: Any
    ) -> tuple[PreTrainedModel, LoadingInfo]:
        """Load a model. Returns its loading info too, so `options` must contain output_loading_info=True.

        `directory` is None if `options` contain the tensors as state_dict.
        """


def get_language_model_class(config: PreTrainedConfig) -> AutoClass | None:
    """Return the automatic class that builds a language model of `config`; None if transformers has no such model.

    Language models that also accept images are included.
    """
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return cast(AutoClass, auto)  # its annotations name neither the model classes nor the loading info
    return None


def get_declared_class(config: PreTrainedConfig) -> AutoClass | None:
    """Return the class of transformers that `architectures` in config.json names, else its language model.

    Returns None if transformers has neither.
    """
    for name in config.architectures or ():
        found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return cast(AutoClass, found)
    auto = get_language_model_class(config)
    return cast(AutoClass, cast(Any, auto)._model_mapping[type(config)]) if auto else None


def list_names_kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the names of the modules whose weights transformers keeps in float32 when it loads `model` in `dtype`."""
    strict = model._keep_in_fp32_modules_strict or ()
    half = model._keep_in_fp32_modules or ()
    return (*strict, *half) if dtype == torch.float16 else tuple(strict)


def has_quantiser(declared: Mapping[str, object]) -> bool:
    """Return True if transformers has the quantiser that `quantization_config` declares.

    It loads the model as if it were not quantised otherwise. Raises ValueError if no method is declared.
    """
    return bool(cast(Any, AutoHfQuantizer).supports_quant_method(declared))


@contextlib.contextmanager
def serve_metadata(metadata: Mapping[str, str]) -> Iterator[None]:
    """Let transformers find the metadata of shards for the length of a block in which it loads tensors, not files.

    The metadata tell which torchao tensors belong together. Transformers reads them only from files.
    """
    quantiser = cast(Any, TorchAoHfQuantizer)
    quantiser.metadata = dict(metadata)
    try:
        yield
    finally:
        del quantiser.metadata
