"""Render the `llm_int8_skip_modules` list of bitsandbytes, which applies to 8 and 4 bits.

bitsandbytes is used through transformers, which compares the items as in transformers.py.
"""

from __future__ import annotations

from swsurgery.sharing.recipes import rendered
from swsurgery.sharing.recipes.modules import Subject
from swsurgery.sharing.recipes.rendered import Rendered
from swsurgery.sharing.recipes.transformers import list_skipped


def render(subject: Subject) -> Rendered:
    """Render a Python script that loads the model with 4-bit weights in the format NF4."""
    patterns = list_skipped(subject)
    text = f"""\
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    llm_int8_skip_modules=[
{rendered.format_list(patterns)}
    ],
)
model = AutoModelForCausalLM.from_pretrained({subject.model!r}, quantization_config=config)
"""
    return Rendered(patterns, text, rendered.explain_experts(subject, rendered.STACKED_NOTE))
