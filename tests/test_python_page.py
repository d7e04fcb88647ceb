"""docs/python.md has an example of each public function, and the examples run."""

from __future__ import annotations

import re
from pathlib import Path

import planted
import tiny_checkpoint
from keys import write_keys

import swsurgery
from swsurgery.cli import COMMANDS

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n.*?```python\n(.*?)```", PAGE, re.M | re.S))
TYPES = {"CheckOptions", "Reporter", "Silent", "SwsurgeryError", "__version__"}
PLACE = planted.Place(layer=1, row=5, col=7)


def test_every_public_name_is_on_the_page():
    assert set(SECTIONS) == set(swsurgery.__all__) - TYPES
    assert {f"`{name}`" for name in ("Manifest", "LoadedManifest")} <= set(re.findall(r"`\w+`", PAGE))


def test_the_library_has_the_verbs_of_the_command_line():
    commands = set(COMMANDS)
    assert commands - {"schema"} <= set(SECTIONS), "the schema is a file in docs/"


def test_the_examples_run(tmp_path, monkeypatch, hub):
    model = planted.build("llama", vocab_size=tiny_checkpoint.VOCABULARY, max_position_embeddings=64)
    tokenizer = tiny_checkpoint.make_tokenizer()
    planted.plant(model, PLACE, [tokenizer("The river was high")["input_ids"]])
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    commit, name = hub.add_repo("org/base", tmp_path / "base"), hub.name("org/base")
    edit = "{op: zero, layer: 1, row: 5, col: 7}"
    base = f'{{repo_id: {name}, revision: "{commit}"}}'
    (tmp_path / "edits.yaml").write_text(f"version: 1\nbase: {base}\nedits:\n  - {edit}\n")
    write_keys(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for section, example in SECTIONS.items():
        exec(compile(example, f"docs/python.md, {section}", "exec"), names)
