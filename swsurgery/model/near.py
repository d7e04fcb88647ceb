"""Estimate the losses of variants that hardly differ from the base, without computing their logits.

Let the logits be z = W n, with the output matrix W and its input n, and let p be the probabilities of the base. If a
variant changes the input by d, the logits change by x = W d, and the loss -log p[target] changes by exactly

    (sum of p W - W[target]) d  +  KL(base || variant),    KL = log of the mean of exp(x - mean of x), weighted by p.

The first term needs one product with W for all variants together. The second is of second order in d. It is estimated
from SAMPLES rows of W for each token, which are drawn with the probabilities p. The estimates from the two halves of
the samples give its variance. A caller can compute the logits if the variance is too large.

This module must not run a model or judge figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

SAMPLES = 1024
"""Number of rows of the output matrix that are drawn for each token. It must be even."""

TOKENS = 16
"""Number of tokens whose drawn rows are in memory at once: 42 MB for 640 channels."""

LEAST_VOCABULARY = 64 * SAMPLES
"""Minimum number of logits of a token for which estimates save time."""


class Neighbourhood:
    """The base's probabilities for some tokens, prepared for estimates of variants that are close to the base.

    `matrix` (vocabulary, channels) is the output matrix, `inputs` (tokens, channels) its inputs in the base, `chances`
    (tokens, vocabulary) the probabilities of the base, and `targets` (tokens) the tokens that are predicted.
    """

    def __init__(self, matrix: Tensor, inputs: Tensor, chances: Tensor, targets: Tensor):
        self._matrix, self._inputs = matrix, inputs
        self._slopes = (chances @ matrix - matrix[targets]).double()
        self._drawn = _draw(chances, int(targets.sum()))

    def estimate(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate the rise of the loss of each variant and token, and the variance of the estimate, in float64.

        `inputs` (variants, tokens, channels) are the inputs of the output matrix in the variants. Both results have the
        shape (variants, tokens).
        """
        change = inputs - self._inputs
        first = (change.double() * self._slopes).sum(-1)
        parts = [self._estimate_kl(change[:, part], self._drawn[part]) for part in _split(len(self._drawn))]
        return first + torch.cat([kl for kl, _ in parts], 1), torch.cat([variance for _, variance in parts], 1)

    def _estimate_kl(self, change: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        rises = torch.einsum("vtc,tsc->vts", change, self._matrix[drawn])
        halves = _compute_kl(rises[..., 0::2]) - _compute_kl(rises[..., 1::2])
        return _compute_kl(rises), halves.square() / 4


def _draw(chances: Tensor, seed: int) -> Tensor:
    """Draw SAMPLES row numbers for each token, at equal distances in the cumulated probabilities (systematic sampling).

    The first distance is random, so the errors of different tokens cancel on average.
    """
    cumulated = chances.cumsum(-1)
    offsets = torch.rand(len(chances), 1, generator=torch.Generator().manual_seed(seed))
    places = (torch.arange(SAMPLES) + offsets) / SAMPLES * cumulated[:, -1:]
    return torch.searchsorted(cumulated, places).clamp_(max=chances.shape[-1] - 1)


def _compute_kl(rises: Tensor) -> Tensor:
    """Estimate the KL (variants, tokens) from rises of sampled logits (variants, tokens, samples), in float64.

    The factor n / (n - 1) corrects for using the mean of n samples instead of the mean of the whole vocabulary.
    """
    samples = rises.shape[-1]
    centred = rises.double()
    centred -= centred.mean(-1, keepdim=True)
    return (centred.logsumexp(-1) - math.log(samples)) * (samples / (samples - 1))


def _split(tokens: int) -> Iterator[slice]:
    return (slice(begin, begin + TOKENS) for begin in range(0, tokens, TOKENS))
