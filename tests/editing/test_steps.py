"""A checkpoint that was edited several times: `inspect` lists the steps, and `revert` undoes the last one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tree, write_manifest
from safetensors.numpy import save_file

import swsurgery
from swsurgery.cli import main

NORM, EMBEDDING, DOWN = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"
WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 6,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"all": {"targets": ["Linear"], "weights": WEIGHTS}},
    },
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    random = np.random.default_rng(5)
    tensors = {
        NORM: np.linspace(0.5, 3.0, 6, dtype=np.float32),
        EMBEDDING: random.normal(size=(9, 6)).astype(np.float16),
        DOWN: np.arange(48, dtype=np.int8).reshape(6, 8),
        f"{DOWN}_scale": np.full((6, 1), 0.25, np.float32),
    }
    for part in ("gate", "up"):
        name = f"model.layers.0.mlp.{part}_proj.weight"
        tensors |= {name: np.ones((8, 6), np.int8), f"{name}_scale": np.ones((8, 1), np.float32)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


MANIFESTS = [
    """version: 1
name: first.one  # a comment
base: {path: BASE}
edits:
  - {op: scale, tensor: model.norm.weight, index: [1], factor: 2}
  - {op: protect, tensor: model.norm.weight, index: [5]}
""",
    """{"version": 1, "base": {"path": "BASE"}, "name": "rows",
 "edits": [{"op": "zero", "tensors": "model.embed_tokens.weight"}]}
""",
    """version: 1
base: {path: BASE}
edits:
  - {op: set, tensor: model.layers.0.mlp.down_proj.weight, index: [1, 2], value: 3.1}
""",
]
LINES = [
    ["scale factor=2.0 model.norm.weight[1]: 1.0 -> 2.0", "protect model.norm.weight[5]: 3.0"],
    ["zero model.embed_tokens.weight: 54 of 54 scalars changed in 1 tensor"],
    ["set model.layers.0.mlp.down_proj.weight[1, 2]: 2.5 -> 3.0 (code 10 -> 12)"],
]


@pytest.fixture
def steps(base, monkeypatch) -> list[Path]:
    """The base, and the checkpoint after each step."""
    found = [base]
    for number, text in enumerate(MANIFESTS, 1):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86_400 * number)) if number < 3 else monkeypatch.delenv(
            "SOURCE_DATE_EPOCH"
        )
        path = base.parent / f"m{number}.yaml"
        path.write_text(text.replace("BASE", str(found[-1])))
        swsurgery.apply(path, output=base.parent / f"step{number}", check="weights")
        found.append(base.parent / f"step{number}")
    return found


def test_inspect_lists_the_steps_with_their_manifests(steps, capsys):
    assert swsurgery.inspect(steps[0]).steps == ()
    found = swsurgery.inspect(steps[3]).to_json()["steps"]
    assert [step["number"] for step in found] == [1, 2, 3]
    assert [step["name"] for step in found] == ["first.one", "rows", None]
    assert [step["edits"] for step in found] == LINES
    assert [step["created"] for step in found] == [86_400, 172_800, None]
    for number, step in enumerate(found, 1):
        assert step["manifest"] == (steps[0].parent / f"m{number}.yaml").read_text()
    assert main(["inspect", str(steps[3]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == found
    assert main(["inspect", str(steps[3])]) == 0
    lines = capsys.readouterr().out.splitlines()
    digest = found[0]["manifest_sha256"][:12]
    assert f"step 1: first.one (sha256 {digest}), 1970-01-02 00:00:00 UTC" in lines
    assert any(line.startswith("step 3: manifest without a name (sha256 ") and line.endswith(")") for line in lines)
    assert all(f"  {line}" in lines for step in LINES for line in step)


def test_each_reversion_undoes_the_last_step(steps):
    for number in (3, 2, 1):
        swsurgery.revert(steps[number], steps[0].parent / f"back{number}")
        assert tree(steps[0].parent / f"back{number}") == tree(steps[number - 1])
    here = steps[0].parent / "back3"
    for number in (1, 0):
        swsurgery.revert(here)
        assert tree(here) == tree(steps[number])


def test_every_step_is_verified(steps):
    for step in steps[1:]:
        assert swsurgery.verify(step).ok
    path = steps[3] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not swsurgery.verify(steps[3]).ok


@pytest.mark.parametrize("in_place", [False, True])
def test_a_damaged_earlier_step_is_noted_by_revert(steps, in_place):
    """The files are restored exactly, but the damage would get a new digest in SHA256SUMS."""
    before = (steps[2] / "model.safetensors").read_bytes()
    assert swsurgery.revert(steps[3], steps[0].parent / "sound").notes == ()
    record = steps[3] / "swsurgery.json"
    record.write_text(record.read_text().replace('"swsurgery_version": "0', '"swsurgery_version": "1'))
    output = None if in_place else steps[0].parent / "back"
    [note] = swsurgery.revert(steps[3], output).notes
    assert "so the record of the earlier step may be damaged too (run swsurgery verify on the result)" in note
    assert ((output or steps[3]) / "model.safetensors").read_bytes() == before


def test_without_digests_and_without_earlier_steps_revert_notes_nothing(steps):
    (steps[3] / "SHA256SUMS").unlink()
    assert swsurgery.revert(steps[3], steps[0].parent / "back").notes == ()
    record = steps[1] / "swsurgery.json"
    record.write_text(record.read_text().replace('"swsurgery_version": "0', '"swsurgery_version": "1'))
    assert swsurgery.revert(steps[1]).notes == () and tree(steps[1]) == tree(steps[0])


def test_a_damaged_record_does_not_hide_the_tensors(steps, capsys):
    (steps[1] / "swsurgery.json").write_text("{}")
    assert main(["inspect", str(steps[1])]) == 0
    out = capsys.readouterr().out
    assert NORM in out and out.count("the steps cannot be listed: ") == 1


def test_a_date_beyond_the_calendar_and_a_hostile_name_are_text(base, capsys, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "9" * 17)
    manifest = write_manifest(base.parent / "m.json", base, {"op": "zero", "tensor": NORM, "index": [0]})
    patched = base.parent / "out"
    swsurgery.apply(manifest, output=patched, check="off")
    (patched / "manifest.yaml").write_text('{"name": "\\u001b[31m"}')
    assert main(["inspect", str(patched)]) == 0
    out = capsys.readouterr().out
    assert f"{'9' * 17} seconds since 1970" in out and "\x1b" not in out
