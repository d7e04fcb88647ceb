"""bitsandbytes, on files that it and transformers write, compared with its own dequantisation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import down
from numpy.typing import NDArray
from quantised_files import (
    LAYERS,
    MODEL,
    SHARD,
    SUPER,
    differ_once,
    find_super,
    needs_model,
    open_matrix,
    read_down,
    read_matrix,
    refuse_matrix,
    set_nearest,
    write_arrays,
    write_config,
)

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.find import find_matrix, make_reader
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main
from swsurgery.verifying.stored_weight import read_weight

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of bitsandbytes, when it is imported and called

FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def quantise(folder: Path, form: dict, layers=LAYERS) -> Path:
    """Layers of SmolLM2 in 4 bits, saved as the state of bitsandbytes' own module."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    options = {"quant_type": form["kind"], "compress_statistics": form["nested"], "quant_storage": form["storage"]}
    stored = {}
    for layer in layers:
        module = bitsandbytes.nn.Linear4bit(1536, 576, bias=False, **options)
        weight = torch.from_numpy(read_down(layer).copy()).to(form["dtype"])
        module.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, blocksize=form["block"], **options)
        name = down(layer).removesuffix("weight")
        stored |= {name + key: value for key, value in module.to("cpu").state_dict().items()}
    write_config(folder, FOUR_BITS | {"bnb_4bit_quant_type": form["kind"]})
    safetensors.save_file(stored, folder / SHARD, {"format": "pt"})
    return folder


def dequantise(folder: Path, layer: int) -> torch.Tensor:
    """The weight that bitsandbytes computes from a file, in the dtype that the file declares."""
    from bitsandbytes import functional

    stored = safetensors.load_file(folder / SHARD)
    prefix = f"{down(layer)}."
    state = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    return functional.dequantize_4bit(stored[down(layer)], functional.QuantState.from_dict(state, torch.device("cpu")))


def round_like(values: NDArray[np.float64], dtype: torch.dtype) -> torch.Tensor:
    """Round as bitsandbytes does: the product to float32, and then to the dtype of the weight."""
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


FORMS = [
    {"kind": "nf4", "nested": False, "storage": torch.uint8, "dtype": torch.bfloat16, "block": 64},
    {"kind": "nf4", "nested": True, "storage": torch.bfloat16, "dtype": torch.float16, "block": 64},
    {"kind": "nf4", "nested": True, "storage": torch.float32, "dtype": torch.float32, "block": 128},
    {"kind": "fp4", "nested": False, "storage": torch.float16, "dtype": torch.float32, "block": 256},
    {"kind": "fp4", "nested": True, "storage": torch.uint8, "dtype": torch.bfloat16, "block": 512},
]


@needs_model
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(str(option) for option in form.values()))
def test_every_scalar_is_what_bitsandbytes_computes(tmp_path, form):
    folder = quantise(tmp_path / "model", form)
    for layer in LAYERS:
        _, found = read_matrix(folder, down(layer))
        expected = dequantise(folder, layer)
        assert expected.dtype == form["dtype"]
        assert torch.equal(round_like(found, form["dtype"]), expected)
    find_super(folder)


@needs_model
@pytest.mark.parametrize("form", FORMS[1:4:2], ids=str)
def test_the_nearest_code_changes_one_scalar(tmp_path, form):
    folder = quantise(tmp_path / "model", form, layers=(11,))
    before = dequantise(folder, 11).float().numpy()
    for number, place in enumerate([SUPER, (0, 0), (575, 1535)]):
        wanted = float(before[place] * 0.4)
        value = set_nearest(folder, tmp_path / f"copy{number}", down(11), place, wanted)
        after = dequantise(tmp_path / f"copy{number}", 11).float().numpy()
        grid = np.array(open_matrix(folder, down(11))[1].find_cell(place).values)
        assert abs(value - wanted) == abs(grid - wanted).min() and value in grid
        assert after[place] == round_like(np.array(value), form["dtype"]).float() and differ_once(before, after, place)


