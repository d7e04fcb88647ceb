"""Names and strings out of files are printed escaped by every command, and are valid JSON where JSON was asked for.

Hypothesis puts control, bidirectional and odd characters wherever a file may hold a string.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import unicodedata
from pathlib import Path

import pytest
from checkpoints import CONFIG, tensor, tree, write_shard, write_single
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from swsurgery.cli import main

NASTY = [
    "\x1b[2J\x1b]0;title\x07", "line\nswsurgery: forged", "back\rFINDING", "tab\there", "\x00", "\x7f", "\x9b31m",
    "\u202eright to left", "\u2066isolate", "\u2028separator", "\u200bzero width", "\ufeff", "a" * 300, "é中🙂", "",
    "../../etc/passwd", "-rf", "::error file=x::forged", "%0A::warning::x", "<script>alert(1)</script>", "]]>",
    "\ue000", "`$(touch x)`", "|a|b|", "---\nforged: true\n---", "\U000e0041tag", "\ud83d\ude42",
]  # fmt: skip
strings = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.text(st.sampled_from("\x1b[\n\r\x00\x07\u202e\u2028 aA0:%"), max_size=12),
)
PROFILE = settings(
    max_examples=int(os.environ.get("SWSURGERY_EXAMPLES", "6")), deadline=None, derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # the shortest example is not worth the minutes that it takes
)  # fmt: skip


def run(*arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return code, out.getvalue(), err.getvalue()


def hold(*arguments: str, ok: tuple[int, ...] = (0, 1, 2)) -> str:
    """Run a command as text and as JSON, and hold both to the promise. Returns the text."""
    code, out, err = run(*arguments)
    assert code in ok and "Traceback" not in err, (arguments, code, err)
    assert {c for c in out + err if is_harmful(c)} == set(), arguments
    # A line of the program's own begins with what the program says, never with what a file says.
    assert all(line.startswith(("swsurgery: ", "Usage: ", "Try ", "Error: ", "\u256d", "\u2502", "\u2570")) or not line
               for line in err.splitlines()), err  # fmt: skip
    code_json, out_json, err_json = run(*arguments, "--json")
    assert code_json == code and {c for c in err_json if is_harmful(c)} == set()
    if out_json:
        json.loads(out_json, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
        assert {c for c in out_json if is_harmful(c)} == set(), "JSON escapes too"
    else:
        assert code == 2
    return out + err


def is_harmful(character: str) -> bool:
    """What moves the cursor, breaks the line, turns the text round or cannot be seen; the newline of our own aside."""
    return character != "\n" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@contextlib.contextmanager
def folder():
    """A new empty folder for each example, which is also the working directory."""
    before, place = os.getcwd(), tempfile.mkdtemp()
    os.chdir(place)
    try:
        yield Path(place)
    finally:
        os.chdir(before)
        shutil.rmtree(place)


@PROFILE
@given(name=strings, model_type=strings, key=strings, value=strings)
def test_names_in_a_header_and_a_config(name, model_type, key, value):
    if name == "__metadata__":
        return
    with folder() as place:
        for seed, root in enumerate(("a", "b")):
            write_single(place / root, {name: tensor("F32", 2, 2, seed=seed)}, {"model_type": model_type})
        write_shard(place / "b" / "model.safetensors", {name: tensor("F32", 2, 2, seed=1), key + "x": tensor("F16", 1)})
        assert hold("inspect", "a", ok=(0,))
        hold("inspect", "a", "--tensor", name, "--at", "0,1")
        hold("inspect", "a", f"--tensor={value}")
        hold("diff", "a", "b", ok=(1,))
        for op in ({"op": "zero"}, {"op": "zero", "expect": 3.5}):
            edit = {"tensor": name, "index": [0, 1], **op}
            manifest = {"version": 1, "base": {"path": "a"}, "description": value, "edits": [edit]}
            (place / "m.json").write_text(json.dumps(manifest))
            hold("apply", "m.json", "--dry-run")


@PROFILE
@given(data=st.data(), name=strings.filter(lambda s: s and s != "__metadata__"))
def test_strings_in_a_record(data, name):
    """Any string of the record, a key included, is made hostile: verify, lookup and revert stay sound."""
    with folder() as place:
        write_single(place / "base", {name: tensor("F32", 2, 2)})
        edits = [{"op": "zero", "tensor": name, "index": [0, 1]}, {"op": "protect", "tensor": name, "index": [1, 1]}]
        manifest = {"version": 1, "base": {"path": "base"}, "edits": edits}
        (place / "m.json").write_text(json.dumps(manifest))
        code, _, err = run("apply", "m.json", "-o", "out", "--check", "off", "--quiet")
        assert code == 0, err
        hold("verify", "out", ok=(0,))
        path = place / "out" / "swsurgery.json"
        document = json.loads(path.read_text())
        document["base"]["repo_id"] = data.draw(st.none() | strings)
        document["omitted"] = data.draw(st.lists(strings, max_size=2))
        document["check"] = data.draw(
            st.sampled_from([{}, {"kind": "off"}, {"kind": "forward"}, {"kind": "off", "reason": 7}])
            | st.builds(lambda s: {"kind": "off", "reason": s}, strings)
        )
        document["edits"][0]["known"] = data.draw(
            st.none() | st.just({}) | st.builds(lambda s: {"status": s, "causal_alone": s, "id": s}, strings)
        )
        where = data.draw(st.sampled_from(list(strings_of(document))))
        replace(document, where, data.draw(strings))
        path.write_text(json.dumps(document))
        for arguments in (("verify", "out"), ("lookup", "./out"), ("revert", "out", "-o", "back")):
            hold(*arguments)
            shutil.rmtree(place / "back", ignore_errors=True)


def strings_of(node: object, path: tuple = ()) -> list[tuple]:
    """Places of all strings in a document; a place that ends with "key" is a key's name."""
    if isinstance(node, dict):
        return [
            p for k, v in node.items() for p in ([(*path, k, "key")] if len(path) else []) + strings_of(v, (*path, k))
        ]
    if isinstance(node, list):
        return [p for i, v in enumerate(node) for p in strings_of(v, (*path, i))]
    return [path] if isinstance(node, str) else []


