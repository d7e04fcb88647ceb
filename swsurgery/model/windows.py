"""Cut a text into windows for one model, and limit the number of variants that run at once."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from swsurgery.model import load, measure, tokens
from swsurgery.model.cutting import CutText, cut_text
from swsurgery.model.forward import LayeredModel
from swsurgery.model.protocol import Protocol
from swsurgery.model.text import choose_text
from swsurgery.model.tokenizer import Tokenizer

STATES = 2 << 30
"""Maximum size in bytes of the hidden states in one pass over the weights. For a 7B model in bfloat16, this allows 32
variants of 16 windows of 512 tokens. Further variants take another pass. A pass of this size takes longer to compute
than to read, so a larger one would save little time."""


def cut_text_windows(model: PreTrainedModel, tokenizer: Tokenizer, text: str | None, protocol: Protocol) -> CutText:
    """Cut a text into windows by a protocol; None stands for the protocol's own text.

    Raises ModelError if no window can be cut, or if a token id is not in the model's vocabulary.
    """
    tokenized = tokens.encode_text(tokenizer, choose_text(text, protocol), protocol)
    found = cut_text(tokenized, load.get_context_length(model))
    measure.refuse_unknown_tokens(model, found.windows)
    return found


def count_variants_at_once(model: LayeredModel, windows: Sequence[Sequence[int]]) -> int:
    """Return the number of variants, in addition to the base, that may run in one pass over the weights; at least 1."""
    config, element = model.model.config.get_text_config(), model.dtype.itemsize
    size: int = sum(map(len, windows)) * config.hidden_size * element
    if not model.is_layered(windows[0]):  # the logits of all variants of a window then exist at once
        size += max(map(len, windows)) * config.vocab_size * element
    return max(1, STATES // size - 1)
