"""GPTQ, on files written by hand: GPTQModel has no wheel. The packer works on words, not on bits."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from checkpoints import down
from numpy.typing import NDArray
from quantised_files import (
    LAYERS,
    SUPER,
    change_module,
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
)

from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.find import make_reader
from swsurgery.cli import main

Arrays = dict[str, NDArray]
WEIGHT = down(0)
MODULE = WEIGHT.removesuffix(".weight")
change = partial(change_module, WEIGHT)


def pack(codes: NDArray, bits: int) -> NDArray[np.int32]:
    """Pack each row of codes into 32-bit words, the first code in the lowest bits."""
    blocks = codes.reshape(len(codes), -1, 32).astype("<u8")
    words = np.zeros((*blocks.shape[:2], bits + 1), "<u8")
    for k in range(32):
        word, shift = divmod(k * bits, 32)
        words[:, :, word] |= blocks[:, :, k] << np.uint64(shift)
        words[:, :, word + 1] |= words[:, :, word] >> np.uint64(32)
        words[:, :, word] &= np.uint64(0xFFFFFFFF)
    assert not words[:, :, bits].any()
    return words[:, :, :bits].astype("<u4").view("<i4").reshape(len(codes), -1)


def quantise(weight: NDArray, bits: int, size: int, sym: bool, order: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Codes [rows, cols], zero points and float16 scales [groups, rows], by rounding to nearest."""
    top = (1 << bits) - 1
    groups = [weight[:, order == g] for g in range(order.max() + 1)]
    low = np.stack([np.minimum(part.min(axis=1), 0) for part in groups])
    high = np.stack([np.maximum(part.max(axis=1), 0) for part in groups])
    if sym:
        high = np.maximum(high, -low)
        low = -high
    scales = np.maximum((high - low) / top, 1e-4).astype(np.float16)
    zeros = np.full(scales.shape, (top + 1) // 2) if sym else np.clip(np.round(-low / scales), 1, top)
    codes = np.clip(np.round(weight / scales[order].T.astype(np.float32)) + zeros[order].T, 0, top)
    return codes.astype(int), zeros.astype(int), scales


def name_arrays(layer: int, codes: NDArray, stored: NDArray, scales: NDArray, bits: int, order: NDArray) -> Arrays:
    module = down(layer).removesuffix(".weight")
    return {
        f"{module}.qweight": pack(codes, bits).T,
        f"{module}.qzeros": pack(stored, bits),
        f"{module}.scales": scales,
        f"{module}.g_idx": order.astype(np.int32),
    }


def make_order(cols: int, size: int, act_order: bool) -> NDArray:
    order = np.arange(cols) // size
    return np.random.default_rng(3).permutation(order) if act_order else order


CASES = [
    (bits, form, sym, act_order)
    for bits in (2, 3, 4, 8)
    for form, sym, act_order in (
        ("gptq", True, False),
        ("gptq", False, True),
        ("gptq_v2", False, False),
        ("gptq_v2", True, True),
    )
    if (bits, form, sym) != (3, "gptq", False)
]


@pytest.mark.parametrize("case", CASES, ids=str)
@needs_model
def test_every_scalar_is_what_the_formula_says(tmp_path, case):
    bits, form, sym, act_order = case
    arrays: Arrays = {}
    expected = {}
    for layer in LAYERS if bits == 4 else (11,):
        order = make_order(1536, 128, act_order)
        codes, zeros, scales = quantise(read_down(layer), bits, 128, sym, order)
        arrays |= name_arrays(layer, codes, zeros - (form == "gptq"), scales, bits, order)
        expected[layer] = scales[order].T * (codes - zeros[order].T).astype(np.float16)  # as the kernels do, in float16
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": 128, "desc_act": act_order, "sym": sym,
        "checkpoint_format": form,
    }  # fmt: skip
    folder = write_arrays(tmp_path / "model", arrays, config)
    for layer, values in expected.items():
        _, found = read_matrix(folder, down(layer))
        assert np.array_equal(found.astype(np.float16), values)
    find_super(folder)


