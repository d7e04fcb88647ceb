"""From a local directory to a model and a tokenizer: device, dtype, and the refusals that belong to them.

Only files of the directory are read, only safetensors, and no code that a checkpoint brings along is run. The
libraries' own bars, warnings and tracebacks end here. What the model computes is not this room's concern.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from swsurgery.errors import ModelError
from swsurgery.hub import config_error

#: A float32 copy is taken where it fills at most this share of the memory that is free: the rest is for logits.
COMFORTABLE_SHARE = 0.6

#: What transformers is known to raise for a directory that it cannot load, lack of memory (a RuntimeError) included.
LOADING_ERRORS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError,
    config_error(),
)  # fmt: skip

NO_CHECK = "--check weights"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and log lines and all Python warnings off the terminal, then restore how it was."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def pick_device(name: str) -> torch.device:
    """The device called `name`: "auto" (CUDA where there is one, else CPU), "cpu", "cuda" or "cuda:N".

    Raises ModelError for another name, and for a device that cannot do a trivial sum.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise ModelError("no such device", name, "--device auto, cpu or cuda")
    if name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count():
        raise ModelError("no usable CUDA device", name, f"--device cpu, or {NO_CHECK}")
    device = torch.device(name)
    try:
        torch.ones(2, device=device).sum().item()
    except RuntimeError as error:
        raise ModelError(f"device does not work: {first_line(error)}", name, f"--device cpu, or {NO_CHECK}") from error
    return device


def device_name(device: torch.device) -> str:
    """What the report calls `device`: "cpu", or the maker's name of the CUDA device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that transformers will load from `directory`, from the headers alone.

    Raises ModelError where the index or a shard cannot be read.
    """
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]  # transformers prefers it where both are there
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        if not (directory / files[0]).is_file() and index.is_file():
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        for file in files:
            with safe_open(directory / file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict: it has no iterator)
                    shapes[name] = tuple(shard.get_slice(name).get_shape())
    except LOADING_ERRORS as error:
        raise ModelError(f"weights cannot be read: {first_line(error)}", directory, NO_CHECK) from error
    return shapes


def load_model(directory: Path, device: torch.device, shapes: Mapping[str, tuple[int, ...]]) -> PreTrainedModel:
    """The model in `directory` on `device`, in evaluation mode.

    It is in float32 where the tensors of `shapes` fit comfortably, else in the dtype that its config.json names.
    Raises ModelError where transformers cannot load it, where weights are missing (transformers would make them
    up), or where there is not enough memory.
    """
    elements = sum(math.prod(shape) for shape in shapes.values())
    dtype = torch.float32 if elements * 4 <= COMFORTABLE_SHARE * _free_bytes(device) else "auto"
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        raise ModelError(f"transformers cannot load the model: {first_line(error)}", directory, NO_CHECK) from error
    if invented := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise ModelError(f"weights that the model needs are missing: {invented[0]}", directory, NO_CHECK)
    with running(device):
        return model.to(device).eval()


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`. Raises ModelError where there is none or where it cannot be loaded."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except LOADING_ERRORS as error:
        raise ModelError(f"no tokenizer that can be loaded: {first_line(error)}", directory, NO_CHECK) from error
    # For some model types transformers makes up an almost empty tokenizer where no file of one is there.
    files = {"tokenizer.json", "tokenizer.model", "tekken.json", *tokenizer.vocab_files_names.values()}
    if not any((directory / file).is_file() for file in files):
        raise ModelError("no tokenizer", directory, f"copy the base model's tokenizer.json there, or {NO_CHECK}")
    return tokenizer


@contextlib.contextmanager
def running(device: torch.device) -> Iterator[None]:
    """Turn what torch raises while a model is moved to `device` or run there into a ModelError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError("not enough memory on the device", device, f"--device cpu, or {NO_CHECK}") from error
    except RuntimeError as error:
        raise ModelError(f"the model cannot be run: {first_line(error)}", device, NO_CHECK) from error


def first_line(error: Exception) -> str:
    """The first line of the message of `error` that says something, at most 160 characters."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


def _free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`; main memory counts what the kernel can hand out without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS has the latter
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
