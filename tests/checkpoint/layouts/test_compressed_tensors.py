"""The formats of compressed-tensors, in files that the library writes from real weights, against its own values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import down
from layout_files import compare, compare_super, read_weights, write_tensors
from quantised_files import LAYERS, differ_once, only_with_model, open_matrix, set_nearest
from safetensors.torch import load_file

pytest.importorskip("compressed_tensors")
from compressed_tensors import compressors, quantization
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.helpers import maybe_pad_tensor_for_block_quant

from swsurgery.verifying.verify import verify

pytestmark = only_with_model

GROUP = {"strategy": "group", "group_size": 128}
CHANNEL, TENSOR = {"strategy": "channel"}, {"strategy": "tensor"}
BLOCK = {"strategy": "block", "block_structure": [128, 128]}
ZEROS = {"symmetric": False}
FLOAT = {"type": "float", "num_bits": 8}
ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}

CASES: dict[str, tuple[str, dict]] = {
    **{f"{bits} bits": ("pack-quantized", {"num_bits": bits, **GROUP, **ZEROS}) for bits in range(1, 9)},
    "4 bits, symmetric": ("pack-quantized", {"num_bits": 4, **GROUP}),
    "3 bits, one scale a row": ("pack-quantized", {"num_bits": 3, **CHANNEL}),
    "5 bits, one scale a row, zeros": ("pack-quantized", {"num_bits": 5, **CHANNEL, **ZEROS}),
    "4 bits, one scale": ("pack-quantized", {"num_bits": 4, **TENSOR}),
    "4 bits, one scale and zero": ("pack-quantized", {"num_bits": 4, **TENSOR, **ZEROS}),
    "int8, rows": ("int-quantized", {"num_bits": 8, **CHANNEL}),
    "int8, rows, zeros": ("int-quantized", {"num_bits": 8, **CHANNEL, **ZEROS}),
    "int8, groups, zeros": ("int-quantized", {"num_bits": 8, **GROUP, **ZEROS}),
    "int8, one scale": ("int-quantized", {"num_bits": 8, **TENSOR}),
    "int8, blocks": ("int-quantized", {"num_bits": 8, **BLOCK}),
    "int4 in int8": ("naive-quantized", {"num_bits": 4, **GROUP}),
    "FP8, one scale": ("float-quantized", {**FLOAT, **TENSOR}),
    "FP8, rows": ("float-quantized", {**FLOAT, **CHANNEL}),
    "FP8, groups": ("naive-quantized", {**FLOAT, **GROUP}),
    "FP8, blocks": ("float-quantized", {**FLOAT, **BLOCK}),
    "FP8, rows, zeros": ("float-quantized", {**FLOAT, **CHANNEL, **ZEROS}),
    "NVFP4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": "float8_e4m3fn"},
    ),
    "MXFP4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "uint8"},
    ),
    "MXFP8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "uint8"},
    ),
}  # fmt: skip
"""Name -> (format, arguments of the weights)."""


def measure_ranges(weight: torch.Tensor, args) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest weight of each block that shares a scale."""
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "block":
        padded = maybe_pad_tensor_for_block_quant(weight, tuple(args.block_structure))
        rows, cols = (n // size for n, size in zip(padded.shape, args.block_structure, strict=True))
        tiles = padded.reshape(rows, args.block_structure[0], cols, args.block_structure[1])
        return tiles.amin((1, 3)), tiles.amax((1, 3))
    grouped = weight.unflatten(-1, (-1, args.group_size))
    return grouped.amin(-1), grouped.amax(-1)


class Holder(torch.nn.Module):
    """A model that consists of the three down projections under their real names."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        layers = torch.nn.ModuleDict()
        for layer in LAYERS:
            weight = weights[down(layer)]
            linear = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
            linear.weight.data = weight
            layers[str(layer)] = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"down_proj": linear})})
        self.model = torch.nn.ModuleDict({"layers": layers})


def quantise(folder: Path, form: str, arguments: dict, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Quantise the three matrices with the library, and save them as its compressor does."""
    model = Holder(read_weights(dtype))
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(**arguments),
        input_activations=quantization.QuantizationArgs(**ACTIVATIONS) if form == "int-quantized" else None,
        format=form,
    )
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(config_groups={"group_0": scheme}), show_progress=False
    )
    for module in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        fill_parameters(module, scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    write_tensors(folder, model.state_dict())
    compressor.update_config(str(folder))
    return folder


def fill_parameters(module: torch.nn.Linear, args) -> None:
    """Compute the scales and the zero points of a module with the library."""
    smallest, largest = measure_ranges(module.weight.data, args)
    overall = None
    if args.strategy == "tensor_group":
        overall = generate_gparam(module.weight.data.amin(), module.weight.data.amax())
        module.weight_global_scale.data = overall
    scale, zero = calculate_qparams(smallest, largest, args, global_scale=overall)
    module.weight_scale.data = scale.to(module.weight_scale.dtype)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)


