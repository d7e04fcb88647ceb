"""diff: exactly the scalars that differ, held against numpy's own comparison of the same arrays."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from patched import DOWN, FIRST, SECOND, contents, tensors, write_base, write_patched, write_shard
from safetensors import deserialize
from safetensors.numpy import save_file

from swsurgery.checkpoint.diff import SHORT_RUN, Difference, diff
from swsurgery.cli import main


def compare(a: Path, b: Path, limit: int = 1000) -> Difference:
    return diff(a, b, limit=limit)


def as_float(bits: np.ndarray) -> np.ndarray:
    """BF16 bits as the float32 they are the upper half of."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path / "base")


def test_a_checkpoint_is_the_same_as_itself(base):
    difference = compare(base, base)
    assert difference.same
    assert difference.changes == () and difference.tensors == {}
    assert difference.files == dict.fromkeys(sorted(contents(base)), "same")


@pytest.mark.parametrize("seed", range(5))
def test_random_changes_are_named_exactly(base, tmp_path, seed):
    generator = np.random.default_rng(seed)
    before, after = tensors(), tensors()
    for name in generator.choice(sorted(after), 4, replace=False):
        flat = after[name].reshape(-1)
        # Every other place at most, so that no two neighbours make a run.
        places = 2 * generator.choice(len(flat) // 2, min(3, len(flat) // 2), replace=False)
        flat[places] ^= generator.integers(1, 128, len(places)).astype(np.uint16)
    other = write_base(tmp_path / "other", after)
    expected = {
        (
            name,
            tuple(map(int, index)),
            float(as_float(before[name])[tuple(index)]),
            float(as_float(array)[tuple(index)]),
        )
        for name, array in after.items()
        for index in np.argwhere(array != before[name])
    }
    difference = compare(base, other)
    assert {(c.tensor, c.index, c.old, c.new) for c in difference.changes} == expected
    assert len(difference.changes) == len(expected)
    assert difference.tensors == {
        name: (int((array != before[name]).sum()), array.size)
        for name, array in after.items()
        if (array != before[name]).any()
    }
    assert not difference.same


def test_the_base_is_what_safetensors_reads(base):
    """The oracle's arrays are the file's: the library that wrote the format agrees with them."""
    stored = dict(deserialize((base / FIRST).read_bytes()))[DOWN]
    assert (stored["dtype"], stored["shape"]) == ("BF16", [4, 6])
    assert bytes(stored["data"]) == tensors()[DOWN].tobytes()


@pytest.mark.parametrize("split", [1, 6, 11])
def test_another_sharding_of_the_same_tensors_differs_in_no_scalar(base, tmp_path, split):
    difference = compare(base, write_base(tmp_path / "other", split=split))
    assert difference.changes == () and difference.tensors == {} and difference.mismatched == {}
    assert difference.files[FIRST] == difference.files[SECOND] == "changed"


def test_a_change_is_found_across_different_shardings(base, tmp_path):
    after = tensors()
    after["model.norm.weight"][2] ^= 1
    (change,) = compare(base, write_base(tmp_path / "other", after, split=1)).changes
    assert (change.tensor, change.index) == ("model.norm.weight", (2,))


def test_a_minus_zero_and_a_nan_are_compared_as_bits(tmp_path):
    before, after = tensors(), tensors()
    before[DOWN][0, 0], after[DOWN][0, 0] = 0x0000, 0x8000
    before[DOWN][2, 0] = after[DOWN][2, 0] = 0x7FC0
    a, b = write_base(tmp_path / "a", before), write_base(tmp_path / "b", after)
    (change,) = compare(a, b).changes
    assert change.index == (0, 0)


def test_long_runs_are_one_line_and_short_ones_are_not(base, tmp_path):
    after = tensors()
    after[DOWN].reshape(-1)[3 : 3 + SHORT_RUN + 1] ^= 1
    after[DOWN].reshape(-1)[15 : 15 + SHORT_RUN] ^= 1
    difference = compare(base, write_base(tmp_path / "other", after))
    run, *single = difference.changes
    assert (run.index, run.last, run.count) == ((0, 3), (1, 1), SHORT_RUN + 1)
    assert [c.index for c in single] == [(2, 3), (2, 4), (2, 5), (3, 0)]
    assert {c.count for c in single} == {1}
    assert difference.tensors[DOWN] == (2 * SHORT_RUN + 1, 24)
    assert not difference.truncated


def test_the_limit_cuts_the_list_and_not_the_count(base, tmp_path):
    after = tensors()
    after[DOWN].reshape(-1)[::2] ^= 1
    other = write_base(tmp_path / "other", after)
    cut = compare(base, other, limit=3)
    assert (len(cut.changes), cut.truncated, cut.tensors[DOWN]) == (3, True, (12, 24))
    whole = compare(base, other, limit=12)
    assert (len(whole.changes), whole.truncated, whole.tensors[DOWN]) == (12, False, (12, 24))


def test_what_is_not_listed_is_not_taken_apart(tmp_path, monkeypatch):
    """Of a fine-tuned model nearly every second scalar differs: only counting those takes little time."""
    a, b = np.zeros(4000, np.float32), np.zeros(4000, np.float32)
    b[::2] = 1
    for name, values in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        save_file({"x": values}, tmp_path / name / "model.safetensors")
    monkeypatch.setattr("swsurgery.checkpoint.diff.DIFF_CHUNK", 4000)
    pieces, split = [], np.split
    monkeypatch.setattr(np, "split", lambda *given: pieces.append(split(*given)) or pieces[-1])
    difference = compare(tmp_path / "a", tmp_path / "b", limit=3)
    assert [change.index for change in difference.changes] == [(0,), (2,), (4,)]
    assert (difference.tensors, difference.truncated) == ({"x": (2000, 4000)}, True)
    assert max(map(len, pieces)) <= 4


def test_chunks_do_not_show(base, tmp_path, monkeypatch):
    after = tensors()
    after[DOWN].reshape(-1)[[0, 7, 15, 23]] ^= 1
    other = write_base(tmp_path / "other", after)
    whole = compare(base, other)
    monkeypatch.setattr(sys.modules["swsurgery.checkpoint.diff"], "DIFF_CHUNK", 8)
    assert compare(base, other).changes == whole.changes
    assert [c.index for c in whole.changes] == [(0, 0), (1, 1), (2, 3), (3, 5)]


def test_another_shape_is_a_mismatch_and_no_change(base, tmp_path):
    after = tensors()
    after[DOWN] = after[DOWN].reshape(6, 4)
    difference = compare(base, write_base(tmp_path / "other", after))
    assert difference.mismatched == {DOWN: "BF16 [4, 6] in a, BF16 [6, 4] in b"}
    assert difference.changes == () and not difference.same


def test_another_dtype_is_a_mismatch(base, tmp_path):
    other = write_base(tmp_path / "other")
    names = list(tensors())[:4]
    write_shard(other / FIRST, {n: tensors()[n] for n in names}, dtype="F16")
    difference = compare(base, other)
    assert set(difference.mismatched) == set(names)
    assert difference.mismatched[DOWN] == "BF16 [4, 6] in a, F16 [4, 6] in b"


def test_missing_tensors_are_named_on_their_side(base, tmp_path):
    fewer = {name: array for name, array in tensors().items() if name != "lm_head.weight"}
    other = write_base(tmp_path / "other", fewer)
    assert compare(base, other).mismatched == {"lm_head.weight": "not in b"}
    assert compare(other, base).mismatched == {"lm_head.weight": "not in a"}


def test_side_files_are_compared_too(base, tmp_path):
    other = write_base(tmp_path / "other")
    (other / "tokenizer.json").write_text('{"version": "1.1"}')
    (other / "notes.txt").write_text("hello")
    (other / "config.json").rename(tmp_path / "gone")
    difference = compare(base, other)
    states = {name: state for name, state in difference.files.items() if state != "same"}
    assert states == {"tokenizer.json": "changed", "notes.txt": "only in b", "config.json": "only in a"}
    assert not difference.same


def test_a_header_that_differs_without_a_scalar_is_a_changed_file(base, tmp_path):
    other = write_base(tmp_path / "other")
    (other / SECOND).write_bytes((other / SECOND).read_bytes().replace(b'"pt"', b'"tp"'))
    difference = compare(base, other)
    assert difference.files[SECOND] == "changed" and difference.files[FIRST] == "same"
    assert difference.changes == () and not difference.same


def test_a_patched_checkpoint_differs_from_its_base_in_the_edits(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    patched = write_patched(tmp_path)
    difference = compare(tmp_path / "base", patched)
    values = as_float(tensors()[DOWN])
    assert [(c.index, c.old, c.new) for c in difference.changes] == [
        ((1, 2), float(values[1, 2]), 0.0),
        ((3, 5), float(values[3, 5]), 2 * float(values[3, 5])),
    ]
    assert difference.files["swsurgery.json"] == "only in b"


def test_exit_codes_and_json(base, tmp_path, capsys):
    after = tensors()
    after[DOWN][1, 4] = 0x3F80
    other = write_base(tmp_path / "other", after)
    assert main(["diff", str(base), str(base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == []
    assert main(["diff", str(base), str(other), "--json"]) == 1
    old = float(as_float(tensors()[DOWN])[1, 4])
    document = json.loads(capsys.readouterr().out)
    assert document["changes"] == [{"tensor": DOWN, "index": [1, 4], "old": old, "new": 1.0}]
    assert document["files"][FIRST] == "changed" and document["files"][SECOND] == "same"
    assert main(["diff", str(base), str(tmp_path / "nowhere")]) == 2
