"""The figure of a published checkpoint's card: when it is in the repository, and that no proof needs it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from publishing import NEW, how, patch, put_base, run, tree
from reports import REPORT

from swsurgery.checkpoint.opening import held
from swsurgery.checkpoint.record import Patched, read_record
from swsurgery.cli import main
from swsurgery.storage.names import FIGURE_NAME

SIDE = dataclasses.replace(REPORT.base, largest_by_layer=(1.0, -900.0))
FORWARD = {"kind": "forward", "reason": None, **dataclasses.replace(REPORT, base=SIDE, patched=SIDE).to_record()}


def set_check(folder: Path, check: dict) -> None:
    """Write another report of the check into the record of a patched checkpoint."""
    with held(folder) as entered:
        patched = read_record(entered)
    record = patched.record.model_copy(update={"check": check})
    for name, data in Patched(record, record.render(), patched.manifest_raw).render_own_files().items():
        (folder / name).write_bytes(data)


@pytest.fixture
def patched(hub, tmp_path: Path) -> Path:
    return patch(hub, tmp_path, put_base(hub, tmp_path / "base"))


def test_the_figure_is_published_with_its_card_and_verify_does_not_miss_it_in_the_record(hub, patched, capsys):
    set_check(patched, FORWARD)
    code, document, _ = run(capsys, patched, hub.name(NEW), "--yes")
    assert code == 0 and how(document)[FIGURE_NAME] == "upload"
    card = hub.head(NEW, "refs/heads/main").tree["README.md"].content.decode()
    assert f"]({FIGURE_NAME})" in card
    assert main(["verify", f"hf://{hub.name(NEW)}"]) == 0
    assert main(["publish", str(patched), hub.name(NEW), "--yes"]) == 0


def test_a_later_publication_without_a_forward_check_removes_the_figure(hub, patched, capsys):
    set_check(patched, FORWARD)
    assert run(capsys, patched, hub.name(NEW), "--yes")[0] == 0
    set_check(patched, {"kind": "weights", "reason": "torch is not installed", "weights": {}})
    accept = ["--accept", "check-missing"]
    code, document, _ = run(capsys, patched, hub.name(NEW), "--yes", *accept)
    assert code == 0 and how(document)[FIGURE_NAME] == "delete"
    assert FIGURE_NAME not in tree(hub)


def test_the_figure_of_a_base_is_not_published_as_that_of_the_edit(hub, tmp_path, capsys):
    folder = tmp_path / "base"
    commit = put_base(hub, folder)
    (folder / FIGURE_NAME).write_text("<svg/>")
    commit = hub.add_repo("org/base", folder)
    patched = patch(hub, tmp_path, commit)
    assert main(["verify", str(patched)]) == 0
    (patched / FIGURE_NAME).write_text("<svg>other</svg>")
    assert main(["verify", str(patched)]) == 1, "a figure that the record lists must have its digest"
    (patched / FIGURE_NAME).write_text("<svg/>")
    capsys.readouterr()
    code, document, _ = run(capsys, patched, hub.name(NEW), "--yes", "--accept", "check-missing")
    assert code == 0 and FIGURE_NAME not in how(document)
    assert {"name": FIGURE_NAME, "why": "shows the edit of the base"} in document["plan"]["left_out"]


def test_a_patch_has_the_figure_too(hub, patched, capsys):
    set_check(patched, FORWARD)
    code, _, _ = run(capsys, patched, hub.name(NEW), "--patch", "--yes")
    assert code == 0 and FIGURE_NAME in tree(hub)
