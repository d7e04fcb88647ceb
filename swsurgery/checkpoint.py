"""A checkpoint on disk: which files it has, which of them hold the weights, and whether they agree.

Knows single files, shards with an index, and snapshots of the Hugging Face cache (whose files are links
into `blobs/`, read only). Reads headers and small JSON files; never tensor data, and writes nothing, except that
it has an edit in place that was cut off undone first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, get_args

from swsurgery import fsops, journal
from swsurgery.arguments import require_choice
from swsurgery.copies import has_weights_of, named_as_copy
from swsurgery.errors import AmbiguousWeights, CheckpointError
from swsurgery.jsonfile import read_config, read_json
from swsurgery.names import SHARD_NAME, WORKING_FILES
from swsurgery.quantised import Quantisation
from swsurgery.shard import Place, Remote, Shard, TensorInfo, open_shard, quoted

INDEX_SUFFIX = ".safetensors.index.json"

LEFT_OUT = (".git", ".cache", "model.sig")
"""Top-level names that are no part of a checkpoint: folders of download and version control tools, and the
signature, which covers these files and no others."""

Weights = Literal["index", "single"]
"""Which of two sets of weights: the shards of an index, or model.safetensors."""

MAX_LISTED = 20

MAX_TENSORS, TENSORS_WITHOUT_DATA = 1 << 18, 50_000
"""In one checkpoint; the second where it holds less than 4 KiB for each. DeepSeek-V3 has 91,991 of 7 MB on average."""


@dataclass(frozen=True)
class BaseFile:
    """One file of a checkpoint. `name` is relative with forward slashes; `path` is the regular file to open
    (inside `blobs/` for a cache snapshot), or what reads it from afar; `digest` is the sha256 where the cache or the
    Hub vouches for it. `mtime_ns` is that of a file here when it was listed: with the size it tells whether what is
    opened later is still the same."""

    name: str
    path: Place
    size: int
    digest: str | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Every file of a checkpoint and the headers of its shards.

    `weight_map` says for each tensor in which shard loaders will look for it. `copies` are further copies of
    the weights beside the shards. `disagreements` maps a tensor to what index and shards say differently of it.
    """

    root: Path | Repository
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
    sub: str = ""

    def info(self, tensor: str) -> TensorInfo:
        """The header's entry of a tensor of the weight_map. Raises KeyError."""
        return self.shards[self.weight_map[tensor]].tensors[tensor]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored shape of every tensor that the weight_map and the shards agree on."""
        return {t: self.info(t).shape for t in self.weight_map if t not in self.disagreements}

    @cached_property
    def quantisation(self) -> Quantisation:
        """What the stored numbers of each tensor are: plain weights, codes, or internals of a quantiser."""
        tensors: dict[str, TensorInfo] = {}
        for shard in self.shards.values():
            tensors |= shard.tensors
        tensors |= {t: self.info(t) for t in self.shapes}
        return Quantisation(
            tensors, self.config, (f.name for f in self.files), (shard.metadata for shard in self.shards.values())
        )

    @cached_property
    def choice(self) -> Weights | None:
        """Which weights these are where an index and a single file are there; None where there was no choice."""
        names = {f.name for f in self.files}
        if "model.safetensors" not in names or not any("/" not in n and n.endswith(INDEX_SUFFIX) for n in names):
            return None
        return "index" if self.index_name else "single"

    def file(self, name: str) -> BaseFile:
        return next(f for f in self.files if f.name == name)


class Repository(Protocol):
    """A checkpoint that is elsewhere, at one commit; its files are read by ranges."""

    repo_id: str
    commit: str
    sub: str
    files: Mapping[str, Remote]


def open_checkpoint(
    root: Path | Repository,
    weights: Weights | None = None,
    *,
    editing: bool = False,
    elsewhere: Collection[str] = (),
) -> Checkpoint:
    """Open the checkpoint in directory `root`, or the one of a repository.

    `weights` chooses where both an index and a single file are there. `editing` is for the run that is editing it in
    place; any other finds the old bytes put back. Shards named in `elsewhere` need not be there.

    Raises CheckpointError (ShardError for a malformed shard) with every fault found, AmbiguousWeights where both are
    there and none was chosen; TargetError while another run is editing it in place; HubError.
    """
    require_choice("weights", weights, get_args(Weights), optional=True)
    if isinstance(root, Path):
        root = Path(os.path.realpath(root))
        if not root.is_dir():
            if not root.exists():
                raise CheckpointError("no such checkpoint", root)
            raise CheckpointError("a checkpoint is a directory", root, "give the directory that holds this file")
        in_cache = is_cache_snapshot(root)
        if not in_cache and not editing:
            journal.recover(root)
        files, left_out = _list_files(root, in_cache)
        repo_id, revision, sub = _cache_identity(root) if in_cache else (None, None, "")
    else:
        in_cache, repo_id, revision, sub = False, root.repo_id, root.commit, root.sub
        files, left_out = _files_of(root)
    names = {f.name: f for f in files}
    index_name, shard_names, weight_map, total = _find_weights(root, names, weights, elsewhere)
    shard_names = [name for name in shard_names if name in names]
    faults, shards = [], {}
    size = sum(names[name].size for name in shard_names)
    for name, shard in _headers([names[name] for name in shard_names], afar=not isinstance(root, Path)):
        if isinstance(shard, CheckpointError):
            faults += shard.faults
            continue
        shards[name] = shard
        _refuse_too_many(sum(len(shard.tensors) for shard in shards.values()), size, root)
    if faults:
        raise CheckpointError.of(_some(faults))
    disagreements: dict[str, str] = {}
    if index_name is None:
        weight_map = {tensor: name for name, shard in shards.items() for tensor in shard.tensors}
    else:
        weight_map = {tensor: name for tensor, name in weight_map.items() if name in shard_names}
        disagreements = _disagreements(index_name, weight_map, shards)
    notes = []
    stored = sum(shard.size - shard.data_start for shard in shards.values())
    if total is not None and total != stored and not elsewhere:
        notes.append(f"{index_name} says total_size {total}, the shards hold {stored} bytes")
    config = read_config(names["config.json"].path, "config.json") if "config.json" in names else {}
    copies = _copies([f for f in files if f.name not in shard_names and f.name != index_name], shards, root)
    return Checkpoint(
        root, files, shards, weight_map, index_name, config, copies, left_out, disagreements, tuple(notes),
        repo_id, revision, in_cache, sub,
    )  # fmt: skip


@contextlib.contextmanager
def held(root: Path | Repository) -> Iterator[Path | Repository]:
    """Keep others from editing a directory in place while it is read; one that was cut off is undone first.

    Raises TargetError while another run is editing it.
    """
    if isinstance(root, Path) and root.is_dir():
        real = Path(os.path.realpath(root))
        if not is_cache_snapshot(real):
            journal.recover(real)  # before the lock, which would keep ourselves from it
        with fsops.locked(root, exclusive=False):
            yield root
    else:
        yield root  # and let whoever opens it say what is wrong


def is_cache_snapshot(root: Path) -> bool:
    """Whether `root` is a snapshot folder of a Hugging Face cache, where files are links into `blobs/`, or in one."""
    return _snapshot(root) is not None


def _snapshot(root: Path) -> Path | None:
    """The snapshot folder that `root` is or lies in."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
            return folder
    return None


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
                status = entry.stat(follow_symlinks=False)
                files.append(BaseFile(name, Path(entry.path), status.st_size, mtime_ns=status.st_mtime_ns))
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
    repo = Path(os.path.realpath(_snapshot(root).parent.parent))
    blob = Path(os.path.normpath(link.parent / os.readlink(link)))
    real = Path(os.path.realpath(link))
    hexadecimal = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name)
    within = Path(os.path.realpath(blob.parent)) == repo / "blobs"
    shared = re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{64}", os.path.relpath(real, repo.parent / "blobs"))
    if not (hexadecimal and within and (real == repo / "blobs" / blob.name or shared)):
        raise CheckpointError(f"links to a place outside its own cache: {name}")
    if not real.is_file():
        raise CheckpointError(f"is not fully downloaded: {name}")
    status = real.stat()
    return BaseFile(name, real, status.st_size, blob.name if len(blob.name) == 64 else None, status.st_mtime_ns)


