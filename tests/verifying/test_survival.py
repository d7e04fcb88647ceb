"""verify --known: super weights that are there, drifted, gone, edited on purpose, quantised, or unreadable."""

from __future__ import annotations

import inspect
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIG, HIDDEN, INNER, down, tensor, write_llama, write_single, write_sparse_shard

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main
from swsurgery.cli.verifying import verify
from swsurgery.known import KnownCoordinate, KnownModel, own
from swsurgery.known.schema import Citation, Independent
from swsurgery.storage.coordinate import Coordinate
from swsurgery.verifying import against_known, known_states
from swsurgery.verifying.verify import verify as verify_checkpoint

SOURCE = Citation(key="s", kind="notes", cite="a test")
ROW, COL = 4, 7
SHAPE = (HIDDEN, INNER)


def fact(layer: int = 0, col: int | None = COL, **fields) -> KnownCoordinate:
    common = dict(
        id=f"L{layer}.{ROW}.{col}", layer=layer, row=ROW, col=col, expert=None, tensor=down(layer), status="paper",
        causal_alone="strong", located_by=("a test",), independent=Independent(location=1, value=1), sources=(SOURCE,),
    )  # fmt: skip
    return KnownCoordinate(**(common | fields))


def model(*facts: KnownCoordinate) -> KnownModel:
    return KnownModel(
        aliases=("tiny",), hf_id="org/tiny", family="tiny", hidden_size=HIDDEN, intermediate_size=INNER, num_layers=3,
        sizes_from="a test", tensor="model.layers.{layer}.mlp.down_proj.weight", coordinates=facts,
    )  # fmt: skip


def packed(dtype: str, value: float) -> bytes:
    """One scalar, by struct; BF16 only for values that it holds."""
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack({"F16": "<e", "F32": "<f", "F64": "<d"}[dtype], value)


def holding(root: Path, value: float, dtype: str = "BF16", extra=None, config=None) -> Path:
    """A checkpoint whose layer 0 holds `value` at (ROW, COL)."""
    _, _, data = tensor(dtype, *SHAPE, seed=3)
    word = packed(dtype, value)
    at = (ROW * INNER + COL) * len(word)
    data = data[:at] + word + data[at + len(word) :]
    return write_single(root, {down(0): (dtype, SHAPE, data), **(extra or {})}, config)


def only(root: Path, *facts: KnownCoordinate, declared=(), **options) -> against_known.Kept:
    return against_known.survey(open_checkpoint(root), model(*facts), declared, **options).coordinates[0]


EXACT = fact(value=-2.5, dtype="BF16")


@pytest.mark.parametrize(
    ("stored", "state"),
    [
        (-2.5, "kept"),
        (-2.515625, "close"),
        (-2.484375, "close"),
        (-2.53125, "changed"),
        (-3.75, "changed"),
        (-7.5, "changed"),
        (-10.0, "changed"),
        (-10.0625, "suspicious"),
        (-190.0, "suspicious"),
        (190.0, "lost"),
        (-1.90625, "changed"),
        (-1.859375, "lost"),
        (-0.5, "lost"),
        (-0.0, "lost"),
        (0.0, "lost"),
        (2.5, "lost"),
        (math.nan, "lost"),
        (-math.inf, "lost"),
    ],
)
def test_a_value_is_kept_changed_or_lost(tmp_path, stored, state):
    kept = only(holding(tmp_path, stored), EXACT)
    assert kept.state == state
    assert (kept.known, kept.dtype, kept.tensor, kept.index) == (-2.5, "BF16", down(0), (ROW, COL))
    if math.isfinite(stored):
        assert (kept.stored, kept.ratio) == (stored, stored / -2.5)


def test_a_suspicious_value_neither_proves_nor_loses(tmp_path):
    survey = against_known.survey(open_checkpoint(holding(tmp_path, -190.0)), model(EXACT))
    (kept,) = survey.coordinates
    assert (kept.state, kept.stored, kept.ratio) == ("suspicious", -190.0, 76.0)
    (finding,) = survey.list_findings()
    assert (finding.rule, finding.level, finding.tensor) == ("known-suspicious", "warning", down(0))
    assert "suspicious: -2.5 -> -190 (BF16), x76, so the stored numbers may not be weights" in finding.message
    assert not survey.decided and survey.to_json()["decided"] is False


