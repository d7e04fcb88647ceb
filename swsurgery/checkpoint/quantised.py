"""Decide which stored numbers are weights, and which are codes, scales or other numbers of a quantiser.

Planning, verification, scanning, export and inspection share this rule. It depends on the names, dtypes and shapes of
the tensors, config.json, the names of the files and the metadata of the shards. It must not open files.

A float tensor is a plain weight unless its own quantiser is stored beside it. An F8 or integer tensor is a plain weight
only if nothing declares quantisation and its module stores nothing besides weight and bias. Otherwise it is read
through a scale whose format is known (`SCALES`), or it is unreadable.

The tensor names of Marlin, AQLM, MLX (`mlx.nn.QuantizedLinear`), quanto (`QTensor.save_to_state_dict`) and ComfyUI
(its QUANTIZATION.md) were compared with the code that writes them. The patterns also cover GPTQ, AWQ,
compressed-tensors, bitsandbytes, ModelOpt, TensorRT-LLM, torchao, EXL2, EXL3, HQQ, VPTQ, QuIP#, SpQR, Mistral and
DeepSeek.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Literal, Protocol

from swsurgery.errors import list_some
from swsurgery.storage.dtypes import Dtype
from swsurgery.storage.ggml import BlockDtype

StorageKind = Literal["plain", "scaled", "unreadable", "internal"]

SCALES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("_scale_inv", ("F8",)),
    ("_scale", ("F8", "I8")),
    (".SCB", ("I8",)),
)
"""Endings of the names of scales whose format is known, in order of preference, with the dtypes that they may scale.

`weight_scale` beside U8 means packed codes (BitNet, NVFP4); `weight_scale_inv` beside I8 means two FP4 codes per byte.
"""

PACKED_SUFFIXES = (
    ".qweight", ".weight_packed", "_blocks", ".weight.absmax", ".W_q", ".codes", ".q_weight", ".trellis", ".Qidxs",
    "._weight_qdata", ".weight:qdata", ".weight:_data", ".weight._data", ".dense_weights", ".indices",
)  # fmt: skip
"""Endings of the names of tensors that are stored beside or instead of `.weight` if the matrix is packed."""

_DECLARATIONS = (
    "quantization_config", "compression_config", "quantization", "quantize_config", "quant_config", "quip_params",
    "quantization_bit",
)  # fmt: skip
"""Keys that declare quantisation, at the top level of config.json or one level below (`text_config`)."""

_SIDECARS = re.compile(
    r"(hf_quant_config|quantize_config|quant_config|quantization_config|quanto_qmap|quant_model_description\w*)\.json"
)
"""The pattern of names of files that only quantisers write."""

_MARKER = "scaled_fp8"
"""The name of the empty tensor by which ComfyUI marks files whose FP8 weights have scales."""

_PACKED = ("qweight", "weight_packed", "W_q", "q_weight", "trellis", "Qidxs", "_weight_qdata", "dense_weights")
"""Last parts of names that identify a module as a quantised layer, even if the dtype is a float: HQQ's `view_as_float`
and bitsandbytes' `quant_storage` store codes as floats."""

_INTERNAL = re.compile(
    r"qweight|qzeros|g_idx|q_(weight|scale_max|groups|perm|invperm)|W_q|trellis|Qidxs\w*|dense_weights|col_vals"
    r"|(\w+_)?weight_(packed|shape|scale\w*|zero_point|global_scale|g_idx|offset|format)"
    r"|(\w+_)?input_(scale|scale_inv|global_scale|zero_point|offset)"
    r"|activation_scale(_inv)?|(weights|activation|prequant|kv_cache)_scaling_factor(_2)?|pre_quant_scale"
    r"|deq_scale|quant_bias|scale_(weight|input)|qscale_(weight|act)|\w+_scale_inv"
    r"|SCB|(nested_)?(absmax|quant_map)|comfy_quant|_weight_\w+|_amax|_pre_quant_scale|(\w+_)?blocks"
)
"""The pattern of last parts of names that only quantisers use."""

