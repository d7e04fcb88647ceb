"""Figures of tensors: every count against numpy and ml_dtypes on whole arrays, however the bytes are divided."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from checkpoints import SIZES, write_single
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.progress import Silent
from swsurgery.storage.dtypes import DTYPES
from swsurgery.verifying.figures import decode_constant, decode_largest
from swsurgery.verifying.value_search import ValueSearch

FLOATS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
INTEGERS = {
    "I64": np.int64, "U64": np.uint64, "I32": np.int32, "U32": np.uint32, "I16": np.int16, "U16": np.uint16,
    "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def make_bits(dtype: str, count: int, seed: int) -> bytes:
    """Random bit patterns, of which about a third are special: zeros, NaN, infinities, edges of ranges, subnormals."""
    random, size = np.random.default_rng(seed), DTYPES[dtype].size
    words = random.integers(0, 256, count * size, np.uint8).view(f"<u{size}").copy()
    finite = np.array([65504.0, 65505.0, 65520.0, 65280.0, 65536.0, 448.0, 0.0, -0.0, 2.0**-14, 2.0**-15, -1e-6])
    with np.errstate(over="ignore", invalid="ignore"):
        special = np.concatenate([finite.astype(FLOATS[dtype]).view(words.dtype), words[:3] & words.dtype.type(3)])
    top = np.array([(1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1], np.uint64).astype(words.dtype)
    special = np.concatenate([special, top, top[:1] ^ words.dtype.type(3)])
    chosen = random.random(count) < 0.3
    words[chosen] = random.choice(special, int(chosen.sum()))
    return words.tobytes()


def search(root, block: int = 1 << 20, threads: int = 1) -> ValueSearch:
    found = ValueSearch(open_checkpoint(root), block, threads)
    found.read_rest(Silent())
    return found


def widen(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaN
        return values.astype(np.float64)


def count_by_numpy(values: np.ndarray) -> dict:
    wide = widen(values)
    magnitudes, finite = np.abs(wide), np.isfinite(wide)
    smallest = float(ml_dtypes.finfo(values.dtype).smallest_normal)
    return {
        "values": values.size,
        "nan": int(np.isnan(wide).sum()),
        "infinite": int(np.isinf(wide).sum()),
        "zeros": int((wide == 0).sum()),
        "subnormal": int(((magnitudes > 0) & (magnitudes < smallest)).sum()),
        "beyond_float16": int((finite & (magnitudes > 65504)).sum()),
        "largest_magnitude": float(magnitudes[finite].max()) if finite.any() else None,
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_count_is_that_of_numpy(tmp_path, dtype, seed):
    data = make_bits(dtype, 5000, seed)
    write_single(tmp_path, {"a": ("U8", (3,), b"abc"), "w": (dtype, (50, 100), data)})
    (_, _, figures) = list(search(tmp_path, block=1024).list_figures())[1]
    values = np.frombuffer(data, FLOATS[dtype])
    assert figures.to_json(DTYPES[dtype]) == count_by_numpy(values)
    wide = widen(values)
    for place, wrong in ((figures.bad, ~np.isfinite(wide)), (figures.beyond, np.isfinite(wide) & (abs(wide) > 65504))):
        if wrong.any():
            at, size = int(np.argmax(wrong)), DTYPES[dtype].size
            assert place == (at, data[at * size : at * size + size])
        else:
            assert place is None


@pytest.mark.parametrize("dtype", [d for d in FLOATS if DTYPES[d].size == 1])
def test_every_pattern_of_the_small_floats(tmp_path, dtype):
    data = bytes(range(256))
    write_single(tmp_path, {"w": (dtype, (256,), data)})
    ((_, _, figures),) = search(tmp_path).list_figures()
    assert figures.to_json(DTYPES[dtype]) == count_by_numpy(np.frombuffer(data, FLOATS[dtype]))


def test_every_pattern_of_the_16_bit_floats(tmp_path):
    data = np.arange(1 << 16, dtype="<u2").tobytes()
    write_single(tmp_path, {d: (d, (1 << 16,), data) for d in ("F16", "BF16")})
    for _, info, figures in search(tmp_path).list_figures():
        assert figures.to_json(info.dtype) == count_by_numpy(np.frombuffer(data, FLOATS[info.name]))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_have_zeros_and_extremes_only(tmp_path, dtype):
    values = np.random.default_rng(1).integers(0, 2, 999).astype(INTEGERS[dtype])
    write_single(tmp_path, {"w": (dtype, (999,), values.tobytes()), "c": (dtype, (2,), values[:1].tobytes() * 2)})
    (_, w, figures), (_, c, constant) = search(tmp_path).list_figures()
    assert figures.to_json(w.dtype) == {
        "values": 999, "nan": 0, "infinite": 0, "zeros": int((values == 0).sum()), "subnormal": 0, "beyond_float16": 0,
        "largest_magnitude": None,
    }  # fmt: skip
    assert decode_constant(w.dtype, figures) is None
    assert decode_constant(c.dtype, constant) == int(values[0])


def test_complex_numbers_are_two_values_each(tmp_path):
    data = np.array([1, 2e5, math.inf, 1e-40, 0, 3], "<f4").tobytes()
    write_single(tmp_path, {"c": ("C64", (3,), data)})
    ((_, info, figures),) = search(tmp_path).list_figures()
    expected = {"values": 6, "nan": 0, "infinite": 1, "zeros": 1, "subnormal": 1, "beyond_float16": 1}
    assert figures.to_json(info.dtype) == {**expected, "largest_magnitude": 2e5}
    assert (figures.bad, figures.beyond) == ((1, data[8:16]), (0, data[:8]))


def test_scales_have_no_zero_and_one_nan(tmp_path):
    write_single(tmp_path, {"s": ("F8_E8M0", (4,), b"\x00\xff\x7f\xff")})
    ((_, _, figures),) = search(tmp_path).list_figures()
    assert (figures.nan, figures.zeros, figures.bad) == (2, 0, (1, b"\xff"))


@pytest.mark.parametrize(
    ("dtype", "data", "value"),
    [
        ("F16", b"\x00\x80" * 8 + b"\x00\x00" * 8, 0),
        ("BF16", b"\xc0\x3f" * 16, 1.5),
        ("F8_E4M3FNUZ", b"\x80" * 16, None),
        ("F32", b"\x00\x00\x80\x7f" * 16, None),
        ("I8", b"\xff" * 16, -1),
        ("F4", b"\x22" * 16, "0x22"),
        ("F8_E8M0", b"\x7f" * 16, "0x7f"),
        ("BF16", b"\xc0\x3f" * 15 + b"\xc0\xbf", None),
    ],
)
def test_the_value_of_a_constant_tensor(tmp_path, dtype, data, value):
    count = len(data) * 8 // DTYPES[dtype].bits
    write_single(tmp_path, {"w": (dtype, (count,), data)})
    ((_, info, figures),) = search(tmp_path, block=8).list_figures()
    assert decode_constant(info.dtype, figures) == value
    assert decode_largest(info.dtype, figures) in (0.0, 1.5, None)


@given(data=st.data())
def test_no_division_changes_the_figures(tmp_path_factory, data):
    """Blocks of any multiple of 8 bytes, 1 to 4 threads, and pieces of any size that a reader feeds."""
    root = tmp_path_factory.mktemp("divided")
    names = data.draw(st.lists(st.sampled_from([*FLOATS, "C64", "F8_E8M0", "F4", "I16"]), min_size=1, max_size=5))
    tensors = {}
    for number, dtype in enumerate(names):
        count = data.draw(st.integers(0, 60))
        bits = make_bits(dtype, count, number) if dtype in FLOATS and count else bytes(range(256)) * 2
        size = SIZES.get(dtype, DTYPES[dtype].size)
        count = count * 2 if dtype == "F4" else count
        tensors[f"t{number}"] = (dtype, (count,), bits[: count // 2 if dtype == "F4" else count * size])
    write_single(root, tensors, padding=data.draw(st.integers(0, 9)))
    whole = {info.name: figures for _, info, figures in search(root).list_figures()}
    divided = search(root, data.draw(st.integers(1, 30)) * 8, data.draw(st.integers(1, 4)))
    assert {info.name: figures for _, info, figures in divided.list_figures()} == whole
    fed, raw = ValueSearch(open_checkpoint(root)), (root / "model.safetensors").read_bytes()
    scan, at = fed.follow("model.safetensors"), 0
    while at < len(raw):
        step = data.draw(st.integers(1, 200))
        scan.feed(at, raw[at : at + step])
        at += step
    assert scan.complete and scan.figures == whole
