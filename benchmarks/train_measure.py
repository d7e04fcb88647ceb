"""Measure a model that benchmarks/train.py has trained: perplexity and the largest activation of each layer.

Each measurement is made with and without BOS in front. The tokens that are scored are the same in both cases.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from train_models import BOS, EOS, list_layers

BATCH = 16
PROMPTS, PROMPT_TOKENS = 16, 128
"""Number and length of the pieces of held-out text whose activations are measured."""


def measure_model(
    model: transformers.PreTrainedModel, held_out: torch.Tensor, *, context: int, windows: int
) -> dict[str, Any]:
    """Return perplexity and activations with and without BOS, as values for JSON.

    `held_out` is a 1-D tensor of token ids. Its special tokens are left out: a window of it has none inside.
    """
    plain = held_out[(held_out != BOS) & (held_out != EOS)].long()
    windows = min(windows, len(plain) // (context - 1))
    pieces = plain[: windows * (context - 1)].view(windows, context - 1)
    prompts = pieces[:PROMPTS, :PROMPT_TOKENS]
    report: dict[str, Any] = {"scored_tokens": windows * (context - 2), "prompts": len(prompts)}
    for name, bos in (("with_bos", True), ("without_bos", False)):
        report[name] = {
            "perplexity": round(measure_perplexity(model, pieces, bos=bos), 4),
            "layers": measure_layers(model, put_bos(prompts) if bos else prompts),
        }
    return report


def put_bos(pieces: torch.Tensor) -> torch.Tensor:
    """Return `pieces`, which have the shape (pieces, tokens), with BOS in front of each."""
    return torch.nn.functional.pad(pieces, (1, 0), value=BOS)


@torch.no_grad()
def measure_perplexity(model: transformers.PreTrainedModel, pieces: torch.Tensor, *, bos: bool) -> float:
    """Return the perplexity of every token of `pieces` but the first of each piece."""
    total, count = 0.0, 0
    for at in range(0, len(pieces), BATCH):
        part = pieces[at : at + BATCH]
        logits = model(put_bos(part) if bos else part, use_cache=False).logits[:, int(bos) :]
        flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
        total += float(torch.nn.functional.cross_entropy(flat, part[:, 1:].reshape(-1), reduction="sum"))
        count += part[:, 1:].numel()
    return float(torch.tensor(total / count).exp())


@torch.no_grad()
def measure_layers(model: transformers.PreTrainedModel, prompts: torch.Tensor) -> list[dict[str, Any]]:
    """Return for each layer its largest activation: the hidden state after the layer that is largest in magnitude.

    `ratio` is the magnitude in medians of |hidden state| of the layer and prompt, for the prompt where it is largest;
    `smallest_ratio` is that of the prompt where it is smallest. `token` and `channel` give the place.
    """
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output: states.append(get_state(output)))
        for layer in list_layers(model)
    ]
    try:
        model(prompts, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [describe_state(layer, state) for layer, state in enumerate(states)]


def get_state(output: Any) -> torch.Tensor:
    """Return the hidden states in the output of a layer, in float32, with the shape (prompts, tokens, channels)."""
    state = output[0] if isinstance(output, tuple) else output
    assert isinstance(state, torch.Tensor)
    return state.detach().float()


def describe_state(layer: int, state: torch.Tensor) -> dict[str, Any]:
    """Describe the largest activation among `state`, which has the shape (prompts, tokens, channels)."""
    flat = state.flatten(1)
    magnitudes = flat.abs()
    largest, places = magnitudes.max(dim=1)
    medians = magnitudes.median(dim=1).values
    ratios = largest / medians
    prompt = int(ratios.argmax())
    place = int(places[prompt])
    return {
        "layer": layer,
        "ratio": round(float(ratios[prompt]), 2),
        "smallest_ratio": round(float(ratios.min()), 2),
        "value": round(float(flat[prompt, place]), 4),
        "median": round(float(medians[prompt]), 6),
        "token": place // state.shape[2],
        "channel": place % state.shape[2],
    }
