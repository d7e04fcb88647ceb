"""A value of a wrong type is never silently taken for a default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import SECOND, sha256, tree, write_llama, write_manifest

import swsurgery
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.record import read_record
from swsurgery.editing import apply as apply_module
from swsurgery.editing.check_options import CheckOptions
from swsurgery.editing.revert import revert
from swsurgery.model.bounds import CheckedBounds
from swsurgery.storage.folder import Folder

ZERO = {"op": "zero", "layer": 1, "row": 2, "col": 3}
NO_CHECKS = [False, True, 0, 1, "", "of", "none", b"off", ["off"], {"kind": "off"}, CheckedBounds(2.0)]


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


@pytest.fixture
def manifest(base, tmp_path) -> Path:
    return write_manifest(tmp_path / "m.json", {"path": str(base), "sha256": {SECOND: sha256(base / SECOND)}}, ZERO)


@pytest.mark.parametrize("check", NO_CHECKS, ids=repr)
def test_an_argument_that_is_no_check_is_a_type_error_and_nothing_is_written(base, manifest, tmp_path, check):
    said = "check must be a CheckOptions, None, or one of 'auto', 'off', 'weights', 'forward', not "
    before = tree(base)
    with pytest.raises(TypeError, match=said):
        swsurgery.apply(manifest, output=tmp_path / "out", check=check)
    with pytest.raises(TypeError, match=said):
        swsurgery.apply(manifest, in_place=True, check=check)
    assert tree(base) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("check", ["off", CheckOptions("off")])
def test_a_check_turned_off_is_off(manifest, tmp_path, check):
    swsurgery.apply(manifest, output=tmp_path / "out", check=check)
    assert read_record(Folder.at(tmp_path / "out")).record.check["kind"] == "off"
    swsurgery.apply(manifest, in_place=True, check=check)
    assert read_record(Folder.at(tmp_path / "base")).record.check["kind"] == "off"


def test_weights_by_its_name_checks_the_weights(manifest, tmp_path):
    swsurgery.apply(manifest, output=tmp_path / "out", check="weights")
    found = read_record(Folder.at(tmp_path / "out")).record.check
    assert (found["kind"], found["reason"]) == ("weights", "a forward check was not requested")


@pytest.mark.parametrize(("check", "kind"), [(None, "auto"), ("auto", "auto"), ("forward", "forward")])
def test_the_other_names_are_kinds_too(manifest, tmp_path, monkeypatch, check, kind):
    kinds = []
    monkeypatch.setattr(apply_module, "run_check", lambda plan, stage, check, *rest: kinds.append(check.kind) or {})
    swsurgery.apply(manifest, output=tmp_path / "out", check=check)
    assert kinds == [kind]


@pytest.mark.parametrize("check", ["off", "weights", CheckOptions("off"), CheckOptions("weights")])
def test_a_checkpoint_that_is_there_is_always_run(base, check):
    with pytest.raises(TypeError, match="unexpected keyword argument 'check'"):
        swsurgery.check(base, check=check)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "of"}, {"kind": None}, {"kind": False}, {"device": None}, {"device": 0}, {"placement": "disk"},
        {"placement": None}, {"text": Path("text.txt")}, {"text": b"text"}, {"prompts": "one prompt"},
        {"prompts": [1]}, {"bounds": {"max_perplexity_ratio": 2.0}}, {"bounds": 2.0}, {"bounds": (2.0, None)},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_a_wrong_type_are_a_type_error(fields):
    (name,) = fields
    with pytest.raises(TypeError, match=f"^{name} must be "):
        CheckOptions(**fields)


def test_every_sound_option_is_taken():
    CheckOptions("forward", "cpu", "streamed", "text", ("prompt",), CheckedBounds(2.0))
    CheckOptions(prompts=["a", "b"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("link", "hardlink"), ("link", None), ("link", True), ("reuse_digests", "no"), ("for_publish", "no")],
)
def test_other_arguments_of_apply(manifest, tmp_path, name, value):
    with pytest.raises(TypeError, match=f"^{name} must be .*, not {value!r}"):
        swsurgery.apply(manifest, output=tmp_path / "out", check="off", **{name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", ["hard", "reflink", None])
def test_other_arguments_of_revert(manifest, tmp_path, link):
    swsurgery.apply(manifest, output=tmp_path / "out", check="off")
    with pytest.raises(TypeError, match="^link must be one of 'auto', 'clone', 'copy', not "):
        revert(tmp_path / "out", tmp_path / "back", link=link)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("weights", ["both", "Index", True, 1])
def test_which_weights_are_meant(base, weights: Any):
    with pytest.raises(TypeError, match="^weights must be None or one of 'index', 'single', not "):
        open_checkpoint(base, weights)


def test_other_arguments_of_verify(manifest, tmp_path):
    swsurgery.apply(manifest, output=tmp_path / "out", check="off")
    with pytest.raises(TypeError, match="^finite must be a bool, not 'no'"):
        swsurgery.verify(tmp_path / "out", finite="no")
