"""Clips by z-score, fraction and interquartile range, against plain numpy in float64, group by group."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from arrays import FLOATS, draw_patterns, draw_weights, list_groups, source_of, values_of, words_of
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.errors import NumberError
from swsurgery.rewriting.apply import compute_region
from swsurgery.rewriting.clip import ClipFunction
from swsurgery.rewriting.read import build_function
from swsurgery.storage.arrays import find_not_finite, get_word_type
from swsurgery.storage.dtypes import DTYPES

CLIPS = [{"z": 3}, {"z": 0.5}, {"fraction": 0.1}, {"fraction": 0.34}, {"iqr": 1.5}, {"iqr": 0}]
SCOPES = [{}, {"per": "tensor"}, {"per": "channel"}, {"block": 5}, {"block": 64}, {"block": [3, 4]}, {"block": [4, 99]}]


def find_limits(options: dict, values: np.ndarray) -> tuple[float, float]:
    """The exact limits of a group of values."""
    magnitudes = np.abs(values)
    if "z" in options:
        mean = math.fsum(magnitudes) / len(values)
        top = mean + options["z"] * math.sqrt(max(math.fsum(magnitudes * magnitudes) / len(values) - mean * mean, 0))
        return -top, top
    if "fraction" in options:
        count = math.floor(Fraction(str(options["fraction"])) * len(values))
        top = np.sort(magnitudes)[len(values) - 1 - count]
        return -top, top
    q1, q3 = np.quantile(values, [0.25, 0.75])
    return q1 - options["iqr"] * (q3 - q1), q3 + options["iqr"] * (q3 - q1)


def clip_each(name: str, words: np.ndarray, options: dict, kept: tuple[int, ...] = ()) -> np.ndarray:
    """Clip group by group: a scalar beyond a limit becomes the last value of the dtype that does not exceed it."""
    dtype = DTYPES[name]
    every = np.arange(1 << dtype.bits).astype(get_word_type(dtype)) if dtype.bits <= 16 else words.reshape(-1)
    points = np.unique(values_of(name, every[~find_not_finite(dtype, every)]))
    out = values_of(name, words).reshape(-1).copy()
    for group in list_groups(options, words.shape):
        group = np.setdiff1d(group, kept)
        if len(group):
            low, high = find_limits(options, out[group])
            low, high = points[np.searchsorted(points, low)], points[np.searchsorted(points, high, "right") - 1]
            out[group] = np.clip(out[group], low, high)
    return out.reshape(words.shape)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("rule", CLIPS, ids=str)
@pytest.mark.parametrize("name", ["F16", "BF16", "F8_E4M3", "F8_E5M2FNUZ"])
def test_a_clip_is_the_plain_clip_of_each_group(name, rule, scope):
    words = draw_weights(name, (18, 24))
    expected = clip_each(name, words, rule | scope)
    found = compute_region(build_function("clip", rule | scope), "w", DTYPES[name], words)
    assert np.array_equal(values_of(name, found), expected)
    unchanged = expected == values_of(name, words)
    assert np.array_equal(found[unchanged], words[unchanged]), "negative zeros too"
    assert unchanged.any() and (not unchanged.all() or scope == {"block": 5})


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("rule", CLIPS, ids=str)
@pytest.mark.parametrize("name", ["F64", "F32"])
def test_a_clip_of_a_wide_dtype(name, rule, scope):
    words = draw_weights(name, (18, 24))
    values = values_of(name, words)
    found = values_of(name, compute_region(build_function("clip", rule | scope), "w", DTYPES[name], words))
    for group in list_groups(rule | scope, words.shape):
        low, high = find_limits(rule, values.reshape(-1)[group])
        expected = np.clip(values.reshape(-1)[group], low, high)
        assert np.allclose(found.reshape(-1)[group], expected, rtol=2e-7 if name == "F32" else 1e-14, atol=0)
        assert (np.abs(found.reshape(-1)[group]) <= np.abs(expected) * (1 + 1e-15)).all() or "iqr" in rule


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("rule", CLIPS, ids=str)
def test_protected_scalars_keep_their_bits_and_do_not_count(rule, scope):
    words = draw_weights("BF16", (18, 24))
    kept = tuple(sorted({0, 1, 50, 100, 431, *np.argsort(-np.abs(values_of("BF16", words)).reshape(-1))[:3].tolist()}))
    expected = clip_each("BF16", words, rule | scope, kept)
    for rows in (None, 1, 5):
        found = compute_region(build_function("clip", rule | scope), "w", DTYPES["BF16"], words, kept, rows)
        assert np.array_equal(values_of("BF16", found), expected)
    other = words.copy()
    other.reshape(-1)[list(kept)] = 0x7FC0  # NaN
    found = compute_region(build_function("clip", rule | scope), "w", DTYPES["BF16"], other, kept)
    assert (found.reshape(-1)[list(kept)] == 0x7FC0).all()
    rest = np.setdiff1d(np.arange(words.size), kept)
    assert np.array_equal(values_of("BF16", found).reshape(-1)[rest], expected.reshape(-1)[rest])


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("rule", CLIPS, ids=str)
@pytest.mark.parametrize("name", ["F32", "F8_E5M2"])
def test_the_size_of_a_block_does_not_matter(name, rule, scope):
    words = draw_weights(name, (30, 40), seed=5)
    clip = build_function("clip", rule | scope)
    expected = compute_region(clip, "w", DTYPES[name], words)
    for rows in (1, 4, 7, 29):
        assert np.array_equal(compute_region(clip, "w", DTYPES[name], words, rows=rows), expected)


@pytest.mark.parametrize("rule", [{"z": 2}, {"fraction": 0.01}, {"iqr": 3}], ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_values_of_every_magnitude(name, rule):
    """The limits are at most those of exact arithmetic, and no scalar changes but those beyond them."""
    words = draw_patterns(name, (16, 64), seed=2)
    if name in ("F64", "F32"):  # squares overflow, or sums are as large as the largest scalar
        words &= 0x5FFFFFFF if name == "F32" else 0x4FFFFFFFFFFFFFFF
    values = values_of(name, words)
    found = values_of(name, compute_region(build_function("clip", rule), "w", DTYPES[name], words))
    low, high = find_limits(rule, values.reshape(-1))
    slack = 1 + 1e-12
    assert (np.abs(found) <= np.maximum(np.abs(values), 0)).all()
    assert (found <= max(high * slack, high / slack)).all() and (found >= min(low * slack, low / slack)).all()
    inside = (values <= high / slack) & (values >= low / slack)
    assert np.array_equal(found[inside], values[inside])


@pytest.mark.parametrize("rule", CLIPS[:4], ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_a_second_clip_at_the_same_threshold_changes_nothing(name, rule):
    words = draw_weights(name, (18, 24))
    measured = build_function("clip", rule).measure([source_of(name, words)])
    once = measured.compute("w", DTYPES[name], 0, words)
    assert np.array_equal(measured.compute("w", DTYPES[name], 0, once), once)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [0, 0.25, -1.5, 0.0078125])
@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_equal_magnitudes_stay(name, value, scope):
    words = words_of(name, np.full((20, 30), value))
    words[3, ::2] = words_of(name, [-value])[0]
    for rule in ({"z": 1e-9}, {"z": 100}, {"fraction": 0.5}):
        found = compute_region(build_function("clip", rule | scope), "w", DTYPES[name], words)
        assert np.array_equal(found, words)


def test_a_fraction_below_one_scalar_changes_nothing():
    words = draw_weights("F16", (5, 7))
    assert np.array_equal(compute_region(ClipFunction("fraction", 0.0285), "w", DTYPES["F16"], words), words)
    changed = compute_region(ClipFunction("fraction", 0.0286), "w", DTYPES["F16"], words) != words
    assert changed.reshape(-1).nonzero()[0].tolist() == [np.abs(values_of("F16", words)).argmax()]


@pytest.mark.parametrize("name", FLOATS)
def test_a_fence_at_zero_gives_a_zero(name):
    words = words_of(name, [[0, 0, 0, 1, 1, 1, 1, -3, 0]])
    found = compute_region(ClipFunction("iqr", 0), "w", DTYPES[name], words)
    assert values_of(name, found).tolist() == [[0, 0, 0, 1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("rule", [{"fraction": 0.3}, {"iqr": 1.5}], ids=str)
def test_a_clip_that_removes_everything_is_refused(rule, scope):
    words = np.zeros((12, 24), np.uint16)
    words[::2, ::8] = 0x3F80
    if scope.get("block") == 5:
        words = words[:, :20].copy()
    with pytest.raises(NumberError, match=r"^the clip removes everything: its threshold is 0: w \(choose"):
        compute_region(build_function("clip", rule | scope), "w", DTYPES["BF16"], words)


@pytest.mark.parametrize("scope", [{}, {"per": "channel"}], ids=str)
def test_fences_between_two_scalars_are_refused(scope):
    words = words_of("BF16", [[1, 2]])
    with pytest.raises(NumberError, match=r"^the clip would change every scalar: w \(give a larger iqr\)"):
        compute_region(build_function("clip", {"iqr": 0.1} | scope), "w", DTYPES["BF16"], words)
    assert np.array_equal(
        compute_region(build_function("clip", {"iqr": 0.5} | scope), "w", DTYPES["BF16"], words), words
    )


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("rule", CLIPS[::2], ids=str)
@pytest.mark.parametrize(("name", "bad"), [("BF16", 0x7FC0), ("F32", 0xFF800000), ("F8_E4M3FNUZ", 0x80)])
def test_a_scalar_that_is_not_finite_is_refused(name, bad, rule, scope):
    words = draw_weights(name, (10, 11))
    words[3, 4] = bad
    with pytest.raises(NumberError, match=r"^1 scalar is NaN or infinite: w \(first: \[3, 4\]\)$"):
        compute_region(build_function("clip", rule | scope), "w", DTYPES[name], words)


@pytest.mark.parametrize("scope", [{}, {"per": "channel"}], ids=str)
def test_squares_that_overflow_are_refused(scope):
    words = words_of("F64", [[1e200, 2]])
    with pytest.raises(NumberError, match="^the squares of the scalars overflow float64: w$"):
        compute_region(build_function("clip", {"z": 3} | scope), "w", DTYPES["F64"], words)


@pytest.mark.parametrize("scope", [{}, {"per": "channel"}], ids=str)
def test_an_interquartile_range_that_overflows_is_refused(scope):
    words = words_of("F64", [[1.7e308, -1.7e308, 1.7e308, -1.7e308]])
    with pytest.raises(NumberError, match="^the interquartile range overflows float64: w$"):
        compute_region(build_function("clip", {"iqr": 0} | scope), "w", DTYPES["F64"], words)


def test_an_integer_dtype_is_refused():
    with pytest.raises(NumberError, match="I8 is not a floating-point dtype: w"):
        compute_region(ClipFunction("z", 3), "w", DTYPES["I8"], np.zeros((2, 2), np.uint8))


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (), (1,), (5,), (2, 3, 4)])
def test_any_shape(shape, scope):
    words = np.full(shape, 0x3F80, np.uint16)
    for rule in CLIPS:
        found = compute_region(build_function("clip", rule | scope), "w", DTYPES["BF16"], words)
        assert np.array_equal(found, words)


@given(
    words=st.lists(st.integers(0, 0x7F7F) | st.integers(0x8000, 0xFF7F), min_size=1, max_size=40),
    columns=st.integers(1, 8),
    scope=st.sampled_from(SCOPES),
    rule=st.sampled_from(CLIPS),
)
def test_a_clip_never_enlarges_and_ignores_block_sizes(words, columns, scope, rule):
    matrix = np.array((words * columns)[: len(words) // columns * columns], np.uint16).reshape(-1, columns)
    clip = build_function("clip", rule | scope)
    try:
        found = compute_region(clip, "w", DTYPES["BF16"], matrix)
    except NumberError as error:
        assert "the clip" in str(error) and ("iqr" in rule or "threshold is 0" in str(error))
        return
    if "iqr" not in rule:
        assert (values_of("BF16", found & 0x7FFF) <= values_of("BF16", matrix & 0x7FFF)).all()
        assert np.array_equal(found & 0x8000, matrix & 0x8000)
    assert np.array_equal(compute_region(clip, "w", DTYPES["BF16"], matrix, rows=1), found)
