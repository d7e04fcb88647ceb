"""A checkpoint on disk: which files it has, which of them hold the weights, and whether they agree.

Knows single files, shards with an index, and snapshots of the Hugging Face cache (whose files are links
into `blobs/`, read only). Reads headers and small JSON files; never tensor data, and writes nothing, except that
it has an edit in place that was cut off undone first.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from swsurgery import journal
from swsurgery.errors import CheckpointError
from swsurgery.jsonfile import read_json
from swsurgery.names import SHARD_NAME, WORKING_FILES
from swsurgery.shard import Shard, TensorInfo, open_shard, quoted

INDEX_SUFFIX = ".safetensors.index.json"

COPIES = (
    "consolidated*.safetensors", "consolidated*.pth", "original/*", "pytorch_model*.bin", "*.gguf", "*.ggml",
    "*.onnx", "onnx/*", "tf_model*.h5", "flax_model*.msgpack", "rust_model.ot", "model*.safetensors",
    "model*.safetensors.index.json", "pytorch_model*.index.json", "coreml/*", "openvino/*", "mlx/*",
)  # fmt: skip
"""Files that hold the weights once more, in another form. An edit does not reach them."""

LEFT_OUT = (".git", ".cache")
"""Top-level folders of download and version control tools; they are no part of a checkpoint."""

MAX_LISTED = 20

MAX_TENSORS = 1 << 18
"""In one checkpoint. The largest published ones have 92,000 (FP8 with scales) to 210,000 (packed integers)."""


@dataclass(frozen=True)
class BaseFile:
    """One file of a checkpoint. `name` is relative with forward slashes; `path` is the regular file to open
    (inside `blobs/` for a cache snapshot); `digest` is the sha256 where the cache vouches for it."""

    name: str
    path: Path
    size: int
    digest: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Every file of a checkpoint and the headers of its shards.

    `weight_map` says for each tensor in which shard loaders will look for it. `copies` are further copies of
    the weights beside the shards. `disagreements` maps a tensor to what index and shards say differently of it.
    """

    root: Path
    files: tuple[BaseFile, ...]
    shards: dict[str, Shard]
    weight_map: dict[str, str]
    index_name: str | None
    config: dict[str, Any]
    copies: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    disagreements: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    repo_id: str | None = None
    revision: str | None = None
    in_cache: bool = False

    def info(self, tensor: str) -> TensorInfo:
        """The header's entry of a tensor of the weight_map. Raises KeyError."""
        return self.shards[self.weight_map[tensor]].tensors[tensor]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored shape of every tensor that the weight_map and the shards agree on."""
        return {t: self.info(t).shape for t in self.weight_map if t not in self.disagreements}

    def file(self, name: str) -> BaseFile:
        return next(f for f in self.files if f.name == name)


def open_checkpoint(
    root: Path, weights: Literal["index", "single"] | None = None, *, editing: bool = False
) -> Checkpoint:
    """Open the checkpoint in directory `root`. `weights` chooses where both an index and a single file are there.
    `editing` is for the run that is editing it in place; any other finds the old bytes put back.

    Raises CheckpointError (ShardError for a malformed shard) with every fault found; TargetError while another run is
    editing it in place.
    """
    root = Path(os.path.realpath(root))
    if not root.is_dir():
        if not root.exists():
            raise CheckpointError("no such checkpoint", root)
        raise CheckpointError("a checkpoint is a directory", root, "give the directory that holds this file")
    in_cache = is_cache_snapshot(root)
    if not in_cache and not editing:
        journal.recover(root)
    files, left_out = _list_files(root, in_cache)
    names = {f.name: f for f in files}
    index_name, shard_names, weight_map, total = _find_weights(root, names, weights)
    faults, shards = [], {}
    for name in shard_names:
        try:
            shards[name] = open_shard(names[name].path)
            _refuse_too_many(sum(len(shard.tensors) for shard in shards.values()), root)
        except CheckpointError as error:
            faults += error.faults
    if faults:
        raise CheckpointError.of(_some(faults))
    disagreements: dict[str, str] = {}
    if index_name is None:
        weight_map = {tensor: name for name, shard in shards.items() for tensor in shard.tensors}
    else:
        disagreements = _disagreements(index_name, weight_map, shards)
    notes = []
    stored = sum(shard.size - shard.data_start for shard in shards.values())
    if total is not None and total != stored:
        notes.append(f"{index_name} says total_size {total}, the shards hold {stored} bytes")
    config = read_json(names["config.json"].path, "config.json") if "config.json" in names else {}
    own = set(shard_names) | {index_name}
    copies = tuple(n for n in names if n not in own and any(fnmatch.fnmatchcase(n, p) for p in COPIES))
    repo_id, revision = _cache_identity(root) if in_cache else (None, None)
    return Checkpoint(
        root, files, shards, weight_map, index_name, config, copies, left_out, disagreements, tuple(notes),
        repo_id, revision, in_cache,
    )  # fmt: skip


def is_cache_snapshot(root: Path) -> bool:
    """Whether `root` is a snapshot folder of a Hugging Face cache, where files are links into `blobs/`."""
    return root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir()


def _list_files(root: Path, in_cache: bool) -> tuple[tuple[BaseFile, ...], tuple[str, ...]]:
    """Every regular file below root, sorted by name, and the top-level folders left out."""
    files, faults, left_out = [], [], []
    folders = [root]
    while folders:
        folder = folders.pop()
        for entry in os.scandir(folder):
            name = str(PurePosixPath(Path(entry.path).relative_to(root)))
            if not name.isprintable():
                faults.append(f"has a name that cannot be printed: {name!r}")
            elif folder == root and entry.name in WORKING_FILES:
                pass
            elif folder == root and entry.name in LEFT_OUT:
                left_out.append(name)
            elif entry.is_dir(follow_symlinks=False):
                if SHARD_NAME.fullmatch(name):
                    faults.append(f"is a directory, not a shard: {name}")
                folders.append(Path(entry.path))
            elif in_cache and entry.is_symlink():
                try:
                    files.append(_cached_file(root, Path(entry.path), name))
                except CheckpointError as error:
                    faults += error.faults
            elif entry.is_file(follow_symlinks=False):
                files.append(BaseFile(name, Path(entry.path), entry.stat(follow_symlinks=False).st_size))
            elif entry.is_symlink():
                faults.append(f"is a symbolic link: {name} (give the directory that holds the real files)")
            else:
                faults.append(f"is not a regular file: {name}")
    if faults:
        raise CheckpointError.of(f"{fault} in {root}" for fault in _some(sorted(faults)))
    return tuple(sorted(files, key=lambda f: f.name)), tuple(sorted(left_out))


def _cached_file(root: Path, link: Path, name: str) -> BaseFile:
    """A file of a cache snapshot: its link must end in the blobs of the same repo, or, since huggingface_hub 1.32,
    through those in the blob store that all repos of the cache share."""
    repo = Path(os.path.realpath(root.parent.parent))
    blob = Path(os.path.normpath(link.parent / os.readlink(link)))
    real = Path(os.path.realpath(link))
    hexadecimal = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name)
    within = Path(os.path.realpath(blob.parent)) == repo / "blobs"
    shared = re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{64}", os.path.relpath(real, repo.parent / "blobs"))
    if not (hexadecimal and within and (real == repo / "blobs" / blob.name or shared)):
        raise CheckpointError(f"links to a place outside its own cache: {name}")
    if not real.is_file():
        raise CheckpointError(f"is not fully downloaded: {name}")
    return BaseFile(name, real, real.stat().st_size, blob.name if len(blob.name) == 64 else None)


def _cache_identity(root: Path) -> tuple[str | None, str | None]:
    kind, _, rest = root.parent.parent.name.partition("--")
    repo_id = rest.replace("--", "/") if kind == "models" else None
    return repo_id, root.name if re.fullmatch(r"[0-9a-f]{40}", root.name) else None


def _find_weights(
    root: Path, names: dict[str, BaseFile], weights: str | None
) -> tuple[str | None, list[str], dict[str, str], Any]:
    """(index name or None, shard names, weight_map of the index, its total_size)."""
    indices = [n for n in names if "/" not in n and n.endswith(INDEX_SUFFIX)]
    singles = [n for n in names if n == "model.safetensors"]
    if not indices and not singles:
        loose = [n for n in names if SHARD_NAME.fullmatch(n)]
        if len(loose) != 1:
            what = f"{len(loose)} safetensors files and no index" if loose else "no safetensors file"
            raise CheckpointError(what, root, "a checkpoint has one, or several and model.safetensors.index.json")
        singles = loose
    if "model" + INDEX_SUFFIX in indices:
        indices = ["model" + INDEX_SUFFIX]
    if len(indices) > 1:
        raise CheckpointError(f"several indices: {', '.join(indices)}", root, "keep the one that loaders read")
    if indices and singles and weights is None:
        raise CheckpointError(
            f"two sets of weights, {singles[0]} and {indices[0]}: transformers loads the first, vLLM and mergekit "
            "the second", root, "say which to edit: base.weights: single or base.weights: index",
        )  # fmt: skip
    if weights == "index" and not indices or weights == "single" and not singles:
        raise CheckpointError(f"base.weights says {weights}, which is not there", root)
    if singles and weights != "index":
        return None, singles, {}, None
    return _read_index(root, names, indices[0])


def _read_index(root: Path, names: dict[str, BaseFile], index_name: str) -> tuple[str, list[str], dict[str, str], Any]:
    index = read_json(names[index_name].path, index_name)
    weight_map = index.get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError("has no weight_map", index_name)
    _refuse_too_many(len(weight_map), index_name)
    faults = []
    for shard in dict.fromkeys(json.dumps(v) if type(v) is not str else v for v in weight_map.values()):
        if not SHARD_NAME.fullmatch(shard):
            faults.append(f"index points to {quoted(shard)}, which is no plain name of a safetensors file: {index_name}")
        elif shard not in names:
            faults.append(f"missing shard: {root / shard} (the download is not complete)")
    if faults:
        raise CheckpointError.of(_some(faults))
    metadata = index.get("metadata")
    total = metadata.get("total_size") if type(metadata) is dict else None
    return index_name, sorted(set(weight_map.values())), weight_map, total


def _refuse_too_many(tensors: int, where: object) -> None:
    if tensors > MAX_TENSORS:
        raise CheckpointError(f"more than the {MAX_TENSORS} tensors accepted in a checkpoint", where)


def _disagreements(index_name: str, weight_map: dict[str, str], shards: dict[str, Shard]) -> dict[str, str]:
    homes: dict[str, list[str]] = {}
    for name, shard in shards.items():
        for tensor in shard.tensors:
            homes.setdefault(tensor, []).append(name)
    found = {}
    for tensor, named in weight_map.items():
        if named not in homes.get(tensor, ()):
            there = ", ".join(homes.get(tensor, ())) or "no shard"
            found[tensor] = f"{index_name} puts it in {named}, it is in {there}"
    for tensor, there in homes.items():
        if len(there) > 1:
            found.setdefault(tensor, f"it stands in {len(there)} shards: {', '.join(there)}")
        if tensor not in weight_map:
            found.setdefault(tensor, f"it is in {there[0]}, but {index_name} does not list it, so loaders skip it")
    return found


def _some(faults: Iterable[str]) -> list[str]:
    faults = list(faults)
    more = len(faults) - MAX_LISTED
    return faults[:MAX_LISTED] + ([f"and {more} more of these"] if more > 0 else [])
