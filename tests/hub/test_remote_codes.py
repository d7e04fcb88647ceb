"""One element of a packed matrix on the Hub: the headers move, and little else."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIG, down, write_shard
from hub import fixture

from swsurgery.cli import main
from swsurgery.hub import remote

any_hub, hub = fixture.any_hub, fixture.hub
REPO, ROWS, COLS, LAYERS = "org/four", 512, 2048, 6
QUANTISATION = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}}},
}  # fmt: skip


@pytest.fixture
def base(tmp_path) -> Path:
    """Six packed matrices of 0.5 MB each in one shard."""
    random, tensors = np.random.default_rng(1), {}
    for name in map(down, range(LAYERS)):
        tensors |= {
            f"{name}_packed": ("I32", (ROWS, COLS // 8), random.bytes(ROWS * COLS // 2)),
            f"{name}_scale": ("BF16", (ROWS, COLS // 128), b"\x80\x3c" * (ROWS * COLS // 128)),
            f"{name}_shape": ("I64", (2,), struct.pack("<qq", ROWS, COLS)),
        }
    folder = tmp_path / "base"
    folder.mkdir()
    write_shard(folder / "model.safetensors", tensors)
    sizes = {"hidden_size": ROWS, "intermediate_size": COLS, "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **sizes, "quantization_config": QUANTISATION}))
    return folder


def run(capsys, *words: object) -> dict:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_element_costs_the_header_and_a_few_bytes(hub, base, capsys):
    hub.add_repo(REPO, base)
    at = ["--tensor", down(4), "--at", "507,1229"]
    here = run(capsys, "inspect", base, *at)
    hub.traffic.clear()
    assert run(capsys, "inspect", f"hf://{REPO}", *at) == here
    assert here["layer"] == 4 and here["scale"] == 1 / 64
    moved, requests = hub.traffic.sent(origin="store"), hub.traffic.requests("/resolve/")
    assert moved <= remote.HEAD + 256 and len(requests) < 20
    assert (base / "model.safetensors").stat().st_size > 40 * remote.HEAD


def test_the_layouts_cost_a_few_bytes_of_one_matrix(hub, base, capsys):
    hub.add_repo(REPO, base)
    here = run(capsys, "inspect", base)
    hub.traffic.clear()
    assert run(capsys, "inspect", f"hf://{REPO}")["quantised"] == here["quantised"]
    assert here["quantised"]["layouts"][0]["weights"] == LAYERS
    assert hub.traffic.sent(origin="store") <= remote.HEAD + 64