@needs_model
def test_a_model_that_transformers_saves_has_its_super_weights(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    skipped = ["lm_head", *(f"model.layers.{layer}" for layer in range(30) if layer not in LAYERS)]
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skipped
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["verify", str(tmp_path), "--known", "--model", "smollm2-135m-instruct", "--json"]) in (0, 1)
    known = json.loads(capsys.readouterr().out)["known"]["coordinates"]
    found = next(entry for entry in known if entry["id"] == "L11.507.1229")
    assert abs(found["stored"] - 5.875) < 1 and found["tensor"] == down(11)
    assert not [entry for entry in known if entry["state"] == "unreadable"]
    found = open_matrix(tmp_path, down(11))[1].dequantise(0, 576)
    assert torch.equal(round_like(found, torch.bfloat16), dequantise(tmp_path, 11).to(torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_gpt_2_is_read_by_row_and_col(tmp_path, bits):
    """transformers replaces Conv1D, which stores [col, row], by a linear layer, which stores [row, col]."""
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "n_embd": 64, "n_inner": 128, "n_layer": 1, "n_head": 2, "n_positions": 64}
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    plain.save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "coded")
    checkpoint = open_checkpoint(tmp_path / "coded")
    for row, col in ((3, 100), (60, 7), (0, 0)):
        at = projections.locate(checkpoint.config, checkpoint.weight_shapes, layer=0, row=row, col=col)
        expected = float(plain.transformer.h[0].mlp.c_proj.weight[col, row])
        stored = read_weight(checkpoint, at)
        assert abs(stored.value - expected) <= stored.step