def decompress(folder: Path, weight: str) -> torch.Tensor:
    """Dequantise a stored matrix with the library, as it does while it loads a model."""
    module = weight.removesuffix("weight")
    tensors = load_file(folder / "model.safetensors")
    state = {name.removeprefix(module): t for name, t in tensors.items() if name.startswith(module)}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    [group] = config["config_groups"].values()
    scheme = quantization.QuantizationScheme.model_validate(group)
    form = group["format"] or config["format"]
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    return compressor.decompress(state, scheme)["weight"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_every_scalar_is_what_the_library_computes(case, tmp_path):
    form, arguments = CASES[case]
    single = arguments.get("symmetric") is False and arguments.get("type") == "float"
    folder = quantise(tmp_path / "made", form, arguments, torch.float32 if single else torch.bfloat16)
    for layer in LAYERS:
        expected = decompress(folder, down(layer))
        assert torch.isfinite(expected).all() and expected.count_nonzero() > 1000
        matrix = compare(folder, down(layer), expected, torch.float32)
    assert form in matrix.layout
    compare_super(folder, decompress(folder, down(11)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["3 bits", "7 bits", "4 bits, symmetric", "int8, rows, zeros", "FP8, blocks",
                                  "NVFP4", "MXFP4", "MXFP8"])  # fmt: skip
def test_the_nearest_code_changes_one_scalar_for_the_library(case, tmp_path):
    folder = quantise(tmp_path / "made", *CASES[case])
    weight = down(11)
    _, matrix = open_matrix(folder, weight)
    before = decompress(folder, weight)
    for index in ((507, 1229), (0, 10), (575, 1535)):
        grid = matrix.find_cell(index).grid
        wanted = 0.3 * grid[0][0] + 0.7 * grid[-1][0]
        copy = tmp_path / f"edited {index}"
        value = set_nearest(folder, copy, weight, index, wanted)
        assert abs(value - wanted) == min(abs(v - wanted) for v, _ in grid)
        after = decompress(copy, weight)
        assert after[index] == torch.tensor(value).to(torch.float32).to(after.dtype)
        assert differ_once(before.float().numpy(), after.float().numpy(), index) or before[index] == after[index]


@pytest.mark.filterwarnings("ignore")
def test_files_of_modelopt_are_what_the_converter_makes_of_them(tmp_path):
    """The global scale becomes a power of two, so that its inverse, which ModelOpt stores, is exact."""
    folder = quantise(tmp_path / "made", *CASES["NVFP4"])
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("weight_global_scale")]:
        tensors[name] = torch.exp2(torch.floor(torch.log2(tensors[name])))
    modules = [name.removesuffix("weight_packed") for name in tensors if name.endswith("weight_packed")]
    renamed = {
        module + new: tensors[module + old]
        for module in modules
        for old, new in (("weight_packed", "weight"), ("weight_scale", "weight_scale"))
    }
    renamed |= {f"{module}weight_scale_2": 1 / tensors[f"{module}weight_global_scale"] for module in modules}
    other = write_tensors(tmp_path / "modelopt", renamed, {"quant_method": "modelopt", "quant_algo": "NVFP4"})

    converted = ModelOptNvfp4Converter(targets=["Linear"]).process(load_file(other / "model.safetensors"))
    assert set(converted) == set(tensors)
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**CASES["NVFP4"][1])
    )
    compressor = compressors.BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    for module in modules:
        state = {last: converted[module + last] for last in ("weight_packed", "weight_scale", "weight_global_scale")}
        compare(other, f"{module}weight", compressor.decompress(state, scheme)["weight"], torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_verify_reads_the_known_super_weights(tmp_path):
    folder = quantise(tmp_path / "made", *CASES["8 bits"])
    survival = verify(folder, known=True, model="HuggingFaceTB/SmolLM2-135M-Instruct").known
    states = {(*c.index, c.state) for c in survival.coordinates if c.tensor == down(11)}
    assert (507, 1229, "kept") in states and not math.isnan(survival.coordinates[0].stored)
