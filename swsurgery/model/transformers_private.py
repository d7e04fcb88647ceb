"""The private names of transformers that this package uses.

No other module uses one, so a release that drops a name breaks one function, and the test of that name says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any, Protocol, cast

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

__all__ = ["AutoClass", "get_language_model_class", "list_names_kept_in_float32", "no_init_weights"]

LoadingInfo = Mapping[str, Collection[Any]]
"""What from_pretrained reports with output_loading_info: for each kind of problem, the names or tuples found."""


class AutoClass(Protocol):
    """The two methods of transformers' automatic classes that are called here, with types."""

    def from_config(self, config: PreTrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
        """Build a model without reading weights."""

    def from_pretrained(self, directory: str | PathLike[str], /, **options: Any) -> tuple[PreTrainedModel, LoadingInfo]:
        """Load a model. Returns its loading info too, so `options` must contain output_loading_info=True."""


def get_language_model_class(config: PreTrainedConfig) -> AutoClass | None:
    """Return the automatic class that builds a model of `config`, or None if transformers has no language model for it.

    Language models that also accept images are included.
    """
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return cast(AutoClass, auto)  # its annotations name neither the model classes nor the loading info
    return None


def list_names_kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the names of the modules whose weights transformers keeps in float32 when it loads `model` in `dtype`."""
    strict = model._keep_in_fp32_modules_strict or ()
    half = model._keep_in_fp32_modules or ()
    return (*strict, *half) if dtype == torch.float16 else tuple(strict)
