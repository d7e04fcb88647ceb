"""Cut a text into windows for one model, and limit the number of variants that run at once."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from swsurgery.model import load, measure, readings, tokens
from swsurgery.model.cutting import CutText, cut_text
from swsurgery.model.forward import LayeredModel
from swsurgery.model.protocol import Protocol
from swsurgery.model.text import choose_text
from swsurgery.model.tokenizer import Tokenizer


def cut_text_windows(model: PreTrainedModel, tokenizer: Tokenizer, text: str | None, protocol: Protocol) -> CutText:
    """Cut a text into windows by a protocol; None stands for the protocol's own text.

    Raises ModelError if no window can be cut, or if a token id is not in the model's vocabulary.
    """
    tokenized = tokens.encode_text(tokenizer, choose_text(text, protocol), protocol)
    found = cut_text(tokenized, load.get_context_length(model))
    measure.refuse_unknown_tokens(model, found.windows)
    return found


def count_variants_at_once(model: LayeredModel, windows: Sequence[Sequence[int]]) -> int:
    """Return the number of variants, in addition to the base, that may run at once; at least 1.

    `LayeredModel.run` divides the windows, but no batch of windows and no variants. So the hidden states of one batch
    must fit in readings.STATES in all variants, or the logits of one window if the model runs in whole passes.
    """
    config, element = model.model.config.get_text_config(), model.dtype.itemsize
    longest = max(map(len, windows))
    if model.is_layered(windows[0]):
        size: int = min(model.count_rows(longest), len(windows)) * longest * config.hidden_size * element
    else:
        size = longest * config.vocab_size * element
    return max(1, readings.STATES // size - 1)
