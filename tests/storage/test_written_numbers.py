"""A number of a manifest goes to the stored dtype as it is written: rounded once, not by way of binary64."""

from __future__ import annotations

import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patched import DOWN, EDITED, FIRST, apply_text, place, write_base

from swsurgery.cli import main
from swsurgery.errors import ManifestError, NumberError
from swsurgery.manifest.load import parse_manifest
from swsurgery.manifest.operations import explain_expectation
from swsurgery.storage.dtypes import DTYPES, decode, encode
from swsurgery.storage.numbers import Written, format_exact

ABOVE_TIE, TIE, BELOW_TIE = "1.00390625000000000000001", "1.00390625", "1.00390624999999999999999"
EDIT = f"version: 1\nbase: {{path: base}}\nedits:\n  - {{op: set, tensor: {DOWN}, index: [1, 2], value: VALUE}}\n"


def edit(value: str, as_json: bool = False):
    text = EDIT.replace("VALUE", value)
    if as_json:
        text = (
            '{"version": 1, "base": {"path": "base"}, "edits": [{"op": "set", "layer": 0, "row": 0, "col": 0, '
            f'"value": {value}}}]}}'
        )
    return parse_manifest(text.encode(), Path("m.yaml")).manifest.edits[0]


@pytest.mark.parametrize("as_json", [False, True], ids=["yaml", "json"])
@pytest.mark.parametrize(
    "dtype, written, stored",
    [
        ("BF16", ABOVE_TIE, 1.0078125),
        ("BF16", TIE, 1.0),  # half to even
        ("BF16", BELOW_TIE, 1.0),
        ("BF16", "-" + ABOVE_TIE, -1.0078125),
        ("BF16", "100390625000000000000001e-23", 1.0078125),
        ("F32", "1.0000000596046447753906250001", 1.0000001192092896),
        ("F64", "9007199254740993.0000000001", 9007199254740994.0),
        ("F32", "36893490346442358785", 2.0**65 + 2.0**42),  # a whole number that no 64 bits hold
        ("F32", "36893490346442358784", 2.0**65),
    ],
)
def test_a_value_is_rounded_once(as_json, dtype, written, stored):
    assert decode(DTYPES[dtype], edit(written, as_json).compute_bytes(DTYPES[dtype], b"")) == stored


def test_it_is_what_apply_writes(tmp_path):
    write_base(tmp_path / "base")
    for number, (value, bits) in enumerate([(ABOVE_TIE, 0x3F81), (TIE, 0x3F80)]):
        shard = apply_text(tmp_path, EDIT.replace("VALUE", value), f"patched{number}") / FIRST
        assert struct.unpack_from("<H", shard.read_bytes(), place(shard, DOWN, EDITED)) == (bits,)
        assert main(["verify", str(shard.parent), "--manifest", str(tmp_path / f"patched{number}.yaml")]) == 0


@pytest.mark.parametrize("value", ["-0.0", "0e-99999999999999999999", "0.0"])
def test_zero_is_zero_however_it_is_written(value):
    stored = edit(value).compute_bytes(DTYPES["BF16"], b"")
    assert stored == (b"\0\x80" if value.startswith("-") else b"\0\0")


@pytest.mark.parametrize("value", ["1e-400", "-1e-99999999999999999999", "0." + "0" * 350 + "1"])
def test_what_is_too_small_for_binary64_is_refused_and_no_zero(value):
    for dtype in ("BF16", "F64"):
        with pytest.raises(NumberError, match=f"a number nearer to zero than 5e-324 underflows {dtype} to zero"):
            edit(value).compute_bytes(DTYPES[dtype], b"")


def test_what_is_too_large_for_binary64_is_refused():
    with pytest.raises(ManifestError, match="should be a finite number"):
        edit("1e99999999999999999999")


def test_an_expected_value_is_rounded_once_too():
    above, tie = (json.loads(f"[{v}]", parse_float=Written)[0] for v in (ABOVE_TIE, TIE))
    stored = struct.pack("<H", 0x3F81)
    assert explain_expectation(above, DTYPES["BF16"], stored) is None
    assert explain_expectation(tie, DTYPES["BF16"], stored) == "expected 1.00390625, stored is 1.0078125 (BF16)"
    text = EDIT.replace("op: set", f"op: zero, expect: {ABOVE_TIE}").replace(", value: VALUE", "")
    (guarded,) = parse_manifest(text.encode(), Path("m.yaml")).manifest.edits
    assert explain_expectation(guarded.expect, DTYPES["BF16"], stored) is None


def test_a_factor_stays_the_nearest_binary64():
    text = EDIT.replace("op: set", "op: scale").replace("value: VALUE", f"factor: {ABOVE_TIE}")
    (scale,) = parse_manifest(text.encode(), Path("m.yaml")).manifest.edits
    assert (type(scale.factor), scale.factor) == (float, 1.00390625)


def test_a_manifest_is_printed_as_ever():
    dumped = edit("0.10").model_dump(mode="json", exclude_unset=True)
    assert json.dumps(dumped["value"]) == "0.1"
    assert edit("0.10") == edit("0.1")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_binary64_written_out_in_full_is_itself(value):
    written = Written(f"{value:.1100e}" if value else repr(value))
    assert (written, written.exact) == (value, Fraction(value))
    assert format_exact(written) == format_exact(value)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.float32(value)
    if np.isfinite(expected) and (expected or not value):
        assert encode(DTYPES["F32"], written) == expected.astype("<f4").tobytes()
