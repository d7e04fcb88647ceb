"""A checkpoint that no model can be made of: apply says so in one line, or checks the weights alone."""

from __future__ import annotations

import pytest
from checkpoints import CONFIG, down, write_llama, write_manifest

from swsurgery.errors import ModelError
from swsurgery.surgery import CheckOptions, apply_manifest

EDIT = {"op": "zero", "tensor": down(1), "index": [1, 2]}


@pytest.fixture
def base(tmp_path):
    # transformers refuses a hidden size that the heads do not divide, with an exception of its own kind
    return write_llama(tmp_path / "base", config=CONFIG | {"num_attention_heads": 32, "num_key_value_heads": 32})


def test_a_forward_check_that_was_asked_for_is_refused(base, tmp_path):
    manifest = write_manifest(tmp_path / "m.json", base, EDIT)
    with pytest.raises(ModelError, match="--check weights") as refused:
        apply_manifest(manifest, tmp_path / "out", check=CheckOptions("forward"))
    assert len(refused.value.faults) == 1 and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_so_are_bounds_that_cannot_be_measured(base, tmp_path):
    manifest = write_manifest(tmp_path / "m.json", base, EDIT, check={"max_perplexity_ratio": 2})
    with pytest.raises(ModelError):
        apply_manifest(manifest, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_bounds_the_weights_are_checked_and_the_reason_recorded(base, tmp_path):
    said = []
    manifest = write_manifest(tmp_path / "m.json", base, EDIT)
    outcome = apply_manifest(manifest, tmp_path / "out", say=said.append)
    check = outcome.registry.check
    assert check["kind"] == "weights" and "--check weights" in check["reason"]
    assert check["weights"]["changed_scalars"] == 1
    assert [line for line in said if line.startswith("no forward check was made: ")]
