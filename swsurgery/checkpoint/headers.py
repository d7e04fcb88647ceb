"""Read the headers of a checkpoint's files, and compare the index with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from swsurgery.checkpoint.weight_files import WeightFiles, format_some, refuse_too_many
from swsurgery.errors import CheckpointError
from swsurgery.hub import RemoteTree
from swsurgery.storage.files import BaseFile
from swsurgery.storage.shard import Shard, open_shard
from swsurgery.threads import Pool

T = TypeVar("T")


def read_shards(files: list[BaseFile], root: Path | RemoteTree) -> dict[str, Shard]:
    """Return the shards in these files, as a dict from the file's name to the shard with its header.

    Raises CheckpointError if headers are malformed, with at most MAX_LISTED of them listed. Also raises it if the
    shards have too many tensors.
    """
    faults: list[str] = []
    shards: dict[str, Shard] = {}
    size = sum(file.size for file in files)
    for name, shard in read_headers(files):
        if isinstance(shard, CheckpointError):
            faults += shard.faults
            continue
        shards[name] = shard
        refuse_too_many(sum(len(shard.tensors) for shard in shards.values()), size, root)
    if faults:
        raise CheckpointError.of(format_some(faults))
    return shards


def read_headers(files: Sequence[BaseFile]) -> Iterator[tuple[str, Shard | CheckpointError]]:
    """Yield (name, shard) for each file, or (name, error) if the header of the file is malformed."""

    def read_header(file: BaseFile) -> Shard | CheckpointError:
        try:
            return open_shard(file.source)
        except CheckpointError as error:
            return error

    return read_each(files, read_header)


def read_each(files: Sequence[BaseFile], read: Callable[[BaseFile], T]) -> Iterator[tuple[str, T]]:
    """Yield (name, what `read` returns) for each file.

    Each header in a repository takes one request, so eight headers are read at a time.
    """

    def read_named(file: BaseFile) -> tuple[str, T]:
        return file.name, read(file)

    if not all(file.is_here for file in files):
        with Pool(8) as pool:
            yield from pool.map(read_named, files)
    else:
        yield from map(read_named, files)


def find_disagreements(chosen: WeightFiles, weight_map: dict[str, str], shards: dict[str, Shard]) -> dict[str, str]:
    """Find the tensors for which the index contradicts the shards.

    Returns a dict from the tensor's name to a description of the contradiction.
    """
    index_name = chosen.index
    homes: dict[str, list[str]] = {}
    for name, shard in shards.items():
        for tensor in shard.tensors:
            homes.setdefault(tensor, []).append(name)
    found = {}
    for tensor, named in weight_map.items():
        if named not in homes.get(tensor, ()):
            actual = ", ".join(homes.get(tensor, ())) or "no shard"
            found[tensor] = f"{index_name} puts it in {named}, but it is in {actual}"
    for tensor, names in homes.items():
        if len(names) > 1:
            found.setdefault(tensor, f"it is stored in {len(names)} shards: {', '.join(names)}")
        if tensor in chosen.weight_map:
            if tensor not in weight_map:
                found.setdefault(
                    tensor, f"{index_name} puts it in {chosen.weight_map[tensor]}, but it is in {names[0]}"
                )
        else:
            found.setdefault(tensor, f"it is in {names[0]}, but {index_name} does not list it, so loaders skip it")
    return found
