"""Cut token ids into windows, and decide which predictions of each window are scored.

`protocol.py` defines the protocols. This module must not depend on torch, models or tokenizers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from swsurgery.errors import ModelError, pluralise
from swsurgery.model.protocol import Protocol

HEADING = re.compile(r"^ = [^=\n](?:[^\n]*[^=\n])? = ?\r?$", re.MULTILINE)
"""Matches the title of an article in the files of WikiText, such as " = Robert Boulter = "."""


UNKNOWN_CONTEXT = 2048
"""Number of tokens in an input of a model whose config states no context length, as in lm-evaluation-harness."""


class Window(tuple[int, ...]):
    """The token ids of one input of the model, and the predictions that are scored in it.

    The logits at position `first` predict the first of `targets`, and those at the next positions the others. Windows
    with the same number in `span` count as one value in an interval. A span of None stands for this window alone.
    """

    first: int
    targets: tuple[int, ...]
    span: int | None

    def __new__(
        cls, ids: Sequence[int], first: int = 0, targets: Sequence[int] | None = None, span: int | None = None
    ) -> Self:
        """Make a window. If `targets` is None, each token after position `first` is a target."""
        made = super().__new__(cls, ids)
        made.first, made.span = first, span
        made.targets = tuple(ids[first + 1 :] if targets is None else targets)
        return made

    @classmethod
    def of(cls, ids: Sequence[int]) -> Window:
        """Convert token ids to a window in which every token but the first is scored; a Window is returned itself."""
        return ids if isinstance(ids, Window) else cls(ids)


@dataclass(frozen=True)
class TokenizedText:
    """The token ids of a text, for a protocol.

    `documents` has one element unless the protocol scores whole documents. `prefix` contains BOS if the protocol puts a
    token in front of windows, documents or the text. `sha256` is the digest of the text, and `words` the number of its
    words if the protocol counts them.
    """

    documents: Sequence[Sequence[int]]
    prefix: Sequence[int]
    sha256: str
    protocol: Protocol
    words: int | None = None


@dataclass(frozen=True)
class CutText:
    """The windows of a text for one model, and how they were cut.

    `window_tokens` is the maximum number of tokens of the text in a window, without BOS. `sha256` is the digest of the
    text, and `protocol` the protocol with the values that were used. `words` is the number of words; it is None if the
    protocol does not count them.
    """

    windows: tuple[Window, ...]
    window_tokens: int
    sha256: str
    protocol: Protocol
    words: int | None


def cut_text(text: TokenizedText, context: int = sys.maxsize) -> CutText:
    """Cut a text into windows by its protocol, for a model with this context length.

    A window is shorter than the protocol says if the context or the text is shorter. Raises ModelError if no window can
    be cut.
    """
    protocol = text.protocol
    asked = protocol.window or (UNKNOWN_CONTEXT if context == sys.maxsize else context)
    if protocol.name == "lm-eval":
        refuse_short_context(context, 0)
        window = min(asked, context)
        windows = cut_documents(text.documents, text.prefix[0], window)
        longest = max(len(piece.targets) for piece in windows)
    else:
        [ids], bos, leading = text.documents, text.prefix, 0
        if protocol.name == "paper":  # BOS is a token of the whole text, and no other window has one
            ids, bos, leading = [*bos, *ids], [], len(bos)
        window = min(asked, context - len(bos))
        refuse_short_context(context, len(bos))
        used = replace(protocol, window=window, stride=min(protocol.stride or window, window))
        windows = cut_windows(ids, bos, used, leading)
        longest = max(map(len, windows)) - len(bos)
    return CutText(tuple(windows), longest, text.sha256, protocol.resolve(window, bool(text.prefix)), text.words)


def refuse_short_context(context: int, bos: int) -> None:
    """Raise ModelError if the model's context has no place for two tokens of text after `bos` tokens of BOS."""
    if context - bos < 2:
        where = pluralise(context, "token") + (", one of them for BOS" if bos else "")
        remedy = "use --protocol lm-eval" if context > 1 else "no protocol can measure this model"
        raise ModelError("the model's context is too short for two tokens of text", where, remedy)


