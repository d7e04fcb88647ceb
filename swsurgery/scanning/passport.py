"""Find the largest activation of each prompt, and the layers where it rises and falls.

This works without any threshold: a model that has no massive activation has a largest one too. This module uses the
hidden states that spikes.py recorded, and runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swsurgery.scanning.activation_report import LargestActivation
from swsurgery.scanning.persistence import KEPT
from swsurgery.scanning.spikes import Trace


def find_largest_activations(traces: Sequence[Trace], has_bos: bool) -> list[LargestActivation]:
    """Find the largest hidden state of each trace; `has_bos` states whether the sequences begin with BOS."""
    return [_find_largest(trace, prompt, has_bos) for prompt, trace in enumerate(traces)]


def _find_largest(trace: Trace, prompt: int, has_bos: bool) -> LargestActivation:
    peaks = torch.stack([hidden.abs().max() for hidden in trace.hidden])
    layer = int(peaks.argmax())
    hidden = trace.hidden[layer]
    token, channel = divmod(int(hidden.abs().argmax()), hidden.shape[1])
    states = [0.0 if trace.entry is None else float(trace.entry[token, channel])]
    states += [float(hidden[token, channel]) for hidden in trace.hidden]
    value = states[layer + 1]
    # How far each layer up to the peak moves the state towards its largest value.
    steps = [(after - before) * (1 if value > 0 else -1) for before, after in zip(states, states[1:], strict=False)]
    rises = max(range(layer + 1), key=steps.__getitem__)
    falls = (number for number in range(layer + 1, len(trace.hidden)) if states[number + 1] * value < KEPT * value**2)
    return LargestActivation(
        prompt, has_bos, value, layer, token, channel, abs(value) / trace.medians[layer], rises, next(falls, None)
    )
