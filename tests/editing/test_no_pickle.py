"""No code out of a file is ever run: nothing unpickles, evaluates or trusts code from a repository.

Read from the sources, and asked of a process that runs the commands.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import down, write_llama, write_manifest

import swsurgery

PACKAGE = Path(swsurgery.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "copyreg"}
STARTERS = {"subprocess", "multiprocessing", "pty", "code", "codeop", "runpy"}
EVALUATORS = {"eval", "exec", "compile", "__import__"}
LOADERS = {
    "torch.load", "np.load", "numpy.load", "pandas.read_pickle", "os.system", "os.popen", "os.execv", "os.execvp",
    "os.execve", "os.fork", "os.posix_spawn", "os.spawnv", "yaml.load", "yaml.unsafe_load",
}  # fmt: skip
TRUSTING = {"from_pretrained", "from_config"}
ALLOWED = {"model/tokenizer.py": ["imports subprocess"], "model/tokenizer_child.py": ["calls os.fork"]}
"""They start this package's own program, which runs a checkpoint's tokenizer under limits."""


def faults(source: str) -> Iterator[str]:
    """What a source does that could run code from a file; `re.compile` and a manifest's own loader are not meant."""
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (f"imports {m}" for m in modules if m.split(".")[0] in UNPICKLERS | STARTERS or m in LOADERS)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in EVALUATORS | LOADERS:
                yield f"calls {called}"
            keywords = {k.arg: k.value for k in node.keywords}
            trust = keywords.get("trust_remote_code")
            if called.split(".")[-1] in TRUSTING and (trust is None or not _is_false(trust)):
                yield f"calls {called} without trust_remote_code=False"
            if trust is not None and not _is_false(trust):
                yield f"trusts remote code in {called}"
            if "allow_pickle" in keywords or "weights_only" in keywords:
                yield f"loads a pickle with {called}"
            if called.endswith(".YAML") or called == "YAML":
                kind = keywords.get("typ")
                if not (isinstance(kind, ast.Constant) and kind.value in ("rt", "safe", "pure")) and kind is not None:
                    yield f"reads YAML as {ast.unparse(kind)}"


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_source_runs_code_from_a_file(path):
    assert list(faults(path.read_text())) == ALLOWED.get(path.relative_to(PACKAGE).as_posix(), [])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import shelve",
        "import marshal as m",
        "eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=trust)",
        "load(path, trust_remote_code=1)",
        "os.system('ls')",
        "import subprocess",
        "YAML(typ='unsafe')",
    ],
)
def test_what_runs_code_would_be_seen(source):
    assert list(faults(source))


@pytest.mark.parametrize(
    "source", ["re.compile('a')", "import json", "AutoModel.from_config(c, trust_remote_code=False)"]
)
def test_what_runs_none_is_not(source):
    assert list(faults(source)) == []


WATCHED = """
import sys
opened, ran = [], []

def watch(event, arguments):
    if event in ("pickle.find_class", "marshal.loads", "subprocess.Popen", "os.system", "os.exec", "socket.__new__"):
        frame = sys._getframe(1)
        if not frame.f_code.co_filename.startswith("<frozen importlib"):  # compiled modules are marshalled
            ran.append(event)

sys.addaudithook(watch)
from swsurgery.cli import main
code = main(sys.argv[1:])
import json
loaded = sorted({n.split(".")[0] for n in sys.modules} & {"dill", "cloudpickle", "joblib", "shelve", "torch"})
print(json.dumps({"code": code, "ran": ran, "loaded": loaded}), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A base whose config.json names code, with the code and a pickle beside it; both leave a file when they run."""
    directory = tmp_path_factory.mktemp("no-pickle")
    trap = directory / "sprung"
    base = write_llama(
        directory / "base", config={"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    )
    (base / "evil.py").write_text(f"open({str(trap)!r}, 'w')\n")
    pickled = f"cbuiltins\nopen\n(S{str(trap)!r}\nS'w'\ntR."
    (base / "training_args.bin").write_text(pickled)
    (base / "optimizer.pt").write_text(pickled)
    write_manifest(directory / "manifest.yaml", base, {"op": "zero", "tensor": down(1), "index": [1, 2]})
    return directory


def watched(directory: Path, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments], cwd=directory, capture_output=True, text=True, timeout=300,
        env={**os.environ, "XDG_CACHE_HOME": str(directory / "cache")},
    )  # fmt: skip
    return json.loads(done.stderr.splitlines()[-1])


def test_the_trap_springs_when_it_is_loaded(directory):
    """The twin of the test below."""
    code = "import pickle, sys\npickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", code, str(directory / "base" / "optimizer.pt")], check=True)
    assert (directory / "sprung").exists()
    (directory / "sprung").unlink()


def test_no_command_loads_what_lies_beside_the_weights(directory):
    for arguments, code in (
        (("apply", "manifest.yaml", "-o", "patched", "--check", "weights", "--quiet"), 0),
        (("verify", "patched", "--quiet"), 0),
        (("inspect", "patched", "--quiet"), 0),
        (("diff", "base", "patched", "--quiet"), 1),
        (("lookup", "./patched", "--quiet"), 0),
        (("revert", "patched", "-o", "back", "--quiet"), 0),
    ):
        assert watched(directory, *arguments) == {"code": code, "ran": [], "loaded": []}, arguments
    assert not (directory / "sprung").exists()
    assert (directory / "back" / "optimizer.pt").read_bytes() == (directory / "base" / "optimizer.pt").read_bytes()
