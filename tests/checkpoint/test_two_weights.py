"""An index and a single file in one directory: what is only looked at is chosen by the record, or by --weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoint
from patched import DOWN, MANIFEST, apply_text, bfloat16, tensors, write_base, write_shard
from safetensors.torch import load_file, save_file

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import action, main
from swsurgery.editing.in_memory import load_patched
from swsurgery.errors import ModelError
from swsurgery.model.check import run_checks
from swsurgery.model.load import open_model
from swsurgery.scanning import scan_files

BOTH = "{path: base, weights: index, copies: keep}"
EDITED = ["--tensor", DOWN, "--at", "1,2"]


@pytest.fixture
def base(tmp_path) -> Path:
    """Shards with an index, and a single file in which one tensor has other values."""
    base = write_base(tmp_path / "base")
    write_shard(base / "model.safetensors", {**tensors(), DOWN: bfloat16((4, 6), seed=99)})
    return base


@pytest.fixture
def patched(base, tmp_path) -> Path:
    """Zero at DOWN[1, 2] in the shards."""
    return apply_text(tmp_path, MANIFEST.replace("{path: base}", BOTH), "patched")


@pytest.fixture
def run(capsys):
    def run(*arguments: object) -> tuple[int, dict, list[str]]:
        code = main([str(a) for a in arguments] + ["--json", "--quiet"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else {}, err.splitlines()

    return run


@pytest.mark.parametrize("command", ["inspect", "scan --method weights", "diff", "check", "verify --finite"])
def test_without_a_word_the_choice_is_refused_and_the_option_named(base, run, command):
    name, *options = command.split()
    code, document, (line,) = run(name, base, *([base] if name == "diff" else []), *options)
    assert (code, set(document)) == (2, {"error", "schema"})
    assert line.endswith("(choose single or index with base.weights in a manifest, or with the option --weights)")


def test_the_option_chooses_what_is_inspected(base, run):
    values = {w: run("inspect", base, *EDITED, "--weights", w)[1] for w in ("index", "single")}
    assert values["index"]["file"] != "model.safetensors" == values["single"]["file"]
    assert values["index"]["value"] != values["single"]["value"]
    shards = [f["file"] for f in run("inspect", base, "--weights", "single")[1]["files"] if f["shard"]]
    assert shards == ["model.safetensors"]


def test_the_record_chooses_where_there_is_one(patched, run):
    code, document, _ = run("inspect", patched, *EDITED)
    assert (code, document["value"]) == (0, 0)
    assert run("inspect", patched, *EDITED, "--weights", "single")[1]["value"] != 0, "the copy can be looked at"
    code, document, _ = run("verify", patched, "--finite")
    assert (code, document["finite"]) == (0, True)


def test_diff_reads_the_weights_that_were_edited(base, patched, run):
    code, document, _ = run("diff", base, patched, "--weights", "index")
    assert (code, [change["index"] for change in document["changes"]]) == (1, [[1, 2], [3, 5]])
    code, document, _ = run("diff", base, patched, "--weights", "single")
    assert (document["changes"], document["mismatched"]) == ([], {})
    (base / "model.safetensors").unlink()
    assert len(run("diff", base, patched)[1]["changes"]) == 2, "what has no choice needs none"


def test_scan_writes_a_manifest_of_the_weights_that_it_read(base):
    read = open_checkpoint(base, "single")
    assert scan_files.make_base(read, base / "m.yaml") == {"path": ".", "weights": "single"}
    (base / "model.safetensors").unlink()
    assert scan_files.make_base(open_checkpoint(base), base / "m.yaml") == {"path": "."}


def test_verify_takes_the_option_only_where_nothing_else_says(base, patched, run, tmp_path):
    assert run("verify", base, "--finite", "--weights", "single")[0] == 0
    code, _, (line,) = run("verify", patched, "--weights", "single")
    assert (code, line) == (
        2,
        "swsurgery: --weights single was given, but the choice index is stated in: swsurgery.json "
        "(leave --weights out)",
    )  # fmt: skip
    assert run("check", patched, "--weights", "single")[0] == 2
    assert run("verify", patched, "--weights", "index")[0] == 0


def test_the_model_that_runs_is_the_one_that_was_chosen(tmp_path):
    pair = tiny_checkpoint.write_pair(tmp_path)
    name = tiny_checkpoint.DOWN
    weights = load_file(pair.base / "model.safetensors")
    other = {**weights, name: weights[name] + 1}
    save_file(other, pair.base / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (pair.base / "model.safetensors.index.json").write_text(json.dumps(index))
    prompts = ["The river was"]
    by_index, by_single = (
        run_checks(open_checkpoint(pair.base, choice), (), text=tiny_checkpoint.TEXT, prompts=prompts, device="cpu")
        for choice in ("index", "single")
    )
    assert by_index.base.perplexity != pytest.approx(by_single.base.perplexity, rel=0.01)
    with pytest.raises(ModelError, match="transformers would load model.safetensors"):
        open_model(open_checkpoint(pair.base, "index"), device="cpu", placement="whole")


def test_a_patched_model_is_not_loaded_from_the_file_that_was_not_chosen(tmp_path):
    pair = tiny_checkpoint.write_pair(tmp_path)
    name = tiny_checkpoint.DOWN
    weights = load_file(pair.base / "model.safetensors")
    other = {**weights, name: weights[name].clone()}
    other[name][0, 0] += 1  # not where the edit is, which would be noticed
    save_file(other, pair.base / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (pair.base / "model.safetensors.index.json").write_text(json.dumps(index))
    manifest = {
        "version": 1,
        "base": {"path": str(pair.base), "weights": "index", "copies": "omit"},
        "edits": [{"op": "zero", "tensor": name, "index": [1, 2]}],
    }
    with pytest.raises(ModelError, match="transformers would load model.safetensors"):
        load_patched(manifest, pair.base)
    manifest["base"]["weights"] = "single"
    model = load_patched(manifest, pair.base)
    assert float(model.state_dict()[name][0, 0]) == float(weights[name][0, 0])


def test_the_action_takes_the_choice_too(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(base.parent)
    inputs = {"CHECKPOINT": "base", "FINITE": "true"}
    assert action.run(inputs, tmp_path) == 2
    assert action.run(inputs | {"WEIGHTS": "index"}, tmp_path) == 0
