"""The GitHub Action: each step's script run with bash as the runner runs it, and what comes out where.

Only the installation is stood in for, because it needs a network: the stand-in says what pip was asked for.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from patched import DOWN, FIRST, HIDDEN, MANIFEST, WIDE, apply_text, bfloat16, flip, place, tensors, write_base
from whole_models import list_shapes, write_model

from swsurgery.cli.action import MAX_SUMMARY_ROWS, render_summary, run
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.formats import FindingReport

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = ACTION["runs"]["steps"]
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


@dataclass(frozen=True)
class Job:
    """What a job that used the action leaves behind. `code` is the exit code of the step that failed, or 0."""

    code: int
    stdout: str
    stderr: str
    summary: str
    outputs: dict[str, str]
    installed: str

    @property
    def annotations(self) -> list[str]:
        return [line for line in self.stdout.splitlines() if line.startswith("::")]


INTERPRETER = """#!/bin/sh
echo "$*" >> {log}
test "$1 $2 $3" = "-I -m venv" || exit 3
mkdir -p "$4/bin"
cat > "$4/bin/python" <<'END'
#!/bin/sh
if test "$1 $2 $3" = "-I -m pip"; then echo "$*" >> {log}; exit 0; fi
exec {python} "$@"
END
chmod +x "$4/bin/python"
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def use(tmp_path, workspace) -> Callable[..., Job]:
    """Use the action with these inputs, an underscore for each dash, in the workspace."""
    commands, runner = tmp_path / "commands", tmp_path / "runner"
    for folder in (commands, runner):
        folder.mkdir()
    log = tmp_path / "installed"
    log.touch()
    (commands / "python3").write_text(INTERPRETER.format(log=log, python=sys.executable))
    (commands / "python3").chmod(0o755)

    def use(**given: str) -> Job:
        inputs = {name: spec.get("default", "") for name, spec in ACTION["inputs"].items()}
        given = {name.replace("_", "-"): value for name, value in given.items()}
        assert set(given) <= set(inputs)
        values = {f"inputs.{name}": value for name, value in (inputs | given).items()}
        stdout = stderr = ""
        files = {name: tmp_path / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.write_text("")
        for number, step in enumerate(STEPS):
            script = tmp_path / f"{number}.sh"
            script.write_text(EXPRESSION.sub(lambda match: values[match[1]], step["run"]))
            environment = {
                "PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(tmp_path), "RUNNER_TEMP": str(runner),
                "GITHUB_ACTION_PATH": str(ROOT), "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"],
                "XDG_DATA_HOME": os.environ["XDG_DATA_HOME"], **{name: str(path) for name, path in files.items()},
                **{k: EXPRESSION.sub(lambda match: values[match[1]], v) for k, v in step.get("env", {}).items()},
            }  # fmt: skip
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
                cwd=workspace, env=environment, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            stdout, stderr = stdout + done.stdout, stderr + done.stderr
            if done.returncode:
                break
        outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
        return Job(done.returncode, stdout, stderr, files["GITHUB_STEP_SUMMARY"].read_text(), outputs, log.read_text())

    return use


@pytest.fixture
def patched(workspace) -> Path:
    write_base(workspace / "base")
    return apply_text(workspace, MANIFEST, "patched")


# What the file says ------------------------------------------------------------------------------------------------


def test_no_script_and_no_name_holds_an_expression():
    """What a caller gives would become shell."""
    for step in STEPS:
        assert "${{" not in step["run"] and "${{" not in step["name"]
        assert step["shell"] == "bash"


def test_nothing_of_anybody_else_is_run():
    assert ACTION["runs"]["using"] == "composite"
    assert [step for step in STEPS if "uses" in step] == []
    assert not re.search(r"curl|wget|https?://", "".join(step["run"] for step in STEPS))


def test_every_input_is_described_used_and_optional():
    used = {match for step in STEPS for v in step["env"].values() for match in EXPRESSION.findall(v)}
    assert used == {f"inputs.{name}" for name in ACTION["inputs"]}
    for spec in ACTION["inputs"].values():
        assert spec["description"] and isinstance(spec["default"], str) and not spec.get("required")


def test_the_page_explains_every_input_and_output():
    page = (ROOT / "docs" / "ci.md").read_text()
    for name in (*ACTION["inputs"], *ACTION["outputs"]):
        assert f"| `{name}` | " in page


def test_every_output_is_one_that_the_step_sets(use, patched):
    wanted = {EXPRESSION.fullmatch(spec["value"])[1] for spec in ACTION["outputs"].values()}
    assert wanted == {f"steps.check.outputs.{name}" for name in use(checkpoint="patched").outputs}
    assert [step["id"] for step in STEPS if "id" in step] == ["check"]


# What it does ------------------------------------------------------------------------------------------------------


