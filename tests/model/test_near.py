"""Estimated losses, compared with losses computed from all logits in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.model import figures
from swsurgery.model.cutting import Window
from swsurgery.model.figures import WindowFigures
from swsurgery.model.forward import LayeredModel
from swsurgery.model.head import Head
from swsurgery.model.near import Neighbourhood
from swsurgery.model.outcomes import LastProduct, Logits

VOCABULARY, CHANNELS, TOKENS = 4096, 24, 200
WINDOW = Window.of([*range(TOKENS), 7])
TARGETS = list(WINDOW.targets)


class Product:
    """An output matrix with its inputs in several variants; `peak` is the scale of the logits."""

    def __init__(self, peak: float, sizes: list[float]):
        """`sizes` contains the size of the change of each variant relative to the base's inputs."""
        generator = torch.Generator().manual_seed(3)
        self.matrix = torch.randn(VOCABULARY, CHANNELS, generator=generator)
        base = torch.randn(TOKENS + 1, CHANNELS, generator=generator) * peak / math.sqrt(CHANNELS)
        changes = [torch.randn(base.shape, generator=generator) * size * peak / math.sqrt(CHANNELS) for size in sizes]
        self.inputs = torch.stack([base, *(base + change for change in changes)])
        self.rows = 0

    def read(self, variants: list[int], tokens: slice) -> Tensor:
        found = self.inputs[variants, tokens] @ self.matrix.T
        self.rows += found.shape[0] * found.shape[1]
        return found

    def make_logits(self, known: bool = True) -> Logits:
        product = LastProduct(self.matrix, lambda variants, tokens: self.inputs[variants, tokens])
        return Logits(
            len(self.inputs),
            lambda variant: self.read([variant], slice(None))[0],
            self.read,
            VOCABULARY,
            find_last_product=lambda: product if known else None,
        )

    def compute_rises(self, variant: int) -> Tensor:
        logs = (self.inputs[[0, variant], :-1].double() @ self.matrix.T.double()).log_softmax(-1)
        losses = -logs[:, range(TOKENS), TARGETS]
        return losses[1] - losses[0]


def read_figures(logits: Logits, variances: list[float]) -> WindowFigures:
    found = WindowFigures(WINDOW, len(logits), [], only_losses=True, variances=variances)
    found.read(logits)
    return found


@pytest.mark.parametrize("peak", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-2])
def test_the_error_of_an_estimate_is_what_its_variance_says(peak: float, size: float) -> None:
    """Flat probabilities, those of a text, and one token that has almost all of them."""
    product = Product(peak, [size])
    chances = (product.inputs[0, :-1] @ product.matrix.T).softmax(-1)
    near = Neighbourhood(product.matrix, product.inputs[0, :-1], chances, torch.tensor(TARGETS))
    rises, variances = near.estimate(product.inputs[1:, :-1])
    exact = product.compute_rises(1)
    rounding = 1e-6 * float(exact.abs().mean())
    assert abs(float(rises.mean() - exact.mean())) <= 4 * float(variances.sum().sqrt()) / TOKENS + rounding
    first = (chances @ product.matrix - product.matrix[TARGETS]) * (product.inputs[1] - product.inputs[0])[:-1]
    kl = float((exact - first.double().sum(-1)).mean())
    assert float(variances.sum().sqrt()) / TOKENS <= 0.05 * kl + rounding


def test_variants_close_to_the_base_need_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "LEAST_VOCABULARY", VOCABULARY)
    product = Product(2.0, [1e-5, 0.5, 1e-4, 1e-5])
    product.inputs[4] = torch.nan
    whole = read_figures(product.make_logits(), [])
    assert (product.rows, whole.estimated) == (5 * TOKENS, set())
    product.rows = 0
    found = read_figures(product.make_logits(), [0.0, 1e-12, 1e-12, 0.0, 1e-12])
    assert (product.rows, found.estimated) == (4 * TOKENS, {1})
    (losses, kl, _), (wanted, wanted_kl, _) = found.sum_up(), whole.sum_up()
    for number in (0, 2, 3):
        assert torch.equal(losses[number], wanted[number]) and kl[number] == wanted_kl[number]
    assert losses[4].isnan().all()
    assert math.isnan(kl[1])
    rises = losses[1] - losses[0]
    torch.testing.assert_close(rises, product.compute_rises(1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("known", [True, False])
def test_without_a_known_product_or_a_large_vocabulary_nothing_is_estimated(
    monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    monkeypatch.setattr(figures, "LEAST_VOCABULARY", VOCABULARY + 1 if known else VOCABULARY)
    product = Product(2.0, [1e-5])
    assert read_figures(product.make_logits(known), [0.0, 1.0]).estimated == set()
    assert product.rows == 2 * TOKENS


@pytest.mark.parametrize(
    ("name", "known"),
    [("llama", True), ("gemma3_text", True), ("gemma2", False), ("cohere", False)],
)
def test_the_last_product_is_known_if_it_makes_the_logits(tmp_path: Path, name: str, known: bool) -> None:
    """Softcapping (gemma2) and scaling (cohere) change what the product gives."""
    tiny_models.write(name, tmp_path)
    model = LayeredModel(tiny_models.load(name, tmp_path), open_checkpoint(tmp_path))
    (outcomes,) = model.run([[1, 5, 9, 13, 6]], [{}, {}])
    product = outcomes.logits.find_last_product()
    assert (product is not None) is known
    if product:
        inputs = product.read_inputs([1], slice(1, 4))
        torch.testing.assert_close(inputs @ product.matrix.T, outcomes.logits.read([1], slice(1, 4)))


def test_a_model_that_does_more_with_its_logits_has_no_known_product(tmp_path: Path) -> None:
    tiny_models.write("llama", tmp_path)
    model = LayeredModel(tiny_models.load("llama", tmp_path), open_checkpoint(tmp_path))
    head, rows = Head(model.model, [], None), torch.randn(3, 16)
    for expects_logits in (True, False):

        def compute(ids: list[int], hidden: Tensor, expects_logits: bool = expects_logits) -> Tensor:
            logits = model.model.lm_head(hidden)[0]
            return logits - logits[:, 31:] if expects_logits else hidden[0] @ model.model.lm_head.weight.T

        head.compute = compute  # type: ignore[method-assign,assignment]  # the rest of the model is not needed
        with torch.no_grad():
            assert head.find_last_product([1, 2, 3], rows) is None
