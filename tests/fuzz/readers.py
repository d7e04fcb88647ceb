"""The other files that somebody else may have written: index, config, manifest, record, journal.

The promise: any bytes give a value or a SwsurgeryError whose faults are lines of bounded length. What is accepted is
held against json.loads, where the file is JSON. To add a reader, add a class and its row in READERS.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import ClassVar

import checkpoints

from fuzz.documents import KEYS, SCALARS, Node, Raw, copied, damage, mutate, pick, spell, spell_yaml, tree
from swsurgery.checkpoint import journal
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.projections import locate
from swsurgery.checkpoint.record import read_record
from swsurgery.errors import SwsurgeryError
from swsurgery.manifest.load import parse_manifest
from swsurgery.manifest.schema import Manifest
from swsurgery.storage.folder import Folder
from swsurgery.storage.names import JOURNAL, OWN_FILES

LONGEST_LINE = 1000

PLACES = tuple(
    Raw(json.dumps(name))
    for name in (
        checkpoints.FIRST, checkpoints.SECOND, "missing.safetensors", "../x.safetensors", "/etc/passwd", "", ".", "..",
        checkpoints.INDEX, "config.json", "x" * 300, "a\n.safetensors", checkpoints.FIRST.upper(),
        "./" + checkpoints.FIRST,
    )
)  # fmt: skip
FIELDS = tuple(
    Raw(json.dumps(name))
    for name in (
        "weight_map", "metadata", "version", "base", "edits", "op", "layer", "row", "col", "expert", "tensor", "index",
        "known", "expect", "factor", "value", "bits", "dtype", "path", "repo_id", "sha256", "revision", "check",
        "files",
        "model_type", "hidden_size", "num_hidden_layers", "text_config", "history", "registry", "manifest", "size",
    )
)  # fmt: skip
OPERATIONS = tuple(
    Raw(json.dumps(name)) for name in ("zero", "scale", "set", "protect", "all", "BF16", "0x40bc", "shared")
)
MANIFEST = {
    "version": 1,
    "name": "fuzz",
    "base": {"path": "base", "sha256": {checkpoints.FIRST: "0" * 64}},
    "edits": [
        {"op": "zero", "layer": 1, "row": 2, "col": 3, "expect": 5.875},
        {"op": "scale", "tensor": checkpoints.down(0), "index": [1, 2], "factor": 1.5, "expect": "0x40bc"},
        {"op": "set", "layer": 0, "row": 0, "col": 0, "value": 2, "expect": {"value": 1, "dtype": "F32"}},
        {"op": "set", "layer": 0, "row": 0, "col": 1, "bits": "0x40bc"},
        {"op": "protect", "known": "all"},
    ],
    "check": {"max_perplexity_ratio": 1.05},
}

SOURCE = {"key": "super-weight", "kind": "paper", "cite": "arXiv:2411.07191", "commit": None, "note": None}
SCALAR = {
    "file": checkpoints.FIRST, "tensor": checkpoints.down(0), "index": [1, 2], "dtype": "BF16", "offset": 1024,
    "old": 1.5, "old_bits": "0x3fc0",
    "known": {"id": "L0.1.2", "status": "paper", "causal_alone": "strong", "sources": [SOURCE]},
}  # fmt: skip
RECORD = {
    "registry_version": 1,
    "swsurgery_version": "0.1.0",
    "created": None,
    "base": {"repo_id": "a/b", "revision": None, "named_by": "manifest", "weights": None},
    "files": {checkpoints.FIRST: {"size": 1216, "base_sha256": "0" * 64, "sha256": None}},
    "omitted": [],
    "edits": [SCALAR | {"op": "scale", "new": 3.0, "new_bits": "0x4040", "factor": 2.0}],
    "protected": [SCALAR],
    "known": None,
    "check": {"kind": "off", "reason": "not asked for"},
    "manifest_sha256": "0" * 64,
    "history": [{"registry": {"edits": [], "protected": []}, "manifest": "version: 1"}],
}


class Reader:
    """A target whose inputs come from one sound document, `template`."""

    name: ClassVar[str]
    template: Node

    def __init__(self, folder: Path):
        self.folder = folder

    def close(self) -> None:
        pass

    def make(self, random: Random) -> bytes:
        """One to three changes of structure, or of bytes, or both."""
        document = copied(self.template)
        for _ in range(pick(random, (0, 1, 1, 1, 2, 3))):
            mutate(random, document, SCALARS + PLACES + OPERATIONS, KEYS + FIELDS)
        content = self.spell(random, document).encode("utf-8", "surrogatepass")
        for _ in range(pick(random, (0, 0, 0, 1, 1, 3))):
            content = damage(random, content)
        return content

    def spell(self, random: Random, document: Node) -> str:
        return spell(document)

    def read(self, content: bytes) -> bool:
        """Whether what was accepted is what json.loads reads. Raises SwsurgeryError, and nothing else."""
        raise NotImplementedError

    def verdict(self, content: bytes) -> str:
        try:
            return "accepted" if self.read(content) else "different"
        except SwsurgeryError as error:
            if any("\n" in line or len(line) > LONGEST_LINE for line in error.faults):
                return "traceback: a fault is not one line of bounded length"
            return "refused"


class Index(Reader):
    name = "index"

    def __init__(self, folder: Path):
        super().__init__(folder)
        checkpoints.write_llama(folder)
        self.template = tree(json.loads((folder / checkpoints.INDEX).read_text()))

    def read(self, content: bytes) -> bool:
        (self.folder / checkpoints.INDEX).write_bytes(content)
        return open_checkpoint(self.folder).weight_map == json.loads(content)["weight_map"]


class Config(Reader):
    name = "config"
    template = tree({**checkpoints.CONFIG, "text_config": {"hidden_size": 6, "num_hidden_layers": 3}})

    def __init__(self, folder: Path):
        super().__init__(folder)
        checkpoints.write_single(folder, {checkpoints.down(0): checkpoints.tensor("F32", 6, 10)})

    def read(self, content: bytes) -> bool:
        (self.folder / "config.json").write_bytes(content)
        checkpoint = open_checkpoint(self.folder)
        locate(checkpoint.config, checkpoint.shapes, layer=0, row=1, col=2)
        return json.dumps(checkpoint.config) == json.dumps(json.loads(content))  # as text, NaN equals NaN


class ManifestJson(Reader):
    name = "manifest-json"
    template = tree(MANIFEST)

    def read(self, content: bytes) -> bool:
        manifest = parse_manifest(content, Path("m.yaml")).manifest
        try:
            value = json.loads(content, parse_constant=_no_json)
        except ValueError:
            return True  # accepted as YAML
        return manifest == Manifest.model_validate(value)


class ManifestYaml(ManifestJson):
    name = "manifest-yaml"

    def spell(self, random: Random, document: Node) -> str:
        return spell_yaml(random, document)


class RecordFile(Reader):
    name = "record"
    template = tree(RECORD)

    def __init__(self, folder: Path):
        super().__init__(folder)
        (folder / OWN_FILES[1]).write_text("version: 1\n")

    def read(self, content: bytes) -> bool:
        (self.folder / OWN_FILES[0]).write_bytes(content)
        record = read_record(Folder.at(self.folder)).record
        return record.model_dump(mode="json", exclude_unset=True) == json.loads(content)


class JournalFile(Reader):
    """The journal's digest is made to fit in most inputs, or nothing else would be tried."""

    name = "journal"

    def __init__(self, folder: Path):
        super().__init__(folder)
        checkpoints.write_llama(folder)
        shard = folder / checkpoints.FIRST
        self._shard = shard.read_bytes()
        status = shard.stat()
        places = [{"offset": 200, "old": self._shard[200:202].hex()}, {"offset": 210, "old": "0000"}]
        self.template = tree(
            {
                "version": 1,
                "reverts": False,
                "inode": folder.stat().st_ino,
                "files": {checkpoints.FIRST: {"inode": status.st_ino, "size": status.st_size, "places": places}},
                "own": {name: None for name in OWN_FILES},
            }
        )

    def make(self, random: Random) -> bytes:
        body = super().make(random) + b"\n"
        return body + (hashlib.sha256(body).hexdigest().encode() if random.random() < 0.95 else b"0" * 64) + b"\n"

    def read(self, content: bytes) -> bool:
        (self.folder / JOURNAL).write_bytes(content)
        try:
            return journal.recover(Folder.at(self.folder)) and not (self.folder / JOURNAL).exists()
        finally:
            (self.folder / JOURNAL).unlink(missing_ok=True)
            for name in OWN_FILES:
                (self.folder / name).unlink(missing_ok=True)


def _no_json(text: str) -> None:
    raise ValueError(text)


READERS: tuple[Callable[[Path], Reader], ...] = (Index, Config, ManifestYaml, ManifestJson, RecordFile, JournalFile)