def test_it_installs_itself_with_pinned_dependencies_and_without_torch(use, patched):
    venv, pip = use(checkpoint="patched").installed.splitlines()
    assert venv.startswith("-I -m venv ")
    assert pip.endswith(f"--constraint {ROOT}/constraints.txt {ROOT}")
    assert use(checkpoint="patched", extras="sign").installed.splitlines()[-1].endswith(f"{ROOT}[sign]")


def test_a_sound_checkpoint_passes(use, patched):
    job = use(checkpoint="patched")
    assert (job.code, job.stderr) == (0, "")
    assert {k: v for k, v in job.outputs.items() if k != "sarif"} == {"ok": "true", "findings": "0"}
    assert "<code>patched</code>: yes**" in job.summary and "verified" in job.summary
    assert [line.split(" ")[0] for line in job.annotations] == ["::notice"]
    runs = json.loads(Path(job.outputs["sarif"]).read_text())["runs"]
    assert [run["results"] for run in runs] == [[]]


def test_a_tampered_one_fails_is_annotated_and_named(use, patched):
    at = place(patched / FIRST, DOWN, (2, 2))
    flip(patched / FIRST, at)
    job = use(checkpoint="patched", base="base")
    assert job.code == 1 and "Traceback" not in job.stderr
    assert (job.outputs["ok"], job.outputs["findings"]) == ("false", "1")
    files = {re.match(r"::error file=([^,]*),", line)[1] for line in job.annotations}
    assert files == {f"patched/{FIRST}"}
    assert "| error | undeclared-change |" in job.summary and "no, " in job.summary
    assert f"[{2}, {2}]" in re.sub(r"&#(\d+);", lambda m: chr(int(m[1])), job.summary)
    results = json.loads(Path(job.outputs["sarif"]).read_text())["runs"][0]["results"]
    assert len(results) == int(job.outputs["findings"])


def test_findings_need_not_fail_the_job(use, patched):
    flip(patched / "tokenizer.json", -1)
    job = use(checkpoint="patched", fail_on_findings="false")
    assert (job.code, job.outputs["ok"]) == (0, "false")
    assert "| error | digest |" in job.summary


def test_each_question_of_verify_has_its_input(use, patched, workspace):
    (workspace / "other.yaml").write_text(MANIFEST.replace("factor: 2.0", "factor: 4.0"))
    assert use(checkpoint="patched", manifest="patched.yaml").code == 0
    job = use(checkpoint="patched", manifest="other.yaml")
    assert job.code == 1 and "| error | manifest-mismatch |" in job.summary
    assert use(checkpoint="base", finite="true").code == 0
    write_model(workspace / "whole")
    assert use(checkpoint="whole", complete="true").code == 0
    arrays = tensors()
    arrays[DOWN][0, 0] = 0x7FC0  # NaN
    write_base(workspace / "broken", arrays)
    job = use(checkpoint="broken", finite="true")
    assert job.code == 1 and "| error | non-finite |" in job.summary
    shapes = {name: shape for name, shape in list_shapes().items() if "layers.2." not in name}
    job = use(checkpoint=str(write_model(workspace / "part", shapes).relative_to(workspace)), complete="true")
    assert job.code == 1 and "| error | layer-missing |" in job.summary
    arrays[DOWN][:] = 0
    write_base(workspace / "empty", arrays)
    assert use(checkpoint="empty", finite="true").code == 0
    job = use(checkpoint="empty", values="true")
    assert job.code == 1 and "| error | constant-weights |" in job.summary


def test_manifests_are_linted_by_pattern_in_the_same_run(use, patched, workspace):
    (workspace / "manifests").mkdir()
    (workspace / "manifests" / "b.yaml").write_text(MANIFEST)
    (workspace / "manifests" / "a [1].yaml").write_text(MANIFEST.replace("zero", "zap"))
    job = use(checkpoint="patched", lint="manifests/a [1].yaml\n\nmanifests/b*.yaml\n")
    assert job.code == 1
    assert any(line.startswith("::error file=manifests/a [1].yaml,line=4,") for line in job.annotations)
    assert "lint <code>2 manifests</code>: no, 1 finding**" in job.summary
    assert "verify <code>patched</code>: yes**" in job.summary, "the checkpoint is verified all the same"
    runs = json.loads(Path(job.outputs["sarif"]).read_text())["runs"]
    assert [run["automationDetails"]["id"] for run in runs] == ["swsurgery/lint/", "swsurgery/verify/"]
    assert use(lint="manifests/b.yaml").code == 0
    assert use(lint="manifests/b.yaml", strict="true").code == 1


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({}, "nothing to do"),
        ({"LINT": " \n"}, "nothing to do"),
        ({"LINT": "manifests/*.yaml"}, "no manifest matches"),
        ({"FINITE": "true"}, "but not the input `checkpoint`"),
        ({"MANIFEST": "patched.yaml"}, "but not the input `checkpoint`"),
        ({"CHECKPOINT": "patched", "SIGNATURE": "patched/model.sig"}, "key"),
        ({"CHECKPOINT": "patched", "FINITE": "yes"}, "the input `finite` must be true or false"),
        ({"CHECKPOINT": "patched", "WEIGHTS": "both"}, "the input `weights` must be index or single"),
        ({"WEIGHTS": "index"}, "but not the input `checkpoint`"),
        ({"CHECKPOINT": "patched", "SUMMARY": "no"}, "the input `summary` must be true or false"),
        ({"CHECKPOINT": "patched", "FAIL_ON_FINDINGS": "never"}, "the input `fail-on-findings` must be true or false"),
        ({"CHECKPOINT": "none"}, "none"),
        ({"CHECKPOINT": "base"}, "no record"),
        ({"CHECKPOINT": "patched", "MANIFEST": "none.yaml"}, "cannot read the manifest"),
        ({"CHECKPOINT": "patched", "KNOWN": "true", "MODEL": "no-such-model"}, "no-such-model"),
        ({"CHECKPOINT": "none", "FAIL_ON_FINDINGS": "false"}, "none"),
        ({"CHECKPOINT": "--help"}, "--help"),
        (
            {"CHECKPOINT": "hf://org/x@main"},
            "a local copy is needed: hf://org/x@main (download it: hf download org/x --",
        ),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_exit_2_and_never_green(patched, tmp_path, capsys, inputs, word):
    results = tmp_path / "results"
    results.mkdir()
    assert run(inputs, results) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("::error title=swsurgery::") and word in line
    assert "ok=false" in (results / "outputs").read_text().splitlines()
    assert "could not be checked" in (results / "summary.md").read_text()


