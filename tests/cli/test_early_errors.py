"""A mistake that can be seen without a model is reported before torch is imported."""

from __future__ import annotations

import sys

import pytest
from patched import write_patched

from swsurgery.cli import main

EMPTY = "the text is empty: empty.txt (give a longer text)"
NO_DEVICE = "no such device: gpu (use --device auto, cpu, cuda or cuda:N)"
NO_GPU = "no usable CUDA device: cuda (use --device cpu)"
NO_FILE = "cannot read the text (No such file or directory): nothere.txt"
NO_FORMAT = "unknown figure format: x.gif (end the name in .png, .svg or .pdf)"
NO_FOLDER = "no such directory: nothere (create the directory first)"
COMMANDS = {
    "apply": ["apply", "edit.yaml", "-o", "out"],
    "check": ["check", "base"],
    "scan": ["scan", "base", "--confirm"],
    "sweep": ["sweep", "edit.yaml", "--factors", "0,2"],
    "compare": ["compare", "edit.yaml"],
}
"""The commands that run a model, with arguments without a mistake."""


@pytest.fixture
def no_torch(tmp_path, monkeypatch):
    """Make a folder with a checkpoint, a manifest and an empty text the current one, and torch impossible to import."""
    from swsurgery.model import run_arguments

    write_patched(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "edit.yaml").write_text(
        "version: 1\nbase: {path: base}\nedits:\n"
        "  - {op: zero, tensor: model.layers.0.mlp.down_proj.weight, index: [0, 0]}\n"
    )
    edit = (tmp_path / "edit.yaml").read_text()
    (tmp_path / "far.yaml").write_text(edit.replace("layers.0", "layers.99"))
    (tmp_path / "lost.yaml").write_text(edit.replace("path: base", "path: lost"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(run_arguments, "GPU_FILES", ())
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--text", "empty.txt", EMPTY),
        ("--text", "nothere.txt", NO_FILE),
        ("--device", "gpu", NO_DEVICE),
        ("--device", "cuda", NO_GPU),
    ],
)
def test_every_command_that_runs_a_model_refuses(no_torch, capsys, command, option, value, line):
    assert main([*COMMANDS[command], option, value]) == 2
    assert capsys.readouterr().err == f"swsurgery: {line}\n"


@pytest.mark.parametrize("command", ["scan", "sweep", "compare"])
@pytest.mark.parametrize(("path", "line"), [("x.gif", NO_FORMAT), ("nothere/x.svg", NO_FOLDER)])
def test_a_figure_that_cannot_be_written_is_refused(no_torch, capsys, command, path, line):
    assert main([*COMMANDS[command], "--plot", path]) == 2
    assert capsys.readouterr().err == f"swsurgery: {line}\n"


@pytest.mark.parametrize(
    ("factors", "line"),
    [
        ("1,1", "factor is given twice: 1"),
        ("0,nan", "factor is not finite: nan"),
        ("0,inf", "factor is not finite: inf"),
        ("0,1e50", "cannot scale "),
        ("0,a", "factors must be numbers separated by commas: '0,a'"),
        ("", "factors must be numbers separated by commas: ''"),
    ],
)
def test_an_impossible_factor_is_refused(no_torch, capsys, factors, line):
    assert main(["sweep", "edit.yaml", "--factors", factors]) == 2
    assert capsys.readouterr().err.startswith(f"swsurgery: {line}")


