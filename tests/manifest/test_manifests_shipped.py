"""Every file in manifests/ is what `lookup --manifest` prints, and a manifest that apply takes."""

import json
import re
import shlex
from pathlib import Path

import pytest

from swsurgery.cli import main
from swsurgery.errors import LookupFailed, ManifestError
from swsurgery.known import own, shipped, table
from swsurgery.manifest.load import load_manifest, parse_manifest
from swsurgery.manifest.writer import refuse_unfit

FOLDER = Path(__file__).parents[2] / "manifests"
FILES = sorted(FOLDER.glob("*.yaml"))


def rendered(command: str) -> str:
    """What the command in a manifest's second line stands for."""
    program, verb, name, *options = shlex.split(command)
    assert (program, verb) == ("swsurgery", "lookup")
    pairs = list(zip(options[::2], options[1::2], strict=True))
    given = dict(pairs)
    assert set(given) <= {"--manifest", "--status", "--factor"}
    factor = float(given["--factor"]) if "--factor" in given else None
    status = [value for option, value in pairs if option == "--status"] or None
    return table.render_manifest(own.find_model(name), given["--manifest"], factor, status)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_manifest_is_what_its_command_prints(path):
    text = path.read_text("utf-8")
    assert text == rendered(text.splitlines()[1].lstrip("# "))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_manifest_loads_and_matches_the_known_super_weights(path):
    manifest = load_manifest(path).manifest
    assert manifest.name == path.stem
    model = own.find_model(manifest.base.repo_id)
    facts = {(c.layer, c.expert, c.row, c.col): c for c in model.coordinates}
    for edit in manifest.edits:
        fact = facts[edit.layer, edit.expert, edit.row, edit.col]
        if fact.value is None:
            assert edit.expect is None
        else:
            assert (edit.expect.value, edit.expect.dtype) == (fact.value, fact.dtype)


def test_the_useful_ones_are_there():
    names = {path.stem for path in FILES}
    assert {"llama-7b-protect", "llama-7b-zero", "mistral-7b-protect", "mistral-7b-zero", "olmo-1b-protect"} <= names
    assert {"phi-3-mini-4k-instruct-zero", "llama-3.1-8b-zero", "llama-2-7b-zero"} <= names


@pytest.mark.parametrize("model", [*filter(shipped.list_addressable, own.list_all_models())], ids=lambda m: m.slug)
def test_every_addressable_model_has_a_protect_manifest_that_loads(model):
    manifest = parse_manifest(table.render_manifest(model, "protect").encode(), Path("m.yaml")).manifest
    assert {e.op for e in manifest.edits} == {"protect"}
    assert [(e.layer, e.row, e.col) for e in manifest.edits] == [
        (c.layer, c.row, c.col) for c in shipped.list_addressable(model)
    ]
    assert manifest.check.min_perplexity_ratio is None
    assert manifest.base.revision == model.pinned_revision


def test_scale_manifest():
    text = table.render_manifest(own.find_model("qwen3-30b-a3b"), "scale", 1.5)
    manifest = parse_manifest(text.encode(), Path("m.yaml")).manifest
    assert [(e.op, e.factor, e.expert) for e in manifest.edits] == [("scale", 1.5, x) for x in (68, 92, 82)]
    assert "--manifest scale --factor 1.5" in text
    assert manifest.check.min_perplexity_ratio is None


@pytest.mark.parametrize(
    ("name", "status", "asks"),
    [
        ("llama-7b", None, True),  # 5.67 -> 1211 alone
        ("mistral-7b", None, True),  # x1425 alone, a ratio without before and after
        ("llama-13b", None, True),  # only as a pair: x130
        ("llama-2-7b", "paper", False),  # one of a pair: x1.55
        ("llama-2-7b", None, True),  # the pair
        ("qwen3-8b", None, False),  # x1.12 even together
        ("llama-3-8b", None, False),  # a collapse known second-hand only
        ("llama-3.2-1b", None, False),  # no figure
    ],
)
def test_a_zero_manifest_asks_for_damage_only_where_it_was_published(name, status, asks):
    text = table.render_manifest(own.find_model(name), "zero", status=status)
    manifest = parse_manifest(text.encode(), Path("m.yaml")).manifest
    assert manifest.check.min_perplexity_ratio == (2.0 if asks else None)
    assert manifest.check.max_perplexity_ratio is None


def test_zero_and_scale_leave_out_what_nobody_has_shown_to_matter():
    llama = own.find_model("llama-2-7b")
    assert len(re.findall("op: protect", table.render_manifest(llama, "protect"))) == 6
    assert len(re.findall("op: zero", table.render_manifest(llama, "zero"))) == 2
    assert len(re.findall("op: zero", table.render_manifest(llama, "zero", status="insufficient"))) == 4


@pytest.mark.parametrize("model", [*filter(shipped.list_addressable, own.list_all_models())], ids=lambda m: m.slug)
def test_a_restore_manifest_names_every_scalar_with_an_exact_value(model):
    """The others stand in a comment. The derived checkpoint is given with --base, so nothing is pinned."""
    listed = shipped.list_addressable(model)
    exact = [c.id for c in listed if c.value is not None]
    if not exact:
        with pytest.raises(LookupFailed, match="no whole coordinate to restore: .* \\(no exact value is known\\)"):
            table.render_manifest(model, "restore")
        return
    text = table.render_manifest(model, "restore")
    manifest = parse_manifest(text.encode(), Path("m.yaml")).manifest
    assert [(e.op, e.known, e.source) for e in manifest.edits] == [("restore", name, None) for name in exact]
    assert (manifest.base.path, manifest.base.model, manifest.base.revision) == ("checkpoint", model.hf_id, None)
    assert own.identify(manifest.base.model, ()).hf_id == model.hf_id
    assert manifest.check.min_perplexity_ratio is None
    others = [c.id for c in listed if c.value is None]
    assert [line for line in text.splitlines() if line.startswith("# Not restored")] == (
        [f"# Not restored, because no exact value is known: {', '.join(others)}"] if others else []
    )


def test_both_kinds_of_model_occur_and_a_scan_restores_nothing():
    models = [*filter(shipped.list_addressable, own.list_all_models())]
    exact = [any(c.value is not None for c in shipped.list_addressable(m)) for m in models]
    assert any(exact) and not all(exact)
    with pytest.raises(ManifestError, match="no such operation for known super weights: restore .*zero, scale or prot"):
        refuse_unfit("restore", None)
    with pytest.raises(ManifestError, match="restore takes no factor"):
        table.render_manifest(own.find_model("llama-7b"), "restore", 2.0)


def test_the_command_prints_a_restore_manifest_as_text_and_as_json(capsys):
    assert main(["lookup", "llama-7b", "--manifest", "restore"]) == 0
    text = capsys.readouterr().out
    assert text == table.render_manifest(own.find_model("llama-7b"), "restore")
    assert main(["lookup", "llama-7b", "--manifest", "restore", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == parse_manifest(text.encode(), Path("m.yaml")).to_json()
    assert main(["lookup", "llama-7b", "--manifest", "restore", "--factor", "2"]) == 2
    assert capsys.readouterr().err == "swsurgery: restore takes no factor\n"
