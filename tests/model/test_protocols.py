"""Protocols on a small model: against transformers' own loss on inputs that the tests cut themselves."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import torch
from tiny_checkpoint import TEXT, Pair, write_pair

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import ModelError
from swsurgery.model.report import CheckReport

RAW = f" \n = A river = \n \n {TEXT.splitlines()[0]} \n \n = = Its bridge = = \n \n {TEXT.splitlines()[1]} \n"
"""Two paragraphs in the form of the raw files of WikiText-2, written for these tests."""


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"), [((3, 7), 5.0), ((9, 2), -4.0)], bos=request.param)


def check(pair: Pair, **options: Any) -> CheckReport:
    settings = {"base": pair.base, "text": TEXT * 3, "prompts": ["The river"], "device": "cpu"} | options
    return swsurgery.check(pair.patched, **settings)


def find_nll(folder: Path, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> float:
    """Sum the losses of the last predictions of each input, in float64."""
    model, total = tiny_checkpoint.load(folder), 0.0
    for ids, wanted in zip(inputs, targets, strict=True):
        with torch.no_grad():
            log = model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
        total -= float(log[len(ids) - len(wanted) :][range(len(wanted)), list(wanted)].sum())
    return total


def tokenize(text: str) -> list[int]:
    return tiny_checkpoint.make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def has_bos(pair: Pair) -> bool:
    return check(pair, windows=1, window=8).protocol.bos == "yes"


def expect(pair: Pair, report: CheckReport, inputs: list[list[int]], targets: list[list[int]]) -> None:
    count = sum(map(len, targets))
    assert (report.windows, report.scored_tokens) == (len(inputs), count)
    for folder, side in ((pair.base, report.base), (pair.patched, report.patched)):
        assert side.perplexity == pytest.approx(math.exp(find_nll(folder, inputs, targets) / count), rel=1e-5)


def test_new_tokens_of_overlapping_windows_are_scored(pair: Pair) -> None:
    ids, bos = tokenize(TEXT * 3), [0] * has_bos(pair)
    report = check(pair, windows=20, window=12, stride=5)
    inputs = [bos + ids[at : at + 12] for at in range(0, len(ids) - 11, 5)][:20]
    targets = [piece[1:] if number == 0 else piece[-5:] for number, piece in enumerate(inputs)]
    expect(pair, report, [piece[:-1] for piece in inputs], targets)
    assert report.to_json()["text"]["protocol"]["stride"] == 5
    spans = -(-20 // 3)  # three windows score 15 new tokens, at least the 11 that span a window
    assert (report.ratio_low is None) == (spans < 8)
    assert check(pair, windows=40, window=12, stride=5).ratio_low is not None


@pytest.mark.parametrize("bos", ["yes", "no"])
def test_the_same_tokens_are_scored_with_and_without_bos(pair: Pair, bos: Any) -> None:
    report = check(pair, windows=4, window=10, bos=bos, score_first=False)
    ids = tokenize(TEXT * 3)
    pieces = [ids[at : at + 10] for at in range(0, 40, 10)]
    inputs = [[0] * (bos == "yes") + piece[:-1] for piece in pieces]
    expect(pair, report, inputs, [piece[1:] for piece in pieces])
    scored = check(pair, windows=4, window=10, bos=bos).scored_tokens
    assert scored == (40 if bos == "yes" else 36)


def test_prompts_begin_with_bos_if_it_is_asked_for(pair: Pair) -> None:
    forced, automatic = check(pair, bos="yes"), check(pair)
    assert (forced.prompts == automatic.prompts) == has_bos(pair)


def test_the_protocol_of_the_paper(pair: Pair) -> None:
    """The rows of the raw file are joined by empty lines; BOS is a token of the whole text."""
    report = check(pair, text=RAW, protocol="paper", window=16)
    rows = ["", " = A river = \n", "", f" {TEXT.splitlines()[0]} \n", "", " = = Its bridge = = \n", ""]
    joined = "\n\n".join([*rows, f" {TEXT.splitlines()[1]} \n"])
    ids = [0] * has_bos(pair) + tokenize(joined)
    pieces = [ids[at : at + 16] for at in range(0, len(ids) - 15, 16)]
    assert len(pieces) > 2
    expect(pair, report, [piece[:-1] for piece in pieces], [piece[1:] for piece in pieces])
    assert report.protocol.changed == ("window",) and report.protocol.name == "paper"
    assert report.text_sha256 == hashlib.sha256(joined.encode()).hexdigest()


def test_the_protocol_of_lm_eval(pair: Pair) -> None:
    text = f" = One = \n {TEXT} = Two = \n short \n"
    report = check(pair, text=text, protocol="lm-eval", window=24)
    inputs, targets = [], []
    documents = [f" = One = \n {TEXT}", " = Two = \n short \n"]
    for document in documents:
        ids = tokenize(document)
        for at in range(0, len(ids), 24):
            end = min(at + 24, len(ids))
            inputs.append([0, *ids][max(at > 0, end - 24) : end])
            targets.append(ids[at:end])
    expect(pair, report, inputs, targets)
    words = sum(len(document.split()) + (document[0] == " ") + (document[-1] == "\n") for document in documents)
    assert report.words == words
    wanted = math.exp(find_nll(pair.base, inputs, targets) / words)
    assert report.base.word_perplexity == pytest.approx(wanted, rel=1e-5)
    document = report.to_json()
    assert document["text"]["words"] == words and document["base"]["word_perplexity"] == pytest.approx(wanted, rel=1e-4)


def test_the_text_of_the_paper_comes_from_datasets(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str, split: str) -> dict[str, list[str]]:
        asked.append((*names, split))
        return {"text": ["", " = A = \n", f" {TEXT} \n"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    loaded = check(pair, text=None, protocol="paper", window=16)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    joined = "\n\n".join(["", " = A = \n", f" {TEXT} \n"])
    assert loaded.text_sha256 == hashlib.sha256(joined.encode()).hexdigest()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ModelError, match=r"^protocol paper measures on .*: the package datasets is not installed \(give"
    ):
        check(pair, text=None, protocol="paper")

    def fail(*names: str, split: str) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(ModelError, match=r"datasets cannot load: no network \(give the file with --text\)$"):
        check(pair, text=None, protocol="paper")


def test_every_command_names_its_protocol(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 3)
    manifest = tmp_path / "m.yaml"
    edit = f"{{op: zero, tensor: {tiny_checkpoint.DOWN}, index: [3, 7]}}"
    manifest.write_text(f"version: 1\nbase: {{path: {pair.base}}}\nedits: [{edit}]\n")
    options = [
        "--text",
        str(tmp_path / "text.txt"),
        "--window",
        "10",
        "--stride",
        "5",
        "--bos",
        "yes",
        "--device",
        "cpu",
    ]
    for words in (
        ["check", str(pair.patched), "--base", str(pair.base)],
        ["sweep", str(manifest), "--factors", "0"],
        ["compare", str(manifest)],
        ["apply", str(manifest), "-o", str(tmp_path / "out")],
    ):
        assert main([*words, *options, "--score-first", "no"]) == 0
        printed = capsys.readouterr().out
        assert "default: stride 5, with BOS, first token not scored; text sha256 " in printed, words


def test_the_digest_of_a_text_is_that_of_its_file(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line breaks such as CRLF are part of the text."""
    (tmp_path / "text.txt").write_bytes(data := TEXT.replace("\n", "\r\n").encode() + b"\r")
    words = ["check", str(pair.patched), "--text", str(tmp_path / "text.txt"), "--windows", "9", "--window", "8"]
    assert main([*words, "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"]["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_contradiction_is_one_line(pair: Pair, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    words = ["check", str(pair.patched), "--protocol", "lm-eval", "--device", "cpu"]
    assert main([*words, "--bos", "no"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "--bos" in printed.err
    monkeypatch.setenv("SWSURGERY_WINDOWS", "2")  # a variable changes the default protocol only
    monkeypatch.setenv("SWSURGERY_WINDOW", "2")
    assert main([*words, "--json"]) == 0
    assert '"name": "lm-eval"' in capsys.readouterr().out
