"""Make CUDA ready while transformers is imported.

This module imports torch, and not transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from swsurgery.model import Placement
from swsurgery.model.lane import allocate_pinned_pieces, compute_pinned_size, count_readers

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention kernels that torch may use. cuDNN's kernel is excluded: on an H100 it takes half a second to plan each new
input shape. The rest of a run of a 13.5 GB model takes no longer than that."""

TOKENS_AT_ONCE, TOKENS_ON_GPU = 2048, 8192
"""Maximum number of tokens in one call of a layer. The second value is for a GPU that holds all weights: computing a
small layer takes less time there than calling it. Otherwise, the first value saves memory."""

COMFORTABLE_SHARE = 0.6
"""Maximum share of a device's free memory that float32 weights may fill. The rest is left for logits."""

LARGEST_MATRIX = 256 << 20
"""Maximum number of elements of a matrix whose kernels are loaded in advance: 1 GiB in float32."""


def prepare_device(
    name: str, placement: Placement, dtype: torch.dtype | None, shapes: Collection[tuple[int, ...]]
) -> None:
    """Make the device `name` ready, if it is a CUDA device; "auto" stands for CUDA if there is any.

    The thread that calls this function should be the one that runs the model, because each thread has a cuBLAS handle
    of its own. `placement` has the meaning of `load.open_model`. `dtype` is the dtype of the stored weights, and
    `shapes` are the shapes of all stored tensors. Errors are ignored, because `load.pick_device` reports them later.
    """
    if name == "cpu":
        return
    with contextlib.suppress(RuntimeError, AssertionError):
        if not torch.cuda.is_available():
            return
        dtype = dtype or torch.float32
        every = range(torch.cuda.device_count()) if ":" not in name else [int(name.partition(":")[2])]
        comfortable = is_comfortable(shapes, torch.cuda.mem_get_info(every[0])[0])
        whole = placement == "whole" or (placement == "auto" and comfortable)
        readers = count_readers(len(every))
        size = dtype.itemsize * sum(torch.Size(shape).numel() for shape in shapes)
        if not whole and size > len(every) * compute_pinned_size(readers):  # a smaller model needs less
            pieces = [allocate_pinned_pieces(readers) for _ in every]
            del pieces  # torch keeps freed memory for the next request
        computed, tokens = (
            (torch.float32 if comfortable else dtype, TOKENS_ON_GPU) if whole else (dtype, TOKENS_AT_ONCE)
        )
        for number in every[:1] if whole else every:
            load_kernels(torch.device("cuda", number), computed, shapes, tokens)
        torch.cuda.empty_cache()


def is_comfortable(shapes: Collection[tuple[int, ...]], free: int) -> bool:
    """Return True if float32 weights of these shapes leave enough of `free` bytes of memory for a run."""
    return 4 * sum(torch.Size(shape).numel() for shape in shapes) <= COMFORTABLE_SHARE * free


@torch.no_grad()
def load_kernels(device: torch.device, dtype: torch.dtype, shapes: Collection[tuple[int, ...]], most: int) -> None:
    """Load the kernels of the usual operations of a decoder. Otherwise, the first run takes half a second longer.

    Products of up to `most` tokens with each different matrix are computed, because the shapes decide which kernel
    multiplies.
    """
    tokens = torch.arange(64, device=device)[None]
    table = torch.zeros(64, 64, device=device, dtype=dtype)
    x = functional.embedding(tokens[:, :3], table)  # fewer tokens have a kernel of their own
    x = functional.embedding(tokens, table)
    angles = (torch.ones(1, 32, 1, device=device) @ tokens[:, None].float()).transpose(1, 2).repeat(1, 1, 2)
    turned = x * angles.cos().to(dtype) + torch.cat((-x[..., 32:], x[..., :32]), -1) * angles.sin().to(dtype)
    x = (x.float() * x.float().pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()).to(dtype) + turned
    functional.silu(x) * functional.gelu(x, approximate="tanh")
    for width in (64, 128):
        heads = x[None, ..., :1].expand(1, 1, 64, width).contiguous()
        with sdpa_kernel(ATTENTION):
            functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    first = tokens[0, :8]
    x[:, first] = x[:, first]
    x.abs().nan_to_num().argmax(dim=1)
    x.amin()
    (tokens > 0).cumsum(-1)
    log = x.float().log_softmax(-1)
    (log.exp() * log).sum(-1).double()
    log.gather(-1, tokens[..., None]).isfinite().all()
    for rows, columns in {shape for shape in shapes if len(shape) == 2 and shape[0] * shape[1] <= LARGEST_MATRIX}:
        matrix = torch.empty(rows, columns, device=device, dtype=dtype)
        for rows_at_once in (512, most // 2, most):
            functional.linear(torch.empty(rows_at_once, columns, device=device, dtype=dtype), matrix)
    torch.cuda.synchronize(device)
