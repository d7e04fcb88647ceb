"""Which known model a checkpoint is: named, named by its files, or identified from its sizes and stored values."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from checkpoints import CONFIG, EMBED, HIDDEN, INNER, LAYERS, VOCABULARY, down, tensor, write_single

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.sizes import ModelSizes, read_sizes
from swsurgery.cli import main
from swsurgery.errors import CheckpointError, LookupFailed
from swsurgery.known import KnownCoordinate, KnownModel, own
from swsurgery.known.schema import Citation, Independent
from swsurgery.storage.coordinate import Coordinate
from swsurgery.verifying.against_known import Kept
from swsurgery.verifying.identification import (
    CLOSE,
    RESIZED,
    TELLING,
    choose,
    collect_evidence,
    has_sizes,
    identify_checkpoint,
)

SOURCE = Citation(key="s", kind="notes", cite="a test")


def fact(name: str, value: float | None, **fields) -> KnownCoordinate:
    layer, row, col = (int(part) for part in name[1:].split("."))
    common = dict(
        id=name, layer=layer, row=row, col=col, expert=None, tensor=down(layer), value=value,
        dtype=None if value is None else "F32", status="paper", causal_alone="strong", located_by=("a test",),
        independent=Independent(location=1, value=1), sources=(SOURCE,),
    )  # fmt: skip
    return KnownCoordinate(**(common | fields))


def model(hf_id: str, *facts: KnownCoordinate, **fields) -> KnownModel:
    common = dict(
        aliases=(hf_id,), hf_id=hf_id, family="tiny", hidden_size=HIDDEN, intermediate_size=INNER, num_layers=LAYERS,
        vocab_size=VOCABULARY, sizes_from="a test", tensor="model.layers.{layer}.mlp.down_proj.weight",
        coordinates=facts,
    )  # fmt: skip
    return KnownModel(**(common | fields))


# Evidence: pure, without a checkpoint --------------------------------------------------------------------------------


def kept(name: str, known: float | None, stored: float | None, state: str, held: bool = True) -> Kept:
    ratio = None if known is None or stored is None else stored / known
    return Kept(name, "paper", "strong", state, held, known=known, stored=stored, ratio=ratio)


def judge(hf_id: str, *states: Kept):
    return collect_evidence(model(hf_id), states)


def names(*evidence) -> list[str]:
    return [each.model.hf_id for each in choose(evidence)]


@pytest.mark.parametrize(
    ("state", "group"),
    [
        (kept("a", -2.0, -2.0, "kept"), "kept"),
        (kept("a", -2.0, -1.6, "changed"), "close"),
        (kept("a", -2.0, -2.5, "changed"), "close"),
        (kept("a", -2.0, -2.6, "changed"), "other"),
        (kept("a", -2.0, -0.01, "lost"), "other"),
        (kept("a", -2.0, 2.0, "lost"), "other"),
        (kept("a", -2.0, -190.0, "suspicious"), "other"),
        (kept("a", -0.3, 0.1, "kept"), "other"),  # one step of a coarse quantiser away, which proves nothing
        (kept("a", 0.09, 0.09, "kept"), None),
        (kept("a", -2.0, -2.0, "declared"), None),
        (kept("a", None, 1.0, "present"), None),
        (kept("a", -2.0, None, "unreadable"), None),
    ],
)  # fmt: skip
def test_a_state_is_evidence_for_or_against_or_none(state, group):
    evidence = judge("m", state)
    assert {name for name in ("kept", "close", "other") if getattr(evidence, name)} == ({group} if group else set())
    assert evidence.compared == ({"a"} if group else set())
    assert evidence.viable == (group in ("kept", "close"))
    assert (TELLING, CLOSE) == (0.1, 0.25)


def test_without_a_fitting_value_no_model_is_chosen():
    assert names() == []
    assert names(judge("m", kept("a", -2.0, 0.01, "lost")), judge("n", kept("b", None, 0.01, "present"))) == []


def test_close_values_identify_only_if_they_are_half_of_the_values():
    close, lost = (lambda n: kept(n, 1.0, 0.9, "changed")), (lambda n: kept(n, 1.0, 0.01, "lost"))
    assert names(judge("m", close("a"), lost("b"))) == ["m"]
    assert names(judge("m", close("a"), lost("b"), lost("c"))) == []
    assert names(judge("m", kept("a", 1.0, 1.0, "kept"), lost("b"), lost("c"))) == ["m"]


def test_the_model_with_the_kept_value_is_chosen():
    base, chat = judge("base", kept("a", 1.5, 1.5, "kept")), judge("chat", kept("a", 1.6, 1.5, "changed"))
    assert names(base, chat) == names(chat, base) == ["base"]


def test_a_value_that_contradicts_one_model_and_fits_another_decides():
    one = judge("one", kept("a", 1.5, 1.45, "changed"), kept("b", -0.9, 0.9, "lost"))
    other = judge("other", kept("a", 1.5, 1.45, "changed"), kept("b", 1.0, 0.9, "changed"))
    assert names(one, other) == ["other"]


def test_the_closest_value_decides_if_it_is_clearly_closer():
    assert names(judge("m", kept("a", 1.0, 1.01, "changed")), judge("n", kept("a", 1.1, 1.01, "changed"))) == ["m"]
    assert names(judge("m", kept("a", 1.0, 1.05, "changed")), judge("n", kept("a", 1.1, 1.05, "changed"))) == ["m", "n"]


def test_coordinates_that_only_one_model_has_speak_for_it_or_against_it():
    shared = kept("a", 1.0, 1.0, "kept")
    fits, lost = kept("b", 2.0, 2.0, "kept"), kept("c", 2.0, 0.0, "lost")
    assert names(judge("few", shared), judge("many", shared, fits)) == ["many"]
    assert names(judge("few", shared), judge("many", shared, lost)) == ["few"]
    assert names(judge("few", shared), judge("many", shared, fits, lost)) == ["few", "many"]


def test_models_that_each_beat_the_next_are_all_named():
    """`a` is better than `b` at x, `b` than `c` at y, `c` than `a` at z."""
    exact, near = (lambda n: kept(n, 1.0, 1.0, "kept")), (lambda n: kept(n, 1.1, 1.0, "changed"))
    circle = (judge("a", exact("x"), near("z")), judge("b", near("x"), exact("y")), judge("c", near("y"), exact("z")))
    assert names(*circle) == ["a", "b", "c"]


# Sizes ---------------------------------------------------------------------------------------------------------------


def write(root: Path, values: dict[str, float] | None = None, config=None, vocabulary: int = VOCABULARY) -> Path:
    """Three layers of small random F32 weights, with `values` at coordinates such as L0.4.7."""
    tensors = {EMBED: tensor("F32", vocabulary, HIDDEN, seed=9)}
    for layer in range(LAYERS):
        data = bytearray(struct.pack("<60f", *(0.001 * (number % 7 - 3) for number in range(HIDDEN * INNER))))
        for name, value in (values or {}).items():
            at, row, col = (int(part) for part in name[1:].split("."))
            if at == layer:
                struct.pack_into("<f", data, 4 * (row * INNER + col), value)
        tensors[down(layer)] = ("F32", (HIDDEN, INNER), bytes(data))
    return write_single(root, tensors, config)


def sizes_of(root: Path) -> ModelSizes:
    return read_sizes(open_checkpoint(root))


def test_sizes_come_from_the_config_and_else_from_the_shapes(tmp_path):
    root = write(tmp_path)
    assert sizes_of(root) == ModelSizes(LAYERS, HIDDEN, (INNER,), VOCABULARY)
    (root / "config.json").write_text('{"model_type": "llama"}')
    assert sizes_of(root) == ModelSizes(LAYERS, HIDDEN, (INNER,), VOCABULARY)
    (root / "config.json").write_text(json.dumps(CONFIG | {"text_config": {"hidden_size": 77, "vocab_size": 9}}))
    assert sizes_of(root) == ModelSizes(LAYERS, 77, (INNER,), 9)
    (root / "config.json").write_text(json.dumps(CONFIG | {"moe_intermediate_size": 4, "intermediate_size": [10, 12]}))
    assert sizes_of(root).intermediate == (4, 10, 12)
    assert str(sizes_of(root)) == "3 layers, hidden 6, intermediate 4 or 10 or 12, vocabulary 12"


@pytest.mark.parametrize("value", [True, -1, 0, "6", 1.5, None, [[6]], {}])
def test_a_size_that_is_no_positive_integer_is_not_stated(tmp_path, value):
    stated = dict.fromkeys(("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"), value)
    assert sizes_of(write(tmp_path, config=stated)) == ModelSizes(LAYERS, HIDDEN, (INNER,), VOCABULARY)


def test_sizes_that_nothing_shows_are_unknown(tmp_path):
    root = write_single(tmp_path, {"other": tensor("F32", 2, 2)})
    (root / "config.json").write_text("{}")
    assert sizes_of(root) == ModelSizes(None, None, ())
    assert str(sizes_of(root)) == "no known sizes"


@pytest.mark.parametrize(
    ("sizes", "whole", "named"),
    [
        (ModelSizes(3, 6, (10,), 12), True, True),
        (ModelSizes(3, 6, (4, 10), None), True, True),
        (ModelSizes(3, 6, (10,), 12 + RESIZED), True, True),
        (ModelSizes(3, 6, (10,), 13 + RESIZED), False, True),
        (ModelSizes(2, 6, (10,), 12), False, False),
        (ModelSizes(3, 5, (10,), 12), False, False),
        (ModelSizes(3, 6, (4,), 12), False, False),
        (ModelSizes(None, 6, (10,), 12), False, True),
        (ModelSizes(3, None, (10,), 12), False, True),
        (ModelSizes(3, 6, (), 12), False, True),
    ],
)
def test_sizes_that_select_a_candidate_and_that_permit_a_name(sizes, whole, named):
    assert has_sizes(model("m"), sizes) == whole
    assert has_sizes(model("m"), sizes, whole=False) == named
    assert has_sizes(model("m", vocab_size=None), ModelSizes(3, 6, (10,), 99999))


# Checkpoints ---------------------------------------------------------------------------------------------------------

LLAMA = model("org/llama", fact("L0.4.7", -2.0), fact("L1.2.3", 0.5), fact("L2.1.1", 1.0), fact("L2.0.9", None))
CHAT = model("org/chat", fact("L0.4.7", -2.125))
OTHER = model("org/other", fact("L1.5.5", 3.0))
ROWS = model("org/rows", fact("L1.5.5", None, id="L1.5.*", col=None))
WIDE = model("org/wide", fact("L0.4.7", -2.0), intermediate_size=INNER + 1)
SOUND = {"L0.4.7": -2.0, "L1.2.3": 0.5, "L2.1.1": 1.0}


@pytest.fixture
def known(monkeypatch):
    def offer(*models: KnownModel) -> None:
        monkeypatch.setattr(own, "list_all_models", lambda: models)
        monkeypatch.setattr(own, "find_model", lambda name: next(m for m in models if m.hf_id == name))
        monkeypatch.setattr(own, "find_by_repo", lambda name: next((m for m in models if m.hf_id == name), None))

    offer(WIDE, OTHER, ROWS, CHAT, LLAMA)
    return offer


def identify(root: Path, name: str | None = None, repo_ids=(), declared=()):
    return identify_checkpoint(open_checkpoint(root), name, repo_ids, declared)


def test_a_model_is_identified_from_its_values(tmp_path, known):
    found = identify(write(tmp_path / "base", SOUND))
    assert (found.model, found.by, found.fitting, found.compared) == (LLAMA, "values", 3, 3)
    assert found.describe() == "identified as org/llama from its sizes and 3 of 3 values"
    assert identify(write(tmp_path / "chat", {"L0.4.7": -2.125})).model is CHAT
    assert identify(write(tmp_path / "other", {"L1.5.5": 3.0})).model is OTHER
    assert identify(write(tmp_path / "drifted", SOUND | {"L0.4.7": -2.01})).model is LLAMA


def test_a_lost_value_does_not_hide_the_model(tmp_path, known, capsys):
    root = write(tmp_path, SOUND | {"L1.2.3": 0.0})
    assert main(["verify", str(root), "--known", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    identified = document["known"]["identified"]
    assert identified["text"] == "identified as org/llama from its sizes and 2 of 3 values"
    assert (identified["by"], identified["fitting"], identified["compared"]) == ("values", 2, 3)
    assert identified["sizes"] == {"layers": 3, "hidden": 6, "intermediate": [10], "vocabulary": 12}
    assert [f["rule"] for f in document["findings"]] == ["known-lost"]
    assert main(["verify", str(root), "--known"]) == 1
    assert "identified as org/llama from its sizes and 2 of 3 values" in capsys.readouterr().out


def test_another_model_of_these_sizes_is_not_identified_and_not_called_damaged(tmp_path, known, capsys):
    root = write(tmp_path)
    assert main(["verify", str(root), "--known"]) == 2
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"UNDECIDED: {root}: not identified: it has the sizes of org/other, org/rows, ")
    assert "but no known value is stored at its place" in out and "name it with --model" in out
    assert main(["verify", str(root), "--known", "--model", "org/llama"]) == 1, "the user says that it is this model"


def test_one_model_of_these_sizes_is_no_evidence(tmp_path, known):
    known(WIDE, LLAMA)
    with pytest.raises(CheckpointError, match="it has the sizes of org/llama, but no known value") as caught:
        identify(write(tmp_path))
    assert caught.value.exit_code == 2


def test_values_that_do_not_decide_name_the_candidates(tmp_path, known):
    known(LLAMA, OTHER)
    root = write(tmp_path, {"L0.4.7": -2.0, "L1.5.5": 3.0})  # 1 of 3 values for the one, 1 of 1 for the other
    assert identify(root).model is OTHER
    twin = model("org/twin", fact("L1.4.4", 1.0))
    known(OTHER, twin)
    with pytest.raises(CheckpointError, match="its sizes and values fit org/other and org/twin: .*name one of them"):
        identify(write(tmp_path / "both", {"L1.5.5": 3.0, "L1.4.4": 1.0}))


def test_models_with_the_same_known_values_are_named_together(tmp_path, known):
    known(CHAT, model("org/tuned", *CHAT.coordinates))
    found = identify(write(tmp_path, {"L0.4.7": -2.125}))
    assert found.describe() == "identified as org/chat or org/tuned from its sizes and 1 of 1 value"
    assert found.to_json()["twins"] == ["org/tuned"]


def test_sizes_that_no_known_model_has_are_shown(tmp_path, known):
    with pytest.raises(
        CheckpointError, match=r"no known model has its sizes .3 layers, hidden 6, intermediate 10, vocabulary 5000"
    ):
        identify(write(tmp_path, SOUND, {"vocab_size": 5000}))
    known(ROWS)
    with pytest.raises(CheckpointError, match="it has the sizes of org/rows, but no known value"):
        identify(write(tmp_path / "rows", SOUND))


def test_a_name_of_other_sizes_is_refused_with_both(tmp_path, known, capsys):
    root = write(tmp_path, SOUND)
    assert main(["verify", str(root), "--model", "org/wide"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "its sizes are not those of org/wide: it has 3 layers, hidden 6, intermediate 10" in err
    assert "org/wide has 3 layers, hidden 6, intermediate 11" in err
    assert main(["verify", str(root), "--model", "org/llama"]) == 0
    assert "identified as org/llama by the given name" in capsys.readouterr().out


def test_a_larger_vocabulary_does_not_refuse_a_name(tmp_path, known):
    assert identify(write(tmp_path, SOUND, {"vocab_size": 9999}), "org/llama").model is LLAMA


def test_the_repository_that_the_files_name_comes_first_unless_its_sizes_differ(tmp_path, known):
    root = write(tmp_path)
    assert identify(root, repo_ids=(None, 5, "org/chat")).describe() == (
        "identified as org/chat by the repository that its files name"
    )
    found = identify(write(tmp_path / "reshaped", SOUND), repo_ids=("org/wide",))
    assert (found.model, found.by) == (LLAMA, "values")


def test_values_that_were_edited_on_purpose_are_no_evidence(tmp_path, known):
    root = write(tmp_path, SOUND | {"L0.4.7": 0.0, "L1.2.3": 0.0})
    declared = {Coordinate(down(0), (4, 7)), Coordinate(down(1), (2, 3))}
    found = identify(root, declared=declared)
    assert (found.model, found.fitting, found.compared) == (LLAMA, 1, 1)


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(LookupFailed, match="no such known model"):
        identify(write(tmp_path, SOUND), "no such")


def test_shipped_models_are_identified_by_their_own_values():
    """Each model that has telling values explains them best, alone or with models that have the same values."""
    checked = 0
    for truth in own.list_all_models():
        values = {c.id: c.value for c in truth.coordinates if c.value is not None and abs(c.value) >= TELLING}
        evidence = []
        for other in own.list_all_models():
            listed = [c for c in other.coordinates if c.value is not None]
            if (other.num_layers, other.hidden_size) != (truth.num_layers, truth.hidden_size) or not listed:
                continue
            states = [
                kept(c.id, c.value, stored, "kept" if stored == c.value else "changed")
                for c in listed
                for stored in [values.get(c.id, 0.01)]
            ]
            evidence.append(collect_evidence(other, states))
        best = choose(evidence)
        assert bool(best) == bool(values)
        if values:
            assert truth in [each.model for each in best] and len({each.states for each in best}) == 1, truth.slug
            checked += 1
    assert checked >= 15
