"""Tiny models in every form in which they are saved, and the matrix products in which a scalar of theirs takes part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from swsurgery.storage.coordinate import Coordinate

VARIANTS = [
    *((name, "") for name in tiny_models.MODELS),
    # Saved without the head, so without the leading "model." or "transformer.": as the original GPT-2 files are.
    *((name, "base") for name in ("gpt2", "bloom", "gpt_neox", "opt", "mpt", "llama", "mixtral", "llava", "lfm2")),
    # Saved as transformers >= 5 holds them in memory: the experts of a layer in one tensor.
    *((name, "stacked") for name in ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe", "granitemoe")),
    *((name, "stacked") for name in ("llava", "gemma3", "qwen2_5_vl", "qwen2_5_omni_thinker")),
    *((name, "stacked") for name in ("nemotron_h", "lfm2_moe", "kimi_linear", "longcat_flash")),
    # As published, [expert, in, out]; transformers turns it while loading.
    ("qwen3_vl_moe", "published"),
]


def write_variant(name: str, variant: str, folder: Path) -> None:
    if variant == "stacked":
        tiny_models.write(name, folder, save_original_format=False)
    else:
        tiny_models.write(name, folder, base=variant == "base")
    if variant == "published":
        tensors = load_file(folder / "model.safetensors")
        for tensor in tensors:
            if ".mlp.experts." in tensor:
                tensors[tensor] = tensors[tensor].transpose(1, 2).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@dataclass
class Product:
    """One matrix product left @ right that used a watched scalar: right[neuron, channel]."""

    left: torch.Tensor
    result: torch.Tensor
    neuron: int
    channel: int


class Products(TorchDispatchMode):
    """Records every matrix product whose right operand holds the scalar at `index` of `parameter`, by its address."""

    def __init__(self, parameter: torch.Tensor, index: tuple[int, ...]):
        super().__init__()
        self.storage = parameter.untyped_storage().data_ptr()
        self.address = parameter[index].storage_offset()
        self.seen: list[Product] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        operands = {"mm": args[:2], "bmm": args[:2], "addmm": args[1:3]}.get(function.overloadpacket.__name__)
        if operands and operands[1].untyped_storage().data_ptr() == self.storage:
            left, right = operands
            addresses = torch.full(right.shape, right.storage_offset())
            for axis, (size, stride) in enumerate(zip(right.shape, right.stride(), strict=True)):
                shape = [size if i == axis else 1 for i in range(right.dim())]
                addresses += (torch.arange(size) * stride).view(shape)
            for *batch, neuron, channel in (addresses == self.address).nonzero().tolist():
                self.seen.append(Product(left[tuple(batch)], result[tuple(batch)].clone(), neuron, channel))
        return result


def products(model: torch.nn.Module, coordinate: Coordinate) -> list[Product]:
    parameter = dict(model.named_parameters(remove_duplicate=False))[coordinate.tensor]
    with torch.no_grad(), Products(parameter, coordinate.index) as watch:
        model(input_ids=tiny_models.TOKENS)
    return watch.seen[:1] if model.config.model_type == "zamba" else watch.seen  # two of its layers share one MLP
