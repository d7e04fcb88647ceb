"""Run the sanity check: load the patched checkpoint, run it and its base on a text, and compare the results.

The docstring of `run_checks` defines the figures. `measure.py` computes them, and `forward.py` runs both models from
one set of weights. Importing this module does not load torch, which takes seconds and may not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError
from swsurgery.model import Placement, ScalarChange, tokens
from swsurgery.model.bounds import CheckedBounds
from swsurgery.model.controls import Control
from swsurgery.model.cutting import TokenizedText, cut_text
from swsurgery.model.protocol import DEFAULT_PROTOCOL, Protocol
from swsurgery.model.report import CheckReport, Continuations, Generation, RoundedSide
from swsurgery.model.start_up import start_up_and_tokenize
from swsurgery.model.tasks.load import LoadedTasks
from swsurgery.model.text import choose_text
from swsurgery.model.tokenizer import Tokenizer
from swsurgery.model.variant import Rounding, Scalars, Variant, describe_rounding
from swsurgery.progress import Progress, Silent
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import decode

if TYPE_CHECKING:
    from swsurgery.model.control_run import ControlRun
    from swsurgery.model.measure import Totals
    from swsurgery.model.pair import ModelPair
    from swsurgery.model.tasks.report import TaskReport

PROMPTS = (
    "Summer is hot. Winter is",
    "The capital of France is",
    "Once upon a time, there was a",
    "Two plus two equals",
)
"""The default prompts. A reader can judge whether their continuations make sense. The first prompt is an example in
arXiv:2411.07191."""


def run_checks(
    checkpoint: Checkpoint,
    changes: Sequence[ScalarChange],
    *,
    base: Variant | Checkpoint | None = None,
    text: str | None = None,
    prompts: Sequence[str] | None = None,
    bounds: CheckedBounds | None = None,
    device: str = "auto",
    protocol: Protocol = DEFAULT_PROTOCOL,
    placement: Placement = "auto",
    roundings: Sequence[Rounding] = (),
    generate: int = 0,
    tasks: LoadedTasks | None = None,
    controls: Sequence[Control] = (),
    excluded: Collection[Coordinate] = (),
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> CheckReport:
    """Compare the patched `checkpoint` with its base, which differs from it in the scalars of `changes`.

    `base` contains further tensors that differ, or is another checkpoint of the same architecture. The tokenizer is
    that of the patched checkpoint.

    Both models run on windows of `text`, which `protocol` cuts and scores; the default text is the built-in passage. A
    shorter text has fewer windows, and a text shorter than one window is a single shorter window. Each window is a
    separate input, and is never longer than the context length of the config. By the default protocol, windows do not
    overlap and begin with BOS if the tokenizer adds one. A position is then scored if the next token is in the same
    window, so BOS is scored and the last token of a window is not. Prompts begin with BOS as windows do.

    Each model has three figures: the perplexity (exp of the mean negative log-likelihood over the scored positions),
    the mean probability of all stop words together at these positions, and the largest hidden state after any decoder
    layer. Two figures compare the models: the perplexity of patched divided by that of base, and the mean KL(base ||
    patched) in nats. For each prompt, the report lists the five most likely next tokens of each model.

    `device` is "auto", "cpu", "cuda" or "cuda:N". `placement` is "whole" (all weights in memory), "streamed" (two
    layers at a time, read from the shards) or "auto" ("whole" if all weights fit in float32, else "streamed"). Streamed
    weights, and whole weights that do not fit in float32, have the dtype of config.json. `say` receives a line if a
    model that cannot be streamed is loaded whole. If `changes` is empty, the model runs once, and base and patched are
    equal.

    With `generate`, both models continue each prompt by at most so many tokens, always by the most likely one.

    With `roundings`, both models also run with rounded activations, and the report lists their figures. Bounds do not
    apply to these. With `tasks`, all of these models also answer the requests of the tasks.

    With `controls`, the base also runs with other changes (`controls.py`). The scalars in `excluded` are no outliers.
    Bounds do not apply to controls. They need a base that differs in the scalars of `changes` only.

    Raises ModelError with one line if a library is missing, if the device does not work or is too small, if the model
    or the tokenizer cannot be loaded, or if a changed scalar is not in the loaded model. A failed check raises nothing:
    its reasons are in `CheckReport.failures`.
    """
    text = choose_text(text, protocol)
    prompts = PROMPTS if prompts is None else prompts
    _compare(checkpoint, changes)
    words = start_up_and_tokenize(
        checkpoint,
        device,
        placement,
        progress or Silent(),
        lambda: _tokenize(checkpoint.directory, text, prompts, protocol),
    )
    import torch
    import transformers

    from swsurgery.model import load, measure
    from swsurgery.model.pair import open_pair

    with load.hide_output():
        old: Scalars = {c.coordinate: c.base for c in changes}
        pair = open_pair(checkpoint, base, old, device=device, placement=placement, say=say)
        paired, sides = pair.patched, 2 if pair.has_base else 1
        vocabulary = measure.get_vocabulary_size(paired.model)
        context = load.get_context_length(paired.model)
        cut = cut_text(words.text, context)
        pieces = cut.windows
        beginnings = words.prompts
        _refuse_lengths(prompts, beginnings, context)
        measure.refuse_unknown_tokens(paired.model, [*pieces, *beginnings])

        count = sides * (1 + len(roundings)) + len(controls)
        edited = [change.coordinate for change in changes]
        controlled = (
            _plan_controls(controls, checkpoint, pair, edited, excluded, len(pieces), say) if controls else None
        )
        totals = measure.Totals([token for token in words.stop_words if token < vocabulary], count, words=cut.words)
        continuations = []
        with load.convert_run_errors(paired.device, paired.weights is not None):
            for outcomes in pair.run([*pieces, *beginnings], roundings, progress, controlled):
                number = outcomes.sequence - len(pieces)
                if number < 0:
                    totals.add_window(pieces[outcomes.sequence], outcomes)
                    continue
                totals.look(outcomes)
                tops = [measure.list_top_tokens(words.tokenizer, outcomes.logits[at]) for at in range(sides)]
                continuations.append(Continuations(prompts[number], tops[0], tops[-1]))
            made = pair.generate(beginnings, generate, context, progress or Silent()) if generate else []
            scores = None if tasks is None else _run_tasks(tasks, checkpoint.directory, pair, roundings, progress)
        texts = [words.tokenizer.batch_decode(side) for side in made]
        last = sides - 1
        interval = totals.compute_ratio_interval(last)
        return CheckReport(
            base=totals.summarise_side(0),
            patched=totals.summarise_side(last),
            perplexity_ratio=totals.compute_perplexity_ratio(last),
            ratio_low=interval.low,
            ratio_high=interval.high,
            kl=totals.compute_mean_kl(last),
            prompts=tuple(continuations),
            windows=len(pieces),
            window_tokens=cut.window_tokens,
            scored_tokens=totals.scored,
            text_sha256=cut.sha256,
            protocol=cut.protocol,
            words=cut.words,
            method=pair.method,
            device=load.get_device_name(paired.device),
            dtype=str(paired.dtype).removeprefix("torch."),
            torch=torch.__version__,
            transformers=transformers.__version__,
            bounds=bounds or CheckedBounds(),
            rounded=tuple(
                _make_rounded(totals, sides * (1 + number) + at, "patched" if at == last else "base", rounding)
                for number, rounding in enumerate(roundings)
                for at in range(sides)
            ),
            generations=tuple(
                Generation(prompt, texts[0][at] if len(texts) > 1 else None, texts[-1][at])
                for at, prompt in enumerate(prompts if texts else ())
            ),
            tasks=scores,
            controls=controlled.make_results(totals, totals.token_nll[last]) if controlled else (),
        )


def _plan_controls(
    controls: Sequence[Control],
    checkpoint: Checkpoint,
    pair: ModelPair,
    edited: Sequence[Coordinate],
    excluded: Collection[Coordinate],
    windows: int,
    say: Callable[[str], None],
) -> ControlRun:
    """Plan the controls of an edit of single scalars. Raises ArchitectureError, ModelError and ShardError."""
    from swsurgery.model.control_run import ControlRun, plan_controls

    return ControlRun(plan_controls(controls, checkpoint, pair.old.scalars, edited, excluded, say), windows)


def _run_tasks(
    tasks: LoadedTasks, directory: Path, pair: ModelPair, roundings: Sequence[Rounding], progress: Progress | None
) -> TaskReport:
    """Answer the requests of tasks with the models of `pair.run`, in its order."""
    from swsurgery.model.tasks.measure_tasks import measure_tasks

    sides = ("base", "patched") if pair.has_base else ("patched",)
    names = [
        side if rounding is None else f"{side}, {describe_rounding(rounding)}"
        for rounding in (None, *roundings)
        for side in sides
    ]
    models = 1 if pair.base is None else 2
    return measure_tasks(
        tasks, directory, pair.patched, names, lambda sequences: pair.run(sequences, roundings, progress), models
    )


def _make_rounded(totals: Totals, number: int, side: str, rounding: Rounding) -> RoundedSide:
    found = totals.summarise_side(number)
    return RoundedSide(
        side=side,
        activations=describe_rounding(rounding),
        perplexity=found.perplexity,
        ratio=totals.compute_perplexity_ratio(number),
        kl=totals.compute_mean_kl(number),
        stopword_mass=found.stopword_mass,
        finite=found.finite,
    )


@dataclass(frozen=True)
class _Tokenized:
    """The token ids of a text and of prompts, and those of all stop words."""

    tokenizer: Tokenizer
    text: TokenizedText
    prompts: list[list[int]]
    stop_words: list[int]


def _tokenize(directory: Path, text: str, prompts: Sequence[str], protocol: Protocol) -> _Tokenized:
    """Load the tokenizer in `directory` and run it. Raises ModelError."""
    tokenizer = Tokenizer(directory)
    bos = tokens.choose_bos(tokenizer, "auto" if protocol.name == "lm-eval" else protocol.bos)
    beginnings = [bos + tokens.encode(tokenizer, prompt) for prompt in prompts]
    stop_words = tokens.stop_word_tokens(tokenizer, len(tokenizer))
    return _Tokenized(tokenizer, tokens.encode_text(tokenizer, text, protocol), beginnings, stop_words)


def _refuse_lengths(prompts: Sequence[str], sequences: Sequence[Sequence[int]], context: int) -> None:
    """Raise ModelError if a prompt has no tokens, or more than `context`, the maximum that the model accepts."""
    for prompt, ids in zip(prompts, sequences, strict=True):
        if not 1 <= len(ids) <= context:
            raise ModelError(
                f"the prompt has {len(ids)} tokens, but the model accepts 1 to {context}",
                repr(prompt),
                "give a shorter prompt" if ids else "give a longer prompt",
            )


def _compare(checkpoint: Checkpoint, changes: Sequence[ScalarChange]) -> None:
    """Raise ModelError if a scalar of `changes` does not have its patched value in `checkpoint`."""
    for change in changes:
        tensor, index = change.coordinate
        try:
            stored = checkpoint.shards[checkpoint.weight_map[tensor]].read_scalar(tensor, index)
        except (KeyError, IndexError):
            raise ModelError("no such scalar in the checkpoint", change.coordinate) from None
        value = float(decode(checkpoint.get_info(tensor).dtype, stored))
        if value != change.patched:
            raise ModelError(
                f"the stored value {value:g} is not the patched value {change.patched:g}", change.coordinate
            )
