"""Find files outside the shards that contain the weights a second time. An edit of the shards does not change them.

A safetensors file is recognised by its header, and an index by the files that it lists. Files of other formats are
recognised by their names, ignoring case: their contents would need more parsers, and pickles are never opened.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Protocol, TypeVar

from swsurgery.errors import CheckpointError
from swsurgery.storage.files import File
from swsurgery.storage.names import OWN_FILES
from swsurgery.storage.shard import Shard
from swsurgery.storage.strict_json import read_json

ANYWHERE = (
    # llama.cpp, ONNX Runtime, LiteRT, MediaPipe, ExecuTorch, MNN, Rockchip, gemma.cpp, TensorRT
    "*.gguf", "*.ggml", "ggml-model*.bin", "*.llamafile",
    "*.onnx", "*.onnx.data", "*.onnx_data*", "*.ort", "*.tflite", "*.litertlm",
    "*.task", "*.pte", "*.mnn", "*.mnn.weight", "*.rkllm", "*.sbs", "*.engine",
    # OpenVINO, Core ML, MLC, CTranslate2, MLX before safetensors
    "openvino_*model*.bin", "openvino_*model*.xml", "*.mlmodel", "params_shard_*.bin", "model.bin", "weights*.npz",
    # PyTorch, FSDP, DeepSpeed, Megatron, Lightning, NeMo. The last two hold float32 weights
    "pytorch_model*.bin", "pytorch_model*.index.json", "*.distcp", "*model_states.pt", "model_optim_rng.pt",
    "*.ckpt", "*.nemo", "*zero_pp_rank_*_optim_states.pt", "distrib_optim.pt",
    # TensorFlow, Keras, Flax, Paddle, Rust
    "tf_model*.h5*", "*.weights.h5", "*.keras", "*.ckpt.data-*-of-*", "*.ckpt.index", "saved_model.pb",
    "variables.data-*-of-*", "flax_model*.msgpack*", "*.pdparams", "*.pdiparams", "rust_model.ot",
)  # fmt: skip
"""Patterns of copies of the weights in other formats. They are matched against a file's name without its folder."""

FOLDERS = (
    "original/*", "onnx/*", "coreml/*", "openvino/*", "mlx/*", "metal/*", "*.mlpackage/*", "*.mlmodelc/*",
    "pytorch_model_fsdp_*/*", "*/pytorch_model_fsdp_*/*",
)  # fmt: skip
"""Patterns of copies of the weights in other formats. They are matched against a file's path within the checkpoint."""

BESIDE = tuple(f"{stem}*.{ending}" for stem in ("model", "consolidated") for ending in ("bin", "pt", "pth"))
"""Patterns of copies in the checkpoint's top folder. In a subfolder, a file with such a name is often another model."""

ONNX_DATA = ("*.data", "*_data", "*.pb", "*.weight", "*.weights", "*.bias", "onnx__*", "weights.bin", "*.onnx*")
"""Patterns of names of files with the tensor data of an ONNX file in the same folder. ONNX allows any name, so names
equal to a tensor's name are accepted too."""

MODULE = re.compile(r"\d+_(?!Transformer/)\w+/pytorch_model\.bin")
"""The pattern of the weight files of sentence-transformers' additional layers, such as "2_Dense/pytorch_model.bin". The
shards do not contain these layers, so the files are no copies."""

TRAINING = re.compile(
    r"(?:.*/)?optimizer[^/]*/.*|(?:.*/)?(?:optimizer|scheduler|rng_state|random_states|training_args|trainer_state|"
    r"scaler|sampler)[\w-]*\.(?:pt|pth|bin|pkl|json)"
)
"""The pattern of files that a training run writes in addition to the weights, such as "optimizer.pt". They do not
contain the weights."""

NO_WEIGHTS = re.compile(
    r"(?:.*/)?(?:tokenizer[^/]*|vocab[^/]*|merges[^/]*|spiece\.model|adapter_[^/]*|[^/]*\.(?:json|txt|md))"
)
"""The pattern of tokenizers, text files and adapters. They may be large and do not get a note."""

LARGE = 4 << 20
"""Minimum size in bytes of an unknown file that gets a note. The file must also have at least a tenth of the size of
all shards together."""

MAX_NOTED = 10
"""Maximum number of files that get a note of their own. One last note counts the further files."""

_NUMBER = re.compile(r"[-.]\d+(?:-of-\d+)?(?=\.safetensors$)")


