"""Turn text into token ids, and cut them into windows. This module imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Sequence

from swsurgery.errors import ModelError
from swsurgery.model.stopwords import STOP_WORDS
from swsurgery.model.tokenizer import Tokenizer


def get_bos_prefix(tokenizer: Tokenizer) -> list[int]:
    """Return a list of the BOS token's id if `tokenizer` puts BOS in front of a text by default; otherwise [].

    Tokens that a tokenizer appends by default, such as EOS, are never used: they would end the text that the model is
    to continue.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and full[:1] == [bos] != plain[:1] else []


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of `text` without special tokens. Raises ModelError if UTF-8 cannot encode the text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ModelError("the text is not valid Unicode", ascii(text)[:80]) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def cut_windows(ids: Sequence[int], bos: Sequence[int], windows: int, window: int) -> list[list[int]]:
    """Cut the first `windows` non-overlapping windows of `window` tokens from `ids`, and put `bos` in front of each.

    An incomplete window is left out unless it is the only one. Raises ModelError if no window is asked for, or if the
    text or a window has fewer than two tokens, because then no token could be predicted.
    """
    if windows < 1 or window < 2:
        raise ModelError(
            "the windows are too few or too short",
            f"{windows} windows of {window} tokens",
            "use at least 1 window, and at least 2 tokens in each",
        )
    if len(ids) < 2:
        raise ModelError("the text is too short", f"{len(ids)} of the 2 tokens that are needed", "give a longer text")
    starts = range(0, max(1, len(ids) - window + 1), window)[:windows]
    return [[*bos, *ids[start : start + window]] for start in starts]


def stop_word_tokens(tokenizer: Tokenizer, vocabulary: int) -> list[int]:
    """List the token ids below `vocabulary` whose text is a stop word, ignoring case and one leading space."""
    ids = range(min(vocabulary, len(tokenizer)))
    decoded = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return [i for i, text in zip(ids, decoded, strict=True) if text.removeprefix(" ").lower() in STOP_WORDS]
