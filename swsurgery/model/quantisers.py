"""Decide whether transformers can load a quantised model with the packages that are installed.

The answer depends on config.json and on the names of the installed packages. This module must not import torch.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

PACKAGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "aqlm": ("AQLM", ("aqlm", "accelerate")),
    "auto-round": ("AutoRound", ("auto-round",)),
    "awq": ("AWQ", ("gptqmodel", "accelerate")),
    "bitnet": ("BitNet", ("accelerate",)),
    "bitsandbytes": ("bitsandbytes", ("bitsandbytes", "accelerate")),
    "compressed-tensors": ("compressed-tensors", ("compressed-tensors",)),
    "eetq": ("EETQ", ("kernels", "accelerate")),
    "fbgemm_fp8": ("FBGEMM", ("fbgemm-gpu", "accelerate")),
    "fp8": ("FP8", ("accelerate",)),
    "fp_quant": ("FP-Quant", ("fp-quant",)),
    "gptq": ("GPTQ", ("gptqmodel", "optimum")),
    "higgs": ("HIGGS", ("flute-kernel", "accelerate")),
    "hqq": ("HQQ", ("hqq",)),
    "mxfp4": ("MXFP4", ("accelerate",)),
    "quanto": ("quanto", ("optimum-quanto", "accelerate")),
    "quark": ("Quark", ("amd-quark",)),
    "sinq": ("SINQ", ("sinq",)),
    "spqr": ("SpQR", ("spqr-quant", "accelerate")),
    "torchao": ("torchao", ("torchao",)),
    "vptq": ("VPTQ", ("vptq", "accelerate")),
}  # fmt: skip
"""The name of each quantisation method for people, and the packages without which transformers 5 does not load it.

Methods are named as `quant_method` in config.json. Source: the method `validate_environment` of each quantiser in
transformers/quantizers. `accelerate` places the weights on the device.
"""


def find_method(config: Mapping[str, object]) -> str | None:
    """Return the quantisation method that config.json declares for the language model.

    Returns None without a declaration, and "unnamed" for a declaration that does not name a method.
    """
    for section in (config, config.get("text_config")):
        declared = section.get("quantization_config") if isinstance(section, Mapping) else None
        if not declared:
            continue
        if not isinstance(declared, Mapping):
            return "unnamed"
        if declared.get("load_in_4bit") or declared.get("load_in_8bit"):
            return "bitsandbytes"
        method = declared.get("quant_method")
        return method if isinstance(method, str) and method else "unnamed"
    return None


def explain_missing(config: Mapping[str, object]) -> tuple[str, str] | None:
    """Explain which packages the quantised model of `config` needs that are not installed; None if there are none.

    Returns (reason, remedy), such as ("GPTQ models need gptqmodel, which is not installed", "pip install gptqmodel"). A
    method that PACKAGES does not contain is assumed to need no package.
    """
    name, packages = PACKAGES.get(find_method(config) or "", ("", ()))
    missing = [package for package in packages if not _is_installed(package)]
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return f"{name} models need {' and '.join(missing)}, which {verb} not installed", f"pip install {' '.join(missing)}"


def _is_installed(package: str) -> bool:
    """Return True if a distribution of this name is installed."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
