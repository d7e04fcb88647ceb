"""The causal test, held against plain transformers models with the scalars taken out of the file, one model for each
set of scalars. Models are made so that it is known which scalars matter: the text is what the model itself says, and
neurons are planted that fill one residual channel, which the norms after it then see alone."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.projections import locate
from swsurgery.errors import ArchitectureError, ModelError
from swsurgery.model import figures, load, readings
from swsurgery.model.forward import LayeredModel
from swsurgery.model.outcomes import Logits, Outcomes, make_logits
from swsurgery.model.protocol import Protocol
from swsurgery.scanning import suspects
from swsurgery.scanning.causal_report import Effect
from swsurgery.scanning.causal_test import CausalOptions, open_bench
from swsurgery.scanning.confirm import confirm_scalars
from swsurgery.scanning.measure_sweep import sweep_windows
from swsurgery.scanning.report import Candidate, Confirmation, Trial
from swsurgery.scanning.run_options import RunOptions
from swsurgery.storage.coordinate import Coordinate

Short = tuple[int, int, int] | tuple[int, int, int, int]
"""Layer, row, col, and in a mixture of experts the expert."""

HUGE = 1000.0
WINDOWS, LENGTH = 12, 30


class Bench:
    """A tiny model on disk in which some scalars of down projections have given values, and text of its own."""

    def __init__(
        self, folder: Path, name: str, planted: Mapping[Short, float], copies: Mapping[int, int] | None = None
    ):
        """`copies`: neurons of layer 0 that are made to fire as another one does (Llama's names)."""
        self.folder, self.name = folder, name
        tiny_models.write(name, folder)
        self.checkpoint = open_checkpoint(folder)
        tensors = load_file(folder / "model.safetensors")
        for copy, neuron in (copies or {}).items():
            for projection in ("gate_proj", "up_proj"):
                weight = tensors[f"model.layers.0.mlp.{projection}.weight"]
                weight[copy] = weight[neuron]
        for short, value in planted.items():
            coordinate = self.coordinate(short)
            tensors[coordinate.tensor][coordinate.index] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        self.checkpoint = open_checkpoint(folder)  # a file that changed since its listing would be refused
        self.tensors = tensors
        self.windows = self.speak()

    def coordinate(self, short: Short) -> Coordinate:
        places = dict(zip(("layer", "row", "col", "expert"), short, strict=False))
        return locate(self.checkpoint.config, self.checkpoint.shapes, **places)

    def candidate(self, short: Short) -> Candidate:
        layer, row, col, *expert = short
        coordinate = self.coordinate(short)
        value = float(self.tensors[coordinate.tensor][coordinate.index])
        return Candidate(coordinate, layer, row, col, expert[0] if expert else None, value, score=1.0, rank=1)

    def speak(self) -> list[list[int]]:
        """Windows drawn from what the model predicts, so that whatever changes the predictions raises the loss."""
        model, generator = tiny_models.load(self.name, self.folder), torch.Generator().manual_seed(7)
        ids = torch.randint(32, (WINDOWS, 1), generator=generator)
        with torch.no_grad():
            for _ in range(LENGTH - 1):
                chances = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
                ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
        return ids.tolist()

    def log_probabilities(self, zeroed: Sequence[Short]) -> np.ndarray:
        """(windows, tokens - 1, vocabulary) of a model whose file has zeros there, in float64."""
        changed = self.folder.parent / "changed"
        shutil.copytree(self.folder, changed)
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        for short in zeroed:
            coordinate = self.coordinate(short)
            tensors[coordinate.tensor][coordinate.index] = 0.0
        save_file(tensors, changed / "model.safetensors", {"format": "pt"})
        with torch.no_grad():
            model = tiny_models.load(self.name, changed)
            logits = model(input_ids=torch.tensor(self.windows), use_cache=False).logits.double().numpy()[:, :-1]
        shutil.rmtree(changed)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def extra_loss(self, zeroed: Sequence[Short]) -> np.ndarray:
        """(windows, tokens - 1): what each token costs more without the scalars, in nats."""
        targets = np.array(self.windows)[:, 1:, None]
        losses = [-np.take_along_axis(self.log_probabilities(z), targets, 2)[..., 0] for z in (zeroed, ())]
        return losses[0] - losses[1]

    def ratio(self, zeroed: Sequence[Short]) -> float:
        return float(np.exp(self.extra_loss(zeroed).mean()))

    def model(self) -> LayeredModel:
        return load.open_model(self.checkpoint, device="cpu", placement="whole")

    def confirm(self, shorts: Sequence[Short], **options: Any) -> Confirmation:
        return confirm_scalars(
            self.model(), [self.candidate(s) for s in shorts], self.windows, CausalOptions(**options)
        )


def trial(found: Confirmation, bench: Bench, short: Short) -> Trial:
    (one,) = [t for t in found.trials if t.candidate.coordinate == bench.coordinate(short)]
    return one


def verdicts(found: Confirmation) -> list[str]:
    return [t.verdict for t in found.trials]


# Effects and verdicts ------------------------------------------------------------------------------------------------

# (model, a scalar that is made critical, another one that is not)
FAMILIES = [
    ("llama", (0, 3, 7), (1, 9, 20)),
    ("gpt2", (0, 3, 7), (1, 9, 20)),  # stored (col, row)
    ("mixtral", (0, 3, 7, 2), (1, 9, 5, 1)),  # a tensor for each expert, which a loaded model stacks
    ("gpt_oss", (0, 3, 7, 2), (1, 9, 5, 1)),  # stored (expert, col, row)
]


@pytest.mark.parametrize(("name", "critical", "inert"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_each_effect_is_that_of_a_model_without_the_scalar(
    tmp_path: Path, name: str, critical: Short, inert: Short
) -> None:
    bench = Bench(tmp_path / name, name, {critical: HUGE})
    found = bench.confirm([critical, inert], nulls=4)
    ratios = {short: bench.ratio([short]) for short in (critical, inert)}
    assert ratios[critical] > 1.15, "the scalar was made critical"
    for short, other in ((critical, inert), (inert, critical)):
        one = trial(found, bench, short)
        assert one.alone.ratio == pytest.approx(ratios[short], rel=1e-4)
        assert one.without.ratio == pytest.approx(ratios[other], rel=1e-4)
        assert one.listed
    assert found.together.ratio == pytest.approx(bench.ratio([critical, inert]), rel=1e-4)
    assert verdicts(found) == ["needed alone", "inert"]
    assert found.joint_sets == ()
    base = bench.log_probabilities([])
    without = bench.log_probabilities([critical])
    kl = (np.exp(base) * (base - without)).sum(-1).mean()
    assert trial(found, bench, critical).alone.kl == pytest.approx(kl, rel=1e-3)
    targets = np.array(bench.windows)[:, 1:, None]
    assert found.base_perplexity == pytest.approx(np.exp(-np.take_along_axis(base, targets, 2).mean()), rel=1e-4)
    assert (found.windows, found.window_tokens) == (WINDOWS, LENGTH)
    assert (found.dtype, found.device) == ("float32", "cpu")


def test_the_interval_is_that_of_the_means_of_whole_windows(tmp_path: Path) -> None:
    critical = (0, 3, 7)
    bench = Bench(tmp_path / "llama", "llama", {critical: HUGE})
    effect = bench.confirm([critical], nulls=0).trials[0].alone
    means = bench.extra_loss([critical]).mean(1)
    # Student's t with 11 degrees of freedom, and a design effect of 3 for neighbouring windows
    reach = 2.200985 * means.std(ddof=1) * math.sqrt(3 / WINDOWS)
    assert math.log(effect.low) == pytest.approx(means.mean() - reach, abs=1e-4)
    assert math.log(effect.high) == pytest.approx(means.mean() + reach, abs=1e-4)


def test_a_dose_is_what_a_sweep_of_the_candidates_measures(tmp_path: Path) -> None:
    shorts = [(0, 3, 7), (1, 9, 20)]
    bench = Bench(tmp_path / "llama", "llama", {(0, 3, 7): HUGE})
    found = bench.confirm(shorts, nulls=2)
    assert [dose.factor for dose in found.doses] == [0, 0.25, 0.5, 0.75, 1]
    assert found.doses[0].effect == found.together
    assert found.doses[-1].effect == Effect(1.0, 1.0, 1.0, 0.0)
    swept = sweep_windows(bench.model(), [bench.coordinate(s) for s in shorts], [0, 0.25, 0.5, 0.75, 1], bench.windows)
    for dose, point in zip(found.doses, swept.points, strict=True):
        assert dose.effect.ratio == pytest.approx(point.ratio, rel=1e-5)
        assert dose.effect.kl == pytest.approx(point.kl, rel=1e-4, abs=1e-6)
        assert dose.effect.low <= dose.effect.ratio <= dose.effect.high
    assert found.to_json()["doses"][1] == {"factor": 0.25, **found.doses[1].effect.to_json()}
    assert (
        confirm_scalars(bench.model(), [bench.candidate((0, 3, 7))], bench.windows[:7], CausalOptions(nulls=0)).doses
        == ()
    )


@pytest.mark.parametrize(("windows", "enough"), [(7, False), (8, True)])
def test_a_text_of_fewer_than_eight_windows_gives_no_interval_and_no_verdict(
    tmp_path: Path, windows: int, enough: bool
) -> None:
    bench, said = Bench(tmp_path / "llama", "llama", {(0, 3, 7): HUGE}), []
    bench.windows = bench.windows[:windows]
    found = bench.confirm([(0, 3, 7), (1, 9, 20)], say=said.append)
    ratios = [t.alone.ratio for t in found.trials]
    assert ratios == [pytest.approx(bench.ratio([short]), rel=1e-4) for short in ((0, 3, 7), (1, 9, 20))]
    assert (found.windows, found.scored_tokens) == (windows, windows * (LENGTH - 1))
    if enough:
        assert verdicts(found) == ["needed alone", "inert"] and said == []
        assert found.together.low < found.together.ratio < found.together.high
    else:
        assert verdicts(found) == ["untested", "untested"] and found.joint_sets == ()
        assert {(t.alone.low, t.alone.high) for t in found.trials} == {(None, None)}
        assert said == [
            "too little text for intervals and verdicts: 7 windows (a verdict needs 8: give a longer --text, more "
            "--windows or a shorter --window)"
        ]


def test_two_copies_are_critical_only_jointly(tmp_path: Path) -> None:
    first, second, other = (0, 3, 7), (0, 3, 12), (1, 9, 20)
    bench = Bench(tmp_path / "llama", "llama", {first: HUGE, second: HUGE}, copies={12: 7})
    found = bench.confirm([first, second, other])
    assert bench.ratio([first]) < 1.05 and bench.ratio([second]) < 1.05 < 1.3 < bench.ratio([first, second])
    assert verdicts(found) == ["needed jointly", "needed jointly", "inert"]
    (joint,) = found.joint_sets
    assert joint.coordinates == (bench.coordinate(first), bench.coordinate(second))
    assert joint.effect.ratio == pytest.approx(bench.ratio([first, second]), rel=1e-4)
    assert trial(found, bench, other).without.ratio == pytest.approx(bench.ratio([first, second]), rel=1e-4)


def test_three_copies_among_five_are_found_though_no_pair_of_them_does_anything(tmp_path: Path) -> None:
    copies, others = [(0, 3, 7), (0, 3, 12), (0, 3, 15)], [(1, 9, 20), (1, 4, 2)]
    bench = Bench(tmp_path / "llama", "llama", dict.fromkeys(copies, HUGE), copies={12: 7, 15: 7})
    found = bench.confirm([copies[0], others[0], *copies[1:], others[1]])
    assert bench.ratio(copies[:2]) < 1.05 < 1.3 < bench.ratio(copies)
    (joint,) = found.joint_sets
    assert set(joint.coordinates) == {bench.coordinate(short) for short in copies}
    assert joint.effect.ratio == pytest.approx(bench.ratio(copies), rel=1e-4)
    for short in (*copies, *others):
        assert trial(found, bench, short).verdict == ("needed jointly" if short in copies else "inert")


def test_a_scalar_that_is_zero_already_has_no_effect_to_the_last_digit(tmp_path: Path) -> None:
    critical, nothing = (0, 3, 7), (0, 5, 11)
    bench = Bench(tmp_path / "llama", "llama", {critical: HUGE, nothing: 0.0})
    found = bench.confirm([critical, nothing])
    assert trial(found, bench, nothing).alone == Effect(1.0, 1.0, 1.0, 0.0)
    assert trial(found, bench, nothing).verdict == "inert"
    assert trial(found, bench, nothing).without == trial(found, bench, critical).alone == found.together
    assert trial(found, bench, critical).without == Effect(1.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_what_is_reported_does_not_depend_on_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: load.Placement
) -> None:
    """Groups of which no KL is reported may be estimated. One candidate is zero, so some groups are equal."""
    shorts = [(0, 3, 7), (1, 9, 20), (0, 5, 11), (1, 2, 3)]
    bench = Bench(tmp_path / "llama", "llama", {(0, 3, 7): HUGE, (0, 5, 11): 0.0})
    exact, estimated = bench.confirm(shorts), []
    monkeypatch.setattr(figures, "LEAST_VOCABULARY", 1)
    read = figures.WindowFigures.read

    def note(self: figures.WindowFigures, logits: Logits) -> None:
        read(self, logits)
        estimated.append(len(self.estimated))

    monkeypatch.setattr(figures.WindowFigures, "read", note)
    model = load.open_model(bench.checkpoint, device="cpu", placement=placement)
    found = confirm_scalars(model, [bench.candidate(s) for s in shorts], bench.windows)
    assert sum(estimated) > WINDOWS
    assert found.trials == exact.trials
    assert (found.joint_sets, found.together, found.doses) == (exact.joint_sets, exact.together, exact.doses)
    assert found.null == pytest.approx(exact.null, rel=1e-7)


def test_a_joint_set_that_was_estimated_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (0, 3, 7), (0, 3, 12)
    bench = Bench(tmp_path / "llama", "llama", {first: HUGE, second: HUGE}, copies={12: 7})
    (joint,) = bench.confirm([first, second, (1, 9, 20)]).joint_sets
    monkeypatch.setattr(figures, "LEAST_VOCABULARY", 1)
    monkeypatch.setattr(suspects, "COMPARED_ERROR", 1.0)
    (found,) = bench.confirm([first, second, (1, 9, 20)]).joint_sets
    assert found == joint


def test_a_single_candidate_has_no_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "llama", "llama", {(0, 3, 7): HUGE})
    found = bench.confirm([(0, 3, 7), (0, 3, 7)])  # named twice: still one
    (one,) = found.trials
    assert (one.verdict, one.without) == ("needed alone", None)
    assert found.together == one.alone
    assert found.joint_sets == ()
    assert len(found.null) == 16


def test_the_same_inputs_give_the_same_result_and_another_seed_other_samples(tmp_path: Path) -> None:
    shorts = [(0, 3, 7), (1, 9, 20)]
    bench = Bench(tmp_path / "llama", "llama", {(0, 3, 7): HUGE})
    found, again, other = (bench.confirm(shorts, seed=seed) for seed in (0, 0, 1))
    assert found == again
    assert found.null != other.null
    for one, different in zip(found.trials, other.trials, strict=True):
        assert one.alone == different.alone


# Companions and the null ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_outlier_in_the_column_is_tested_though_nobody_listed_it(tmp_path: Path, name: str) -> None:
    critical, companion, small = (0, 3, 7), (0, 8, 7), (0, 10, 7)
    bench = Bench(tmp_path / name, name, {critical: HUGE, companion: -HUGE / 2, small: HUGE / 20})
    found = bench.confirm([critical])
    assert [t.candidate.coordinate for t in found.trials] == [bench.coordinate(s) for s in (critical, companion)]
    one = found.trials[1]
    assert not one.listed and found.trials[0].listed
    assert (one.candidate.layer, one.candidate.row, one.candidate.col) == companion
    assert (one.candidate.value, one.candidate.rank) == (-HUGE / 2, 2)
    assert one.alone.ratio == pytest.approx(bench.ratio([companion]), rel=1e-4)
    assert found.together == found.trials[0].alone == one.without
    assert found.trials[0].without is None
    listed = bench.confirm([critical, companion])
    assert [t.listed for t in listed.trials] == [True, True]
    assert [t.alone for t in listed.trials] == [t.alone for t in found.trials]
    assert listed.together.ratio == pytest.approx(bench.ratio([critical, companion]), rel=1e-4)


def test_a_column_without_outliers_has_no_companions(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "llama", "llama", {})
    assert len(bench.confirm([(0, 3, 7)]).trials) == 1


class Spy:
    """Notes what the model is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.runs: list[list[dict[Coordinate, float]]] = []
        run = LayeredModel.run

        def noted(model: LayeredModel, sequences: Any, variants: Any, **options: Any) -> Iterator[Outcomes]:
            self.runs.append([dict(variant) for variant in variants])
            return run(model, sequences, variants, **options)

        monkeypatch.setattr(LayeredModel, "run", noted)

    def singles(self) -> list[Coordinate]:
        return [next(iter(v)) for variants in self.runs for v in variants if len(v) == 1]


@pytest.mark.parametrize("family", FAMILIES, ids=[f[0] for f in FAMILIES])
def test_the_null_of_the_largest_is_the_next_largest_of_its_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: tuple[str, Short, Short]
) -> None:
    name, critical, _ = family
    bench, spy = Bench(tmp_path / name, name, {critical: HUGE}), Spy(monkeypatch)
    found = bench.confirm([critical])
    null = [c for c in spy.singles() if c != bench.coordinate(critical)]
    assert len(null) == len(found.null) == 16
    layer, _, col, *expert = critical
    cols = 24 if not expert else 12 if name == "qwen3_moe" else 24
    everywhere = [bench.coordinate((layer, row, c, *expert)) for row in range(16) for c in range(cols) if c != col]
    magnitudes = {c: abs(float(bench.tensors[c.tensor][c.index])) for c in everywhere}
    assert set(null) == set(sorted(everywhere, key=magnitudes.__getitem__)[-16:])


def test_the_null_of_a_common_magnitude_is_drawn_from_its_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, spy = Bench(tmp_path / "llama", "llama", {(0, 3, 7): 0.3, (1, 5, 9): -0.3}), Spy(monkeypatch)
    found = bench.confirm([(0, 3, 7), (1, 5, 9)], nulls=7)
    names = {bench.coordinate(s) for s in ((0, 3, 7), (1, 5, 9))}
    null = [c for c in dict.fromkeys(spy.singles()) if c not in names]
    assert len(null) == len(found.null) == 7
    assert sorted(c.tensor for c in null) == [next(c for c in sorted(names)).tensor] * 4 + [max(names).tensor] * 3
    for coordinate in null:
        assert 0.3 / 1.11 < abs(float(bench.tensors[coordinate.tensor][coordinate.index])) < 0.3 * 1.11
        assert coordinate.index[1] != (7 if ".0." in coordinate.tensor else 9)
    spy.runs.clear()
    bench.confirm([(0, 3, 7), (1, 5, 9)], nulls=7, seed=1)
    assert set(spy.singles()) != {*null, *names}
    assert {t.verdict for t in found.trials} == {"inert"}


def test_a_model_too_large_for_one_reading_is_read_in_groups_beside_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorts = [(0, 3, 7), (1, 9, 20), (1, 4, 2)]
    bench, spy = Bench(tmp_path / "llama", "llama", {(0, 3, 7): HUGE}), Spy(monkeypatch)
    found = bench.confirm(shorts)
    assert len(spy.runs) == 1
    asked = spy.runs.pop()
    monkeypatch.setattr(readings, "STATES", 5 * 4 * 16 * WINDOWS * LENGTH)  # five variants of 16 channels in float32
    in_groups = bench.confirm(shorts)
    assert all(variants[0] == {} and 2 <= len(variants) <= 5 for variants in spy.runs)
    assert [v for variants in spy.runs for v in variants if v] == [v for v in asked if v]
    assert verdicts(in_groups) == verdicts(found)
    for one, grouped in zip(found.trials, in_groups.trials, strict=True):
        assert grouped.alone.ratio == pytest.approx(one.alone.ratio, rel=1e-5)


def test_a_streamed_model_gives_the_same_answer(tmp_path: Path) -> None:
    shorts = [(0, 3, 7), (1, 9, 20)]
    bench = Bench(tmp_path / "llama", "llama", {(0, 3, 7): HUGE})
    candidates = [bench.candidate(s) for s in shorts]
    model = load.open_model(bench.checkpoint, device="cpu", placement="streamed")
    streamed = confirm_scalars(model, candidates, bench.windows)
    assert model.method == "streamed"
    for one, other in zip(streamed.trials, bench.confirm(shorts).trials, strict=True):
        assert (one.candidate, one.verdict) == (other.candidate, other.verdict)
        assert one.alone.ratio == pytest.approx(other.alone.ratio, rel=1e-5)


def test_a_text_is_cut_as_for_the_check(tmp_path: Path) -> None:
    base = tiny_checkpoint.write_pair(tmp_path, bos=True).base
    checkpoint, text = open_checkpoint(base), tiny_checkpoint.TEXT
    coordinate = Coordinate(tiny_checkpoint.DOWN, (3, 7))
    value = float(load_file(base / "model.safetensors")[coordinate.tensor][coordinate.index])
    candidate = Candidate(coordinate, 1, 3, 7, None, value, score=1.0, rank=1)
    options = RunOptions("cpu", "auto", text, Protocol(windows=3, window=20))
    with open_bench(checkpoint, options) as opened:
        found = opened.run(confirm_scalars, [candidate], CausalOptions(nulls=2))
    ids = tiny_checkpoint.make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    windows = [[0, *ids[start : start + 20]] for start in (0, 20, 40)]
    model = load.open_model(checkpoint, device="cpu", placement="whole")
    same = confirm_scalars(model, [candidate], windows, CausalOptions(nulls=2))
    digest = hashlib.sha256(text.encode()).hexdigest()
    protocol = Protocol(windows=3, window=20, stride=20, bos="yes")
    assert found == dataclasses.replace(same, window_tokens=20, text_sha256=digest, protocol=protocol)
    assert (found.windows, same.window_tokens) == (3, 21)


# Verdicts, where the losses are given ---------------------------------------------------------------------------------

TOKENS = 129
NAMES = [(0, 3, 7), (0, 5, 9), (1, 2, 4)]


class Told:
    """A model whose losses are said in advance: `extra` gives, for the scalars that are zeroed, what every token costs
    more; up to a little noise, different for every set."""

    def __init__(self, bench: Bench, extra: Any):
        self.checkpoint, self.extra = bench.checkpoint, extra
        self.model, self.dtype, self.device = bench.model().model, torch.float32, torch.device("cpu")
        self.weights = None

    def is_layered(self, ids: Sequence[int]) -> bool:
        return True

    def count_rows(self, tokens: int) -> int:
        return 1

    def run(self, sequences: Any, variants: Any, *, progress: Any = None) -> Iterator[Outcomes]:
        for number, ids in enumerate(sequences):
            logits = []
            for variant in variants:
                chance = torch.rand(len(ids), generator=torch.Generator().manual_seed(len(logits)))
                cost = 1.0 + 0.01 * chance + self.extra(frozenset(variant))  # nats, of two tokens
                other = torch.log(torch.expm1(cost))
                side = torch.full((len(ids), 32), -torch.inf)
                side[:, 0], side[:, 1] = 0.0, other
                logits.append(side.clamp(min=-1e4))
            yield Outcomes(number, make_logits(logits), ((),) * len(variants))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("plain") / "llama", "llama", {})


def told(bench: Bench, extra: Any, shorts: Sequence[Short] = NAMES) -> tuple[Confirmation, list[str]]:
    said: list[str] = []
    found = confirm_scalars(
        Told(bench, extra), [bench.candidate(s) for s in shorts], [[0] * TOKENS] * 8, CausalOptions(say=said.append)
    )
    return found, said


def test_a_loss_that_is_no_number_is_an_infinite_ratio(plain: Bench) -> None:
    first = plain.coordinate(NAMES[0])
    found, _ = told(plain, lambda zeroed: math.nan if first in zeroed else 0.0)
    effect = found.trials[0].alone
    assert (effect.ratio, effect.low, effect.high, effect.kl) == (math.inf,) * 4
    assert verdicts(found) == ["needed alone", "inert", "inert"]
    assert found.joint_sets == ()


def test_what_is_critical_jointly_may_be_beyond_numbers(plain: Bench) -> None:
    both = {plain.coordinate(s) for s in NAMES[:2]}
    found, _ = told(plain, lambda zeroed: math.inf if both <= zeroed else 0.0)
    assert verdicts(found) == ["needed jointly", "needed jointly", "inert"]
    assert [set(joint.coordinates) for joint in found.joint_sets] == [both]
    assert found.joint_sets[0].effect.ratio == math.inf


def test_effects_that_multiply_are_no_joint_set(plain: Bench) -> None:
    cost = dict(zip((plain.coordinate(s) for s in NAMES), (1.0, 0.5, 0.02), strict=True))
    found, said = told(plain, lambda zeroed: sum(cost.get(name, 0.0) for name in zeroed))
    assert verdicts(found) == ["needed alone", "needed alone", "inert"]
    assert found.joint_sets == ()
    assert found.together.ratio == pytest.approx(math.exp(1.52), rel=0.01)
    assert said == []


def test_two_joint_pairs_are_two_sets_and_not_a_third_of_four(plain: Bench) -> None:
    shorts = [(0, 3, 7), (0, 5, 9), (1, 2, 4), (1, 6, 8)]
    names = [plain.coordinate(s) for s in shorts]
    found, _ = told(plain, lambda z: 1.0 * ({*names[:2]} <= z) + 2.0 * ({*names[2:]} <= z), shorts)
    assert [joint.coordinates for joint in found.joint_sets] == [tuple(names[2:]), tuple(names[:2])]
    assert verdicts(found) == ["needed jointly"] * 4


def test_what_random_scalars_do_too_is_inert(plain: Bench) -> None:
    names = {plain.coordinate(s) for s in NAMES}
    first = plain.coordinate(NAMES[0])
    found, said = told(plain, lambda z: 1.0 * (first in z) + 0.3 * (len(z) == 1 and not z & names))
    assert verdicts(found) == ["needed alone", "inert", "inert"]
    assert max(found.null) == pytest.approx(math.exp(0.3), rel=0.02)
    found, said = told(plain, lambda z: 0.3 * (first in z) + 1.0 * (len(z) == 1 and not z & names))
    assert verdicts(found) == ["inert"] * 3
    (line,) = said
    assert line.startswith("random scalars of similar magnitude change perplexity too: only ratios above 2.7")
    found, said = told(plain, lambda z: math.nan if len(z) == 1 and not z & names else 1.0 * (first in z))
    assert verdicts(found) == ["inert"] * 3


def test_a_super_weight_among_the_null_is_named_and_hides_nothing(plain: Bench) -> None:
    names, unlisted = [plain.coordinate(s) for s in NAMES], []

    def extra(zeroed: frozenset[Coordinate]) -> float:
        unlisted.extend(name for name in zeroed if name not in names and not unlisted)
        return 0.5 * (names[0] in zeroed) + 2.0 * bool(zeroed & {*unlisted})

    found, said = told(plain, extra)
    assert verdicts(found) == ["needed alone", "inert", "inert"]
    (line,) = said
    assert line.startswith(f"needed alone, but not a candidate: {unlisted[0]} ") and "x7.3" in line
    assert max(found.null) == pytest.approx(math.exp(2.0), rel=0.02)


def test_in_a_broken_model_any_change_counts_little(plain: Bench) -> None:
    """Without the first scalar whatever else is taken out changes the loss: it is no sign of anything."""
    first = plain.coordinate(NAMES[0])
    found, said = told(plain, lambda z: (first in z) * (3.0 + 0.2 * (len(z) - 1)))
    assert verdicts(found) == ["needed alone", "inert", "inert"]
    assert found.joint_sets == ()
    (line,) = said
    assert line.startswith(
        "random scalars have larger effects once the candidates are zeroed: only joint effects above x1.2"
    )


COMPANION = (0, 8, 7)
ROWS = [(0, 10, 7), (0, 11, 7), (0, 12, 7)]
"""Other large rows of the first candidate's column."""


@pytest.fixture(scope="module")
def column(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    planted = {NAMES[0]: HUGE, COMPANION: HUGE / 2} | dict.fromkeys(ROWS, HUGE / 20)
    return Bench(tmp_path_factory.mktemp("column") / "llama", "llama", planted)


def test_what_a_companion_joins_is_found(column: Bench) -> None:
    """As in Llama-2-7B: the listed scalar does nothing alone, nor does its companion; both do."""
    names = (column.coordinate(NAMES[0]), column.coordinate(COMPANION))
    found, said = told(column, lambda z: 1.0 * ({*names} <= z))
    assert [t.listed for t in found.trials] == [True, True, True, False]
    assert verdicts(found) == ["needed jointly", "inert", "inert", "needed jointly"]
    assert [joint.coordinates for joint in found.joint_sets] == [names]
    assert found.together.ratio == pytest.approx(1.0, abs=0.02)
    (null,) = found.column_nulls
    assert (null.layer, null.expert, null.col, len(null.alone)) == (0, None, 7, 3)
    assert null.added == pytest.approx([1.0] * 3, abs=0.02)
    assert said == []


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["they harm", "they help"])
def test_a_companion_that_does_no_more_than_other_rows_of_its_column_is_inert(column: Bench, sign: float) -> None:
    """In a spiking column any large row changes the loss, up or down, once the candidate is gone."""
    lead, companion = column.coordinate(NAMES[0]), column.coordinate(COMPANION)
    rows = {column.coordinate(row) for row in ROWS}

    def extra(zeroed: frozenset[Coordinate]) -> float:
        return (lead in zeroed) * (3.0 + 0.25 * (companion in zeroed) + sign * 0.15 * len(zeroed & rows))

    found, _ = told(column, extra)
    assert verdicts(found)[3] == "needed jointly", "0.25 nats are more than 0.15"
    found, _ = told(column, lambda z: extra(z) + (lead in z) * sign * 0.4 * len(z & rows))
    assert verdicts(found) == ["needed alone", "inert", "inert", "inert"]
    assert found.joint_sets == ()
    assert found.column_nulls[0].added == pytest.approx([math.exp(sign * 0.55)] * 3, rel=0.03)


def test_a_companion_that_does_no_more_alone_than_other_rows_of_its_column_is_inert(column: Bench) -> None:
    companion, rows = column.coordinate(COMPANION), {column.coordinate(row) for row in ROWS}
    found, _ = told(column, lambda z: 0.3 * (companion in z) - 0.2 * len(z & rows))
    assert verdicts(found)[3] == "needed alone"
    found, _ = told(column, lambda z: 0.3 * (companion in z) - 0.5 * len(z & rows))
    assert verdicts(found)[3] == "inert"


def test_a_companion_that_helps_is_said_and_not_critical(column: Bench) -> None:
    lead, companion = column.coordinate(NAMES[0]), column.coordinate(COMPANION)
    found, said = told(column, lambda z: (lead in z) * (3.0 - 1.0 * (companion in z)))
    assert verdicts(found) == ["needed alone", "inert", "inert", "inert"]
    (line,) = said
    assert line == f"companion that helps: {companion} (zeroed on top of all candidates, perplexity is x0.368)"


def test_a_companion_in_a_column_with_two_other_large_rows_is_untested(tmp_path: Path) -> None:
    planted = {NAMES[0]: HUGE, COMPANION: HUGE / 2} | dict.fromkeys(ROWS[:2], HUGE / 20)
    bench = Bench(tmp_path / "llama", "llama", planted)
    names = (bench.coordinate(NAMES[0]), bench.coordinate(COMPANION))
    found, said = told(bench, lambda z: 1.0 * ({*names} <= z) + 0.3 * (names[1] in z))
    assert verdicts(found) == ["inert", "inert", "inert", "untested"]
    assert found.joint_sets == ()
    (line,) = said
    assert line == (
        f"untested companion: {names[1]} (other large rows in its column: 2, at least 3 are needed for comparison; "
        f"perplexity is x3.67 without it and {names[0]})"
    )


def test_a_second_candidate_of_a_column_is_compared_with_its_other_rows_too(column: Bench) -> None:
    """A detector that lists two rows of one column makes no companion of the second, but its input spikes as well."""
    lead, second = column.coordinate(NAMES[0]), column.coordinate(COMPANION)
    rows = {column.coordinate(row) for row in ROWS}

    def extra(zeroed: frozenset[Coordinate]) -> float:
        return (lead in zeroed) * (3.0 + 0.25 * (second in zeroed) + 0.5 * len(zeroed & rows))

    found, _ = told(column, extra, [NAMES[0], COMPANION])
    assert [t.listed for t in found.trials[:2]] == [True, True]
    assert verdicts(found)[:2] == ["needed alone", "inert"]


def test_of_a_planted_column_the_companion_that_matters_is_critical(tmp_path: Path) -> None:
    """Both large scalars fill the norm; three more of the column are outliers, and do nothing beside them."""
    lead, companion, rows = (0, 3, 7), (0, 8, 7), [(0, 10, 7), (0, 11, 7), (0, 12, 7)]
    bench = Bench(tmp_path / "llama", "llama", {lead: HUGE, companion: HUGE} | dict.fromkeys(rows, HUGE / 200))
    assert bench.ratio([lead, companion]) > 1.3 * max(bench.ratio([lead]), bench.ratio([companion]))
    found = bench.confirm([lead])
    one = trial(found, bench, companion)
    assert not one.listed and one.verdict.startswith("needed")
    assert {bench.coordinate(lead), bench.coordinate(companion)} in [set(j.coordinates) for j in found.joint_sets]
    (null,) = found.column_nulls
    assert null.alone == pytest.approx([bench.ratio([row]) for row in rows], rel=1e-4)
    added = [bench.ratio([lead, row]) / bench.ratio([lead]) for row in rows]
    assert null.added == pytest.approx(added, rel=1e-4)


def test_of_a_planted_column_of_equals_no_companion_is_critical(tmp_path: Path) -> None:
    """Once the candidate is gone, each of five rows takes its share of the norm: two of them are no finding."""
    lead, rows = (0, 3, 7), [(0, row, 7) for row in (8, 10, 11, 12, 14)]
    bench = Bench(tmp_path / "llama", "llama", {lead: HUGE} | dict.fromkeys(rows, HUGE / 5))
    found = bench.confirm([lead])
    assert len(found.trials) == 3 and len(found.column_nulls[0].alone) == 3
    for row in rows[:2]:
        assert trial(found, bench, row).verdict == "inert"


# Refusals ------------------------------------------------------------------------------------------------------------


def refusal(
    model: Any, candidates: Sequence[Candidate], windows: Sequence[Sequence[int]], kind: type = ModelError
) -> str:
    with pytest.raises(kind) as caught:
        confirm_scalars(model, candidates, windows)
    (line,) = caught.value.faults
    return line


def test_what_cannot_be_tested_is_refused(plain: Bench) -> None:
    model, good = plain.model(), plain.candidate((0, 3, 7))
    text = [[1, 2, 3]]
    assert refusal(model, [], text) == "nothing to confirm: the list of candidates is empty"
    assert "at least one" in refusal(model, [good], [])
    assert "at least two tokens" in refusal(model, [good], [[1, 2], [3]])
    tensor = good.coordinate.tensor
    for wrong in (
        dataclasses.replace(good, coordinate=Coordinate(tensor, (7, 3))),
        dataclasses.replace(good, coordinate=Coordinate("model.norm.weight", (3,))),
        dataclasses.replace(good, row=16, coordinate=Coordinate(tensor, (16, 7))),
        dataclasses.replace(good, row=-1, coordinate=Coordinate(tensor, (-1, 7))),
    ):
        assert refusal(model, [good, wrong], text) == f"this is not a scalar of a down projection: {wrong.coordinate}"
    beyond = dataclasses.replace(good, layer=9)
    assert "beyond the model" in refusal(model, [beyond], text, ArchitectureError)


def test_a_matrix_of_integers_is_refused(plain: Bench, tmp_path: Path) -> None:
    good = plain.candidate((0, 3, 7))
    shutil.copytree(plain.folder, tmp_path / "integers")
    tensors = plain.tensors | {good.coordinate.tensor: plain.tensors[good.coordinate.tensor].to(torch.int8)}
    save_file(tensors, tmp_path / "integers" / "model.safetensors", {"format": "pt"})
    model = SimpleNamespace(checkpoint=open_checkpoint(tmp_path / "integers"))
    assert refusal(model, [good], [[1, 2]]) == f"I8 elements are not weights: {good.coordinate.tensor}"


def test_a_model_without_finite_losses_is_refused(plain: Bench) -> None:
    model = Told(plain, lambda zeroed: math.nan)
    assert "not finite" in refusal(model, [plain.candidate((0, 3, 7))], [[0] * 9])
