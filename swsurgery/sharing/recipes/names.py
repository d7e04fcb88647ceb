"""Name the quantisers for which recipes are rendered. Imports nothing, so that the command line can name them too."""

from __future__ import annotations

from typing import Literal

ToolName = Literal[
    "llm-compressor",
    "compressed-tensors",
    "transformers",
    "torchao",
    "gptqmodel",
    "auto-round",
    "llama.cpp",
    "bitsandbytes",
]
"""The names of the rows of `TOOLS` in tools.py, in its order."""
