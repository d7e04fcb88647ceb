"""`scan` and `sweep` as a person runs them: what they print, what they leave behind, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import planted
import pytest
import tiny_checkpoint
import torch
from safetensors.torch import load_file
from tiny_checkpoint import TEXT

import swsurgery
from swsurgery import known, model
from swsurgery.cli import main, output
from swsurgery.errors import Interrupted, ModelError, TargetError
from swsurgery.known import own
from swsurgery.model.forward import LayeredModel
from swsurgery.scanning import by_activations, spikes

PLACE = planted.Place(layer=1, row=5, col=7)
DOWN = "model.layers.1.mlp.down_proj.weight"
PROMPTS = ("The river was", "In practice it went", "She asked")
ASK = [word for prompt in PROMPTS for word in ("--prompt", prompt)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`planted` has one super weight, `random` none; both have a tokenizer."""
    folder = tmp_path_factory.mktemp("scan")
    tokenizer = tiny_checkpoint.make_tokenizer()
    sequences = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for name in ("planted", "random"):
        tiny = planted.build("llama", vocab_size=tiny_checkpoint.VOCABULARY, max_position_embeddings=64)
        if name == "planted":
            planted.plant(tiny, PLACE, sequences)
        tiny.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def here(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in checkpoints.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


def test_what_scan_finds_is_what_the_other_commands_take(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scan", "planted", *ASK, "--confirm", "--text", "text.txt", "--window", "16", "--json", "--device", "cpu"]
    files = ["--manifest", "zero.yaml", "--plot", "scan.svg", "--register", "My Model"]
    assert main([*words, *files]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    value = float(load_file(here / "planted" / "model.safetensors")[DOWN][5, 7])
    (found,) = [s for s in report["candidates"] if (s["layer"], s["row"], s["col"]) == PLACE[:3]]
    assert (found["tensor"], found["index"], found["value"]) == (DOWN, [5, 7], value)
    assert report["confirmation"]["windows"] >= 8 and report["confirmation"]["window_tokens"] == 16
    assert found["prompts"] >= 1 and found["verdict"] in ("needed alone", "needed jointly", "inert")
    assert (found in report["super_weights"]) == (found["verdict"] != "inert")
    assert {a["channel"] for a in report["super_activations"]} == {5}
    assert [line for line in printed.err.splitlines() if line.startswith("swsurgery: registered")] == [
        "swsurgery: registered: swsurgery lookup My Model"
    ]
    assert "<svg" in (here / "scan.svg").read_text()

    critical = found["verdict"] != "inert"
    assert (here / "zero.yaml").exists() == critical
    assert main(["lookup", "my-model", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["models"]
    assert ([c["row"] for c in entry["coordinates"] if c["layer"] == 1] == [5]) == critical
    assert main(["lookup", "my-model", "--forget"]) == 0
    capsys.readouterr()
    assert main(["lookup", "my-model"]) == 2


def test_on_too_little_text_the_candidates_are_kept_as_not_confirmed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["scan", "planted", *ASK, "--confirm", "--text", "text.txt", "--windows", "7", "--window", "16"]
    assert main([*words, "--device", "cpu", "--manifest", "zero.yaml", "--register", "short"]) == 0
    shown = capsys.readouterr().out
    assert "answer    1 candidate, not confirmed" in shown
    assert "note      too little text for intervals and verdicts: 7 windows (a verdict needs 8" in shown
    assert "on 7 windows of 16 tokens (" in shown
    assert "found, not confirmed" in (here / "zero.yaml").read_text()
    (coordinate,) = own.find_model("short").coordinates
    assert (coordinate.row, coordinate.role, coordinate.causal_alone) == (5, "untested", "untested")
    assert "--confirm --windows 7 --window 16 --text text.txt" in coordinate.sources[0].cite
    assert coordinate.effects[0].ci95 is None and coordinate.effects[0].ratio is not None


def test_a_manifest_of_candidates_can_be_applied(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "planted", *ASK, "--manifest", "zero.yaml", "--quiet", "--device", "cpu"]) == 0
    assert "answer    1 candidate, not confirmed" in capsys.readouterr().out
    assert main(["apply", "zero.yaml", "--dry-run", "--json"]) == 0
    splices = json.loads(capsys.readouterr().out)["splices"]
    assert [(s["tensor"], s["index"], s["new"]) for s in splices] == [(DOWN, [5, 7], 0.0)]


@pytest.mark.parametrize("method", ["activations", "weights"])
def test_none_is_an_answer(here: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    files = ["--manifest", "zero.yaml", "--register", "nothing here"]
    ask = ASK if method == "activations" else []
    assert main(["scan", "random", "--method", method, *ask, "--confirm", *files, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "none" in printed.out
    assert "nothing was found, so no manifest was written: zero.yaml" in printed.err
    assert not (here / "zero.yaml").exists()
    assert own.find_model("nothing here").coordinates == ()


def test_the_weights_alone_are_scanned_without_tokenizer_and_without_torch(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "explain_unavailable", lambda: "torch is not installed")
    assert main(["scan", "planted", "--method", "weights", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["super_weights"]
    assert (found["layer"], found["row"], found["col"]) == PLACE[:3]
    write_manifest(here / "zero.yaml", "zero")
    for words, way in (
        (["scan", "planted"], ", or --method weights"),
        (["scan", "planted", "--confirm"], ", or --method weights without --confirm"),
        (["scan", "planted", "--method", "weights", "--confirm"], ", or leave out --confirm"),
        (["sweep", "zero.yaml", "--factors", "0,1"], ""),
    ):
        assert main(words) == 2
        assert capsys.readouterr().err.splitlines() == [
            f"swsurgery: torch is not installed: a model has to be run (pip install 'swsurgery[check]'{way})"
        ]


def test_each_command_names_a_way_out_that_it_has(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(here / "zero.yaml", "zero")
    assert main(["apply", "zero.yaml", "-o", "patched", "--check", "off", "--quiet"]) == 0
    shutil.copytree(here / "planted", here / "untold")
    for folder in ("patched", "untold"):
        for file in (here / folder).glob("tokenizer*"):
            file.unlink()
    capsys.readouterr()
    ways = {
        "scan untold": ", or --method weights",
        "scan untold --method weights --confirm": ", or leave out --confirm",
        "sweep zero.yaml --factors 0,1 --base untold": "",
        "check untold": "",
        "check patched": ", or use swsurgery verify, which does not run the model",
        "apply zero.yaml -o again --base untold --check forward": ", or --check weights",
    }
    for words, way in ways.items():
        assert main([*words.split(), "--device", "cpu"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("swsurgery: no tokenizer")
        assert line.endswith(f"{way})") and ("--check weights" in line) == words.startswith("apply")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method weights --prompt hi", "--prompt needs --method activations or experts"),
        ("--method weights --prompt hi --confirm", "--prompt needs --method activations or experts"),
        ("--method weights --device cpu", "--device needs --method activations or experts, or --confirm"),
        ("--method weights --placement streamed", "--placement needs --method activations or experts, or --confirm"),
        ("--method weights --text nowhere.txt", "--text needs --confirm"),
        ("--text text.txt", "--text needs --confirm"),
        ("--windows 16", "--windows needs --confirm"),
        ("--op zero", "--op needs --manifest"),
        ("--op scale --factor 2 --plot scan.svg", "--op needs --manifest"),
        ("--factor 2", "--factor needs --manifest"),
    ],
)
def test_an_option_without_effect_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert main(["scan", "planted", *words.split()]) == 2
    assert capsys.readouterr().err.splitlines() == [f"swsurgery: {message}"]
    assert not (here / "scan.svg").exists()


def test_the_weights_are_confirmed_by_a_model_that_is_run_as_asked(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--method weights --confirm --text text.txt --windows 2 --device cpu --placement streamed --json"
    assert main(["scan", "planted", *words.split(), "--manifest", "m.yaml", "--op", "scale", "--factor", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["confirmation"]["windows"] == 2


@pytest.mark.parametrize("fault", [TargetError("cannot write", "known"), Interrupted("SIGINT")])
def test_what_was_written_before_an_output_failed_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def save(_: Any, mode: int) -> None:
        raise fault

    monkeypatch.setattr(known.own, "save", save)
    files = ["--manifest", "zero.yaml", "--plot", "scan.svg", "--register", "mine"]
    assert main(["scan", "planted", "--method", "weights", *files]) == fault.exit_code
    said = capsys.readouterr()
    assert "[row, col]" in said.out
    last = "cannot write: known" if fault.exit_code == 2 else "interrupted: SIGINT (what was written stays)"
    assert said.err.splitlines() == [
        "swsurgery: figure: scan.svg", "swsurgery: manifest: zero.yaml", f"swsurgery: {last}",
    ]  # fmt: skip
    assert (here / "zero.yaml").exists() and (here / "scan.svg").exists()


def test_the_bar_says_which_round_and_which_layer(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []
    monkeypatch.setattr(output.Bar, "relabel", lambda self, label: labels.append(label))
    words = [*ASK, "--confirm", "--text", "text.txt", "--windows", "1", "--placement", "streamed", "--device", "cpu"]
    assert main(["scan", "planted", *words]) == 0
    layers = [f"layer {n}/{planted.LAYERS}" for n in range(1, planted.LAYERS + 1)]
    for number in (1, 2):
        assert [label for label in labels if label.startswith(f"round {number}, layer")] == [
            f"round {number}, {layer}" for layer in layers
        ]
    assert f"confirmation round 1, {layers[-1]}" in labels


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["scan", "planted", "--manifest", "text.txt"],
            "the manifest already exists: text.txt (choose another --manifest)",
        ),
        (["scan", "planted", "--manifest", "no/zero.yaml"], "no such directory: "),
        (["scan", "planted", "--plot", "scan.jpg"], ".png"),
        (["scan", "planted", "--manifest", "m.yaml", "--op", "scale"], "scale needs a factor"),
        (["scan", "planted", "--manifest", "m.yaml", "--factor", "2"], "zero takes no factor"),
        (
            ["scan", "planted", "--manifest", "m.yaml", "--op", "scale", "--factor", "inf"],
            "the factor has to be a finite number",
        ),
        (["scan", "planted", "--register", "llama-7b"], "the name of another model: layers, hidden and intermediate"),
        (["scan", "planted", "--register", "///"], "a model's name needs a letter or a digit"),
        (
            ["scan", "planted", "--manifest", "a.svg", "--plot", "a.svg"],
            "the manifest and the figure have the same name",
        ),
        (["scan", "planted", "--confirm", "--text", "/dev/null"], "the text is empty: /dev/null"),
        (["scan", "planted", "--prompt", "\udcff"], "the text is not valid Unicode"),
        (["scan", "nowhere"], "no such checkpoint: "),
        (["scan", "planted", "--text", "nowhere.txt", "--confirm"], "cannot read the text"),
        (["sweep", "keep.yaml", "--factors", "0,1"], "no scalar is changed, so there is nothing to sweep: keep.yaml"),
        (["sweep", "zero.yaml", "--factors", "0,half"], "factors must be numbers separated by commas: '0,half'"),
        (["sweep", "zero.yaml", "--factors", "0,nan"], "nan"),
        (["sweep", "zero.yaml", "--factors", "2,2"], "2"),
        (["sweep", "zero.yaml", "--factors", "1e39"], "1e+39"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_any_work(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    def work(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was run")

    write_manifest(here / "zero.yaml", "zero")
    write_manifest(here / "keep.yaml", "protect")
    monkeypatch.setattr(LayeredModel, "run", work)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(here.glob("scan.*"))


def write_manifest(path: Path, op: str) -> None:
    edit = {"op": op, "tensor": DOWN, "index": [5, 7]}
    path.write_text(json.dumps({"version": 1, "base": {"path": "planted"}, "edits": [edit]}))


def test_a_sweep_measures_each_factor(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(here / "zero.yaml", "zero")
    words = ["sweep", "zero.yaml", "--factors", "0,0.5,1,2", "--text", "text.txt", "--plot", "sweep.png", "--json"]
    assert main([*words, "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (here / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert report["coordinates"] == [{"tensor": DOWN, "index": [5, 7]}]
    text = (here / "zero.yaml").read_bytes()
    assert (report["model"], report["revision"], report["manifest"]) == ("planted", None, "zero.yaml")
    assert report["manifest_sha256"] == hashlib.sha256(text).hexdigest()
    assert report["swsurgery_version"] == swsurgery.__version__
    points = {point["factor"]: point for point in report["points"]}
    assert list(points) == [0.0, 0.5, 1.0, 2.0]
    assert (points[1.0]["ratio"], points[1.0]["kl"]) == (1.0, 0.0)
    for factor, point in points.items():
        assert point["perplexity"] == pytest.approx(perplexity(here / "planted", factor), rel=1e-4)


def perplexity(folder: Path, factor: float) -> float:
    """By transformers alone, over the windows of 64 tokens, which is the context of the model."""
    whole = tiny_checkpoint.load(folder)
    ids = tiny_checkpoint.make_tokenizer()(TEXT)["input_ids"]
    windows = torch.tensor([ids[i : i + 64] for i in range(0, len(ids) - 63, 64)])
    with torch.no_grad():
        whole.model.layers[1].mlp.down_proj.weight[5, 7] *= factor
        return float(whole(input_ids=windows, labels=windows).loss.exp())


def test_a_streamed_check_says_what_a_whole_one_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(here / "zero.yaml", "zero")
    assert main(["apply", "zero.yaml", "-o", "patched", "--check", "off", "--quiet"]) == 0
    capsys.readouterr()
    reports = {}
    for placement in ("whole", "streamed"):
        words = ["check", "patched", "--text", "text.txt", "--device", "cpu", "--placement", placement, "--json"]
        assert main(words) == 0
        reports[placement] = json.loads(capsys.readouterr().out)
    whole, streamed = reports["whole"], reports["streamed"]
    assert (whole["method"], streamed["method"]) == ("layer by layer", "streamed")
    assert abs(whole["perplexity_ratio"] - 1) > 0.01
    for key in ("perplexity_ratio", "kl"):
        assert streamed[key] == pytest.approx(whole[key], rel=1e-4)


def test_a_checkpoint_without_a_record_is_measured_and_compared_with_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "planted", "--text", "text.txt", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["patched"]["perplexity"] == pytest.approx(perplexity(here / "planted", 1), rel=1e-4)
    assert report["compared"] is False and report["perplexity_ratio"] is None and report["base"] is None


def test_an_interrupt_ends_a_scan_cleanly(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = spikes.LayerSpikes.around

    def around(self: spikes.LayerSpikes, number: int, *rest: Any) -> AbstractContextManager[None]:
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, number, *rest)

    monkeypatch.setattr(spikes.LayerSpikes, "around", around)
    words = ["scan", "planted", "--placement", "streamed", "--manifest", "zero.yaml", "--plot", "scan.png"]
    assert main([*words, "--device", "cpu"]) == 130
    assert capsys.readouterr().err.splitlines() == ["swsurgery: interrupted: SIGINT (nothing was left behind)"]
    assert not (here / "zero.yaml").exists() and not (here / "scan.png").exists()


@pytest.mark.parametrize("becomes", [ModuleNotFoundError("no PreTrainedModel"), ModelError("cannot be loaded")])
def test_an_interrupt_that_a_library_makes_something_else_of_is_an_interrupt(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, becomes: Exception
) -> None:
    """transformers' lazy imports do, with any Exception; extension modules with anything."""

    def load(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Exception as error:
            raise AssertionError("a library would have caught it") from error
        except BaseException:  # noqa: BLE001
            raise becomes from None

    monkeypatch.setattr(by_activations.load, "load_tokenizer", load)
    assert main(["scan", "planted", "--device", "cpu"]) == 130
    assert capsys.readouterr().err.splitlines() == ["swsurgery: interrupted: SIGINT (nothing was left behind)"]


def test_a_tokenizer_of_another_model_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = planted.build("llama", vocab_size=40)
    small.save_pretrained(here / "small")
    tiny_checkpoint.make_tokenizer().save_pretrained(here / "small")
    for words in (["scan", "small"], ["scan", "small", "--placement", "streamed"]):
        assert main([*words, "--device", "cpu"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("swsurgery: the tokenizer gives token") and "the model has 40" in line


def test_a_reader_of_stderr_that_leaves_loses_no_result(here: Path) -> None:
    words = [sys.executable, "-m", "swsurgery", "scan", "planted", *ASK, "--manifest", "zero.yaml", "--device", "cpu"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=writer, text=True)
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert "[row, col]" in done.stdout
    assert (here / "zero.yaml").exists()


def test_a_full_disk_behind_stdout_is_one_line_and_the_manifest_is_there(here: Path) -> None:
    words = [sys.executable, "-m", "swsurgery", "scan", "planted", "--method", "weights", "--manifest", "zero.yaml"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    written = "swsurgery: manifest: zero.yaml\n"
    line = "swsurgery: cannot write (No space left on device): stdout (manifest: zero.yaml)\n"
    assert (done.returncode, done.stderr) == (2, written + line)
    assert (here / "zero.yaml").exists()


@pytest.mark.parametrize("mode", [0o600, 0o644], ids=oct)
def test_what_a_scan_writes_is_as_private_as_the_weights_that_it_repeats(here: Path, mode: int) -> None:
    for shard in (here / "planted").glob("*.safetensors"):
        shard.chmod(mode)
    before = os.umask(0o022)
    try:
        assert main(["scan", "planted", "--method", "weights", "--manifest", "zero.yaml", "--register", "a/b"]) == 0
    finally:
        os.umask(before)
    written = [here / "zero.yaml", known.own.get_own_folder() / "a.b.json"]
    assert [path.stat().st_mode & 0o777 for path in written] == [mode, mode]


def test_scan_in_python_says_what_the_command_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = swsurgery.scan("planted", prompts=PROMPTS, device="cpu")
    assert main(["scan", "planted", *ASK, "--json", "--device", "cpu"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(json.dumps(report.to_json())) | {"schema": "swsurgery/scan/1"}


def test_the_published_activation_is_said_to_be_of_another_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree((here / "random").resolve(), here / "named")
    config = json.loads((here / "named" / "config.json").read_text())
    (here / "named" / "config.json").write_text(json.dumps(config | {"_name_or_path": "google/gemma-2b"}))
    words = ["scan", "named", *ASK, "--device", "cpu"]
    main([*words, "--page", "page.html"])
    said = "measured on 5,000 samples of text, not on"
    assert f"{said} the prompts of this scan" in " ".join(capsys.readouterr().out.split())
    assert f"{said} these prompts" in (here / "page.html").read_text()
    main([*words, "--json"])
    published = json.loads(capsys.readouterr().out)["passport"]["published"]
    assert (published["value"], published["measured_on"]) == (-2992, "5,000 samples of text")
