"""Read weights that AutoRound writes in its own format, with the method "auto-round".

`packing_format` in config.json names the packing, which is that of GPTQ or AWQ. Source: AutoRound 0.16,
export/export_to_autoround/export.py and inference/backend.py. (Its exports for GPTQ and AWQ declare those methods.)
"""

from __future__ import annotations

from swsurgery.checkpoint.layouts.awq import build_awq
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.gptq import build_gptq
from swsurgery.checkpoint.layouts.grouped import GroupedMatrix
from swsurgery.checkpoint.layouts.module import QuantisedModule

_MINUS_ONE = {"auto_round:auto_gptq": True, "auto_round:gptqmodel": False, "auto_round": False}
"""Packings that are those of GPTQ, with True if they store zero points minus one."""


def find_auto_round(module: QuantisedModule) -> GroupedMatrix | None:
    """Recognise a weight of a checkpoint whose config declares the method "auto-round".

    Raises CannotTell if the packing is unknown, or if tensors and config do not fit each other.
    """
    if module.method != "auto-round" or module.find(".qweight") is None:
        return None
    config = module.quantisation
    if config.get("data_type", "int") != "int":
        raise CannotTell("data_type in config.json is not int")
    packing = config.get("packing_format")
    if isinstance(packing, str) and packing in _MINUS_ONE:
        return build_gptq(module, packing.replace("auto_round", "AutoRound"), _MINUS_ONE[packing], True, "extra_config")
    if packing == "auto_round:auto_awq":
        return build_awq(module, "AutoRound:auto_awq", config.get("sym") is True)
    raise CannotTell("packing_format in config.json is none that is known")
