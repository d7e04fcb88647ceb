"""One word has one meaning: the names of classes, constants and functions, and the word *registry*."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import swsurgery

PACKAGE = Path(swsurgery.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}

VERBS = frozenset({
    "add", "allocate", "apply", "assemble", "build", "cast", "check", "choose", "classify", "clone", "collect",
    "combine", "compare", "complete", "compute", "confirm", "convert", "copy", "count", "create", "cut", "decide",
    "decode", "describe", "diff", "disable", "divide", "download", "draft", "draw", "drop", "encode", "end",
    "escape", "expect", "explain", "export", "fence", "fetch", "fill", "find", "forget", "format", "gather", "generate",
    "get", "group", "guard", "hash", "hide", "identify", "inspect", "join", "lint", "list", "load", "locate",
    "lock", "look", "lookup", "make", "measure", "merge", "move", "name", "normalise", "open", "order", "overlay",
    "pack", "parse", "pick", "pin", "plan", "plot", "pluralise", "point", "prepare", "print", "publish", "quote",
    "read", "recognise", "recover", "redact", "refuse", "remove", "rename", "render", "replace", "report",
    "require", "reserve", "resolve", "restore", "restrict", "revert", "round", "run", "save", "say", "scale",
    "scan", "scatter", "score", "select", "serve", "set", "show", "sign", "sort", "split", "stage", "start", "stop",
    "stream", "suggest", "summarise", "survey", "sweep", "sync", "unpack", "verify", "work", "write",
})  # fmt: skip
"""First words of the names of functions: verbs in the imperative. `lookup` is the name of a command."""

PREDICATES = frozenset({"can", "has", "is", "may", "needs"})
"""First words of the names of functions that return a bool."""

OTHER_NAMES = {
    "main": "the name that Python programs use",
    "entry": "the entry point of the command",
    "command": "the decorator of commands",
    "table_command": "the decorator of commands whose result is a table",
    "schema": "the name of a command",
    "preflight": "the name of a command",
    "recipe": "the name of a command",
    "held": "the context manager by which every public function opens a directory",
    "held_for_editing": "the same, for an edit in place",
    "patched_state_dict": "a public function named like torch's",
}
"""Functions that are not named by a verb, and why."""

BARE = frozenset({
    "done", "fitted", "known", "local", "made", "named", "place", "said", "same", "shown", "sound", "stated",
    "taken", "told",
})  # fmt: skip
"""Participles, adjectives and nouns that name no function or method. Other participles end in -ed or -ing."""

VERBS_LIKE_PARTICIPLES = frozenset({"feed"})

REGISTRY = {
    "checkpoint/record.py": {
        "registry_version": "a key of the record",
        "registry: dict": "a key of the record: an earlier record",
        "self.registry": "the same key",
        "last.registry": "the same key",
        "registry=": "the same key",
    },
    "editing/record.py": {"registry_version": "a key of the record"},
    "verifying/against_record.py": {'"registry"': "the name of a rule"},
    "verifying/file_digests.py": {'"registry"': "the name of a rule"},
    "verifying/coded_edits.py": {'"registry"': "the name of a rule"},
    "verifying/regions.py": {'"registry"': "the name of a rule"},
    "verifying/findings.py": {'"registry"': "the name of a rule"},
    "verifying/rule_help.py": {'"registry"': "the name of a rule"},
}
"""Texts that may contain the word, by module: keys of the record and a rule, whose names are permanent."""


def find_public(tree: ast.Module, kind: type[ast.ClassDef | ast.FunctionDef]) -> Iterator[str]:
    """Yield the names of the public classes or functions that a module defines."""
    return (node.name for node in tree.body if isinstance(node, kind) and not node.name.startswith("_"))


def find_constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the public constants that a module defines, each with the text of its value. Type variables are none."""
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ("TypeVar", "ParamSpec"):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple):
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * len(target.elts)
                pairs = list(zip(target.elts, values, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name) and name.id.isupper() and not name.id.startswith("_"):
                    yield name.id, ast.unparse(value)


def find_misnamed(modules: Mapping[str, ast.Module]) -> list[str]:
    """List the public functions whose first word is no verb in the imperative."""
    return [
        f"{module}: {name}"
        for module, tree in modules.items()
        for name in find_public(tree, ast.FunctionDef)
        if name not in OTHER_NAMES and name.split("_")[0] not in VERBS | PREDICATES
    ]


def find_participles(modules: Mapping[str, ast.Module]) -> list[str]:
    """List the functions and methods, also private ones, that a participle or a bare noun names, except properties."""
    found = []
    for module, tree in modules.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name in OTHER_NAMES or node.name.startswith("__"):
                continue
            if any(ast.unparse(d).rpartition(".")[2] in ("property", "cached_property") for d in node.decorator_list):
                continue
            name = node.name.strip("_")
            first = name.split("_")[0]
            if name in BARE or (re.search("(ed|ing)$", first) and first not in VERBS_LIKE_PARTICIPLES):
                found.append(f"{module}:{node.lineno}: {node.name}")
    return found


def find_registry(texts: Mapping[str, str]) -> list[str]:
    """List the lines in which the word registry means something that has another name."""
    found = []
    for module, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            rest = line
            for allowed in REGISTRY.get(module, {}):
                rest = rest.replace(allowed, "")
            if re.search("registr(y|ies)", rest, re.I):
                found.append(f"{module}:{number}: {line.strip()}")
    return found


def test_no_two_public_classes_share_a_name():
    modules = defaultdict(list)
    for module, tree in MODULES.items():
        for name in find_public(tree, ast.ClassDef):
            modules[name].append(module)
    assert {name: found for name, found in modules.items() if len(found) > 1} == {}


def test_no_public_constant_is_defined_in_two_modules():
    """So no name has two values."""
    values = defaultdict(list)
    for module, tree in MODULES.items():
        for name, value in find_constants(tree):
            values[name].append(f"{module}: {value}")
    assert {name: found for name, found in values.items() if len(found) > 1} == {}
    assert len(values) > 100


def test_functions_are_named_by_verbs_in_the_imperative():
    assert find_misnamed(MODULES) == []


def test_no_function_is_named_by_a_participle_or_a_bare_noun():
    assert find_participles(MODULES) == []


def test_every_exception_is_a_function():
    assert (
        OTHER_NAMES.keys() - {name for tree in MODULES.values() for name in find_public(tree, ast.FunctionDef)} == set()
    )


def test_the_record_is_not_called_a_registry():
    suffixes = {".py", ".toml", ".txt", ".json"}
    texts = {p.relative_to(PACKAGE).as_posix(): p.read_text() for p in PACKAGE.rglob("*") if p.suffix in suffixes}
    assert find_registry(texts) == []
    for module, allowed in REGISTRY.items():
        for text in allowed:
            assert text in texts[module], f"{module} has no {text} any more"


@pytest.mark.parametrize(
    ("source", "misnamed", "participle"),
    [
        ("def told(): ...", True, True),
        ("def place(): ...", True, True),
        ("def _listed(): ...", False, True),
        ("class A:\n    def swapped(self): ...", False, True),
        ("class A:\n    @property\n    def swapped(self): ...", False, False),
        ("def bounds_of(): ...", True, False),
        ("def read_record(): ...", False, False),
        ("def is_there(): ...", False, False),
    ],
)
def test_bad_names_are_found(source, misnamed, participle):
    modules = {"module.py": ast.parse(source)}
    assert (find_misnamed(modules) != [], find_participles(modules) != []) == (misnamed, participle)


def test_a_constant_with_two_values_is_found():
    assert [*find_constants(ast.parse("A, B = 1, 2\nC: int = 3\n_D = 4\nT = TypeVar('T')\n"))] == [
        ("A", "1"),
        ("B", "2"),
        ("C", "3"),
    ]
    assert find_registry({"a.py": "the registry\nregister\n", "verifying/findings.py": 'Rule("registry")\n'}) == [
        "a.py:1: the registry"
    ]