def _cache_identity(root: Path) -> tuple[str | None, str | None, str]:
    """(repo_id, commit, folder in the repository) of a snapshot."""
    snapshot = _snapshot(root)
    kind, _, rest = snapshot.parent.parent.name.partition("--")
    repo_id = rest.replace("--", "/") if kind == "models" else None
    sub = "" if root == snapshot else root.relative_to(snapshot).as_posix()
    return repo_id, snapshot.name if re.fullmatch(r"[0-9a-f]{40}", snapshot.name) else None, sub


def _headers(files: list[BaseFile], afar: bool) -> Iterator[tuple[str, Shard | CheckpointError]]:
    """Each file's header, or what is wrong with it. Those of a repository are a round trip each, so several at a
    time."""

    def header(file: BaseFile) -> tuple[str, Shard | CheckpointError]:
        try:
            return file.name, open_shard(file.path)
        except CheckpointError as error:
            return file.name, error

    if afar:
        with ThreadPoolExecutor(8) as pool:
            yield from pool.map(header, files)
    else:
        yield from map(header, files)


def _copies(others: list[BaseFile], shards: dict[str, Shard], root: Path | Repository) -> tuple[str, ...]:
    """The names of the files that hold the weights once more. A header that cannot be read tells of none."""
    found = {file.name for file in others if named_as_copy(file.name)}
    unclear = [f for f in others if f.name not in found and f.name.lower().endswith(".safetensors")]
    for name, header in _headers(unclear, afar=not isinstance(root, Path)):
        if isinstance(header, Shard) and has_weights_of(shards.values(), header):
            found.add(name)
    return tuple(sorted(found))


