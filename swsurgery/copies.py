"""Which files of a checkpoint hold its weights once more: an edit of the shards does not reach them.

Other formats are known by their names, whatever case those are written in; another safetensors file by what its header
says, for a folder beside a checkpoint may as well hold another model's weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from swsurgery.shard import Shard

ANYWHERE = (
    "*.gguf", "*.ggml", "*.onnx", "original/*", "onnx/*", "coreml/*", "openvino/*", "mlx/*", "*/pytorch_model*.bin",
)  # fmt: skip

BESIDE = (
    "model*.safetensors", "consolidated*.safetensors", "model*.safetensors.index.json", "pytorch_model*.index.json",
    *(f"{stem}*.{ending}" for stem in ("model", "pytorch_model", "consolidated")
      for ending in ("bin", "pt", "pth", "ckpt")),
    "tf_model*.h5", "flax_model*.msgpack", "rust_model.ot",
)  # fmt: skip
"""In the checkpoint's own folder. Mistral's consolidated files name the tensors in their own way."""

MODULE = re.compile(r"\d+_(?!Transformer/)\w+/pytorch_model\.bin")
"""The weights of sentence-transformers' further layers (2_Dense): no copy, unlike what else such a folder may hold."""


def named_as_copy(name: str) -> bool:
    """Whether a file's name, relative and with forward slashes, says that it is one."""
    patterns = ANYWHERE if "/" in name else ANYWHERE + BESIDE
    return not MODULE.fullmatch(name) and any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def has_weights_of(shards: Iterable[Shard], other: Shard) -> bool:
    """Whether `other` holds a tensor with the name and the shape of one in the shards."""
    return any(
        name in shard.tensors and shard.tensors[name].shape == info.shape
        for name, info in other.tensors.items()
        for shard in shards
    )
