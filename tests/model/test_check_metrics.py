"""The figures of the check: held against transformers' own loss and against plain numpy, on two loaded models."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint
import tiny_models
import torch
import transformers
from tiny_checkpoint import TEXT, Pair, write_pair

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import show
from swsurgery.errors import ModelError
from swsurgery.model import figures, load, measure, tokens
from swsurgery.model.check import PROMPTS, run_checks
from swsurgery.model.cutting import cut_windows
from swsurgery.model.forward import LayeredModel
from swsurgery.model.outcomes import Outcomes, make_logits
from swsurgery.model.protocol import Protocol
from swsurgery.model.report import CheckReport
from swsurgery.model.stopwords import STOP_WORDS
from swsurgery.model.text import read_built_in_text

WINDOW = 24
BEGINNINGS = ("The river was", "In practice it went")


def check(pair: Pair, **options: Any) -> CheckReport:
    lengths = {"window": WINDOW} | {name: options.pop(name) for name in ("windows", "window") if name in options}
    settings = {"text": TEXT, "prompts": BEGINNINGS, "protocol": Protocol(**lengths), "device": "cpu"} | options
    return run_checks(open_checkpoint(pair.patched), pair.changes, **settings)


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    edits = [((3, 7), 5.0), ((9, 2), -4.0)]
    return write_pair(tmp_path_factory.mktemp("pair"), edits, bos=request.param)


@pytest.fixture(scope="module")
def report(pair: Pair) -> CheckReport:
    return check(pair)


def windows_of(pair: Pair, text: str = TEXT) -> list[list[int]]:
    """The windows as the docstring of run_checks words it, from the tokenizer's own file."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.base)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = [0] if tokenizer("x")["input_ids"][0] == 0 else []
    return [bos + ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def log_probabilities(folder: Path, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Per window (tokens, vocabulary), in float64 by the textbook formula."""
    model = tiny_checkpoint.load(folder)
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids])).logits[0].double().numpy() for ids in windows]
    return [x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in logits]


def test_windows_and_scored_tokens_are_counted(pair: Pair, report: CheckReport) -> None:
    windows = windows_of(pair)
    assert len(windows) > 3
    assert (report.windows, report.window_tokens) == (len(windows), WINDOW)
    assert report.scored_tokens == sum(len(ids) - 1 for ids in windows)


def test_a_text_shorter_than_a_window_is_counted_by_its_own_tokens(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.base)
    text = " ".join(TEXT.split()[:9])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = len(windows_of(pair)[0]) - WINDOW
    short = check(pair, text=text, window=WINDOW)
    assert 1 < len(ids) < WINDOW
    assert (short.windows, short.window_tokens, short.scored_tokens) == (1, len(ids), len(ids) + bos - 1)
    show.show_check(short.to_json())
    assert f"measured on {len(ids) + bos - 1} tokens in 1 window, float32" in capsys.readouterr().out


def test_tokens_are_shown_as_python_text(report: CheckReport, capsys: pytest.CaptureFixture[str]) -> None:
    document = report.to_json()
    document["prompts"] = [{"prompt": "a\nb", "base": [["\n", 0.5], ["\u202e", 0.1]], "patched": [["\\", 0.5]]}]
    show.show_check(document)
    out = capsys.readouterr().out
    assert "'a\\nb'" in out and "'\\n' 0.500, '\\u202e' 0.100" in out and "'\\\\' 0.500" in out


def test_perplexity_is_that_of_the_loss_of_transformers(pair: Pair, report: CheckReport) -> None:
    perplexities = []
    for folder, side in ((pair.base, report.base), (pair.patched, report.patched)):
        model, total, count = tiny_checkpoint.load(folder), 0.0, 0
        for ids in windows_of(pair):
            tokens = torch.tensor([ids])
            with torch.no_grad():
                total += float(model(input_ids=tokens, labels=tokens).loss) * (len(ids) - 1)
            count += len(ids) - 1
        perplexities.append(np.exp(total / count))
        assert side.perplexity == pytest.approx(perplexities[-1], rel=1e-5)
    assert report.perplexity_ratio == pytest.approx(perplexities[1] / perplexities[0], rel=1e-5)
    assert abs(report.perplexity_ratio - 1) > 0.01


def test_kl_is_that_of_base_to_patched(pair: Pair, report: CheckReport) -> None:
    windows = windows_of(pair)
    terms = [
        (np.exp(base[:-1]) * (base[:-1] - patched[:-1])).sum(axis=1)
        for base, patched in zip(
            log_probabilities(pair.base, windows), log_probabilities(pair.patched, windows), strict=True
        )
    ]
    assert report.kl == pytest.approx(np.concatenate(terms).mean(), rel=1e-5)
    assert report.kl > 0.01


def test_stop_word_mass_is_the_mean_probability_of_their_tokens(pair: Pair, report: CheckReport) -> None:
    vocabulary = json.loads((pair.base / "tokenizer.json").read_text())["model"]["vocab"]
    stop = [i for token, i in vocabulary.items() if token.removeprefix("\u0120").lower() in STOP_WORDS]
    for folder, side in ((pair.base, report.base), (pair.patched, report.patched)):
        masses = [np.exp(x[:-1])[:, stop].sum(axis=1) for x in log_probabilities(folder, windows_of(pair))]
        assert side.stopword_mass == pytest.approx(np.concatenate(masses).mean(), rel=1e-5)
        assert 0.001 < side.stopword_mass < 0.999


def test_stop_word_tokens_are_whole_words_in_any_case() -> None:
    tokenizer = tiny_checkpoint.make_tokenizer()
    words = ["The", " the", "THE", "  the", "theory", "th", "the ", "river", " Wherever", " Whichever"]
    tokenizer.add_tokens(words)
    ids = tokenizer.convert_tokens_to_ids(words)
    found = tokens.stop_word_tokens(tokenizer, len(tokenizer))
    assert [word for word, i in zip(words, ids, strict=True) if i in found] == ["The", " the", "THE", " Whichever"]
    assert ids[-1] == found[-1]
    assert tokens.stop_word_tokens(tokenizer, ids[-1]) == found[:-1]  # logits that end before this token


def test_next_tokens_are_the_five_likeliest(pair: Pair, report: CheckReport) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.base)
    bos = windows_of(pair)[0][:1] if windows_of(pair)[0][0] == 0 else []
    prompts = [bos + tokenizer(text, add_special_tokens=False)["input_ids"] for text in BEGINNINGS]
    assert [continuation.prompt for continuation in report.prompts] == list(BEGINNINGS)
    for folder, side in ((pair.base, "base"), (pair.patched, "patched")):
        for logs, continuation in zip(log_probabilities(folder, prompts), report.prompts, strict=True):
            best = np.argsort(-logs[-1])[:5]
            shown = getattr(continuation, side)
            assert [token for token, _ in shown] == [tokenizer.decode([i]) for i in best]
            assert [p for _, p in shown] == pytest.approx(np.exp(logs[-1][best]), rel=1e-4)


def test_equal_probabilities_come_in_the_order_of_ids() -> None:
    tokenizer = tiny_checkpoint.make_tokenizer()
    logits = torch.zeros(1, 300)
    logits[0, 200] = 1.0
    shown = measure.list_top_tokens(tokenizer, logits)
    assert [token for token, _ in shown] == [tokenizer.decode([i]) for i in (200, 0, 1, 2, 3)]


def test_super_activation_is_the_largest_hidden_state_of_all_windows(pair: Pair, report: CheckReport) -> None:
    for folder, side in ((pair.base, report.base), (pair.patched, report.patched)):
        model, states = tiny_checkpoint.load(folder), []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, arguments, output, states=states: states.append(output[0]))
        for ids in windows_of(pair):
            with torch.no_grad():
                model(input_ids=torch.tensor([ids]))
        table = torch.stack(states).reshape(-1, 2, *states[0].shape)  # window, layer, token, channel
        window, layer, token, channel = np.unravel_index(int(table.abs().argmax()), table.shape)
        peak = side.super_activation
        assert (peak.window, peak.layer, peak.token, peak.channel) == (window, layer, token, channel)
        assert peak.value == pytest.approx(float(table[window, layer, token, channel]), rel=1e-5)
        flat = table.transpose(0, 1).flatten(1)  # layer, window and token and channel
        largest = flat.gather(1, flat.abs().argmax(1, keepdim=True))[:, 0]
        assert side.largest_by_layer == pytest.approx(largest.tolist(), rel=1e-5)


def test_the_ratio_has_an_interval_from_the_means_of_windows(pair: Pair) -> None:
    report = check(pair, text=TEXT * 9, prompts=(), windows=9)
    losses = []
    for folder in (pair.base, pair.patched):
        windows = windows_of(pair, TEXT * 9)[:9]
        logs = log_probabilities(folder, windows)
        losses.append([-x[range(len(x) - 1), ids[1:]].mean() for x, ids in zip(logs, windows, strict=True)])
    rises = np.subtract(losses[1], losses[0])
    reach = 2.306004 * rises.std(ddof=1) * math.sqrt(3 / 9)  # Student's t with 8 degrees of freedom, design effect 3
    assert math.log(report.ratio_low) == pytest.approx(rises.mean() - reach, abs=1e-5)
    assert math.log(report.ratio_high) == pytest.approx(rises.mean() + reach, abs=1e-5)
    assert report.to_json()["ratio_low"] == float(f"{report.ratio_low:.6g}")


def test_without_changes_base_and_patched_are_one(pair: Pair) -> None:
    protocol = Protocol(window=WINDOW)
    report = run_checks(open_checkpoint(pair.base), (), text=TEXT, prompts=BEGINNINGS, protocol=protocol, device="cpu")
    assert report.base == report.patched
    assert (report.perplexity_ratio, report.kl) == (1.0, 0.0)
    assert report.base.perplexity == pytest.approx(check(pair).base.perplexity, rel=1e-5)


@pytest.mark.parametrize(("base", "read", "slice_"), [(1, 1, 1), (7, 7, 3), (7, 20, 2), (1000, 1000, 1000)])
def test_sizes_of_blocks_do_not_show_in_the_figures(
    pair: Pair, report: CheckReport, monkeypatch: pytest.MonkeyPatch, base: int, read: int, slice_: int
) -> None:
    limits = figures.LogitLimits(*(size * tiny_checkpoint.VOCABULARY for size in (base, read, slice_)))
    monkeypatch.setattr(figures, "LIMITS", {"cpu": limits})
    divided = check(pair)
    assert divided.to_json() == report.to_json()
    # A product of few rows may be summed in another order.
    assert divided.base.perplexity == pytest.approx(report.base.perplexity, rel=1e-7)
    assert divided.kl == pytest.approx(report.kl, rel=1e-6)


def test_a_second_run_reports_the_same(pair: Pair, report: CheckReport) -> None:
    assert check(pair).to_json() == report.to_json()


def test_the_report_says_by_which_means(report: CheckReport) -> None:
    assert (report.device, report.dtype, report.method) == ("cpu", "float32", "layer by layer")
    assert (report.torch, report.transformers) == (torch.__version__, transformers.__version__)


def test_a_perplexity_too_large_for_a_float_is_infinite_and_the_ratio_is_not() -> None:
    totals = measure.Totals([])
    for heights in ((1500.0, 1501.0), (1500.0, 1500.0)):  # the wrong token is surer by so many nats
        logits = tuple(torch.tensor([[0.0, height], [0.0, 0.0]]) for height in heights)
        totals.add_window([0, 0], Outcomes(0, make_logits(logits), ((), ())))
    assert [totals.summarise_side(number).perplexity for number in (0, 1)] == [math.inf, math.inf]
    assert totals.compute_perplexity_ratio() == pytest.approx(math.exp(0.5))


# Windows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "windows", "window", "expected"),
    [
        (10, 16, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # the rest is left out
        (8, 16, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (10, 1, 4, [[0, 1, 2, 3]]),
        (3, 16, 4, [[0, 1, 2]]),  # less than one window
        (2, 16, 4, [[0, 1]]),
    ],
)
def test_windows_do_not_overlap(count: int, windows: int, window: int, expected: list[list[int]]) -> None:
    protocol = Protocol(windows=windows, window=window)
    assert [list(found) for found in cut_windows(range(count), [], protocol)] == expected
    assert [list(found) for found in cut_windows(range(count), [99], protocol)] == [[99, *ids] for ids in expected]


@pytest.mark.parametrize(("count", "windows", "window"), [(0, 16, 4), (1, 16, 4), (9, 0, 4), (9, 16, 1), (9, 16, 0)])
def test_no_window_is_refused(count: int, windows: int, window: int) -> None:
    with pytest.raises(ModelError, match=r"^(the text is too short|the windows are too few or too short): \d"):
        cut_windows(range(count), [], Protocol(windows=windows, window=window))


def test_a_window_is_no_longer_than_the_context(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, bos=True, positions=16)
    assert check(pair, window=512).window_tokens == 15


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt"])
def test_the_context_length_is_found_under_the_name_that_the_family_uses(family: str) -> None:
    assert load.get_context_length(tiny_models.build(family)) == 32


def test_bos_is_put_in_front_only_where_the_tokenizer_does() -> None:
    assert tokens.get_bos_prefix(tiny_checkpoint.make_tokenizer(bos=True)) == [0]
    assert tokens.get_bos_prefix(tiny_checkpoint.make_tokenizer(bos=False)) == []


# Text ----------------------------------------------------------------------------------------------------------------


def test_the_built_in_text_is_plain_and_long_enough() -> None:
    text = read_built_in_text()
    assert text.isascii()
    # A tokenizer with a token for every word and mark would still fill 16 windows of 512 tokens.
    assert len(re.findall(r"\w+|[^\w\s]", text)) >= 16 * 512
    assert {"Summer is hot. Winter is", "The capital of France is"} <= set(PROMPTS)


def test_the_built_in_text_is_what_is_read_by_default(pair: Pair) -> None:
    default, given = check(pair, text=None, prompts=None, windows=2), check(pair, text=read_built_in_text(), windows=2)
    assert default.text_sha256 == given.text_sha256 != check(pair).text_sha256
    assert default.base == given.base
    assert tuple(continuation.prompt for continuation in default.prompts) == PROMPTS


# Manners -------------------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, total: int, unit: str, label: str) -> None:
        self.calls.append(("start", total, unit, label))

    def advance(self, n: int) -> None:
        self.calls.append(("advance", n))

    def relabel(self, label: str) -> None:
        self.calls.append(("relabel", label))

    def close(self) -> None:
        self.calls.append(("close",))


LOADING = [("start", 0, "", "loading torch and the model")]


def test_progress_counts_layers_and_sequences(pair: Pair) -> None:
    progress = Recorder()
    report = check(pair, progress=progress)
    sequences = report.windows + len(BEGINNINGS)
    labels = [f"layer {n}/2" for n in (1, 2)] + [f"sequence {n}/{sequences}" for n in range(1, sequences + 1)]
    assert progress.calls == [
        *LOADING,
        ("start", 2 + sequences, "step", "2 layers"),
        *(call for label in labels for call in (("relabel", label), ("advance", 1))),
        ("close",),
    ]


def test_progress_of_a_streamed_model_counts_bytes_and_layers(pair: Pair) -> None:
    progress = Recorder()
    check(pair, progress=progress, placement="streamed")
    (_, total, unit, _), *_ = progress.calls[len(LOADING) :]
    assert unit == "B" and total == sum(call[1] for call in progress.calls if call[0] == "advance")
    assert [call[1] for call in progress.calls if call[0] == "relabel"][:3] == [
        "layer 1/2",
        "layer 2/2",
        "sequence 1/8",
    ]


def test_progress_of_whole_passes_counts_sequences(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayeredModel, "is_layered", lambda self, ids: False)
    progress = Recorder()
    report = check(pair, progress=progress)
    sequences = report.windows + len(BEGINNINGS)
    assert progress.calls[:4] == [
        *LOADING, ("start", sequences, "step", "2 layers"), ("relabel", f"sequence 1/{sequences}"), ("advance", 1),
    ]  # fmt: skip
    assert progress.calls.count(("advance", 1)) == sequences


def test_progress_is_closed_and_the_error_is_one_line_when_a_pass_fails(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no kernel for this\nand a second line")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", fail)
    progress = Recorder()
    with pytest.raises(ModelError, match="^the model cannot be run: no kernel for this: cpu$"):
        check(pair, progress=progress)
    assert [call[0] for call in progress.calls] == ["start", "start", "relabel", "close"]


def test_nothing_is_printed_and_the_settings_come_back(pair: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    logger = transformers.utils.logging
    before = logger.get_verbosity(), logger.is_progress_bar_enabled()
    logger.set_verbosity(logging.INFO)
    logger.enable_progress_bar()
    try:
        capfd.readouterr()
        check(pair)
        assert capfd.readouterr() == ("", "")
        assert (logger.get_verbosity(), logger.is_progress_bar_enabled()) == (logging.INFO, True)
        with load.hide_output():
            assert not logger.is_progress_bar_enabled()
    finally:
        logger.set_verbosity(before[0])
        if not before[1]:
            logger.disable_progress_bar()


@pytest.mark.parametrize("value", [True, False])
def test_no_warning_of_a_variable_about_progress_bars_is_shown(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    """HF_HUB_DISABLE_PROGRESS_BARS makes huggingface_hub warn when bars are switched on or off."""
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", value)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with load.hide_output():
            pass
    assert not shown


def test_no_connection_is_made(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert check(pair).ok
