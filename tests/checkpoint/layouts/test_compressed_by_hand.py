"""compressed-tensors in hand-written files: the padded packing of 2025, and every rule that refuses a weight."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Tensor, down, write_single
from hypothesis import given, settings
from hypothesis import strategies as st

from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.find import WeightShapes, find_matrix, make_reader
from swsurgery.checkpoint.opening import open_checkpoint

W = down(0)
M = W.removesuffix(".weight")


def pack(codes: np.ndarray, bits: int, padded: bool) -> np.ndarray:
    """Pack codes [rows, cols] along the rows into words, one Python integer for each row."""
    rows = []
    for row in codes.tolist():
        if padded:
            per = 32 // bits
            parts = [row[at : at + per] for at in range(0, len(row), per)]
            words = [sum(code << bits * place for place, code in enumerate(part)) for part in parts]
        else:
            stream = sum(code << bits * place for place, code in enumerate(row))
            words = [stream >> 32 * at & 0xFFFFFFFF for at in range(-(-len(row) * bits // 32))]
        rows.append(words)
    return np.array(rows, "<u4")


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.01, 1.0, shape).astype("<f4")


def stored(dtype: str, array: np.ndarray) -> Tensor:
    return dtype, array.shape, array.tobytes()


def declare(form: str, **weights: object) -> dict:
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", **weights}
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "quantization_status": "compressed", "ignore": ["lm_head"],
        }
    }  # fmt: skip


def packed_case(rows=6, cols=12, bits=4, padded=False, group=None, zeros=False, seed=0):
    """Return (tensors, config, values) of a packed matrix with random codes."""
    chosen = np.random.default_rng(seed)
    codes = chosen.integers(0, 1 << bits, (rows, cols))
    count = 1 if group is None else cols // group
    scales = floats(rows, count, seed=seed)
    points = chosen.integers(0, 1 << bits, (rows, count)) if zeros else np.full((rows, count), 1 << (bits - 1))
    tensors = {
        f"{M}.weight_packed": stored("I32", pack(codes, bits, padded)),
        f"{M}.weight_scale": stored("F32", scales),
        f"{M}.weight_shape": stored("I64", np.array([rows, cols], "<i8")),
    }
    if zeros:
        turned = np.ascontiguousarray(pack(points.T, bits, padded).T)
        tensors[f"{M}.weight_zero_point"] = stored("I32", turned)
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    spread = np.repeat(np.arange(count), cols if group is None else group)
    values = (codes - points[:, spread]) * scales.astype(np.float64)[:, spread]
    return tensors, declare("pack-quantized", num_bits=bits, symmetric=not zeros, **strategy), values


def read(folder: Path, tensors: dict, config: dict):
    checkpoint = open_checkpoint(write_single(folder, tensors, config))
    matrix = find_matrix(checkpoint, W)
    assert matrix is not None
    return checkpoint, matrix


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8), padded=st.booleans(), zeros=st.booleans(), rows=st.integers(1, 40),
    groups=st.integers(1, 5), size=st.integers(1, 40), grouped=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_packing_is_read(tmp_path_factory, bits, padded, zeros, rows, groups, size, grouped, seed):
    cols = groups * size
    tensors, config, values = packed_case(rows, cols, bits, padded, size if grouped else None, zeros, seed)
    folder = tmp_path_factory.mktemp("packed")
    lengths = [cols, rows] if zeros else [cols]
    same = all(-(-n * bits // 32) == -(-n // (32 // bits)) for n in lengths)
    if same and 32 % bits and max(lengths) > 32 // bits:
        with pytest.raises(CannotTell, match="it is unclear whether codes of"):
            read(folder, tensors, config)
        return
    checkpoint, matrix = read(folder, tensors, config)
    assert matrix.shape == (rows, cols) == WeightShapes(checkpoint)[W]
    assert np.array_equal(matrix.dequantise(0, rows), values)
    assert np.array_equal(matrix.dequantise(rows // 2, rows), values[rows // 2 :])
    reader = make_reader(checkpoint)
    for row in {0, rows // 2, rows - 1}:
        for col in {0, cols // 2, cols - 1}:
            cell = matrix.find_cell((row, col))
            assert cell.values[cell.read_code(reader)] == values[row, col]


def test_zero_points_that_are_not_packed_are_read(tmp_path):
    tensors, config, _ = packed_case()
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    points = np.arange(-3, 3, dtype="i1").reshape(6, 1)
    _, before = read(tmp_path / "before", *packed_case()[:2])
    scales = floats(6, 1).astype(np.float64)
    _, matrix = read(tmp_path / "after", {**tensors, f"{M}.weight_zero_point": stored("I8", points)}, config)
    codes = np.rint(before.dequantise(0, 6) / scales)
    assert np.array_equal(matrix.dequantise(0, 6), (codes - points) * scales)


@pytest.mark.parametrize("zeros", [False, True])
def test_columns_of_a_group_need_not_be_adjacent(zeros, tmp_path):
    """Quantised in sorted order and stored in the order of the weight: the group of a column is its number."""
    tensors, config, _ = packed_case(6, 24, group=4, zeros=zeros)
    order = np.random.default_rng(3).permutation(np.repeat(np.arange(6, dtype="<i4"), 4))
    tensors[f"{M}.weight_g_idx"] = stored("I32", order)
    _, plain = read(tmp_path / "plain", *packed_case(6, 24, group=4, zeros=zeros)[:2])
    checkpoint, matrix = read(tmp_path / "ordered", tensors, change(config, actorder="group"))
    codes = plain.codes.read_rows(0, 6).astype(np.float64) - 8
    scales, points = floats(6, 6).astype(np.float64), np.zeros((6, 6))
    if zeros:
        points = np.stack([plain.zeros.numbers.read_numbers(row, row + 1)[0] for row in range(6)])
    expected = (codes - points[:, order]) * scales[:, order]
    assert np.array_equal(matrix.dequantise(0, 6), expected)
    for col in range(24):
        cell = matrix.find_cell((4, col))
        assert cell.values[cell.read_code(make_reader(checkpoint))] == expected[4, col]


@pytest.mark.parametrize("order", [[0] * 12 + [1] * 12, [-1] * 24, [9] * 24, list(range(24))])
def test_an_order_of_columns_that_is_none_gives_no_value(order, tmp_path):
    tensors, config, _ = packed_case(6, 24, group=4)
    tensors[f"{M}.weight_g_idx"] = stored("I32", np.array(order, "<i4"))
    _, matrix = read(tmp_path, tensors, change(config, actorder="group"))
    with pytest.raises(CannotTell, match="does not assign 4 columns to each of 6 groups"):
        matrix.find_cell((0, 0))


def change(config: dict, **weights: object) -> dict:
    config = copy.deepcopy(config)
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(weights)
    return config


def change_top(config: dict, **keys: object) -> dict:
    return {"quantization_config": {**config["quantization_config"], **keys}}


def words(*numbers: int) -> Tensor:
    return stored("I64", np.array(numbers, "<i8"))


NAN = np.full((6, 1), np.nan, "<f4")
SCHEME = {"weights": {"num_bits": 4, "strategy": "channel"}}
REFUSED = {
    "no groups": ({}, lambda c: change_top(c, config_groups={}), "config_groups"),
    "groups that are a list": ({}, lambda c: change_top(c, config_groups=[1]), "config_groups"),
    "a preset": ({}, lambda c: change_top(c, config_groups={"W4A16": ["Linear"]}), "'W4A16'"),
    "an unknown format": ({}, lambda c: change_top(c, format="marlin-24"), "the format 'marlin-24'"),
    "a format that is a list": ({}, lambda c: change_top(c, format=["x"]), "the format"),
    "mixed formats without one for the group": ({}, lambda c: change_top(c, format="mixed-precision"), "the format"),
    "sparse": ({}, lambda c: change_top(c, sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask'"),
    "rotated": ({}, lambda c: change_top(c, transform_config={"config_groups": {"u": 1}}), "transform_config"),
    "ignored": ({}, lambda c: change_top(c, ignore=["lm_head", M]), "(ignore) says that"),
    "an unknown key": ({}, lambda c: change(c, swizzle="x"), "unknown key 'swizzle'"),
    "bits that are no number": ({}, lambda c: change(c, num_bits="4"), "num_bits"),
    "a strategy without a size": ({}, lambda c: change(c, strategy="group"), "group_size"),
    "an unknown strategy": ({}, lambda c: change(c, strategy="row"), "'row'"),
    "a block that is no pair": ({}, lambda c: change(c, strategy="block", block_structure=[1]), "block_structure"),
    "an unknown order": ({}, lambda c: change(c, actorder="magic"), "actorder 'magic'"),
    "groups in another order": ({}, lambda c: change(c, actorder="group"), "weight_g_idx is not stored"),
    "rows in another order": (
        {"weight_g_idx": stored("I32", np.zeros(12, "<i4"))}, lambda c: change(c, actorder="group"), "does not fit",
    ),
    "floats": ({}, lambda c: change(c, type="float"), "declared as float"),
    "nine bits": ({}, lambda c: change(c, num_bits=9), "9 bits"),
    "other bits": ({}, lambda c: change(c, num_bits=8), "does not fit 12 codes of 8 bits"),
    "another group": ({}, lambda c: change(c, strategy="group", group_size=4), "groups of 4"),
    "no zero points": ({}, lambda c: change(c, symmetric=False), "weight_zero_point is not stored"),
    "zero points of a symmetric weight": ({"weight_zero_point": stored("I32", np.zeros((1, 1), "<i4"))}, None, "zero"),
    "an index of groups": ({"weight_g_idx": stored("I32", np.zeros(12, "<i4"))}, None, "weight_g_idx"),
    "another scale": ({"pre_quant_scale": stored("F32", floats(12))}, None, "pre_quant_scale"),
    "no shape": ({"weight_shape": None}, None, "weight_shape is not stored"),
    "a shape of three": ({"weight_shape": words(6, 12, 1)}, None, "does not contain the shape"),
    "a shape of floats": ({"weight_shape": stored("F32", floats(2))}, None, "does not contain the shape"),
    "a shape that lies about rows": ({"weight_shape": words(7, 12)}, None, "does not fit"),
    "a shape that lies about columns": ({"weight_shape": words(6, 20)}, None, "does not fit"),
    "a negative shape": ({"weight_shape": words(6, -12)}, None, "which is not the shape of a matrix"),
    "a huge shape": ({"weight_shape": words(6, 2**62)}, None, "which is not the shape of a matrix"),
    "no scale": ({"weight_scale": None}, None, "weight_scale is not stored"),
    "a scale of integers": ({"weight_scale": stored("I32", np.ones((6, 1), "<i4"))}, None, "not a floating-point"),
    "a scale of another shape": ({"weight_scale": stored("F32", floats(5, 1))}, None, "does not fit"),
    "an empty matrix": ({"weight_packed": stored("I32", np.zeros((0, 2), "<i4"))}, None, "is not a matrix"),
    "three axes": ({"weight_packed": stored("I32", np.zeros((1, 6, 2), "<i4"))}, None, "is not a matrix"),
    "two schemes": (
        {}, lambda c: change_top(c, config_groups={
            "a": {"weights": {"num_bits": 4, "strategy": "tensor"}},
            "b": {"weights": {"num_bits": 4, "group_size": -1}},
            "c": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 12}},
        }), "may be",
    ),
}  # fmt: skip
"""Name -> (tensors that are added, replaced or, as None, left out; the change of config.json; a part of the reason)."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_decide_the_weight_is_refused(name, tmp_path):
    more, alter, reason = REFUSED[name]
    tensors, config, _ = packed_case()
    merged = {**tensors, **{f"{M}.{last}": tensor for last, tensor in more.items()}}
    checkpoint = open_checkpoint(
        write_single(tmp_path, {n: t for n, t in merged.items() if t is not None}, alter(config) if alter else config)
    )
    with pytest.raises(CannotTell) as caught:
        find_matrix(checkpoint, W)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert W not in WeightShapes(checkpoint)


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_an_element_whose_scale_is_not_finite_has_no_value(scale, tmp_path):
    tensors, config, values = packed_case()
    scales = floats(6, 1)
    scales[3] = scale
    _, matrix = read(tmp_path, {**tensors, f"{M}.weight_scale": stored("F32", scales)}, config)
    with pytest.raises(CannotTell, match="not finite"):
        matrix.find_cell((3, 2))
    with pytest.raises(CannotTell, match="not finite"):
        matrix.dequantise(0, 6)
    assert np.array_equal(matrix.dequantise(0, 3), values[:3])


