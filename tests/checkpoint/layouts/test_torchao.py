"""torchao, on files that it writes. Its int4 needs a GPU library, so int4 is tested by hand, as mslk packs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import down
from numpy.typing import NDArray
from quantised_files import (
    LAYERS,
    SHARD,
    SUPER,
    differ_once,
    find_super,
    needs_model,
    open_matrix,
    read_down,
    read_matrix,
    refuse_matrix,
    refuse_values,
    set_nearest,
    write_arrays,
    write_config,
)

from swsurgery.checkpoint.layouts.find import make_reader

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao, when it is imported

CONFIG = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
FORMS = ["int8", "int8 per tensor", "float8", "float8 per tensor", "int4 in bytes", "int3 in bytes, asymmetric"]


def make_config(form: str):
    """The configuration of torchao for one of FORMS."""
    api = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    asymmetric = {"mapping_type": api.MappingType.ASYMMETRIC}
    return {
        "int8": lambda: api.Int8WeightOnlyConfig(version=2),
        "int8 per tensor": lambda: api.Int8WeightOnlyConfig(version=2, granularity=api.PerTensor()),
        "float8": lambda: api.Float8WeightOnlyConfig(),
        "float8 per tensor": lambda: api.Float8WeightOnlyConfig(granularity=api.PerTensor()),
        "int4 in bytes": lambda: api.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=api.PerGroup(32)),
        "int3 in bytes, asymmetric": lambda: api.IntxWeightOnlyConfig(
            weight_dtype=torch.int3, granularity=api.PerGroup(64), **asymmetric
        ),
    }[form]()


def quantise(folder: Path, form: str, layers=LAYERS) -> dict[int, torch.Tensor]:
    """Save layers of SmolLM2 as torchao does, and return what torchao's own tensors dequantise to."""
    quantisation, config = pytest.importorskip("torchao.quantization", exc_type=ImportError), make_config(form)
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    state, values = {}, {}
    for layer in layers:
        module = torch.nn.Sequential(torch.nn.Linear(1536, 576, bias=False, dtype=torch.bfloat16))
        module[0].weight.data = torch.from_numpy(read_down(layer).copy()).bfloat16()
        quantisation.quantize_(module, config)
        state[down(layer)] = module[0].weight
        values[layer] = module[0].weight.dequantize()
    tensors, metadata = support.flatten_tensor_state_dict(state)
    from safetensors.torch import save_file

    write_config(folder, CONFIG)
    save_file(tensors, folder / SHARD, metadata)
    return values


def load(folder: Path, layer: int) -> torch.Tensor:
    """The weight that torchao makes of a file."""
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(folder / SHARD, "pt") as file:
        state, _ = unflatten_tensor_state_dict({k: file.get_tensor(k) for k in file.keys()}, file.metadata())  # noqa: SIM118
    return state[down(layer)].dequantize()


def round_like(values: NDArray[np.float64], form: str) -> torch.Tensor:
    """Round as torchao does: through float32 if the scales are float32, and then to bfloat16."""
    rounded = torch.from_numpy(values)
    return (rounded if "in bytes" in form else rounded.float()).bfloat16()


@needs_model
@pytest.mark.parametrize("form", FORMS)
def test_every_scalar_is_what_torchao_computes(tmp_path, form):
    expected = quantise(tmp_path, form)
    for layer in LAYERS:
        _, found = read_matrix(tmp_path, down(layer))
        assert torch.equal(round_like(found, form), expected[layer])
    find_super(tmp_path)


@needs_model
@pytest.mark.parametrize("form", ["float8", "int3 in bytes, asymmetric"])
def test_the_nearest_code_changes_one_scalar(tmp_path, form):
    folder = tmp_path / "model"
    before = quantise(folder, form, layers=(11,))[11].float().numpy()
    for number, place in enumerate([SUPER, (0, 0), (575, 1535)]):
        grid = np.array(open_matrix(folder, down(11))[1].find_cell(place).values)
        grid = grid[np.isfinite(grid)]
        wanted = float(0.3 * grid.min() + 0.7 * grid.max())
        value = set_nearest(folder, tmp_path / f"copy{number}", down(11), place, wanted)
        after = load(tmp_path / f"copy{number}", 11).float().numpy()
        assert abs(value - wanted) == abs(grid - wanted).min()
        assert after[place] == round_like(np.array(value), form).float() and differ_once(before, after, place)


