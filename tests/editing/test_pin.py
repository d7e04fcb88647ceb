"""pin fills in what identifies the base, and changes nothing else in the text of a manifest."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from checkpoints import FIRST, NORM, SECOND, down, place, sha256, stored, write_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import ManifestError, PlanError
from swsurgery.manifest.insertions import Insertion, add_fields

EDITED = f"""# what this is for
version: 1
base:
  path: base   # beside this file
edits:
  # the first
  - {{op: zero, layer: 1, row: 2, col: 3}}   # why
  - op: scale   # the second
    tensor: {down(0)}
    index: [1, 2]
    factor: 1.5   # half more
  - {{op: protect, tensor: {NORM}, index: [5], expect: EXPECTED}}
  - {{op: zero, layer: 1, row: 4}}
check: {{min_perplexity_ratio: 1.0}}
"""


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_llama(Path("base"))


def write(text: str, base: Path) -> Path:
    bits = "0x" + stored(base / SECOND, NORM, (5,))[::-1].hex()
    Path("edits.yaml").write_text(text.replace("EXPECTED", f"'{bits}'"))
    return Path("edits.yaml")


def test_the_text_keeps_its_comments_and_gets_the_pins(base, capsys):
    before = write(EDITED, base).read_text().splitlines()
    os.chmod("edits.yaml", 0o640)
    assert main(["pin", "edits.yaml"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["added     base.sha256", "added     edits[0].expect", "added     edits[1].expect",
                     f"wrote     {Path('edits.yaml').resolve()}"]  # fmt: skip
    after = Path("edits.yaml").read_text().splitlines()
    added = ["  sha256:", f'    {FIRST}: "{sha256(base / FIRST)}"', f'    {SECOND}: "{sha256(base / SECOND)}"']
    assert after[4:7] == added
    assert [line for line in after if line not in before and line not in added] == [after[9], after[14]]
    assert after[9].startswith("  - {op: zero, layer: 1, row: 2, col: 3, expect: ") and after[9].endswith("}   # why")
    assert after[14].startswith("    expect: ") and "# half more" in after[13]
    assert stat.S_IMODE(os.stat("edits.yaml").st_mode) == 0o640
    assert swsurgery.plan("edits.yaml").pins_checked == (FIRST, SECOND)
    assert swsurgery.lint("edits.yaml").findings == ()
    assert main(["pin", "edits.yaml"]) == 0 and capsys.readouterr().out == "nothing was missing\n"
    assert Path("edits.yaml").read_text().splitlines() == after


def test_an_existing_map_of_digests_is_completed(base):
    write(EDITED.replace("beside this file", "x\n  sha256:\n    " + f"{FIRST}: '{sha256(base / FIRST)}'"), base)
    assert swsurgery.pin("edits.yaml").added[0] == f"base.sha256.{SECOND}"
    assert swsurgery.load_manifest("edits.yaml").manifest.base.sha256 == {n: sha256(base / n) for n in (FIRST, SECOND)}


def test_json_stays_json(base):
    document = {"version": 1, "base": {"path": "base"}, "edits": [{"op": "zero", "layer": 1, "row": 2, "col": 3}]}
    for indent in (None, 2):
        Path("edits.json").write_text(json.dumps(document, indent=indent))
        swsurgery.pin("edits.json", output="pinned.json")
        pinned = json.loads(Path("pinned.json").read_text())
        assert pinned["base"] == {"path": "base", "sha256": {SECOND: sha256(base / SECOND)}}
        assert json.loads(Path("edits.json").read_text()) == document
        assert set(pinned["edits"][0]) == {*document["edits"][0], "expect"}


def test_a_value_that_is_no_finite_number_is_pinned_by_its_bits(base):
    data = bytearray((base / SECOND).read_bytes())
    at, size = place(base / SECOND, down(1), (2, 3))
    data[at : at + size] = b"\xc0\x7f"[:size]
    (base / SECOND).write_bytes(data)
    text = swsurgery.pin([{"op": "zero", "layer": 1, "row": 2, "col": 3}], "base").text
    assert json.loads(text)["edits"][0]["expect"] == "0x" + stored(base / SECOND, down(1), (2, 3))[::-1].hex()
    (Path("edits.json")).write_text(text)
    assert swsurgery.plan("edits.json").splices


def test_nothing_is_written_if_the_manifest_does_not_fit(base, capsys):
    before = write(EDITED.replace("row: 2, col: 3", "row: 2, col: 3, expect: 77.0"), base).read_text()
    with pytest.raises(PlanError, match="expected 77"):
        swsurgery.pin("edits.yaml")
    write(EDITED, base)
    assert main(["pin", "edits.yaml", "--dry-run"]) == 0
    assert "expect: " in capsys.readouterr().out and Path("edits.yaml").read_text() != before
    assert Path("edits.yaml").read_text().count("expect") == 1
    edit = {"op": "zero", "layer": 1, "row": 2, "col": 3}
    swsurgery.apply([edit], "base", "patched", check="off")
    swsurgery.export("patched", "edit.safetensors", format="sparse")
    with pytest.raises(ManifestError, match="is a patch"):
        swsurgery.pin("edit.safetensors", "base")


NAMES = st.text("abcdefghij", min_size=1, max_size=4)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from(["", "  # a comment", "   "])), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n"]),
)
def test_any_layout_of_edits_keeps_all_other_lines(edits, newline):
    lines = ["version: 1", "edits:"]
    for number, (flow, end) in enumerate(edits):
        lines += (
            [f"  - {{op: zero, layer: {number}}}{end}"] if flow else [f"  - op: zero{end}", f"    layer: {number}{end}"]
        )
    text = newline.join(lines) + newline
    values = [Insertion(("edits", number), "expect", float(number)) for number in range(len(edits))]
    import yaml

    made = add_fields(text, values)
    wanted = [{"op": "zero", "layer": n, "expect": float(n)} for n in range(len(edits))]
    assert yaml.safe_load(made)["edits"] == wanted
    assert made.count("# a comment") == text.count("# a comment")
