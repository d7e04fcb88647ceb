"""Each private name of transformers that the product uses still exists and means what the product assumes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, CLIPConfig, LlamaConfig, LlavaConfig, PreTrainedModel

import swsurgery
from swsurgery.model import transformers_private
from swsurgery.model.transformers_private import get_language_model_class, list_names_kept_in_float32

PRIVATE = re.compile(r"_(?!_)\w+")


def test_model_mapping():
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        assert len(auto._model_mapping) > 10
    assert get_language_model_class(LlamaConfig()) is transformers.AutoModelForCausalLM
    assert get_language_model_class(LlavaConfig()) is transformers.AutoModelForImageTextToText
    assert get_language_model_class(CLIPConfig()) is None
    assert BertConfig in transformers.AutoModelForCausalLM._model_mapping


class Model:
    """The two attributes that are read."""

    _keep_in_fp32_modules_strict = {"norm"}
    _keep_in_fp32_modules = ["wo"]


def test_keep_in_fp32_modules_strict():
    assert "_keep_in_fp32_modules_strict" in vars(PreTrainedModel)
    assert list_names_kept_in_float32(Model(), torch.bfloat16) == ("norm",)


def test_keep_in_fp32_modules():
    assert "_keep_in_fp32_modules" in vars(PreTrainedModel)
    assert list_names_kept_in_float32(Model(), torch.float16) == ("norm", "wo")
    assert list_names_kept_in_float32(PreTrainedModel, torch.float16) == ()


def test_no_init_weights():
    before = torch.nn.init.normal_
    with transformers_private.no_init_weights():
        weight = torch.zeros(3)
        torch.nn.init.normal_(weight)
        assert weight.tolist() == [0, 0, 0]
    assert torch.nn.init.normal_ is before


def test_every_private_name_is_tested():
    text = Path(transformers_private.__file__).read_text()
    names = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    tested = {name.removeprefix("test") for name in globals() if name.startswith("test_")}
    assert {name for name in names if PRIVATE.fullmatch(name)} <= tested


def test_no_other_module_uses_one():
    """The names that this test knows are those of the module above."""
    names = ("_model_mapping", "_keep_in_fp32_modules", "transformers.initialization")
    root = Path(swsurgery.__file__).parent
    users = {path.name for path in root.rglob("*.py") for name in names if name in path.read_text()}
    assert users == {"transformers_private.py"}
