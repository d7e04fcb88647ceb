"""Manifests with odd contents, as JSON and as YAML: a manifest, or faults with their places; never a traceback."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from fuzz.documents import spell_yaml, tree
from fuzz.readers import MANIFEST, ManifestJson, ManifestYaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swsurgery.errors import ManifestError
from swsurgery.manifest.load import MAX_MANIFEST, load_manifest, parse_manifest
from swsurgery.manifest.yaml_reader import MAX_FAULTS

SHORT = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
HEAD = "version: 1\nbase: {path: base}\nedits:\n"


def refusal(text: str) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text.encode(), Path("m.yaml"))
    return list(caught.value.faults)


@pytest.mark.parametrize("reader", [ManifestJson, ManifestYaml], ids=["json", "yaml"])
def test_five_hundred_odd_manifests_are_read_or_refused(reader, tmp_path):
    target, random = reader(tmp_path), Random(0)
    found = Counter(target.verdict(target.make(random)) for _ in range(500))
    assert set(found) == {"accepted", "refused"}
    assert found["accepted"] > 30 and found["refused"] > 200


@pytest.mark.parametrize("reader", [ManifestJson, ManifestYaml], ids=["json", "yaml"])
def test_hypothesis_finds_nothing_either(reader, tmp_path_factory):
    target = reader(tmp_path_factory.mktemp("manifest"))

    @SHORT
    @given(st.randoms(use_true_random=False))
    def run(random):
        assert target.verdict(target.make(random)) in ("accepted", "refused")

    run()


@SHORT
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_refused_with_their_place(raw):
    with pytest.raises(ManifestError) as caught:
        parse_manifest(raw, Path("m.yaml"))
    assert all(fault.startswith("m.yaml:") and "\n" not in fault for fault in caught.value.faults)


def test_the_sound_one_reads_alike_as_json_and_as_yaml():
    text = spell_yaml(Random(1), tree(MANIFEST), odd=0)
    assert text.count("\n") > 5
    manifests = [parse_manifest(t.encode(), Path("m")).manifest for t in (text, json.dumps(MANIFEST))]
    assert manifests[0] == manifests[1]
    assert manifests[0].model_dump(mode="json", exclude_unset=True) == MANIFEST


@pytest.mark.parametrize("name", ["\U0001f600", "a\\\U00010000", "\\ud83d\\ude00", "é\u4e2d"])
def test_the_escapes_of_json_are_the_characters_they_stand_for(name):
    manifest = {"version": 1, "base": {"path": "b"}, "edits": [{"op": "zero", "tensor": name, "index": [0]}]}
    for ascii_only in (True, False):
        text = json.dumps(manifest, ensure_ascii=ascii_only)
        assert parse_manifest(text.encode(), Path("m.json")).manifest.edits[0].tensor == name


@pytest.mark.parametrize("name", ["é\u2028", "\x85", "\u2029x"])
def test_line_ends_of_other_alphabets_are_taken_only_as_escapes(name):
    manifest = {"version": 1, "base": {"path": "b"}, "edits": [{"op": "zero", "tensor": name, "index": [0]}]}
    assert parse_manifest(json.dumps(manifest).encode(), Path("m.json")).manifest.edits[0].tensor == name
    (fault,) = refusal(json.dumps(manifest, ensure_ascii=False))
    assert "is not allowed (write it as an escape, in double quotes)" in fault


def test_no_more_faults_are_listed_than_one_can_read():
    faults = refusal(HEAD + "  - {op: zero, known: all, x: 1}\n" * 300)
    assert len(faults) == MAX_FAULTS + 1
    assert faults[0].startswith("m.yaml:4:") and faults[-1] == "m.yaml: and more of these"
    assert len(refusal(HEAD + "  - {op: zero, known: all, x: 1}\n" * MAX_FAULTS)) == MAX_FAULTS
    anchors = refusal("a: [" + "&a 1, " * 300 + "1]")
    assert len(anchors) == MAX_FAULTS + 1 and anchors[-1] == "m.yaml: and more of these"


def test_a_fault_quotes_no_more_than_a_line_holds():
    for text in (
        f"version: &{'a' * 5000} 1",
        f"version: !{'a' * 5000} 1",
        f"? {'a' * 5000}\n: 1\n? {'a' * 5000}\n: 2\n",
    ):
        assert all(len(fault) < 400 for fault in refusal(text))


def test_a_key_has_no_anchor_and_no_tag():
    assert any("the key has an anchor or a tag" in fault for fault in refusal("&a version: 1\n"))
    assert any("the key has an anchor or a tag" in fault for fault in refusal("!!str version: 1\n"))


def test_a_manifest_may_be_a_link_but_no_device_no_pipe_and_no_folder(tmp_path):
    sound, link = tmp_path / "m.yaml", tmp_path / "link.yaml"
    sound.write_text(json.dumps(MANIFEST))
    link.symlink_to(sound)
    assert load_manifest(link).manifest == load_manifest(sound).manifest
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "zero", "loop", ".", "missing"):
        with pytest.raises(ManifestError, match="cannot read the manifest"):
            load_manifest(tmp_path / name)


def test_a_manifest_of_the_limit_is_read_and_one_byte_more_is_not(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_bytes(json.dumps(MANIFEST).encode().ljust(MAX_MANIFEST))
    assert load_manifest(path).manifest.name == "fuzz"
    path.write_bytes(json.dumps(MANIFEST).encode().ljust(MAX_MANIFEST + 1))
    with pytest.raises(ManifestError, match="larger than"):
        load_manifest(path)