def test_schemes_that_do_not_fit_are_passed_over(tmp_path):
    tensors, config, values = packed_case()
    other = {"weights": {"num_bits": 8, "strategy": "group", "group_size": 4}, "format": "int-quantized"}
    groups = {"first": other, **config["quantization_config"]["config_groups"], "none": {"weights": None}}
    _, matrix = read(tmp_path, tensors, change_top(config, config_groups=groups))
    assert np.array_equal(matrix.dequantise(0, 6), values)


CODES = np.arange(72, dtype="u1").reshape(6, 12)
PLAIN_REFUSED = {
    "another dtype": (("F8_E4M3", CODES), ("F32", floats(6, 1)), declare("int-quantized"), "instead of I8"),
    "floats in I8": (
        ("I8", CODES), ("F32", floats(6, 1)), declare("naive-quantized", type="float"), "declared as float",
    ),
    "FP8 of 4 bits": (
        ("F8_E4M3", CODES), ("F32", floats(6, 1)), declare("float-quantized", type="float"), "declared as float",
    ),
    "MXFP8 with other groups": (
        ("F8_E4M3", CODES), ("U8", CODES[:, :3]),
        declare("mxfp8-quantized", type="float", num_bits=8, strategy="group", group_size=4), "groups of 4",
    ),
    "a scale of bytes": (("I8", CODES), ("U8", CODES[:, :1]), declare("int-quantized", num_bits=8), "floating-point"),
    "blocks of another size": (
        ("I8", CODES), ("F32", floats(3, 3)),
        declare("int-quantized", num_bits=8, strategy="block", block_structure=[4, 4]), "blocks of 4 x 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN_REFUSED)
def test_codes_of_one_element_that_do_not_fit_are_refused(name, tmp_path):
    codes, scales, config, reason = PLAIN_REFUSED[name]
    tensors = {W: stored(*codes), f"{M}.weight_scale": stored(*scales)}
    with pytest.raises(CannotTell, match=reason):
        find_matrix(open_checkpoint(write_single(tmp_path, tensors, config)), W)


def test_an_integer_beyond_the_declared_bits_has_no_value(tmp_path):
    tensors = {W: stored("I8", CODES), f"{M}.weight_scale": stored("F32", floats(6, 1))}
    _, matrix = read(tmp_path, tensors, declare("naive-quantized"))
    values = matrix.dequantise(0, 6)
    expected = floats(6, 1).astype(np.float64) * CODES
    assert np.array_equal(values, np.where(CODES < 8, expected, np.nan), equal_nan=True)
    cell = matrix.find_cell((0, 8))
    assert np.isnan(cell.values[8]) and max(v for v, _ in cell.grid) == 7 * cell.scale
