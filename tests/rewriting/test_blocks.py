"""Large regions: pieces of columns, threads and memory. Small ones are compared with oracles in the other files."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from arrays import draw_weights, list_groups, source_of

from swsurgery.errors import NumberError
from swsurgery.rewriting.apply import compute_region
from swsurgery.rewriting.kept import KeptScalars
from swsurgery.rewriting.read import build_function
from swsurgery.rewriting.scope import PIECE_SCALARS, find_pieces
from swsurgery.storage.dtypes import DTYPES

OPERATIONS = [
    ("zero", {}),
    ("set", {"value": 0.5}),
    ("scale", {"factor": 1.1}),
    ("clip", {"z": 3}),
    ("clip", {"iqr": 1.5, "block": [300, 100]}),
    ("clip", {"fraction": 0.01, "per": "channel"}),
    ("prune_outliers", {"count": 500}),
    ("round", {"bits": 4}),
    ("round", {"bits": 4, "block": 64, "clip": {"z": 4}}),
    ("round", {"bits": 4, "block": [300, 100], "symmetric": False}),
    ("round", {"bits": 4, "block": [300, 100], "clip": {"z": 4}}),
    ("round", {"bits": 4, "per": "channel", "levels": "nf4"}),
]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (301, 1003), (3, 200_000), (5000, 7)])
@pytest.mark.parametrize(("height", "width"), [(1, None), (1, 1), (1, 128), (300, 100), (512, 512), (7, None)])
def test_pieces_cover_a_matrix_once(shape, height, width):
    seen = np.zeros(shape, np.int64)
    for piece in find_pieces(*shape, height, width):
        part = piece.view(seen)
        part += 1
        assert part.size == piece.scalars <= max(PIECE_SCALARS, height * (width or shape[1]))
        assert piece.begin % height == 0 and piece.left % (width or 1) == 0
        assert part.shape[0] % height == 0 or piece.end == shape[0]
        assert part.shape[1] % (width or 1) == 0 or piece.right == shape[1]
    assert (seen == 1).all()


@pytest.mark.parametrize(("op", "options"), [o for o in OPERATIONS if "[300" in str(o)])
def test_every_group_is_computed_as_if_it_were_alone(op, options):
    options = {name: value for name, value in options.items() if name != "clip"}  # its limits are the tensor's
    shape, dtype = (301, 1003), DTYPES["BF16"]
    words = draw_weights("BF16", shape, outliers=500)
    kept = np.sort(np.random.default_rng(1).choice(words.size, 40, replace=False))
    words.reshape(-1)[kept[0]] = 0x7FC0
    found = compute_region(build_function(op, options), "w", dtype, words, tuple(kept.tolist()))
    for group in list_groups(options, shape):
        rows, columns = np.unique(group // shape[1]), np.unique(group % shape[1])
        part = words[np.ix_(rows, columns)]
        inside = tuple(np.flatnonzero(np.isin(group, kept)).tolist())
        expected = compute_region(build_function(op, options), "w", dtype, part, inside)
        assert np.array_equal(found[np.ix_(rows, columns)], expected)


@pytest.mark.parametrize(("op", "options"), OPERATIONS)
def test_threads_compute_the_same(op, options):
    words, dtype = draw_weights("BF16", (1200, 300), outliers=500), DTYPES["BF16"]
    function = build_function(op, options)
    expected = compute_region(function, "w", dtype, words)
    measured = function.measure([source_of("BF16", words)])
    step = measured.find_height(words.shape)
    out = np.empty_like(words)

    def compute(row: int) -> None:
        measured.compute("w", dtype, row, words[row : row + step], out[row : row + step])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(compute, range(0, 1200, step)))
    assert np.array_equal(out, expected)


@pytest.fixture(scope="module")
def large() -> np.ndarray:
    return draw_weights("BF16", (1024, 4096), outliers=500)


@pytest.mark.parametrize(("op", "options"), [*OPERATIONS, ("round", {"bits": 8, "block": [512, 512]})])
def test_memory_does_not_grow_with_the_region(large, op, options):
    """Measuring 8 MB and computing them in place take at most 8 MB, with all tables and buffers."""
    function, source, words = build_function(op, options), source_of("BF16", large), large.copy()
    step = max(function.find_height(words.shape), 64)
    step -= step % function.find_height(words.shape)
    tracemalloc.start()
    try:
        measured = function.measure([source])
        for row in range(0, len(words), step):
            block = words[row : row + step]
            measured.compute("w", DTYPES["BF16"], row, block, block)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_the_index_of_a_scalar_in_a_piece_of_columns():
    words = draw_weights("BF16", (600, 1003))
    words[[400, 599], [777, 1002]] = 0xFF80
    for op, options in (("round", {"bits": 4, "block": [300, 100]}), ("clip", {"z": 3, "block": [300, 100]})):
        with pytest.raises(NumberError, match=r"^1 scalar is NaN or infinite: w \(first: \[400, 777\]\)$"):
            compute_region(build_function(op, options), "w", DTYPES["BF16"], words)
        with pytest.raises(NumberError, match=r"^1 scalar is NaN or infinite: w \(first: \[599, 1002\]\)$"):
            compute_region(build_function(op, options), "w", DTYPES["BF16"], words, kept=(400 * 1003 + 777,))


def test_protected_scalars_of_a_piece():
    kept = (0, 9, 10, 25, 37, 99)
    found = KeptScalars.of_sources([source_of("BF16", np.zeros((10, 10), np.uint16), kept)])
    for row in (0, 2):
        for piece in find_pieces(8, 10, 2, 3):
            expected = [
                n for n, flat in enumerate(piece.view(np.arange(100).reshape(10, 10)[row:]).flat) if flat in kept
            ]
            assert found.find_in_piece("w", row, 10, piece).tolist() == expected
            assert not len(found.find_in_piece("other", row, 10, piece))
    assert found.format_index("w", 37) == "[3, 7]" and found.format_index("other", 37) == "[37]"
