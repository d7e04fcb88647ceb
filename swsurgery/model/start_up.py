"""Do the slow parts of starting a model at the same time: imports, tokenizer, CUDA, and reading shards from the disk.

The imports of torch and transformers take seconds, and cannot be avoided. Meanwhile, the tokenizer's process starts,
threads read the shards into the page cache, and CUDA starts up as soon as torch is imported. Importing this module
loads neither library.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from swsurgery import model
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import Unrunnable
from swsurgery.model import tokenizer
from swsurgery.model.refusals import refuse_unrunnable
from swsurgery.progress import LOADING, Progress
from swsurgery.storage.memory import is_memory_shortage
from swsurgery.storage.numeric import load_numpy
from swsurgery.storage.read_ahead import read_ahead
from swsurgery.threads import Pool

Result = TypeVar("Result")

MOST_THREADS = 4
"""Maximum number of threads that read shards ahead: enough to keep a disk busy."""


def start_up(checkpoint: Checkpoint, device: str, placement: model.Placement, progress: Progress) -> None:
    """Start everything that running a model needs, as `start_up_and_tokenize` does, but tokenize no text."""
    start_up_and_tokenize(checkpoint, device, placement, progress, lambda: None)


def start_up_and_tokenize(
    checkpoint: Checkpoint,
    device: str,
    placement: model.Placement,
    progress: Progress,
    tokenize: Callable[[], Result],
) -> Result:
    """Start everything that running the model of `checkpoint` needs, and import torch and transformers.

    `device` is a name that `load.pick_device` accepts, and `placement` has the meaning of `load.open_model`. `tokenize`
    is called in another thread during the imports, and its result is returned. `progress` receives the start of a task
    called LOADING, which ends when the next task begins.

    Raises Unrunnable if a library is missing or broken, if the directory contains no model that can be run, or if the
    memory is insufficient; and the errors of `tokenize`.
    """
    if reason := model.explain_unavailable():
        raise Unrunnable(reason, "a model has to be run", "pip install 'swsurgery[check]'")
    refuse_unrunnable(checkpoint.directory)
    progress.start(0, "", LOADING)
    try:
        load_numpy()
    except MemoryError as error:
        raise Unrunnable("not enough memory", "torch cannot be loaded", "raise the limit on memory") from error
    tokenizer.start()
    pool = Pool(3)
    try:
        tokenized = pool.submit(tokenize)
        threads = min(MOST_THREADS, len(os.sched_getaffinity(0)) // 2)
        read_ahead([shard.file for shard in checkpoint.shards.values()], max(1, threads))
        _wait_for_imports(pool, checkpoint, device, placement)
        from swsurgery.model import load

        with load.explain_tokenizer(checkpoint.directory):
            return tokenized.result()
    finally:
        pool.shutdown(cancel=True, wait=False)  # after a signal, an import may take seconds to end


def _find_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of the first stored tensor; F32 if nothing is stored."""
    return next((info.dtype.name for shard in checkpoint.shards.values() for info in shard.tensors.values()), "F32")


def _wait_for_imports(pool: Pool, checkpoint: Checkpoint, device: str, placement: model.Placement) -> None:
    """Import torch and transformers on two threads, because much of the time is spent on finding and reading files.

    As soon as torch is imported, the device is made ready for the layers of `checkpoint`. The main thread imports
    nothing itself: a signal that arrives within an import can be lost, or leave a lock of the import system locked.
    Raises Unrunnable if a library is broken, or if the memory is insufficient.
    """
    torch, transformers = pool.submit(_import_torch), pool.submit(_import_transformers)
    _refuse_broken(torch.result())  # an error of torch causes others in transformers
    from swsurgery.model import wake
    from swsurgery.model.torch_dtypes import get_streamed_dtype

    dtype, shapes = get_streamed_dtype(_find_dtype(checkpoint)), checkpoint.shapes.values()
    wake.prepare_device(device, placement, dtype, shapes)
    _refuse_broken(transformers.result())


def _refuse_broken(error: Exception | None) -> None:
    """Raise Unrunnable if an import has ended with an error."""
    if error is not None and is_memory_shortage(error):
        raise Unrunnable("not enough memory", "torch cannot be loaded", "raise the limit on memory") from error
    if error is not None:
        what = f"torch or transformers cannot be imported: {type(error).__name__}"
        raise Unrunnable(what, error, "install them again") from error


def _import_torch() -> Exception | None:
    """Import torch and the modules that start CUDA. Return the error of a broken installation."""
    try:
        from swsurgery.model import torch_dtypes, wake  # noqa: F401
    except Exception as error:  # noqa: BLE001 (installed but broken: a shared library may be missing)
        return error
    return None


def _import_transformers() -> Exception | None:
    """Import transformers and the modules that run models. Return the error of a broken installation."""
    try:
        import transformers.models  # noqa: F401 (needs no torch)

        from swsurgery.model import load, measure  # noqa: F401 (these modules import torch and transformers)
    except Exception as error:  # noqa: BLE001 (a broken installation raises any exception)
        return error
    return None
