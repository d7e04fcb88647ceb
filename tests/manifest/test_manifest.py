"""Manifests: what a good one reads as, and one bad input for each rule with its line, column and words."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swsurgery.errors import ManifestError, NumberError
from swsurgery.manifest.load import MAX_MANIFEST, LoadedManifest, load_manifest, parse_manifest
from swsurgery.manifest.operations import Protect, Scale, Set, Zero, explain_expectation
from swsurgery.manifest.targets import MeasuredValue
from swsurgery.storage.dtypes import DTYPES

PATH = Path("m.yaml")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HEAD = "version: 1\nbase: {path: ../base}\nedits:\n"  # three lines, so an edit stands in line 4


def parse(text: str) -> LoadedManifest:
    return parse_manifest(text.encode(), PATH)


def faults(text: str | bytes) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text if isinstance(text, bytes) else text.encode(), PATH)
    return list(caught.value.faults)


GOOD = f"""\
version: 1
name: tiny-1
description: |
  Two lines
  of text.
base:
  repo_id: org/tiny
  revision: "{COMMIT}"
  model: Tiny
  sha256: {{model.safetensors: {"ab" * 32}}}
  weights: index
  copies: omit
check: {{max_perplexity_ratio: 1.5, min_perplexity_ratio: 1}}
edits:
  - {{op: zero, layer: 2, row: 3968, col: 7003}}
  - op: scale
    tensor: a.b.weight
    index: [0, 5]
    factor: 1e-1
    expect: -1.5
  - {{op: set, layer: 0, row: 0, col: 0, expert: 3, value: 7, expect: "0x40bc"}}
  - {{op: set, layer: 0, row: 1, col: 0, expert: shared, bits: 0x40BC}}
  - {{op: protect, known: all}}
  - {{op: protect, tensor: t, index: [], expect: {{value: 2.5, dtype: F16}}}}