def replace(document: dict, where: tuple, text: str) -> None:
    is_key = where[-1] == "key" and len(where) > 1
    *parents, last = where[:-1] if is_key else where
    node = document
    for key in parents:
        node = node[key]
    if is_key:
        node[text] = node.pop(last)
    else:
        node[last] = text


@pytest.mark.parametrize("place_of_string", range(11))
@settings(PROFILE, max_examples=max(2, PROFILE.max_examples // 3))
@given(text=strings, other=strings)
@example(text="\x1b[31m\n", other="\u202e")
def test_strings_in_a_manifest(place_of_string, text, other):
    with folder() as place:
        write_single(place / "base", {"weight": tensor("F32", 2, 2)})
        edit = {"op": "zero", "tensor": "weight", "index": [0, 0]}
        sound = {"version": 1, "base": {"path": "base"}, "edits": [edit]}
        broken = (
            {**sound, "name": text},
            {**sound, text: other},
            {**sound, "base": {"path": text or "x"}},
            {**sound, "base": {"repo_id": text, "revision": other}},
            {**sound, "base": {"path": "base", "sha256": {text: other}}},
            {**sound, "base": {"path": "base", "model": text}},
            {**sound, "edits": [{**edit, "op": text}]},
            {**sound, "edits": [{**edit, "tensor": text}]},
            {**sound, "edits": [{**edit, "expect": text}]},
            {**sound, "edits": [{"op": "protect", "known": text}]},
            {**sound, "edits": [{**edit, text: other}]},
        )[place_of_string]
        (place / "m.json").write_text(json.dumps(broken))
        hold("apply", "m.json", "--dry-run")
        (place / "raw.yaml").write_text(json.dumps(broken, ensure_ascii=False), "utf-8", "surrogatepass")
        hold("apply", "raw.yaml", "--dry-run")


@PROFILE
@given(text=strings, other=strings)
def test_strings_in_an_index_and_a_config(text, other):
    with folder() as place:
        write_single(place / "base", {"weight": tensor("F32", 2, 2)})
        os.rename(place / "base" / "model.safetensors", place / "base" / "model-00001-of-00001.safetensors")
        index = place / "base" / "model.safetensors.index.json"
        shard = "model-00001-of-00001.safetensors"
        for document in (
            {"weight_map": {"weight": text}},
            {"weight_map": {text: shard}},
            {"weight_map": {"weight": shard, text: shard}, "metadata": {"total_size": other}},
            {"weight_map": {"weight": shard}, "metadata": {text: other}},
            {text: other},
        ):
            index.write_text(json.dumps(document))
            hold("inspect", "base")
        index.write_text('{"weight_map": {"weight": "' + shard + '"}}' + text)
        hold("inspect", "base")
        index.write_text(json.dumps({"weight_map": {"weight": shard}}))
        (place / "base" / "config.json").write_text(
            json.dumps({**CONFIG, "architectures": [text], "model_type": other})
        )
        hold("inspect", "base")


@PROFILE
@given(name=strings.filter(lambda s: s and "/" not in s and "\0" not in s and len(s.encode()) < 200))
def test_names_of_files_and_arguments(name):
    with folder() as place:
        write_single(place / "base", {"weight": tensor("F32", 2, 2)})
        (place / "base" / name).touch()
        hold("inspect", "base")
        shutil.copytree(place / "base", place / "other")
        if (place / "other" / name).is_file() and name not in ("config.json", "model.safetensors"):
            (place / "other" / name).unlink()
        hold("diff", "base", "other")
        for arguments in (("inspect",), ("verify",), ("lookup",), ("apply", "--dry-run"), ("diff", "base")):
            hold(*arguments, f"./{name}")
        assert set(tree(place / "base")) >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("form", ["text", "json", "junit", "sarif", "github"])
@PROFILE
@given(name=strings.filter(lambda s: s and s != "__metadata__"))
def test_names_in_every_form_of_a_verification(form, name):
    """A scalar that was changed afterwards is named by a finding."""
    with folder() as place:
        write_single(place / "base", {name: tensor("F32", 2, 2)})
        edit = {"op": "zero", "tensor": name, "index": [0, 1]}
        (place / "m.json").write_text(json.dumps({"version": 1, "base": {"path": "base"}, "edits": [edit]}))
        assert run("apply", "m.json", "-o", "out", "--check", "off", "--quiet")[0] == 0
        shard = place / "out" / "model.safetensors"
        data = bytearray(shard.read_bytes())
        data[-12:-8] = b"\x01\x02\x03\x04"
        data[-4:] = b"\x01\x02\x03\x04"
        data[-16 + 4 : -16 + 8] = b"\x01\x02\x03\x04"
        shard.write_bytes(data)
        code, out, err = run("verify", "out", "--format", form)
        assert code == 1 and "Traceback" not in err
        assert {c for c in out + err if is_harmful(c)} == set()
        if form in ("json", "sarif"):
            json.loads(out)
        if form == "junit":
            import xml.etree.ElementTree

            xml.etree.ElementTree.fromstring(out)
        if form == "github":
            assert all(line.startswith(("::", "verified", "proved")) or not line for line in out.splitlines()), out
            assert out.count("\n::") + out.startswith("::") == len([x for x in out.splitlines() if x.startswith("::")])
