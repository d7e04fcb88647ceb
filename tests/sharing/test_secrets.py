"""No token and no private key appears in what a command prints or writes, errors and tracebacks included.

Tokens lie where huggingface_hub looks for them: in the environment and in files.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import down, write_llama, write_manifest

CANARIES = {
    "HF_TOKEN": "hf_CanaryInTheEnvironmentAaBbCcDd01",
    "HUGGING_FACE_HUB_TOKEN": "hf_CanaryOfTheOldVariableEeFfGg02",
    "file": "hf_CanaryInTheTokenFileHhIiJjKkLl03",
    "stored": "hf_CanaryAmongStoredTokensMmNnOo04",
    "netrc": "hf_CanaryInTheNetrcFilePpQqRrSs05",
}

WHERE_SECRETS_LIE = ("token", "stored_tokens", ".netrc", "key.pem")

RUN = """
import json, sys
from swsurgery.cli import main
codes = []
for arguments in json.loads(sys.argv[1]):
    print("\\n$", *arguments, flush=True)
    codes.append(main(arguments))
print("\\n" + json.dumps(codes))
"""

MISSING = "hf://canary-org/not-downloaded@" + "0" * 40

SUCCEED = [
    ["apply", "manifest.yaml", "--dry-run"],
    ["apply", "manifest.yaml", "-o", "out", "--check", "weights"],
    ["verify", "out"],
    ["verify", "out", "--base", "base"],
    ["lookup", "llama-7b"],
    ["lookup", "./out"],
    ["inspect", "out"],
    ["inspect", "out", "--tensor", down(1), "--at", "1,2"],
    ["revert", "out", "-o", "back"],
    ["schema"],
]
FAIL = [
    ["scan", "base", "--method", "weights"],  # too small to have any
    ["diff", "base", "out"],  # says no, and names what differs
    ["apply", "manifest.yaml", "--base", MISSING, "-o", "new"],
    ["apply", "manifest.yaml", "--base", "hf://canary-org/not-downloaded", "--dry-run"],
    ["apply", "manifest.yaml", "--base", "hf://no such/../name", "--dry-run"],
    ["apply", "remote.yaml", "-o", "new"],
    ["apply", "broken.yaml", "-o", "new"],
    ["apply", "absent.yaml", "-o", "new"],
    ["apply", "manifest.yaml", "-o", "out"],
    ["scan", MISSING, "--method", "weights"],
    ["scan", "absent", "--method", "weights"],
    ["sweep", "remote.yaml", "--factors", "0,1"],
    ["check", "absent"],
    ["verify", "base"],
    ["verify", "out", "--base", "absent"],
    ["lookup", "no-such-model"],
    ["inspect", "out", "--tensor", "nope"],
    ["diff", "base", "absent"],
    ["revert", "base", "-o", "new"],
    ["revert", "out", "-o", "base"],
]


@pytest.fixture
def directory(tmp_path) -> Path:
    """Base and manifests, and a home in which every canary lies."""
    write_llama(tmp_path / "work" / "base")
    edit = {"op": "zero", "tensor": down(1), "index": [1, 2]}
    write_manifest(tmp_path / "work" / "manifest.yaml", Path("base"), edit)
    write_manifest(tmp_path / "work" / "remote.yaml", {"repo_id": "canary-org/none", "revision": "1" * 40}, edit)
    (tmp_path / "work" / "broken.yaml").write_text("version: 1\nbase: {path: base}\nedits: [{op: nope}]\n")
    home = tmp_path / "home" / "huggingface"
    home.mkdir(parents=True)
    (home / "token").write_text(CANARIES["file"])
    (home / "stored_tokens").write_text(f"[canary]\nhf_token = {CANARIES['stored']}\n")
    (tmp_path / "home" / ".netrc").write_text(f"machine huggingface.co login x password {CANARIES['netrc']}\n")
    return tmp_path / "work"


def searched(directory: Path, code: str, *arguments: str) -> tuple[str, bytes]:
    """Run a program among the canaries. Returns (its stdout, all that it printed and wrote)."""
    home = directory.parent / "home"
    environment = {
        **os.environ, "HOME": str(home), "HF_HOME": str(home / "huggingface"),
        "XDG_CACHE_HOME": str(directory / "cache"), "XDG_DATA_HOME": str(directory / "data"),
        **{k: v for k, v in CANARIES.items() if k.isupper()},
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=directory, env=environment, capture_output=True, timeout=300
    )
    files = [p for p in directory.parent.rglob("*") if p.is_file() and not p.is_relative_to(home)]
    left = [p for p in home.rglob("*") if p.is_file() and p.name not in WHERE_SECRETS_LIE]
    written = b"\0".join(str(p).encode() + b"\0" + p.read_bytes() for p in (*files, *left))
    return done.stdout.decode(), b"\0".join((done.stdout, done.stderr, written))


def spellings(secret: str) -> list[bytes]:
    """A secret as it is, and as the usual encodings write it; the middle of it, so that a cut does not hide it."""
    middle = secret[3:-3].encode()
    encoded = [base64.b64encode(secret.encode()[i:])[4:-4] for i in range(3)]
    return [middle, middle.lower(), middle.upper(), middle[::-1], middle.hex().encode(), *encoded]


def found(haystack: bytes, secrets: list[str]) -> list[str]:
    return [secret for secret in secrets if any(s in haystack for s in spellings(secret))]


@pytest.mark.parametrize("options", [[], ["--json"], ["--debug"]], ids=["text", "json", "debug"])
def test_no_output_and_no_file_holds_a_token(directory, options):
    commands = [c if c == ["schema"] else [*c, *options] for c in SUCCEED + FAIL]
    stdout, everything = searched(directory, RUN, json.dumps(commands))
    codes = json.loads(stdout.splitlines()[-1])
    assert codes[: len(SUCCEED)] == [0] * len(SUCCEED)
    assert all(code in (1, 2) for code in codes[len(SUCCEED) :]), codes
    assert b"SHA256SUMS" in everything and b"not in the local Hugging Face cache" in everything
    assert (b"Traceback" in everything) == (options == ["--debug"])
    assert found(everything, list(CANARIES.values())) == []


def test_no_output_and_no_file_holds_the_private_key(directory):
    pytest.importorskip("model_signing")
    from keys import write_keys

    key = write_keys(directory.parent / "home")
    sign = ["sign", "base", "--key", str(key), "--debug"]
    commands = [sign, sign, ["sign", "absent", *sign[2:]]]  # signed; signed already; nothing there
    stdout, everything = searched(directory, RUN, json.dumps(commands))
    assert json.loads(stdout.splitlines()[-1]) == [0, 2, 2]
    assert b"dsseEnvelope" in everything, "the signature was searched too"
    assert found(everything, [key.read_text().splitlines()[1]]) == []


@pytest.mark.parametrize(
    "code",
    [
        "import os; print(os.environ['HF_TOKEN'])",
        "import os, sys; print(dict(os.environ), file=sys.stderr)",
        "import os; open('leak', 'w').write(os.environ['HUGGING_FACE_HUB_TOKEN'][2:-2])",
        "import os, base64; print(base64.b64encode(b'Bearer ' + os.environ['HF_TOKEN'].encode()))",
        "import os, shutil; shutil.copy(os.environ['HF_HOME'] + '/token', os.environ['HF_HOME'] + '/copy')",
        "import huggingface_hub; print(huggingface_hub.get_token())",
    ],
)
def test_a_leak_would_be_found(directory, code):
    assert found(searched(directory, code)[1], list(CANARIES.values()))