@needs_model
@pytest.mark.parametrize("bits", [3, 4])
def test_the_nearest_code_changes_one_scalar(tmp_path, bits):
    order = make_order(1536, 64, True)
    codes, zeros, scales = quantise(read_down(11), bits, 64, False, order)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 64, "desc_act": True, "format": "gptq_v2"}
    folder = write_arrays(tmp_path / "model", name_arrays(11, codes, zeros, scales, bits, order), config)
    _, matrix = open_matrix(folder, down(11))
    before = matrix.dequantise(0, 576)
    for number, place in enumerate([SUPER, (0, 10), (0, 21), (575, 1535)]):  # codes 10 and 21 of 3 bits cross words
        wanted = float(before[place] * 0.4)
        value = set_nearest(folder, tmp_path / f"copy{number}", down(11), place, wanted)
        after = open_matrix(tmp_path / f"copy{number}", down(11))[1].dequantise(0, 576)
        group = order[place[1]]
        grid = (np.arange(1 << bits) - zeros[group, place[0]]) * scales[group, place[0]].astype(float)
        assert abs(value - wanted) == abs(grid - wanted).min()
        assert after[place] == value and (value == before[place] or differ_once(before, after, place))


@needs_model
def test_verify_reports_the_super_weight(tmp_path, capsys):
    order = make_order(1536, 32, False)
    codes, zeros, scales = quantise(read_down(11), 8, 32, True, order)
    config = {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False, "sym": True}
    folder = write_arrays(tmp_path / "model", name_arrays(11, codes, zeros - 1, scales, 8, order), config)
    main(["verify", str(folder), "--known", "--model", "smollm2-135m-instruct", "--json"])
    known = json.loads(capsys.readouterr().out)["known"]["coordinates"]
    found = next(entry for entry in known if entry["id"] == "L11.507.1229")
    assert found["state"] in ("kept", "close") and abs(found["stored"] - 5.875) < 0.06
    assert found["tensor"] == down(11)


ORDER = make_order(64, 32, False)
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def make_small(bits: int = 4, minus: int = 1) -> tuple[Arrays, NDArray]:
    """A module of 32 rows and 64 columns with zero points between 1 and the largest but one, and its values."""
    random = np.random.default_rng(1)
    codes = random.integers(0, 1 << bits, (32, 64))
    zeros = random.integers(1, 1 << bits, (2, 32))
    scales = random.uniform(0.1, 1, (2, 32)).astype(np.float16)
    values = (codes - zeros[ORDER].T) * scales[ORDER].T.astype(float)
    return name_arrays(0, codes, zeros - minus, scales, bits, ORDER), values


@pytest.mark.parametrize("config", [{}, {"checkpoint_format": "gptq"}, {"format": "gptq", "pack_dtype": "int32"}])
def test_a_config_without_a_format_means_the_first_one(tmp_path, config):
    arrays, values = make_small()
    _, matrix = open_matrix(write_arrays(tmp_path / "m", arrays, CONFIG | config), WEIGHT)
    assert np.array_equal(matrix.dequantise(0, 32), values)
    assert matrix.layout == "gptq, 4 bits, groups of 32"


def test_groups_are_consecutive_without_an_order(tmp_path):
    arrays, values = make_small()
    _, matrix = open_matrix(write_arrays(tmp_path / "m", change(arrays, g_idx=None), CONFIG), WEIGHT)
    assert np.array_equal(matrix.dequantise(0, 32), values)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_other_options_of_one_module_are_taken_from_the_shapes(tmp_path, bits):
    arrays, values = make_small(bits)
    config = CONFIG | {"bits": 3, "group_size": 16, "dynamic": {"+:.*down_proj": {"bits": bits, "group_size": 32}}}
    _, matrix = open_matrix(write_arrays(tmp_path / "m", arrays, config), WEIGHT)
    assert np.array_equal(matrix.dequantise(0, 32), values)


def make_groups(size: int, cols: int = 64) -> tuple[Arrays, NDArray]:
    """A module of 32 rows and groups of `size` columns, and its values."""
    random = np.random.default_rng(5)
    order = np.arange(cols) // size
    shape = (order.max() + 1, 32)
    codes, zeros = random.integers(0, 16, (32, cols)), random.integers(1, 16, shape)
    scales = random.uniform(0.1, 1, shape).astype(np.float16)
    values = (codes - zeros[order].T) * scales[order].T.astype(float)
    return name_arrays(0, codes, zeros - 1, scales, 4, order), values


@pytest.mark.parametrize("size", [32, 48])
def test_an_order_of_columns_decides_between_two_group_sizes(tmp_path, size):
    arrays, values = make_groups(size)
    config = CONFIG | {"dynamic": {"+:.*layers\\.0": {"group_size": 48}, "-:.*lm_head": {}}}
    _, matrix = open_matrix(write_arrays(tmp_path / "m", arrays, config), WEIGHT)
    assert np.array_equal(matrix.dequantise(0, 32), values) and matrix.layout == f"gptq, 4 bits, groups of {size}"
    folder = write_arrays(tmp_path / "n", change(arrays, g_idx=None), config)
    refuse_matrix(folder, WEIGHT, "states the group sizes 32 and 48 for some modules, and each fits 2 groups")


