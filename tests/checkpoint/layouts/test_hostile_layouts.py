"""Files that are nearly right: a layout reads them, or says that it cannot tell, and does nothing else."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_awq
import test_gptq
from checkpoints import Tensor, down, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from quantised_files import SHARD

from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.find import WeightShapes, find_matrix, make_reader
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import SwsurgeryError

pytest.importorskip("torch")
import test_bitsandbytes
import test_quanto
import test_torchao

WEIGHT = down(0)
MODULE = WEIGHT.removesuffix(".weight")
NAMES = {"float16": "F16", "float32": "F32", "int8": "I8", "uint8": "U8", "int32": "I32"}
SIZES = {"F16": 2, "F32": 4, "I8": 1, "U8": 1, "I32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "BOOL": 1, "I64": 8}
ODD: list[object] = [None, True, 0, -1, 3, 2**70, 1e308, "", "int", [], [1], {}, {"a": {"b": []}}, math.nan]


def store(arrays: dict[str, NDArray], prefix: str) -> dict[str, Tensor]:
    return {prefix + k: (NAMES[v.dtype.name], v.shape, np.ascontiguousarray(v).tobytes()) for k, v in arrays.items()}


def describe(arrays: dict[str, NDArray], kind: str) -> str:
    target = {"target_dtype": {"_data": "int5"}} if kind.startswith("Intx") else {}
    return json.dumps(test_torchao.describe(kind, arrays, **target))


INT8, INT4 = test_torchao.INT8, test_torchao.INT4
SOUND: dict[str, tuple[dict[str, Tensor], dict[str, object], str]] = {
    "gptq": (store(test_gptq.SMALL, ""), test_gptq.CONFIG, ""),
    "awq": (store(test_awq.SMALL, ""), test_awq.CONFIG, ""),
    "auto_round": (store(test_awq.SMALL, ""), test_awq.GOOD["by AutoRound"][0], ""),
    "bitsandbytes": (store(test_bitsandbytes.DOUBLE, WEIGHT), test_bitsandbytes.FOUR_BITS, ""),
    "quanto": (
        store({"_data": test_quanto.CODES, "_scale": test_quanto.SCALES}, f"{WEIGHT}."),
        test_quanto.QUANTO,
        "",
    ),
    "int8": (store(INT8, f"{MODULE}._weight_"), test_torchao.CONFIG, describe(INT8, "Int8Tensor")),
    "intx": (store(INT8, f"{MODULE}._weight_"), test_torchao.CONFIG, describe(INT8, "IntxUnpackedToInt8Tensor")),
    "int4": (store(INT4, f"{MODULE}._weight_"), test_torchao.CONFIG, describe(INT4, "Int4Tensor")),
}


def spoil_tensor(tensor: Tensor, draw: random.Random) -> Tensor:
    """Another dtype, another shape of the same bytes, or other bytes."""
    dtype, shape, data = tensor
    way = draw.randrange(4)
    if way == 0:
        dtype = draw.choice([name for name, size in SIZES.items() if len(data) % size == 0])
        shape = (len(data) // SIZES[dtype], 1)
    elif way == 1:
        shape = draw.choice([shape[::-1], (*shape, 1), (1, *shape), (math.prod(shape),), (math.prod(shape) // 2, 2)])
    elif way == 2:
        cut = draw.randrange(0, len(data) + 1, SIZES[dtype])
        shape, data = (cut // SIZES[dtype],), data[:cut]
    else:
        data = draw.choice([draw.randbytes(len(data)), bytes(len(data)), b"\xff" * len(data)])
    size = SIZES[dtype]
    return (dtype, shape, data) if math.prod(shape) * size == len(data) else tensor


def spoil_text(text: str, draw: random.Random) -> str:
    """Another value of one key of a JSON object, at any depth."""
    document = json.loads(text)
    places = list(walk(document))
    above, key = draw.choice(places)
    above[key] = draw.choice(ODD)
    return json.dumps(document)


def walk(value: object) -> Iterator[tuple[dict, str]]:
    if isinstance(value, dict):
        for key in list(value):
            yield value, key
            yield from walk(value[key])


def write_spoiled(folder: Path, kind: str, draw: random.Random) -> None:
    tensors, config, text = SOUND[kind]
    tensors, config = dict(tensors), dict(config)
    for _ in range(draw.randint(1, 3)):
        way = draw.randrange(4)
        if way == 0 and text:
            text = spoil_text(text, draw)
        elif way <= 1:
            config[draw.choice(list(config))] = draw.choice([v for v in ODD if v == v])
        elif way == 2 and len(tensors) > 1:
            del tensors[draw.choice(list(tensors))]
        else:
            name = draw.choice(list(tensors))
            tensors[name] = spoil_tensor(tensors[name], draw)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    write_shard(folder / SHARD, tensors)
    if text:
        add_metadata(folder / SHARD, text)


def add_metadata(path: Path, text: str) -> None:
    """Put the text that torchao stores for the weight into the header."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = {"tensor_names": json.dumps([WEIGHT]), WEIGHT: text}
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])


def read_all(folder: Path) -> bool:
    """Read corners and rows of the weight; False if something cannot be told."""
    checkpoint = open_checkpoint(folder)
    list(WeightShapes(checkpoint))
    matrix = find_matrix(checkpoint, WEIGHT)
    if matrix is None:
        return False
    rows, cols = matrix.shape[-2:]
    for place in ((0, 0), (rows - 1, cols - 1)):
        cell = matrix.find_cell(place)
        value = cell.values[cell.read_code(make_reader(checkpoint))]
        found = matrix.dequantise(place[0], place[0] + 1)
        assert found.shape == (1, cols)
        assert np.array_equal(found[0, place[1]], value, equal_nan=True)
    return True


@pytest.mark.parametrize("kind", SOUND)
def test_the_sound_files_are_read(tmp_path, kind):
    tensors, config, text = SOUND[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    write_shard(tmp_path / SHARD, tensors)
    if text:
        add_metadata(tmp_path / SHARD, text)
    assert read_all(tmp_path)


@pytest.mark.parametrize("kind", SOUND)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_nearly_right_files_are_read_or_refused(tmp_path_factory, kind, seed):
    folder = tmp_path_factory.mktemp("spoiled")
    write_spoiled(folder, kind, random.Random(seed))
    try:
        read_all(folder)
    except (CannotTell, SwsurgeryError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
