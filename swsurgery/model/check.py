"""The sanity check on one page: load the patched checkpoint once, run base and patched over a text, compare.

What each figure means is said at `run_checks`; how it is computed is in `measure.py`, how two models come out of one
in `forward.py`. Importing this module does not load torch: a command that turns out not to need the check must not
pay seconds for it, and a machine without torch gets one line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError, Unrunnable
from swsurgery.model import Placement, ScalarChange, available, local_directory
from swsurgery.model.refusals import refuse_unrunnable
from swsurgery.model.report import Bounds, CheckReport, Continuations
from swsurgery.model.tokenizer import start
from swsurgery.progress import Progress
from swsurgery.storage.dtypes import decode
from swsurgery.storage.numeric import load_numpy

#: Short beginnings whose continuation people can judge; the first is an example of arXiv:2411.07191.
PROMPTS = (
    "Summer is hot. Winter is",
    "The capital of France is",
    "Once upon a time, there was a",
    "Two plus two equals",
)


def built_in_text() -> str:
    """The text that is read where the caller gives none: about 8,000 words of English in several kinds of prose."""
    return Path(__file__).with_name("passage.txt").read_text(encoding="utf-8")


def run_checks(
    checkpoint: Checkpoint,
    changes: Sequence[ScalarChange],
    *,
    text: str | None = None,
    prompts: Sequence[str] | None = None,
    bounds: Bounds | None = None,
    device: str = "auto",
    windows: int = 16,
    window: int = 512,
    placement: Placement = "auto",
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> CheckReport:
    """Compare the patched `checkpoint` with its base, which differs from it by `changes`.

    Text: the first `windows` non-overlapping windows of `window` tokens of `text`, fewer where it is shorter; less
    than one window is read as it is. Each window is read on its own, with BOS in front of it if and only if the
    tokenizer puts one in front of what it encodes. A position is scored if it has a next token in its window, so
    the BOS position is, and the last one is not. A window never exceeds the context length of the config.

    Figures, over the scored positions: perplexity = exp of the mean negative log-likelihood, of both models, and
    their ratio; mean KL(base || patched) in nats; mean probability of all tokens that are a stop word, of both;
    the largest hidden state after any decoder layer, of both. For each prompt, the five likeliest next tokens.

    `device` is "auto", "cpu", "cuda" or "cuda:N". `placement` is "whole" (all weights in its memory), "streamed" (two
    layers at a time, read from the shards) or "auto": streamed where the whole does not fit. Weights are in float32
    where that fits, else in the stored dtype.
    Without `changes` the model is run alone and stands for both.

    Raises ModelError, one line, where the libraries are missing, the device does not work or is too small, model or
    tokenizer cannot be loaded, or a changed scalar is not in the loaded model. A failed check is no error: see
    `CheckReport.failures`.
    """
    if reason := available():
        raise Unrunnable(reason, "the forward check needs it", "pip install 'swsurgery[check]'")
    _compare(checkpoint, changes)
    directory = local_directory(checkpoint)
    refuse_unrunnable(directory)
    try:
        load_numpy()
    except MemoryError as error:
        raise Unrunnable("not enough memory", "torch cannot be loaded", "raise the limit on it") from error
    start()
    try:
        import torch
        import transformers

        from swsurgery.model import load, measure
        from swsurgery.model.places import Variant
    except (ImportError, OSError) as error:  # installed but broken, a missing shared library for example
        what = f"torch or transformers cannot be imported: {type(error).__name__}"
        raise Unrunnable(what, error, "install them again") from error

    text = built_in_text() if text is None else text
    prompts = PROMPTS if prompts is None else prompts
    with load.quiet():
        tokenizer = load.load_tokenizer(directory)
        paired = load.open_model(checkpoint, device=device, placement=placement, say=say)
        vocabulary = measure.vocabulary_size(paired.model)
        context = load.context_length(paired.model)
        bos = measure.bos_prefix(tokenizer)
        longest = min(window, context - len(bos))
        pieces = measure.cut_windows(measure.encode(tokenizer, text), bos, windows, longest)
        beginnings = [bos + measure.encode(tokenizer, prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, beginnings, strict=True):
            if not 1 <= len(ids) <= context:
                raise ModelError(f"prompt of {len(ids)} tokens", repr(prompt), f"the model reads 1 to {context}")
        measure.refuse_unknown_tokens(paired.model, pieces + beginnings)

        base: Variant = {change.coordinate: change.base for change in changes}
        variants = (base, {}) if changes else ({},)
        totals = measure.Totals(measure.stop_word_tokens(tokenizer, vocabulary), len(variants))
        continuations = []
        with load.running(paired.device, paired.weights is not None):
            for outcomes in paired.run([*pieces, *beginnings], variants, progress=progress):
                number = outcomes.sequence - len(pieces)
                if number < 0:
                    totals.add_window(pieces[outcomes.sequence], outcomes)
                    continue
                totals.look(outcomes)
                tops = [measure.top_tokens(tokenizer, logits) for logits in outcomes.logits]
                continuations.append(Continuations(prompts[number], tops[0], tops[-1]))
        last = len(variants) - 1
        return CheckReport(
            base=totals.side(0),
            patched=totals.side(last),
            perplexity_ratio=totals.perplexity_ratio(last),
            kl=totals.mean_kl(last),
            prompts=tuple(continuations),
            windows=len(pieces),
            window_tokens=max(map(len, pieces)) - len(bos),
            scored_tokens=totals.scored,
            text_sha256=hashlib.sha256(text.encode()).hexdigest(),
            method=paired.method,
            device=load.device_name(paired.device),
            dtype=str(paired.dtype).removeprefix("torch."),
            torch=torch.__version__,
            transformers=transformers.__version__,
            bounds=bounds or Bounds(),
        )


def _compare(checkpoint: Checkpoint, changes: Sequence[ScalarChange]) -> None:
    """Raises ModelError where the checkpoint does not hold what it is said to hold."""
    for change in changes:
        tensor, index = change.coordinate
        try:
            stored = checkpoint.shards[checkpoint.weight_map[tensor]].read_scalar(tensor, index)
        except (KeyError, IndexError):
            raise ModelError("no such scalar in the checkpoint", change.coordinate) from None
        value = float(decode(checkpoint.info(tensor).dtype, stored))
        if value != change.patched:
            raise ModelError(f"holds {value:g}, not the patched value {change.patched:g}", change.coordinate)
