"""The model card of edits of regions: one row for each edit, and what proves and undoes it."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

from checkpoints import HEAD, down, write_llama, write_manifest
from test_card import hostile, split, table, tokens

import swsurgery
from swsurgery.checkpoint.record import Record
from swsurgery.hub import cards
from swsurgery.sharing import card, card_fields
from swsurgery.sharing.commit_text import describe_edits

EDITS = (
    {"op": "zero", "layer": 1, "row": 2},
    {"op": "round", "tensors": "model.layers.[02].mlp.*", "bits": 4, "per": "channel", "clip": {"z": 3.0}},
    {"op": "scale", "tensor": HEAD, "index": [0, 1], "factor": 2.0},
    {"op": "protect", "layer": 0, "col": 3},
)
UNDO = "swsurgery-undo.safetensors"


def apply(folder: Path, *edits: dict, **options) -> Record:
    base = write_llama(folder / "base")
    manifest = write_manifest(folder / "m.json", base, *edits)
    return swsurgery.apply(manifest, output=folder / "out", check="off", **options).record


def render(record: Record, **more: object) -> tuple[dict, str]:
    body = card.render_body(record, "org/edited", b"version: 1\n", **more)
    return split(cards.render(card_fields.make_fields(record, {}), body).decode())


def test_each_edit_of_regions_is_one_row(tmp_path):
    record = apply(tmp_path, *EDITS)
    _, body = render(record)
    changed = sum(change.changed for change in record.changes[1:])
    assert f"with {1 + 10 + changed} scalars changed" in body
    assert table(body, "What was changed")[1][:2] == [HEAD, "[0, 1]"]
    options = 'bits 4, clip {"z": 3.0}, per channel'
    assert table(body, "What was changed")[2:] == [
        ["operation", "target", "options", "changed scalars", "of", "tensors"],
        ["zero", "L1 row 2", "-", "10", "10", down(1)],
        ["round", "model.layers.[02].mlp.*", options, str(changed), "120", f"{down(0)} and 1 more"],
    ]  # fmt: skip
    assert table(body, "Protected regions: the same bits as in the base")[1] == ["L0 column 3", "6", down(0)]
    assert f"which are in `swsurgery.json` and `{UNDO}`, put back" in body
    assert "swsurgery revert DIRECTORY" in body
    lines = describe_edits(record, ()).splitlines()
    assert "zero L1 row 2: 10 of 10 scalars changed in 1 tensor" in lines


def test_a_record_of_scalars_has_the_same_card_as_before(tmp_path):
    _, body = render(apply(tmp_path, EDITS[2]))
    assert "with 1 scalar changed" in body and "with the old values of the table above put back" in body
    assert "Protected regions" not in body and "| operation | target |" not in body


def test_without_an_undo_file_the_card_names_the_base(tmp_path):
    record = apply(tmp_path, EDITS[0], undo_limit=0)
    _, body = render(record)
    assert "swsurgery verify DIRECTORY --base BASE" in body
    assert "swsurgery revert" not in body and "The old values are not stored." in body


def test_many_edits_are_left_to_the_record(tmp_path):
    changes = [
        {"op": "zero", "tensor": HEAD, "slice": f"{row}, {col}:{col + 1}"} for row in range(12) for col in range(6)
    ]
    record = apply(tmp_path, *changes)
    many = record.model_copy(
        update={"changes": [c.model_copy(update={"edit": n}) for n in range(300) for c in record.changes[:1]]}
    )
    _, body = render(many)
    assert "and 100 more, all in" in body
    assert len(describe_edits(many, ()).splitlines()) == 22


def test_a_thousand_hostile_words_stay_text(tmp_path):
    record, chance, words = apply(tmp_path, *EDITS), random.Random(2411), []

    def word() -> str:
        words.append(hostile(chance))
        return words[-1]

    while len(words) < 1000:
        changes = [
            c.model_copy(
                update={"target": word(), "tensor": word(), "options": {word(): word(), "clip": {"z": word()}}}
            )
            for c in record.changes
        ]
        regions = [p.model_copy(update={"target": word(), "tensor": word()}) for p in record.protected_regions]
        made = record.model_copy(update={"changes": changes, "protected_regions": regions})
        _, body = render(made)
        found = tokens(body)
        kinds = {t.type for t in found}
        assert not kinds & {"html_block", "html_inline", "link_open", "image", "s_open"}, words[-20:]
        assert [t.tag for t in found].count("h2") == 2 * 6, words[-20:]
        controls = {c for c in body if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"}
        assert not controls, words[-20:]
        assert [len(row) for row in table(body, "What was changed")] == [10, 10, 6, 6, 6, 6], words[-20:]
        described = describe_edits(made, ())
        assert all(line.isprintable() for line in described.splitlines())
        assert len(described.splitlines()) == len(described.split("\n"))
