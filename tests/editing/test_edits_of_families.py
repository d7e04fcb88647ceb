"""Neurons, experts and scalars of many families are edited, verified, compared within one model, and reverted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from checkpoints import write_manifest
from safetensors.torch import load_file

import swsurgery
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.editing.check_options import CheckOptions
from swsurgery.model import load
from swsurgery.model.variant import Variant

IDS = tiny_models.TOKENS[0].tolist()
NAMES = (
    *("lfm2", "lfm2_moe", "nemotron", "nemotron_h", "jamba", "deepseek_v4", "kimi_linear", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "longcat_flash", "zamba", "zamba2", "recurrent_gemma", "modernbert-decoder"),
    *("phi4_multimodal", "step3p7", "qwen2_5_omni_thinker"),
)
DENSE = {"layer": 0}
PLACES: dict[str, list[dict[str, Any]]] = {  # the MLPs that are edited
    **dict.fromkeys(("lfm2_moe", "jamba"), [DENSE, {"layer": 1, "expert": 2}]),
    **dict.fromkeys(("kimi_linear", "step3p7"), [DENSE, {"layer": 1, "expert": 2}, {"layer": 1, "expert": "shared"}]),
    **dict.fromkeys(("deepseek_v4", "hunyuan_v1_moe"), [{"layer": 0, "expert": 2}, {"layer": 1, "expert": "shared"}]),
    "longcat_flash": [{"layer": 0, "expert": 2}, {"layer": 1, "expert": 1}],
    "nemotron_h": [{"layer": 3}, {"layer": 1, "expert": 2}, {"layer": 1, "expert": "shared"}],
    "zamba": [{"layer": 1}],
}


def list_edits(name: str) -> list[dict[str, Any]]:
    edits: list[dict[str, Any]] = []
    for place in PLACES.get(name, [DENSE]):
        edits.append({"op": "set", **place, "row": 3, "col": 5, "value": 4.0})
        edits.append({"op": "zero", **place, "neuron": 7})
        edits.append({"op": "scale", **place, "col": 9, "factor": 2.0})
    spare = {"deepseek_v4": 0, "hunyuan_v1_moe": 0, "longcat_flash": 0}
    if any("expert" in place for place in PLACES.get(name, [])):
        edits.append({"op": "zero", "layer": spare.get(name, 1), "expert": 3})
    return edits


@pytest.mark.parametrize("name", NAMES)
def test_edits_reach_the_model_and_are_undone(name: str, tmp_path: Path) -> None:
    base, edited = tmp_path / "base", tmp_path / "edited"
    tiny_models.write(name, base)
    manifest = write_manifest(tmp_path / "m.json", base, *list_edits(name))
    swsurgery.apply(manifest, output=edited, check=CheckOptions("off"))
    assert swsurgery.verify(edited, base=base).ok

    old, new = (load_file(folder / "model.safetensors") for folder in (base, edited))
    changed = frozenset(tensor for tensor in new if not torch.equal(old[tensor], new[tensor]))
    with load.hide_output():
        model = load.open_model(open_checkpoint(base), device="cpu", placement="whole", say=pytest.fail)
    [outcome] = model.run([IDS], [{}, Variant({}, changed, open_checkpoint(edited))])
    for found, folder in zip(outcome.logits, (base, edited), strict=True):
        with torch.no_grad():
            wanted = tiny_models.load(name, folder)(input_ids=tiny_models.TOKENS).logits[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outcome.logits[0], outcome.logits[1])

    swsurgery.revert(edited, tmp_path / "reverted")
    assert (tmp_path / "reverted" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
