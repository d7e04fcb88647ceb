"""A sweep over factors, held against plain transformers models whose files hold the scaled scalars, one at a time."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoint import DOWN, TEXT, write_pair

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import ModelError, NumberError
from swsurgery.model import load, readings
from swsurgery.model.forward import LayeredModel
from swsurgery.model.intervals import DESIGN_EFFECT
from swsurgery.model.outcomes import Outcomes
from swsurgery.model.protocol import Protocol
from swsurgery.model.stopwords import STOP_WORDS
from swsurgery.scanning.measure_sweep import sweep_checkpoint, sweep_windows
from swsurgery.scanning.report import Sweep
from swsurgery.storage.coordinate import Coordinate

WINDOW = 24
FIRST, SECOND = Coordinate(DOWN, (3, 7)), Coordinate(DOWN, (9, 2))
FACTORS = (0.0, 1.0, 0.3, -2.0, 40.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16, so that most products have to be rounded."""
    return write_pair(tmp_path_factory.mktemp("pair"), dtype=torch.bfloat16).base


@pytest.fixture(scope="module")
def checkpoint(base: Path) -> Checkpoint:
    return open_checkpoint(base)


def swept(checkpoint: Checkpoint, factors: Sequence[float] = FACTORS, **options: Any) -> Sweep:
    lengths = {"window": WINDOW} | {name: options.pop(name) for name in ("windows", "window") if name in options}
    settings = {"text": TEXT, "device": "cpu", "protocol": Protocol(**lengths)} | options
    return sweep_checkpoint(checkpoint, [FIRST, SECOND], factors, **settings)


@pytest.fixture(scope="module")
def report(checkpoint: Checkpoint) -> Sweep:
    return swept(checkpoint)


