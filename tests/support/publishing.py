"""What the tests of publishing share: a base on a Hub and a patched copy of it on this machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from checkpoints import HIDDEN, down, tensor, write_llama
from huggingface_hub import snapshot_download

import swsurgery
from swsurgery.cli import main
from swsurgery.editing.check_options import CheckOptions

BASE, NEW = "org/base", "org/edited"
OWN = {"swsurgery.json", "manifest.yaml", "SHA256SUMS", "README.md"}
"""Files that are made for the repository."""

CARD = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [small]\n---\n# Base\n\n<b>bold</b>\n"
EDIT = f"{{op: zero, tensor: {down(1)}, index: [2, 3]}}"
PROTECT = f"{{op: protect, tensor: {down(0)}, index: [0, 1]}}"


def write_base(folder: Path, *, rows: int = 2000) -> Path:
    """A checkpoint in three shards whose last holds a further tensor, so that bytes can be told from requests."""
    write_llama(folder, extra={"model.extra.weight": tensor("F32", rows, HIDDEN, seed=9)})
    (folder / "README.md").write_text(CARD)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (folder / "assets" / "empty").unlink()
    (folder / "assets").rmdir()
    return folder


def put_base(hub, folder: Path, rows: int = 2000) -> str:
    """The base as a repository; returns its commit."""
    return hub.add_repo(BASE, write_base(folder, rows=rows))


def patch(hub, directory: Path, commit: str, edits: str = f"[{EDIT}, {PROTECT}]", name: str = "patched") -> Path:
    """`directory/name`: what a manifest makes of the base, downloaded as users do it."""
    base = Path(snapshot_download(hub.name(BASE), revision=commit))
    manifest = directory / f"{name}.yaml"
    manifest.write_text(f'version: 1\nbase: {{repo_id: {hub.name(BASE)}, revision: "{commit}"}}\nedits: {edits}\n')
    swsurgery.apply(manifest, output=directory / name, base=str(base), check=CheckOptions("weights"))
    return directory / name


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def served(hub, repo_id: str = NEW, revision: str = "main") -> dict[str, str]:
    """What a repository of any Hub gives out: path -> sha256 of the bytes that were downloaded."""
    return digests(Path(snapshot_download(hub.name(repo_id), revision=revision, force_download=True)))


def tree(hub, repo_id: str = NEW, ref: str = "refs/heads/main") -> dict[str, str]:
    """What a repository of the tests' own server shows: path -> sha256, looked up without a request."""
    commit = hub.head(repo_id, ref)
    return {path: entry.sha256 or hashlib.sha256(entry.content).hexdigest() for path, entry in commit.tree.items()}


def run(capsys, *arguments: object) -> tuple[int, dict, str]:
    """Exit code, the document on stdout, and what was said on stderr."""
    capsys.readouterr()
    code = main(["publish", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


def how(document: dict) -> dict[str, str]:
    return {file["name"]: file["how"] for file in document["plan"]["files"]}