def test_a_suspicious_value_is_suspicious_without_a_sign_too(tmp_path):
    unsigned = fact(value_printed="2.77 (without sign)")
    assert only(holding(tmp_path / "a", -190.0), unsigned).state == "suspicious"
    assert only(holding(tmp_path / "b", -10.0), unsigned).state == "changed"


def test_an_edit_on_purpose_is_never_suspicious(tmp_path):
    assert only(holding(tmp_path, -190.0), EXACT, declared={Coordinate(down(0), (ROW, COL))}).state == "declared"


@pytest.mark.parametrize(("tolerance", "state"), [(0, "lost"), (0.05, "lost"), (0.3, "changed"), (1, "changed")])
def test_the_tolerance_is_what_may_be_lost(tmp_path, tolerance, state):
    assert only(holding(tmp_path, -2.0), EXACT, tolerance=tolerance).state == state
    assert only(holding(tmp_path / "same", -2.5), EXACT, tolerance=tolerance).state == "kept"
    assert only(holding(tmp_path / "zero", 0.0), EXACT, tolerance=tolerance).state == "lost"


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_another_dtype_is_compared_after_rounding(tmp_path, dtype):
    """0.39 is not a value of BF16; its nearest one, 0.390625, is stored in each of the dtypes exactly."""
    assert only(holding(tmp_path, 0.390625, dtype), fact(value=0.390625, dtype="BF16")).state == "kept"
    assert only(holding(tmp_path, 0.39, dtype), fact(value=0.390625, dtype="BF16")).state == "kept"
    assert only(holding(tmp_path, 0.38, dtype), fact(value=0.390625, dtype="BF16")).state == "changed"


@pytest.mark.parametrize(
    ("text", "stored", "state"),
    [
        ("5.875 BF16", 5.875, "kept"),
        ("5.875 BF16", 5.5, "changed"),
        ("5.875 BF16", -5.875, "lost"),
        ("2.77 (without sign)", -2.765625, "kept"),
        ("2.77 (without sign)", 2.765625, "kept"),
        ("2.77 (without sign)", -0.5, "lost"),
        ("-0.78", -0.77734375, "kept"),
        ("large", 0.001953125, "present"),
    ],
)
def test_a_printed_value_is_as_exact_as_its_digits(tmp_path, text, stored, state):
    assert only(holding(tmp_path, stored), fact(value_printed=text)).state == state


def test_without_a_value_only_zero_is_lost(tmp_path):
    assert only(holding(tmp_path / "a", 0.001953125), fact()).state == "present"
    assert only(holding(tmp_path / "b", 0.0), fact()).state == "lost"


def test_what_a_record_declares_is_not_lost(tmp_path):
    root = holding(tmp_path, 0.0)
    kept = only(root, EXACT, declared={Coordinate(down(0), (ROW, COL))})
    assert kept.state == "declared"
    assert only(root, EXACT, declared={Coordinate(down(0), (ROW, COL + 1))}).state == "lost"


@pytest.mark.parametrize("status", known_states.NOT_HELD)
def test_a_doubted_coordinate_is_told_and_not_held(tmp_path, status):
    root = holding(tmp_path, 0.0)
    survey = against_known.survey(open_checkpoint(root), model(fact(value=-2.5, dtype="BF16", status=status)))
    assert survey.coordinates[0].state == "lost" and not survey.coordinates[0].held
    assert survey.list_findings() == [] and not survey.decided


def test_a_row_is_named_and_a_model_of_rows_cannot_be_asked(tmp_path):
    checkpoint = open_checkpoint(holding(tmp_path, -2.5))
    assert against_known.survey(checkpoint, model(EXACT, fact(col=None))).rows == (f"L0.{ROW}.None",)
    survey = against_known.survey(checkpoint, model(fact(col=None)))
    assert survey.coordinates == () and survey.rows == (f"L0.{ROW}.None",) and not survey.decided


