"""Make CUDA ready in the background, while transformers is imported and the model is built.

This module imports torch, and not transformers.
"""

from __future__ import annotations

import contextlib
import threading

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from swsurgery.model.weight_reader import allocate_pinned_pieces, compute_pinned_size, count_readers

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention kernels that torch may use. cuDNN's kernel is excluded: on an H100 it takes half a second to plan each new
input shape. The rest of a run of a 13.5 GB model takes no longer than that."""


def start_device(name: str, dtype: torch.dtype | None, size: int) -> list[threading.Thread]:
    """Start to make the device `name` ready on a thread, if it is a CUDA device, and return the thread in a list.

    "auto" stands for CUDA if there is any. `dtype` is the dtype in which the layers will run, and `size` is the size of
    the stored weights in bytes. Errors are ignored: `load.pick_device` meets them again.
    """
    threads = [threading.Thread(target=_wake_all, args=(name, dtype or torch.float32, size), daemon=True)]
    with contextlib.suppress(RuntimeError):  # if no thread can start, CUDA starts up when it is first used
        for thread in threads if name != "cpu" else ():
            thread.start()
    return [thread for thread in threads if thread.ident]


def _wake_all(name: str, dtype: torch.dtype, size: int) -> None:
    with contextlib.suppress(RuntimeError, AssertionError):
        if not torch.cuda.is_available():
            return
        every = range(torch.cuda.device_count()) if ":" not in name else [int(name.partition(":")[2])]
        readers = count_readers(len(every))
        if size > len(every) * compute_pinned_size(readers):  # a smaller model is not streamed
            pieces = [allocate_pinned_pieces(readers) for _ in every]
            del pieces  # torch keeps freed memory for the next request
        for number in every:
            _load_kernels(torch.device("cuda", number), dtype)


@torch.no_grad()
def _load_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Load the kernels that every layer needs, which otherwise takes most of a second during the first layer."""
    x = torch.zeros(1, 64, 64, device=device, dtype=dtype)
    functional.silu(functional.linear(x, x[0]))
    with sdpa_kernel(ATTENTION):
        functional.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)
    first = torch.zeros(8, dtype=torch.long, device=device)
    functional.embedding(first, x[0])
    x[first, first] = x[first, first]
    x.abs().nan_to_num().argmax(dim=1)
    log = x.float().log_softmax(-1)
    (log.exp() * log).sum(-1).double()
    log.gather(-1, first[None, :, None]).isfinite().all()
    torch.cuda.synchronize(device)
