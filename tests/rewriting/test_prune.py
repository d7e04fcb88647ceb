"""Pruning the largest scalars, against a sort of all scalars of all sources."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import FLOATS, draw_patterns, draw_weights, source_of, values_of, words_of
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.errors import NumberError
from swsurgery.rewriting.apply import Array, compute_region, compute_regions
from swsurgery.rewriting.prune import PruneFunction
from swsurgery.storage.dtypes import DTYPES


def prune_each(arrays: dict[str, Array], count: int) -> dict[str, np.ndarray]:
    """Sort all scalars that are not protected by falling |w|, then by source and index, and clear the first `count`."""
    order = []
    for place, (name, array) in enumerate(arrays.items()):
        magnitudes = np.abs(values_of(array.dtype.name, array.words)).reshape(-1).tolist()
        order += [(-m, place, n, name) for n, m in enumerate(magnitudes) if n not in array.kept]
    new = {name: array.words.copy() for name, array in arrays.items()}
    for _, _, n, name in sorted(order)[:count]:
        new[name].reshape(-1)[n] = 0
    return new


def check(arrays: dict[str, Array], count: int) -> None:
    expected = prune_each(arrays, count)
    for rows in (None, 1, 3):
        found = compute_regions(PruneFunction(count=count), arrays, rows)
        assert all(np.array_equal(found[name], expected[name]) for name in arrays)


@pytest.mark.parametrize("count", [1, 2, 17, 100, 449])
@pytest.mark.parametrize("name", FLOATS)
def test_the_largest_of_one_source(name, count):
    dtype = DTYPES[name]
    check({"w": Array(dtype, draw_weights(name, (15, 30)))}, count)
    check({"w": Array(dtype, draw_patterns(name, (15, 30)), kept=(0, 31, 449))}, min(count, 440))


@pytest.mark.parametrize("count", [1, 5, 60, 200])
@pytest.mark.parametrize("names", [("BF16", "BF16"), ("F32", "BF16", "F64"), ("F8_E4M3", "F8_E5M2FNUZ", "F16")])
def test_all_sources_count_together(names, count):
    arrays = {
        f"w{n}": Array(DTYPES[name], draw_weights(name, (9, 14), seed=n), kept=(3, 100)) for n, name in enumerate(names)
    }
    check(arrays, count)


def test_equal_magnitudes_go_in_the_order_of_sources_and_indices():
    ones = words_of("BF16", [[1, -1, 2], [1, 0.5, 1]])
    more = words_of("F32", [[-1, 1, 3]])
    arrays = {"b": Array(DTYPES["BF16"], ones, kept=(0,)), "a": Array(DTYPES["F32"], more)}
    expected = [(2, "a"), (2, "b"), (1, "b"), (3, "b"), (5, "b"), (0, "a"), (1, "a")]
    for count in range(1, 8):
        found = compute_regions(PruneFunction(count=count), arrays)
        pruned = {(n, name) for name in arrays for n in np.flatnonzero(found[name].reshape(-1) == 0).tolist()}
        assert pruned == set(expected[:count])


def test_a_threshold_that_only_one_dtype_can_store():
    arrays = {
        "coarse": Array(DTYPES["F8_E5M2"], words_of("F8_E5M2", [[1, 1.25, 1.5]])),
        "fine": Array(DTYPES["F32"], words_of("F32", [[1.1, 1.2, 1.3]])),
    }
    for count in range(1, 6):
        check(arrays, count)


@given(data=st.data())
def test_any_patterns(data):
    pattern = st.sampled_from([0, 1, 0x8001, 0x3F80, 0xBF80, 0x7F7F, 0x4000]) | st.integers(0, 0x7F7F)
    arrays = {}
    for name in data.draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True)):
        words = np.array([data.draw(st.lists(pattern, min_size=1, max_size=12))], np.uint16)
        kept = data.draw(st.lists(st.integers(0, words.size - 1), unique=True).map(sorted))
        arrays[name] = Array(DTYPES["BF16"], words, tuple(kept))
    total = sum(a.words.size - len(a.kept) for a in arrays.values())
    if total > 1:
        check(arrays, data.draw(st.integers(1, total - 1)))


def test_a_fraction_of_all_scalars_is_rounded_down():
    words = draw_weights("F16", (10, 10))
    arrays = {"a": Array(DTYPES["F16"], words, kept=(5,)), "b": Array(DTYPES["F16"], words[:2].copy())}
    for fraction, count in ((0.3, 35), (1 / 119, 0), (0.0085, 1), (0.999, 118)):
        found = compute_regions(PruneFunction(fraction=fraction), arrays)
        assert all(np.array_equal(found[name], w) for name, w in prune_each(arrays, count).items())


@pytest.mark.parametrize("name", ["BF16", "F32"])
def test_the_length_of_what_is_read_does_not_matter(name):
    words = draw_weights(name, (30, 50))
    expected = PruneFunction(count=99).measure([source_of(name, words, (7, 8))]).cuts
    for pieces in (1, 13, 64, 1500):
        assert PruneFunction(count=99).measure([source_of(name, words, (7, 8), pieces)]).cuts == expected


@pytest.mark.parametrize(("count", "kept"), [(12, ()), (13, ()), (11, (3,))])
def test_pruning_everything_is_refused(count, kept):
    words = draw_weights("BF16", (3, 4))
    with pytest.raises(NumberError, match=rf"^pruning {count} of {12 - len(kept)} scalars removes everything: w$"):
        compute_region(PruneFunction(count=count), "w", DTYPES["BF16"], words, kept)
    arrays = {name: Array(DTYPES["BF16"], words) for name in "ab"}
    with pytest.raises(NumberError, match="^pruning 24 of 24 scalars removes everything: 2 tensors$"):
        compute_regions(PruneFunction(count=24), arrays)


@pytest.mark.parametrize(("name", "bad"), [("BF16", 0x7FC0), ("F32", 0xFF800000), ("F8_E4M3FNUZ", 0x80)])
def test_a_scalar_that_is_not_finite_is_refused(name, bad):
    words = draw_weights(name, (10, 11))
    words[3, 4] = words[7, 0] = bad
    with pytest.raises(NumberError, match=r"^2 scalars are NaN or infinite: w \(first: \[3, 4\]\)$"):
        compute_region(PruneFunction(count=3), "w", DTYPES[name], words)
    found = compute_region(PruneFunction(count=3), "w", DTYPES[name], words, kept=(37, 77))
    assert (found == 0).sum() >= 3 and found[3, 4] == bad


def test_an_integer_dtype_is_refused():
    with pytest.raises(NumberError, match="I8 is not a floating-point dtype: w"):
        compute_region(PruneFunction(count=1), "w", DTYPES["I8"], np.zeros((2, 2), np.uint8))


def test_results_go_to_out_which_may_be_the_input():
    words = draw_weights("BF16", (6, 8))
    function = PruneFunction(count=7).measure([source_of("BF16", words)])
    expected = function.compute("w", DTYPES["BF16"], 0, words)
    out = np.empty_like(words)
    assert function.compute("w", DTYPES["BF16"], 0, words, out) is out and np.array_equal(out, expected)
    assert function.compute("w", DTYPES["BF16"], 0, words, words) is words and np.array_equal(words, expected)
    assert function.sparse and function.find_height((6, 8)) == 1
