"""Open a checkpoint: list its files, choose its weights, and read the headers of its shards.

Every directory is entered through `held`, which undoes an interrupted edit in place and locks the directory.
`read_checkpoint` reads headers and small JSON files, never tensor data, and it does not write.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, get_args

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.copies import look_at_others
from swsurgery.checkpoint.damage import Survey, find_present_weights, read_damaged_shards
from swsurgery.checkpoint.gguf_config import make_config
from swsurgery.checkpoint.gguf_survey import check_parts, find_parts, read_damaged_parts, refuse_part
from swsurgery.checkpoint.headers import find_disagreements, read_each, read_headers, read_shards
from swsurgery.checkpoint.hints import is_cache_folder, suggest_neighbour, suggest_snapshot
from swsurgery.checkpoint.listing import (
    LEFT_OUT,
    identify_cache,
    is_cache_snapshot,
    is_edit_pending,
    list_files,
    open_directory,
)
from swsurgery.checkpoint.record import find_record_among
from swsurgery.checkpoint.weight_files import (
    WeightFiles,
    Weights,
    find_weights,
    format_some,
    has_only_gguf,
    has_several_sets,
    is_gguf,
)
from swsurgery.errors import CheckpointError, TargetError
from swsurgery.hub import RemoteTree, open_location, parse_location
from swsurgery.hub.names import suggest_uri
from swsurgery.progress import Reporter
from swsurgery.storage import filesystem
from swsurgery.storage.arguments import require_choice, require_location, require_type
from swsurgery.storage.files import BaseFile
from swsurgery.storage.folder import Folder, SingleFile
from swsurgery.storage.gguf import GgufFile, open_gguf
from swsurgery.storage.names import WORKING_FILES, is_undo_name
from swsurgery.storage.numbers import format_size
from swsurgery.storage.shard import Shard
from swsurgery.storage.strict_json import quote, read_config

if TYPE_CHECKING:
    from swsurgery.checkpoint.journal_format import Journal


class Chosen(Protocol):
    """The choice between several sets of weights in one checkpoint, as a manifest or a record states it for its base.

    `weights` is "index" or "single", `variant` is a name such as "fp16", and None means that no choice is stated.
    """

    @property
    def weights(self) -> Weights | None: ...

    @property
    def variant(self) -> str | None: ...


@dataclass(frozen=True)
class _Listing:
    """The files of a checkpoint and their origin (repository, commit, folder), before any of the files is read."""

    root: Path | RemoteTree
    files: tuple[BaseFile, ...]
    left_out: tuple[str, ...]
    repo_id: str | None
    revision: str | None
    sub: str
    in_cache: bool = False


def open_checkpoint(
    root: str | Path | Folder | RemoteTree,
    weights: Weights | None = None,
    variant: str | None = None,
    *,
    gguf: bool = False,
) -> Checkpoint:
    """Open a checkpoint: list its files and read the headers of its shards, but no tensor.

    `root` is a directory, or a repository as `hf://ORG/NAME[@REV][/sub]`, of which only byte ranges are read. It may
    also be a directory or repository that is already open. A directory is entered with `held`.

    If several sets of weights exist, `weights` and `variant` choose one. If neither is given, the choice in the record
    of a patched checkpoint is used. With `gguf`, the weights may be a GGUF file, if there are no safetensors files.
    Raises the errors of `held` and `read_checkpoint`, and CheckpointError if the record is damaged.
    """
    if not isinstance(root, Folder | RemoteTree):
        root = open_location(parse_location(require_location("root", root)))
    with held(root) as entered:
        listing = _list(entered)
        if weights is None and variant is None and has_several_sets([file.name for file in listing.files]):
            patched = find_record_among({file.name: file.source for file in listing.files}, listing.root)
            if patched is not None:
                weights, variant = patched.record.base.weights, patched.record.base.variant
        return _read(listing, weights, variant, gguf=gguf)


@contextlib.contextmanager
def held(root: Path | Folder | RemoteTree) -> Iterator[Folder | RemoteTree]:
    """Enter a directory for reading: undo an interrupted edit in place, and prevent new edits during the `with` block.

    Yields the open directory. If `root` is a GGUF file, its directory is entered, and only this file is visible in the
    yielded directory. If `root` is not a path but a repository, or a directory that was entered before, it is yielded
    unchanged. Raises CheckpointError if the path is neither a directory nor a GGUF file. Raises TargetError while
    another run edits the directory, or if the interrupted edit cannot be undone.
    """
    if not isinstance(root, Path):
        yield root
        return
    if (single := _find_single_file(root)) is not None:
        with held(single.path):
            yield single
        return
    folder = _open_directory(root)
    editable = not is_cache_snapshot(folder.path)
    if editable and is_edit_pending(folder):
        with held_for_editing(folder):  # undoing needs the exclusive lock, so it is done before the shared lock
            pass
    with filesystem.lock_directory(folder, exclusive=False):
        if editable and is_edit_pending(folder):
            raise TargetError("another edit in place was cut off just now", folder, "run the same command again")
        yield folder


@contextlib.contextmanager
def held_for_editing(root: Path | Folder, *, moved: bool = False) -> Iterator[tuple[Folder, Journal | None]]:
    """Enter a directory for an edit in place: lock it against every other run, and undo an interrupted edit.

    Yields the open directory, and the journal of the interrupted edit or None. If `moved` is True, a journal is also
    accepted if it was copied together with its directory. Raises the errors of `held`, and TargetError while another
    run reads the directory.
    """
    from swsurgery.checkpoint import journal  # most commands only read

    folder = root if isinstance(root, Folder) else _open_directory(root)
    with filesystem.lock_directory(folder, exclusive=True):
        yield folder, journal.recover(folder, moved=moved)


def read_checkpoint(
    root: Folder | RemoteTree, chosen: Chosen, *, elsewhere: Collection[str] = (), gguf: bool = False
) -> Checkpoint:
    """List the files of a checkpoint and read the headers of its shards.

    `root` is a repository, or a directory that the caller has entered with `held`. `chosen.weights` decides between an
    index and a single file if both exist. `chosen.variant` is the variant to read, such as "fp16". If it is None, the
    plain weights are read, or the only variant if no plain weights exist. Shards in `elsewhere` may be missing. With
    `gguf`, the weights may be a GGUF file, if there are no safetensors files.

    Raises CheckpointError that lists every fault found, AmbiguousWeights if several sets of weights exist and `chosen`
    names none of them, and HubError.
    """
    return _read(_list(root), chosen.weights, chosen.variant, elsewhere, gguf)


def survey_checkpoint(
    root: Folder | RemoteTree, weights: Weights | None, variant: str | None, elsewhere: Collection[str] = ()
) -> Survey:
    """List the files of a checkpoint and read the headers of its shards, although shards may be missing or truncated.

    The arguments are those of `read_checkpoint`, which raises an error for such shards. Raises the other errors of
    `read_checkpoint`.
    """
    listing = _list(root)
    names = _check_choice(listing, weights, variant)
    if has_only_gguf(names):
        return _survey_gguf(listing, names)
    chosen, damages = find_present_weights(listing.root, names, weights, variant, elsewhere)
    present = [names[name] for name in chosen.shards if name in names]
    shards, faults = read_damaged_shards(present, read_each, listing.root)
    return Survey(
        checkpoint=_build(listing, names, chosen, shards, compare_size=False),
        damages=(*damages, *faults),
        unseen={tensor: shard for tensor, shard in chosen.weight_map.items() if shard not in shards},
        total_size=chosen.total_size if type(chosen.total_size) is int else None,
    )


def _survey_gguf(listing: _Listing, names: Mapping[str, BaseFile]) -> Survey:
    """Read the header of the GGUF file, or of each part of a split one, with the weights of a checkpoint."""
    found, damages = find_parts(listing.root, names)
    parts, faults = read_damaged_parts([names[name] for name in found], read_each)
    first = parts.get(found[0])
    checkpoint = _build_gguf(listing, parts, make_config(first.metadata) if first else {})
    damages += [*faults, *check_parts(parts, missing=bool(damages or faults))]
    return Survey(checkpoint, tuple(damages), {}, None, first.metadata if first else {})


def _read(
    listing: _Listing,
    weights: Weights | None,
    variant: str | None,
    elsewhere: Collection[str] = (),
    gguf: bool = False,
) -> Checkpoint:
    """Find the weights among the files of a listing, and read the index, the headers of the shards and config.json."""
    names = _check_choice(listing, weights, variant)
    if gguf and has_only_gguf(names):
        return _read_gguf(listing, names, elsewhere)
    chosen = find_weights(listing.root, names, weights, variant, elsewhere)
    shards = read_shards([names[name] for name in chosen.shards if name in names], listing.root)
    return _build(listing, names, chosen, shards, compare_size=not elsewhere)


def _check_choice(listing: _Listing, weights: Weights | None, variant: str | None) -> dict[str, BaseFile]:
    """Return the files of a listing by name. Raises TypeError or ValueError for an invalid choice of weights."""
    require_choice("weights", weights, get_args(Weights), optional=True)
    require_type("variant", variant, str, optional=True)
    return {f.name: f for f in listing.files}


def _build(
    listing: _Listing, names: dict[str, BaseFile], chosen: WeightFiles, shards: dict[str, Shard], compare_size: bool
) -> Checkpoint:
    """Build the checkpoint from its shards. With `compare_size`, add a note if their size is not that of the index."""
    disagreements: dict[str, str] = {}
    if chosen.index is None:
        weight_map = {tensor: name for name, shard in shards.items() for tensor in shard.tensors}
    else:
        weight_map = {tensor: name for tensor, name in chosen.weight_map.items() if name in shards}
        disagreements = find_disagreements(chosen, weight_map, shards)
    notes = []
    stored = sum(shard.size - shard.data_start for shard in shards.values())
    if chosen.total_size is not None and chosen.total_size != stored and compare_size:
        notes.append(f"{chosen.index} states total_size {chosen.total_size}, but the shards contain {stored} bytes")
    config = read_config(names["config.json"].source, "config.json") if "config.json" in names else {}
    rest = [f for f in listing.files if f.name not in {*chosen.shards, chosen.index} and not is_undo_name(f.name)]
    others = look_at_others(rest, shards, read_headers)
    return Checkpoint(
        root=listing.root,
        files=listing.files,
        shards=shards,
        weight_map=weight_map,
        index_name=chosen.index,
        config=config,
        copies=others.copies,
        left_out=listing.left_out,
        disagreements=disagreements,
        notes=(*notes, *others.notes),
        repo_id=listing.repo_id,
        revision=listing.revision,
        in_cache=listing.in_cache,
        sub=listing.sub,
        variant=chosen.variant,
    )


def _read_gguf(listing: _Listing, names: Mapping[str, BaseFile], elsewhere: Collection[str]) -> Checkpoint:
    """Read the header of the GGUF file, or of each part of a split one, with the weights of a checkpoint.

    Parts in `elsewhere` may be missing. Raises CheckpointError, also if another part is missing or if two parts have
    the same tensor.
    """
    found, missing = find_parts(listing.root, names)
    if lost := [damage.file for damage in missing if damage.file not in elsewhere]:
        raise CheckpointError(f"a part of the model is missing: {lost[0]}", listing.root, "download all parts")
    parts = dict(read_each([names[name] for name in found], lambda file: open_gguf(file.source)))
    for damage in check_parts(parts, missing=bool(missing)):
        raise CheckpointError(damage.what, f"{listing.root}/{damage.file}", "download the parts again")
    return _build_gguf(listing, parts, make_config(parts[found[0]].metadata))


def _build_gguf(listing: _Listing, parts: Mapping[str, GgufFile], config: dict[str, object]) -> Checkpoint:
    """Build the checkpoint from its GGUF files. Raises CheckpointError if two of them have the same tensor."""
    weight_map: dict[str, str] = {}
    for name, part in parts.items():
        if twice := sorted(weight_map.keys() & part.shard.tensors.keys()):
            what = f"has the tensor {quote(twice[0])}, which {weight_map[twice[0]]} has too"
            raise CheckpointError(what, part.shard.file)
        weight_map |= dict.fromkeys(part.shard.tensors, name)
    shards = {name: part.shard for name, part in parts.items()}
    rest = [file for file in listing.files if file.name not in shards and not is_undo_name(file.name)]
    others = look_at_others(rest, shards, read_headers)
    return Checkpoint(
        root=listing.root,
        files=listing.files,
        shards=shards,
        weight_map=weight_map,
        index_name=None,
        config=config,
        copies=others.copies,
        left_out=listing.left_out,
        notes=others.notes,
        repo_id=listing.repo_id,
        revision=listing.revision,
        in_cache=listing.in_cache,
        sub=listing.sub,
    )


@contextlib.contextmanager
def open_for_reading(name: str, checkpoint: str | Path, reporter: Reporter) -> Iterator[Folder | RemoteTree]:
    """Yield the checkpoint to read: a directory entered with `held`, a GGUF file, or an open repository.

    `checkpoint` is a directory, a GGUF file or `hf://ORG/NAME[@REV][/sub]`, and `name` is the name of the caller's
    argument, which error messages quote. After the `with` block, the reporter prints how many bytes were read from the
    repository. Raises TypeError, HubError and the errors of `held`.
    """
    where = open_location(parse_location(require_location(name, checkpoint)))
    with held(where) as root:
        yield root
    if isinstance(root, RemoteTree):
        reporter.say(describe_traffic(root))


def describe_traffic(tree: RemoteTree) -> str:
    """Return a message that states how many bytes were read from a repository, and in how many requests."""
    return f"{tree}: {format_size(tree.traffic.bytes)} in {tree.traffic.requests} range requests"


def refuse_other_weights(
    asked: Weights | None, said: Weights | None, who: str, variant: str | None = None, said_variant: str | None = None
) -> None:
    """Raise CheckpointError if the user asks for other weights or another variant than a record or manifest states.

    `asked` and `variant` are the user's options. `said` and `said_variant` are stated by the record or manifest, and
    `who` is its name in messages.
    """
    for option, wanted, found in (("weights", asked, said), ("variant", variant, said_variant)):
        if wanted and found and wanted != found:
            raise CheckpointError(
                f"--{option} {wanted} was given, but the choice {found} is stated in", who, f"leave --{option} out"
            )


def _find_single_file(path: Path) -> SingleFile | None:
    """Return the GGUF file at `path`; None if `path` is not a file with the ending of GGUF files."""
    try:
        return SingleFile.find(path) if is_gguf(path.name) and path.is_file() else None
    except OSError as error:
        raise CheckpointError(f"cannot open the file ({error.strerror})", path) from None


def _open_directory(root: Path) -> Folder:
    """Open the directory of a checkpoint.

    Raises CheckpointError if `root` does not exist, is a file, cannot be looked up, or is a folder of the Hugging Face
    cache above the snapshots.
    """
    path = Path(os.path.realpath(root))
    try:
        is_there = path.is_dir()
    except OSError as error:  # the name is too long, or a folder above it is not readable
        raise CheckpointError(f"cannot open the checkpoint ({error.strerror})", path) from None
    if not is_there:
        raise _explain_no_directory(root, path)
    if not is_cache_snapshot(path) and is_cache_folder(path):
        raise CheckpointError("is a folder of the Hugging Face cache, not a checkpoint", path, suggest_snapshot(path))
    return open_directory(path)


def _list(root: Folder | RemoteTree) -> _Listing:
    """List the files of a checkpoint. Raises CheckpointError for an entry that a checkpoint must not contain.

    Also raises it for one part of a split GGUF file.
    """
    if not isinstance(root, Folder):
        return _list_repository(root)
    if isinstance(root, SingleFile):
        refuse_part(root, root.name)
    files, left_out = list_files(root)
    where = root.path / root.name if isinstance(root, SingleFile) else root.path
    return _Listing(where, files, left_out, *identify_cache(root.path), is_cache_snapshot(root.path))


def _explain_no_directory(given: Path, path: Path) -> CheckpointError:
    """Return the error for a path that is not a directory. `path` is `given` with all links resolved."""
    if not path.exists():
        return CheckpointError("no such checkpoint", path, suggest_neighbour(given) or suggest_uri(str(given)))
    if is_gguf(path.name) or is_gguf(given.name):
        what = "the record of an edit is in the directory of a GGUF file, but this is the file"
        return CheckpointError(what, given, f"give {given.parent}, or write a copy with -o")
    remedy = suggest_snapshot(given.absolute()) or suggest_snapshot(path)
    remedy = remedy or f"give the directory that contains the file: {given.parent}"
    return CheckpointError("a checkpoint is a directory, but this is a file", path, remedy)


def _list_repository(repo: RemoteTree) -> _Listing:
    """List the files of a repository. Raises CheckpointError if a file's name cannot be printed."""
    faults = [f"a file has a name that cannot be printed: {name!r}" for name in repo.files if not name.isprintable()]
    if faults:
        raise CheckpointError.of(f"{fault} in {repo}" for fault in format_some(sorted(faults)))
    left_out = {name.split("/")[0] for name in repo.files if "/" in name} & set(LEFT_OUT)
    files = tuple(
        BaseFile(name, file, file.size, file.sha256)
        for name, file in sorted(repo.files.items())
        if name.split("/")[0] not in left_out and name not in WORKING_FILES
    )
    return _Listing(repo, files, tuple(sorted(left_out)), repo.repo_id, repo.commit, repo.sub)
