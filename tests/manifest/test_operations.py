"""The operations: the options of each, and one bad input for each rule with its line, column and words."""

from __future__ import annotations

import json

import numpy as np
import pytest

from swsurgery.errors import ManifestError, NumberError
from swsurgery.manifest.load import load_manifest
from swsurgery.manifest.operations import OPERATIONS, Flip
from swsurgery.rewriting.read import FUNCTIONS, build_function
from swsurgery.storage.dtypes import DTYPES

HEAD = "version: 1\nbase: {path: ../base}\nedits:\n  - "  # the edit begins in line 4, column 5
SPOT = "layer: 1, row: 2, col: 3"


def read(edit: str):
    return load_manifest(f"{HEAD}{{{edit}}}\n".encode()).manifest.edits[0]


EXAMPLES = [
    # the edit, the options that the record stores
    (f"op: zero, {SPOT}", {}),
    (f"op: scale, {SPOT}, factor: -2", {"factor": -2.0}),
    ("op: scale, layer: 1, row: 2, factor: 0.5", {"factor": 0.5}),
    ("op: set, layer: 1, col: 2, value: 7", {"value": 7}),
    ("op: set, tensors: t, value: 9007199254740993", {"value": 9007199254740993}),
    ('op: set, layer: 1, neuron: 2, bits: "0x40bc"', {"bits": "0x40bc"}),
    (f"op: flip, {SPOT}, bit: 14", {"bit": 14}),
    ("op: flip, known: L2.3968.7003, bit: [0, 15]", {"bit": [0, 15]}),
    ("op: flip, tensor: t, index: [], bit: 3, raw: true", {"bit": 3, "raw": True}),
    (f"op: flip, {SPOT}, bit: 3, raw: false", {"bit": 3}),
    ("op: clip, tensors: t, z: 5", {"z": 5.0}),
    ("op: clip, tensors: t, z: 5, per: tensor", {"z": 5.0}),
    ("op: clip, layer: 1, expert: 2, fraction: 0.001, per: channel", {"fraction": 0.001, "per": "channel"}),
    ("op: clip, known: L1.E68, iqr: 0", {"iqr": 0.0}),
    ('op: clip, tensor: t, slice: "3", iqr: 1.5, block: 128', {"iqr": 1.5, "block": 128}),
    ("op: prune_outliers, tensors: t, count: 7000", {"count": 7000}),
    ("op: prune_outliers, layer: 1, row: 2, fraction: 1e-4", {"fraction": 1e-4}),
    ("op: round, tensors: t, bits: 4", {"bits": 4}),
    ("op: round, tensors: t, bits: 4, symmetric: true, levels: integer", {"bits": 4}),
    ("op: round, tensors: t, bits: 3, symmetric: false, block: [128, 64], clip: {z: 5}",
     {"bits": 3, "symmetric": False, "block": [128, 64], "clip": {"z": 5.0}}),
    ("op: round, tensors: t, bits: 4, levels: nf4, per: channel", {"bits": 4, "levels": "nf4", "per": "channel"}),
    ("op: restore, known: all", {}),
    (f"op: restore, {SPOT}, expect: 0", {}),
    ("op: restore, tensors: '*', from: ../base", {"from": "../base"}),
    ("op: restore, known: L1.E68, from: hf://org/name", {"from": "hf://org/name"}),
    ("op: protect, layer: 1, neuron: 2", {}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "options"), EXAMPLES, ids=[text for text, _ in EXAMPLES])
def test_each_operation_gives_its_options(text, options):
    assert json.dumps(read(text).options, sort_keys=True) == json.dumps(options, sort_keys=True)


def test_every_operation_has_an_example():
    given = {type(read(text)) for text, _ in EXAMPLES}
    assert given == {*OPERATIONS}


@pytest.mark.parametrize("text", [text for text, _ in EXAMPLES])
def test_each_operation_survives_a_round_trip(text):
    """As a Manifest, as plain fields, and as an edit in a list."""
    loaded = load_manifest(f"{HEAD}{{{text}}}\n".encode())
    assert load_manifest(loaded.manifest).manifest == loaded.manifest
    assert load_manifest(loaded.to_json()).manifest == loaded.manifest
    assert load_manifest(loaded.manifest.edits, base="../base").manifest == loaded.manifest
    assert load_manifest(loaded.to_json()).to_json() == loaded.to_json()


def test_the_options_of_each_operation_are_what_rewriting_reads():
    for text, _ in EXAMPLES:
        edit = read(text)
        if edit.op in FUNCTIONS:
            build_function(edit.op, json.loads(json.dumps(edit.options)))


