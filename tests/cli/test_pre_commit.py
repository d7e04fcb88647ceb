"""The hooks: what pre-commit will read, and each entry run as pre-commit runs it, on sound and on bad files."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from patched import FIRST, MANIFEST, apply_text, flip, write_base

from swsurgery.cli import changed

ROOT = Path(__file__).parents[2]
HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
SOUND = """version: 1
base: {path: base}
edits:
  - {op: protect, tensor: t, index: [0]}
"""
OF_ONE = FIRST, "config.json", "swsurgery.json"


def test_both_hooks_say_what_pre_commit_needs():
    assert set(HOOKS) == {"swsurgery-lint", "swsurgery-verify"}
    for hook in HOOKS.values():
        assert {"id", "name", "description", "entry", "language"} <= set(hook)
        assert hook["language"] == "python"
        assert hook.get("pass_filenames", True), "the hooks work on the files that a commit changes"
        assert hook["require_serial"] is True


def test_the_hooks_install_without_torch():
    """pre-commit installs the project with its dependencies and no extra, unless the user adds some."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in project["dependencies"]}
    assert "typer" in names
    assert not names & {"torch", "transformers", "safetensors", "matplotlib"}
    assert all("additional_dependencies" not in hook for hook in HOOKS.values())


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("manifests/a.yaml", True),
        ("models/manifests/deep/a.yml", True),
        ("manifests/a.json", True),
        ("edits.swsurgery.yaml", True),
        ("deep/edits.swsurgery.json", True),
        ("patched/manifest.yaml", False),
        ("docker-compose.yaml", False),
        ("kubernetes-manifests/a.yaml", False),
        ("manifests/a.toml", False),
        ("manifests/a.yaml.orig", False),
    ],
)
def test_the_lint_takes_manifests_and_nothing_else(path, wanted):
    """pre-commit searches the pattern in the path with its slashes."""
    hook = HOOKS["swsurgery-lint"]
    assert (re.search(hook["files"], path) is not None) is wanted
    assert set(hook["types_or"]) == {"yaml", "json"}


@pytest.fixture
def run(tmp_path):
    """Run a hook's entry as pre-commit does: split as a shell would, with the arguments and the names behind it, in
    the root of the repository, with the hook's environment first on PATH. Interpreters of a virtual environment have
    their commands beside them."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(hook: str, *files: str) -> subprocess.CompletedProcess:
        words = [*shlex.split(HOOKS[hook]["entry"]), *HOOKS[hook].get("args", []), *files]
        return subprocess.run(
            words, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
        )

    return run


def test_lint_passes_sound_manifests_and_fails_on_one_bad(run, tmp_path):
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "sound.yaml").write_text(SOUND)
    (tmp_path / "manifests" / "bad one.yaml").write_text(SOUND.replace("protect", "proctect"))
    assert run("swsurgery-lint", "manifests/sound.yaml").returncode == 0
    done = run("swsurgery-lint", "manifests/sound.yaml", "manifests/bad one.yaml")
    assert done.returncode == 1
    assert "manifests/bad one.yaml:4:5: " in done.stdout and done.stderr == ""


@pytest.fixture
def repository(tmp_path) -> Path:
    """Two patched checkpoints in folders, their base outside of them, and a file that is no part of either."""
    write_base(tmp_path / "base")
    for name in ("one", "two"):
        apply_text(tmp_path, MANIFEST, name)
    (tmp_path / "README.md").write_text("models\n")
    return tmp_path


def test_verify_proves_the_checkpoint_of_each_changed_file_once(run, repository):
    done = run("swsurgery-verify", *(f"one/{name}" for name in OF_ONE), "two/swsurgery.json", "README.md")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("put back") == 2


@pytest.mark.parametrize("changed", ["two/tokenizer.json", "two/swsurgery.json", f"two/{FIRST}"])
def test_verify_fails_on_the_one_that_was_tampered_with_whichever_of_its_files_changed(run, repository, changed):
    flip(repository / "two" / "tokenizer.json", -1)
    done = run("swsurgery-verify", "one/config.json", changed)
    assert done.returncode == 1
    assert "digest: tokenizer.json" in done.stdout and "Traceback" not in done.stderr


def test_verify_leaves_other_folders_alone(run, repository):
    flip(repository / "base" / FIRST, -1)
    done = run("swsurgery-verify", f"base/{FIRST}", "README.md", "one.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_verify_sees_files_below_the_checkpoint(run, repository):
    (repository / "two" / "assets").mkdir()
    (repository / "two" / "assets" / "late.txt").write_text("added by hand")
    done = run("swsurgery-verify", "two/assets/late.txt")
    assert done.returncode == 1 and "assets/late.txt" in done.stdout


def test_a_checkpoint_at_the_root_of_the_repository_is_seen(run, repository):
    for file in (repository / "one").iterdir():
        shutil.move(file, repository / file.name)
    for name in ("base", "one", "two"):
        shutil.rmtree(repository / name)
    for name in ("one.yaml", "two.yaml", "README.md"):
        (repository / name).unlink()
    assert run("swsurgery-verify", "config.json").returncode == 0
    flip(repository / FIRST, -1)
    assert run("swsurgery-verify", "config.json").returncode == 1


def test_a_damaged_record_is_not_passed_over(run, repository):
    (repository / "one" / "swsurgery.json").write_text("{")
    done = run("swsurgery-verify", "one/swsurgery.json", "two/swsurgery.json")
    assert done.returncode == 2
    assert done.stderr.startswith("swsurgery: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(("codes", "gravest", "asked"), [([0, 1], 1, 2), ([2, 1], 2, 2), ([130, 0], 130, 1)])
def test_the_gravest_answer_counts_and_an_interrupt_ends_it(repository, monkeypatch, codes, gravest, asked):
    monkeypatch.chdir(repository)
    answers = iter(codes)
    monkeypatch.setattr(changed, "main", lambda arguments: next(answers))
    assert changed.verify_changed(["one/config.json", "two/config.json"]) == gravest
    assert len(list(answers)) == 2 - asked


def test_code_in_the_repository_is_not_run(run, repository):
    """The hook's Python must not import what lies in the folder it is run in."""
    for module in ("typer", "swsurgery", "yaml", "json"):
        (repository / f"{module}.py").write_text("raise SystemExit('taken over')")
    done = run("swsurgery-verify", "one/config.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert "put back" in done.stdout