"""


def test_a_good_manifest_reads_as_it_is_written():
    loaded = parse(GOOD)
    manifest = loaded.manifest
    assert loaded.raw == GOOD.encode()
    assert (manifest.version, manifest.name, manifest.description) == (1, "tiny-1", "Two lines\nof text.\n")
    assert (manifest.base.repo_id, manifest.base.revision, manifest.base.path) == ("org/tiny", COMMIT, None)
    assert manifest.base.sha256 == {"model.safetensors": "ab" * 32}
    assert (manifest.base.weights, manifest.base.copies, manifest.base.model) == ("index", "omit", "Tiny")
    assert (manifest.check.max_perplexity_ratio, manifest.check.min_perplexity_ratio) == (1.5, 1.0)
    assert [type(edit) for edit in manifest.edits] == [Zero, Scale, Set, Set, Protect, Protect]
    zero, scale, value, bits, known, measured = manifest.edits
    assert (zero.layer, zero.row, zero.col, zero.expert) == (2, 3968, 7003, None)
    assert (scale.tensor, scale.index, scale.factor, scale.expect) == ("a.b.weight", (0, 5), 0.1, -1.5)
    assert (value.expert, value.value, value.bits, value.expect) == (3, 7, None, "0x40bc")
    assert (bits.expert, bits.value, bits.bits) == ("shared", None, "0x40BC")
    assert known.known == "all"
    assert (measured.index, measured.expect) == ((), MeasuredValue(value=2.5, dtype="F16"))
    assert [loaded.describe_position(i) for i in (0, 1, 5)] == ["m.yaml:15:5: edits[0]", "m.yaml:16:5: edits[1]",
                                                   "m.yaml:24:5: edits[5]"]  # fmt: skip


def test_the_same_manifest_as_json_reads_the_same():
    manifest = parse(GOOD).manifest
    plain = manifest.model_dump(mode="json", exclude_unset=True)
    for indent in (None, 2):
        assert parse(json.dumps(plain, indent=indent)).manifest == manifest


def test_faults_of_a_json_manifest_have_their_places():
    text = '{"version": 1,\n "base": {"path": "x"},\n "edits": [{"op": "zap"}]}'
    assert faults(text) == [
        """m.yaml:3:12: edits[0]: unknown op "zap" (one of 'zero', 'scale', 'set', 'flip', 'clip', """
        "'prune_outliers', 'round', 'restore', 'protect')"
    ]


def edit(text: str) -> str:
    return f"{HEAD}  - {{{text}}}\n"


def base(text: str) -> str:
    return f"version: 1\nbase: {{{text}}}\nedits: [{{op: zero, known: all}}]\n"


SPOT = "layer: 1, row: 2, col: 3"
RULES = [
    # text, line, column, fragment
    ("", 1, 1, "the manifest is empty"),
    ("# nothing\n", 1, 1, "the manifest is empty"),
    ("[]", 1, 1, "should be a map, not []"),
    ("just words", 1, 1, 'should be a map, not "just words"'),
    ("base: {path: x}\nedits: [{op: zero, known: all}]", 1, 1, "version is missing"),
    ("version: 2\nbase: {path: x}\nedits: [{op: zero, known: all}]", 1, 10, "version: "),
    ("version: '1'\nbase: {path: x}\nedits: [{op: zero, known: all}]", 1, 10, "version: "),
    ("version: true\nbase: {path: x}\nedits: [{op: zero, known: all}]", 1, 10, "version: "),
    ("version: 1.0\nbase: {path: x}\nedits: [{op: zero, known: all}]", 1, 10, "version: "),
    ("version: 1\nedits: [{op: zero, known: all}]", 1, 1, "base is missing"),
    ("version: 1\nbase: {path: x}\n", 1, 1, "edits is missing"),
    ("version: 1\nbase: {path: x}\nedits: []", 3, 8, "edits: should not be empty, not []"),
    ("version: 1\nbase: {path: x}\nedits: {}", 3, 8, "edits: should be a list, not {}"),
    ("version: 1\nbase: {path: x}\nedits: [zero]", 3, 9, 'edits[0]: should be a map, not "zero"'),
    (HEAD + "  - {op: zero, known: all}\nname: a/b\n", 5, 7, "name: "),
    (HEAD + "  - {op: zero, known: all}\nname: 5\n", 5, 7, "name: should be text, not 5"),
    (HEAD + "  - {op: zero, known: all}\nedit: 5\n", 5, 1, "edit: unknown field (did you mean edits?)"),
    (HEAD + "  - {op: zero, known: all}\nzzzzzz: 5\n", 5, 1, "zzzzzz: unknown field"),
    ("version: 1\nbase: x\nedits: [{op: zero, known: all}]", 2, 7, 'base: should be a map, not "x"'),
    (base(""), 2, 7, "base: needs either repo_id or path"),
    (base("repo_id: a/b, path: x"), 2, 7, "base: needs either repo_id or path"),
    (base(f"path: x, revision: '{COMMIT}'"), 2, 7, "base: has a revision without a repo_id"),
    (base("repo_id: a/b/c"), 2, 17, "base.repo_id: "),
    (base("repo_id: a/b, revision: main"), 2, 32, "base.revision: should be the commit's 40 hex digits, in quotes"),
    (base("repo_id: a/b, revision: 1234567e8"), 2, 32, "base.revision: should be the commit's 40 hex digits"),
    (base("path: ''"), 2, 14, "base.path: "),
    (base("path: x, sha256: {m.safetensors: ab}"), 2, 41, "base.sha256.m.safetensors: "),
    (base(f"path: x, sha256: {{../m: '{'a' * 64}'}}"), 2, 32, "sha256"),
    (base("path: x, weights: both"), 2, 26, "base.weights: is not one of the values that this field accepts"),
    (base("path: x, copies: drop"), 2, 25, "base.copies: is not one of the values that this field accepts"),
    (edit(""), 4, 5, "edits[0]: op is missing"),
    (edit("op: zap"), 4, 5, 'edits[0]: unknown op "zap"'),
    (edit("op: zero"), 4, 5, "edits[0]: names no target: give layer and row, col, neuron or expert; tensor and index"),
    (edit("op: zero, known: all, layer: 1"), 4, 5, "in more than one way (layer; known): give one of them"),
    (edit("op: zero, tensor: t, index: [0], known: all"), 4, 5, "in more than one way (tensor, index; known)"),
    (edit("op: zero, layer: 1"), 4, 5, "edits[0]: is missing row, col, neuron or expert"),
    (edit("op: zero, row: 1, col: 2"), 4, 5, "edits[0]: is missing layer"),
    (edit("op: zero, expert: 1"), 4, 5, "edits[0]: is missing layer"),
    (edit("op: zero, tensor: t"), 4, 5, "edits[0]: is missing index or slice (or use tensors)"),
    (edit("op: zero, index: [0]"), 4, 5, "is missing tensor"),
    (edit("op: zero, known: all, expect: 1"), 4, 5, "has both known and expect"),
    (edit("op: zero, layer: -1, row: 2, col: 3"), 4, 23, "edits[0].layer: should not be negative, not -1"),
    (edit("op: zero, layer: 1.0, row: 2, col: 3"), 4, 23, "edits[0].layer: should be a whole number, not 1.0"),
    (edit("op: zero, layer: '1', row: 2, col: 3"), 4, 23, 'edits[0].layer: should be a whole number, not "1"'),
    (edit("op: zero, layer: true, row: 2, col: 3"), 4, 23, "edits[0].layer: should be a whole number, not true"),
    (edit("op: zero, layer: 010, row: 2, col: 3"), 4, 23, 'edits[0].layer: should be a whole number, not "010"'),
    (edit("op: zero, layer: 9223372036854775808, row: 2, col: 3"), 4, 23, "edits[0].layer: "),
    (edit(f"op: zero, {SPOT}, expert: router"), 4, 50, "expert: should be a whole number from 0, or shared"),
    (edit("op: zero, tensor: 5, index: [0]"), 4, 24, "edits[0].tensor: should be text, not 5"),
    (edit("op: zero, tensor: t, index: 5"), 4, 34, "edits[0].index: should be a list of whole numbers from 0"),
    (edit("op: zero, tensor: t, index: [0, -1]"), 4, 38, "edits[0].index[1]: "),
    (edit(f"op: zero, {SPOT}, expect: 0x123"), 4, 50, "expect: should be a number, bits such as 0x40bc"),
    (edit(f"op: zero, {SPOT}, expect: true"), 4, 50, "expect: should be a number, bits such as 0x40bc"),
    (edit(f"op: zero, {SPOT}, expect: {{value: 1, dtype: I8}}"), 4, 68, "expect.dtype: "),
    (edit(f"op: zero, {SPOT}, factor: 2"), 4, 42, "factor: unknown field"),
    (edit(f"op: scale, {SPOT}"), 4, 5, "edits[0]: factor is missing"),
    (edit(f"op: scale, {SPOT}, factor: 0"), 4, 5, "edits[0]: has factor 0: use op zero"),
    (edit(f"op: scale, {SPOT}, factor: -0.0"), 4, 5, "edits[0]: has factor 0: use op zero"),
    (edit(f"op: scale, {SPOT}, factor: .nan"), 4, 51, 'factor: should be a number, not ".nan"'),
    (edit(f"op: scale, {SPOT}, factor: NaN"), 4, 51, 'factor: should be a number, not "NaN"'),
    (edit(f"op: scale, {SPOT}, factor: .inf"), 4, 51, 'factor: should be a number, not ".inf"'),
    (edit(f"op: scale, {SPOT}, factor: -Infinity"), 4, 51, "factor: should be a number"),
    (edit(f"op: scale, {SPOT}, factor: 1e999"), 4, 51, "factor: should be a finite number"),
    (edit(f"op: scale, {SPOT}, factor: '2'"), 4, 51, 'factor: should be a number, not "2"'),
    (edit(f"op: scale, {SPOT}, factor: 1_0"), 4, 51, 'factor: should be a number, not "1_0"'),
    (edit(f"op: set, {SPOT}"), 4, 5, "edits[0]: needs either value or bits"),
    (edit(f"op: set, {SPOT}, value: 1, bits: 0x40bc"), 4, 5, "edits[0]: needs either value or bits"),
    (edit(f"op: set, {SPOT}, bits: 40bc"), 4, 47, "bits: should be hex bits of the dtype's width"),
    (edit(f"op: set, {SPOT}, bits: 0x40b"), 4, 47, "bits: should be hex bits of the dtype's width"),
    (edit(f"op: set, {SPOT}, value: .nan"), 4, 48, "value"),
    (edit(f"op: protect, {SPOT}, value: 1"), 4, 45, "value: unknown field"),
    (HEAD + "  - {op: zero, known: all}\ncheck: {max_perplexity_ratio: 0}", 5, 31, "check.max_perplexity_ratio: "),
    (HEAD + "  - {op: zero, known: all}\ncheck: {min_perplexity_ratio: -1}", 5, 31, "check.min_perplexity_ratio: "),
    (HEAD + "  - {op: zero, known: all}\ncheck: {ratio: 1}", 5, 9, "check.ratio: unknown field"),
    # the language itself
    (HEAD + "  - &one {op: zero, known: all}\n", 4, 5, "edits[0]: the anchor &one is not accepted (write"),
    (HEAD + "  - *one\n", 4, 5, "edits[0]: the alias *one is not accepted (write the value out)"),
    (edit("op: !!str zero, known: all"), 4, 10, "edits[0].op: the tag "),
    (edit("op: zero, known: !python/object:os.system all"), 4, 23, "edits[0].known: the tag "),
    (edit("op: zero, op: zero, known: all"), 4, 16, "edits[0].op: this key is repeated (first in line 4)"),
    (edit("<<: {op: zero}, known: all"), 4, 6, "edits[0]: the merge key <<"),
    (edit("op: zero, known: all, [a, b]: 1"), 4, 28, "edits[0]: the key is not a plain word"),
    (edit("op: zero, known: all") + "---\nversion: 1\n", 5, 1, "a second document begins here"),
    (edit('op: zero, known: "\\ud800"'), 4, 26, "half a surrogate pair"),
    (edit("op: zero, known: a\u2028b"), 4, 24, "not YAML: the character U+2028 is not allowed"),
    ("[" * 30 + "]" * 30, 1, 17, "nested deeper than 16"),
    ("version: 1\n\tbase: x\n", 2, 1, "not YAML: "),
    ("version: [1\n", 2, 1, "not YAML: "),
    ("version: '1\n", 2, 1, "not YAML: "),
    ("version: \x07\n", 1, 10, "not YAML: "),
]


@pytest.mark.parametrize("text,line,column,fragment", RULES, ids=[f"{i}-{r[3][:50]}" for i, r in enumerate(RULES)])
def test_each_rule_has_its_place_and_its_words(text, line, column, fragment):
    found = faults(text)
    assert any(f.startswith(f"m.yaml:{line}:{column}: ") and fragment in f for f in found), found
    assert all(f.isprintable() for f in found)


@pytest.mark.parametrize(
    "raw,place",
    [(b"\xff\xfe", "1:1"), (b"version: 1\nname: caf\xe9\n", "2:10"), ("version: 1".encode("utf-16"), "1:1")],
)
def test_other_encodings_are_refused_where_they_begin(raw, place):
    assert faults(raw) == [f"m.yaml:{place}: not UTF-8 (save the file as UTF-8)"]


def test_fifty_faults_in_ten_thousand_lines_are_all_listed_in_order():
    lines = HEAD.splitlines() + [f"  - {{op: zero, layer: 1, row: 2, col: {i}}}" for i in range(9_997)]
    kinds = [
        ("  - {op: zap, known: all}", 5, 'unknown op "zap"'),
        ("  - {op: zero, layer: -1, row: 2, col: 3}", 23, "should not be negative"),
        ("  - {op: zero, layer: 1, row: 2, colm: 3}", 34, "did you mean col?"),
        ("  - {op: scale, known: all, factor: .nan}", 37, "should be a number"),
        ("  - {op: zero, op: zero, known: all}", 16, "this key is repeated"),
    ]
    expected = []
    for i in range(50):
        number = 100 + 197 * i  # spread over the file
        text, column, fragment = kinds[i % len(kinds)]
        lines[number - 1] = text
        expected.append((f"m.yaml:{number}:{column}: ", fragment))
    found = faults("\n".join(lines) + "\n")
    assert len(lines) == 10_000
    assert len(found) == 50
    for fault, (start, fragment) in zip(found, expected, strict=True):
        assert fault.startswith(start) and fragment in fault


def test_faults_come_in_the_order_of_the_file_and_once_each():
    text = "version: 1\nnmae: x\nbase: {path: x}\nedits:\n  - {op: zap}\n  - {op: zero, known: all, expect: {}}\n"
    found = faults(text)
    assert len(found) == len(set(found)) >= 3
    places = [tuple(map(int, f.split(":")[1:3])) for f in found]
    assert places == sorted(places)
    assert [line for line, _ in places][:2] == [2, 5]


def test_files_are_read_and_refused_by_their_path(tmp_path):
    path = tmp_path / "manifest.yaml"
    path.write_text(GOOD)
    assert load_manifest(path).manifest == parse(GOOD).manifest
    with pytest.raises(ManifestError, match=r"cannot read the manifest \(No such file or directory\): .*missing.yaml"):
        load_manifest(tmp_path / "missing.yaml")
    with pytest.raises(ManifestError, match="cannot read the manifest"):
        load_manifest(tmp_path)
    path.write_bytes(b"#" * (MAX_MANIFEST + 1))
    with pytest.raises(ManifestError, match=f"manifest is larger than {MAX_MANIFEST} bytes"):
        load_manifest(path)


WORDS = st.sampled_from(
    ["version: 1\n", "base: {path: x}\n", "edits:\n", "  - ", "{", "}", "[", "]", "op: zero", ", ", ": ", "known: all",
     "\n", "&a ", "*a", "!!str ", "!x ", "? ", "- ", "'", '"', "|", ">", "---\n", "...\n", "%YAML 1.1\n", "<<", "# c",
     "0x40bc", "1e999", "9" * 50, "null", "~", "\t", "\u2028", "\ufeff", "\\ud800", "{{", "[[[[[["]
)  # fmt: skip


def survives(raw: bytes) -> None:
    try:
        loaded = parse_manifest(raw, PATH)
    except ManifestError as error:
        assert error.faults and all(f.isprintable() and f.startswith("m.yaml:") for f in error.faults)
    else:
        assert loaded.manifest.version == 1 and loaded.manifest.edits


@settings(max_examples=400, deadline=None)
@given(st.lists(WORDS, max_size=25).map("".join))
@example("{? [a]: b}")
@example("%YAML 9.9\n---\na: 1")
@example("a: !<> b")
def test_no_arrangement_of_yaml_gives_anything_but_a_manifest_or_its_faults(text):
    survives(text.encode("utf-8", "surrogatepass"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace")))
def test_no_bytes_give_anything_but_a_manifest_or_its_faults(raw):
    survives(raw)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damage_to_a_good_manifest_gives_anything_but_a_manifest_or_its_faults(data):
    place = data.draw(st.integers(0, len(GOOD)))
    length = data.draw(st.integers(0, 12))
    survives((GOOD[:place] + data.draw(WORDS | st.just("")) + GOOD[place + length :]).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {"version": JSON | st.just(1), "base": JSON | st.just({"path": "x"})},
        optional={
            "edits": st.lists(
                st.fixed_dictionaries(
                    {"op": JSON | st.sampled_from(["zero", "scale", "set", "flip", "clip", "prune_outliers", "round",
                                                   "restore", "protect"])},
                    optional=dict.fromkeys(["layer", "row", "col", "neuron", "expert", "tensor", "index", "slice",
                        "tensors", "known", "expect", "factor", "value", "bits", "bit", "raw", "z", "fraction", "iqr",
                        "count", "per", "block", "levels", "symmetric", "clip", "from"], JSON),
                ),
                max_size=3,
            ),
            "check": JSON,
            "name": JSON,
        },
    )
)  # fmt: skip
def test_no_values_in_the_fields_give_anything_but_a_manifest_or_its_faults(value):
    survives(json.dumps(value).encode())


# --- what an edit expects and writes


F16, F32, BF16 = DTYPES["F16"], DTYPES["F32"], DTYPES["BF16"]
STORED = bytes.fromhex("bc40")  # 5.875 in BF16


@pytest.mark.parametrize("expect", [5.875, "0x40bc", "0x40BC", 5.87, MeasuredValue(value=5.875, dtype="F32"),
                                    MeasuredValue(value=5.87, dtype="F8_E4M3")])  # fmt: skip
def test_what_is_stored_is_as_expected(expect):
    assert explain_expectation(expect, BF16, STORED) is None


@pytest.mark.parametrize(
    "expect,words",
    [
        (5.75, "expected 5.75, stored is 5.875 (BF16)"),
        (-5.875, "expected -5.875, stored is 5.875 (BF16)"),
        (6, "expected 6, stored is 5.875 (BF16)"),
        (1e300, "expected 1e+300, stored is 5.875 (BF16)"),
        ("0x40bd", "expected bits 0x40bd, stored are 0x40bc"),
        ("0x40bc0000", "expected bits 0x40bc0000, stored are 0x40bc"),
        (MeasuredValue(value=5.75, dtype="F32"), "expected 5.75 (F32), stored is 5.875"),
        (MeasuredValue(value=7, dtype="F8_E5M2"), "expected 7 (F8_E5M2), stored is 5.875"),
    ],
)
def test_what_is_stored_differs_in_words(expect, words):
    assert explain_expectation(expect, BF16, STORED) == words


def test_a_value_measured_in_a_coarser_dtype_forgives_the_conversion_and_no_more():
    stored = struct.pack("<f", 3.14159274)
    assert explain_expectation(MeasuredValue(value=3.140625, dtype="BF16"), F32, stored) is None
    assert "expected 3.125 (BF16)" in explain_expectation(MeasuredValue(value=3.125, dtype="BF16"), F32, stored)
    assert "expected 3.140625" in explain_expectation(3.140625, F32, stored)


def test_bits_are_compared_where_values_cannot_be():
    assert explain_expectation("0x7e00", F16, bytes.fromhex("007e")) is None
    assert "stored is nan" in explain_expectation(1.0, F16, bytes.fromhex("007e"))
    assert explain_expectation("0x8000", F16, b"\0\0") == "expected bits 0x8000, stored are 0x0000"


def test_each_operation_makes_its_bytes():
    spot = {"layer": 1, "row": 2, "col": 3}
    assert Zero(op="zero", **spot).compute_bytes(BF16, STORED) == b"\0\0"
    assert Scale(op="scale", factor=2.0, **spot).compute_bytes(BF16, STORED) == bytes.fromhex("3c41")
    assert Scale(op="scale", factor=1.0, **spot).compute_bytes(BF16, STORED) == STORED
    assert Set(op="set", value=5.875, **spot).compute_bytes(BF16, b"\0\0") == STORED
    assert Set(op="set", bits="0x40bc", **spot).compute_bytes(BF16, b"\0\0") == STORED
    assert [kind.writes for kind in (Zero, Scale, Set, Protect)] == [True, True, True, False]
    for bits, word in (("0x7f80", "inf"), ("0xff80", "-inf"), ("0x7fc0", "nan")):
        with pytest.raises(NumberError, match=f"{bits} is {word} in BF16 .*only finite values are set"):
            Set(op="set", bits=bits, **spot).compute_bytes(BF16, b"\0\0")
    with pytest.raises(NumberError, match="0x40 has 2 hex digits, but BF16 takes 4"):
        Set(op="set", bits="0x40", **spot).compute_bytes(BF16, b"\0\0")


def test_a_path_with_a_nul_character_is_a_fault_of_the_manifest(tmp_path):
    manifest = {"version": 1, "base": {"path": "a\0b"}, "edits": [{"op": "zero", "layer": 1, "row": 2, "col": 3}]}
    with pytest.raises(ManifestError, match=r":\d+: base: has a path that contains a NUL character"):
        load_manifest(manifest)
