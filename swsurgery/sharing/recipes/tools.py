"""List the quantisers for which recipes can be rendered: the table `TOOLS`.

To support another tool, write a module with a function `render` and add a row; a test fails until the documentation
and the tests describe the tool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from swsurgery.sharing.recipes import (
    auto_round,
    bitsandbytes,
    compressed_tensors,
    gptqmodel,
    llama_cpp,
    llm_compressor,
    torchao,
    transformers,
)
from swsurgery.sharing.recipes.modules import Subject
from swsurgery.sharing.recipes.names import ToolName
from swsurgery.sharing.recipes.rendered import Rendered


@dataclass(frozen=True)
class Tool:
    """One quantiser. `package` is the Python package that the tests compare with, or None if there is none.

    `language` is the language of the rendered text.
    """

    name: ToolName
    package: str | None
    language: Literal["python", "json", "sh"]
    render: Callable[[Subject], Rendered]


TOOLS: tuple[Tool, ...] = (
    Tool("llm-compressor", "llmcompressor", "python", llm_compressor.render),
    Tool("compressed-tensors", "compressed_tensors", "json", compressed_tensors.render),
    Tool("transformers", "transformers", "python", transformers.render),
    Tool("torchao", "torchao", "python", torchao.render),
    Tool("gptqmodel", "gptqmodel", "python", gptqmodel.render),
    Tool("auto-round", "auto_round", "python", auto_round.render),
    Tool("llama.cpp", "gguf", "sh", llama_cpp.render),
    Tool("bitsandbytes", "bitsandbytes", "python", bitsandbytes.render),
)
"""Every tool."""
