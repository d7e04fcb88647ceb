"""The sanity check on one page: load the patched checkpoint once, run base and patched over a text, compare.

What each figure means is said at `run_checks`; how it is computed is in `measure.py`, how two models come out of one
in `forward.py`. Importing this module does not load torch: a command that turns out not to need the check must not
pay seconds for it, and a machine without torch gets one line.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swsurgery.errors import ModelError
from swsurgery.model import ScalarChange, available
from swsurgery.progress import Progress, Silent
from swsurgery.report import Bounds, CheckReport, Continuations

#: Short beginnings whose continuation people can judge; the first is an example of arXiv:2411.07191.
PROMPTS = (
    "Summer is hot. Winter is",
    "The capital of France is",
    "Once upon a time, there was a",
    "Two plus two equals",
)


def built_in_text() -> str:
    """The text that is read where the caller gives none: about 3,000 words of English in several kinds of prose."""
    return Path(__file__).with_name("passage.txt").read_text(encoding="utf-8")


def run_checks(
    directory: Path,
    changes: Sequence[ScalarChange],
    *,
    config: Mapping[str, Any],
    text: str | None = None,
    prompts: Sequence[str] | None = None,
    bounds: Bounds | None = None,
    device: str = "auto",
    windows: int = 16,
    window: int = 512,
    progress: Progress | None = None,
) -> CheckReport:
    """Compare the patched checkpoint in `directory` with the base, which differs from it by `changes`.

    Text: the first `windows` non-overlapping windows of `window` tokens of `text`, fewer where it is shorter; less
    than one window is read as it is. Each window is read on its own, with BOS in front of it if and only if the
    tokenizer puts one in front of what it encodes. A position is scored if it has a next token in its window, so
    the BOS position is, and the last one is not. A window never exceeds the context length of the config.

    Figures, over the scored positions: perplexity = exp of the mean negative log-likelihood, of both models, and
    their ratio; mean KL(base || patched) in nats; mean probability of all tokens that are a stop word, of both;
    the largest hidden state after any decoder layer, of both. For each prompt, the five likeliest next tokens.

    `device` is "auto", "cpu", "cuda" or "cuda:N"; weights are in float32 where that fits, else in the stored dtype.
    Without `changes` the model is run alone and stands for both.

    Raises ModelError, one line, where the libraries are missing, the device does not work or is too small, model or
    tokenizer cannot be loaded, or a changed scalar is not in the loaded model. A failed check is no error: see
    `CheckReport.failures`.
    """
    if reason := available():
        raise ModelError(reason, "the forward check needs it", "pip install 'swsurgery[check]', or --check weights")
    try:
        import torch
        import transformers

        from swsurgery.model import load, measure
        from swsurgery.model.forward import PairedForward
    except (ImportError, OSError) as error:  # installed but broken, a missing shared library for example
        raise ModelError(
            f"torch or transformers cannot be imported: {type(error).__name__}", error, "--check weights"
        ) from error

    progress = progress or Silent()
    text = built_in_text() if text is None else text
    prompts = PROMPTS if prompts is None else prompts
    with load.quiet():
        target = load.pick_device(device)
        tokenizer = load.load_tokenizer(directory)
        shapes = load.stored_shapes(directory)
        model = load.load_model(directory, target, shapes)

        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        vocabulary = model.get_input_embeddings().num_embeddings
        bos = measure.bos_prefix(tokenizer)
        longest = min(window, context - len(bos))
        pieces = measure.cut_windows(measure.encode(tokenizer, text), bos, windows, longest)
        beginnings = [bos + measure.encode(tokenizer, prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, beginnings, strict=True):
            if not 1 <= len(ids) <= context:
                raise ModelError(f"prompt of {len(ids)} tokens", repr(prompt), f"the model reads 1 to {context}")
        if (largest := max(map(max, pieces + beginnings))) >= vocabulary:
            raise ModelError(f"tokenizer gives token {largest}, the model has {vocabulary}", directory, load.NO_CHECK)

        paired = PairedForward(model, changes, config, shapes)
        continuations = []
        try:
            progress.start(len(pieces) + len(beginnings), "pass", "check")
            with load.running(target):
                totals = measure.Totals(measure.stop_word_tokens(tokenizer, vocabulary))
                for ids in pieces:
                    totals.add_window(ids, paired(ids))
                    progress.advance(1)
                for prompt, ids in zip(prompts, beginnings, strict=True):
                    outcomes = paired(ids)
                    totals.look(outcomes)
                    tops = [measure.top_tokens(tokenizer, outcome.logits) for outcome in outcomes]
                    continuations.append(Continuations(prompt, *tops))
                    progress.advance(1)
        finally:
            progress.close()

        return CheckReport(
            base=totals.side(0),
            patched=totals.side(1),
            perplexity_ratio=totals.perplexity_ratio(),
            kl=totals.mean_kl(),
            prompts=tuple(continuations),
            windows=len(pieces),
            window_tokens=longest,
            scored_tokens=totals.scored,
            text_sha256=hashlib.sha256(text.encode()).hexdigest(),
            method=paired.method,
            device=load.device_name(target),
            dtype=str(model.dtype).removeprefix("torch."),
            torch=torch.__version__,
            transformers=transformers.__version__,
            bounds=bounds or Bounds(),
        )
