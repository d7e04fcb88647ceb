"""Render a `quantization_config` in the format of compressed-tensors, as in the config.json of a checkpoint.

The items of its `ignore` list are compared with names of modules as in llm_compressor.py.
"""

from __future__ import annotations

import json

from swsurgery.sharing.recipes import rendered
from swsurgery.sharing.recipes.llm_compressor import list_ignored
from swsurgery.sharing.recipes.modules import Subject
from swsurgery.sharing.recipes.rendered import Rendered


def render(subject: Subject) -> Rendered:
    """Render a JSON document for 4-bit weights in groups of 128."""
    patterns = list_ignored(subject)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    document = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(patterns),
    }
    text = json.dumps(document, indent=2) + "\n"
    return Rendered(patterns, text, rendered.explain_experts(subject, rendered.SPLIT_NOTE))
