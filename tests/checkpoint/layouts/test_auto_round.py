"""Files that AutoRound exports from layers of SmolLM2, compared with AutoRound's own readers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import down
from quantised_files import LAYERS, MODEL, compare_cells, needs_model, open_matrix

torch = pytest.importorskip("torch")
auto_round = pytest.importorskip("auto_round", reason="AutoRound is not installed; it needs 280 MB of other packages")
safetensors = pytest.importorskip("safetensors.torch")


def export(folder: Path, form: str, bits: int, sym: bool) -> Path:
    """Round layers 2, 11 and 29 of SmolLM2 to nearest with AutoRound, and save them as layers 0 to 2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in LAYERS)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(LAYERS)
    rounding = auto_round.AutoRound(
        model, AutoTokenizer.from_pretrained(MODEL), bits=bits, group_size=32, sym=sym, iters=0,
        disable_opt_rtn=True, device_map="cpu",
    )  # fmt: skip
    rounding.quantize_and_save(str(folder), format=form)
    saved = next(folder.rglob("config.json")).parent
    for extra in ("model.safetensors.index.json", "model_extra_tensors.safetensors"):  # the layers that were left out
        (saved / extra).unlink(missing_ok=True)
    return saved


def dequantise(stored: dict, module: str, config: dict) -> np.ndarray:
    """The weight [rows, cols] that AutoRound's own reader computes, in float16."""
    qweight, qzeros, scales = (stored[f"{module}.{last}"] for last in ("qweight", "qzeros", "scales"))
    packing = config.get("packing_format", config["quant_method"])
    if "awq" in packing:
        from auto_round.export.export_to_awq.utils import dequantize_gemm

        return dequantize_gemm(qweight, qzeros, scales, 4, config["group_size"]).T.numpy()
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    reader = qlinear_torch_zp if packing in ("gptq", "auto_round:auto_gptq") else qlinear_torch
    layer = reader.QuantLinear(config["bits"], config["group_size"], 1536, 576, bias=False, weight_dtype=torch.float16)
    layer.qweight, layer.qzeros, layer.scales = qweight, qzeros, scales
    return layer(torch.eye(1536, dtype=torch.float16)).T.numpy()


@needs_model
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("form", "bits", "sym"),
    [
        ("auto_gptq", 3, True),
        ("auto_round:auto_gptq", 4, False),
        ("auto_round", 4, False),
        ("auto_round", 2, False),
        ("auto_awq", 4, False),
    ],
)
def test_every_scalar_is_what_auto_round_reads(tmp_path, form, bits, sym):
    folder = export(tmp_path, form, bits, sym)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= safetensors.load_file(path)
    for number in range(len(LAYERS)):
        checkpoint, matrix = open_matrix(folder, down(number))
        found = matrix.dequantise(0, 576)
        expected = dequantise(stored, down(number).removesuffix(".weight"), config)
        assert np.array_equal(found.astype(np.float16), expected)
        compare_cells(checkpoint, matrix, found)
