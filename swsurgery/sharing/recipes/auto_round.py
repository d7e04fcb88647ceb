"""Render the `ignore_layers` text of AutoRound.

AutoRound compares each item of the comma-separated text with the names of linear layers: by equality, and if no layer
has this name, as a part of the name (auto_round/compressors/layer_config_resolver.py, get_fp_layer_names). The items
do not affect the output head, which AutoRound does not quantise by default.
"""

from __future__ import annotations

from swsurgery.sharing.recipes import rendered
from swsurgery.sharing.recipes.modules import Subject, list_all_names
from swsurgery.sharing.recipes.rendered import Rendered


def render(subject: Subject) -> Rendered:
    """Render a Python script that quantises the linear layers to 4 bits."""
    patterns = list_all_names(subject.modules, split=True)
    text = f"""\
from auto_round import AutoRound

ignored = [
{rendered.format_list(patterns, 4)}
]
autoround = AutoRound({subject.model!r}, scheme="W4A16", ignore_layers=",".join(ignored))
autoround.quantize_and_save({rendered.choose_output(subject, "W4A16")!r}, format="auto_round")
"""
    return Rendered(patterns, text, rendered.explain_experts(subject, rendered.SPLIT_NOTE))