def test_a_value_whose_float64_would_be_rounded_twice_keeps_its_text():
    """1 + 2**-8 + 2**-70 rounds up in BF16; its float64, 1 + 2**-8, is a tie and rounds down to even."""
    text = "1.00390625000000000000084703294725430034"
    assert read(f"op: set, tensors: t, value: {text}").options == {"value": text}
    words = np.zeros((1, 3), np.uint16)
    assert (build_function("set", {"value": text}).compute("t", BF16, 0, words) == 0x3F81).all()
    assert (build_function("set", {"value": float(text)}).compute("t", BF16, 0, words) == 0x3F80).all()
    assert read("op: set, tensors: t, value: 0.5").options == {"value": 0.5}
    assert read("op: set, tensors: t, value: 1.0e0").options == {"value": 1.0}


RULES = [
    # the edit, its column, the message
    ("op: flip, layer: 1, row: 2, bit: 3", 5, "edits[0]: flip changes single scalars, but it names a row"),
    ("op: flip, tensors: t, bit: 3", 5, "edits[0]: flip changes single scalars, but it names whole tensors"),
    (f"op: flip, {SPOT}", 5, "edits[0]: bit is missing"),
    (f"op: flip, {SPOT}, bit: 64", 47, "edits[0].bit: should be the number of a bit from 0 to 63, or a list of such"),
    (f"op: flip, {SPOT}, bit: -1", 47, "edits[0].bit: should be the number of a bit from 0 to 63"),
    (f"op: flip, {SPOT}, bit: '3'", 47, 'numbers, not "3"'),
    (f"op: flip, {SPOT}, bit: []", 47, "edits[0].bit: should be the number of a bit from 0 to 63"),
    (f"op: flip, {SPOT}, bit: [1, 2, 1]", 47, "edits[0].bit: names a bit twice"),
    (f"op: flip, {SPOT}, bit: 1, raw: 1", 55, "edits[0].raw: should be true or false, not 1"),
    (f"op: clip, {SPOT}, z: 5", 5, "edits[0]: clip needs more than one scalar, but it names a scalar (give tensors"),
    ("op: clip, known: all, z: 5", 5, "clip needs more than one scalar, but known: all names single scalars"),
    ("op: round, tensor: t, index: [1], bits: 4", 5, "edits[0]: round needs more than one scalar"),
    (f"op: prune_outliers, {SPOT}, count: 5", 5, "edits[0]: prune_outliers needs more than one scalar"),
    ("op: clip, tensors: t", 5, "edits[0]: needs exactly one of z, fraction and iqr"),
    ("op: clip, tensors: t, z: 5, iqr: 1.5", 5, "edits[0]: needs exactly one of z, fraction and iqr"),
    ("op: clip, tensors: t, z: 0", 31, "edits[0].z: should be a number above 0, not 0"),
    ("op: clip, tensors: t, z: 1e999", 31, "edits[0].z: should be a number above 0, not "),
    ("op: clip, tensors: t, iqr: -1", 33, "edits[0].iqr: should be a number from 0, not -1"),
    ("op: clip, tensors: t, fraction: 1", 38, "edits[0].fraction: should be a number above 0 and below 1, not 1"),
    ("op: clip, tensors: t, fraction: 0.0", 38, "edits[0].fraction: should be a number above 0 and below 1, not 0.0"),
    ("op: clip, tensors: t, z: 5, per: block", 39, 'edits[0].per: should be tensor or channel, not "block"'),
    ("op: clip, tensors: t, z: 5, per: tensor, block: 8", 5, "edits[0]: has both per and block: give one of them"),
    ("op: clip, tensors: t, z: 5, block: 0", 41, "edits[0].block: should be a whole number from 1, or two of them"),
    ("op: clip, tensors: t, z: 5, block: 1.0", 41, "edits[0].block: should be a whole number from 1"),
    ("op: clip, tensors: t, z: 5, block: [8, 0]", 41, "or two of them for rows and columns, not [8, 0]"),
    ("op: clip, tensors: t, z: 5, block: [8]", 41, "from 1, or two of them for rows and columns, not [8]"),
    ("op: clip, tensors: t, z: 5, clip: {iqr: -1}", 34, "edits[0].clip: unknown field"),
    ("op: clip, tensors: t, z: -5, clip: {z: 1}", 31, "edits[0].z: should be a number above 0, not -5"),
    ("op: prune_outliers, tensors: t", 5, "edits[0]: needs either count or fraction"),
    ("op: prune_outliers, tensors: t, count: 1, fraction: 0.5", 5, "edits[0]: needs either count or fraction"),
    ("op: prune_outliers, tensors: t, count: 0", 45, "edits[0].count: should be a whole number from 1, not 0"),
    ("op: prune_outliers, tensors: t, count: 1.5", 45, "edits[0].count: should be a whole number from 1, not 1.5"),
    ("op: prune_outliers, tensors: t, fraction: 2", 48, "edits[0].fraction: should be a number above 0 and below 1"),
    ("op: round, tensors: t", 5, "edits[0]: bits is missing"),
    ("op: round, tensors: t, bits: 9", 35, "edits[0].bits: should be a whole number from 2 to 8, not 9"),
    ("op: round, tensors: t, bits: 1", 35, "edits[0].bits: should be a whole number from 2 to 8, not 1"),
    ("op: round, tensors: t, bits: 0x40bc", 35, 'edits[0].bits: should be a whole number from 2 to 8, not "0x40bc"'),
    ("op: round, tensors: t, bits: 4, symmetric: no", 49, 'edits[0].symmetric: should be true or false, not "no"'),
    ("op: round, tensors: t, bits: 4, levels: fp4", 46, 'edits[0].levels: should be integer or nf4, not "fp4"'),
    ("op: round, tensors: t, bits: 3, levels: nf4", 5, "edits[0]: has levels nf4, which need bits 4 and symmetric"),
    ("op: round, tensors: t, bits: 4, levels: nf4, symmetric: false", 5, "edits[0]: has levels nf4"),
    ("op: round, tensors: t, bits: 4, per: channel, block: 8", 5, "edits[0]: has both per and block"),
    ("op: round, tensors: t, bits: 4, clip: 5", 44, "edits[0].clip: should be a rule such as {z: 5}, not 5"),
    ("op: round, tensors: t, bits: 4, clip: {}", 44, "edits[0].clip: needs exactly one of z, fraction and iqr"),
    ("op: round, tensors: t, bits: 4, clip: {z: 1, iqr: 2}", 44, "edits[0].clip: needs exactly one of z, fraction"),
    ("op: round, tensors: t, bits: 4, clip: {z: 0}", 48, "edits[0].clip.z: should be a number above 0, not 0"),
    ("op: round, tensors: t, bits: 4, clip: {per: channel}", 45, "edits[0].clip.per: unknown field"),
    ("op: restore, layer: 1, row: 2", 5, "edits[0]: is missing from: known values exist only for scalars, but it"),
    ("op: restore, tensors: t", 5, "edits[0]: is missing from: known values exist only for scalars"),
    ("op: restore, tensors: t, from: ''", 37, 'edits[0].from: should not be empty, not ""'),
    ("op: restore, tensors: t, from: 5", 37, "edits[0].from: should be text, not 5"),
    ("op: restore, tensors: t, source: x", 31, "edits[0].source: unknown field"),
    ("op: restore, tensors: t, form: x", 31, "edits[0].form: unknown field (did you mean from?)"),
    ("op: zero, tensors: t, bits: 4", 28, "edits[0].bits: unknown field"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "column", "message"), RULES, ids=[text for text, *_ in RULES])
