"""A finished scan as a known entry and as a manifest: figures, sources and guards are those of the scan."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import HIDDEN, INNER, LAYERS, SECOND, THIRD, down, stored, tensor, write_llama, write_single
from known_entry import render_entry

from swsurgery import __version__
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main
from swsurgery.editing.plan import make_plan
from swsurgery.errors import LookupFailed, ManifestError
from swsurgery.known import own, schema
from swsurgery.known import shipped as shipped_module
from swsurgery.known import table as table_module
from swsurgery.known.schema import Citation, classify_ratio
from swsurgery.known.schema import KnownEffect as KnownEffect
from swsurgery.known.shipped import load_file
from swsurgery.manifest.load import load_manifest, parse_manifest
from swsurgery.scanning.causal_report import Effect
from swsurgery.scanning.outputs import make_known_entry, scan_manifest
from swsurgery.scanning.part_report import ModelPart, PartConfirmation, PartName, PartTrial
from swsurgery.scanning.report import Candidate, Confirmation, JointSet, Scan, Trial
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import DTYPES, decode

COMMAND = "swsurgery scan ./tiny --confirm"
DIGEST = "ab" * 32
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    return open_checkpoint(write_llama(tmp_path / "tiny"))


def candidate(folder: Path, layer: int, row: int, col: int, file: str, dtype: str, **fields) -> Candidate:
    """What a detector would say of a scalar of the checkpoint in `folder`."""
    place = Coordinate(down(layer), (row, col))
    value = float(decode(DTYPES[dtype], stored(folder / file, *place)))
    known_fields = {"score": 12.5, "rank": 1} | fields
    return Candidate(place, layer, row, col, None, value, **known_fields)


def trial(candidate: Candidate, ratio: float, verdict: str, without: float | None = 1.5, listed: bool = True) -> Trial:
    other = None if without is None else effect(without)
    return Trial(candidate, effect(ratio), other, verdict, listed)


def effect(ratio: float) -> Effect:
    return Effect(ratio, ratio * 0.9, ratio * 1.1, 0.25)


def confirmation(*trials: Trial, together: float = 50.0, joint: tuple[JointSet, ...] = ()) -> Confirmation:
    return Confirmation(
        trials, effect(together), joint, (0.999, 1.001), 29.6, 16, 512, DIGEST, "float32", "cpu", 8176
    )  # fmt: skip


@pytest.fixture
def report(checkpoint) -> Scan:
    """Two candidates, of which one matters alone and one does not, and a companion that matters jointly."""
    root = checkpoint.root
    first = candidate(root, 1, 2, 3, SECOND, "F16", input_spike=26.46, output_spike=-342.24, share=0.98, prompts=4)
    second = candidate(root, 2, 2, 5, THIRD, "F32", rank=7)
    third = candidate(root, 2, 4, 6, THIRD, "F32", z=3.5)
    joint = JointSet((first.coordinate, second.coordinate), effect(54.25))
    return Scan(
        "activations", "llama", LAYERS, (first, second, third),
        confirmation=confirmation(
            trial(first, 5.5, "needed alone"), trial(second, 1.01, "needed jointly", listed=False),
            trial(third, 0.99, "inert"), together=55.0, joint=(joint,),
        ),
    )  # fmt: skip


def nothing(report: Scan, confirmed: bool) -> Scan:
    if not confirmed:
        return replace(report, candidates=(), confirmation=None)
    trials = [replace(t, verdict="inert") for t in report.confirmation.trials]
    return replace(report, confirmation=confirmation(*trials, together=1.0))


def test_the_entry_says_what_was_measured(checkpoint, report):
    model = make_known_entry(report, checkpoint, hf_id="org/tiny", revision=REVISION, command=COMMAND)
    assert (model.hidden_size, model.intermediate_size, model.num_layers) == (HIDDEN, INNER, LAYERS)
    assert (model.family, model.revision_measured, model.path) == ("llama", REVISION, None)
    assert model.tensor == "model.layers.{layer}.mlp.down_proj.weight" and not model.transposed
    first, second = model.coordinates
    assert (first.id, first.tensor, first.dtype) == ("L1.2.3", down(1), "F16")
    assert (second.id, second.tensor, second.dtype) == ("L2.2.5", down(2), "F32")
    assert first.value == report.candidates[0].value and second.value == report.candidates[1].value
    assert [c.status for c in model.coordinates] == ["measured", "measured"]
    assert [c.causal_alone for c in model.coordinates] == ["strong", "inert"]
    assert [c.role for c in model.coordinates] == ["needed alone", "needed jointly"]
    alone, without = first.effects
    assert (alone.protocol, alone.ratio, alone.ci95, alone.kl) == ("zero", 5.5, (4.95, 6.05), 0.25)
    assert (alone.before, alone.after) == (29.6, 162.8)
    assert alone.conditions.model_dump() == {
        "text_sha256": DIGEST, "windows": 16, "window_tokens": 512, "scored_tokens": 8176, "dtype": "float32",
        "device": "cpu", "protocol": report.confirmation.protocol.describe(),
    }  # fmt: skip
    assert without.ratio == 1.5 and without.protocol != "zero"
    assert "26.46" in first.note and "-342.2" in first.note and "98%" in first.note
    assert "no detector listed it" in second.note and "no detector" not in first.note
    [joint] = model.joint_sets
    assert joint.coordinates == ("L1.2.3", "L2.2.5")
    assert (joint.effects[0].ratio, joint.effects[0].protocol) == (54.25, "zero jointly")
    [everything] = model.effects
    assert (everything.ratio, everything.protocol) == (55.0, "zero all 2 candidates of the scan")


def test_an_interval_that_version_0_1_0_made_from_tokens_is_read_and_not_shown():
    conditions = {"text_sha256": DIGEST, "windows": 16, "window_tokens": 512, "dtype": "float32", "device": "cpu"}
    fields = {"protocol": "zero", "metric": "ppl", "before": 29.6, "after": 162.8, "ratio": 5.5, "ci95": (4.95, 6.05)}
    source = Citation(key="scan", kind="own scan", cite="swsurgery 0.1.0")
    old = KnownEffect(**fields, conditions=conditions, source=source)
    assert (old.ratio, old.ci95, old.conditions.scored_tokens) == (5.5, None, None)
    new = KnownEffect(**fields, conditions=conditions | {"scored_tokens": 8176}, source=source)
    published = KnownEffect(**fields, source=source)
    assert new.ci95 == published.ci95 == (4.95, 6.05)


def test_the_source_repeats_the_scan(checkpoint, report):
    model = make_known_entry(report, checkpoint, hf_id="org/tiny", revision=REVISION, command=COMMAND)
    [source] = model.sources
    assert source.kind == "own scan" and model.own
    assert f"`{COMMAND}`" in str(source) and str(source).endswith(f"swsurgery {__version__}")
    protocol = report.confirmation.protocol.describe()
    for fact in (
        REVISION,
        "16 windows of 512 tokens (8,176 scored)",
        DIGEST,
        protocol,
        "float32 on cpu",
        "x0.999 to x1.001",
    ):
        assert fact in source.note
    other = make_known_entry(report, checkpoint, hf_id="org/tiny", command=COMMAND)
    assert other.sources[0].key != source.key, "another scan is another source"


def test_all_candidates_together_are_a_set_where_all_are_in_the_entry(checkpoint, report):
    trials = [replace(t, listed=True) for t in report.confirmation.trials[:2]]
    model = make_known_entry(
        replace(report, confirmation=confirmation(*trials, together=60.0)), checkpoint, hf_id="tiny", command=COMMAND
    )
    [joint] = model.joint_sets
    assert joint.coordinates == ("L1.2.3", "L2.2.5") and joint.effects[0].ratio == 60.0
    assert model.effects == ()


def test_an_inert_member_of_a_joint_set_is_in_the_entry(checkpoint, report):
    third = report.candidates[2].coordinate
    joint = JointSet((report.candidates[0].coordinate, third), effect(9.0))
    changed = replace(report, confirmation=replace(report.confirmation, joint_sets=(joint,)))
    model = make_known_entry(changed, checkpoint, hf_id="tiny", command=COMMAND)
    assert model.joint_sets[0].coordinates == ("L1.2.3", "L2.4.6")
    assert [c.id for c in model.coordinates] == ["L1.2.3", "L2.2.5", "L2.4.6"]


def test_without_a_causal_test_nothing_is_claimed(checkpoint, report):
    model = make_known_entry(replace(report, confirmation=None), checkpoint, hf_id="tiny", command=COMMAND)
    assert [c.causal_alone for c in model.coordinates] == ["untested"] * 3
    assert all(c.effects == () and c.role == "not confirmed" for c in model.coordinates)
    assert model.joint_sets == () and model.effects == ()
    assert model.path == str(checkpoint.root), "a name of one's own is no repository"


@pytest.mark.parametrize("tested", [False, True])
def test_an_entry_names_the_parts_that_create_an_activation(checkpoint, report, tested, capsys):
    part = ModelPart(PartName("row", 1, None, 3), (3,), 90.0)
    fields = {key: value for key, value in vars(report.confirmation).items() if key not in ("column_nulls", "doses")}
    trial = PartTrial(part, effect(1.8), None, "needed alone")
    test = PartConfirmation(**fields | {"trials": (trial,), "joint_sets": ()})
    found = replace(nothing(report, False), parts=(part,), part_confirmation=test if tested else None)
    own.save(make_known_entry(found, checkpoint, hf_id="tiny", command=COMMAND))
    assert main(["lookup", "tiny"]) == 0
    words = "layer 1 row 3 (needed alone, perplexity x1.800 without it)" if tested else "layer 1 row 3 (not confirmed)"
    said = " ".join(capsys.readouterr().out.split())
    assert f"Parts of the model that create an activation in a scan: {words}: measured with" in said


@pytest.mark.parametrize("confirmed", [False, True])
def test_a_scan_that_found_nothing_makes_an_entry_that_says_so(checkpoint, report, confirmed, capsys):
    model = make_known_entry(nothing(report, confirmed), checkpoint, hf_id="tiny", command=COMMAND)
    assert model.coordinates == () and model.joint_sets == () and model.own
    assert "found no super weight" in model.notes[0] and COMMAND in model.notes[0]
    own.save(model)
    assert main(["lookup", "tiny"]) == 0
    assert "A scan found no super weight" in capsys.readouterr().out
    assert main(["lookup", "tiny", "--manifest", "zero"]) == 2
    assert "no whole coordinate to zero: tiny (a scan found none)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratio", "word"),
    [(math.inf, "catastrophic"), (math.nan, "catastrophic"), (30.0, "catastrophic"), (29.99, "strong"), (4.0, "strong"),
     (3.99, "moderate"), (2.0, "moderate"), (1.99, "weak"), (1.05, "weak"), (1.0499, "inert"), (1.0, "inert"),
     (0.5, "inert")],
)  # fmt: skip
def test_classes(ratio, word):
    assert classify_ratio(ratio) == word
    assert word in schema.CAUSAL


def test_logits_that_were_not_finite_are_kept_as_words(checkpoint, report):
    first, second, _ = report.confirmation.trials
    broken = replace(first, alone=Effect(math.nan, math.nan, math.nan, math.nan))
    endless = replace(second, alone=Effect(math.inf, 2.0, math.inf, math.inf))
    model = make_known_entry(
        replace(report, confirmation=confirmation(broken, endless)), checkpoint, hf_id="tiny", command=COMMAND
    )
    one, two = (c.effects[0] for c in model.coordinates)
    assert (one.ratio, one.after, one.ci95, one.kl) == ("not finite", "not finite", None, None)
    assert (two.ratio, two.after, two.ci95, two.kl) == (math.inf, math.inf, None, None)
    own.save(model)
    assert own.find_model("tiny") == model
    json.dumps(shipped_module.build_json(own.find_model("tiny")), allow_nan=False)
    assert "not finite" in table_module.render_table(model, 100) and "infinite" in table_module.render_table(model, 100)


def test_what_was_not_confirmed_is_a_candidate_that_verify_does_not_enforce(checkpoint, report, capsys):
    model = make_known_entry(replace(report, confirmation=None), checkpoint, hf_id="tiny", command=COMMAND)
    assert [(c.status, c.causal_alone) for c in model.coordinates] == [("candidate", "untested")] * 3
    own.save(
        model.model_copy(update={"coordinates": tuple(c.model_copy(update={"value": 99.0}) for c in model.coordinates)})
    )
    assert main(["verify", str(checkpoint.root), "--model", "tiny"]) == 2
    out = capsys.readouterr().out
    assert out.startswith("UNDECIDED: ") and out.count("(not counted: candidate)") == 3 and "FINDING" not in out
    assert main(["lookup", "tiny"]) == 0 and "candidate" in capsys.readouterr().out


def test_found_again_by_lookup_and_in_the_plan(checkpoint, report, tmp_path, capsys):
    model = make_known_entry(report, checkpoint, hf_id="My Tiny", command=COMMAND)
    own.save(model)
    assert own.find_model("my-tiny") == model
    assert main(["lookup", "my_tiny", "--manifest", "zero"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "zero.yaml").write_text(text)
    loaded = load_manifest(tmp_path / "zero.yaml")
    assert loaded.manifest.base.path == str(checkpoint.root) and loaded.manifest.base.model == "My Tiny"
    assert loaded.manifest.check.min_perplexity_ratio == 2.0, "x5.5 alone was measured"
    plan = make_plan(loaded, checkpoint)
    assert [(s.coordinate, plan.facts[s.coordinate].status) for s in plan.splices] == [
        (Coordinate(down(1), (2, 3)), "measured"),
        (Coordinate(down(2), (2, 5)), "measured"),
    ]
    assert main(["apply", str(tmp_path / "zero.yaml"), "--dry-run", "--json"]) == 0


def test_protect_all_reaches_what_was_scanned(checkpoint, report, tmp_path):
    own.save(make_known_entry(report, checkpoint, hf_id="tiny", command=COMMAND))
    base = {"path": str(checkpoint.root), "model": "tiny"}
    edits = [{"op": "protect", "known": "all"}]
    raw = json.dumps({"version": 1, "base": base, "edits": edits}).encode()
    plan = make_plan(parse_manifest(raw, tmp_path / "m.json"), checkpoint)
    assert [p.coordinate.index for p in plan.protected] == [(2, 3), (2, 5)]


@pytest.mark.parametrize(
    ("op", "factor", "new"), [("zero", None, (0.0, 0.0)), ("scale", 0.5, (0.5, 0.5)), ("protect", None, None)]
)
def test_the_manifest_loads_and_plans(checkpoint, report, tmp_path, op, factor, new):
    path = tmp_path / "m.yaml"
    path.write_text(scan_manifest(report, base={"path": "tiny"}, op=op, factor=factor))
    loaded = load_manifest(path)
    assert (path.parent / loaded.manifest.base.path).samefile(checkpoint.root)
    values = [c.value for c in report.super_weights]
    assert [e.expect for e in loaded.manifest.edits] == values and len(values) == 2
    assert [(e.op, e.layer, e.row, e.col) for e in loaded.manifest.edits] == [(op, 1, 2, 3), (op, 2, 2, 5)]
    assert "2 super weights" in loaded.manifest.description
    assert "# L1.2.3: needed alone; zeroed alone ppl 29.6 -> 162.8\n" in path.read_text()
    plan = make_plan(loaded, checkpoint)
    if new is None:
        assert [p.coordinate.index for p in plan.protected] == [(2, 3), (2, 5)] and plan.splices == ()
    else:
        written = [float(decode(s.dtype, s.new)) for s in plan.splices]
        assert written == [v * n for v, n in zip(values, new, strict=True)]
    assert loaded.manifest.check.min_perplexity_ratio == (2.0 if op == "zero" else None)


def test_the_guard_refuses_another_checkpoint(checkpoint, report, tmp_path):
    other = replace(report.candidates[0], value=report.candidates[0].value + 1)
    text = scan_manifest(replace(report, candidates=(other,), confirmation=None), base={"path": "tiny"}, op="zero")
    with pytest.raises(Exception, match="is this the right base"):
        make_plan(parse_manifest(text.encode(), tmp_path / "m.yaml"), checkpoint)


def test_a_zero_manifest_asks_for_damage_only_where_it_was_measured(report):
    base = {"path": "tiny"}
    assert "min_perplexity_ratio" in scan_manifest(report, base=base, op="zero")
    assert "min_perplexity_ratio" not in scan_manifest(replace(report, confirmation=None), base=base, op="zero")
    weak = trial(report.candidates[0], 3.9, "needed alone")
    alone = replace(report, confirmation=confirmation(weak, together=3.9))
    assert "min_perplexity_ratio" not in scan_manifest(alone, base=base, op="zero")
    jointly = replace(report, confirmation=confirmation(weak, report.confirmation.trials[1], together=4.1))
    assert "min_perplexity_ratio: 2.0" in scan_manifest(jointly, base=base, op="zero")


def test_the_manifest_of_a_repository_and_of_odd_paths(report, tmp_path):
    text = scan_manifest(report, base={"repo_id": "org/tiny", "revision": "1234567e" * 5}, op="zero")
    base = parse_manifest(text.encode(), tmp_path / "m.yaml").manifest.base
    assert (base.repo_id, base.revision) == ("org/tiny", "1234567e" * 5)
    for path in ("../a b", "né/🦙", 'quo"te', "back\\slash", "a: b # c", "true", "1e5", "new\nline", "del\x7f", "- x"):
        text = scan_manifest(report, base={"path": path, "repo_id": None}, op="protect")
        assert parse_manifest(text.encode(), tmp_path / "m.yaml").manifest.base.path == path


@pytest.mark.parametrize("confirmed", [False, True])
@pytest.mark.parametrize("op", ["zero", "protect"])
def test_a_manifest_of_nothing_is_refused(report, confirmed, op):
    why = "all 3 candidates are inert" if confirmed else "there is no candidate"
    with pytest.raises(ManifestError, match=f"nothing to {op}: the scan found no super weight .{why}"):
        scan_manifest(nothing(report, confirmed), base={"path": "tiny"}, op=op)


@pytest.mark.parametrize(
    ("base", "op", "factor", "complaint"),
    [
        ({"path": "tiny"}, "scale", None, "scale needs a factor"),
        ({"path": "tiny"}, "zero", 0.5, "zero takes no factor"),
        ({"path": "tiny"}, "scale", math.nan, "finite number other than 0"),
        ({"path": "tiny"}, "set", None, "no such operation"),
        ({"path": "tiny", "repo_id": "org/tiny"}, "zero", None, "needs either repo_id or path"),
        ({"repo_id": "org/tiny", "revision": "main"}, "zero", None, "40 hex digits"),
    ],
)
def test_a_manifest_that_could_not_be_loaded_is_not_written(report, base, op, factor, complaint):
    with pytest.raises(ManifestError, match=complaint):
        scan_manifest(report, base=base, op=op, factor=factor)


def test_transposed_tensors_and_odd_dtypes(tmp_path):
    name = "transformer.h.1.mlp.c_proj.weight"
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": HIDDEN, "n_head": 2}
    folder = write_single(
        tmp_path / "gpt2", {n: tensor("F8_E4M3", 16, HIDDEN, seed=1) for n in (name.replace(".1.", ".0."), name)}, gpt2
    )
    checkpoint = open_checkpoint(folder)
    value = float(decode(DTYPES["F8_E4M3"], stored(folder / "model.safetensors", name, (9, 2))))
    found = Candidate(Coordinate(name, (9, 2)), 1, 2, 9, None, value, 3.0, 1)
    report = Scan("weights", "gpt2", 2, (found,))
    model = make_known_entry(report, checkpoint, hf_id="g", command=COMMAND)
    assert (model.tensor, model.transposed) == ("transformer.h.{layer}.mlp.c_proj.weight", True)
    assert (model.hidden_size, model.intermediate_size) == (HIDDEN, 16)
    [place] = model.coordinates
    assert (place.id, place.value, place.dtype) == ("L1.2.9", None, None)
    assert place.value_printed == f"{value!r} F8_E4M3"
    assert f"{name}[9, 2] (stored transposed)" in table_module.render_table(model, 100)
    text = scan_manifest(report, base={"path": "gpt2"}, op="zero")
    [splice] = make_plan(parse_manifest(text.encode(), tmp_path / "m.yaml"), checkpoint).splices
    assert splice.coordinate == Coordinate(name, (9, 2))


def test_experts(tmp_path):
    names = {e: f"model.layers.0.mlp.experts.{e}.down_proj.weight" for e in (0, 1)}
    names["shared"] = "model.layers.0.mlp.shared_experts.down_proj.weight"
    config = {"model_type": "deepseek_v2", "num_hidden_layers": 1, "hidden_size": 4}
    folder = write_single(tmp_path / "moe", {n: tensor("BF16", 4, 8, seed=2) for n in names.values()}, config)
    checkpoint = open_checkpoint(folder)
    candidates = tuple(Candidate(Coordinate(names[e], (1, 2)), 0, 1, 2, e, 1.5, 3.0, 1) for e in (1, "shared"))
    model = make_known_entry(Scan("weights", "deepseek_v2", 1, candidates), checkpoint, hf_id="m", command=COMMAND)
    assert [c.id for c in model.coordinates] == ["L0.E1.1.2", "L0.Eshared.1.2"]
    assert (model.tensor, model.num_experts) == ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", 2)
    own.save(model)
    assert own.find_model("m") == model
    with pytest.raises(LookupFailed, match="the tensor does not follow the model's template"):
        render_entry(model)


def test_an_own_entry_becomes_a_shipped_one(checkpoint, report, tmp_path):
    model = make_known_entry(report, checkpoint, hf_id="Org/Tiny", revision=REVISION, command=COMMAND)
    (tmp_path / "tiny.toml").write_text(render_entry(model))
    [shipped] = load_file(tmp_path / "tiny.toml")
    assert {s.kind for s in shipped.sources} == {"scan"} and not shipped.own
    assert shipped.slug == "tiny"
    text = model.model_copy(update={"aliases": ("tiny",)}).model_dump_json().replace('"own scan"', '"scan"')
    assert shipped.model_dump_json() == text
    table = " ".join(table_module.render_table(shipped, 120).split())
    assert "measured strong" in table and "own scan" not in table
    assert "ppl 29.6 -> 162.8 (95%: x4.95 to x6.05)" in table


def test_the_table_shows_figures_and_marks_them_as_own(checkpoint, report):
    model = make_known_entry(report, checkpoint, hf_id="tiny", command=COMMAND)
    for width in (80, 120):
        text = table_module.render_table(model, width)
        assert max(map(len, text.splitlines())) <= width
        flat = " ".join(text.split())
        assert "own scan, zeroed: ppl 29.6 -> 162.8 (95%: x4.95 to x6.05) [1]" in flat
        assert "own scan, zero all others of the scan: ppl" in flat
        assert "L1.2.3 + L2.2.5" in flat and "zero all 2 candidates of the scan" in flat
        assert f"(own scan; 16 windows of 512 tokens (8,176 scored) of the text with sha256 {DIGEST}" in flat
        assert "WARNING" not in flat