WEIGHT = down(0)
MODULE = WEIGHT.removesuffix(".weight")
RANDOM = np.random.default_rng(2)
INT8 = {
    "qdata": RANDOM.integers(-128, 128, (6, 8)).astype(np.int8),
    "scale": RANDOM.uniform(0.1, 1, (6, 2)).astype(np.float32),
    "zero_point": RANDOM.integers(-9, 9, (6, 2)).astype(np.int8),
}
INT4_CODES = RANDOM.integers(-8, 8, (6, 8))
INT4 = {
    "qdata": (INT4_CODES[:, ::2] & 15 | INT4_CODES[:, 1::2] << 4).astype(np.int8),
    "scale": RANDOM.uniform(0.1, 1, (2, 6)).astype(np.float16),
    "zero_point": RANDOM.normal(0, 1, (2, 6)).astype(np.float16),
}


def describe(kind: str, arrays: dict[str, NDArray | None], **attributes: object) -> dict[str, object]:
    return {
        "_type": kind,
        "_data": {"block_size": [1, 4], **attributes},
        "_tensor_data_names": [name for name, array in arrays.items() if array is not None],
    }


def write_small(folder: Path, arrays: dict[str, NDArray | None], document: object, config=CONFIG) -> Path:
    text = document if isinstance(document, str) else json.dumps(document)
    named = {f"{MODULE}._weight_{name}": array for name, array in arrays.items() if array is not None}
    metadata = {"tensor_names": json.dumps([WEIGHT])} | ({} if document is None else {WEIGHT: text})
    return write_arrays(folder, named, config, metadata)


def test_int8_with_zero_points(tmp_path):
    _, matrix = open_matrix(write_small(tmp_path, INT8, describe("Int8Tensor", INT8)), WEIGHT)
    whole = INT8["qdata"].astype(float) - INT8["zero_point"].repeat(4, 1)
    assert np.array_equal(matrix.dequantise(0, 6), whole * INT8["scale"].repeat(4, 1))
    assert matrix.layout == "torchao I8, blocks of 1 x 4"


def test_codes_beyond_the_target_have_no_value(tmp_path):
    target = {"_type": "torch.dtype", "_data": "int4"}
    document = describe("IntxUnpackedToInt8Tensor", INT8, target_dtype=target)
    _, matrix = open_matrix(write_small(tmp_path, INT8, document), WEIGHT)
    found, codes = matrix.dequantise(0, 6), INT8["qdata"]
    assert np.array_equal(np.isfinite(found), (codes >= -8) & (codes < 8))
    assert len(matrix.find_cell((0, 0)).grid) == 16


def test_plain_int4_is_code_times_scale_plus_zero_point(tmp_path):
    document = describe("Int4Tensor", INT4, shape=[6, 8])
    checkpoint, matrix = open_matrix(write_small(tmp_path, INT4, document), WEIGHT)
    scales, zeros = (INT4[name].astype(float).T.repeat(4, 1) for name in ("scale", "zero_point"))
    expected = INT4_CODES * scales + zeros
    assert np.array_equal(matrix.dequantise(0, 6), expected)
    assert np.array_equal(matrix.dequantise(2, 5), expected[2:5])
    for place in np.ndindex(6, 8):
        cell = matrix.find_cell(place)
        assert cell.values[cell.read_code(make_reader(checkpoint))] == expected[place]
    assert matrix.layout == "torchao int4, groups of 4"


def change(arrays: dict[str, NDArray], **changed: NDArray | None) -> dict[str, NDArray | None]:
    return arrays | changed


