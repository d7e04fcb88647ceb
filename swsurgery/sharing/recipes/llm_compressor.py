"""Render the `ignore` list of a modifier of LLM Compressor.

LLM Compressor compares each item with a module's name: by equality, or by `re.match` if the item begins with "re:"
(compressed_tensors/utils/match.py, match_name). It splits stacked experts into one linear layer per expert.
"""

from __future__ import annotations

from swsurgery.sharing.recipes import rendered
from swsurgery.sharing.recipes.modules import ROUTERS, Subject, list_all_names
from swsurgery.sharing.recipes.rendered import Rendered


def list_ignored(subject: Subject) -> tuple[str, ...]:
    """List the items of an `ignore` list: the output head, the kept modules, and the routers of a mixture of experts.

    The whole name of a router must match up to its end, so `mlp.gate` does not exclude `mlp.gate_proj`.
    """
    routers = (rf"re:.*\.({'|'.join(ROUTERS)})$",) if subject.has_experts else ()
    return (*subject.heads, *routers, *list_all_names(subject.modules, split=True))


def render(subject: Subject) -> Rendered:
    """Render a Python script that quantises the linear layers to 4 bits."""
    patterns = list_ignored(subject)
    text = f"""\
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

recipe = QuantizationModifier(
    targets="Linear",
    scheme="W4A16",
    ignore=[
{rendered.format_list(patterns)}
    ],
)
oneshot(model={subject.model!r}, recipe=recipe, output_dir={rendered.choose_output(subject, "W4A16")!r})
"""
    return Rendered(patterns, text, rendered.explain_experts(subject, rendered.SPLIT_NOTE))
