"""lint: each rule by one bad manifest and its sound twin, where findings point, and what the command makes of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from swsurgery.cli import main
from swsurgery.errors import ManifestError
from swsurgery.verifying.findings import RULES
from swsurgery.verifying.lint import LINTS, lint, lint_manifest

ROOT = Path(__file__).parents[2]
REVISION = "4782ad278652c7c71b72204d462d6d01eaaf7549"
LLAMA = f'base: {{repo_id: huggyllama/llama-7b, revision: "{REVISION}"}}'
MOE = LLAMA.replace("huggyllama/llama-7b", "Qwen/Qwen3-30B-A3B")
DIRECTORY = 'base: {path: checkpoint, sha256: {model.safetensors: "' + 64 * "0" + '"}}'
UNPINNED = "base: {path: checkpoint}"
BOUNDS = "check: {min_perplexity_ratio: 2.0}"
DOWN = "model.layers.2.mlp.down_proj.weight"
# llama-7b's one super weight, as arXiv:2411.07191 and the record have it: layer 2, row 3968, col 7003.
HERE = "layer: 2, row: 3968, col: 7003"
VALUE = "-1.9267578125"


def text(base: str, *edits: str, check: str = BOUNDS) -> str:
    """Line 2 is the base, line 4 the first edit, and the check comes after the last. A mark @ at the beginning of an
    edit stands where the edit does."""
    items = (f"  - {{{edit}}}".replace("{@", "@{") for edit in edits)
    return "\n".join(["version: 1", base, "edits:", *items, check]) + "\n"


SOUND = text(LLAMA, f"op: zero, {HERE}, expect: {VALUE}")


@pytest.fixture
def found(tmp_path):
    """Rule, line and column of each finding in a manifest of this text."""

    def found(manifest: str) -> list[tuple[str, int | None, int | None]]:
        path = tmp_path / "edits.yaml"
        path.write_text(manifest)
        return [(f.rule, f.line, f.column) for f in lint_manifest(path)]

    return found


def test_a_sound_manifest_has_no_finding(found):
    assert found(SOUND) == []


CASES = [
    # rule, the manifest with its finding at the mark @, the manifest without
    ("edit-duplicate",
     text(LLAMA, f"op: zero, {HERE}, expect: {VALUE}", f"@op: protect, {HERE}"),
     text(LLAMA, f"op: zero, {HERE}, expect: {VALUE}", "op: protect, layer: 2, row: 3968, col: 7004")),
    ("edit-duplicate",
     text(MOE, "op: zero, known: L1.E68", "@op: zero, layer: 1, expert: 68"),
     text(MOE, "op: zero, known: L1.E68", "op: zero, layer: 1, expert: 67")),
    ("edit-duplicate",
     text(LLAMA, "op: zero, known: L2.*.7003", "@op: zero, layer: 2, col: 7003"),
     text(LLAMA, "op: zero, known: L2.*.7003", "op: zero, layer: 2, col: 7004")),
    ("edit-duplicate",
     text(LLAMA, "op: zero, known: L2.3968.7003", f"@op: protect, tensor: {DOWN}, index: [3968, 7003]"),
     text(LLAMA, "op: zero, known: L2.3968.7003", f"op: protect, tensor: {DOWN}, index: [3968, 7004]")),
    ("edit-duplicate",
     text(DIRECTORY, "op: protect, tensor: t, index: [1]", "@op: zero, tensor: t, index: [1]"),
     text(DIRECTORY, "op: protect, tensor: t, index: [1]", "op: zero, tensor: t, index: [1, 0]")),
    ("edit-range",
     text(LLAMA, "op: protect, layer: 2, row: @7003, col: 3968"),
     text(DIRECTORY, "op: protect, layer: 2, row: 7003, col: 3968")),
    ("edit-range",
     text(LLAMA, "op: protect, layer: @32, row: 0, col: 0"),
     text(LLAMA, "op: protect, layer: 31, row: 4095, col: 11007")),
    ("edit-duplicate",
     text(LLAMA, "op: zero, layer: 2, row: 7", "@op: scale, layer: 2, row: 7, factor: 2"),
     text(LLAMA, "op: zero, layer: 2, row: 7", "op: scale, layer: 2, row: 8, factor: 2", "op: zero, layer: 2, col: 7",
          "op: zero, layer: 3, neuron: 7")),
    ("edit-duplicate",
     text(LLAMA, "op: protect, layer: 2, neuron: 7", "@op: protect, layer: 2, neuron: 7"),
     text(LLAMA, "op: protect, layer: 2, neuron: 7", "op: protect, layer: 1, neuron: 7")),
    ("edit-duplicate",
     text(DIRECTORY, "op: zero, layer: 2, expert: 7", "@op: zero, expert: 7, layer: 2"),
     text(DIRECTORY, "op: zero, layer: 2, expert: 7", "op: zero, layer: 2, expert: shared")),
    ("edit-duplicate",
     text(DIRECTORY, 'op: zero, tensor: t, slice: "3,1:9"', '@op: zero, tensor: t, slice: "3, 1 : 9"'),
     text(DIRECTORY, 'op: zero, tensor: t, slice: "3,1:9"', 'op: zero, tensor: t, slice: "3, 9:"')),
    ("edit-duplicate",
     text(DIRECTORY, "op: round, tensors: a.*, bits: 4", "@op: clip, tensors: a.*, z: 5"),
     text(DIRECTORY, "op: round, tensors: a.*, bits: 4", "op: clip, tensors: b.*, z: 5")),
    ("edit-range",
     text(LLAMA, "op: zero, layer: 2, neuron: @11008"),
     text(LLAMA, "op: zero, layer: 2, neuron: 11007")),
    ("edit-range",
     text(LLAMA, "op: zero, layer: 2, row: @4096"),
     text(LLAMA, "op: zero, layer: 2, row: 4095")),
    ("edit-range",
     text(LLAMA, "op: zero, layer: 2, expert: @3"),
     text(LLAMA.replace("huggyllama/llama-7b", "Qwen/Qwen3-30B-A3B"), "op: zero, layer: 2, expert: 3")),
    ("edit-range",
     text(LLAMA, f"op: zero, tensor: {DOWN}, slice: @'4095, 0:11009'"),
     text(LLAMA, f"op: zero, tensor: {DOWN}, slice: '-4096, 0:11008'")),
    ("edit-range",
     text(LLAMA, f"op: zero, tensor: {DOWN}, slice: @4096"),
     text(LLAMA, f"op: zero, tensor: {DOWN.replace('down', 'up')}, slice: 4096")),
    ("edit-range",
     text(LLAMA, f"op: zero, tensor: {DOWN}, slice: @'1, 2, 3'"),
     text(LLAMA, f"op: zero, tensor: {DOWN}, slice: '1, :-3'")),
    ("edit-range",
     text(LLAMA, f"op: zero, tensor: {DOWN}, slice: @'1, 11000:-100'"),
     text(LLAMA, f"op: zero, tensor: {DOWN}, slice: '1, 11000:-1'")),
    ("edit-range",
     text(DIRECTORY, "op: zero, tensor: t, slice: @'20:10'"),
     text(DIRECTORY, "op: zero, tensor: t, slice: '20:-10'")),
    ("edit-range",
     text(LLAMA, f"op: protect, tensor: {DOWN}, index: @[4096, 0]"),
     text(LLAMA, f"op: protect, tensor: {DOWN}, index: [4095, 0]")),
    ("edit-range",
     text(LLAMA, f"op: protect, tensor: {DOWN}, index: @[5]"),
     text(LLAMA, f"op: protect, tensor: {DOWN.replace('.2.', '.32.')}, index: [5]")),
    ("known-missing",
     text(LLAMA, "op: protect, known: @L2.3968.7004"),
     text(LLAMA, "op: protect, known: L2.3968.7003")),
    ("known-missing",
     text(MOE, "op: protect, known: @L1.E69"),
     text(MOE, "op: protect, known: L1.E68")),
    ("known-missing",
     text(LLAMA, "op: protect, known: @L2.*.7004"),
     text(LLAMA, "op: protect, known: L2.*.7003")),
    ("known-missing",
     text(DIRECTORY, "op: protect, known: @all"),
     text(DIRECTORY.replace("path: checkpoint", "path: checkpoint, model: llama-7b"), "op: protect, known: all")),
    ("known-missing",
     text(DIRECTORY.replace("path: checkpoint", "path: checkpoint, model: @lama-7b"), "op: protect, known: all"),
     text(DIRECTORY.replace("path: checkpoint", "path: checkpoint, model: llama-7b"), "op: protect, known: all")),
    ("expect-contradicts",
     text(LLAMA, f"op: zero, {HERE}, expect: @1.9267578125"),
     text(LLAMA, f"op: zero, {HERE}, expect: -1.9296875")),  # the same, rounded to BF16
    ("expect-contradicts",
     text(LLAMA, f'op: zero, {HERE}, expect: @"0x3c00"'),  # 1.0 in F16
     text(LLAMA, f'op: zero, {HERE}, expect: "0xbfb5"')),  # -1.9267578125 in F16
    ("expect-contradicts",
     text(LLAMA, f"op: zero, {HERE}, expect: @{{value: 2.5, dtype: F32}}"),
     text(LLAMA, f"op: zero, {HERE}, expect: {{value: 2.5, dtype: F8_E4M3}}")),  # too coarse to say anything
    ("bounds-impossible",
     text(LLAMA, f"op: zero, {HERE}, expect: {VALUE}",
          check="check: @{min_perplexity_ratio: 2, max_perplexity_ratio: 1.5}"),
     text(LLAMA, f"op: zero, {HERE}, expect: {VALUE}",
          check="check: {min_perplexity_ratio: 2, max_perplexity_ratio: 2}")),
    ("edit-no-effect",
     text(DIRECTORY, "op: scale, tensor: some.rather.long.name, index: [1, 2], factor: @1.0"),
     text(DIRECTORY, "op: scale, tensor: some.rather.long.name, index: [1, 2], factor: 1.5")),
    ("edit-no-effect",
     text(DIRECTORY, "@op: set, tensor: t, index: [1], value: 0.5, expect: 0.5"),
     text(DIRECTORY, "op: set, tensor: t, index: [1], value: 0.5, expect: 0.25")),
    ("edit-no-effect",
     text(DIRECTORY, '@op: set, tensor: t, index: [1], bits: "0x40BC", expect: "0x40bc"'),
     text(DIRECTORY, 'op: set, tensor: t, index: [1], bits: "0x40bd", expect: "0x40bc"')),
    ("edit-no-effect",
     text(DIRECTORY, '@op: zero, tensor: t, index: [1], expect: "0x0000"'),
     text(DIRECTORY, 'op: zero, tensor: t, index: [1], expect: "0x8000"')),
    ("edit-no-effect",
     text(DIRECTORY, "op: scale, layer: 1, row: 2, factor: @1"),
     text(DIRECTORY, "op: scale, layer: 1, row: 2, factor: -1")),
    ("edit-no-effect",
     text(DIRECTORY, "@op: round, tensors: a.*, bits: 4", "op: protect, tensors: a.*"),
     text(DIRECTORY, "op: round, tensors: a.*, bits: 4", "op: protect, tensors: a.b")),
    ("expect-missing",
     text(LLAMA, f"@op: flip, {HERE}, bit: 14"),
     text(LLAMA, f"op: restore, {HERE}", "op: zero, layer: 1, row: 2", "op: round, tensors: a.*, bits: 4",
          'op: zero, tensor: t, slice: "3"', "op: zero, layer: 1, neuron: 3")),
    ("expect-missing",
     text(LLAMA, f"@op: zero, {HERE}"),
     text(LLAMA, "op: zero, known: L2.3968.7003")),  # which brings the value itself
    ("expect-missing",
     text(LLAMA, "@op: zero, layer: 2, row: 0, col: 0"),
     text(LLAMA, "op: protect, layer: 2, row: 0, col: 0")),
    ("base-unpinned",
     text(UNPINNED.replace("{", "@{"), "op: protect, tensor: t, index: [1]"),
     text(DIRECTORY, "op: protect, tensor: t, index: [1]")),
    ("bounds-missing",
     "@" + text(LLAMA, f"op: zero, {HERE}, expect: {VALUE}", check=""),
     text(LLAMA, f"op: protect, {HERE}", check="")),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "bad", "good"), CASES, ids=[c[0] for c in CASES])
def test_a_lint_finds_its_fault_where_it_stands_and_nothing_in_the_twin(found, rule, bad, good):
    before, mark, after = bad.partition("@")
    assert mark
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    assert found(before + after) == [(rule, line, column)]
    assert found(good) == []


def test_every_lint_has_a_case_and_a_row():
    assert {case[0] for case in CASES} == set(LINTS)
    assert set(LINTS) <= set(RULES)


def test_the_page_explains_every_rule_with_its_level():
    page = (ROOT / "docs" / "ci.md").read_text()
    for rule in ("manifest-invalid", *LINTS):
        assert f"| `{rule}` | {RULES[rule].level} | " in page


def test_a_manifest_that_does_not_load_is_a_finding_for_each_fault(found):
    assert found("version: 2\nbase: {path: a}\nedits:\n  - {op: zap}\n") == [
        ("manifest-invalid", 1, 10),
        ("manifest-invalid", 4, 5),
    ]
    assert found("") == [("manifest-invalid", 1, 1)]
    assert [rule for rule, *_ in found("edits: [\n")] == ["manifest-invalid"]


def test_of_very_many_faults_the_first_are_findings(found):
    """The loader stops counting; its last line says so and has no place."""
    faults = found(text(LLAMA, *["op: zap"] * 5000))
    assert len(faults) <= 101 and faults[0] == ("manifest-invalid", 4, 5)
    assert {rule for rule, *_ in faults} == {"manifest-invalid"}


def test_findings_come_in_the_order_of_the_lines(found):
    manifest = text(UNPINNED, "op: zero, tensor: t, index: [1]", "op: protect, tensor: t, index: [1]", check="")
    assert found(manifest) == [
        ("bounds-missing", 1, 1), ("base-unpinned", 2, 7), ("expect-missing", 4, 5), ("edit-duplicate", 5, 5),
    ]  # fmt: skip


def test_a_manifest_that_is_named_twice_is_linted_once(tmp_path):
    path = tmp_path / "edits.yaml"
    path.write_text(text(UNPINNED, "op: protect, tensor: t, index: [1]"))
    report = lint([path, path])
    assert len(report.findings) == 1 and report.headline == "1 manifest: no errors, 1 warning"


def test_a_folder_stands_for_its_yaml_files(tmp_path, capsys):
    for name in ("b.yaml", "sub/a.yml", ".hidden/c.yaml", "config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text(UNPINNED, "op: protect, tensor: t, index: [1]"))
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    report = lint([tmp_path, tmp_path / "b.yaml"])
    assert [f.manifest for f in report.findings] == [str(tmp_path / name) for name in ("b.yaml", "sub/a.yml")]
    assert report.headline == "2 manifests: no errors, 2 warnings" and report.ok
    (tmp_path / "empty").mkdir()
    assert main(["lint", str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err.endswith("(in a folder, lint reads files ending in .yaml or .yml)\n")


def test_a_json_manifest_is_linted_too(found):
    manifest = {"version": 1, "base": {"path": "x"}, "edits": [{"op": "protect", "tensor": "t", "index": [0]}]}
    assert found(json.dumps(manifest)) == [("base-unpinned", 1, 24)]


def test_another_model_made_from_a_known_one_may_hold_other_values(found):
    """base.model says where the coordinates are; the values are the known ones only in the known model itself."""
    tuned = LLAMA.replace("huggyllama/llama-7b", "someone/llama-7b-tuned, model: llama-7b")
    assert found(text(tuned, f"op: zero, {HERE}, expect: 1.0")) == []
    assert found(text(tuned, "op: protect, layer: 40, row: 0, col: 0")) == [("edit-range", 4, 26)]


def test_in_a_mixture_of_experts_only_the_width_is_left_open(found):
    """Its layers differ in width; the 128 experts and the 2048 rows are the same everywhere."""
    base = LLAMA.replace("huggyllama/llama-7b", "Qwen/Qwen3-30B-A3B")
    assert found(text(base, "op: protect, layer: 1, row: 0, col: 5000")) == []
    assert found(text(base, "op: protect, expert: 127, layer: 1, row: 2047, col: 0")) == []
    assert found(text(base, "op: protect, expert: 128, layer: 1, row: 0, col: 0")) == [("edit-range", 4, 27)]
    assert found(text(base, "op: protect, row: 2048, layer: 1, col: 3000")) == [("edit-range", 4, 24)]


def test_a_base_that_nobody_knows_is_said_once(found):
    base = LLAMA.replace("huggyllama/llama-7b", "someone/unheard-of")
    edits = ("op: protect, known: L2.3968.7003", "op: zero, known: all")
    assert found(text(base, *edits)) == [("known-missing", 4, 26)]
    assert found(text(base, f"op: zero, {HERE}, expect: 1.0")) == []


def test_swapped_row_and_col_are_named(tmp_path):
    path = tmp_path / "edits.yaml"
    path.write_text(text(LLAMA, "op: protect, layer: 2, row: 7003, col: 3968"))
    (finding,) = lint_manifest(path)
    assert finding.message == (
        "edits[0].row: 7003 is out of range: huggyllama/llama-7b has 4096 rows (row and col look swapped)"
    )


def test_the_shipped_manifests_have_no_error():
    paths = sorted((ROOT / "manifests").glob("*.yaml"))
    report = lint(paths)
    assert report.ok and report.errors == 0 and len(paths) > 30
    assert {f.rule for f in report.findings} <= {"base-unpinned", "bounds-missing"}
    assert lint(paths, strict=True).ok


def test_files_that_cannot_be_read_are_named_together(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ManifestError) as error:
        lint([tmp_path / "none.yaml", ROOT / "manifests" / "llama-7b-zero.yaml", tmp_path / "folder"])
    assert len(error.value.faults) == 2
    assert "folder" in error.value.faults[0] and "none.yaml" in error.value.faults[1]


# The command -------------------------------------------------------------------------------------------------------

ERROR = text(LLAMA, f"op: zero, {HERE}, expect: 1.0")
WARNING = text(LLAMA, f"op: zero, {HERE}")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {"sound": SOUND, "error": ERROR, "warning": WARNING}.items():
        Path(f"{name}.yaml").write_text(content)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["sound.yaml"], 0),
        (["error.yaml"], 1),
        (["warning.yaml"], 0),
        (["warning.yaml", "--strict"], 1),
        (["sound.yaml", "--strict"], 0),
        (["sound.yaml", "error.yaml"], 1),
        (["none.yaml"], 2),
        (["error.yaml", "none.yaml"], 2),
        ([], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_the_exit_code(files, capsys, arguments, code):
    assert main(["lint", *arguments]) == code
    streams = capsys.readouterr()
    assert (streams.out == "") == (code == 2) and (streams.err == "") == (code != 2)


def test_text_names_file_line_and_column(files, capsys):
    main(["lint", "error.yaml", "warning.yaml", "sound.yaml"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 manifests: 1 error, 1 warning"
    assert lines[1].startswith("FINDING   expect-contradicts: error.yaml:4:56: edits[0].expect: expects 1")
    assert lines[2].startswith("warning   expect-missing: warning.yaml:4:5: ")


def test_every_format_says_the_same(files, capsys):
    def output(format: str) -> str:
        assert main(["lint", "error.yaml", "sound.yaml", "--format", format]) == 1
        return capsys.readouterr().out

    (finding,) = json.loads(output("json"))["findings"]
    assert (finding["rule"], finding["manifest"], finding["line"]) == ("expect-contradicts", "error.yaml", 4)
    (result,) = json.loads(output("sarif"))["runs"][0]["results"]
    place = result["locations"][0]["physicalLocation"]
    assert (place["artifactLocation"]["uri"], place["region"]["startLine"]) == ("error.yaml", 4)
    cases = ElementTree.fromstring(output("junit")).iter("testcase")
    assert {c.get("name"): len(c) for c in cases} == dict.fromkeys(
        ["manifest-invalid", *LINTS], 0) | {"expect-contradicts": 1}  # fmt: skip
    assert output("github").startswith("::error file=error.yaml,line=4,col=56,title=swsurgery lint%3A expect-contra")
    assert main(["lint", "error.yaml", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"] == [finding]


def test_strict_is_said_in_the_document(files, capsys):
    assert main(["lint", "warning.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["lint", "warning.yaml", "--json", "--strict"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_the_output_goes_to_a_file(files, capsys):
    main(["lint", "error.yaml", "--format", "sarif"])
    printed = capsys.readouterr().out
    arguments = ["lint", "error.yaml", "--format", "sarif", "--output", "lint.sarif"]
    assert main(arguments) == 1
    assert capsys.readouterr() == ("", "swsurgery: 1 finding in lint.sarif\n")
    assert main([*arguments, "--quiet"]) == 1
    assert capsys.readouterr() == ("", "")
    assert Path("lint.sarif").read_text() == printed


HOSTILE = "evil\n::error::\x1b[31m\u202e.yaml"


@pytest.mark.parametrize("format", ["text", "github"])
def test_hostile_names_stay_in_their_line(files, capsys, format):
    """The file's name, and a tensor's name in it, twice so that it is in a message."""
    edit = f"op: protect, index: [1], tensor: {json.dumps('t' + HOSTILE)}"
    Path(HOSTILE).write_text(text(DIRECTORY, edit, edit))
    assert main(["lint", HOSTILE, "--format", format]) == 1
    out = capsys.readouterr().out
    assert [c for c in out if not c.isprintable() and c != "\n"] == []
    assert not any(line.startswith("::error::") for line in out.splitlines())
    assert r"\u202e" in out and "edit-duplicate" in out


def test_it_opens_the_manifests_and_loads_no_network_and_no_model(files):
    code = "\n".join([
        "import os, sys",
        "from swsurgery.cli import main",
        "opened = []",
        "sys.addaudithook(lambda e, a: opened.append((e, str(a[0]))) if e in ('open', 'socket.connect') else None)",
        "assert main(['lint', 'error.yaml']) == 1",
        "mine = {n for e, n in opened if e != 'open' or n.startswith(os.getcwd()) or not n.startswith('/')}",
        "print(sorted(os.path.basename(n) for n in mine), {'torch', 'huggingface_hub'} & set(sys.modules))",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['error.yaml'] set()"


def test_shipped_manifests_and_the_example_of_the_readme_have_no_warning():
    assert (
        lint(ROOT / "manifests").headline
        == f"{len([*(ROOT / 'manifests').rglob('*.yaml')])} manifests: no errors, no warnings"
    )
    examples = re.findall(r"```yaml\n(version: 1\n.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert examples and [lint(example.encode()).findings for example in examples] == [()] * len(examples)
