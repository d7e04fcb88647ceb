"""The figures of several variants, compared with plain transformers models in float64 that are edited in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from safetensors import safe_open

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.model import figures, measure
from swsurgery.model.forward import LayeredModel
from swsurgery.storage.coordinate import Coordinate

WINDOWS = [[1, 5, 9, 13, 6, 3, 7, 2, 30, 11], [1, 9, 5, 3, 6, 13, 4, 4, 20, 21], [1, 2, 31]]
DOWN = "model.layers.{}.mlp.down_proj.weight"
STOP = [3, 6, 9]
FIRST, SECOND = Coordinate(DOWN.format(0), (3, 7)), Coordinate(DOWN.format(1), (5, 2))
NORM, EMBEDDING = Coordinate("model.norm.weight", (4,)), Coordinate("model.embed_tokens.weight", (5, 3))
VARIANTS = [
    {},
    {FIRST: 4.0},
    {SECOND: -3.0},
    {FIRST: 4.0, SECOND: -3.0},
    {FIRST: 4.0, SECOND: 0.0},
    {NORM: 2.0},
    {FIRST: 4.0, EMBEDDING: 1.5},
]
FAMILIES = ("llama", "gemma2", "gemma3_text", "granite", "cohere")
"""An untied head, softcapping and a tied head, another norm, scaled logits, and scaled logits with a tied head."""


class Losses:
    """The log-probabilities of every variant, one model for each, in float64: (variants, scored tokens, vocabulary)."""

    def __init__(self, name: str, folder: Path):
        self.logs: list[list[np.ndarray]] = []
        for variant in VARIANTS:
            model = tiny_models.load(name, folder).double()
            with torch.no_grad():
                for place, value in variant.items():
                    model.get_parameter(place.tensor)[place.index] = value
                self.logs.append([model(input_ids=torch.tensor([ids])).logits[0, :-1].numpy() for ids in WINDOWS])
        self.logs = [[x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in one] for one in self.logs]

    def nll(self, variant: int) -> np.ndarray:
        parts = [-log[np.arange(len(log)), ids[1:]] for log, ids in zip(self.logs[variant], WINDOWS, strict=True)]
        return np.concatenate(parts)

    def kl(self, variant: int) -> float:
        pairs = zip(self.logs[0], self.logs[variant], strict=True)
        return float(np.concatenate([(np.exp(base) * (base - log)).sum(-1) for base, log in pairs]).mean())

    def stop_mass(self, variant: int) -> float:
        return float(np.concatenate([np.exp(log[:, STOP]).sum(-1) for log in self.logs[variant]]).mean())


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Losses, LayeredModel]:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_models.write(request.param, folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(VARIANTS[-1]) <= {Coordinate(name, place.index) for name in file.keys() for place in VARIANTS[-1]}  # noqa: SIM118
    return Losses(request.param, folder), LayeredModel(tiny_models.load(request.param, folder), open_checkpoint(folder))


def measure_figures(model: LayeredModel, only_losses: bool = False) -> measure.Totals:
    totals = measure.Totals(STOP, len(VARIANTS), only_losses)
    for outcomes in model.run(WINDOWS, VARIANTS):
        totals.add_window(WINDOWS[outcomes.sequence], outcomes)
    return totals


def assert_right(totals: measure.Totals, losses: Losses) -> None:
    for number in range(len(VARIANTS)):
        np.testing.assert_allclose(torch.cat(totals.token_nll[number]), losses.nll(number), rtol=1e-4, atol=1e-5)
        assert totals.compute_mean_kl(number) == pytest.approx(losses.kl(number), rel=1e-4, abs=1e-6)
        assert totals.stop_mass[number] / totals.scored == pytest.approx(losses.stop_mass(number), rel=1e-4)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_figures_are_those_of_models_run_alone(
    bench: tuple[Losses, LayeredModel], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Blocks of 1, 7 and all tokens."""
    losses, model = bench
    monkeypatch.setattr(figures, "LIMITS", {"cpu": figures.LogitLimits(size * 32, 2 * size * 32, size * 32)})
    totals = measure_figures(model)
    assert_right(totals, losses)
    assert totals.finite == [True] * len(VARIANTS)
    alone = measure_figures(model, only_losses=True)
    for number in range(len(VARIANTS)):
        np.testing.assert_allclose(torch.cat(alone.token_nll[number]), torch.cat(totals.token_nll[number]), rtol=1e-5)


class Mixing(torch.nn.Module):
    """A last norm that lets each token see the mean of its window, so that tokens cannot be computed alone."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.weight, self.norm = norm.weight, [norm]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        place = torch.arange(hidden.shape[1])[:, None] / 10
        return self.norm[0](hidden + hidden.mean(1, keepdim=True) + place)


def test_a_head_that_mixes_tokens_is_computed_whole(tmp_path: Path) -> None:
    tiny_models.write("llama", tmp_path)
    model = LayeredModel(tiny_models.load("llama", tmp_path), open_checkpoint(tmp_path))
    model.model.model.norm = Mixing(model.model.model.norm)
    totals = measure_figures(model)
    for outcomes in model.run(WINDOWS, VARIANTS[:2]):
        assert not outcomes.logits.is_divisible
        assert torch.equal(outcomes.logits.read([1], slice(0, 2))[0], outcomes.logits[1][:2])
    with torch.no_grad():
        logits = [model.model(input_ids=torch.tensor([ids])).logits[0, :-1] for ids in WINDOWS]
    wanted = [torch.nn.functional.cross_entropy(x, torch.tensor(i[1:])) for x, i in zip(logits, WINDOWS, strict=True)]
    torch.testing.assert_close(torch.stack([x.mean() for x in totals.token_nll[0]]).float(), torch.stack(wanted))
    assert totals.compute_mean_kl(1) > 1e-3


class Rows:
    """A watch that counts the rows of each layer."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[int, int]]] = {}

    @contextlib.contextmanager
    def around(self, number: int, layer: torch.nn.Module, rows: Sequence[tuple[int, int]]) -> Iterator[None]:
        self.seen.setdefault(number, []).extend(rows)
        yield

    def after(self, number: int, rows: Sequence[tuple[int, int]], hidden: torch.Tensor) -> None: ...


def test_variants_share_layers_up_to_their_first_difference(tmp_path: Path) -> None:
    tiny_models.write("llama", tmp_path)
    model, rows = LayeredModel(tiny_models.load("llama", tmp_path), open_checkpoint(tmp_path)), Rows()
    variants: list[Mapping[Coordinate, float]] = [{}, {FIRST: 4.0}, {SECOND: -3.0}, {FIRST: 4.0, SECOND: -3.0}]
    variants += [{SECOND: 0.0}, {SECOND: -0.0}, {SECOND: -3.0}]
    for outcomes in model.run(WINDOWS[:1], variants, watch=rows):
        assert torch.equal(outcomes.logits[2], outcomes.logits[6])
    assert rows.seen[0] == [(0, 0), (0, 1)]
    assert sorted(rows.seen[1]) == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5)]
