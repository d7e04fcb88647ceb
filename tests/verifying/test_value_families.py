"""--values on a fresh model of every family: nothing that its initialisation makes is taken for a fault."""

from __future__ import annotations

import pytest
import tiny_models

import swsurgery


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_a_fresh_model_has_no_finding(tmp_path, name):
    tiny_models.write(name, tmp_path)
    result = swsurgery.verify(tmp_path, values=True)
    assert result.findings == () and result.values.tensors