class CopiesListed(Protocol):
    """The facts about a file of a checkpoint that the search for copies needs: name, contents and size in bytes."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> File: ...

    @property
    def size(self) -> int: ...


F = TypeVar("F", bound=CopiesListed)


@dataclass(frozen=True)
class Others:
    """The result of the search: `copies` are the names of files that contain the weights again.

    `notes` are warnings for the user about files that may contain weights.
    """

    copies: tuple[str, ...]
    notes: tuple[str, ...]


def look_at_others(
    others: list[F],
    shards: Mapping[str, Shard],
    read_headers: Callable[[list[F]], Iterator[tuple[str, Shard | CheckpointError]]],
) -> Others:
    """Find the copies of the weights among `others`: the files that are neither shards nor the index in use.

    `read_headers` yields the name of each safetensors file with its header, or with an error if the file is damaged. A
    damaged file does not count as a copy.
    """
    by_name = {file.name: file for file in others}
    siblings = {
        name: header
        for name, header in read_headers([f for f in others if f.name.lower().endswith(".safetensors")])
        if isinstance(header, Shard)
    }
    copies = {name for name in by_name if is_named_as_copy(name)} | _find_copies_by_header(shards, siblings)
    copies |= {
        file.name for file in others if _is_index(file.name) and _is_index_of_copies(file, copies, by_name, shards)
    }
    copies |= _find_external_data(by_name.keys() - copies, copies, shards)
    stored = sum(shard.size for shard in shards.values())
    known = {*copies, *siblings}
    notes = [_describe_unread(name, header, shards) for name, header in sorted(siblings.items()) if name not in copies]
    notes += [
        f"{file.name} is large ({file.size} bytes) and swsurgery does not know what it holds: if these are the weights "
        "again, no edit reaches them"
        for file in sorted(others, key=lambda f: f.name)
        if file.size >= max(LARGE, stored / 10)
        and file.name not in {*known, *OWN_FILES}
        and not (TRAINING.fullmatch(file.name.lower()) or NO_WEIGHTS.fullmatch(file.name.lower()))
    ]
    notes = [note for note in notes if note]
    more = len(notes) - MAX_NOTED
    return Others(tuple(sorted(copies)), (*notes[:MAX_NOTED], *([f"and {more} more such files"] if more > 0 else [])))


def is_named_as_copy(name: str) -> bool:
    """Return True if the name alone shows that a file contains the weights again, such as "onnx/model.onnx".

    `name` is the path within the checkpoint, with forward slashes. Returns False for safetensors files and their
    indices, because these are recognised by their contents.
    """
    lower = name.lower()
    if lower.endswith(".safetensors") or _is_index(lower) or MODULE.fullmatch(name) or TRAINING.fullmatch(lower):
        return False
    own = PurePosixPath(lower).name
    return (
        any(fnmatchcase(own, pattern) for pattern in ANYWHERE)
        or any(fnmatchcase(lower, pattern) for pattern in FOLDERS)
        or ("/" not in name and any(fnmatchcase(own, pattern) for pattern in BESIDE))
    )


def _find_copies_by_header(shards: Mapping[str, Shard], siblings: Mapping[str, Shard]) -> set[str]:
    """Return the names of the safetensors files in `siblings` that contain weights of the shards again.

    A file is a copy if one of its tensors has the same name and shape as a tensor in the shards. A file with other
    names, such as Mistral's "consolidated.safetensors", is a copy if the shapes of its tensors match at least half of
    the elements in the shards. Draft layers and vision towers stay below half. Files whose names differ only in a
    number are counted together.
    """
    held = {(info.name, info.shape) for shard in shards.values() for info in shard.tensors.values()}
    copies = {n for n, header in siblings.items() if any((i.name, i.shape) in held for i in header.tensors.values())}
    shapes = Counter(shape for _, shape in held)
    total = sum(math.prod(shape) * count for shape, count in shapes.items())
    groups: dict[str, list[str]] = {}
    for name in siblings.keys() - copies:
        groups.setdefault(_NUMBER.sub("", name.lower()), []).append(name)
    for group in groups.values():
        common = shapes & Counter(info.shape for name in group for info in siblings[name].tensors.values())
        if 2 * sum(math.prod(shape) * count for shape, count in common.items()) >= max(total, 1):
            copies.update(group)
    return copies


def _is_index(name: str) -> bool:
    """Return True if `name` is the name of an index of safetensors files, in any folder and for any variant."""
    return bool(re.fullmatch(r"(?:.*/)?[^/]*\.safetensors(?:\.[^./]+)?\.index(?:\.[^./]+)?\.json", name.lower()))


def _is_index_of_copies(
    file: CopiesListed, copies: Collection[str], names: Collection[str], shards: Collection[str]
) -> bool:
    """Return True if an index that is not in use counts as a copy of the weights.

    It does if it lists a copy or a shard, if none of the files that it lists exists, or if it cannot be parsed.
    """
    try:
        weight_map = read_json(file.source, file.name).get("weight_map")
    except CheckpointError:
        return True
    folder = file.name.rpartition("/")[0]
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    listed = {str(PurePosixPath(folder, value)) for value in values if isinstance(value, str)}
    present = listed & {*names, *shards}
    return not present or any(name in copies or name in shards for name in present)


def _find_external_data(names: Iterable[str], copies: Iterable[str], shards: Mapping[str, Shard]) -> set[str]:
    """Return those of `names` that belong to a copy in the same folder: tensor data of ONNX, or metadata of FSDP."""
    endings: dict[str, set[str]] = {}
    for copy in copies:
        endings.setdefault(copy.rpartition("/")[0], set()).add(PurePosixPath(copy.lower()).suffix)
    tensors = {tensor for shard in shards.values() for tensor in shard.tensors} if endings else set()
    found = set()
    for name in names:
        folder, _, own = name.rpartition("/")
        beside = endings.get(folder, ())
        onnx = own in tensors or any(fnmatchcase(own.lower(), pattern) for pattern in ONNX_DATA)
        if (".onnx" in beside and onnx) or (".distcp" in beside and own == ".metadata"):
            found.add(name)
    return found


def _describe_unread(name: str, header: Shard, shards: Mapping[str, Shard]) -> str:
    """Return a note about a safetensors file with tensors that are in no shard.

    Returns "" if the shards contain all its tensors, for an adapter, and for a file in a subfolder.
    """
    unknown = sum(not any(tensor in shard.tensors for shard in shards.values()) for tensor in header.tensors)
    if not unknown or "/" in name or name.lower().startswith("adapter_"):
        return ""
    count = "a tensor that is" if unknown == 1 else f"{unknown} tensors that are"
    return f"{name} holds {count} in no shard: loaders that follow the index or model.safetensors do not read it"