_AMBIGUOUS = re.compile(r"(\w+_)?scales|codes|codebooks?|zeros")
"""The pattern of last parts of names that float models use too.

Such a tensor is internal if it is not a float or if quantisation is declared.
"""

_CACHE_SCALE = re.compile(r"(q|k|v|kv|prob|q_prob|output)_scale")
"""The pattern of last parts of names of the scales of a quantised KV cache or output.

Such a tensor is internal if it is not a float or if quantisation is declared. A scale of one element is always
internal, unless it belongs to an output.
"""

_QUANTISER = re.compile(r"((weight|input|output|softmax|[qkv]+_bmm|(q|k|v|kv)_fake)_quantizer|quant_state)")
"""The pattern of the name of a quantiser's module (ModelOpt, Mistral)."""

_UNITS = re.compile(
    r"weight_(packed|shape|scale\w*|zero_point|global_scale|g_idx|offset)"
    r"|scale_weight|qscale_weight|weights_scaling_factor(_2)?|_?pre_quant_scale|prequant_scaling_factor"
    r"|SCB|absmax|quant_map|comfy_quant|_weight_\w+|qweight|qzeros"
)
"""The pattern of last parts of names of tensors that scale a *weight*, so that even a float weight beside them is
unreadable."""

_LOOSE_UNITS = re.compile(r"scales?|scale_inv|zeros?|biases|zero_points?")
"""The pattern of last parts of names of tensors that scale a weight only if quantisation is declared."""

_OFFSHOOT = re.compile(r"_(\w+_)?(scales?|scale_inv|zeros?|zero_points?|absmax|scale_2|global_scale)|_blocks")
"""The pattern of the ending that the scale of a stacked tensor adds to its name: `experts.down_proj_scale_inv`."""

_HARMLESS = re.compile(
    r"bias|input_(scale(_ub)?|zero_point)|activation_scale|output_scale|[qkv]_scale|kv_scale|weight_format"
    r"|scale_input|qscale_act|activation_scaling_factor"
)
"""The pattern of last parts of names of tensors beside a scaled weight that do not change its value, such as the scales
of activations."""

_WEIGHTS = ("weight", "bias", "e_score_correction_bias")
"""Last parts of names of the tensors that a layer stores besides those of its quantiser."""

_BUFFERS = re.compile(r"position_ids|token_type_ids|num_batches_tracked|relative_position_index|tid2eid|(\w+_)?mask")
"""The pattern of last parts of names of integer tensors in float models, which are plain."""


class Header(Protocol):
    """The part of a tensor's header on which the decision depends."""

    @property
    def dtype(self) -> Dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Reading:
    """What the stored numbers of one tensor are.

    "plain": weights. "scaled": weights after multiplication by the tensor `scale`, whose format is known. "unreadable":
    a quantised weight of another format. "internal": numbers that only a quantiser needs, such as scales and
    permutations. `reason` explains in messages why the tensor is not plain.
    """

    kind: StorageKind
    reason: str = ""
    scale: str | None = None


PLAIN = Reading("plain")