def test_each_rule_has_its_place_and_its_words(text, column, message):
    with pytest.raises(ManifestError) as caught:
        read(text)
    found = caught.value.faults
    assert any(fault.startswith(f"manifest:4:{column}: ") and message in fault for fault in found), found


F16, BF16, F32, I8 = (DTYPES[name] for name in ("F16", "BF16", "F32", "I8"))


def flip(bit: object) -> Flip:
    return Flip(op="flip", layer=1, row=2, col=3, bit=bit)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, I8, DTYPES["F8_E4M3"], DTYPES["F64"], DTYPES["BOOL"]])
def test_flip_inverts_the_bits_and_twice_gives_the_old_bytes(dtype):
    for bit in range(dtype.bits):
        old = bytes(range(7, 7 + dtype.size))
        new = flip(bit).compute_bytes(dtype, old)
        expected = bytearray(old)
        expected[bit // 8] ^= 1 << bit % 8
        assert new == expected
        assert flip(bit).compute_bytes(dtype, new) == old


def test_flip_of_several_bits():
    assert flip((0, 15)).compute_bytes(BF16, bytes.fromhex("bc40")) == bytes.fromhex("bdc0")
    assert flip(15).compute_bytes(BF16, bytes.fromhex("bc40")) == bytes.fromhex("bcc0")  # 5.875 becomes -5.875


def test_flip_of_a_bit_that_the_dtype_does_not_have():
    with pytest.raises(NumberError, match=r"BF16 has no bit 16.*give 0 to 15"):
        flip((3, 16)).compute_bytes(BF16, b"\0\0")