def test_a_model_of_rows_is_undecided_in_every_format(tmp_path, monkeypatch, capsys):
    root = holding(tmp_path, -2.5)
    monkeypatch.setattr(own, "find_model", lambda name: model(fact(col=None)))
    reason = "no complete coordinate (row and column) of "
    assert main(["verify", str(root), "--model", "rows"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"UNDECIDED: {root}: {reason}") and "find them with swsurgery scan" in out and not err
    assert main(["verify", str(root), "--model", "rows", "--format", "junit"]) == 2
    assert f'<error type="undecided" message="{reason}' in capsys.readouterr().out


def test_a_lost_one_is_a_finding_with_its_scalar(tmp_path):
    survey = against_known.survey(open_checkpoint(holding(tmp_path, 0.0)), model(EXACT))
    (finding,) = survey.list_findings()
    assert (finding.rule, finding.level) == ("known-lost", "error")
    assert (finding.file, finding.tensor, finding.index) == ("model.safetensors", down(0), (ROW, COL))
    assert "-2.5 -> 0 (BF16)" in finding.message


# Quantised checkpoints: 8-bit patterns written by hand, dequantised by numpy as the oracle.

E4M3 = {1.0: 0x38, 448.0: 0x7E, -224.0: 0xF6, 0.0: 0x00, 416.0: 0x7D}
"""Values of F8_E4M3 and their bits (arXiv:2209.05433, table 1)."""


def quantised(root: Path, value: float, name: str, scale: np.ndarray, config=None, more=None) -> Path:
    data = bytearray(np.full(HIDDEN * INNER, 0x38, np.uint8).tobytes())
    data[ROW * INNER + COL] = E4M3[value]
    scales = {name: ("F32", scale.shape, scale.astype("<f4").tobytes())}
    return write_single(root, {down(0): ("F8_E4M3", SHAPE, bytes(data)), **scales, **(more or {})}, config)


@pytest.mark.parametrize(
    ("ending", "scale", "config"),
    [
        ("_scale", np.array(0.01), {}),
        ("_scale", np.array([0.01]), {}),
        ("_scale_inv", np.array([[0.01]]), {}),
        ("_scale", np.where(np.arange(HIDDEN) == ROW, 0.01, 9.0)[:, None], {}),
        ("_scale", np.where(np.arange(HIDDEN) == ROW, 0.01, 9.0), {}),
        (
            "_scale_inv",
            np.array([[9.0, 9.0], [9.0, 0.01]]),
            {"quantization_config": {"weight_block_size": [3, 5]}},
        ),
        (
            "_scale_inv",
            np.array([[9.0, 9.0, 9.0], [9.0, 0.01, 9.0]]),
            {"quantization_config": {"weight_block_size": [4, 4]}},
        ),
    ],
    ids=["tensor", "one", "matrix-of-one", "row", "row-flat", "block", "block-of-config"],
)
def test_fp8_is_read_through_its_scale(tmp_path, ending, scale, config):
    name = down(0) + ending
    kept = only(quantised(tmp_path / "a", -224.0, name, scale, config), fact(value=-2.25, dtype="BF16"))
    assert kept.stored == pytest.approx(-2.24, rel=1e-6) and kept.state == "kept"
    assert only(quantised(tmp_path / "b", 0.0, name, scale, config), EXACT).state == "lost"
    assert only(quantised(tmp_path / "c", 1.0, name, scale, config), EXACT).state == "lost"
    kept = only(quantised(tmp_path / "d", 448.0, name, scale, config), fact(value=3.5, dtype="BF16"))
    assert kept.state == "changed" and kept.ratio == pytest.approx(1.28)


def test_int8_rows_are_127_steps_wide(tmp_path):
    data = bytearray(HIDDEN * INNER)
    data[ROW * INNER + COL] = 256 - 127
    largest = np.full(HIDDEN, 9.0, "<f4")
    largest[ROW] = 2.5
    name = down(0).removesuffix("weight") + "SCB"
    root = write_single(
        tmp_path, {down(0): ("I8", SHAPE, bytes(data)), name: ("F32", (HIDDEN,), largest.tobytes())}
    )  # fmt: skip
    kept = only(root, EXACT)
    assert kept.stored == -2.5 and kept.state == "kept"


@pytest.mark.parametrize(("form", "state"), [(0, "kept"), (1, "unreadable")])
def test_int8_that_is_not_stored_by_rows_is_unreadable(tmp_path, form, state):
    data = bytearray(HIDDEN * INNER)
    data[ROW * INNER + COL] = 256 - 127
    stem = down(0).removesuffix("weight")
    tensors = {
        down(0): ("I8", SHAPE, bytes(data)),
        f"{stem}SCB": ("F32", (HIDDEN,), np.full(HIDDEN, 2.5, "<f4").tobytes()),
        f"{stem}weight_format": ("U8", (), bytes([form])),
    }
    assert only(write_single(tmp_path, tensors), EXACT).state == state


@pytest.mark.parametrize("ending", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("beside", ["input_scale", "bias", "k_scale", "activation_scale"])
def test_what_scales_activations_does_not_hide_a_weight(tmp_path, ending, beside):
    more = {down(0).replace("weight", beside): F32_ONE}
    root = quantised(tmp_path, -224.0, down(0) + ending, np.array(0.01), None, more)
    assert only(root, fact(value=-2.25, dtype="BF16")).state == "kept"


@pytest.mark.parametrize("name", ["scale", "qscale_weight", "weights_scaling_factor", "unheard_of"])
def test_codes_with_a_scale_of_an_unknown_name_are_unreadable(tmp_path, name):
    """The raw code -224 is 90 times the known value, and 90 times as much is no proof that it is there."""
    scale = down(0).replace("weight", name)
    survey = against_known.survey(open_checkpoint(quantised(tmp_path, -224.0, scale, np.array(0.01))), model(EXACT))
    assert survey.coordinates[0].state == "unreadable" and scale in survey.coordinates[0].reason
    assert not survey.decided


def test_codes_without_a_scale_are_weights_only_where_nothing_declares_quantisation(tmp_path):
    def root(name: str, config: dict) -> Path:
        data = bytearray(np.full(HIDDEN * INNER, 0x38, np.uint8).tobytes())
        data[ROW * INNER + COL] = 0xC2  # -2.5 in E4M3 is 1 1000 010, twice 1.25
        return write_single(tmp_path / name, {down(0): ("F8_E4M3", SHAPE, bytes(data))}, config)

    kept = only(root("cast", {}), EXACT)
    assert (kept.state, kept.stored) == ("kept", -2.5)
    kept = only(root("declared", {"quantization_config": {"quant_method": "fp8"}}), EXACT)
    assert kept.state == "unreadable" and "config.json (quantization_config)" in kept.reason


F32_ONE = ("F32", (1,), struct.pack("<f", 1.0))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({down(0).replace("weight", "qweight"): tensor("I32", HIDDEN, 2)}, "packed"),
        ({down(0): tensor("U8", 30, 1), down(0) + ".absmax": tensor("F32", 2)}, "packed"),
        ({down(0): tensor("I8", *SHAPE)}, "has no scale"),
        ({down(0): tensor("F8_E4M3", *SHAPE), down(0) + "_scale": F32_ONE, down(0) + "_scale_2": F32_ONE}, "scale_2"),
        ({down(0): tensor("F8_E4M3", *SHAPE), down(0) + "_scale": tensor("F32", 4, 4)}, "which block"),
        ({down(0): tensor("F8_E4M3", *SHAPE), down(0) + "_scale": tensor("F32", 5)}, "does not fit"),
        ({down(0): tensor("F8_E4M3", *SHAPE), down(0) + "_scale": tensor("U8", 1)}, "stored as U8"),
        ({down(0): tensor("I8", *SHAPE), down(0) + "_scale": F32_ONE, down(0) + "_zero_point": F32_ONE}, "zero_point"),
        ({down(0): tensor("BF16", 3, INNER)}, "rows"),
        ({"other": tensor("BF16", 2)}, "no known down projection"),
    ],
    ids=["gptq", "nf4", "int8", "two-scales", "uneven", "misfit", "mxfp8", "zero-point", "pruned", "absent"],
)
def test_what_is_no_single_number_is_said_to_be_unreadable(tmp_path, tensors, reason):
    survey = against_known.survey(open_checkpoint(write_single(tmp_path, tensors)), model(EXACT))
    (kept,) = survey.coordinates
    assert kept.state == "unreadable" and reason in kept.reason
    (finding,) = survey.list_findings()
    assert (finding.rule, finding.level) == ("known-unreadable", "warning")
    assert not survey.decided


