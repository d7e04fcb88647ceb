"""Messages about one scalar of a region have its index in the tensor, and describe a scalar that is not protected."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import swsurgery
from swsurgery.errors import PlanError

SLICE = {"tensor": "a.weight", "slice": "2:5, 3:"}


@pytest.fixture
def base(tmp_path):
    values = np.ones((6, 8), np.float16)
    values[3, 5], values[4, 7] = np.nan, 60000
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"a.weight": values}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def protect(*index):
    return {"op": "protect", "tensor": "a.weight", "index": [*index]}


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([{"op": "scale", **SLICE, "factor": 2}], "2 scalars .* the first, [3, 5]: the stored value is nan"),
        (
            [{"op": "scale", **SLICE, "factor": 2}, protect(3, 5)],
            "1 scalar .* the first, [4, 7]: 120000 overflows F16",
        ),
        ([{"op": "round", **SLICE, "bits": 4}], "1 scalar is NaN or infinite: .* (first: [3, 5])"),
        ([{"op": "round", "tensors": "a.weight", "bits": 4}], "1 scalar is NaN or infinite: a.weight (first: [3, 5])"),
        ([{"op": "clip", **SLICE, "z": 3}], "(first: [3, 5])"),
        ([{"op": "prune_outliers", **SLICE, "count": 1}], "(first: [3, 5])"),
    ],
)
def test_the_index_is_that_in_the_tensor(base, tmp_path, edits, message):
    with pytest.raises(PlanError) as error:
        swsurgery.apply(edits, base, tmp_path / "out", check="off")
    for part in message.split(" .* "):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_protected_scalar_that_cannot_be_scaled_is_left_out(base, tmp_path):
    edits = [{"op": "scale", **SLICE, "factor": 2}, protect(3, 5), protect(4, 7)]
    assert swsurgery.apply(edits, base, tmp_path / "out", check="off").record.changes[0].changed == 13