class Quantisation:
    """What the stored numbers of every tensor of a checkpoint are, decided on first use and remembered.

    `declared` names the place where the checkpoint declares quantisation, such as "config.json (quantization_config)".
    It is None if the checkpoint does not declare it.
    """

    def __init__(
        self,
        tensors: Mapping[str, Header],
        config: Mapping[str, object],
        files: Iterable[str] = (),
        metadata: Iterable[Mapping[str, str]] = (),
    ):
        self._tensors = tensors
        self._names = sorted(tensors)
        self.declared = _describe_declaration(config, files, metadata, tensors)
        self._readings: dict[str, Reading] = {}
        self._layers: dict[str, str | None] = {}
        self._stacks: dict[str, str | None] = {}

    def __repr__(self) -> str:
        return f"<Quantisation of {len(self._names)} tensors, declared: {self.declared}>"

    def get_reading(self, name: str) -> Reading:
        """Decide what the numbers of the tensor `name` are. Raises KeyError if there is no such tensor."""
        if name not in self._readings:
            self._readings[name] = self._read(name)
        return self._readings[name]

    def has_effect_on_weights(self, name: str) -> bool:
        """Return True if only a quantiser needs the tensor `name`, and the values of weights depend on it."""
        return self.get_reading(name).kind == "internal" and not _HARMLESS.fullmatch(_get_last_part(name))

    def list_others(self, weight: str) -> list[str]:
        """List the other tensors of the module of a weight, except its bias. The weight itself may be missing."""
        return list(self._others(weight))

    def explain_refusal(self, name: str) -> str | None:
        """Explain why the tensor `name` does not store plain weights; None if it does."""
        reading = self.get_reading(name)
        if reading.kind == "plain":
            return None
        if reading.kind == "internal":
            return "packed or scaling values of a quantised layer, not weights"
        return f"quantised: {reading.reason}"

    @cached_property
    def has_codes(self) -> bool:
        """True if a stored tensor of integers, or of floats of at most 8 bits, is no plain weight or buffer."""
        coded = (name for name, header in self._tensors.items() if _is_code(header.dtype))
        return any(self.get_reading(name).kind != "plain" for name in coded)

    def find_codes(self) -> str | None:
        """Find the first quantised weight that is stored as F8 or integers; None if there is none."""
        coded = (name for name, header in self._tensors.items() if _is_code(header.dtype))
        return next((name for name in coded if self.get_reading(name).kind in ("scaled", "unreadable")), None)

    def _read(self, name: str) -> Reading:
        """Decide what the numbers of a tensor are."""
        dtype, shape = self._tensors[name].dtype, self._tensors[name].shape
        if why := self._internal(name, dtype, shape):
            return Reading("internal", why)
        if _is_code(dtype):
            return self._read_codes(name, dtype)
        unit = next(self._units(name), None)
        if unit is not None:
            # Some loaders multiply by it and others only round to its multiples; the headers do not show which.
            return Reading("unreadable", f"{unit} is stored beside it, so loaders may scale or round its elements")
        return PLAIN

    # Codes ------------------------------------------------------------------------------------------------------

    def _read_codes(self, name: str, dtype: Dtype) -> Reading:
        """Decide what the numbers of an F8 or integer tensor are. Internal tensors are excluded before."""
        if isinstance(dtype, BlockDtype):
            return Reading("unreadable", f"its elements are stored in blocks of the GGML type {dtype.name}")
        if _BUFFERS.fullmatch(_get_last_part(name)):
            return PLAIN
        others = list(self._others(name)) or list(self._floats_beside(name))
        if not self.declared and not others:
            return PLAIN
        scale = self._find_scale(name, dtype)
        if scale is not None and all(o == scale or _HARMLESS.fullmatch(_get_last_part(o)) for o in others):
            return Reading("scaled", f"its elements are multiplied by {scale}", scale)
        if others:
            others.sort(key=lambda o: (_HARMLESS.fullmatch(_get_last_part(o)) is not None, o))
            return Reading("unreadable", f"what its codes mean depends on {list_some(others, 4)}")
        return Reading(
            "unreadable", f"{self.declared} declares quantisation, and no scale says what its {dtype.name} codes mean"
        )

    def _find_scale(self, name: str, dtype: Dtype) -> str | None:
        """Find the scale by which the codes of `name` are multiplied; None if no scale of a known format is stored."""
        stem = name.removesuffix(".weight")
        for ending, dtypes in SCALES:
            named = (stem + ending,) if ending.startswith(".") else (name + ending, f"{stem}.weight{ending}")
            for scale in named:
                if scale in self._tensors and dtype.name.startswith(dtypes):
                    return scale
        return None

    def _others(self, name: str) -> Iterator[str]:
        """Yield the other tensors of a weight's module except the bias, or those named after a stacked tensor."""
        module = name.removesuffix(".weight")
        if module != name:
            skip = {f"{module}.{last}" for last in _WEIGHTS}
            yield from (other for other in self._under(f"{module}.") if other not in skip)
        else:
            yield from self._under(f"{name}.")
        yield from (other for other in self._under(f"{module}_") if _OFFSHOOT.fullmatch(other[len(module) :]))

    def _floats_beside(self, name: str) -> Iterator[str]:
        """Yield the float tensors in the module of a matrix of codes, such as `s` beside Marlin's `B`."""
        module, _, last = name.rpartition(".")
        if not module or last == "weight" or len(self._tensors[name].shape) < 2:
            return
        for other in self._under(f"{module}."):
            rest, dtype = other[len(module) + 1 :], self._tensors[other].dtype
            is_float = dtype.kind == "float" and not _is_code(dtype)
            if is_float and "." not in rest and not rest.endswith(("weight", "bias")):
                yield other

    # Floats -----------------------------------------------------------------------------------------------------

    def _units(self, name: str) -> Iterator[str]:
        """Yield the tensors beside a float weight that a quantiser stored, such as its scale."""
        if _get_last_part(name) == "bias":
            return
        module = name.removesuffix(".weight")
        for other in self._others(name):
            if not other.startswith(f"{module}."):
                if self.declared:
                    yield other
                continue
            *path, last = other[len(module) + 1 :].split(".")
            if "parametrizations" in path:  # the factors of torch's weight normalisation
                continue
            loose = not path and self.declared is not None and _LOOSE_UNITS.fullmatch(last) is not None
            if (
                last in _PACKED
                or loose
                or _UNITS.fullmatch(last)
                or not {"weight", "weight_quantizer"}.isdisjoint(path)
            ):
                yield other

    # Internals --------------------------------------------------------------------------------------------------

    def _internal(self, name: str, dtype: Dtype, shape: tuple[int, ...]) -> str:
        """Explain why only a quantiser needs a tensor; "" if the tensor has another use."""
        *path, last = name.split(".")
        is_float = dtype.kind == "float" and not _is_code(dtype)
        if name == _MARKER:
            return "it marks a file of scaled FP8 weights"
        if re.fullmatch(r"\w+:\w+", last) and not (last.endswith(":_data") and is_float):
            return "torchao takes tensors apart under such names"
        if _INTERNAL.fullmatch(last) or any(map(_QUANTISER.fullmatch, path)):
            return "quantisers store their own tensors under such names"
        if "weight" in path and "parametrizations" not in path:
            return "it is a part of a quantised weight"
        if _AMBIGUOUS.fullmatch(last) and (self.declared or not is_float):
            return "quantisers store their own tensors under such names"
        if _CACHE_SCALE.fullmatch(last):
            single = shape in ((), (1,)) and not last.startswith("output")
            if single or self.declared or not is_float:
                return "it is the scale of a quantised cache or activation"
        return self._find_owner(name, path, is_float)

    def _find_owner(self, name: str, path: list[str], is_float: bool) -> str:
        """Explain to which codes a scale or similar tensor belongs; "" if it belongs to none."""
        if owner := self._find_scaled(name):
            return f"it belongs to the quantised tensor {owner}"
        # A bias is not quantised; the first version of torchao stored it as `bias:_data`.
        is_bias = _get_last_part(name).partition(":")[0].endswith("bias")
        if is_float and path and not is_bias and (codes := self._find_stacked_codes(".".join(path))):
            return f"it is stored among codes such as {codes}"
        for depth in range(len(path), 0, -1):
            module = ".".join(path[:depth])
            rest = name[len(module) + 1 :]
            if rest not in _WEIGHTS and (codes := self._codes_of_layer(module)):
                return f"it belongs to a quantised layer, whose codes are {codes}"
        return ""

    def _find_scaled(self, name: str) -> str | None:
        """Return the name of the quantised tensor to which the tensor `name` belongs, or None.

        For example, `experts.down_proj_scale` belongs to `experts.down_proj`.
        """
        for match in re.finditer("_", _get_last_part(name)):
            cut = len(name) - len(_get_last_part(name)) + match.start()
            for base in (name[:cut], f"{name[:cut]}.weight"):
                if base in self._tensors and _is_code(self._tensors[base].dtype) and _OFFSHOOT.fullmatch(name[cut:]):
                    return base
        return None

    def _codes_of_layer(self, module: str) -> str | None:
        """Return the name of the codes of a quantised linear layer, None if `module` is not quantised."""
        if module not in self._layers:
            packed = (f"{module}.{last}" for last in _PACKED)
            codes = [f"{module}.weight", f"{module}.codes"]
            if f"{module}.indices" in self._tensors and next(self._under(f"{module}.centroids"), None):  # VPTQ
                codes.append(f"{module}.indices")
            found = [name for name in packed if name in self._tensors]
            found += [name for name in codes if name in self._tensors and _is_code(self._tensors[name].dtype)]
            self._layers[module] = found[0] if found else None
        return self._layers[module]

    def _find_stacked_codes(self, module: str) -> str | None:
        """Return a matrix of codes that `module` itself stores: the experts of a layer, or Marlin's `B`."""
        if module not in self._stacks:
            self._stacks[module] = next(self._matrices_of_codes(module), None)
        return self._stacks[module]

    def _matrices_of_codes(self, module: str) -> Iterator[str]:
        """Yield the matrices of codes among the tensors of a module, except its weight and bias."""
        for name in self._under(f"{module}."):
            header, last = self._tensors[name], name[len(module) + 1 :]
            if "." in last or last == "weight" or last.endswith("bias") or _BUFFERS.fullmatch(last):
                continue
            if len(header.shape) > 1 and _is_code(header.dtype):
                yield name

    def _under(self, prefix: str) -> Iterator[str]:
        """Yield the names that begin with `prefix`, sorted."""
        first = bisect_left(self._names, prefix)
        names = (self._names[at] for at in range(first, len(self._names)))
        return takewhile(lambda name: name.startswith(prefix), names)


