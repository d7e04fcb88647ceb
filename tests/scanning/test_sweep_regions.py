"""A sweep of rows, columns and tensors: held against checkpoints that apply writes, one per factor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_checkpoint import DOWN, TEXT, write_pair  # noqa: E402

import swsurgery  # noqa: E402
from swsurgery.cli import main  # noqa: E402

TARGETS = [
    {"layer": 0, "row": 3},
    {"tensor": DOWN, "slice": "2:5, 7"},
    {"tensor": DOWN, "index": [9, 2]},
    {"tensor": "model.norm.weight", "index": [4]},
]
FACTORS = [0.0, 0.5, 1.0, -3.0]
OPTIONS = {"text": TEXT, "window": 24, "device": "cpu"}


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_every_factor_equals_a_written_checkpoint(tmp_path: Path, placement: str, capsys) -> None:
    base = write_pair(tmp_path, dtype=torch.bfloat16).base

    def write(name: str, factor: float | None) -> Path:
        op = {"op": "zero"} if not factor else {"op": "scale", "factor": factor}
        edits = [op | target for target in TARGETS] + [{"op": "protect", "tensor": DOWN, "index": [3, 7]}]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"version": 1, "base": {"path": str(base)}, "edits": edits}))
        return path

    manifest = write("swept", 1.5)
    found = swsurgery.sweep(manifest, FACTORS, placement=placement, **OPTIONS)
    for factor, point in zip(FACTORS, found.points, strict=True):
        written = base
        if factor != 1:
            written = tmp_path / f"at{factor}"
            swsurgery.apply(write(f"m{factor}", factor), output=written, check="off")
        alone = swsurgery.check(written, placement=placement, **OPTIONS).patched
        assert point.perplexity == pytest.approx(alone.perplexity, rel=1e-3 if placement == "whole" else 0.02)
        assert (factor == 1) == (point.ratio == 1)
    assert found.to_json()["regions"] == [
        "model.layers.0.mlp.down_proj.weight[3, 0:24]",
        "model.layers.1.mlp.down_proj.weight[2:5, 7]",
    ]
    assert len(found.coordinates) == 2
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["sweep", str(manifest), "--factors", "0,1", "--text", str(text), "--window", "24", "--quiet"]
    assert main([*words, "--plot", str(tmp_path / "figure.svg")]) == 0
    assert "scaled    model.layers.0.mlp.down_proj.weight[3, 0:24]" in capsys.readouterr().out
