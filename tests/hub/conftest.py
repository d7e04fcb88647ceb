"""What the server's own tests share: their fixtures and a small model to put there."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hub.fixture import any_hub, hub  # noqa: F401 - fixtures


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a card, a configuration, a subfolder and one safetensors file of 300 KB."""
    folder = tmp_path / "model"
    (folder / "original").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [tests]\n---\n# Base\n")
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    (folder / "original" / "params.json").write_text("{}\n")
    header = json.dumps({"w": {"dtype": "U8", "shape": [300_000], "data_offsets": [0, 300_000]}}).encode()
    values = random.Random(7).randbytes(300_000)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + values)
    return folder