@needs_model
def test_eight_bits_are_what_bitsandbytes_computes(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    stored = {}
    for layer in LAYERS:
        module = bitsandbytes.nn.Linear8bitLt(1536, 576, bias=False, has_fp16_weights=False)
        weight = torch.from_numpy(read_down(layer).copy()).half()
        module.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        name = down(layer).removesuffix("weight")
        stored |= {name + key: value for key, value in module.to("cpu").state_dict().items()}
    write_config(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    safetensors.save_file(stored, tmp_path / SHARD, {"format": "pt"})
    for layer in LAYERS:
        _, found = read_matrix(tmp_path, down(layer))
        module = down(layer).removesuffix("weight")
        expected = bitsandbytes.functional.int8_vectorwise_dequant(stored[down(layer)], stored[f"{module}SCB"])
        # bitsandbytes multiplies by 1/127 in float32, which is rounded; two roundings follow.
        assert np.allclose(found, expected.double(), rtol=2e-7, atol=0)
    find_super(tmp_path)


WEIGHT = down(0)
ROWS, COLS = 6, 32
STATE: dict[str, object] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [ROWS, COLS]}
NESTED: dict[str, object] = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
NF4 = np.array(
    [
        -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ],
    np.float32,
)  # fmt: skip


def encode(state: object) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def make_small() -> dict[str, NDArray]:
    random = np.random.default_rng(5)
    return {
        "": random.integers(0, 256, (ROWS * COLS // 2, 1), np.uint8),
        ".absmax": np.array([1, 0.5, 3], np.float32),
        ".quant_map": NF4,
        ".quant_state.bitsandbytes__nf4": encode(STATE),
    }


SMALL = make_small()
DOUBLE = SMALL | {
    ".absmax": np.array([0, 255, 7], np.uint8),
    ".nested_absmax": np.array([0.25], np.float32),
    ".nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32),
    ".quant_state.bitsandbytes__nf4": encode(STATE | NESTED),
}


def write_small(folder: Path, arrays: dict[str, NDArray | None], config: dict[str, object] = FOUR_BITS) -> Path:
    return write_arrays(folder, {WEIGHT + k: v for k, v in arrays.items() if v is not None}, config)


@pytest.mark.parametrize("config", [FOUR_BITS, {"load_in_4bit": True}, FOUR_BITS | {"bnb_4bit_quant_type": "nf4"}])
def test_the_first_code_of_a_byte_is_in_the_high_bits(tmp_path, config):
    checkpoint, matrix = open_matrix(write_small(tmp_path, SMALL, config), WEIGHT)
    data = SMALL[""].reshape(-1)
    codes = [code for byte in data.tolist() for code in (byte >> 4, byte & 15)]
    scales = [1.0] * 64 + [0.5] * 64 + [3.0] * 64
    expected = np.array([float(NF4[c]) * s for c, s in zip(codes, scales, strict=True)]).reshape(ROWS, COLS)
    assert np.array_equal(matrix.dequantise(0, ROWS), expected)
    assert np.array_equal(matrix.dequantise(3, 4), expected[3:4])
    cell = matrix.find_cell((5, 31))
    assert cell.read_code(make_reader(checkpoint)) == codes[-1] and cell.scale == 3
    assert matrix.layout == "bitsandbytes NF4, blocks of 64"


def test_nested_scales_are_computed_in_float32(tmp_path):
    _, matrix = open_matrix(write_small(tmp_path, DOUBLE), WEIGHT)
    table = DOUBLE[".nested_quant_map"]
    expected = [float(table[c] * np.float32(0.25) + np.float32(0.5)) for c in (0, 255, 7)]
    assert [matrix.find_cell((row, 0)).scale for row in (0, 2, 4)] == expected
    assert matrix.layout == "bitsandbytes NF4, blocks of 64, nested scales"


def change(arrays: dict[str, NDArray], **changed: object) -> dict[str, NDArray | None]:
    """Other tensors of a module, or another JSON (`state`)."""
    names = {"weight": "", "state": ".quant_state.bitsandbytes__nf4"}
    return arrays | {names.get(k, f".{k}"): encode(v) if k == "state" else v for k, v in changed.items()}


BAD: dict[str, tuple[dict[str, NDArray | None], str]] = {
    "another type in the name": (SMALL | {".quant_state.bitsandbytes__fp4": encode(STATE)}, "stored as nf4 and as fp4"),
    "another type in the JSON": (change(SMALL, state=STATE | {"quant_type": "fp4"}), "quant_type in"),
    "no JSON": (SMALL | {".quant_state.bitsandbytes__nf4": np.frombuffer(b"{nf4}", np.uint8)}, "JSON"),
    "deep JSON": (
        SMALL | {".quant_state.bitsandbytes__nf4": np.frombuffer(b"[" * 4000, np.uint8)},
        "JSON",
    ),
    "a list": (change(SMALL, state=[STATE]), "JSON"),
    "NaN": (change(DOUBLE, state=STATE | NESTED | {"nested_offset": float("nan")}), "JSON"),
    "long JSON": (
        SMALL | {".quant_state.bitsandbytes__nf4": np.full(5000, 32, np.uint8)},
        "does not contain a text of at most",
    ),
    "another key": (change(SMALL, state=STATE | {"axis": 1}), "are not the known ones"),
    "a missing key": (change(SMALL, state={"quant_type": "nf4"}), "are not the known ones"),
    "half of the nested keys": (change(DOUBLE, state=STATE | {"nested_offset": 1}), "are not the known ones"),
    "another table": (change(SMALL, quant_map=NF4[::-1].copy()), "is not the table of NF4"),
    "a short table": (change(SMALL, quant_map=NF4[:8]), "not 16 F32"),
    "no table": (change(SMALL, quant_map=None), "quant_map is not stored"),
    "no scales": (change(SMALL, absmax=None), "absmax is not stored"),
    "too few scales": (change(SMALL, absmax=np.ones(2, np.float32)), "not 3 F32"),
    "float16 scales": (change(SMALL, absmax=np.ones(3, np.float16)), "not 3 F32"),
    "another tensor": (change(SMALL, offset=NF4), "may change what the codes mean"),
    "a vector": (change(SMALL, state=STATE | {"shape": [ROWS * COLS]}), "is not that of a matrix"),
    "a negative shape": (change(SMALL, state=STATE | {"shape": [-ROWS, -COLS]}), "is not that of a matrix"),
    "a shape of flags": (change(SMALL, state=STATE | {"shape": [True, ROWS * COLS]}), "is not that of a matrix"),
    "another shape": (change(SMALL, state=STATE | {"shape": [ROWS, 64]}), "which do not fit the shape"),
    "blocks of 0": (change(SMALL, state=STATE | {"blocksize": 0}), "is not a block size"),
    "blocks of text": (change(SMALL, state=STATE | {"blocksize": "64"}), "is not a block size"),
    "unhashable blocks": (change(SMALL, state=STATE | {"blocksize": [64]}), "is not a block size"),
    "nested scales without JSON": (change(DOUBLE, state=STATE), "only a part of the nested scales"),
    "nested scales without table": (change(DOUBLE, nested_quant_map=None), "only a part of the nested scales"),
    "nested scales without scales": (change(DOUBLE, nested_absmax=None), "only a part of the nested scales"),
    "nested float16": (change(DOUBLE, state=STATE | NESTED | {"nested_dtype": "float16"}), "are not float32"),
    "an offset of text": (change(DOUBLE, state=STATE | NESTED | {"nested_offset": "1"}), "are not float32"),
    "nested blocks of 3": (change(DOUBLE, state=STATE | NESTED | {"nested_blocksize": 3}), "is not a block size"),
    "nested codes of floats": (change(DOUBLE, absmax=np.ones(3, np.float32)), "not 3 U8"),
    "too many nested scales": (change(DOUBLE, nested_absmax=np.ones(2, np.float32)), "not 1 F32"),
}


def test_a_stack_of_experts_is_refused_with_the_reason(tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    folder = write_arrays(tmp_path, {name + ending: array for ending, array in SMALL.items()}, FOUR_BITS)
    refuse_matrix(folder, name, "stores several experts in 4 bits, and only matrices are read")


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_not_read(tmp_path, name):
    arrays, message = BAD[name]
    refuse_matrix(write_small(tmp_path, arrays), WEIGHT, message)


@pytest.mark.parametrize("config", [{"quant_method": "other"}, FOUR_BITS | {"bnb_4bit_quant_type": "fp4"}])
def test_a_config_that_declares_something_else_is_not_overruled(tmp_path, config):
    with pytest.raises(CannotTell):
        find_matrix(open_checkpoint(write_small(tmp_path, SMALL, config)), WEIGHT)


@pytest.mark.parametrize(
    "arrays",
    [
        change(SMALL, absmax=np.array([np.inf, np.nan, 1], np.float32)),
        change(DOUBLE, nested_absmax=np.array([np.inf], np.float32)),
        change(DOUBLE, state=STATE | NESTED | {"nested_offset": 1e300}),
    ],
)
def test_scales_that_are_not_finite_are_not_used(tmp_path, arrays):
    _, matrix = open_matrix(write_small(tmp_path, arrays), WEIGHT)
    with pytest.raises(CannotTell, match="not finite"):
        matrix.find_cell((0, 0))
    with pytest.raises(CannotTell, match="not finite"):
        matrix.dequantise(0, ROWS)


def test_eight_bits_that_are_turned_are_not_read(tmp_path):
    module = WEIGHT.removesuffix("weight")
    for number, form in enumerate((0, 1)):
        arrays = {
            WEIGHT: np.ones((4, 8), np.int8),
            f"{module}SCB": np.ones(4, np.float32),
            f"{module}weight_format": np.array(form, np.uint8),
        }
        folder = write_arrays(tmp_path / str(number), arrays, {"quant_method": "bitsandbytes", "load_in_8bit": True})
        if form == 0:
            assert (open_matrix(folder, WEIGHT)[1].dequantise(0, 4) == 1 / 127).all()
        else:
            with pytest.raises(CannotTell, match="not stored row by row"):
                find_matrix(open_checkpoint(folder), WEIGHT)
        shutil.rmtree(folder)
