"""Which room may import what, read from the sources; and what a command really loads, asked of a process."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
from patched import write_patched

import swsurgery

PACKAGE = Path(swsurgery.__file__).parent
SOURCES = {
    ".".join(["swsurgery", *p.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
}
WALLS = {
    "torch": ("swsurgery.model", "swsurgery.scanning"),
    "transformers": ("swsurgery.model",),
    "lm_eval": ("swsurgery.model.tasks",),
    "huggingface_hub": ("swsurgery.hub",),
    "typer": ("swsurgery.cli",),
    "tqdm": ("swsurgery.cli.progress_bar",),
    "matplotlib": ("swsurgery.scanning.figures",),
    "datasets": ("swsurgery.model.text",),
    "gguf": ("swsurgery.checkpoint.layouts.gguf",),
}


LEVELS = {
    "_version": 0,
    "errors": 1,
    "progress": 1,
    "threads": 1,
    "storage": 2,
    "hub": 2,
    "checkpoint": 3,
    "manifest": 3,
    "rewriting": 3,
    "model": 4,
    "known": 4,
    "editing": 5,
    "scanning": 6,
    "verifying": 6,
    "sharing": 7,
    "cli": 8,
    "__main__": 9,
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a source imports, inside functions and for the type checker too.

    `from package import module` names the module alone: loading it runs nothing of its neighbours.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in SOURCES else node.module


def level(module: str) -> int:
    """Return the level of a module of the package; only the package itself imports from all of them."""
    parts = module.split(".")
    return LEVELS[parts[1]] if len(parts) > 1 else max(LEVELS.values()) + 1


IMPORTS = {module: set(imports(ast.parse(path.read_text()))) for module, path in SOURCES.items()}


def test_packages_import_only_packages_below_them():
    upward = {
        f"{module} -> {used}"
        for module, names in IMPORTS.items()
        for used in names & SOURCES.keys()
        if module.split(".")[1:2] != used.split(".")[1:2] and level(used) >= level(module)
    }
    assert upward == set()


def test_the_proof_from_the_record_knows_nothing_of_editing():
    seen, left = set(), {"swsurgery.verifying.against_record"}
    while left:
        module = left.pop()
        seen.add(module)
        left |= IMPORTS[module] & SOURCES.keys() - seen
    assert {m for m in seen if m.startswith("swsurgery.editing")} == set()


@pytest.mark.parametrize("library", WALLS)
def test_a_library_is_imported_in_its_packages_only(library):
    users = {module for module, names in IMPORTS.items() if any(name.split(".")[0] == library for name in names)}
    assert users, "somebody imports it"
    assert {u for u in users if not f"{u}.".startswith(tuple(f"{wall}." for wall in WALLS[library]))} == set()


def test_only_the_check_for_completeness_may_ask_a_model():
    users = {m for m, names in IMPORTS.items() if any(name.startswith("swsurgery.model") for name in names)}
    assert {user for user in users if user.startswith("swsurgery.verifying")} == {"swsurgery.verifying.complete"}


def test_no_module_imports_one_that_imports_it():
    graph = {module: (names & SOURCES.keys()) - {module} for module, names in IMPORTS.items()}
    assert "swsurgery.editing.plan" in graph["swsurgery.editing.apply"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


REPORT = """
import sys
{code}
print(sorted({{name.split(".")[0] for name in sys.modules}} & {{"torch", "transformers", "huggingface_hub", "numpy"}}))
"""


def loaded(code: str, directory: Path) -> str:
    """The heavy libraries that are loaded after `code` ran in a fresh interpreter."""
    script = REPORT.format(code=code)
    done = subprocess.run([sys.executable, "-c", script], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("imports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        write_patched(directory)
    return directory


def test_the_package_alone_loads_nothing(directory):
    assert loaded("import swsurgery", directory) == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["lookup", "llama-7b"],
        ["apply", "patched.yaml", "--dry-run"],
        ["apply", "patched.yaml", "--check", "off", "-o", "new"],
        ["verify", "patched"],
        ["verify", "patched", "--complete"],
        ["preflight", "patched"],
        ["lint", "patched.yaml"],
        ["diff", "base", "patched"],
        ["revert", "patched", "-o", "back"],
    ],
    ids=" ".join,
)
def test_a_command_without_a_model_never_loads_torch(directory, monkeypatch, arguments):
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
    code = f"from swsurgery.cli import main\nassert main({arguments!r}) in (0, 1)"
    found = loaded(code, directory)
    assert "torch" not in found and "transformers" not in found


def test_the_names_of_the_package_load_on_use_and_never_torch(directory):
    code = "import swsurgery\nfor name in swsurgery.__all__: getattr(swsurgery, name)"
    found = loaded(code, directory)
    assert "numpy" in found, "diff was really loaded"
    assert "torch" not in found and "transformers" not in found


def test_every_public_name_is_what_its_module_contains():
    for name, module in swsurgery._MODULES.items():
        found = getattr(swsurgery, name)
        assert found is getattr(import_module(f"swsurgery.{module}"), name)
        assert found.__module__ == f"swsurgery.{module}", "the name comes from the module that defines it"
    assert set(swsurgery.__all__) == {*swsurgery._MODULES, "__version__"}
    assert set(swsurgery.__all__) <= set(dir(swsurgery))


def test_no_public_name_hides_a_room():
    rooms = {module.removeprefix("swsurgery.").split(".")[0] for module in SOURCES}
    assert not rooms & set(swsurgery.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lobotomy'"):
        swsurgery.lobotomy  # noqa: B018
    with pytest.raises(ImportError):
        from swsurgery import lobotomy  # noqa: F401


def test_the_docstring_maps_every_package():
    packages = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert {package for package in packages if f"    {package} " not in swsurgery.__doc__} == set()


def test_every_level_is_of_a_package_or_module():
    names = {module.split(".")[1] for module in SOURCES if "." in module}
    assert names == LEVELS.keys()


@pytest.mark.parametrize(("missing", "said"), [("tokenizer.json", "tokenizer"), ("config.json", "config.json")])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("apply m.yaml -o out", 0),
        ("apply m.yaml -o out --check forward", 2),
        ("apply m.yaml --in-place --check forward", 2),
        ("check base", 2),
        ("check patched", 2),
        ("scan base", 2),
        ("scan base --method weights --confirm", 2),
        ("sweep m.yaml --factors 0,1", 2),
    ],
)
def test_a_model_without_these_files_is_refused_before_torch_is_loaded(
    tmp_path, monkeypatch, missing, said, words, code
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    patched = write_patched(tmp_path)
    for folder in (tmp_path / "base", patched):
        (folder / missing).unlink(missing_ok=True)
        (folder / "tokenizer_config.json").write_text("{}")
    shard = "model-00002-of-00002.safetensors"
    pin = hashlib.sha256((tmp_path / "base" / shard).read_bytes()).hexdigest()
    edits = "[{op: zero, tensor: model.norm.weight, index: [0]}]"
    manifest = f"version: 1\nbase: {{path: base, sha256: {{{shard}: {pin}}}}}\nedits: {edits}\n"
    (tmp_path / "m.yaml").write_text(manifest)
    command = f"sys.stderr = sys.stdout\nfrom swsurgery.cli import main\nassert main({words.split()!r}) == {code}"
    script = REPORT.format(code=command)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"no {said}: " in done.stdout
    assert not {"torch", "transformers"} & set(ast.literal_eval(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", sorted(m for m, path in SOURCES.items() if "\n__all__ = [" in path.read_text()))
def test_a_module_has_every_name_that_it_exports(module):
    loaded = import_module(module)
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []
