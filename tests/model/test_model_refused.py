"""A checkpoint that no model can be made of: apply says so in one line, or checks the weights alone."""

from __future__ import annotations

import pytest
from checkpoints import CONFIG, down, write_llama, write_manifest
from listening import Listener

import swsurgery
from swsurgery import model
from swsurgery.editing.check_options import CheckOptions
from swsurgery.errors import CheckFailed, ModelError, PlanError
from swsurgery.model.bounds import CheckedBounds

EDIT = {"op": "zero", "tensor": down(1), "index": [1, 2]}


@pytest.fixture
def base(tmp_path):
    # transformers refuses a hidden size that the heads do not divide, with an exception of its own kind
    return write_llama(tmp_path / "base", config=CONFIG | {"num_attention_heads": 32, "num_key_value_heads": 32})


def test_a_forward_check_that_was_asked_for_is_refused(base, tmp_path):
    manifest = write_manifest(tmp_path / "m.json", base, EDIT)
    with pytest.raises(ModelError, match="--check weights") as refused:
        swsurgery.apply(manifest, output=tmp_path / "out", check=CheckOptions("forward"))
    assert len(refused.value.faults) == 1 and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_so_are_bounds_that_cannot_be_measured(base, tmp_path):
    manifest = write_manifest(tmp_path / "m.json", base, EDIT, check={"max_perplexity_ratio": 2})
    with pytest.raises(ModelError):
        swsurgery.apply(manifest, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_bounds_the_weights_are_checked_and_the_reason_recorded(base, tmp_path):
    said = []
    manifest = write_manifest(tmp_path / "m.json", base, EDIT)
    outcome = swsurgery.apply(manifest, output=tmp_path / "out", reporter=Listener(said.append))
    check = outcome.record.check
    assert check["kind"] == "weights" and "config.json" in check["reason"]
    assert "--check" not in check["reason"] + "".join(said)  # it is what was done
    assert check["weights"]["changed_scalars"] == 1
    assert [line for line in said if line.startswith("only the weights were checked: ")]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "options", [CheckOptions(device="cpu"), CheckOptions(text="some words of mine"), CheckOptions(prompts=["Why"])]
)
def test_what_was_asked_for_is_done_or_refused(base, tmp_path, monkeypatch, options, missing):
    if missing:
        monkeypatch.setattr(model, "explain_unavailable", lambda: "torch is not installed")
        monkeypatch.setattr("swsurgery.model.explain_unavailable", lambda: "torch is not installed")
    manifest = write_manifest(tmp_path / "m.json", base, EDIT)
    with pytest.raises(ModelError, match="or --check weights") as refused:
        swsurgery.apply(manifest, output=tmp_path / "out", check=options)
    assert ("torch is not installed" in str(refused.value)) == missing
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [None, CheckedBounds(min_perplexity_ratio=2.0)])
def test_without_torch_bounds_are_not_met(base, tmp_path, monkeypatch, option):
    monkeypatch.setattr("swsurgery.model.explain_unavailable", lambda: "torch is not installed")
    more = {} if option else {"check": {"min_perplexity_ratio": 2.0}}
    manifest = write_manifest(tmp_path / "m.json", base, EDIT, **more)
    with pytest.raises(ModelError, match="torch is not installed") as refused:
        swsurgery.apply(manifest, output=tmp_path / "out", check=CheckOptions(bounds=option))
    assert ("or --check weights" in str(refused.value)) == (option is None)  # it would refuse the option's bound
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["off", "weights"])
def test_a_bound_goes_with_a_check_that_measures_it(base, tmp_path, kind):
    manifest = write_manifest(tmp_path / "m.json", base, EDIT)
    with pytest.raises(PlanError, match=f"--check {kind} does not measure perplexity"):
        swsurgery.apply(manifest, output=tmp_path / "out", check=CheckOptions(kind, bounds=CheckedBounds(2.0)))
    assert not (tmp_path / "out").exists()


def test_one_bound_of_the_options_leaves_the_other_of_the_manifest(base, tmp_path, monkeypatch):
    held = []

    def record(*args, bounds, **rest):
        held.append(bounds)
        raise ModelError("seen", "")

    monkeypatch.setattr("swsurgery.model.check.run_checks", record)
    manifest = write_manifest(tmp_path / "m.json", base, EDIT, check={"min_perplexity_ratio": 2.0})
    for option in (None, CheckedBounds(max_perplexity_ratio=9.0), CheckedBounds(min_perplexity_ratio=3.0)):
        with pytest.raises(ModelError, match="seen"):
            swsurgery.apply(manifest, output=tmp_path / "out", check=CheckOptions(bounds=option))
    assert held == [CheckedBounds(None, 2.0), CheckedBounds(9.0, 2.0), CheckedBounds(None, 3.0)]


def test_bounds_that_no_ratio_holds_are_refused_before_anything_is_copied(base, tmp_path):
    impossible = {"min_perplexity_ratio": 2.0, "max_perplexity_ratio": 1.0}
    with pytest.raises(PlanError, match="no perplexity ratio is at least 2 and at most 1"):
        swsurgery.apply(write_manifest(tmp_path / "m.json", base, EDIT, check=impossible), output=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m.json"]


def test_what_changes_nothing_does_no_damage(base, tmp_path):
    manifest = write_manifest(tmp_path / "m.json", base, EDIT | {"op": "protect"}, check={"min_perplexity_ratio": 2.0})
    with pytest.raises(CheckFailed, match="nothing was changed, so the perplexity ratio is 1"):
        swsurgery.apply(manifest, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_reason_does_not_say_where_the_checkpoint_was_made(base, tmp_path):
    manifest = write_manifest(tmp_path / "m.json", base, EDIT)
    records = [swsurgery.apply(manifest, output=tmp_path / name).record.render() for name in ("one", "two")]
    assert records[0] == records[1] and str(tmp_path).encode() not in records[0]
