"""Define the language model that lm-eval asks: it collects requests first, and later answers them from known scores.

The tokens are those of lm-eval's class HFLM with its default options, so the log-likelihoods are comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from swsurgery.errors import ModelError
from swsurgery.model.tasks.continuations import Answer, Answers, Continuation
from swsurgery.model.tokenizer import Tokenizer

TEXTS_PER_TOKENIZER = 20_000
"""Number of texts after which the tokenizer's process is replaced. Each process has a limit on its time."""


class TextEncoder:
    """Encodes texts with the tokenizer in a directory, and remembers the results."""

    def __init__(self, directory: Path, load: Callable[[Path], Tokenizer]):
        self._directory, self._load = directory, load
        self._tokenizer, self._texts = load(directory), 0
        self._known: dict[tuple[str, bool], list[int]] = {}
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        prefix = eos if bos is None else bos
        if prefix is None:
            what = "the tokenizer has neither a BOS nor an EOS token, and tasks need one"
            raise ModelError(what, directory)
        self.prefix = prefix
        """The token that precedes a text without a context: BOS, or EOS if there is no BOS."""
        self.prefix_text = self._tokenizer.batch_decode([[prefix]])[0]

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the token ids of a text; `special` adds the special tokens that the tokenizer adds by default."""
        if (text, special) not in self._known:
            if self._texts == TEXTS_PER_TOKENIZER:
                self._tokenizer, self._texts = self._load(self._directory), 0
            self._texts += 1
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ModelError("a task contains text that is not valid Unicode", ascii(text)[:80]) from None
            self._known[text, special] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return self._known[text, special]


class AnsweringModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A model of lm-eval that runs nothing.

    Until `answers` is set, each request is added to `wanted` and gets a meaningless answer. Then each request gets the
    answer of variant `number`. `context` is the maximum number of tokens that the model reads.
    """

    def __init__(self, encoder: TextEncoder, context: int):
        super().__init__()
        self._encoder, self._context = encoder, context
        self.wanted: dict[Continuation, None] = {}
        self.answers: Answers | None = None
        self.number = 0

    @property
    def eot_token_id(self) -> int:
        """The token that precedes a text without a context."""
        return self._encoder.prefix

    @property
    def max_length(self) -> int:
        """The maximum number of tokens that the model reads."""
        return self._context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Return the token ids of a text. A text that begins with BOS gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._encoder.prefix_text)
        return self._encoder.encode(string, add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Answer requests (context, continuation), without a progress bar of lm-eval."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        return [self._answer(text, context, continuation) for (_, text), context, continuation in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each whole text, in windows as long as the model reads."""
        return [
            sum((self._answer(text, *window).loglikelihood for window in self._cut(text)), 0.0)
            for text in (one.args[0] for one in requests)
        ]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Refuse: generating text needs one reading of the weights for each token."""
        raise ModelError("a task generates text", requests[0].task_name)

    def _cut(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Cut a text into windows, each a context and the tokens to score."""
        windows = get_rolling_token_windows(self.tok_encode(text), self._encoder.prefix, self._context, 1)
        return [make_disjoint_window(window) for window in windows]

    def _answer(self, text: str, context: list[int], continuation: list[int]) -> Answer:
        """Answer one request, whose continuation is the end of `text`.

        The context loses tokens on its left if the model cannot read all of them.
        """
        if not 1 <= len(continuation) <= self._context:
            what = f"an answer of a task has {len(continuation)} tokens, but the model accepts 1 to {self._context}"
            raise ModelError(what, repr(text[:40]))
        key = Continuation(tuple((context + continuation)[-(self._context + 1) :]), len(continuation))
        if self.answers is None:
            self.wanted[key] = None
            return Answer(0.0, False)
        return self.answers[key][self.number]