def scaled(base: Path, folder: Path, factor: float, coordinates: Sequence[Coordinate] = (FIRST, SECOND)) -> Path:
    """A copy of the checkpoint with the scalars scaled, by torch's own rounding of the product in float64."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for tensor, index in coordinates:
        tensors[tensor][index] = torch.tensor(float(tensors[tensor][index]) * factor, dtype=torch.float64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def windows_of(base: Path, window: int = WINDOW) -> list[list[int]]:
    ids = transformers.AutoTokenizer.from_pretrained(base)(TEXT, add_special_tokens=False)["input_ids"]
    return [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]


class Alone:
    """Figures of one checkpoint, by the textbook."""

    def __init__(self, folder: Path, windows: list[list[int]]):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        states: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, arguments, output: states.append(output))
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([ids])).logits[0, :-1].double().numpy() for ids in windows]
        self.logs = np.concatenate([x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits])
        self.peak = max((float(v) for s in states for v in s.flatten()), key=abs)
        self.targets = np.concatenate([ids[1:] for ids in windows])

    @property
    def perplexity(self) -> float:
        return float(np.exp(-self.logs[np.arange(len(self.targets)), self.targets].mean()))

    def kl(self, other: Alone) -> float:
        return float((np.exp(self.logs) * (self.logs - other.logs)).sum(-1).mean())

    def stop_mass(self, stop: list[int]) -> float:
        return float(np.exp(self.logs[:, stop]).sum(-1).mean())


def test_each_point_is_the_model_whose_file_holds_the_scaled_scalars(base: Path, report: Sweep, tmp_path: Path) -> None:
    windows = windows_of(base)
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    stop = [i for token, i in vocabulary.items() if token.removeprefix("\u0120").lower() in STOP_WORDS]
    stored = Alone(base, windows)
    assert report.base.perplexity == pytest.approx(stored.perplexity, rel=1e-5)
    assert [point.factor for point in report.points] == list(FACTORS)
    for number, point in enumerate(report.points):
        alone = Alone(scaled(base, tmp_path / str(number), point.factor), windows)
        assert point.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
        assert point.ratio == pytest.approx(alone.perplexity / stored.perplexity, rel=1e-5)
        assert point.kl == pytest.approx(stored.kl(alone), rel=1e-4, abs=1e-9)
        assert point.stopword_mass == pytest.approx(alone.stop_mass(stop), rel=1e-5)
        assert point.peak == pytest.approx(alone.peak, rel=1e-5)
        assert point.finite
    assert len({point.perplexity for point in report.points}) == len(FACTORS)


def window_losses(folder: Path, windows: list[list[int]]) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in windows]


def test_intervals_are_those_of_the_losses_of_single_windows(
    base: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    windows = windows_of(base, 8)[:8]
    found = swept(checkpoint, [0.0, 40.0], windows=8, window=8)
    stored = window_losses(base, windows)
    for number, point in enumerate(found.points):
        alone = window_losses(scaled(base, tmp_path / str(number), point.factor), windows)
        rises = np.subtract(alone, stored)
        # Student's t for 7 degrees of freedom, and the factor for the correlation of neighbours
        reach = 2.3646 * math.sqrt(DESIGN_EFFECT) * rises.std(ddof=1) / math.sqrt(8)
        ends = np.exp([rises.mean() - reach, rises.mean() + reach])
        assert [point.ratio_low, point.ratio_high] == pytest.approx(list(ends), rel=1e-4)
        assert point.kl_low <= point.kl <= point.kl_high
    assert found.base.ratio_low == found.base.ratio_high == 1.0
    few = swept(checkpoint, [0.0], windows=7, window=8).points[0]
    assert few.ratio_low is few.ratio_high is few.kl_low is few.kl_high is None


def test_factor_one_is_the_base_to_the_last_digit(report: Sweep) -> None:
    assert report.base == report.points[1]
    assert (report.base.ratio, report.base.kl, report.base.factor) == (1.0, 0.0, 1.0)


def test_a_factor_that_changes_no_bit_is_the_base(checkpoint: Checkpoint) -> None:
    (point,) = swept(checkpoint, [1.0001], windows=1).points
    assert (point.factor, point.ratio, point.kl) == (1.0001, 1.0, 0.0)


def test_what_was_read_is_said(report: Sweep, base: Path) -> None:
    assert report.coordinates == (FIRST, SECOND)
    assert (report.windows, report.window_tokens) == (len(windows_of(base)), WINDOW)
    assert report.scored_tokens == sum(len(ids) - 1 for ids in windows_of(base))
    assert (report.dtype, report.device, report.method) == ("float32", "cpu", "layer by layer")
    assert report.text_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert swept(open_checkpoint(base), [0.0], text=None, windows=1).text_sha256 != report.text_sha256


@pytest.mark.parametrize(
    ("name", "tensor", "index"),
    [
        ("gpt2", "transformer.h.0.mlp.c_proj.weight", (20, 3)),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w2.weight", (3, 7)),
        ("llama", "model.embed_tokens.weight", (5, 3)),
    ],
)
def test_scalars_may_lie_anywhere(tmp_path: Path, name: str, tensor: str, index: tuple[int, ...]) -> None:
    tiny_models.write(name, tmp_path / "base")
    windows = [[1, 5, 9, 13, 6, 3], [5, 5, 2]]
    model = load.open_model(open_checkpoint(tmp_path / "base"), device="cpu", placement="whole")
    point = sweep_windows(model, [Coordinate(tensor, index)], [-9.0], windows).points[0]
    losses = []
    for folder in (
        tmp_path / "base",
        scaled(tmp_path / "base", tmp_path / "scaled", -9.0, [Coordinate(tensor, index)]),
    ):
        alone, total = tiny_models.load(name, folder), 0.0
        for ids in map(torch.tensor, windows):
            with torch.no_grad():
                total += float(alone(input_ids=ids[None], labels=ids[None]).loss) * (len(ids) - 1)
        losses.append(total / 7)
    assert point.perplexity == pytest.approx(math.exp(losses[1]), rel=1e-5)
    assert point.ratio == pytest.approx(math.exp(losses[1] - losses[0]), rel=1e-5)
    assert abs(point.ratio - 1) > 1e-4


def test_many_factors_are_run_in_groups_and_equal_values_once(
    checkpoint: Checkpoint, report: Sweep, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    run = LayeredModel.run

    def counted(model: LayeredModel, sequences: Any, variants: Any, **options: Any) -> Iterator[Outcomes]:
        runs.append(len(variants))
        return run(model, sequences, variants, **options)

    monkeypatch.setattr(LayeredModel, "run", counted)
    assert swept(checkpoint, [*FACTORS, 1.0001, -1.9999]).points[: len(FACTORS)] == report.points
    assert runs.pop() == 1 + len(FACTORS) - 1 and not runs
    state = 16 * 4 * WINDOW * len(windows_of(base))
    monkeypatch.setattr(readings, "STATES", 3 * state)
    grouped = swept(checkpoint)
    assert runs == [3, 3]
    assert grouped.base == report.base
    for one, other in zip(grouped.points, report.points, strict=True):
        assert one.perplexity == pytest.approx(other.perplexity, rel=1e-6)
        assert one.kl == pytest.approx(other.kl, rel=1e-4, abs=1e-9)


def test_logits_that_are_not_finite_are_said(tmp_path: Path) -> None:
    tiny_models.write("llama", tmp_path / "base")
    model = load.open_model(open_checkpoint(tmp_path / "base"), device="cpu", placement="whole")
    point = sweep_windows(model, [Coordinate("lm_head.weight", (3, 7))], [1e38], [[1, 5, 9]]).points[0]
    assert point.ratio != 1.0
    huge = Coordinate("model.norm.weight", (7,))
    point = sweep_windows(model, [huge, Coordinate("lm_head.weight", (3, 7))], [1e38], [[1, 5, 9]]).points[0]
    assert not point.finite


# Refusals ------------------------------------------------------------------------------------------------------------


def faults(
    kind: type, checkpoint: Checkpoint, factors: Sequence[float], coordinates: Sequence[Coordinate] = (FIRST,)
) -> tuple[str, ...]:
    with pytest.raises(kind) as caught:
        sweep_checkpoint(checkpoint, coordinates, factors, text=TEXT, device="cpu")
    return caught.value.faults


def test_factors_that_cannot_be_are_refused(checkpoint: Checkpoint) -> None:
    assert faults(NumberError, checkpoint, []) == ("nothing to sweep: no factors",)
    assert faults(NumberError, checkpoint, [1.0, math.nan, math.inf]) == (
        "factor is not finite: nan",
        "factor is not finite: inf",
    )
    assert faults(NumberError, checkpoint, [0.5, 0.0, 2, 0.5, -0.0, 2.0]) == (
        "factor is given twice: 0.5",
        "factor is given twice: 0",
        "factor is given twice: 2",
    )


def test_a_product_that_the_dtype_cannot_hold_is_refused_with_factor_and_scalar(checkpoint: Checkpoint) -> None:
    lines = faults(NumberError, checkpoint, [0.5, 1e40, -3e39], [FIRST, SECOND])
    assert len(lines) == 4
    for line, (coordinate, factor) in zip(
        lines, [(FIRST, "1e+40"), (FIRST, "-3e+39"), (SECOND, "1e+40"), (SECOND, "-3e+39")], strict=True
    ):
        assert line.startswith(f"cannot scale {coordinate} by {factor}: ") and "overflows BF16" in line
    assert "underflows BF16" in faults(NumberError, checkpoint, [1e-45])[0]


def test_scalars_that_are_not_there_are_refused(checkpoint: Checkpoint) -> None:
    assert faults(ModelError, checkpoint, [0.5], []) == ("nothing to sweep: no coordinates",)
    assert faults(ModelError, checkpoint, [0.5], [FIRST, SECOND, FIRST]) == (f"coordinate is given twice: {FIRST}",)
    for coordinate in (
        Coordinate(DOWN, (16, 0)),
        Coordinate(DOWN, (0, -1)),
        Coordinate(DOWN, (3,)),
        Coordinate(DOWN, ()),
        Coordinate("model.layers.9.mlp.down_proj.weight", (3, 7)),
    ):
        assert faults(ModelError, checkpoint, [0.5], [coordinate]) == (
            f"no such scalar in the checkpoint: {coordinate}",
        )


def test_a_token_that_the_model_does_not_know_is_refused(base: Path, tmp_path: Path) -> None:
    tiny_models.write("llama", tmp_path / "small")  # knows 32 tokens, the tokenizer more
    tiny_checkpoint.make_tokenizer().save_pretrained(tmp_path / "small")
    (line,) = faults(ModelError, open_checkpoint(tmp_path / "small"), [0.5])
    assert line.startswith("the tokenizer gives token ") and "the model has 32" in line
