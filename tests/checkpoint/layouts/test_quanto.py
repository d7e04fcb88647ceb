"""quanto, on files that optimum-quanto writes, compared with its own dequantisation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import down
from numpy.typing import NDArray
from quantised_files import (
    LAYERS,
    SHARD,
    SUPER,
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
    write_config,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of quanto, when it is imported


def quantise(folder: Path, kind: str, layers=LAYERS) -> None:
    """Save layers of SmolLM2 as the state of quanto's own module."""
    quanto = pytest.importorskip("optimum.quanto")
    from safetensors.torch import save_file

    stored = {}
    for layer in layers:
        module = torch.nn.Sequential(torch.nn.Linear(1536, 576, bias=False, dtype=torch.bfloat16))
        module[0].weight.data = torch.from_numpy(read_down(layer).copy()).bfloat16()
        quanto.quantize(module, weights=getattr(quanto, kind))
        quanto.freeze(module)
        name = down(layer).removesuffix("weight")
        stored |= {name + key.removeprefix("0."): value for key, value in module.state_dict().items()}
    write_config(folder, None)
    (folder / "quanto_qmap.json").write_text("{}")
    save_file({key: value.contiguous() for key, value in stored.items()}, folder / SHARD, {"format": "pt"})


def load(folder: Path, kind: str, layer: int) -> torch.Tensor:
    """The weight that quanto makes of a file."""
    quanto = pytest.importorskip("optimum.quanto")
    from safetensors.torch import load_file

    name = down(layer).removesuffix("weight")
    state = {k.removeprefix(name): v for k, v in load_file(folder / SHARD).items() if k.startswith(name)}
    module = quanto.nn.QLinear(1536, 576, bias=False, weights=getattr(quanto, kind), dtype=torch.bfloat16)
    module.load_state_dict(state, strict=False)
    return module.weight.dequantize().detach()


@needs_model
@pytest.mark.parametrize("kind", ["qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"])
def test_every_scalar_is_what_quanto_computes(tmp_path, kind):
    quantise(tmp_path, kind)
    for layer in LAYERS:
        _, found = read_matrix(tmp_path, down(layer))
        assert torch.equal(torch.from_numpy(found).bfloat16(), load(tmp_path, kind, layer))
    find_super(tmp_path)


@needs_model
def test_the_nearest_code_changes_one_scalar(tmp_path):
    quantise(tmp_path / "model", "qint8", layers=(11,))
    before = load(tmp_path / "model", "qint8", 11).float().numpy()
    for number, place in enumerate([SUPER, (0, 0), (575, 1535)]):
        wanted = float(before[place] * 0.4 + 0.01)
        value = set_nearest(tmp_path / "model", tmp_path / f"copy{number}", down(11), place, wanted)
        after = load(tmp_path / f"copy{number}", "qint8", 11).float().numpy()
        assert after[place] == torch.tensor(value).bfloat16() and differ_once(before, after, place)


@needs_model
def test_fewer_bits_are_not_read(tmp_path):
    quantise(tmp_path, "qint4", layers=(11,))
    refuse_matrix(tmp_path, down(11), "with 2 or 4 bits")


WEIGHT = down(0)
CODES = np.arange(-24, 24, dtype=np.int8).reshape(6, 8)
SCALES = np.linspace(0.5, 1, 6, dtype=np.float32).reshape(6, 1)


def write_small(folder: Path, config: dict[str, object] | None, **arrays: NDArray) -> Path:
    """A module with tensors such as `data` and `scale`."""
    return write_arrays(folder, {f"{WEIGHT}._{k}": v for k, v in arrays.items()}, {} if config is None else config)


@pytest.mark.parametrize("config", [None, {"quant_method": "quanto", "weights": "int8", "activations": None}])
@pytest.mark.parametrize("scales", [SCALES, SCALES[:1, 0], SCALES[0, 0]])
def test_both_declarations_are_known(tmp_path, config, scales):
    _, matrix = open_matrix(write_small(tmp_path, config, data=CODES, scale=scales), WEIGHT)
    assert np.array_equal(matrix.dequantise(0, 6), CODES * scales.astype(float))
    assert matrix.layout == "quanto int8"


QUANTO = {"quant_method": "quanto", "weights": "int8"}
BAD: dict[str, tuple[dict[str, object], dict[str, NDArray], str]] = {
    "another type": (
        QUANTO | {"weights": "float8"},
        {"data": CODES, "scale": SCALES},
        "but config.json declares float8",
    ),
    "another method": ({"quant_method": "other"}, {"data": CODES, "scale": SCALES}, "is quantised"),
    "bytes without a sign": (QUANTO, {"data": CODES.view(np.uint8), "scale": SCALES}, "is not a weight of 8 bits"),
    "a shift": (QUANTO, {"data": CODES, "scale": SCALES, "shift": SCALES}, "is not a weight of 8 bits"),
    "no scales": (QUANTO, {"data": CODES}, "_scale is not stored"),
    "integer scales": (QUANTO, {"data": CODES, "scale": CODES[:, :1]}, "is not a floating-point dtype"),
    "scales by column": (QUANTO, {"data": CODES, "scale": np.ones((1, 8), np.float32)}, "does not fit 6 rows"),
    "codes without an axis": (QUANTO, {"data": CODES.reshape(-1), "scale": SCALES}, "is not a matrix"),
    "an unknown part": (QUANTO, {"data": CODES, "scale": SCALES, "more": SCALES}, "may change what the codes mean"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_not_read(tmp_path, name):
    config, arrays, message = BAD[name]
    refuse_matrix(write_small(tmp_path, config, **arrays), WEIGHT, message)


def test_scales_that_are_not_finite_are_not_used(tmp_path):
    refuse_values(write_small(tmp_path, QUANTO, data=CODES, scale=SCALES * np.float32(np.nan)), WEIGHT, "not finite")
