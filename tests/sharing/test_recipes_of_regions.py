"""Recipes of records that protect, restore or change rows, columns, neurons, experts and whole tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import CONFIG, HIDDEN, INNER, NORM, down, tensor, write_llama, write_manifest, write_single
from test_recipes import MATCHERS

import swsurgery
from swsurgery.cli import main

UP, GATE = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"


def make(folder: Path, base: Path, *edits: dict) -> Path:
    swsurgery.apply(write_manifest(folder / "m.json", base, *edits), output=folder / "out", check="off")
    return folder / "out"


@pytest.fixture
def base(tmp_path) -> Path:
    more = {name: tensor("F16", INNER, HIDDEN, seed=n) for n, name in enumerate((UP, GATE))}
    return write_llama(tmp_path / "base", more)


def test_modules_of_protected_and_restored_regions_are_kept_and_others_named_in_a_note(tmp_path, base):
    out = make(
        tmp_path, base,
        {"op": "protect", "layer": 1, "neuron": 4},
        {"op": "protect", "tensors": NORM},
        {"op": "restore", "layer": 2, "row": 3, "from": str(base)},
        {"op": "zero", "layer": 0, "row": 1},
        {"op": "clip", "tensors": "lm_head.weight", "z": 2.0},
    )  # fmt: skip
    made = swsurgery.recipe(out, "transformers")
    assert set(made.modules) == {
        "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    }  # fmt: skip
    [note] = [n for n in made.notes if "protect or restore" in n]
    assert note.startswith("the modules of 2 edits of rows")
    for name in made.modules:
        assert any(MATCHERS["transformers"](pattern, name, made.modules) for pattern in made.patterns)
    assert not any(MATCHERS["transformers"](pattern, "model.layers.0.mlp.down_proj", ()) for pattern in made.patterns)


def test_a_record_that_only_changes_regions_has_no_recipe(tmp_path, base, capsys):
    out = make(tmp_path, base, {"op": "zero", "layer": 0, "row": 1})
    assert main(["recipe", str(out), "--for", "torchao"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "its record protects and restores nothing and its model is not known" in line


def test_an_earlier_step_counts_too(tmp_path, base):
    first = make(tmp_path, base, {"op": "protect", "layer": 1, "col": 4})
    (tmp_path / "next").mkdir()
    out = make(tmp_path / "next", first, {"op": "zero", "layer": 0, "row": 1})
    assert swsurgery.recipe(out, "torchao").modules == ("model.layers.1.mlp.down_proj",)


def test_every_matrix_of_a_stored_expert_is_kept_under_each_name(tmp_path):
    block = "model.layers.1.block_sparse_moe"
    experts = {
        f"{block}.experts.{e}.{w}.weight": tensor("BF16", *shape)
        for e in range(2)
        for w, shape in (("w1", (10, 6)), ("w2", (6, 10)), ("w3", (10, 6)))
    }
    config = CONFIG | {"model_type": "mixtral", "num_local_experts": 2, "num_hidden_layers": 2}
    base = write_single(tmp_path / "base", {**experts, "lm_head.weight": tensor("BF16", 12, 6)}, config)
    out = make(tmp_path, base, {"op": "protect", "layer": 1, "expert": 1})
    made = swsurgery.recipe(out, "compressed-tensors")
    assert set(made.modules) == {f"{block}.experts.1.{w}" for w in ("w1", "w2", "w3")}
    loaded = {f"model.layers.1.mlp.experts.1.{part}_proj" for part in ("gate", "up", "down")}
    assert loaded <= set(made.patterns) and not any(".experts.0." in pattern for pattern in made.patterns)
    gguf = swsurgery.recipe(out, "llama.cpp").patterns
    assert set(gguf) == {rf"^blk\.1\.ffn_{part}_exps\.weight$" for part in ("gate", "up", "down")}


def test_experts_of_a_stack_are_kept_each(tmp_path):
    stack = "model.layers.1.mlp.experts"
    tensors = {
        f"{stack}.gate_up_proj": tensor("BF16", 4, 6, 20), f"{stack}.down_proj": tensor("BF16", 4, 10, 6),
        down(0): tensor("BF16", 6, 10),
    }  # fmt: skip
    base = write_single(tmp_path / "base", tensors, CONFIG)
    slices = [("gate_up_proj", "1"), ("gate_up_proj", "3"), ("down_proj", "1:3, :, 0")]
    edits = [{"op": "protect", "tensor": f"{stack}.{name}", "slice": text} for name, text in slices]
    made = swsurgery.recipe(make(tmp_path, base, *edits), "compressed-tensors")
    assert made.modules == (f"{stack}.gate_up_proj", f"{stack}.down_proj")
    split = {pattern for pattern in made.patterns if pattern.startswith(stack) and pattern.count(".") == 6}
    assert split == {
        *(f"{stack}.{e}.{part}_proj" for e in (1, 3) for part in ("gate", "up")),
        *(f"{stack}.{e}.down_proj" for e in (1, 2)),
    }
