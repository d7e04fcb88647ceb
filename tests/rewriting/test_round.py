"""Rounding to nearest, against a loop over groups and scalars, and against torch."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from arrays import FLOATS, draw_patterns, draw_weights, list_groups, source_of, values_of, words_of
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.errors import NumberError
from swsurgery.rewriting import round as rounding
from swsurgery.rewriting.apply import compute_region
from swsurgery.rewriting.clip import ClipFunction
from swsurgery.rewriting.read import build_function
from swsurgery.rewriting.scope import CHANNEL
from swsurgery.storage import dtypes
from swsurgery.storage.dtypes import DTYPES

SCOPES = [{}, {"per": "channel"}, {"block": 1}, {"block": 5}, {"block": 8}, {"block": [3, 4]}, {"block": [4, 99]}]
KINDS = [{"bits": 2}, {"bits": 4}, {"bits": 8}, {"bits": 3, "symmetric": False}, {"bits": 8, "symmetric": False},
         {"bits": 4, "levels": "nf4"}]  # fmt: skip


def round_group(options: dict, values: np.ndarray, kind: type) -> list[float]:
    """Round the values of one group, one scalar at a time, with integer codes."""
    values = [kind(v) for v in values]
    bits = options["bits"]
    top = max(abs(v) for v in values)
    if top == 0:
        return [0.0] * len(values)
    if options.get("levels") == "nf4":
        return [float(kind(nearest_level(v / top)) * top) for v in values]
    if options.get("symmetric", True):
        most = 2 ** (bits - 1) - 1
        scale = kind(float(top) / most)
        codes = [min(max(round(float(v / scale)), -most), most) for v in values]
        return [float(kind(code) * scale) for code in codes]
    low, high = min(0.0, *map(float, values)), max(0.0, *map(float, values))
    scale = kind((high - low) / (2**bits - 1))
    zero = round(-low / float(scale))
    codes = [min(max(round(float(v / scale)) + zero, 0), 2**bits - 1) for v in values]
    return [float(kind(code - zero) * scale) for code in codes]


def nearest_level(x: float) -> float:
    return min(rounding.NF4, key=lambda level: (abs(float(x) - level), level))


def encode(name: str, value: float) -> int:
    dtype = DTYPES[name]
    try:
        return int.from_bytes(dtypes.encode(dtype, value), "little")
    except NumberError as error:
        assert "underflows" in str(error)
        return 1 << (dtype.bits - 1) if value < 0 and dtype.special != "fnuz" else 0


def round_each(name: str, words: np.ndarray, options: dict, kept: tuple[int, ...] = ()) -> np.ndarray:
    kind = np.float32 if DTYPES[name].bits <= 16 else np.float64
    values, out = values_of(name, words).reshape(-1), words.reshape(-1).copy()
    for group in list_groups(options, words.shape):
        group = np.setdiff1d(group, kept)
        if len(group):
            out[group] = [encode(name, v) for v in round_group(options, values[group], kind)]
    return out.reshape(words.shape)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_every_scalar_becomes_the_value_of_its_code(name, kind, scope):
    words = draw_weights(name, (10, 19))
    words[2, :9] = 0
    words[6, ::2] = 0
    found = compute_region(build_function("round", kind | scope), "w", DTYPES[name], words)
    assert np.array_equal(found, round_each(name, words, kind | scope))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", FLOATS[1:])
def test_values_of_every_magnitude(name, kind):
    words = draw_patterns(name, (12, 16), seed=3)
    words[:4] &= 0x7 if DTYPES[name].bits == 8 else 0x3F  # groups of subnormal values
    options = kind | {"block": 8}
    try:
        expected = round_each(name, words, options)
    except AssertionError:  # an overflow, in the oracle
        with pytest.raises(NumberError, match=f"beyond the largest value of {name}: w .round symmetrically."):
            compute_region(build_function("round", options), "w", DTYPES[name], words)
        assert kind.get("symmetric") is False
    else:
        found = compute_region(build_function("round", options), "w", DTYPES[name], words)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", ["BF16", "F32"])
def test_protected_scalars_keep_their_bits_and_do_not_count(name, kind, scope):
    words = draw_weights(name, (10, 19))
    outliers = np.argsort(-np.abs(values_of(name, words)).reshape(-1))[:3].tolist()
    kept = tuple(sorted({0, 1, 2, 40, 41, 42, 43, 44, 189, *outliers}))
    words.reshape(-1)[[0, 44]] = 0x7FC0 << (DTYPES[name].bits - 16)  # NaN
    expected = round_each(name, words, kind | scope, kept)
    for rows in (None, 1, 4):
        found = compute_region(build_function("round", kind | scope), "w", DTYPES[name], words, kept, rows)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("clip", [{"z": 1.5}, {"fraction": 0.2}, {"iqr": 0.5}], ids=str)
@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("kind", KINDS[1::2], ids=str)
def test_a_clip_comes_first(kind, scope, clip):
    words, dtype = draw_weights("BF16", (10, 19), seed=4), DTYPES["BF16"]
    for kept in ((), (0, 17, 100)):
        clipped = compute_region(build_function("clip", clip), "w", dtype, words, kept)
        expected = compute_region(build_function("round", kind | scope), "w", dtype, clipped, kept)
        for rows in (None, 1, 5):
            options = kind | scope | {"clip": clip}
            assert np.array_equal(
                compute_region(build_function("round", options), "w", dtype, words, kept, rows), expected
            )
        assert (clipped != words).any()


@pytest.mark.parametrize("scope", [*SCOPES, {"block": [64, 64]}], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_size_of_a_block_does_not_matter(kind, scope):
    words = draw_weights("F16", (130, 150), seed=5)
    function = build_function("round", kind | scope)
    expected = compute_region(function, "w", DTYPES["F16"], words)
    for rows in (1, 4, 70):
        assert np.array_equal(compute_region(function, "w", DTYPES["F16"], words, rows=rows), expected)
    assert function.find_height((130, 150)) == (scope["block"][0] if isinstance(scope.get("block"), list) else 1)
    assert not function.sparse


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_the_size_of_a_piece_does_not_matter(name, kind, scope, monkeypatch):
    words = draw_weights(name, (60, 70), seed=6)
    words[:20] &= 0x83FF  # subnormal values of F16
    expected = compute_region(build_function("round", kind | scope), "w", DTYPES[name], words)
    monkeypatch.setattr("swsurgery.rewriting.scope.PIECE_SCALARS", 256)
    assert np.array_equal(compute_region(build_function("round", kind | scope), "w", DTYPES[name], words), expected)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_bit_patterns_and_values_are_rounded_alike(name, bits, scope, monkeypatch):
    """Every finite value is in some group, also beside values of about the same magnitude."""
    finite = np.array([w for w in range(1 << 16) if w & 0x7FFF <= DTYPES[name].largest], np.uint16)
    mixed = np.random.default_rng(8).permutation(finite)
    words = np.concatenate([finite, mixed])[: len(finite) * 2 // 100 * 100].reshape(-1, 100)
    function = build_function("round", {"bits": bits} | scope)
    monkeypatch.setattr("swsurgery.rewriting.scope.PIECE_SCALARS", 500)  # a small group affects only its piece
    found = compute_region(function, "w", DTYPES[name], words)
    monkeypatch.setattr(rounding, "SMALLEST_SCALES", {})
    assert np.array_equal(found, compute_region(function, "w", DTYPES[name], words))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_product_of_a_code_and_a_scale_is_rounded_to_nearest(name, bits, monkeypatch):
    """Each row has another largest fraction and, with both signs, every code. Exponents do not change the fractions."""
    dtype, top = DTYPES[name], 2 ** (bits - 1) - 1
    one = 0x3C00 if name == "F16" else 0x3F80
    highest = values_of(name, np.arange(one, one + (1 << dtype.mantissa), dtype=np.uint16))
    exact = np.outer(highest, np.arange(-top, top + 1) / top)
    if name == "F16":
        words = exact.astype(np.float16).view(np.uint16)
    else:
        words = (exact.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    function = build_function("round", {"bits": bits, "per": "channel"})
    found = compute_region(function, "w", dtype, words)
    monkeypatch.setattr(rounding, "SMALLEST_SCALES", {})
    assert np.array_equal(found, compute_region(function, "w", dtype, words))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_common_weights_are_rounded_on_bit_patterns(name, monkeypatch):
    words = draw_weights(name, (20, 256))
    words[3, :128] = 0
    monkeypatch.setattr(rounding.RoundFunction, "_round_values", None)
    compute_region(build_function("round", {"bits": 4, "block": 128}), "w", DTYPES[name], words)
    compute_region(build_function("round", {"bits": 4}), "w", DTYPES[name], words)


def test_a_clip_of_blocks_is_refused():
    with pytest.raises(ValueError, match="limits for the whole tensor"):
        rounding.RoundFunction(4, clip=ClipFunction("z", 3, CHANNEL))


def test_the_length_of_what_is_read_does_not_matter():
    words = draw_weights("BF16", (30, 50))
    for clip in ({"z": 2}, {"fraction": 0.05}, {"iqr": 1}):
        function = build_function("round", {"bits": 4, "clip": clip})
        expected = function.measure([source_of("BF16", words)]).ranges
        assert all(function.measure([source_of("BF16", words, pieces=n)]).ranges == expected for n in (1, 7, 64, 999))


@pytest.mark.parametrize("columns", [65_535, 65_536, 200_001])
def test_long_rows(columns):
    words = draw_weights("BF16", (3, columns), outliers=50)
    for options in ({"bits": 4, "per": "channel"}, {"bits": 4, "block": 128, "symmetric": False}):
        found = compute_region(build_function("round", options), "w", DTYPES["BF16"], words)
        width = columns if "per" in options else 128
        for begin in range(0, columns, width * 400):
            part = words[:, begin : begin + width].copy()
            expected = compute_region(build_function("round", options), "w", DTYPES["BF16"], part)
            assert np.array_equal(found[:, begin : begin + width], expected)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.get("symmetric", True)], ids=str)
@pytest.mark.parametrize("name", FLOATS[1:])
def test_the_largest_magnitude_of_a_symmetric_group_survives(name, kind):
    words = draw_patterns(name, (40, 16), seed=6)
    found = compute_region(build_function("round", kind | {"block": 8}), "w", DTYPES[name], words)
    groups, rounded = (np.abs(values_of(name, w)).reshape(-1, 8) for w in (words, found))
    assert np.array_equal(groups.max(axis=1), rounded.max(axis=1))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_a_second_rounding_changes_nothing(name, bits):
    function = build_function("round", {"bits": bits, "block": 16})
    once = compute_region(function, "w", DTYPES[name], draw_weights(name, (20, 64)))
    assert np.array_equal(compute_region(function, "w", DTYPES[name], once), once)
    assert max(len(np.unique(group)) for group in once.reshape(-1, 16)) <= 2**bits - 1


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", ["BF16", "F64", "F8_E4M3FNUZ"])
def test_zeros_stay_zero(name, kind, scope):
    words = np.zeros_like(draw_weights(name, (10, 19)))
    if DTYPES[name].special != "fnuz":
        words[1] = 1 << (DTYPES[name].bits - 1)
    found = compute_region(build_function("round", kind | scope), "w", DTYPES[name], words)
    assert not found.any()


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("kind", KINDS[1::2], ids=str)
@pytest.mark.parametrize(("name", "bad"), [("BF16", 0xFF80), ("F64", 0x7FF8 << 48), ("F8_E5M2FNUZ", 0x80)])
def test_a_scalar_that_is_not_finite_is_refused(name, bad, kind, scope):
    words = draw_weights(name, (10, 11))
    words[3, 4] = bad
    with pytest.raises(NumberError, match=r"^1 scalar is NaN or infinite: w \(first: \[3, 4\]\)$"):
        compute_region(build_function("round", kind | scope), "w", DTYPES[name], words)


@pytest.mark.parametrize(("name", "largest"), [("F8_E4M3", 448), ("F16", 65504), ("BF16", 3.3895313892515355e38)])
def test_a_level_beyond_the_largest_value_is_refused(name, largest):
    # scale = 2 * largest / 3, zero point round(1.5) = 2, so the lowest level is -4/3 of the largest value.
    words = words_of(name, [[largest, -largest]])
    with pytest.raises(NumberError, match=rf"^1 result not finite or beyond .* {name}: w \(round symmetrically\)$"):
        compute_region(build_function("round", {"bits": 2, "symmetric": False}), "w", DTYPES[name], words)
    found = compute_region(build_function("round", {"bits": 2}), "w", DTYPES[name], words)
    assert np.array_equal(found, words)


def test_a_range_that_overflows_float64_is_refused():
    words = words_of("F64", [[1.7e308, -1.7e308]])
    with pytest.raises(NumberError, match="^the range of the scalars overflows float64: w$"):
        compute_region(build_function("round", {"bits": 2, "symmetric": False}), "w", DTYPES["F64"], words)


def test_an_integer_dtype_is_refused():
    with pytest.raises(NumberError, match="I8 is not a floating-point dtype: w"):
        compute_region(build_function("round", {"bits": 4}), "w", DTYPES["I8"], np.zeros((2, 2), np.uint8))


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (), (1,), (5,), (2, 3, 4)])
def test_any_shape(shape, scope):
    words = np.full(shape, 0x3F80, np.uint16)
    for kind in KINDS:
        found = compute_region(build_function("round", kind | scope | {"clip": {"z": 2}}), "w", DTYPES["BF16"], words)
        assert np.array_equal(found, words)


def test_the_table_of_nf4_is_the_published_one():
    """Appendix E of arXiv:2305.14314; every level is a float32 value, and 0 is one of them."""
    assert len(rounding.NF4) == 16 and list(rounding.NF4) == sorted(rounding.NF4)
    assert all(float(np.float32(level)) == level for level in rounding.NF4)
    assert (rounding.NF4[0], rounding.NF4[7], rounding.NF4[15]) == (-1, 0, 1)
    # The quantiles of the normal distribution that define the levels, with the offset that bitsandbytes uses.
    quantile = NormalDist().inv_cdf
    upper = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    lower = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    levels = np.sort([*upper, 0, *lower]) / max(upper)
    assert np.allclose(levels, rounding.NF4, atol=1e-7)


@pytest.mark.parametrize("name", ["F32", "BF16"])
def test_a_value_between_two_levels_of_nf4_takes_the_lower_one(name):
    kind = np.float64 if name == "F32" else np.float32
    for low, high in zip(rounding.NF4, rounding.NF4[1:], strict=False):
        middle = (low + high) / 2
        near = [kind(middle), np.nextafter(kind(middle), kind(2)), np.nextafter(kind(middle), kind(-2))]
        groups = np.array([near]).reshape(1, 1, 1, 3)
        expected = [nearest_level(x) for x in near]
        rounding._quantise_nf4(groups, np.ones((1, 1, 1, 1), kind))
        assert groups.reshape(-1).tolist() == [float(kind(level)) for level in expected]


@given(
    words=st.lists(st.integers(0, 0x7F00) | st.integers(0x8000, 0xFF00), min_size=1, max_size=40),
    columns=st.integers(1, 8),
    scope=st.sampled_from(SCOPES),
    kind=st.sampled_from(KINDS),
)
def test_any_patterns(words, columns, scope, kind):
    matrix = np.array((words * columns)[: len(words) // columns * columns], np.uint16).reshape(-1, columns)
    found = compute_region(build_function("round", kind | scope), "w", DTYPES["BF16"], matrix, rows=3)
    assert np.array_equal(found, round_each("BF16", matrix, kind | scope))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_torch_computes_the_same(bits, symmetric):
    torch = pytest.importorskip("torch")
    words = draw_weights("BF16", (64, 256), outliers=20)
    groups = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).float().view(-1, 128)
    if symmetric:
        most = 2 ** (bits - 1) - 1
        scale = groups.abs().amax(1, keepdim=True) / most
        codes = (groups / scale).round().clamp(-most, most).int()
    else:
        low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
        scale = ((high.double() - low.double()) / (2**bits - 1)).float()
        zero = (-low.double() / scale.double()).round().int()
        codes = ((groups / scale).round().int() + zero).clamp(0, 2**bits - 1) - zero
    expected = (codes * scale).bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(words.shape)
    options = {"bits": bits, "symmetric": symmetric, "block": 128}
    assert np.array_equal(compute_region(build_function("round", options), "w", DTYPES["BF16"], words), expected)


def test_rounding_removes_at_most_half_a_step():
    words = draw_weights("F32", (50, 128))
    values = values_of("F32", words)
    found = values_of(
        "F32", compute_region(build_function("round", {"bits": 4, "block": 32}), "w", DTYPES["F32"], words)
    )
    step = np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True) / 7
    assert (np.abs(found - values).reshape(-1, 32) <= step * (0.5 + 1e-6)).all()
    assert math.isfinite(found.sum())