def test_a_module_may_have_an_order_of_columns_by_an_override(tmp_path):
    order = np.random.default_rng(7).permutation(ORDER)
    arrays, _ = make_small()
    codes = np.random.default_rng(1).integers(0, 16, (32, 64))
    arrays |= {f"{MODULE}.qweight": pack(codes, 4).T, f"{MODULE}.g_idx": order.astype(np.int32)}
    config = CONFIG | {"dynamic": {"+:.*down_proj": {"desc_act": True}}}
    _, matrix = open_matrix(write_arrays(tmp_path / "m", arrays, config), WEIGHT)
    _, plain = open_matrix(write_arrays(tmp_path / "n", change(arrays, g_idx=ORDER.astype(np.int32)), CONFIG), WEIGHT)
    for col in (0, 1, 63):
        same = int(np.flatnonzero(order[col] == ORDER)[0])
        assert matrix.find_cell((3, col)).values == plain.find_cell((3, same)).values
    refuse_values(write_arrays(tmp_path / "o", arrays, CONFIG), WEIGHT, "reorders the groups, but desc_act")


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_codes_of_five_to_seven_bits_are_refused_with_the_reason(tmp_path, bits):
    arrays, _ = make_small(bits)
    folder = write_arrays(tmp_path / "m", arrays, CONFIG | {"bits": bits})
    refuse_matrix(folder, WEIGHT, f"codes of {bits} bits are stored in a way that is not read")
    folder = write_arrays(tmp_path / "n", arrays, CONFIG | {"dynamic": {"+:.*": {"bits": bits}}})
    refuse_matrix(folder, WEIGHT, f"codes of {bits} bits are stored in a way that is not read")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_below_a_field_of_ones_is_decided_and_the_others_are_not(tmp_path, bits):
    """A zero point of 0 is subtracted from a whole word, or from each zero point alone. Both ways give ones."""
    per_word, ones = 32 // bits, (1 << bits) - 1
    codes, zeros = np.ones((32, 64), int), np.full((2, 32), 2)
    scales = np.ones((2, 32), np.float16)
    hole = per_word // 2
    zeros[1, per_word + hole] = 0
    one_each = np.uint32(sum(1 << bits * k for k in range(per_word)))
    borrowed = (pack(zeros, bits).view("<u4") - one_each).view("<i4")
    stamped = np.where(np.arange(32) == per_word + hole, ones, 1) * np.array([[1], [1]])
    stamped[0] = 1
    for number, qzeros in enumerate((borrowed, pack(stamped, bits))):
        arrays = change(name_arrays(0, codes, zeros * 0, scales, bits, ORDER), qzeros=qzeros)
        config = CONFIG | {"bits": bits}
        checkpoint, matrix = open_matrix(write_arrays(tmp_path / f"m{number}", arrays, config), WEIGHT)
        for row in range(32):
            if per_word + hole <= row < 2 * per_word:
                with pytest.raises(CannotTell, match="disagree about the zero points"):
                    matrix.find_cell((row, 63))
            else:
                cell = matrix.find_cell((row, 63))
                assert cell.values[cell.read_code(make_reader(checkpoint))] == -1
            assert matrix.find_cell((row, 0)).scale == 1
        assert (matrix.dequantise(0, per_word + hole) == -1).all()
        with pytest.raises(CannotTell, match="disagree about the zero points"):
            matrix.dequantise(0, 32)


def test_three_bits_minus_one_are_decided_only_if_symmetric(tmp_path):
    arrays, _ = make_small(3)
    _, matrix = open_matrix(write_arrays(tmp_path / "m", arrays, CONFIG | {"bits": 3}), WEIGHT)
    with pytest.raises(CannotTell, match="disagree about the zero points"):
        matrix.find_cell((0, 0))
    arrays, values = make_small(3)
    by_autoround = CONFIG | {"bits": 3, "provider": "auto-round"}
    _, matrix = open_matrix(write_arrays(tmp_path / "n", arrays, by_autoround), WEIGHT)
    assert np.array_equal(matrix.dequantise(0, 32), values)