def test_a_failure_reaches_the_job(use, patched):
    job = use(checkpoint="none")
    assert (job.code, job.stderr, job.outputs["ok"]) == (2, "", "false")
    assert "could not be checked" in job.summary and job.annotations[0].startswith("::error title=swsurgery::")
    job = use(checkpoint="patched", extras="sign] evil")
    assert (job.code, job.outputs) == (2, {}) and "only letters and commas" in job.annotations[0]


def test_no_summary_where_none_is_wanted(use, patched):
    job = use(checkpoint="patched", summary="false")
    assert (job.code, job.summary, job.outputs["ok"]) == (0, "", "true")


# Who attacks it ----------------------------------------------------------------------------------------------------

EVIL = "evil\n::error::owned\r\n::set-output name=ok::true\x1b[31m<img src=x>|`@someone` [a](https://b)\u202e"


def test_hostile_names_are_neither_commands_nor_markdown(use, workspace):
    arrays = {EVIL: bfloat16((HIDDEN, WIDE), 1), **tensors()}
    write_base(workspace / "base", arrays)
    edit = f"  - {{op: zero, tensor: {json.dumps(EVIL)}, index: [1, 2]}}\n"
    checkpoint = apply_text(workspace, "version: 1\nbase: {path: base}\nedits:\n" + edit, EVIL.replace("/", "."))
    flip(checkpoint / FIRST, place(checkpoint / FIRST, EVIL, (1, 2)))
    job = use(checkpoint=checkpoint.name, base="base")
    assert job.code == 1
    for text in (job.stdout, job.stderr, job.summary):
        assert [c for c in text if not c.isprintable() and c != "\n"] == []
        assert not any(line.startswith(("::error::", "::set-output")) for line in text.splitlines())
    assert job.outputs["ok"] == "false"
    assert "owned" in job.summary and not set("@`[]") & set(job.summary)
    assert set(re.findall(r"<[^>]*>", job.summary)) == {"<code>", "</code>"}
    rows = [line for line in job.summary.splitlines() if line.startswith("|")]
    assert len(rows) > 2 and {line.count("|") for line in rows} == {5}


ATTACK = """x"; touch pwned; "';touch pwned;'$(touch pwned)`touch pwned`
touch pwned
"""


CHECKED = sorted(set(ACTION["inputs"]) - {"python", "extras"})


@pytest.mark.parametrize("names", [["python"], ["extras"], ["checkpoint"], ["lint"], CHECKED], ids=len)
def test_an_input_is_never_shell(use, patched, workspace, names):
    job = use(**{"checkpoint": "patched"} | {name.replace("-", "_"): ATTACK for name in names})
    assert list(workspace.rglob("pwned")) == []
    assert job.code in (2, 127) and job.outputs.get("ok") != "true"


def test_code_in_the_repository_is_not_run(use, patched, workspace):
    for module in ("typer", "swsurgery", "json", "venv", "pip"):
        (workspace / f"{module}.py").write_text("raise SystemExit('taken over')")
    job = use(checkpoint="patched")
    assert (job.code, job.stderr) == (0, "")


def test_a_summary_stays_below_the_limit_of_the_job_page():
    """One MiB, whatever the names and however many findings."""
    findings = tuple(Finding("digest", "\x1b" * 100_000, "*" * 100_000) for _ in range(1000))
    text = render_summary([FindingReport("patched", "verify", findings)] * 2, ["|" * 100_000] * 1000)
    assert len(text.encode()) < 1 << 20
    assert f"and {1000 - MAX_SUMMARY_ROWS} more" in text
