"""--finite: every NaN and infinity of every float dtype is found, by decoding each element as the oracle."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from checkpoints import SIZES, down, tensor, write_llama, write_single

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main
from swsurgery.storage import dtypes
from swsurgery.storage.dtypes import DTYPES
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.value_findings import MAX_REPORTED, list_not_finite
from swsurgery.verifying.value_search import ValueSearch

FLOATS = [name for name, dtype in DTYPES.items() if dtype.kind == "float"]


def scan(root, step: int) -> list[Finding]:
    """The findings of model.safetensors when it is fed in pieces of `step` bytes."""
    search = ValueSearch(open_checkpoint(root))
    data = (root / "model.safetensors").read_bytes()
    scan = search.follow("model.safetensors")
    for offset in range(0, len(data), step):
        scan.feed(offset, data[offset : offset + step])
    assert scan.complete
    return list_not_finite(search)


def patterns(dtype: str) -> bytes:
    """All bit patterns of the 8 and 16-bit floats; of wider ones the edges of what is finite, both signs."""
    size = SIZES[dtype]
    if size <= 2:
        return np.arange(1 << 8 * size, dtype=f"<u{size}").tobytes()
    top = {4: 0x7F800000, 8: 0x7FF << 52}[size]
    edges = [0, 1, top - 1, top, top + 1, top | (top >> 1), (1 << 8 * size - 1) - 1]
    return b"".join((e | sign << 8 * size - 1).to_bytes(size, "little") for e in edges for sign in (0, 1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_exactly_the_patterns_that_decode_to_no_number(tmp_path, dtype):
    data, size = patterns(dtype), SIZES[dtype]
    words = [data[i : i + size] for i in range(0, len(data), size)]
    bad = [i for i, word in enumerate(words) if not math.isfinite(dtypes.decode(DTYPES[dtype], word))]
    write_single(tmp_path, {"a": tensor("U8", 3), "w": (dtype, (len(words),), data)})
    (finding,) = scan(tmp_path, 1 << 20)
    assert (finding.rule, finding.file, finding.tensor, finding.index) == (
        "non-finite", "model.safetensors", "w", (bad[0],),
    )  # fmt: skip
    others = f"and {len(bad) - 1} more" if len(bad) > 1 else ""
    assert others in finding.message


@pytest.mark.parametrize("step", [1, 3, 7, 64, 4096])
@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F8_E4M3"])
def test_pieces_of_any_size_find_the_same(tmp_path, step, dtype):
    size = SIZES[dtype]
    kind, shape, data = tensor(dtype, 5, 7, seed=1)
    nan = {8: b"\0" * 6 + b"\xf8\x7f", 4: b"\0\0\xc0\x7f", 2: b"\xc0\x7f", 1: b"\x7f"}[size]
    data = data[: 23 * size] + nan + data[24 * size :]
    write_single(tmp_path, {"a": tensor("U8", 3), "w": (kind, shape, data), "z": tensor("F32", 2)}, padding=5)
    (finding,) = scan(tmp_path, step)
    assert (finding.tensor, finding.index, finding.message) == ("w", (3, 2), f"the value is nan (0x{nan[::-1].hex()})")


def test_integers_with_the_bits_of_a_nan_are_fine(tmp_path):
    data = b"\0\0\xc0\x7f" * 6
    write_single(tmp_path, {d: (d, (24 // SIZES[d],), data) for d in ("I8", "U8", "I16", "I32", "I64")})
    assert scan(tmp_path, 1 << 20) == []


def test_scales_and_complex_numbers_have_nans_too(tmp_path):
    write_single(tmp_path, {"s": ("F8_E8M0", (3,), b"\x7f\xff\x00")})
    (finding,) = scan(tmp_path, 1 << 20)
    assert (finding.tensor, finding.index) == ("s", (1,))
    write_single(tmp_path, {"c": ("C64", (2,), b"\0" * 12 + b"\0\0\x80\x7f")})
    (finding,) = scan(tmp_path, 5)
    assert (finding.tensor, finding.index) == ("c", (1,))


def test_many_broken_tensors_are_summarised(tmp_path):
    inf = ("F16", (1,), b"\x00\x7c")
    write_single(tmp_path, {f"t{i:02}": inf for i in range(MAX_REPORTED + 5)})
    findings = scan(tmp_path, 1 << 20)
    assert len(findings) == MAX_REPORTED + 1 and "5 more tensors" in findings[-1].message


def test_the_command_searches_on_request_and_needs_no_record(tmp_path, capsys):
    root = write_llama(tmp_path / "model")
    assert main(["verify", str(root), "--finite", "--quiet"]) == 0
    assert "no stored floating-point value is NaN or infinite" in capsys.readouterr().out
    write_llama(root, {"extra": ("BF16", (2,), b"\x80\x3f\x80\xff")})
    assert main(["verify", str(root), "--finite", "--quiet", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["rule"], finding["tensor"], finding["index"]) == ("non-finite", "extra", [1])
    assert "-inf" in finding["message"]
    assert down(0) in open_checkpoint(root).weight_map
