"""Open models and tokenizers in local directories: choose device and dtype, load, and explain failures.

Only files of the directory are read, and weights only from safetensors files. Code that comes with a checkpoint is
never run. Progress bars, warnings and tracebacks of the libraries are suppressed. This module must not depend on what
the model computes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging as python_logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError, Unrunnable
from swsurgery.model import Placement
from swsurgery.model.forward import LayeredModel
from swsurgery.model.load_errors import (
    LOADING_ERRORS,
    get_first_line,
    make_load_error,
    refuse_codes,
    refuse_invented,
)
from swsurgery.model.places import find_decoder_layers
from swsurgery.model.quantisers import find_method
from swsurgery.model.read_tensors import load_tensors, refuse_unreadable
from swsurgery.model.refusals import (
    has_tokenizer,
    make_tokenizer_error,
    refuse_dtype,
    refuse_pointers,
    refuse_uninstalled,
)
from swsurgery.model.run_arguments import refuse_device
from swsurgery.model.stream import StreamedWeights
from swsurgery.model.tokenizer import Tokenizer
from swsurgery.model.torch_dtypes import get_streamed_dtype
from swsurgery.model.transformers_private import AutoClass, get_language_model_class, no_init_weights, serve_metadata
from swsurgery.model.wake import is_comfortable
from swsurgery.model.weight_plan import plan_weights
from swsurgery.storage.memory import measure_available_memory


@contextlib.contextmanager
def hide_output() -> Iterator[None]:
    """Hide progress bars of transformers, log lines and all Python warnings for the length of a `with` block."""
    disabled = python_logging.root.manager.disable
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    disable_bars: Callable[[], None] = logging.disable_progress_bar
    enable_bars: Callable[[], None] = logging.enable_progress_bar
    logging.set_verbosity(python_logging.CRITICAL)
    python_logging.disable(python_logging.CRITICAL)  # quantisers log for each layer that they run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_bars()  # warns if HF_HUB_DISABLE_PROGRESS_BARS is 0, and enable_bars warns if it is 1
        try:
            yield
        finally:
            python_logging.disable(disabled)
            logging.set_verbosity(verbosity)
            if bars:
                enable_bars()


def _hide_bars() -> contextlib.redirect_stderr[io.StringIO]:
    """Hide progress bars that a quantiser draws itself. Nothing of swsurgery writes in the `with` block."""
    return contextlib.redirect_stderr(io.StringIO())


def pick_device(name: str) -> torch.device:
    """Return the device called `name`: "auto" (CUDA if available, else CPU), "cpu", "cuda" or "cuda:N".

    Raises ModelError for another name, and Unrunnable if the device does not exist or cannot compute a small sum.
    """
    refuse_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count():
        raise Unrunnable("no usable CUDA device", name, "use --device cpu")
    device = torch.device(name)
    try:
        torch.ones(2, device=device).sum().item()
    except torch.OutOfMemoryError as error:
        raise Unrunnable("not enough memory on the device", name, "free some of it, or --device cpu") from error
    except RuntimeError as error:
        remedy = "" if name == "cpu" else "--device cpu"
        raise Unrunnable(f"device does not work: {get_first_line(error)}", name, remedy) from error
    return device


def get_device_name(device: torch.device) -> str:
    """Return the name of `device` for reports: "cpu", or the product name of the CUDA device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def open_model(
    checkpoint: Checkpoint,
    *,
    device: str = "auto",
    placement: Placement = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> LayeredModel:
    """Open the model of `checkpoint` in evaluation mode on `device`, which is a name that `pick_device` accepts.

    With `placement` "whole", all weights are on the device. They are in float32 if `wake.is_comfortable` allows it,
    else in the dtype of config.json. With "streamed", the weights of two layers at a time are on the device, in the
    dtype of config.json; "cuda" without a number then means all CUDA devices in turn. "auto" means "whole" if the
    weights are small enough for float32, else "streamed". A model that cannot be streamed is loaded whole, and `say`
    receives a line about it. If the checkpoint also has a single weight file and the user chose the index, the model is
    always streamed, because transformers would load the single file. A quantised model is loaded whole by its
    quantiser, in the dtype of config.json.

    Raises ModelError if transformers cannot load the model, if weights are missing (transformers would initialise them
    at random) or if memory is insufficient.
    """
    directory = checkpoint.directory
    refuse_pointers(directory)
    refuse_dtype(directory)
    refuse_uninstalled(directory)
    target = pick_device(device)
    quantised = find_method(checkpoint.config) is not None
    comfortable = is_comfortable(checkpoint.shapes.values(), _measure_free_bytes(target))
    aside = checkpoint.choice == "index"
    if aside and placement == "whole":
        what = f"transformers would load {checkpoint.single}, not the shards that the index lists"
        raise ModelError(what, directory, "use --placement streamed")
    if placement == "streamed" or aside or (placement == "auto" and not comfortable and not quantised):
        try:
            return _open_streamed(checkpoint, target, device)
        except ModelError as error:
            if aside or placement == "streamed" and not any("layer by layer" in fault for fault in error.faults):
                raise
            say(f"the model is loaded whole: {error}")
    with convert_run_errors(target):
        if quantised:
            model = _load_whole(checkpoint, "auto", device_map={"": target})
            _finish_loading(model)
        else:
            model = _load_whole(checkpoint, torch.float32 if comfortable else "auto")
            cast_module(model).to(target)
        cast_module(model).eval()
        return LayeredModel(model, checkpoint, load_other=load_other)


def cast_module(model: nn.Module) -> nn.Module:
    """Return `model` unchanged, typed as nn.Module.

    The methods `to` and `eval` of nn.Module have annotations; those of PreTrainedModel have none.
    """
    return model


def _open_streamed(checkpoint: Checkpoint, target: torch.device, name: str) -> LayeredModel:
    """Open a model whose weights are read layer by layer. Raises ModelError if the model cannot be run that way."""
    everywhere = target.type == "cuda" and ":" not in name
    devices = [torch.device("cuda", n) for n in range(torch.cuda.device_count())] if everywhere else [target]
    try:
        model = _build_without_weights(checkpoint, target)
    except LOADING_ERRORS as error:
        raise ModelError(f"cannot be read layer by layer: {get_first_line(error)}", checkpoint.root) from error
    layers = find_decoder_layers(model)
    if not layers:
        raise ModelError("cannot be read layer by layer: its model has no list of decoder layers", checkpoint.root)
    with convert_run_errors(target, streamed=True):
        _move_computed_buffers(model, layers, devices)
        weights = StreamedWeights(plan_weights(model, layers, checkpoint), devices)
        weights.start()
        streamed = LayeredModel(model, checkpoint, weights, devices[0], load_other)
        if not streamed.is_layered([0, 1, 2]):
            raise ModelError("cannot be read layer by layer: its layers cannot be called one by one", checkpoint.root)
    return streamed


def _build_without_weights(checkpoint: Checkpoint, target: torch.device) -> PreTrainedModel:
    """Build the model of `checkpoint` with parameters on the meta device, which takes no memory.

    Raises ModelError if the model is quantised, and any of LOADING_ERRORS.
    """
    config = _read_config(checkpoint.directory)
    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or _find_stored_dtype(checkpoint)
    if getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None):
        raise ModelError("cannot be read layer by layer: its config says that it is quantised", checkpoint.root)
    with no_init_weights(), _build_on_meta():
        model = get_auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
        cast_module(model).eval()
    model.tie_weights()  # tying is part of the initialisation that no_init_weights skips
    return model


