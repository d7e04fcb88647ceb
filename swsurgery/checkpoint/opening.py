"""Hold what belongs together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, get_args

from swsurgery.checkpoint import journal
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.copies import look_at_others
from swsurgery.checkpoint.hints import is_cache_folder, snapshot_hint
from swsurgery.checkpoint.listing import LEFT_OUT, cache_identity, hold, is_cache_snapshot, list_files
from swsurgery.checkpoint.record import Patched, read_patched, read_records
from swsurgery.checkpoint.weight_files import Weights, find_weights, other_sets, refuse_too_many, some
from swsurgery.errors import (
    AmbiguousWeights,
    CheckpointError,
)
from swsurgery.hub.names import hub_hint
from swsurgery.storage import filesystem
from swsurgery.storage.arguments import require_choice, require_type
from swsurgery.storage.files import BaseFile, Repository
from swsurgery.storage.folder import Folder
from swsurgery.storage.names import WORKING_FILES
from swsurgery.storage.shard import Shard, open_shard
from swsurgery.storage.strict_json import read_config
from swsurgery.threads import Pool

if TYPE_CHECKING:  # reading a registry needs neither the planner nor the copier
    pass


def open_patched(root: Path) -> tuple[Patched, Checkpoint]:
    """A patched checkpoint and its records. Raises CheckpointError where it has none."""
    patched = read_records(root)
    return patched, open_as(root, patched.registry.base)


class Chosen(Protocol):
    """Which of several sets of weights is meant, as a manifest's or a record's base says."""

    weights: Weights | None
    variant: str | None


def open_checkpoint(
    root: Path | Folder | Repository,
    weights: Weights | None = None,
    variant: str | None = None,
    *,
    editing: bool = False,
    elsewhere: Collection[str] = (),
) -> Checkpoint:
    """Open the checkpoint in directory `root`, which may be held already, or the one of a repository.

    `weights` chooses if both an index and a single file are there. `variant` ("fp16") chooses the weights of that
    variant; without it the plain weights are taken, or the only variant if there are none. `editing` is for the run
    that is editing it in place; any other finds the old bytes put back. Shards in `elsewhere` need not be there.

    Raises CheckpointError (ShardError for a malformed shard) with every fault found, AmbiguousWeights where both are
    there and none was chosen; TargetError while another run is editing it in place; HubError.
    """
    require_choice("weights", weights, get_args(Weights), optional=True)
    require_type("variant", variant, str, optional=True)
    folder = root if isinstance(root, Folder) else None
    if isinstance(root, Path | Folder):
        given = folder.path if folder else root
        root = folder.path if folder else Path(os.path.realpath(root))
        if not folder and not root.is_dir():
            if not root.exists():
                raise CheckpointError("no such checkpoint", root, hub_hint(str(given)))
            remedy = snapshot_hint(given.absolute()) or snapshot_hint(root) or "give the directory that holds this file"
            raise CheckpointError("a checkpoint is a directory", root, remedy)
        in_cache = is_cache_snapshot(root)
        if not in_cache and is_cache_folder(root):
            raise CheckpointError("is a folder of the Hugging Face cache, not a checkpoint", root, snapshot_hint(root))
        if not in_cache and not editing:
            journal.recover(root)
        files, left_out = list_files(folder or hold(root))
        repo_id, revision, sub = cache_identity(root)
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
        with filesystem.locked(root, exclusive=False):
            yield root
    else:
        yield root  # and let whoever opens it say what is wrong


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


def open_chosen(
    root: Path | Repository,
    weights: Weights | None = None,
    variant: str | None = None,
    *,
    elsewhere: Collection[str] = (),
) -> Checkpoint:
    """Open the checkpoint in `root` to read it only.

    If it has several sets of weights, `weights` and `variant` say which, or else its registry. Raises CheckpointError,
    as open_checkpoint does.
    """
    if weights is None and variant is None:
        try:
            checkpoint = open_checkpoint(root, elsewhere=elsewhere)
            if not other_sets((file.name for file in checkpoint.files), checkpoint.variant):
                return checkpoint
        except AmbiguousWeights:
            checkpoint = None
        patched = read_patched(root)
        said = patched.registry.base if patched else None
        if checkpoint is not None and (said is None or said.variant == checkpoint.variant):
            return checkpoint
        if said is not None:
            weights, variant = said.weights, said.variant
    return open_checkpoint(root, weights, variant, elsewhere=elsewhere)


def refuse_other_weights(
    asked: Weights | None, said: Weights | None, who: str, variant: str | None = None, said_variant: str | None = None
) -> None:
    """Raise CheckpointError if other weights or another variant were asked for than those that `who` is about."""
    for option, wanted, found in (("weights", asked, said), ("variant", variant, said_variant)):
        if wanted and found and wanted != found:
            raise CheckpointError(f"--{option} {wanted} was given, and {found} are the weights of", who,
                                  f"leave --{option} out")  # fmt: skip
