"""Each function of the library does what the command of its name does, and says what it accepts."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SECOND, THIRD, down, sha256, tensor, tree, write_llama, write_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keys import write_keys

import swsurgery
from swsurgery.cli import main
from swsurgery.manifest.schema import Manifest

EDIT = {"op": "zero", "layer": 1, "row": 2, "col": 3}
VERBS = sorted(name for name in swsurgery.__all__ if inspect.isfunction(getattr(swsurgery, name)))
NO_PATHS = [None, 3, 2.5, b"base", ["base"], {"path": "base"}, object()]


@pytest.fixture
def room(tmp_path, monkeypatch) -> Path:
    """`base`, `edits.json`, and `patched`, which is made of them; it is the current directory."""
    monkeypatch.chdir(tmp_path)
    mlp = {
        f"model.layers.{n}.mlp.{part}_proj.weight": tensor("F32", 10, 6) for n in range(3) for part in ("gate", "up")
    }
    norms = {f"model.layers.{n}.post_attention_layernorm.weight": tensor("F32", 6) for n in range(3)}
    write_llama(Path("base"), mlp | norms)
    write_manifest(Path("edits.json"), Path("base"), EDIT)
    swsurgery.apply("edits.json", output="patched", check="off")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, object]:
    """What a command prints with --json, without the name of its schema."""
    capsys.readouterr()
    assert main([*words.split(), "--json"]) in (0, 1)
    document = json.loads(capsys.readouterr().out)
    assert document.pop("schema") == f"swsurgery/{words.split()[0]}/1"
    return document


PAIRS: dict[str, tuple[str, Callable[[], object]]] = {
    "plan": ("apply edits.json --dry-run", lambda: swsurgery.plan("edits.json")),
    "diff": ("diff base patched", lambda: swsurgery.diff("base", "patched")),
    "inspect": ("inspect base", lambda: swsurgery.inspect("base")),
    "inspect a scalar": (
        f"inspect base --tensor {down(1)} --at 2,3", lambda: swsurgery.inspect(Path("base"), down(1), (2, 3)),
    ),
    "lint": ("lint edits.json", lambda: swsurgery.lint("edits.json")),
    "lookup": ("lookup llama-7b --status paper", lambda: swsurgery.lookup("llama-7b", status="paper")),
    "recipe": (
        "recipe llama-7b --for torchao", lambda: swsurgery.recipe("llama-7b", "torchao"),
    ),
    "lookup all models": ("lookup", lambda: swsurgery.lookup()),
    "lookup all models of a status": ("lookup --status paper", lambda: swsurgery.lookup(status="paper")),
    "lookup a record": ("lookup patched", lambda: swsurgery.lookup(Path("patched"))),
    "scan": ("scan base --method weights", lambda: swsurgery.scan("base", method="weights")),
    "verify": ("verify patched", lambda: swsurgery.verify("patched")),
    "verify --complete": ("verify base --complete", lambda: swsurgery.verify("base", complete=True)),
    "preflight": ("preflight base", lambda: swsurgery.preflight("base")),
    "verify more": (
        "verify patched --base base --manifest edits.json --finite",
        lambda: swsurgery.verify("patched", base="base", manifest="edits.json", finite=True),
    ),
    "verify, and the answer is no": (
        "verify patched --base patched", lambda: swsurgery.verify("patched", base="patched"),
    ),
}  # fmt: skip
"""Verbs that write nothing: the command, and the same in the library."""

WRITERS: dict[str, tuple[str, Callable[[], object]]] = {
    "apply": (
        "apply edits.json -o new --check weights", lambda: swsurgery.apply("edits.json", output="new", check="weights"),
    ),
    "apply in place": (
        "apply pinned.json --in-place --check off",
        lambda: swsurgery.apply("pinned.json", in_place=True, check="off"),
    ),
    "revert": ("revert patched -o new", lambda: swsurgery.revert("patched", "new")),
    "revert in place": ("revert patched", lambda: swsurgery.revert("patched")),
    "export": (
        "export patched --format sparse -o new", lambda: swsurgery.export("patched", "new", format="sparse"),
    ),
}  # fmt: skip
"""Verbs that write: the command, and the same in the library, in another directory."""


@pytest.mark.parametrize("name", PAIRS)
def test_a_command_prints_what_the_library_returns(room, capsys, name):
    words, call = PAIRS[name]
    assert run(capsys, words) == json.loads(json.dumps(call().to_json(), allow_nan=False))


@pytest.mark.parametrize("name", WRITERS)
def test_a_command_writes_what_the_library_writes(tmp_path, monkeypatch, capsys, name):
    words, call = WRITERS[name]
    found = []
    for place, act in (("one", lambda: run(capsys, words)), ("two", lambda: call().to_json())):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        write_llama(Path("base"))
        pins = {"path": "base", "sha256": {SECOND: sha256(Path("base") / SECOND)}}
        write_manifest(Path("edits.json"), Path("base"), EDIT)
        write_manifest(Path("pinned.json"), pins, EDIT)
        swsurgery.apply("edits.json", output="patched", check="off")
        document = json.loads(json.dumps(act()).replace(str(tmp_path / place), "HERE"))
        found.append((document, tree(tmp_path / place)))
    assert found[0] == found[1]


def test_signing_does_too(room, capsys):
    pytest.importorskip("model_signing")
    write_keys(room)
    printed = run(capsys, "sign patched --key key.pem --signature one.sig")
    signed = swsurgery.sign("patched", "key.pem", "two.sig").to_json()
    assert {**printed, "signature": ""} == {**signed, "signature": ""}
    assert swsurgery.verify("patched", signature="two.sig", public_key="key.pub").ok


def test_publishing_does_too(hub, room, capsys):
    printed = run(capsys, "publish patched org/new --dry-run --private")
    assert printed == swsurgery.publish("patched", "org/new", dry_run=True, private=True).to_json()
    done = swsurgery.publish("patched", "org/new", private=True, accept=["check-missing"]).to_json()
    again = run(capsys, "publish patched org/new --private --accept check-missing")
    assert again["published"]["commit"] == done["published"]["commit"] and again["published"]["already_published"]


def test_each_command_calls_the_function_of_its_name():
    """Once, in the module of its package, and with a reporter."""
    calls = []
    for path in (Path(swsurgery.__file__).parent / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and "reporter" in {keyword.arg for keyword in node.keywords}:
                calls.append(ast.unparse(node.func).rpartition(".")[2])
    in_memory = {"load_manifest", "load_patched", "open_checkpoint", "patched_state_dict"}
    assert sorted(calls) == sorted(set(VERBS) - in_memory)


# Signatures and types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERBS)
def test_signatures_follow_one_pattern(name):
    parameters = list(inspect.signature(getattr(swsurgery, name)).parameters.values())
    named = {p.name: p for p in parameters}
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[3:] if p.kind is not p.VAR_KEYWORD)
    if name not in ("load_manifest", "open_checkpoint"):
        last = [p for p in parameters if p.kind is not p.VAR_KEYWORD][-1]
        assert (last.name, last.default, last.kind) == ("reporter", None, last.KEYWORD_ONLY)
    if "base" in named:
        assert (named["base"].annotation, named["base"].default) == ("str | Path | None", None)


LOCATIONS: dict[str, Callable[[object], object]] = {
    "apply, base": lambda bad: swsurgery.apply([EDIT], bad, "new"),
    "check": lambda bad: swsurgery.check(bad),
    "diff": lambda bad: swsurgery.diff("base", bad),
    "export": lambda bad: swsurgery.export("patched", bad, format="sparse"),
    "inspect": lambda bad: swsurgery.inspect(bad),
    "lookup": lambda bad: swsurgery.lookup(0 if bad is None else bad),  # None lists all models
    "open_checkpoint": lambda bad: swsurgery.open_checkpoint(bad),
    "publish": lambda bad: swsurgery.publish(bad, "org/new"),
    "recipe": lambda bad: swsurgery.recipe(bad, "torchao"),
    "revert": lambda bad: swsurgery.revert(bad),
    "scan": lambda bad: swsurgery.scan(bad),
    "sign": lambda bad: swsurgery.sign(bad, "key.pem"),
    "verify": lambda bad: swsurgery.verify(bad),
}


@pytest.mark.parametrize("bad", NO_PATHS, ids=lambda bad: type(bad).__name__)
@pytest.mark.parametrize("name", LOCATIONS)
def test_a_location_is_a_str_or_a_path(room, name, bad):
    before = tree(room)
    with pytest.raises(TypeError, match="must be a str or a Path"):
        LOCATIONS[name](bad)
    assert tree(room) == before


PATHS = LOCATIONS | {
    "apply, output": lambda bad: swsurgery.apply("edits.json", output=bad, check="off"),
    "export, source": lambda bad: swsurgery.export(bad, "new", format="sparse"),
    "load_manifest": lambda bad: swsurgery.load_manifest(bad),
    "plan, the manifest's base": lambda bad: swsurgery.plan({"version": 1, "base": {"path": bad}, "edits": [EDIT]}),
    "revert, output": lambda bad: swsurgery.revert("patched", bad),
    "scan, manifest": lambda bad: swsurgery.scan("base", method="weights", manifest=bad),
    "sign, key": lambda bad: swsurgery.sign("patched", bad),
    "verify, manifest": lambda bad: swsurgery.verify("patched", manifest=bad),
}


@pytest.mark.parametrize("bad", ["a\0b", "x" * 5000, "x/" * 3000], ids=["NUL", "long name", "long path"])
@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_cannot_exist_is_an_error_of_the_library(room, name, bad):
    before = tree(room)
    with pytest.raises(swsurgery.SwsurgeryError):
        PATHS[name](bad)
    assert tree(room) == before


@pytest.mark.parametrize(
    "bad",
    [None, 3, object(), [3], ["edits.json", 3], {1, 2}],
    ids=lambda bad: "object" if type(bad) is object else repr(bad),
)
@pytest.mark.parametrize("verb", ["apply", "plan", "load_manifest", "load_patched", "patched_state_dict"])
def test_what_is_no_manifest_is_a_type_error(room, verb, bad):
    with pytest.raises(TypeError, match="manifest must be a path .*, a dict, a Manifest, .* or a list of edits, not"):
        getattr(swsurgery, verb)(bad)


def test_a_list_of_edits_needs_a_base():
    with pytest.raises(TypeError, match="a list of edits does not name its base, so base must be a str or a Path"):
        swsurgery.plan([EDIT])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: swsurgery.inspect("base", 3), "tensor must be None or a str, not 3"),
        (lambda: swsurgery.inspect("base", down(1), 2.5), "at must be an integer, not 2.5"),
        (lambda: swsurgery.inspect("base", down(1), (True, 3)), "at must be an integer, not True"),
        (lambda: swsurgery.diff("base", "patched", limit="many"), "limit must be an integer, not 'many'"),
        (lambda: swsurgery.verify("patched", known="yes"), "known must be a bool, not 'yes'"),
        (lambda: swsurgery.verify("patched", tolerance="0.1"), "tolerance must be a number, not '0.1'"),
        (lambda: swsurgery.verify("patched", signature=1, public_key="k"), "signature must be a str or a Path, not 1"),
        (lambda: swsurgery.check("base", windows=2.0), "windows must be an integer, not 2.0"),
        (lambda: swsurgery.check("base", max_perplexity_ratio="2"), "max_perplexity_ratio must be a number, not '2'"),
        (
            lambda: swsurgery.scan("base", method="luck"),
            "method must be one of 'activations', 'weights', 'experts', not 'luck'",
        ),
        (lambda: swsurgery.scan("base", prompts="Say"), "prompts must be None or a list of strings, not 'Say'"),
        (lambda: swsurgery.scan("base", window="9"), "window must be an integer, not '9'"),
        (lambda: swsurgery.sweep("edits.json", "0,1"), "factors must be a list of numbers, not '0,1'"),
        (lambda: swsurgery.sweep("edits.json", [True]), "factors must be a number, not True"),
        (lambda: swsurgery.export("patched", "new", format="zip"), "format must be one of 'sparse', 'peft', 'vllm', "),
        (lambda: swsurgery.apply("edits.json", in_place="yes"), "in_place must be a bool, not 'yes'"),
        (lambda: swsurgery.publish("patched", "org/new", revision=3), "revision must be a str, not 3"),
        (lambda: swsurgery.publish("patched", "org/new", tag=b"v1"), "tag must be None or a str, not b'v1'"),
        (lambda: swsurgery.publish("patched", "org/new", message=["a"]), "message must be None or a str, not ['a']"),
        (lambda: swsurgery.verify("patched", weights=["index"]), "weights must be None or one of 'index', 'single', "),
        (lambda: swsurgery.verify("patched", variant=3), "variant must be None or a str, not 3"),
        (lambda: swsurgery.publish("patched", "org/new", accept="secret"), "accept must be None or a list of strings"),
        (lambda: swsurgery.lookup("llama-7b", status=3), "status must be None or a list of strings, not 3"),
        (lambda: swsurgery.lint("edits.json", strict=1), "strict must be a bool, not 1"),
        (lambda: swsurgery.plan("edits.json", reporter=print), "reporter must be None or a Reporter, not <built-in"),
    ],
)  # fmt: skip
def test_an_argument_of_a_wrong_type_names_what_is_accepted(room, call, said):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value).startswith(said)


def nest(levels: int) -> dict[str, object]:
    document: dict[str, object] = {}
    for _ in range(levels):
        document = {"base": document}
    return document


CIRCLE: dict[str, object] = {"version": 1}
CIRCLE["base"] = CIRCLE


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: swsurgery.diff("base", "patched", limit=-1), "limit must be at least 0: -1"),
        (lambda: swsurgery.verify("patched", tolerance=float("nan")), "tolerance must be between 0 and 1: nan"),
        (lambda: swsurgery.verify("patched", tolerance=5), "tolerance must be between 0 and 1: 5.0"),
        (lambda: swsurgery.verify("patched", tolerance=10**400), "tolerance is a number that is too large for a float"),
        (lambda: swsurgery.sweep("edits.json", [10**400]), "factors is a number that is too large for a float"),
        (lambda: swsurgery.plan(CIRCLE), "contains itself, or is nested too deeply: manifest"),
        (lambda: swsurgery.plan(nest(100_000)), "contains itself, or is nested too deeply: manifest"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_an_error_of_the_library(room, call, said):
    with pytest.raises(swsurgery.SwsurgeryError) as caught:
        call()
    assert str(caught.value) == said


INTEGERS = st.sampled_from([np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, int])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.integers(0, 5), col=st.integers(0, 9), kind=INTEGERS)
def test_an_integer_may_be_numpys(room, row, col, kind):
    edit = {"op": "zero", "layer": kind(1), "row": kind(row), "col": kind(col)}
    assert swsurgery.plan([edit], "base").splices[0].coordinate.index == (row, col)
    at = (kind(row), kind(col))
    assert swsurgery.inspect("base", down(1), at).to_json()["index"] == [row, col]
    assert swsurgery.diff("base", "patched", limit=kind(7)).changes[0].index == (2, 3)
    options = swsurgery.CheckOptions(windows=kind(4), window=kind(8))
    assert (type(options.windows), options) == (int, swsurgery.CheckOptions(windows=4, window=8))


FORMS: dict[str, Callable[[Path], object]] = {
    "str": str,
    "path": lambda path: path,
    "bytes": lambda path: path.read_bytes(),
    "dict": lambda path: json.loads(path.read_text()),
    "Manifest": lambda path: Manifest.model_validate(json.loads(path.read_text())),
    "LoadedManifest": lambda path: swsurgery.load_manifest(path),
    "edits": lambda path: [EDIT],
    "typed edits": lambda path: swsurgery.load_manifest(path).manifest.edits,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_manifest_may_be_given_in_each_form(room, form):
    given = FORMS[form](Path("edits.json"))
    assert swsurgery.plan(given, "base").to_json()["splices"] == swsurgery.plan("edits.json").to_json()["splices"]
    swsurgery.apply(given, "base", "new", check="off")
    assert swsurgery.verify("new", manifest=given, base="base").ok
    assert swsurgery.diff("new", "patched").tensors == {}


def test_faults_of_a_dict_have_a_line(room):
    with pytest.raises(swsurgery.SwsurgeryError, match=r"^manifest:\d+:\d+: edits\[0\]: .*is missing layer"):
        swsurgery.plan([{"op": "zero", "row": 1, "col": 3}], "base")


def test_locations_on_the_hub(hub, room):
    commit, name = hub.add_repo("org/base", room / "base"), hub.name("org/base")
    for uri in (f"hf://{name}", f"hf://{name}@{commit}"):
        assert swsurgery.open_checkpoint(uri).revision == commit
        assert swsurgery.inspect(uri, down(1), (2, 3)).to_json() == swsurgery.inspect("base", down(1), (2, 3)).to_json()
        assert not swsurgery.diff(uri, "patched").same
        assert swsurgery.plan([EDIT], uri).to_json()["splices"] == swsurgery.plan("edits.json").to_json()["splices"]
        assert swsurgery.verify("patched", base=uri).ok
        assert swsurgery.scan(uri, method="weights").answer == "none"
    swsurgery.apply([EDIT], uri, "from-hub", check="off")
    assert swsurgery.lookup(Path("from-hub")).base.revision == commit
    for verb in (swsurgery.revert, lambda uri: swsurgery.sign(uri, "k"), lambda uri: swsurgery.publish(uri, "o/n")):
        with pytest.raises(swsurgery.SwsurgeryError, match="download"):
            verb(uri)


class Listener(swsurgery.Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[str] = []

    def say(self, line: str) -> None:
        self.notes.append(line)

    def start(self, total: int, unit: str, label: str) -> None:
        self.tasks.append(label)


def test_a_reporter_hears_the_notes_and_the_work(hub, room):
    name = hub.name("org/base")
    hub.add_repo("org/base", room / "base")
    listener = Listener()
    swsurgery.diff(f"hf://{name}", "base", reporter=listener)
    assert listener.tasks == ["comparing"] and "range requests" in listener.notes[0]


# Results ------------------------------------------------------------------------------------------------------------


def results(room: Path) -> dict[str, object]:
    many = [{"op": "zero", "tensor": down(2), "index": [row, col]} for row in range(6) for col in range(10)]
    found = {name: call() for name, (_, call) in PAIRS.items()}
    found["plan of many"] = swsurgery.plan(many, "base")
    found["apply"] = swsurgery.apply(many, "base", "many", check="off")
    found["revert"] = swsurgery.revert("many", "back")
    found["export"] = swsurgery.export("many", "many.patch", format="sparse")
    found["load_manifest"] = swsurgery.load_manifest(many, "base")
    return found


def test_results_have_one_line_and_a_page(room):
    for name, result in results(room).items():
        line = repr(result)
        assert "\n" not in line and len(line) <= 300 and line.isprintable(), name
        assert line.startswith(type(result).__name__ + "("), name
        assert "<code>" in result._repr_html_(), name
        assert json.loads(json.dumps(result.to_json(), allow_nan=False)), name
        with pytest.raises((AttributeError, TypeError, ValueError), match="frozen|cannot assign|immutable"):
            result.notes = ()


def test_tables_have_the_same_columns_in_each_row(room):
    for name, result in results(room).items():
        if hasattr(result, "to_rows"):
            rows = result.to_rows()
            assert len({tuple(row) for row in rows}) <= 1, name
    plan = swsurgery.plan(
        [{"op": "zero", "tensor": down(2), "index": [r, c]} for r in range(6) for c in range(9)], "base"
    )
    assert len(plan.to_rows()) == 54 and plan._repr_html_().count("<tr>") == 41 and "and 14 more" in plan._repr_html_()


def test_a_page_contains_no_markup_of_a_checkpoint(tmp_path):
    base = write_llama(tmp_path / "<b>base", extra={"<script>alert(1)</script>": ("F32", (1,), bytes(4))})
    page = swsurgery.inspect(base)._repr_html_()
    assert "<script>" not in page and "<b>" not in page and "&lt;script&gt;" in page


def test_a_scan_is_not_lost_when_a_file_cannot_be_written(room, monkeypatch):
    from swsurgery.known import own

    def fail(*_: object) -> None:
        raise swsurgery.SwsurgeryError("cannot write", "known")

    monkeypatch.setattr(own, "save", fail)
    with pytest.raises(swsurgery.SwsurgeryError) as caught:
        swsurgery.scan("base", method="weights", register="mine")
    assert caught.value.result.answer == "none"


def test_shapes_are_those_on_the_disk(room):
    checkpoint = swsurgery.open_checkpoint("base")
    assert checkpoint.weight_map[down(2)] == THIRD and checkpoint.shapes[down(2)] == (6, 10)
    assert len(repr(checkpoint)) <= 300 and checkpoint.to_json() == swsurgery.inspect("base").to_json()
