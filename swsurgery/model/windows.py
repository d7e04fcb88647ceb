"""Hold what belongs together."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from swsurgery.model import load, measure
from swsurgery.model.forward import LayeredModel
from swsurgery.model.tokenizer import Tokenizer

STATES = 2 << 30
"""Bytes of hidden states that one reading of the model may keep. For a 7B model and 16 windows of 512 tokens in
bfloat16 that is 32 variants; what is more takes another reading, which then costs less than its computation."""


def windows_of(
    model: PreTrainedModel, tokenizer: Tokenizer, text: str, windows: int, window: int
) -> tuple[list[list[int]], int]:
    """Cut the first `windows` windows of `text`, and count the tokens of text in one.

    These are `window`, fewer if the model cannot read so many at once or if the text is shorter. Raises ModelError
    where there are none, or where the model does not know a token.
    """
    bos = measure.bos_prefix(tokenizer)
    longest = min(window, load.context_length(model) - len(bos))
    pieces = measure.cut_windows(measure.encode(tokenizer, text), bos, windows, longest)
    measure.refuse_unknown_tokens(model, pieces)
    return pieces, max(map(len, pieces)) - len(bos)


def variants_at_once(model: LayeredModel, windows: Sequence[Sequence[int]]) -> int:
    """How many variants beside the base may go through the model in one reading; at least one."""
    config, element = model.model.config.get_text_config(), model.dtype.itemsize
    size: int = sum(map(len, windows)) * config.hidden_size * element
    if not model.layered(windows[0]):  # then the logits of all variants are there at once
        size += max(map(len, windows)) * config.vocab_size * element
    return max(1, STATES // size - 1)
