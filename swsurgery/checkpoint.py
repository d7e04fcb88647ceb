"""A checkpoint on disk: which files it has, which of them hold the weights, and whether they agree.

Knows single files, shards with an index, and snapshots of the Hugging Face cache (whose files are links
into `blobs/`, read only). Reads headers and small JSON files; never tensor data, and writes nothing, except that
it has an edit in place that was cut off undone first.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, get_args

from swsurgery import fsops, journal
from swsurgery.arguments import require_choice, require_type
from swsurgery.copies import look_at_others
from swsurgery.errors import CheckpointError
from swsurgery.jsonfile import read_config
from swsurgery.names import SHARD_NAME, WORKING_FILES
from swsurgery.quantised import Quantisation
from swsurgery.shard import Place, Remote, Shard, TensorInfo, open_shard
from swsurgery.threads import Pool
from swsurgery.weight_files import SINGLE, Weights, find_weights, is_index, refuse_too_many, some

LEFT_OUT = (".git", ".cache", "model.sig")
"""Top-level names that are no part of a checkpoint: folders of download and version control tools, and the
signature, which covers these files and no others."""


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
    variant: str | None = None

    def info(self, tensor: str) -> TensorInfo:
        """The header's entry of a tensor of the weight_map. Raises KeyError."""
        return self.shards[self.weight_map[tensor]].tensors[tensor]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored shape of every tensor that the weight_map and the shards agree on."""
        return {t: self.info(t).shape for t in self.weight_map if t not in self.disagreements}

    @property
    def single(self) -> str:
        """The single file that transformers would load, if it is there, before an index."""
        return f"model.{self.variant}.safetensors" if self.variant else SINGLE

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
        """Which weights these are if an index and a single file are there; None if there was no choice.

        An index that lists only that file is no second set.
        """
        names = {f.name for f in self.files}
        if self.index_name is not None:
            return "index" if self.single in names and self.single not in self.shards else None
        return "single" if self.single in self.shards and any(is_index(n, self.variant) for n in names) else None

    def file(self, name: str) -> BaseFile:
        return next(f for f in self.files if f.name == name)


class Repository(Protocol):
    """A checkpoint that is elsewhere, at one commit; its files are read by ranges."""

    repo_id: str
    commit: str
    sub: str
    files: Mapping[str, Remote]


class Chosen(Protocol):
    """Which of several sets of weights is meant, as a manifest's or a record's base says."""

    weights: Weights | None
    variant: str | None


def open_checkpoint(
    root: Path | Repository,
    weights: Weights | None = None,
    variant: str | None = None,
    *,
    editing: bool = False,
    elsewhere: Collection[str] = (),
) -> Checkpoint:
    """Open the checkpoint in directory `root`, or the one of a repository.

    `weights` chooses if both an index and a single file are there. `variant` ("fp16") chooses the weights of that
    variant; without it the plain weights are taken, or the only variant if there are none. `editing` is for the run
    that is editing it in place; any other finds the old bytes put back. Shards in `elsewhere` need not be there.

    Raises CheckpointError (ShardError for a malformed shard) with every fault found, AmbiguousWeights where both are
    there and none was chosen; TargetError while another run is editing it in place; HubError.
    """
    require_choice("weights", weights, get_args(Weights), optional=True)
    require_type("variant", variant, str, optional=True)
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
    chosen = find_weights(root, names, weights, variant, elsewhere)
    index_name, weight_map, total = chosen.index, chosen.weight_map, chosen.total_size
    shard_names = [name for name in chosen.shards if name in names]
    faults, shards = [], {}
    size = sum(names[name].size for name in shard_names)
    for name, shard in _headers([names[name] for name in shard_names], afar=not isinstance(root, Path)):
        if isinstance(shard, CheckpointError):
            faults += shard.faults
            continue
        shards[name] = shard
        refuse_too_many(sum(len(shard.tensors) for shard in shards.values()), size, root)
    if faults:
        raise CheckpointError.of(some(faults))
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
    rest = [f for f in files if f.name not in shard_names and f.name != index_name]
    others = look_at_others(rest, shards, lambda files: _headers(files, afar=not isinstance(root, Path)))
    notes += others.notes
    return Checkpoint(
        root, files, shards, weight_map, index_name, config, others.copies, left_out, disagreements, tuple(notes),
        repo_id, revision, in_cache, sub, chosen.variant,
    )  # fmt: skip


def open_as(
    root: Path | Repository, chosen: Chosen, *, editing: bool = False, elsewhere: Collection[str] = ()
) -> Checkpoint:
    """Open a checkpoint with the weights that a record or a manifest chose. Raises as open_checkpoint does."""
    return open_checkpoint(root, chosen.weights, chosen.variant, editing=editing, elsewhere=elsewhere)


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
        raise CheckpointError.of(f"{fault} in {root}" for fault in some(sorted(faults)))
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
        with Pool(8) as pool:
            yield from pool.map(header, files)
    else:
        yield from map(header, files)


def _files_of(repo: Repository) -> tuple[tuple[BaseFile, ...], tuple[str, ...]]:
    """The files that a repository lists, sorted by name, and the top-level folders left out."""
    faults = [f"has a name that cannot be printed: {name!r}" for name in repo.files if not name.isprintable()]
    if faults:
        raise CheckpointError.of(f"{fault} in {repo}" for fault in some(sorted(faults)))
    left_out = {name.split("/")[0] for name in repo.files if "/" in name} & set(LEFT_OUT)
    return tuple(
        BaseFile(name, file, file.size, file.sha256)
        for name, file in sorted(repo.files.items())
        if name.split("/")[0] not in left_out and name not in WORKING_FILES
    ), tuple(sorted(left_out))  # fmt: skip


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
