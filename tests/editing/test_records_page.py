"""docs/records.md: the reader of the undo file works, and the page names every field of the documents."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import HEAD, down, write_llama, write_manifest

import swsurgery
from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import ChangeRecord, EditRecord, RegionRecord

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs" / "records.md").read_text()
READER = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
UNDO = "swsurgery-undo.safetensors"
EDITS = [
    {"op": "zero", "layer": 0, "row": 2},
    {"op": "scale", "layer": 1, "col": 3, "factor": 2},
    {"op": "clip", "tensors": down(2), "z": 1.0},
    {"op": "prune_outliers", "tensor": HEAD, "slice": "2:9, 1:4", "count": 5},
    {"op": "round", "tensors": "model.embed_*", "bits": 3},
    {"op": "set", "tensors": "model.norm.weight", "value": 1},
    {"op": "protect", "layer": 0, "row": 3},
]


def read(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("model-*.safetensors"))
    return {name: value for shard in shards for name, value in load_file(shard).items()}


@pytest.fixture
def applied(tmp_path) -> swsurgery.Applied:
    base = write_llama(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.json", base, *EDITS)
    return swsurgery.apply(manifest, output=tmp_path / "patched", check="off")


def test_the_reader_of_the_page_puts_the_old_values_back(applied, tmp_path):
    names: dict = {}
    exec(compile(READER, "docs/records.md", "exec"), names)
    base, state = read(tmp_path / "base"), read(tmp_path / "patched")
    changed = {change.tensor for change in applied.record.changes}
    assert {name for name in base if not torch.equal(base[name], state[name])} == changed
    names["put_back"](state, tmp_path / "patched")
    assert all(torch.equal(base[name], state[name]) for name in base)
    assert len(READER[READER.index("def ") :].splitlines()) <= 10


def test_the_page_names_every_field_of_a_record():
    words = set(re.findall(r"`([\w.\[\]]+)`", PAGE))
    for model in (Record, EditRecord, ChangeRecord, RegionRecord):
        assert {name for name in model.model_fields if name != "bit"} <= words, model
    assert "edits[].bit" in words


def test_the_page_names_every_field_of_the_documents_of_apply(applied, tmp_path):
    words = set(re.findall(r"`([\w.\[\]]+)`", PAGE))
    planned = swsurgery.plan(tmp_path / "m.json").to_json()
    assert {*planned, *applied.to_json(), "pins"} <= words
    known = {key for key in applied.record.to_json()["changes"][0] if key in planned["rewrites"][0]}
    assert set(planned["rewrites"][0]) == known | {"bytes"}
    assert {key for file in applied.to_json()["files"].values() for key in file} <= words


def test_the_example_of_a_limit_is_read():
    from swsurgery.editing.apply import UNDO_LIMIT
    from swsurgery.storage.numbers import parse_size

    assert parse_size("256MB") == UNDO_LIMIT
    [limits] = re.findall(r"with a unit such\nas (.*?)\.\s`undo`", PAGE, re.S)
    assert [parse_size(size) for size in re.split(", | or ", limits)] == [4096, 512 * 10**6, 1_500_000_000, 2 << 30]


def test_the_bytes_of_the_undo_file_depend_on_the_inputs_alone(applied, tmp_path):
    again = swsurgery.apply(tmp_path / "m.json", output=tmp_path / "again", check="off")
    assert (tmp_path / "again" / UNDO).read_bytes() == (tmp_path / "patched" / UNDO).read_bytes()
    assert json.dumps(again.record.to_json()) == json.dumps(applied.record.to_json())
