"""Which room may import what, read from the sources; and what a command really loads, asked of a process."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
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
    "huggingface_hub": ("swsurgery.hub",),
    "typer": ("swsurgery.cli",),
    "tqdm": ("swsurgery.cli.output",),
    "matplotlib": ("swsurgery.scanning.figures",),
}


def imports(node: ast.AST) -> Iterator[str]:
    """Modules that a source names, inside functions too, but not those for the type checker only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports(child)


@pytest.mark.parametrize("library", WALLS)
def test_a_library_stays_in_its_room(library):
    users = {
        module
        for module, path in SOURCES.items()
        if any(name.split(".")[0] == library for name in imports(ast.parse(path.read_text())))
    }
    assert users, "the wall is around something"
    assert {u for u in users if not u.startswith(WALLS[library])} == set()


def test_no_room_imports_one_that_imports_it():
    graph = {}
    for module, path in SOURCES.items():
        used = {name for name in imports(ast.parse(path.read_text())) if name in SOURCES}
        graph[module] = used - {module, "swsurgery"}
    assert "swsurgery.editing.plan" in graph["swsurgery.editing.apply"]
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    assert (
        order.index("swsurgery.errors") < order.index("swsurgery.checkpoint.checkpoint") < order.index("swsurgery.cli")
    )


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


def test_every_public_name_is_what_its_room_holds():
    from swsurgery.checkpoint import diff
    from swsurgery.editing import apply
    from swsurgery.verifying import against_record

    assert swsurgery.apply_manifest is apply.apply_manifest
    assert swsurgery.verify_checkpoint is against_record.verify
    assert swsurgery.diff_checkpoints is diff.diff
    assert set(swsurgery.__all__) == {*swsurgery._PUBLIC, "__version__"}
    assert set(swsurgery.__all__) <= set(dir(swsurgery))


def test_no_public_name_hides_a_room():
    rooms = {module.removeprefix("swsurgery.").split(".")[0] for module in SOURCES}
    assert not rooms & set(swsurgery.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lobotomy'"):
        swsurgery.lobotomy  # noqa: B018
    with pytest.raises(ImportError):
        from swsurgery import lobotomy  # noqa: F401


def test_the_docstring_maps_every_room():
    rooms = {p.name if p.is_file() else f"{p.name}/" for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    helpers = {"__init__.py", "__main__.py", "__pycache__/"}
    small = {"arguments.py", "coordinate.py", "digests.py", "inspection.py", "jsonfile.py", "names.py", "progress.py",
             "report.py", "splice.py"}  # fmt: skip
    assert {room for room in rooms - helpers - small if room not in swsurgery.__doc__} == set()


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