def _get_last_part(name: str) -> str:
    """Return the last part of a tensor's name."""
    return name.rpartition(".")[2]


def _is_code(dtype: Dtype) -> bool:
    """Return True if numbers of this dtype may be codes: floats of at most 8 bits, all integers, blocks of GGUF."""
    is_small = dtype.kind in ("int", "uint") or dtype.name.startswith(("F8_", "F6_", "F4"))
    return is_small or isinstance(dtype, BlockDtype)


def _describe_declaration(
    config: Mapping[str, object],
    files: Iterable[str],
    metadata: Iterable[Mapping[str, str]],
    tensors: Mapping[str, Header],
) -> str | None:
    """Describe the place where a checkpoint declares quantisation; None if it does not."""
    sections: list[Mapping[str, object]] = [config, *(v for v in config.values() if isinstance(v, Mapping))]
    for section in sections:
        for key in _DECLARATIONS:
            if section.get(key):
                return f"config.json ({key})"
    if sidecar := min(filter(_SIDECARS.fullmatch, files), default=None):
        return sidecar
    if _MARKER in tensors:
        return f"the tensor {_MARKER}"
    for one in metadata:
        # torchao lists plain tensors too, so only the types of the listed tensors show that some are quantised.
        apart = "tensor_names" in one and any(re.search(r'"_type": *"(?!Tensor")', value) for value in one.values())
        if apart or "_quantization_metadata" in one:
            return "the metadata of a shard"
    return None
