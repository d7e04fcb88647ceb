"""verify --known on quantised matrices: states by code and grid step, high precision, and values that were moved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from checkpoints import CONFIG, HIDDEN, INNER, down, write_manifest, write_shard, write_single
from packed_codes import COMPRESSED, LAYOUT, bf16, pack
from quantised_files import MODEL, needs_model, read_down

import swsurgery
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main
from swsurgery.known import KnownCoordinate, KnownModel, own
from swsurgery.known.schema import Citation, Independent
from swsurgery.storage.coordinate import Coordinate
from swsurgery.verifying import against_known, known_search
from swsurgery.verifying.identification import collect_evidence
from swsurgery.verifying.stored_weight import CodedWeight, read_weight

SOURCE = Citation(key="s", kind="notes", cite="a test")
ROW, COL = 4, 7


def fact(layer: int = 0, row: int = ROW, col: int = COL, **fields) -> KnownCoordinate:
    common = dict(
        id=f"L{layer}.{row}.{col}", layer=layer, row=row, col=col, expert=None, tensor=down(layer), status="paper",
        causal_alone="strong", located_by=("a test",), independent=Independent(location=1, value=1), sources=(SOURCE,),
    )  # fmt: skip
    return KnownCoordinate(**(common | fields))


def model(*facts: KnownCoordinate, **sizes) -> KnownModel:
    common = dict(
        aliases=("tiny",), hf_id="org/tiny", family="tiny", hidden_size=HIDDEN, intermediate_size=INNER, num_layers=3,
        sizes_from="a test", tensor="model.layers.{layer}.mlp.down_proj.weight", coordinates=facts,
    )  # fmt: skip
    return KnownModel(**(common | sizes))


def coded(root: Path, code: int, others: int = 0, **changed: int) -> Path:
    """A matrix with steps of 0.5 whose element (ROW, COL) has this code."""
    codes = np.full((HIDDEN, INNER), others)
    codes[ROW, COL] = code
    return write_single(root, pack(0, codes, np.full(HIDDEN, 0.5)), {"quantization_config": COMPRESSED})


def only(root: Path, entry: KnownCoordinate, **options) -> against_known.Kept:
    return against_known.survey(open_checkpoint(root), model(entry), **options).coordinates[0]


@pytest.mark.parametrize(
    ("known", "code", "state"),
    [
        (2.5, 5, "kept"),
        (2.6, 5, "kept"),
        (2.75, 5, "kept"),  # in the middle of two values, of which the smaller is the nearest by definition
        (2.75, 6, "close"),
        (2.76, 5, "close"),
        (3.01, 5, "changed"),
        (3.4, 5, "lost"),
        (2.5, 4, "close"),
        (2.5, 7, "changed"),
        (0.5, 7, "suspicious"),
        (2.5, 0, "lost"),
        (2.5, -5, "lost"),
        (-2.5, -5, "kept"),
        (-4.0, -8, "kept"),
        (-4.1, -8, "kept"),  # the grid ends at -4, as when the largest weight is rounded with its scale
        (-4.6, -8, "changed"),
        (0.7, 1, "lost"),  # the nearest value of the grid is less than three quarters of the known value
    ],
)
def test_a_code_is_compared_with_the_code_of_the_known_value(tmp_path, known, code, state):
    kept = only(coded(tmp_path, code), fact(value=known, dtype="F32"))
    assert (kept.state, kept.code, kept.stored, kept.step) == (state, code + 8, code * 0.5, 0.5)
    assert kept.layout.startswith(LAYOUT) and not kept.high_precision
    document = kept.to_json()
    assert (document["state"], document["code"], document["step"], document["layout"]) == (
        state, code + 8, 0.5, kept.layout,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "code", "state"),
    [
        ("2.7", 5, "kept"),  # 2.65 to 2.75
        ("2.8", 5, "kept"),  # 2.75 to 2.85
        ("2.8", 6, "kept"),
        ("2.8 (without sign)", -6, "kept"),
        ("2.8", -6, "lost"),
        ("2.90", 5, "close"),
    ],
)
def test_a_printed_value_has_the_codes_of_all_numbers_that_print_so(tmp_path, text, code, state):
    assert only(coded(tmp_path, code), fact(value_printed=text)).state == state


def test_what_is_close_is_shown_with_the_step_and_the_code(tmp_path):
    kept = only(coded(tmp_path, 4), fact(value=2.5, dtype="F32"))
    assert against_known.describe_kept(kept) == f"close: 2.5 -> 2 ({kept.layout}, code 12), x0.8, grid step 0.5"


def test_a_plain_float_has_the_spacing_of_its_dtype_as_step(tmp_path):
    values = np.zeros((HIDDEN, INNER))
    values[ROW, COL] = 5.84375
    kept = only(
        write_single(tmp_path, {down(0): ("BF16", values.shape, bf16(values))}), fact(value=5.875, dtype="BF16")
    )
    assert (kept.state, kept.step, kept.code, kept.layout) == ("close", 0.03125, None, None)
    assert against_known.describe_kept(kept) == "close: 5.875 -> 5.84375 (BF16), x0.9947, grid step 0.03125"


def test_a_module_in_high_precision_is_named(tmp_path):
    values = np.zeros((HIDDEN, INNER))
    values[ROW, COL] = 2.5
    plain = {down(1): ("BF16", values.shape, bf16(values))}
    root = write_single(
        tmp_path / "both", {**pack(0, np.zeros((HIDDEN, INNER), int), np.ones(HIDDEN)), **plain},
        {"quantization_config": {**COMPRESSED, "ignore": ["lm_head", down(1).removesuffix(".weight")]}},
    )  # fmt: skip
    kept = only(root, fact(1, value=2.5, dtype="BF16"))
    assert kept.high_precision and kept.layout is None
    assert against_known.describe_kept(kept) == "kept: 2.5 -> 2.5 (kept in BF16)"
    assert not only(write_single(tmp_path / "plain", plain), fact(1, value=2.5, dtype="BF16")).high_precision


def test_a_close_code_identifies_a_model_as_a_kept_one_does(tmp_path):
    """Quantisers do not all round to the nearest code. Close floats of a fine-tuned model are only near."""
    close = only(coded(tmp_path, 4), fact(value=2.3, dtype="F32"))
    assert close.state == "close"
    evidence = collect_evidence(model(fact(value=2.3, dtype="F32")), [close])
    assert evidence.kept == {close.id} and evidence.states == ((close.id, "kept", True),)


# Values that were moved -----------------------------------------------------------------------------------------------


def moved(root: Path, entry: KnownCoordinate, **options) -> known_search.FoundElsewhere | None:
    checkpoint, known = open_checkpoint(root), model(entry, **options)
    survival = against_known.find_moved(checkpoint, known, against_known.survey(checkpoint, known))
    return survival.coordinates[0].found


def spread(root: Path, places: Mapping[tuple[int, int], float], shape=(60, 50), noise=0.02, config=None) -> Path:
    """A BF16 matrix of noise with a few large values. (ROW, COL) is zero."""
    values = np.random.default_rng(5).normal(0, noise, shape)
    values[ROW, COL] = 0
    for place, value in places.items():
        values[place] = value
    sizes = {"hidden_size": shape[0], "intermediate_size": shape[1]}
    return write_single(root, {down(0): ("BF16", shape, bf16(values))}, sizes | (config or {}))


BIG = fact(value=2.5, dtype="BF16")


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ({(33, 41): 2.5}, (33, 41)),
        ({(33, 41): 2.515625}, (33, 41)),
        ({(59, 49): 2.5, (0, 0): 2.25, (1, 1): -7.0}, (59, 49)),
        ({(33, 41): 2.5, (34, 41): 2.515625}, (33, 41)),
        ({(33, 41): 2.484375, (34, 41): 2.515625}, None),
        ({(33, 41): 2.53125}, None),  # two steps of BF16 away
        ({(33, 41): -2.5}, None),
        ({(33, 41): 2.5, (34, 41): 2.5}, None),
        ({(33, 41): 2.5, **{(n, 2): 2.25 for n in range(8)}}, None),
        ({(33, 41): 2.5, **{(n, 2): 9.0 for n in range(8)}}, None),
        ({(33, 41): 2.5, (3, 3): float("nan"), (3, 4): float("inf")}, (33, 41)),
        ({}, None),
    ],
)
def test_a_lost_value_is_found_if_it_is_unique_and_large(tmp_path, monkeypatch, places, found):
    monkeypatch.setattr(known_search, "BLOCK_ELEMENTS", 130)
    place = moved(spread(tmp_path, places), BIG, hidden_size=60, intermediate_size=50)
    assert (place and place.index) == found


def test_a_value_among_others_of_its_size_is_not_found(tmp_path):
    """All values below 0.25 * 0.75, one at 0.25: it is the largest, but not far larger."""
    root = spread(tmp_path, {(33, 41): 0.25}, noise=0.04)
    assert moved(root, fact(value=0.25, dtype="BF16"), hidden_size=60, intermediate_size=50) is None


def test_another_known_super_weight_is_not_a_moved_one(tmp_path):
    root = spread(tmp_path, {(33, 41): 2.5})
    checkpoint = open_checkpoint(root)
    known = model(BIG, fact(row=33, col=41, value=2.5, dtype="BF16"), hidden_size=60, intermediate_size=50)
    survival = against_known.find_moved(checkpoint, known, against_known.survey(checkpoint, known))
    assert [(c.state, c.found) for c in survival.coordinates] == [("lost", None), ("kept", None)]


def test_nothing_is_searched_if_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(against_known, "find_elsewhere", lambda *_: pytest.fail("a matrix was read"))
    assert moved(spread(tmp_path / "a", {(ROW, COL): 2.5}), BIG) is None
    assert moved(spread(tmp_path / "b", {(33, 41): 2.5}), fact(value=2.5, dtype="BF16", status="disputed")) is None


def test_a_code_is_found_in_a_quantised_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr(known_search, "BLOCK_ELEMENTS", 130)
    codes = np.zeros((60, 50), int)
    codes[33, 41] = 5
    sizes = {"hidden_size": 60, "intermediate_size": 50, "quantization_config": COMPRESSED}
    root = write_single(tmp_path, pack(0, codes, np.full(60, 0.5)), sizes)
    assert moved(root, BIG, hidden_size=60, intermediate_size=50) == known_search.FoundElsewhere((33, 41), 2.5)


def test_only_the_same_expert_is_searched(tmp_path):
    """gpt-oss stacks experts as [expert, col, row]."""
    values = np.zeros((3, 50, 60))
    values[0, 20, 30] = values[1, 21, 31] = 2.5
    name = "model.layers.0.mlp.experts.down_proj"
    config = {"model_type": "gpt_oss", "hidden_size": 60, "intermediate_size": 50, "num_local_experts": 3}
    root = write_single(tmp_path, {name: ("BF16", values.shape, bf16(values))}, config)
    entry = fact(expert=1, tensor=name, value=2.5, dtype="BF16")
    found = moved(root, entry, hidden_size=60, intermediate_size=50)
    assert found == known_search.FoundElsewhere((1, 21, 31), 2.5)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    one = model(fact(value=2.5, dtype="F32"), vocab_size=12)
    monkeypatch.setattr(own, "list_all_models", lambda: (one,))
    monkeypatch.setattr(own, "find_model", lambda name: one)


def test_strict_turns_undecided_into_no(tmp_path, known, capsys):
    root = str(coded(tmp_path / "m", 5))
    assert main(["verify", root, "--model", "tiny", "--strict"]) == 0
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "new"}}))
    capsys.readouterr()
    assert main(["verify", root, "--model", "tiny"]) == 2
    out = capsys.readouterr().out
    assert "the matrix is packed in a way that cannot be read: " in out and "warning   undecided" not in out
    assert main(["verify", root, "--model", "tiny", "--strict", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [f["rule"] for f in document["findings"]] == ["known-unreadable", "undecided"]
    assert (document["ok"], document["decided"]) == (False, False)


def test_an_edited_code_is_declared(tmp_path, known, capsys):
    root = coded(tmp_path / "m", 5)
    manifest = write_manifest(tmp_path / "zero.yaml", root, {"op": "zero", "layer": 0, "row": ROW, "col": COL})
    swsurgery.apply(manifest, output=tmp_path / "out", check="off")
    assert main(["verify", str(tmp_path / "out"), "--model", "tiny"]) == 0
    assert "declared: 2.5 -> 0 (compressed-tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "reason"), [(0, "no known value is stored at its place"), (5, "no known model has its sizes")]
)
def test_a_model_that_is_not_identified_is_undecided(tmp_path, known, capsys, code, reason):
    root = coded(tmp_path / "m", code)
    if code:
        (root / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 99, "quantization_config": COMPRESSED}))
    assert main(["verify", str(root), "--known"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"UNDECIDED: {root}: not identified: ") and reason in out and not err
    assert main(["verify", str(root), "--known", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["decided"]) == (False, False) and reason in document["answer"]
    assert main(["verify", str(root), "--known", "--strict", "--format", "sarif"]) == 1
    (result,) = json.loads(capsys.readouterr().out)["runs"][0]["results"]
    assert (result["ruleId"], result["level"]) == ("undecided", "error") and reason in result["message"]["text"]


def test_reports_for_programs_say_that_a_model_is_not_identified(tmp_path, known, capsys):
    root = coded(tmp_path / "m", 0)
    reason = "no known value is stored at its place"
    words = ["verify", str(root), "--known", "--finite"]
    assert main([*words, "--format", "junit", "--output", str(tmp_path / "report.xml")]) == 2
    suites = ElementTree.fromstring((tmp_path / "report.xml").read_text())
    (error,) = suites.iter("error")
    assert suites.get("errors") == "1" and suites.get("failures") == "0" and reason in error.get("message")
    assert main([*words, "--format", "sarif", "--output", str(tmp_path / "report.sarif")]) == 2
    (run,) = json.loads((tmp_path / "report.sarif").read_text())["runs"]
    (result,) = run["results"]
    assert (result["ruleId"], result["level"]) == ("undecided", "error") and reason in result["message"]["text"]
    assert run["invocations"] == [{"executionSuccessful": False}]
    capsys.readouterr()
    assert main([*words, "--format", "github"]) == 2
    line = capsys.readouterr().out
    assert line.startswith("::error title=swsurgery verify::") and reason in line
    assert main([*words, "--page", str(tmp_path / "page.html")]) == 2
    assert reason in (tmp_path / "page.html").read_text()
    report = swsurgery.verify(root, known=True)
    assert (report.decided, report.exit_code, report.known) == (False, 2, None) and reason in report.reason
    nan = np.full((4, 4), np.nan, "<f4")
    write_shard(
        root / "model.safetensors",
        {
            **pack(0, np.zeros((HIDDEN, INNER), int), np.full(HIDDEN, 0.5)),
            "other.weight": ("F32", nan.shape, nan.tobytes()),
        },
    )
    assert main([*words, "--format", "junit"]) == 1
    text = capsys.readouterr().out
    assert "non-finite" in text and "<error" not in text


# The real super weight of SmolLM2. Its matrix has another element of about the same size, 6.0625. ---------------------


def write_smollm(root: Path, tensors: Mapping[str, tuple], **config: object) -> Path:
    root.mkdir()
    write_shard(root / "model.safetensors", tensors)
    stated = json.loads((Path(str(MODEL)) / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(stated | config))
    return root


@needs_model
def test_the_real_super_weight_in_four_bits_and_with_permuted_columns(tmp_path, capsys):
    matrix = read_down(11)
    grouped = matrix.reshape(576, 12, 128)
    scales = np.asarray(np.abs(grouped).max(2) / 7, "<f4")
    scales = (scales.view("<u4") + 0x8000 & 0xFFFF0000).view("<f4")  # rounded to BF16
    codes = np.clip(np.rint(grouped / scales[:, :, None]), -8, 7).astype(int).reshape(576, 1536)
    weights = COMPRESSED["config_groups"]["group_0"]["weights"] | {"strategy": "group", "group_size": 128}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantisation = {"quantization_config": COMPRESSED | {"config_groups": groups}}
    root = write_smollm(tmp_path / "four", pack(11, codes, scales), **quantisation)
    kept = read_weight(open_checkpoint(root), Coordinate(down(11), (507, 1229)))
    assert isinstance(kept, CodedWeight) and kept.is_nearest(5.875) and kept.code == 15
    assert main(["verify", str(root), "--model", "smollm2-135m-instruct", "--json"]) == 0
    (one, *_) = [c for c in json.loads(capsys.readouterr().out)["known"]["coordinates"] if c["id"] == "L11.507.1229"]
    assert (one["state"], one["code"]) == ("kept", 15) and one["step"] == pytest.approx(float(scales[507, 9]))

    turned = pack(11, np.roll(codes, 128, axis=1), np.roll(scales, 1, axis=1))
    assert main(["verify", str(write_smollm(tmp_path / "turned", turned, **quantisation)), "--known"]) == 2
    root = write_smollm(tmp_path / "named", turned, **quantisation)
    assert main(["verify", str(root), "--model", "smollm2-135m-instruct"]) == 1
    assert "found at [507, 1357]" in capsys.readouterr().out
    plain = {down(11): ("BF16", matrix.shape, bf16(np.roll(matrix, 71, axis=1)))}
    assert main(["verify", str(write_smollm(tmp_path / "plain", plain)), "--model", "smollm2-135m-instruct"]) == 1
    assert "(BF16), x" in (out := capsys.readouterr().out) and "found at [507, 1300]" in out
