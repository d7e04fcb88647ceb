"""Render a filter for `quantize_` of torchao.

The script compares each pattern with a module's whole name by `re.fullmatch`, as torchao's FqnToConfig does with a key
that begins with "re:" (torchao/quantization/quant_api.py). A filter replaces the default one, which skips nothing that
is linear.
"""

from __future__ import annotations

import re

from swsurgery.sharing.recipes import rendered
from swsurgery.sharing.recipes.modules import ROUTERS, Subject, list_all_names
from swsurgery.sharing.recipes.rendered import Rendered


def render(subject: Subject) -> Rendered:
    """Render a Python script that quantises the linear layers to 8 bits."""
    routers = (rf".*\.({'|'.join(ROUTERS)})",) if subject.has_experts else ()
    names = (*subject.heads, *list_all_names(subject.modules, split=False))
    patterns = (*map(re.escape, names), *routers)
    text = f"""\
import re

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM

KEPT = [
{rendered.format_list(patterns, 4)}
]


def is_quantised(module, name):
    return isinstance(module, torch.nn.Linear) and not any(re.fullmatch(pattern, name) for pattern in KEPT)


model = AutoModelForCausalLM.from_pretrained({subject.model!r}, dtype="auto")
quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_quantised)
"""
    explanation = "transformers >= 5 stacks all experts of a layer in one tensor, which this recipe does not quantise"
    return Rendered(patterns, text, rendered.explain_experts(subject, explanation))
