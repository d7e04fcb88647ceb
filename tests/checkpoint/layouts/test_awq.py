"""AWQ, on files written by hand, and read by compressed-tensors' converter if it is installed."""

from __future__ import annotations

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

Arrays = dict[str, NDArray]
WEIGHT = down(0)
MODULE = WEIGHT.removesuffix(".weight")
change = partial(change_module, WEIGHT)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ packs these outputs of eight from the lowest bits on."""


def pack(codes: NDArray) -> NDArray[np.int32]:
    """Pack [lines, outputs] into words [lines, outputs / 8]."""
    eights = codes.reshape(len(codes), -1, 8).astype("<u4")
    words = sum(eights[:, :, output] << np.uint32(4 * place) for place, output in enumerate(ORDER))
    return words.astype("<u4").view("<i4")


def quantise(weight: NDArray, size: int, sym: bool) -> tuple[NDArray, NDArray, NDArray]:
    """Codes [cols, rows], zero points and float16 scales [groups, rows], by rounding to nearest."""
    groups = weight.T.reshape(-1, size, len(weight))
    low, high = np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 0)
    scales = (np.maximum(high, -low) / 7 if sym else (high - low) / 15).astype(np.float16)
    zeros = np.full(scales.shape, 8) if sym else np.clip(np.round(-low / scales), 0, 15)
    codes = np.clip(np.round(weight.T / scales.repeat(size, 0).astype(np.float32)) + zeros.repeat(size, 0), 0, 15)
    return codes.astype(int), zeros.astype(int), scales


def name_arrays(layer: int, codes: NDArray, zeros: NDArray, scales: NDArray) -> Arrays:
    module = down(layer).removesuffix(".weight")
    return {f"{module}.qweight": pack(codes), f"{module}.qzeros": pack(zeros), f"{module}.scales": scales}


def make_config(size: int, sym: bool) -> dict[str, object]:
    return {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": not sym, "version": "gemm"}


@needs_model
@pytest.mark.parametrize(("size", "sym"), [(128, False), (64, True)])
def test_every_scalar_is_what_the_formula_says(tmp_path, size, sym):
    arrays: Arrays = {}
    expected = {}
    for layer in LAYERS:
        codes, zeros, scales = quantise(read_down(layer), size, sym)
        arrays |= name_arrays(layer, codes, zeros, scales)
        whole = (codes - zeros.repeat(size, 0)).astype(np.float16)
        expected[layer] = (whole * scales.repeat(size, 0)).T  # as AutoAWQ does, in float16
    folder = write_arrays(tmp_path / "model", arrays, make_config(size, sym))
    for layer, values in expected.items():
        _, found = read_matrix(folder, down(layer))
        assert np.array_equal(found.astype(np.float16), values)
    find_super(folder)


@needs_model
def test_the_converter_of_compressed_tensors_reads_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    autoawq = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    unpack = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers").unpack_from_int32
    codes, zeros, scales = quantise(read_down(11), 128, False)
    arrays = name_arrays(11, codes, zeros, scales)
    folder = write_arrays(tmp_path / "model", arrays, make_config(128, False))
    found = open_matrix(folder, down(11))[1].dequantise(0, 576)
    converter = autoawq.AutoAWQConverter(targets=["re:.*down_proj"])
    stored = converter.process({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    module = down(11).removesuffix(".weight")
    integers = unpack(stored[f"{module}.weight_packed"], 4, torch.Size((576, 1536))).double()
    points = unpack(stored[f"{module}.weight_zero_point"], 4, torch.Size((576, 12)), packed_dim=0).double()
    steps = stored[f"{module}.weight_scale"].double()
    values = (integers - points.repeat_interleave(128, 1)) * steps.repeat_interleave(128, 1)
    assert np.array_equal(found, values.numpy())


@needs_model
def test_the_nearest_code_changes_one_scalar(tmp_path):
    codes, zeros, scales = quantise(read_down(11), 64, False)
    folder = write_arrays(tmp_path / "model", name_arrays(11, codes, zeros, scales), make_config(64, False))
    before = open_matrix(folder, down(11))[1].dequantise(0, 576)
    for number, place in enumerate([SUPER, (0, 0), (575, 1535)]):
        wanted = float(before[place] * 0.4 + 0.01)
        value = set_nearest(folder, tmp_path / f"copy{number}", down(11), place, wanted)
        after = open_matrix(tmp_path / f"copy{number}", down(11))[1].dequantise(0, 576)
        group, row = place[1] // 64, place[0]
        grid = (np.arange(16) - zeros[group, row]) * scales[group, row].astype(float)
        assert abs(value - wanted) == abs(grid - wanted).min()
        assert after[place] == value and differ_once(before, after, place)


def make_small(sym: bool = False) -> tuple[Arrays, NDArray]:
    """A module of 16 rows and 64 columns in groups of 32, and its values."""
    random = np.random.default_rng(1)
    codes, zeros = random.integers(0, 16, (64, 16)), random.integers(0, 16, (2, 16))
    if sym:
        zeros[:] = 8
    scales = random.uniform(0.1, 1, (2, 16)).astype(np.float16)
    values = ((codes - zeros.repeat(32, 0)) * scales.repeat(32, 0).astype(float)).T
    return name_arrays(0, codes, zeros, scales), values


SMALL, VALUES = make_small()
CONFIG = make_config(32, False)
GOOD = {
    "as AutoAWQ": (CONFIG, False),
    "capitals": (CONFIG | {"version": "GEMM"}, False),
    "no version": ({k: v for k, v in CONFIG.items() if k != "version"}, False),
    "symmetric": (make_config(32, True), True),
    "by AutoRound": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32},
        False,
    ),
    "symmetric, by AutoRound": (
        {
            "quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32,
            "sym": True, "data_type": "int",
        },
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_all_declarations_of_the_layout_are_known(tmp_path, name):
    config, sym = GOOD[name]
    arrays, values = make_small(sym)
    _, matrix = open_matrix(write_arrays(tmp_path / "m", arrays, config), WEIGHT)
    assert np.array_equal(matrix.dequantise(0, 16), values)


QWEIGHT, QZEROS, SCALES = (SMALL[f"{MODULE}.{last}"] for last in ("qweight", "qzeros", "scales"))
BAD: dict[str, tuple[dict[str, object], Arrays, str]] = {
    "gemv": ({"version": "gemv"}, SMALL, "the format of the AWQ weights is gemv"),
    "two formats": ({"format": "gemv_fast"}, SMALL, "the format of the AWQ weights is gemm and gemv_fast"),
    "llm-awq": ({"backend": "llm-awq"}, SMALL, "the format of the AWQ weights is gemm and llm-awq"),
    "8 bits": ({"bits": 8}, SMALL, "bits in config.json is not 4"),
    "no bits": ({"bits": None}, SMALL, "bits in config.json is not an integer"),
    "a zero point that is no flag": ({"zero_point": 1}, SMALL, "zero_point in config.json is neither true nor false"),
    "a rotation": ({"rotation_config": {"a": 1}}, SMALL, "says that the weights were rotated"),
    "other groups": ({"group_size": 64}, SMALL, "2 groups are stored, which do not fit"),
    "groups that do not divide": ({"group_size": 48}, SMALL, "groups of 48 do not divide 64 columns"),
    "no group size": ({"group_size": None}, SMALL, "group_size in config.json is not an integer"),
    "no zero points": ({}, change(SMALL, qzeros=None), "qzeros is not stored"),
    "no scales": ({}, change(SMALL, scales=None), "scales is not stored"),
    "an order": ({}, change(SMALL, g_idx=np.zeros(64, np.int32)), "g_idx is stored, which AWQ does not have"),
    "another tensor": ({}, change(SMALL, smooth=SCALES), "may change what the codes mean"),
    "words of another type": ({}, change(SMALL, qweight=QWEIGHT.astype(np.int64)), "are not matrices of I32"),
    "codes without an axis": ({}, change(SMALL, qweight=QWEIGHT.reshape(-1)), "are not matrices of I32"),
    "turned": ({}, change(SMALL, qweight=np.zeros((8, 16), np.int32)), "do not fit"),
    "scales of another shape": ({}, change(SMALL, scales=SCALES[:, :8]), "do not fit"),
    "scales of integers": ({}, change(SMALL, scales=SCALES.astype(np.int32)), "do not fit"),
    "no groups": ({}, change(SMALL, qzeros=QZEROS[:0], scales=SCALES[:0]), "0 groups are stored, which do not fit"),
    "AutoRound's unknown packing": ({"quant_method": "auto-round"}, SMALL, "packing_format in config.json is none"),
    "AutoRound's floats": (
        {"quant_method": "auto-round", "data_type": "mx_fp", "packing_format": "auto_round:auto_awq"},
        SMALL,
        "data_type in config.json is not int",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_not_read(tmp_path, name):
    config, arrays, message = BAD[name]
    refuse_matrix(write_arrays(tmp_path / "m", arrays, CONFIG | config), WEIGHT, message)


@pytest.mark.parametrize(
    ("config", "arrays", "message"),
    [
        ({"zero_point": False}, SMALL, "zero_point in config.json is false"),
        ({}, change(SMALL, scales=SCALES * np.float16(np.inf)), "not finite"),
    ],
)
def test_numbers_that_decide_nothing_are_not_used(tmp_path, config, arrays, message):
    refuse_values(write_arrays(tmp_path / "m", arrays, CONFIG | config), WEIGHT, message)