def _read_config(directory: Path) -> PreTrainedConfig:
    """Read the config of the language model in `directory`. Raises any of LOADING_ERRORS.

    An omni model (Qwen2.5-Omni) has a language model for text, its thinker, and one for speech. Transformers has a
    class that loads only the thinker, from the files of the whole.
    """
    config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
    thinker = getattr(config, "thinker_config", None)
    if isinstance(thinker, PreTrainedConfig) and not get_language_model_class(config):
        thinker.name_or_path = config.name_or_path
        return thinker
    return config


def _move_computed_buffers(model: nn.Module, layers: Sequence[nn.Module], devices: Sequence[torch.device]) -> None:
    """Move the buffers that checkpoints do not store, such as rotary frequencies, to the devices of their layers."""
    device_of = {
        id(module): devices[number % len(devices)] for number, layer in enumerate(layers) for module in layer.modules()
    }
    for module in model.modules():
        for buffer, tensor in module._buffers.items():
            if tensor is not None and buffer in module._non_persistent_buffers_set:
                module._buffers[buffer] = tensor.to(device_of.get(id(module), devices[0]))


def _find_stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of the first stored floating-point weight; float32 if there is none.

    Transformers uses this dtype if the config names none.
    """
    found = (get_streamed_dtype(checkpoint.get_info(tensor).dtype.name) for tensor in checkpoint.shapes)
    return next((dtype for dtype in found if dtype is not None and dtype.is_floating_point), torch.float32)


@contextlib.contextmanager
def _build_on_meta() -> Iterator[None]:
    """Create parameters on the meta device, without memory, for the length of a `with` block.

    Buffers are created as usual.
    """

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.device.type == "meta":
            return parameter
        return type(parameter)(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # torch says None, and uses the result
    try:
        yield
    finally:
        hook.remove()


def get_auto_class(config: PreTrainedConfig) -> AutoClass:
    """Return the class of transformers that builds a language model of `config`, with or without image input.

    Raises Unrunnable if transformers has no language model of this model type.
    """
    if auto := get_language_model_class(config):
        return auto
    what = f"transformers has no language model of model_type {config.model_type}"
    raise Unrunnable(what, config.name_or_path, "an embedding, reward or encoder model predicts no tokens")


def _load_whole(checkpoint: Checkpoint, dtype: torch.dtype | str, **options: Any) -> PreTrainedModel:
    """Load a model with all its weights in `dtype`; `options` go to from_pretrained."""
    directory = checkpoint.directory
    try:
        config = _read_config(directory)
        refuse_codes(checkpoint, config)
        with _hide_bars():
            model, info = get_auto_class(config).from_pretrained(
                directory,
                config=config,
                variant=checkpoint.variant,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `info` then lists them, and refuse_invented raises
                **options,
            )
    except LOADING_ERRORS as error:
        raise make_load_error(error, directory) from error
    refuse_invented(info, checkpoint)
    checkpoint.refuse_changed()  # transformers opens files by path, so they may have been replaced
    return model


def load_other(model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device) -> PreTrainedModel:
    """Load a checkpoint, which may be virtual, on `device`, as a model with the config and dtype of `model`.

    All its stored tensors are in memory while they are loaded. Raises ModelError if transformers cannot load them, and
    CheckpointError if a shard cannot be read.
    """
    refuse_unreadable(checkpoint)
    tensors = dict(load_tensors(checkpoint))
    quantised = find_method(checkpoint.config) is not None
    metadata = {key: value for shard in checkpoint.shards.values() for key, value in shard.metadata.items()}
    try:
        with serve_metadata(metadata), _hide_bars():
            other, info = cast(AutoClass, type(model)).from_pretrained(
                None,
                # A quantiser changes the config of the model that it loads.
                config=_read_config(checkpoint.directory) if quantised else copy.deepcopy(model.config),
                state_dict=tensors,
                dtype="auto" if quantised else model.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **({"device_map": {"": device}} if quantised else {}),
            )
    except LOADING_ERRORS as error:
        raise make_load_error(error, checkpoint.directory) from error
    refuse_invented(info, checkpoint)
    if quantised:
        _finish_loading(other)
    else:
        cast_module(other).to(device)
    cast_module(other).eval()
    return other


@torch.no_grad()
def _finish_loading(model: PreTrainedModel) -> None:
    """Run one token through a quantised model, because compressed-tensors dequantises weights when it runs first.

    Raises Unrunnable if a package is missing that the model needs to run: some versions of transformers import the
    kernels of FP8 only then.
    """
    try:
        with _hide_bars():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    except ImportError as error:
        raise Unrunnable(f"the quantised model cannot be run: {get_first_line(error)}", model.device) from error


def get_context_length(model: PreTrainedModel) -> int:
    """Return the maximum number of tokens in one input; sys.maxsize if the config does not state it."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len"):  # the second is that of MPT
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return sys.maxsize


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer in `directory` in a separate process. Raises Unrunnable as `explain_tokenizer` does."""
    with explain_tokenizer(directory):
        return Tokenizer(directory)


@contextlib.contextmanager
def explain_tokenizer(directory: Path) -> Iterator[None]:
    """Find the cause if a tokenizer cannot be loaded, for the length of a `with` block.

    Raises Unrunnable if a file is a git-lfs pointer, if there is no tokenizer, if transformers cannot read config.json,
    or if the block raises it.
    """
    refuse_pointers(directory)
    refuse_dtype(directory)
    try:
        yield
    except Unrunnable as error:
        if not has_tokenizer(directory):
            raise make_tokenizer_error(directory) from error
        try:
            transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except LOADING_ERRORS as fault:
            raise make_load_error(fault, directory) from fault
        raise


@contextlib.contextmanager
def convert_run_errors(device: torch.device, streamed: bool = False) -> Iterator[None]:
    """Convert errors of torch into Unrunnable while a model is moved to `device` or runs there.

    If `streamed` is True, the message for lack of memory does not suggest streaming.
    """
    remedy = "" if device.type == "cpu" else "--device cpu"
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = ([] if streamed else ["--placement streamed"]) + ([remedy] if remedy else [])
        raise Unrunnable("not enough memory on the device", device, ", or ".join(ways)) from error
    except RuntimeError as error:
        raise Unrunnable(f"the model cannot be run: {get_first_line(error)}", device, remedy) from error


def _measure_free_bytes(device: torch.device) -> int:
    """Return the free memory of `device` in bytes; for a CPU, the memory available without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return measure_available_memory()