REFUSED = [
    *[[*words, *more] for words in COMMANDS.values() for more in (
        ["--windows", "0"], ["--window", "1"], ["--placement", "here"], ["--device", "cpu:0"], ["--bogus"],
        ["--page", "nothere/x.html"], ["--page", "x.txt"], ["--page", "base/x.html"], ["--page", "empty.txt/x.html"],
    )],
    *[[*COMMANDS[name], "--prompt", prompt] for name in ("apply", "check", "scan") for prompt in ("", "\udcff")],
    *[[*COMMANDS[name], *more] for name in ("scan", "sweep", "compare") for more in (
        ["--csv", "--json"], ["--csv", "--latex"],
    )],
    *[[*COMMANDS[name], *more] for name in ("apply", "check") for more in (
        ["--max-perplexity-ratio", "0"], ["--max-perplexity-ratio", "nan"], ["--max-perplexity-ratio", "a"],
        ["--max-perplexity-ratio", "1", "--min-perplexity-ratio", "2"], ["--generate", "-1"],
    )],
    ["apply", "edit.yaml", "-o", "base"],
    ["apply", "edit.yaml", "-o", "nothere/out"],
    ["apply", "edit.yaml", "-o", "out", "--in-place"],
    ["apply", "edit.yaml", "--in-place", "--link", "hard"],
    ["apply", "edit.yaml", "-o", "out", "--undo-limit", "x"],
    ["apply", "edit.yaml", "-o", "out", "--check", "off", "--max-perplexity-ratio", "2"],
    ["apply", "edit.yaml", "-o", "out", "--check", "weights", "--generate", "2"],
    ["apply", "far.yaml", "-o", "out"],
    ["apply", "lost.yaml", "-o", "out"],
    ["check", "base", "--max-perplexity-ratio", "2"],
    ["check", "base", "--base", "nothere"],
    ["check", "base", "--base", "base/config.json"],
    ["check", "base", "--activation-bits", "1"],
    ["check", "base", "--variant", "fp16"],
    ["check", "base/config.json"],
    ["check", "nothere"],
    ["compare", "edit.yaml", "lost.yaml"],
    ["compare", "edit.yaml", "--activation-bits", "99"],
    ["compare", "far.yaml"],
    ["compare", "nothere.yaml"],
    ["sweep", "far.yaml", "--factors", "1,2"],
    ["sweep", "lost.yaml", "--factors", "1,2"],
    ["sweep", "edit.yaml"],
    ["scan", "nothere"],
    ["scan", "base", "--text", "empty.txt"],
    ["scan", "base", "--op", "zero"],
    ["scan", "base", "--factor", "2"],
    ["scan", "base", "--manifest", "x.yaml", "--op", "scale"],
    ["scan", "base", "--manifest", "x.yaml", "--op", "scale", "--factor", "nan"],
    ["scan", "base", "--manifest", "x.yaml", "--factor", "2"],
    ["scan", "base", "--manifest", "nothere/x.yaml"],
    ["scan", "base", "--manifest", "edit.yaml"],
    ["scan", "base", "--manifest", "x.svg", "--plot", "x.svg"],
    ["scan", "base", "--manifest", "x.html", "--page", "x.html"],
    ["scan", "base", "--method", "weights", "--prompt", "x"],
    ["scan", "base", "--method", "weights", "--device", "cpu"],
    ["scan", "base", "--method", "experts", "--register", "mine"],
    ["scan", "base", "--register", ""],
    ["scan", "base", "--register", "llama-7b"],
    ["verify", "patched", "--transformers"],
    ["verify", "patched", "--complete", "--transformers", "--page", "nothere/x.html"],
    ["verify", "nothere", "--complete", "--transformers"],
]  # fmt: skip


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_a_mistake_is_refused_before_torch_is_loaded(no_torch, capsys, words):
    """torch cannot be imported here, so a command that tries says so instead of naming the mistake."""
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "torch" not in printed
    assert not any(no_torch.joinpath(name).exists() for name in ("out", "x.yaml", "x.svg", "x.html"))


@pytest.mark.skipif(sys.platform != "linux", reason="device files are looked up on Linux")
def test_a_machine_with_a_driver_is_not_refused(monkeypatch):
    from swsurgery.model import run_arguments

    monkeypatch.setattr(run_arguments, "GPU_FILES", ("/dev/null",))
    run_arguments.refuse_device("cuda:1")


def test_loading_torch_is_announced_and_ends_before_an_error_is_printed(no_torch, capsys, monkeypatch):
    from swsurgery.cli.progress_bar import Bar
    from swsurgery.model import start_up
    from swsurgery.progress import LOADING

    calls = []
    monkeypatch.setattr(start_up.model, "explain_unavailable", lambda: None)
    monkeypatch.setattr(start_up, "refuse_unrunnable", lambda directory: None)
    monkeypatch.setattr(start_up.tokenizer, "start", lambda: None)
    monkeypatch.setattr(Bar, "start", lambda self, total, unit, label: calls.append(label))
    monkeypatch.setattr(Bar, "close", lambda self: calls.append("close"))
    assert main(["scan", "base"]) != 0
    assert calls == [LOADING, "close"]


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", ""),
        ("verify", ""),
        ("check", "p", "--base", ""),
        ("diff", "", "b"),
        ("revert", ""),
        ("sign", "", "--key", "k"),
    ],
    ids=lambda words: words[0],
)
def test_an_empty_location_is_not_the_current_folder(words, capsys):
    assert main(list(words)) == 2
    assert " is empty: '' (write . for the current folder)" in capsys.readouterr().err