def cut_windows(ids: Sequence[int], bos: Sequence[int], protocol: Protocol, leading: int = 0) -> list[Window]:
    """Cut the tokens `ids` of a text into windows, and put `bos` in front of each of them.

    `leading` is the number of tokens at the beginning of `ids` that are BOS. `protocol.window` must be a number. An
    incomplete window is left out unless it is the only one, and so is a window of which no token is scored. Raises
    ModelError if no token is scored, for example if the text has fewer than two tokens.
    """
    window = protocol.window
    assert window is not None
    if len(ids) < 2:
        raise ModelError("the text is too short", f"{len(ids)} of the 2 tokens that are needed", "give a longer text")
    stride = protocol.stride or window
    starts = range(0, max(1, len(ids) - window + 1), stride)[: protocol.windows]
    known = [0 if start == 0 else window - stride for start in starts]
    first = [max(0, len(bos) + count - 1) for count in known]
    if not protocol.score_first:
        first = [max(at, len(bos) if start else len(bos) + leading) for at, start in zip(first, starts, strict=True)]
    pieces = [[*bos, *ids[start : start + window]] for start in starts]
    if len(pieces[0]) - 1 <= first[0]:  # BOS and one token, which is not scored
        pieces, first = pieces[1:], first[1:]
        if not pieces:
            raise ModelError("the text is too short", "no token is scored", "give a longer text, or --score-first yes")
    spans = group_spans([len(piece) - 1 - at for piece, at in zip(pieces, first, strict=True)], window - 1)
    overlap = stride < window
    return [
        Window(piece, at, span=span if overlap else None) for piece, at, span in zip(pieces, first, spans, strict=True)
    ]


def group_spans(scored: Sequence[int], least: int) -> list[int]:
    """Assign consecutive windows to spans, which have at least `least` scored tokens each. Returns the span numbers.

    `scored` contains the number of scored tokens of each window. Windows at the end that are too few for a span belong
    to the span before them. Neighbouring tokens are not independent, so spans must not be much shorter than the windows
    for which the width of the intervals was calibrated.
    """
    spans: list[int] = []
    number = total = 0
    for count in scored:
        spans.append(number)
        total += count
        if total >= least:
            number, total = number + 1, 0
    return [min(span, max(0, number - 1)) for span in spans]


def count_scored(windows: Sequence[Window]) -> list[int]:
    """Count the scored tokens in each span of consecutive windows, in order."""
    counts: list[int] = []
    last: int | None = None
    for window in windows:
        if window.span is not None and window.span == last:
            counts[-1] += len(window.targets)
        else:
            counts.append(len(window.targets))
        last = window.span
    return counts


def cut_documents(documents: Sequence[Sequence[int]], prefix: int, window: int) -> list[Window]:
    """Cut documents of token ids into windows in which every token of every document is scored once.

    An input has at most `window` tokens. The first token of a document is predicted from the token `prefix`. A later
    window begins with the last token of the window before it. The last window of a long document begins earlier, so
    that it has `window` tokens too. This is the rolling log-likelihood of lm-evaluation-harness 0.4.13
    (`get_rolling_token_windows` with a context of one token). Raises ModelError if no document has a token.
    """
    found: list[Window] = []
    for ids in documents:
        stream = [prefix, *ids]
        for begin in range(0, len(ids), window):
            end = min(begin + window, len(ids))
            start = max(0 if begin == 0 else 1, end - window)
            found.append(Window(stream[start:end], begin - start, ids[begin:end]))
    if not found:
        raise ModelError("the text is too short", "0 of the 1 token that is needed", "give a longer text")
    return found


def split_documents(text: str) -> list[str]:
    """Split a text at the titles of articles, as in the files of WikiText.

    A text without titles is one document. Text of blanks only before the first title is left out.
    """
    starts = [match.start() for match in HEADING.finditer(text)]
    edges = [0, *(start for start in starts if start), len(text)]
    pieces = [text[begin:end] for begin, end in zip(edges, edges[1:], strict=False)]
    return [piece for piece in pieces if piece.strip()] or [text]


def count_words(text: str) -> int:
    """Count the words of a document as lm-evaluation-harness does: the parts between runs of blanks."""
    return len(re.split(r"\s+", text))
