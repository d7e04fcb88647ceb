"""Render the `dynamic` rules of GPTQModel.

A rule that begins with "-:" excludes a module if the rest of the rule matches its name by `re.match`, which does not
compare the end of the name (gptqmodel/quantization/config.py, dynamic_get). The rules do not affect the output head,
which GPTQModel does not quantise by default.
"""

from __future__ import annotations

import re

from swsurgery.sharing.recipes import rendered
from swsurgery.sharing.recipes.modules import Subject, list_all_names
from swsurgery.sharing.recipes.rendered import Rendered


def render(subject: Subject) -> Rendered:
    """Render a Python script that quantises the linear layers to 4 bits in groups of 128."""
    patterns = tuple(f"-:^{re.escape(name)}$" for name in list_all_names(subject.modules, split=True))
    rules = "\n".join(f'        r"{pattern}": {{}},' for pattern in patterns)
    text = f"""\
from gptqmodel import GPTQModel, QuantizeConfig

config = QuantizeConfig(
    bits=4,
    group_size=128,
    dynamic={{
{rules}
    }},
)
model = GPTQModel.load({subject.model!r}, config)
model.quantize(calibration)  # a list of texts
model.save({rendered.choose_output(subject, "gptq-4bit")!r})
"""
    return Rendered(patterns, text, rendered.explain_experts(subject, rendered.SPLIT_NOTE))
