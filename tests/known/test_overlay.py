"""The user's own entries: kept, found, merged with what is shipped, forgotten; whatever their names and damage."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from swsurgery.cli import main
from swsurgery.errors import LookupFailed, TargetError
from swsurgery.known import own as own_module
from swsurgery.known import shipped as shipped_module
from swsurgery.known.schema import Citation, Independent, KnownCoordinate, KnownEffect, KnownJointSet, KnownModel

CITE = "measured with `swsurgery scan ./m --confirm`, swsurgery 0.1.0"
SOURCE = Citation(key="scan-0123abcd", kind="own scan", cite=CITE)
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32}


def measured(ratio: float, protocol: str = "zero") -> KnownEffect:
    return KnownEffect(protocol=protocol, metric="ppl", before=10.0, after=10.0 * ratio, ratio=ratio, source=SOURCE)


def coordinate(layer: int, row: int, col: int, ratio: float = 5.5, value: float = -2.5) -> KnownCoordinate:
    return KnownCoordinate(
        id=f"L{layer}.{row}.{col}", layer=layer, row=row, col=col, expert=None,
        tensor=f"model.layers.{layer}.mlp.down_proj.weight", value=value, dtype="BF16", status="measured",
        causal_alone="strong", located_by=("swsurgery scan --method activations",),
        independent=Independent(location=1, value=1), effects=(measured(ratio),), sources=(SOURCE,),
    )  # fmt: skip


def entry(hf_id: str, *coordinates: KnownCoordinate, **fields) -> KnownModel:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 4}
    common = {"aliases": (hf_id,), "family": "llama", "sizes_from": "here", "tensor": "model.layers.{layer}.w"}
    return KnownModel(hf_id=hf_id, coordinates=coordinates, scans=(SOURCE,), **(sizes | common | fields))


def one(hf_id: str = "my-model", **fields) -> KnownModel:
    return entry(hf_id, coordinate(1, 2, 3), **fields)


def test_what_is_saved_is_what_is_found(own_data):
    model = entry(
        "my-model", coordinate(1, 2, 3, value=-0.59228515625), coordinate(2, 2, 5),
        joint_sets=(KnownJointSet(coordinates=("L1.2.3", "L2.2.5"), effects=(measured(1 / 3),)),),
        effects=(measured(math.inf, "zero everything"),), path="/somewhere/modèle",
    )  # fmt: skip
    path = own_module.save(model)
    assert path.parent == own_data / "swsurgery" / "known"
    assert own_module.find_model("my-model") == model
    assert own_module.list_own_models() == (model,)
    assert own_module.find_model("my-model").effects[0].ratio == math.inf
    assert shipped_module.build_json(model)["models"][0]["effects"][0]["ratio"] == "inf"


@pytest.mark.parametrize("name", ["org/My_Model-7B", "ORG/my model 7b", "my-model-7b", "MyModel"])
def test_case_and_punctuation_do_not_matter(name):
    own_module.save(one("org/My_Model-7B"))
    if name == "MyModel":
        with pytest.raises(LookupFailed, match="no such known model: MyModel .did you mean"):
            own_module.find_model(name)
    else:
        assert own_module.find_model(name).hf_id == "org/My_Model-7B"


def test_saving_again_replaces(own_data):
    first = own_module.save(one())
    assert own_module.save(entry("My_Model", coordinate(3, 4, 5))) == first
    assert [c.id for c in own_module.find_model("my-model").coordinates] == ["L3.4.5"]
    assert os.listdir(first.parent) == [first.name], "no temporary file is left"


def test_a_repository_is_found_by_its_very_id_only():
    own_module.save(one("org/mine"))
    assert own_module.find_by_repo("Org/Mine").hf_id == "org/mine"
    assert own_module.find_by_repo("mine") is None and own_module.find_by_repo("other/mine") is None
    assert own_module.find_by_repo("huggyllama/llama-7b") is shipped_module.find_shipped_by_repo("huggyllama/llama-7b")


def test_two_organisations_may_have_a_model_of_one_name():
    own_module.save(one("a/twin"))
    own_module.save(entry("b/twin", coordinate(3, 4, 5)))
    assert own_module.find_model("b/twin").coordinates[0].id == "L3.4.5"
    with pytest.raises(LookupFailed, match="several own entries have this name: twin .give one of a/twin, b/twin"):
        own_module.find_model("twin")
    with pytest.raises(LookupFailed, match="several own entries"):
        own_module.forget("twin")
    own_module.forget("a/twin")
    assert own_module.find_model("twin").hf_id == "b/twin"


def test_punctuation_tells_two_names_apart_that_are_one_without_it():
    own_module.save(one("a/b-c"))
    own_module.save(entry("a-b/c", coordinate(3, 4, 5)))
    assert own_module.find_model("a/b-c").hf_id == "a/b-c"
    assert own_module.find_model("a-b/c").hf_id == "a-b/c"


def test_a_shipped_model_keeps_all_and_gains_what_was_measured():
    before = own_module.find_model("llama-7b")
    [published] = before.coordinates
    own = (coordinate(2, 3968, 7003, 200.0, value=-1.9267578125), coordinate(5, 6, 7))
    own_module.save(entry("huggyllama/llama-7b", *own, notes=("a note",), **LLAMA_7B))
    after = own_module.find_model("LLaMA 7B")
    both, new = after.coordinates
    assert new == own[1] and new.status == "measured"
    assert both.effects == published.effects + own[0].effects
    assert both.sources == published.sources + own[0].sources
    assert both.located_by == (*published.located_by, "swsurgery scan --method activations")
    kept = {"effects", "sources", "located_by", "note"}
    assert both.model_dump(exclude=kept) == published.model_dump(exclude=kept)
    assert both.note.startswith(published.note or "") and "-1.9267578125 BF16" in both.note
    added = {"coordinates", "joint_sets", "effects", "notes", "disputes", "scans"}
    assert after.model_dump(exclude=added) == before.model_dump(exclude=added)
    assert after.notes == (*before.notes, "a note") and after.joint_sets == before.joint_sets
    assert own_module.find_by_repo("huggyllama/llama-7b") == after
    assert next(m for m in own_module.list_all_models() if m.slug == "llama-7b") == after
    assert len(own_module.list_all_models()) == len(shipped_module.list_shipped_models())
    own_module.forget("llama-7b")
    assert own_module.find_model("llama-7b") is before


def test_an_untested_coordinate_gets_its_class_from_the_measurement():
    shipped, place = next(
        (m, c)
        for m in shipped_module.list_shipped_models()
        for c in m.coordinates
        if c.causal_alone == "untested" and c.col
    )
    sizes = {name: getattr(shipped, name) for name in LLAMA_7B}
    own_module.save(entry(shipped.hf_id, coordinate(place.layer, place.row, place.col), **sizes))
    found = shipped_module.find(own_module.find_model(shipped.hf_id), place.id)
    assert (found.causal_alone, found.status, found.value) == ("strong", place.status, place.value)


def test_a_joint_set_that_both_have_gets_both_figures():
    shipped = own_module.find_model("llama-13b")
    pair = shipped.joint_sets[0]
    sizes = {name: getattr(shipped, name) for name in LLAMA_7B}
    places = [tuple(map(int, c[1:].split("."))) for c in pair.coordinates]
    joint = KnownJointSet(coordinates=tuple(reversed(pair.coordinates)), effects=(measured(99.0, "zero jointly"),))
    own_module.save(entry(shipped.hf_id, *(coordinate(*p) for p in places), joint_sets=(joint,), **sizes))
    found = own_module.find_model("llama-13b")
    assert len(found.joint_sets) == len(shipped.joint_sets)
    assert found.joint_sets[0].effects == pair.effects + joint.effects


def test_an_alias_of_a_shipped_model_is_that_model_and_has_one_entry():
    first = own_module.save(entry("llama-7b", coordinate(5, 6, 7), **LLAMA_7B))
    assert own_module.save(entry("huggyllama/llama-7b", coordinate(8, 9, 10), **LLAMA_7B)) == first
    assert [c.id for c in own_module.find_model("llama-7b").coordinates] == ["L2.3968.7003", "L8.9.10"]


def test_another_model_under_a_shipped_name_is_refused(own_data):
    with pytest.raises(LookupFailed, match=r"are \(32, 4096, 11008\), not \(4, 64, 128\): llama-7b .choose another"):
        own_module.save(one("llama-7b"))
    with pytest.raises(LookupFailed, match="the name of another model"):
        own_module.refuse_name("llama-7b", (4, 64, 128))
    assert own_module.refuse_name("llama-7b", (32, 4096, 11008)) == own_module.refuse_name(
        "Llama 7B", (32, 4096, 11008)
    )
    assert not (own_data / "swsurgery").exists()


def test_the_short_name_of_a_shipped_model_stays_its_own():
    own_module.save(one("someone/llama-7b"))
    assert own_module.find_model("llama-7b") is shipped_module.find_shipped_by_repo("huggyllama/llama-7b")
    assert own_module.find_model("someone/llama-7b").own
    with pytest.raises(LookupFailed, match="no own entry of this model: llama-7b .shipped entries cannot be removed"):
        own_module.forget("llama-7b")


def test_unknown_names(own_data):
    with pytest.raises(LookupFailed, match="no own entry of this name: nothing .there are none"):
        own_module.forget("nothing")
    own_module.save(one("my-model"))
    with pytest.raises(LookupFailed, match="no own entry of this name: nothing .own entries: my-model"):
        own_module.forget("nothing")
    with pytest.raises(LookupFailed, match="did you mean my-model"):
        own_module.find_model("my-modle")


HOSTILE = [
    "../../etc/passwd", "/etc/passwd", "..\\..\\x", "a/../../b", "....//x", ".hidden", "-rf", "x" * 300,
    "o" * 300 + "/" + "é" * 300, "名前/模型-７b", "a\u0301b", "con.json", "x%2fy", "a//b",
    "~/model", "$(id)", "*?[a]", "x.json", "swsurgery",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_leaves_the_folder(own_data, name):
    path = own_module.save(one(name))
    assert path.parent == own_data / "swsurgery" / "known"
    assert [p for p in own_data.rglob("*") if p.is_file()] == [path]
    assert len(os.fsencode(path.name)) < 230 and not path.name.startswith((".", "-"))
    assert own_module.find_model(name).hf_id == name
    assert own_module.find_model(name.upper()).hf_id == name
    assert own_module.find_model(path.stem.replace(".", "/")).hf_id == name, "the name that the messages print"
    assert own_module.forget(name) == path and not path.exists()


def test_long_names_with_one_beginning_are_two():
    own_module.save(one("x" * 300 + "a"))
    own_module.save(entry("x" * 300 + "b", coordinate(3, 4, 5)))
    assert own_module.find_model("x" * 300 + "A").coordinates[0].id == "L1.2.3"
    assert own_module.find_model("x" * 300 + "b").coordinates[0].id == "L3.4.5"


@pytest.mark.parametrize("name", ["", "..", "org/", "org/..", "///", "🦙", "a\nb", "a\0b", "a\x1b[2J", "a\udc80"])
def test_a_name_that_is_none_is_refused(own_data, name):
    with pytest.raises(LookupFailed, match="needs a letter or a digit and no control characters"):
        own_module.save(one(name))
    assert not list(own_data.iterdir())


DAMAGE = {
    "empty": b"",
    "cut": b'{"hf_id": "my-mod',
    "not UTF-8": b"\xff\xfe",
    "not an object": b"[]",
    "a field too many": b"more",
    "NaN": b"nan",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_entry_is_told_to_those_only_who_ask_for_it(how, capsys):
    path = own_module.save(one("org/my-model"))
    own_module.save(one("sound"))
    raw = path.read_bytes()
    changed = {
        "a field too many": raw.replace(b"{", b'{"colour": "red",', 1),
        "NaN": raw.replace(b'"ratio": 5.5', b'"ratio": NaN'),
    }
    path.write_bytes(changed.get(how, DAMAGE[how]))
    assert path.read_bytes() != raw
    for ask in (own_module.find_model, own_module.find_by_repo):
        with pytest.raises(LookupFailed, match="is damaged: .*org.my-model.json .swsurgery lookup org/my-model --for"):
            ask("org/my-model")
    assert own_module.find_model("sound").hf_id == "sound" and own_module.find_model("llama-7b").slug == "llama-7b"
    assert [m.hf_id for m in own_module.list_own_models()] == ["sound"]
    assert len(own_module.list_all_models()) == len(shipped_module.list_shipped_models()) + 1
    with pytest.raises(LookupFailed, match="no such known model"):
        own_module.find_model("soundd")
    assert main(["lookup", "my-model"]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.count("\n") == 1
    assert streams.err.startswith("swsurgery: the own entry is damaged")
    assert own_module.forget("my-model") == path


def test_a_damaged_entry_of_a_shipped_model_leaves_the_others_alone():
    path = own_module.save(entry("llama-7b", coordinate(5, 6, 7), **LLAMA_7B))
    path.write_bytes(b"{")
    with pytest.raises(LookupFailed, match="damaged"):
        own_module.find_model("huggyllama/llama-7b")
    assert own_module.find_model("mistral-7b").slug == "mistral-7b"
    assert len(own_module.list_all_models()) == len(shipped_module.list_shipped_models())


def test_a_folder_that_cannot_be_made_is_one_line(own_data, monkeypatch, capsys):
    (own_data / "swsurgery").write_text("a file where the folder should be")
    with pytest.raises(TargetError, match="cannot write .(Not a directory|File exists)") as caught:
        own_module.save(one())
    assert caught.value.exit_code == 2 and len(caught.value.faults) == 1
    assert own_module.find_model("llama-7b").slug == "llama-7b", "nothing is needed to look up"
    assert own_module.list_own_models() == ()


def read_only(path: object, *rest: object, **more: object) -> None:
    raise PermissionError(13, os.strerror(13), str(path))


def test_a_read_only_folder_is_one_line_and_exit_2(monkeypatch, capsys):
    path = own_module.save(one())
    before = path.read_bytes()
    with monkeypatch.context() as patch:  # the tests may run as root, whom no mode stops
        patch.setattr(os, "open", read_only)
        with pytest.raises(
            TargetError, match=r"cannot write .Permission denied.: .*known .choose a place where you may write"
        ):
            own_module.save(entry("my-model", coordinate(3, 4, 5)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", read_only)
        patch.setattr(Path, "unlink", read_only)
        assert main(["lookup", "my-model", "--forget"]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.count("\n") == 1 and "Permission denied" in streams.err
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="no mode stops root")
def test_a_folder_without_the_right_to_write(own_data):
    own_data.chmod(0o500)
    with pytest.raises(TargetError, match="Permission denied"):
        own_module.save(one())


def _save(number: int) -> str:
    coordinates = [coordinate(layer % 4, number, layer) for layer in range(50)]
    for _ in range(5):
        own_module.save(entry("shared", *coordinates))
    return f"L0.{number}.0"


def test_savers_at_the_same_time_leave_one_whole_entry():
    with ProcessPoolExecutor(4) as pool:
        ids = set(pool.map(_save, range(8)))
    found = own_module.find_model("shared").coordinates
    assert len(found) == 50 and found[0].id in ids and len({c.row for c in found}) == 1


def test_the_command_shows_and_forgets(capsys):
    own_module.save(entry("llama-7b", coordinate(5, 6, 7), **LLAMA_7B))
    path = own_module.save(one("org/mine"))
    assert main(["lookup", "mine"]) == 0
    shown = capsys.readouterr().out
    assert "swsurgery lookup org/mine --forget removes" in shown
    assert "L1.2.3" in shown and "own scan" in shown and CITE in " ".join(shown.split())
    assert main(["lookup", "mine", "--json"]) == 0
    [model] = json.loads(capsys.readouterr().out)["models"]
    assert model["own"] and model["coordinates"][0]["own"] and model["coordinates"][0]["status"] == "measured"
    assert model["coordinates"][0]["sources"] == [CITE]
    assert main(["lookup", "llama-7b", "--json"]) == 0
    [model] = json.loads(capsys.readouterr().out)["models"]
    assert [c["own"] for c in model["coordinates"]] == [False, True]
    assert main(["lookup", "mine", "--forget", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"forgotten": str(path), "schema": "swsurgery/lookup/1"}
    assert main(["lookup", "mine", "--forget"]) == 2
    assert "no own entry of this name: mine" in capsys.readouterr().err
    assert main(["lookup", "llama-7b", "--forget"]) == 0
    assert "removed" in capsys.readouterr().out
    assert main(["lookup", "llama-7b"]) == 0
    assert "own scan" not in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--manifest", "zero"], ["--status", "paper"], ["--factor", "2"]])
def test_forget_stands_alone(more, capsys):
    path = own_module.save(one())
    assert main(["lookup", "my-model", "--forget", *more]) == 2
    assert "--forget cannot be combined with" in capsys.readouterr().err and path.exists()


def test_without_an_own_entry_nothing_more_is_opened_or_loaded():
    code = (
        "import sys, builtins, io; from swsurgery import known; opened = [];"
        "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None);"
        "known.find_model('llama-7b'); print(*sorted({'swsurgery.storage.filesystem', 'ctypes'} & set(sys.modules)));"
        "print(*[name for name in opened if name.endswith(('.toml', '.json'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    libraries, files = done.stdout.split("\n")[:2]
    assert libraries == ""
    assert [Path(name).name for name in files.split()] == ["names.toml", "llama-1.toml"]