def _files_of(repo: Repository) -> tuple[tuple[BaseFile, ...], tuple[str, ...]]:
    """The files that a repository lists, sorted by name, and the top-level folders left out."""
    faults = [f"has a name that cannot be printed: {name!r}" for name in repo.files if not name.isprintable()]
    if faults:
        raise CheckpointError.of(f"{fault} in {repo}" for fault in _some(sorted(faults)))
    left_out = {name.split("/")[0] for name in repo.files if "/" in name} & set(LEFT_OUT)
    return tuple(
        BaseFile(name, file, file.size, file.sha256)
        for name, file in sorted(repo.files.items())
        if name.split("/")[0] not in left_out and name not in WORKING_FILES
    ), tuple(sorted(left_out))  # fmt: skip


def _find_weights(
    root: Path | Repository, names: dict[str, BaseFile], weights: str | None, elsewhere: Collection[str] = ()
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
        raise AmbiguousWeights(
            f"two sets of weights, {singles[0]} and {indices[0]}: transformers loads the first, vLLM and mergekit "
            "the second", root, "say which, single or index: base.weights in a manifest, or the option --weights",
        )  # fmt: skip
    if weights == "index" and not indices or weights == "single" and not singles:
        raise CheckpointError(f"base.weights says {weights}, which is not there", root)
    if singles and weights != "index":
        return None, singles, {}, None
    return _read_index(root, names, indices[0], elsewhere)


def _read_index(
    root: Path | Repository, names: dict[str, BaseFile], index_name: str, elsewhere: Collection[str]
) -> tuple[str, list[str], dict[str, str], Any]:
    index = read_json(names[index_name].path, index_name)
    weight_map = index.get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError("has no weight_map", index_name)
    _refuse_too_many(len(weight_map), sum(file.size for file in names.values()), index_name)
    faults = []
    for shard in dict.fromkeys(json.dumps(v) if type(v) is not str else v for v in weight_map.values()):
        if not SHARD_NAME.fullmatch(shard):
            faults.append(
                f"index points to {quoted(shard)}, which is no plain name of a safetensors file: {index_name}"
            )
        elif shard not in names and shard not in elsewhere:
            faults.append(f"missing shard: {root}/{shard} (the download is not complete)")
    if faults:
        raise CheckpointError.of(_some(faults))
    shard_names = sorted(set(weight_map.values()))
    metadata = index.get("metadata")
    total = metadata.get("total_size") if type(metadata) is dict else None
    return index_name, shard_names, weight_map, total


def _refuse_too_many(tensors: int, size: int, where: object) -> None:
    limit = max(TENSORS_WITHOUT_DATA, min(MAX_TENSORS, size >> 12))
    if tensors > limit:
        raise CheckpointError(f"more than the {limit} tensors accepted in a checkpoint of {size} bytes", where)


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