# The command, on the facts that are shipped: Mistral-7B's one super weight, in a matrix of its real size that takes no
# room on the disk.

MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "vocab_size": 32000,
}  # fmt: skip


@pytest.fixture
def mistral(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))

    def write(value: float, **config: str) -> Path:
        root = tmp_path / "mistral"
        root.mkdir(exist_ok=True)
        path = root / "model.safetensors"
        write_sparse_shard(path, down(1), "BF16", 4096, 14336)
        with path.open("r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.seek(header + 2 * (2070 * 14336 + 7310))
            file.write(packed("BF16", value))
        (root / "config.json").write_text(json.dumps({**CONFIG, **MISTRAL, **config}))
        return root

    return write


def test_a_model_is_known_by_its_config_or_by_the_name_given(mistral, capsys):
    named = mistral(-0.2734375, _name_or_path="mistralai/Mistral-7B-v0.1")
    assert main(["verify", str(named), "--known"]) == 0
    assert "L1.2070.7310     kept: -0.2734375 -> -0.2734375 (BF16)" in capsys.readouterr().out
    unnamed = mistral(0.0, _name_or_path="../local")
    assert main(["verify", str(unnamed), "--known"]) == 2
    assert "name it with --model" in capsys.readouterr().out
    unnamed = mistral(-0.2734375, _name_or_path="../local")
    assert main(["verify", str(unnamed), "--known", "--model", "mistral-7b"]) == 0
    assert main(["verify", str(unnamed), "--model", "mistral-7b"]) == 0, "--model alone asks for it"
    assert main(["verify", str(unnamed), "--known", "--model", "no such"]) == 2


def test_a_lost_super_weight_is_exit_1(mistral, capsys):
    root = mistral(0.0)
    assert main(["verify", str(root), "--model", "mistral-7b", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    (finding,) = document["findings"]
    assert (finding["rule"], finding["index"], document["ok"]) == ("known-lost", [2070, 7310], False)
    assert document["known"]["model"] == "mistralai/Mistral-7B-v0.1"


def test_drift_is_told_and_passes_unless_less_is_tolerated(mistral, capsys):
    root = mistral(-0.25)
    assert main(["verify", str(root), "--model", "mistral-7b"]) == 0
    assert "changed: -0.2734375 -> -0.25 (BF16), x0.9143" in capsys.readouterr().out
    assert main(["verify", str(root), "--model", "mistral-7b", "--known-tolerance", "0.05"]) == 1


def test_a_suspicious_super_weight_is_exit_2(mistral, capsys):
    root = mistral(-13.0)
    assert main(["verify", str(root), "--model", "mistral-7b"]) == 2
    out = capsys.readouterr().out
    assert "warning   known-suspicious: " in out and "0 of 1 super weight of" in out
    assert out.startswith(f"UNDECIDED: {root}: none of the known super weights could be compared\n")
    assert main(["verify", str(root), "--model", "mistral-7b", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["known"]["decided"] is False and document["known"]["coordinates"][0]["state"] == "suspicious"
    assert main(["verify", str(root), "--model", "mistral-7b", "--format", "junit"]) == 2
    out = capsys.readouterr().out
    assert 'name="known-suspicious"' in out and 'name="decided"' in out and '<error type="undecided"' in out
    assert main(["verify", str(root), "--model", "mistral-7b", "--format", "sarif"]) == 2
    assert {r["ruleId"]: r["level"] for r in json.loads(capsys.readouterr().out)["runs"][0]["results"]} == {
        "known-suspicious": "warning", "undecided": "error",
    }  # fmt: skip


def test_what_cannot_be_compared_is_neither_yes_nor_no(tmp_path, capsys):
    root = write_llama(tmp_path / "model", config=MISTRAL)
    assert main(["verify", str(root), "--model", "mistral-7b"]) == 2
    out = capsys.readouterr().out
    assert out.startswith("UNDECIDED: ") and out.count("L1.2070.7310") == 1, "each fact is printed once"
    assert "warning   known-unreadable: " in out


def test_a_damaged_shard_is_a_finding_and_an_absent_checkpoint_bad_input(mistral, tmp_path, capsys):
    root = mistral(-0.2734375)
    with (root / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert main(["verify", str(root), "--model", "mistral-7b"]) == 1
    assert "FINDING   structure: " in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "absent"), "--model", "mistral-7b"]) == 2


def test_an_edit_that_the_record_declares_is_not_lost(mistral, tmp_path, capsys):
    mistral(-0.2734375)
    manifest = tmp_path / "zero.yaml"
    manifest.write_text(
        "version: 1\nbase: {path: mistral, model: mistral-7b}\nedits:\n  - {op: zero, known: L1.2070.7310}\n"
    )
    assert main(["apply", str(manifest), "-o", str(tmp_path / "out"), "--check", "off", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out"), "--known", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "declared: -0.2734375 -> 0 (BF16)" in out and "1 of them edited on purpose" in out
    for name in ("swsurgery.json", "manifest.yaml", "SHA256SUMS"):
        (tmp_path / "out" / name).unlink()
    assert main(["verify", str(tmp_path / "out"), "--model", "mistral-7b"]) == 1


def test_the_tolerance_is_the_same_wherever_it_is_the_default():
    assert inspect.signature(verify).parameters["known_tolerance"].default == known_states.TOLERANCE
    assert inspect.signature(verify_checkpoint).parameters["tolerance"].default == known_states.TOLERANCE
