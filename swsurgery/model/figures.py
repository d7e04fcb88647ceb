"""Compute the figures of one window of text from the logits of several variants, a bounded number of logits at a time.

The logits of a window may be larger than the model. This module therefore reads them in blocks of tokens. In a block,
the log-probabilities of the base are computed once, and the variants are compared with them one after the other.
The losses of variants that hardly differ from the base may be estimated instead (near.py).
Figures are computed in float32 for each token and summed in float64. This module must not run a model or judge figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swsurgery.model.cutting import Window
from swsurgery.model.near import LEAST_VOCABULARY, Neighbourhood
from swsurgery.model.outcomes import LastProduct, Logits


class LogitLimits(NamedTuple):
    """Maximum numbers of logits in memory.

    `base` limits a block of tokens of one variant, whose log-probabilities and probabilities are kept while the
    variants are compared with them. `read` limits what is computed by one call of the model's head, and `slice` the
    intermediate results.
    """

    base: int
    read: int
    slice: int


LIMITS = {"cpu": LogitLimits(2**24, 2**26, 2**19), "cuda": LogitLimits(2**25, 2**27, 2**27)}
"""The limits on each type of device. A slice on the CPU takes 2 MB, which stays in a cache. A GPU needs few large
steps. In float32, all tensors together take at most 0.5 GB on the CPU and 2 GB on a GPU."""


class WindowFigures:
    """The figures of each scored token of one window, for each variant. Variant number 0 is the base.

    With `only_losses`, the stop-word mass and `list_finite` are left out. `variances` then contains for each variant
    the largest variance, per token, of an estimate of its losses (near.py). Losses with such an estimate are not
    computed from logits, and their KL is NaN. A variant with variance 0 is not estimated.
    """

    def __init__(
        self,
        window: Window,
        variants: int,
        stop_tokens: Sequence[int],
        only_losses: bool = False,
        variances: Sequence[float] = (),
    ):
        self._window, self._variants, self._only_losses = window, variants, only_losses
        self._variances = {number: most for number, most in enumerate(variances) if most and only_losses}
        self._stop_tokens = stop_tokens
        self._first, self._scored = window.first, len(window.targets)
        self._filled = False
        self.estimated: set[int] = set()
        """The variants of which some losses were estimated."""

    def read(self, logits: Logits) -> None:
        """Compute all figures from the logits of the window."""
        for numbers, tokens, part in self._list_parts(logits):
            if not self._filled:
                self._allocate(part.device)
            self._add_block(numbers, tokens, part)

    def sum_up(self) -> tuple[list[Tensor], list[float], list[float]]:
        """Return for each variant the losses of the tokens, the sum of KL and the sum of the stop-word mass.

        The losses are float64 tensors on the CPU.
        """
        losses = list(self._nll.double().cpu())
        return losses, self._kl.double().sum(1).tolist(), self._stop_mass.double().sum(1).tolist()

    def list_finite(self) -> list[bool]:
        """Return for each variant whether all of its logits are finite, those of the last token included."""
        found: list[bool] = self._finite.all(dim=1).tolist()
        return found

    def _allocate(self, device: torch.device) -> None:
        shape = self._variants, self._scored
        self._targets = torch.tensor(self._window.targets, device=device)
        self._stop = torch.tensor(self._stop_tokens, device=device, dtype=torch.long)
        self._nll, self._kl, self._stop_mass = (torch.zeros(shape, device=device) for _ in range(3))
        self._finite = torch.ones(self._variants, len(self._window), dtype=torch.bool, device=device)
        self._filled = True

    def _list_parts(self, logits: Logits) -> Iterator[tuple[list[int], slice, Tensor]]:
        """Yield numbers of variants, a block of tokens, and their logits (variants, tokens, vocabulary).

        Each block of the base comes before the same block of other variants.
        """
        # Whether the logits are finite is asked for every token, the other figures for the scored ones.
        end = self._first + self._scored
        tokens = range(self._first, end) if self._only_losses else range(len(self._window))
        if not logits.is_divisible:
            yield from self._list_whole_parts(logits, tokens)
            return
        wanted = self._variances and logits.vocabulary >= LEAST_VOCABULARY
        product = logits.find_last_product() if wanted else None
        limits = LIMITS[logits.device.type]
        size = max(1, limits.base // logits.vocabulary)
        for begin in tokens[::size]:
            block = slice(begin, min(tokens.stop, begin + size))
            yield [0], block, logits.read([0], block)
            close = self._estimate(product, block) if product else set()
            left = [number for number in range(1, self._variants) if number not in close]
            at_once = max(1, limits.read // (logits.vocabulary * (block.stop - block.start)))
            for at in range(0, len(left), at_once):
                numbers = left[at : at + at_once]
                yield numbers, block, logits.read(numbers, block)

    def _estimate(self, product: LastProduct, tokens: slice) -> set[int]:
        """Estimate losses in a block of tokens after the base was added.

        Returns the numbers of the variants whose estimates are sufficient.
        """
        scored = slice(tokens.start - self._first, tokens.stop - self._first)
        base = product.read_inputs([0], tokens)[0]
        near = Neighbourhood(product.matrix, base, self._chances, self._targets[scored])
        numbers, most = list(self._variances), list(self._variances.values())
        rises, variances = near.estimate(product.read_inputs(numbers, tokens))
        found: set[int] = set()
        for number, limit, rise, variance in zip(numbers, most, rises, variances.mean(1).tolist(), strict=True):
            if variance <= limit:  # False for NaN
                self._nll[number, scored] = self._nll[0, scored] + rise
                self._kl[number, scored] = torch.nan
                found.add(number)
        self.estimated |= found
        return found

    def _list_whole_parts(self, logits: Logits, tokens: range) -> Iterator[tuple[list[int], slice, Tensor]]:
        base = logits[0]
        size = max(1, LIMITS[base.device.type].base // base.shape[-1])
        blocks = [slice(begin, min(tokens.stop, begin + size)) for begin in tokens[::size]]
        for number in range(min(1, self._variants - 1), self._variants):
            whole = logits[number] if number else base
            for block in blocks:
                yield [0], block, base[None, block]
                if number:
                    yield [number], block, whole[None, block]

    def _add_block(self, numbers: list[int], tokens: slice, logits: Tensor) -> None:
        """Add the logits (variants, tokens, vocabulary) of the variants `numbers` and a block of tokens."""
        if not self._only_losses:
            self._finite[_make_index(numbers), tokens] = find_finite_rows(logits)
        begin, end = max(tokens.start, self._first), min(tokens.stop, self._first + self._scored)
        if end <= begin:
            return
        logits = logits[:, begin - tokens.start : end - tokens.start]
        scored = slice(begin - self._first, end - self._first)
        if numbers == [0]:
            self._reference = logits[0].float().log_softmax(-1)
            self._chances = self._reference.exp()
            self._add_slice(slice(0, 1), scored, self._reference[None])
            return
        for at, rows in _split(logits):
            variants = _make_index(numbers[at])
            log = logits[at, rows].float().log_softmax(-1)
            self._add_slice(variants, slice(scored.start + rows.start, scored.start + rows.stop), log)
            reference, chances = self._reference[rows], self._chances[rows]
            self._kl[variants, scored.start + rows.start : scored.start + rows.stop] = (
                torch.sub(reference, log, out=log).mul_(chances).sum(-1)
            )

    def _add_slice(self, variants: slice | list[int], tokens: slice, log: Tensor) -> None:
        """Add the losses and the stop-word mass of log-probabilities (variants, tokens, vocabulary)."""
        targets = self._targets[tokens].expand(log.shape[0], -1)[..., None]
        self._nll[variants, tokens] = -log.gather(-1, targets)[..., 0]
        if len(self._stop):
            self._stop_mass[variants, tokens] = log[..., self._stop].exp().sum(-1)


def _make_index(numbers: list[int]) -> slice | list[int]:
    """Return consecutive numbers as a slice, because a list would be copied to the device."""
    index = slice(numbers[0], numbers[-1] + 1)
    return index if len(range(index.start, index.stop)) == len(numbers) else numbers


def _split(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Split logits (variants, tokens, vocabulary) into slices of variants and tokens of bounded size."""
    variants, tokens, vocabulary = logits.shape
    rows = max(1, LIMITS[logits.device.type].slice // vocabulary)
    height, width = max(1, rows // max(1, tokens)), min(rows, tokens)
    for top in range(0, variants, height):
        for left in range(0, tokens, max(1, width)):
            yield slice(top, min(variants, top + height)), slice(left, min(tokens, left + width))


def find_finite_rows(logits: Tensor) -> Tensor:
    """Return for each row of logits (..., vocabulary) whether all of them are finite: a tensor of bools (...)."""
    return logits.amax(-1).isfinite() & logits.amin(-1).isfinite()