SMALL = make_small()[0]
SCALES = SMALL[f"{MODULE}.scales"]
QZEROS = SMALL[f"{MODULE}.qzeros"]
BAD: dict[str, tuple[dict[str, object], Arrays, str]] = {
    "an unknown format": ({"checkpoint_format": "marlin"}, SMALL, "the format of the GPTQ weights is marlin"),
    "planar words": ({"format": "gptq_p"}, SMALL, "the format of the GPTQ weights is gptq_p"),
    "two formats": ({"format": "gptq", "checkpoint_format": "gptq_v2"}, SMALL, "is gptq and gptq_v2"),
    "a format that is no text": ({"format": ["gptq"]}, SMALL, "the format of the GPTQ weights is"),
    "repacked for Marlin": ({"is_marlin_format": True}, SMALL, "the format of the GPTQ weights"),
    "other words": ({"pack_dtype": "int64"}, SMALL, "pack_dtype in config.json is not int32"),
    "a rotation": ({"rotation": "hadamard"}, SMALL, "rotation in config.json says that the weights were rotated"),
    "no bits": ({"bits": None}, SMALL, "bits in config.json is not an integer"),
    "true bits": ({"bits": True}, SMALL, "bits in config.json is not an integer"),
    "other bits": ({"bits": 8}, SMALL, "8 bits do not fit the shapes"),
    "odd bits": ({"bits": 5}, SMALL, "5 bits do not fit the shapes"),
    "bits that no override states": ({"bits": 8, "dynamic": {"+:x": {"bits": 2}}}, SMALL, "8 or 2 bits do not fit"),
    "an override that is no integer": ({"bits": 8, "dynamic": {"+:x": {"bits": "4"}}}, SMALL, "8 bits do not fit"),
    "no group size": ({"group_size": "32"}, SMALL, "group_size in config.json is not an integer"),
    "a group size of 0": ({"group_size": 0}, SMALL, "columns in groups of 0"),
    "other groups": ({"group_size": 16}, SMALL, "2 groups are stored, which do not fit 64 columns in groups of 16"),
    "one group": ({"group_size": -1}, SMALL, "2 groups are stored, which do not fit 64 columns in groups of -1"),
    "no scales": ({}, change(SMALL, scales=None), "scales is not stored"),
    "no zero points": ({}, change(SMALL, qzeros=None), "qzeros is not stored"),
    "scales of another shape": ({}, change(SMALL, scales=SCALES.T), "does not fit 2 groups of 32 rows"),
    "scales of integers": ({}, change(SMALL, scales=SCALES.astype(np.int32)), "does not fit 2 groups of 32 rows"),
    "words of another type": ({}, change(SMALL, qzeros=QZEROS.astype(np.int64)), "are not matrices of I32"),
    "codes without an axis": ({}, change(SMALL, qweight=SMALL[f"{MODULE}.qweight"].reshape(-1)), "not matrices of I32"),
    "no groups": ({}, change(SMALL, qzeros=QZEROS[:0], scales=SCALES[:0]), "do not fit the shapes"),
    "an order of floats": (
        {},
        change(SMALL, g_idx=ORDER.astype(np.float32)),
        "does not contain one integer for each of 64",
    ),
    "a short order": (
        {},
        change(SMALL, g_idx=ORDER[:-1].astype(np.int32)),
        "does not contain one integer for each of 64",
    ),
    "another tensor": ({}, change(SMALL, smooth=SCALES), "may change what the codes mean"),
    "no order": ({"desc_act": True}, change(SMALL, g_idx=None), "no g_idx is stored"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_not_read(tmp_path, name):
    config, arrays, message = BAD[name]
    refuse_matrix(write_arrays(tmp_path / "m", arrays, CONFIG | config), WEIGHT, message)


HOSTILE: dict[str, tuple[dict[str, object], Arrays, str]] = {
    "another order": ({}, change(SMALL, g_idx=ORDER[::-1].astype(np.int32)), "desc_act in config.json is not true"),
    "a negative group": ({"desc_act": True}, change(SMALL, g_idx=(-ORDER - 1).astype(np.int32)), "does not exist"),
    "a group too many": ({"desc_act": True}, change(SMALL, g_idx=(ORDER + 2).astype(np.int32)), "does not exist"),
    "an infinite scale": ({}, change(SMALL, scales=SCALES * np.float16(np.inf)), "not finite"),
    "a scale that is no number": ({}, change(SMALL, scales=SCALES * np.float16(np.nan)), "not finite"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_numbers_that_decide_nothing_are_not_used(tmp_path, name):
    config, arrays, message = HOSTILE[name]
    refuse_values(write_arrays(tmp_path / "m", arrays, CONFIG | config), WEIGHT, message)


def test_another_method_is_another_layout(tmp_path):
    folder = write_arrays(tmp_path / "m", SMALL, CONFIG | {"quant_method": "other"})
    refuse_matrix(folder, WEIGHT, "is quantised")
