"""Index, config, record and journal with odd contents: a value or a known error, never a traceback."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from random import Random
from typing import Any

import pytest
from fuzz.readers import READERS, Config, Index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swsurgery.checkpoint import weight_files
from swsurgery.errors import CheckpointError
from swsurgery.storage.strict_json import read_small

SHORT = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FILES = [reader for reader in READERS if not reader.name.startswith("manifest")]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, "swsurgery.checkpoint.journal")  # it says each time that it undid an edit


@pytest.mark.parametrize("reader", FILES, ids=[reader.name for reader in FILES])
def test_three_hundred_odd_files_are_read_or_refused(reader, tmp_path):
    target, random = reader(tmp_path), Random(0)
    found = Counter(target.verdict(target.make(random)) for _ in range(300))
    assert set(found) == {"accepted", "refused"}
    assert found["accepted"] > 20 and found["refused"] > 100


@pytest.mark.parametrize("reader", FILES, ids=[reader.name for reader in FILES])
def test_the_sound_file_is_accepted(reader, tmp_path):
    target = reader(tmp_path)
    content = target.spell(Random(0), target.template).encode()
    if reader.name == "journal":
        content += b"\n"
        content += hashlib.sha256(content).hexdigest().encode() + b"\n"
    assert target.verdict(content) == "accepted"


@pytest.mark.parametrize("reader", [Index, Config])
def test_hypothesis_finds_nothing_either(reader, tmp_path_factory):
    target = reader(tmp_path_factory.mktemp("files"))

    @SHORT
    @given(st.randoms(use_true_random=False))
    def run(random):
        assert target.verdict(target.make(random)) in ("accepted", "refused")

    run()


def test_it_sees_an_index_that_is_read_as_another(tmp_path, monkeypatch):
    """The twin: a reader that takes the first of two equal keys, as other readers do."""
    monkeypatch.setattr(weight_files, "read_json", lambda path, name: _first(read_small(path, name)))
    target, random = Index(tmp_path), Random(0)
    found = Counter(target.verdict(target.make(random)) for _ in range(300))
    assert found["different"] > 0


def _first(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw, object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(error).replace("\n", " ")) from None
    if type(value) is not dict:
        raise CheckpointError("no object")
    return value
