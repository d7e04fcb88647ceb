"""Render the `modules_to_not_convert` list of a quantiser in transformers.

transformers compares each item with a module's name: by `re.match` up to the end of a part of the name, and as the end
of the name (transformers/quantizers/quantizers_utils.py, should_convert_module). A list replaces the default skips.
"""

from __future__ import annotations

from swsurgery.sharing.recipes import rendered
from swsurgery.sharing.recipes.modules import ROUTERS, Subject, list_all_names
from swsurgery.sharing.recipes.rendered import Rendered


def list_skipped(subject: Subject) -> tuple[str, ...]:
    """List the modules that transformers must not convert: the output head, the routers and the kept modules.

    Names are not escaped: older versions compare some of them as plain text, and a dot also matches itself.
    """
    routers = tuple(rf".*\.{router}$" for router in ROUTERS) if subject.has_experts else ()
    return (*subject.heads, *routers, *list_all_names(subject.modules, split=False))


def render(subject: Subject) -> Rendered:
    """Render a Python script that loads the model with FP8 weights."""
    patterns = list_skipped(subject)
    text = f"""\
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

# AwqConfig, TorchAoConfig, QuantoConfig and others have the same argument.
config = FineGrainedFP8Config(
    modules_to_not_convert=[
{rendered.format_list(patterns)}
    ],
)
model = AutoModelForCausalLM.from_pretrained({subject.model!r}, quantization_config=config)
"""
    return Rendered(patterns, text, rendered.explain_experts(subject, rendered.STACKED_NOTE))