SPARE = change(INT8, act_pre_scale=np.ones(8, np.float32))
INTX = "IntxUnpackedToInt8Tensor"
BAD: dict[str, tuple[dict[str, NDArray | None], object, str]] = {
    "no entry": (INT8, None, "the header does not describe"),
    "no JSON": (INT8, "{Int8Tensor}", "JSON"),
    "deep JSON": (INT8, "[" * 100000, "JSON|commas|bytes"),
    "a list": (INT8, ["Int8Tensor"], "JSON"),
    "a kernel's order": (INT8, describe("Int4TilePackedTo4dTensor", INT8), "which is not read"),
    "a class that is no text": (INT8, describe("", INT8) | {"_type": ["Int8Tensor"]}, "which is not read"),
    "an unknown attribute": (INT8, describe("Int8Tensor", INT8, rotation=1), "attributes of .* are not the known"),
    "attributes that are a list": (INT8, describe("Int8Tensor", INT8) | {"_data": [1]}, "are not the known ones"),
    "an unknown part": (SPARE, describe("Int8Tensor", SPARE), "the parts of .* are not the known ones"),
    "a part without an entry": (
        SPARE,
        describe("Int8Tensor", INT8),
        "may change what the codes mean",
    ),
    "zero points without an entry": (
        INT8,
        describe("Int8Tensor", change(INT8, zero_point=None)),
        "may change what the codes mean",
    ),
    "parts that are no list": (INT8, describe("Int8Tensor", INT8) | {"_tensor_data_names": 3}, "parts of"),
    "a part that is not stored": (change(INT8, zero_point=None), describe("Int8Tensor", INT8), "is not stored"),
    "no scales": (change(INT8, scale=None), describe("Int8Tensor", INT8), "is not stored"),
    "integer scales": (
        change(INT8, scale=np.ones((6, 2), np.int8)),
        describe("Int8Tensor", INT8),
        "is not a floating-point dtype",
    ),
    "blocks that are no list": (INT8, describe("Int8Tensor", INT8, block_size=4), "not two positive integers"),
    "blocks of 0": (INT8, describe("Int8Tensor", INT8, block_size=[1, 0]), "not two positive integers"),
    "three axes": (INT8, describe("Int8Tensor", INT8, block_size=[1, 1, 4]), "not two positive integers"),
    "other blocks": (INT8, describe("Int8Tensor", INT8, block_size=[1, 8]), "does not fit blocks of 1 x 8"),
    "uneven blocks": (INT8, describe("Int8Tensor", INT8, block_size=[1, 3]), "does not fit blocks of 1 x 3"),
    "another zero point": (
        change(INT8, zero_point=np.zeros((6, 1), np.int8)),
        describe("Int8Tensor", INT8),
        "does not fit blocks of 1 x 4",
    ),
    "zero points of floats": (
        change(INT8, zero_point=np.zeros((6, 2), np.float32)),
        describe("Int8Tensor", INT8),
        "not as I8",
    ),
    "floats of 8 bits in integers": (INT8, describe("Float8Tensor", INT8), "which does not fit Float8Tensor"),
    "codes without an axis": (
        change(INT8, qdata=INT8["qdata"].reshape(-1)),
        describe("Int8Tensor", INT8),
        "is not a matrix",
    ),
    "no target": (INT8, describe(INTX, INT8), "the target_dtype of .* is not int1 to int8"),
    "another target": (INT8, describe(INTX, INT8, target_dtype={"_data": "uint4"}), "is not int1 to int8"),
    "int4 of another shape": (INT4, describe("Int4Tensor", INT4, shape=[6, 16]), "do not fit Int4Tensor"),
    "int4 without zero points": (
        change(INT4, zero_point=None),
        describe("Int4Tensor", change(INT4, zero_point=None)),
        "do not fit Int4Tensor",
    ),
    "int4 with scales by row": (
        change(INT4, scale=INT4["scale"].T),
        describe("Int4Tensor", INT4),
        "does not fit groups of 4 in 6 x 8",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_not_read(tmp_path, name):
    arrays, document, message = BAD[name]
    refuse_matrix(write_small(tmp_path, arrays, document), WEIGHT, message)


@pytest.mark.parametrize(("kind", "arrays"), [("Int8Tensor", INT8), ("Int4Tensor", INT4)])
def test_scales_that_are_not_finite_are_not_used(tmp_path, kind, arrays):
    arrays = change(arrays, scale=arrays["scale"] * arrays["scale"].dtype.type(np.inf))
    refuse_values(write_small(tmp_path, arrays, describe(kind, arrays)), WEIGHT, "not finite")


def test_another_method_is_another_layout(tmp_path):
    folder = write_small(tmp_path, INT8, describe("Int8Tensor", INT8), {"quant_method": "other"})
    refuse_matrix(folder, WEIGHT, "is quantised")
