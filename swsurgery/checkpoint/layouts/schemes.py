"""Read from config.json how compressed-tensors stored the weights of a module.

`quantization_config.config_groups` contains a scheme for each group of modules. A group selects its modules by class
names and regular expressions. Neither is evaluated here: the headers contain no classes, and a hostile expression can
take forever. A layout tries every scheme instead, and accepts the weight if all schemes that fit the stored tensors
describe the same matrix.

The keys are those of `QuantizationConfig`, `QuantizationScheme` and `QuantizationArgs` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from swsurgery.checkpoint.layouts.blocks import BlockMatrix
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.module import QuantisedModule
from swsurgery.storage.strict_json import quote

_NAME = "compressed-tensors"

_HARMLESS_KEYS = frozenset({"dynamic", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
"""Keys of a scheme that do not say how a weight is stored. The dtypes are those in the headers."""

_KEYS = frozenset({"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "actorder"})

FORMATS = frozenset({
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized",
})  # fmt: skip
"""Formats of compressed-tensors that layouts of this package read."""


@dataclass(frozen=True)
class Scheme:
    """What one group of config.json states about the weights of its modules.

    `format` is the format of the files, such as "pack-quantized". `kind` is "int" or "float". `strategy` says which
    elements share a scale: "tensor", "channel" (a row), "group" or "tensor_group" (`block` in one row), or "block".
    """

    format: str
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    block: tuple[int, int]
    actorder: str | None

    def describe(self) -> str:
        """Describe the scheme in the name of a layout, such as "4 bits, groups of 128"."""
        shared = {
            "tensor": "one scale",
            "channel": "one scale a row",
            "block": f"blocks of {self.block[0]} x {self.block[1]}",
        }.get(self.strategy, f"groups of {self.block[1]}")
        return f"{self.bits} bits, {shared}{'' if self.symmetric else ', zero points'}"


FitScheme = Callable[[QuantisedModule, Scheme], BlockMatrix]
"""Type of a function that describes the matrix of a module under a scheme. Raises CannotTell if they do not fit."""


def find_by_schemes(module: QuantisedModule, formats: Collection[str], fit: FitScheme) -> BlockMatrix | None:
    """Describe the matrix of a module by the schemes of config.json that have one of the formats.

    Returns None if no scheme has one. Raises CannotTell if no scheme fits, or if two describe different matrices.
    """
    schemes = [scheme for scheme in list_schemes(module) if scheme.format in formats]
    found: list[BlockMatrix] = []
    reasons = []
    for scheme in schemes:
        try:
            matrix = fit(module, scheme)
        except CannotTell as error:
            reasons.append(str(error))
        else:
            found += [matrix] if matrix not in found else []
    if len(found) > 1:
        raise CannotTell(f"{module.name} may be {' or '.join(matrix.layout for matrix in found)}")
    if not found and reasons:
        raise CannotTell(reasons[0])
    return found[0] if found else None


def is_compressed(module: QuantisedModule) -> bool:
    """Return True if config.json declares compressed-tensors."""
    return module.method == _NAME


def list_schemes(module: QuantisedModule) -> list[Scheme]:
    """List the schemes of config.json that quantise weights. Raises CannotTell if one of them cannot be read."""
    config = module.quantisation
    _refuse_changes(config)
    ignored = config.get("ignore")
    if isinstance(ignored, list) and module.name in ignored:
        raise CannotTell(f"config.json (ignore) says that {module.name} is not quantised")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CannotTell("config.json (config_groups) does not say how the weights are quantised")
    return [
        _read_scheme(config, f"config.json (config_groups.{quote(name)})", group)
        for name, group in groups.items()
        if not isinstance(group, Mapping) or group.get("weights") is not None
    ]


def _refuse_changes(config: Mapping[str, object]) -> None:
    """Raise CannotTell if weights were made sparse or rotated: their codes do not store the model's weights then."""
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise CannotTell(f"config.json (sparsity_config.format) is {quote(sparsity['format'])}")
    transform = config.get("transform_config")
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        raise CannotTell("config.json (transform_config) declares weights that are multiplied by another matrix")


def _read_scheme(config: Mapping[str, object], where: str, group: object) -> Scheme:
    """Read one group of config.json. Raises CannotTell."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        raise CannotTell(f"{where} does not say how the weights are quantised")
    form = group.get("format") or config.get("format")
    if not isinstance(form, str) or form not in FORMATS:
        raise CannotTell(f"{where} has the format {quote(form)}")
    unknown = sorted(set(weights) - _KEYS - _HARMLESS_KEYS)
    if unknown:
        raise CannotTell(f"{where} has the unknown key {quote(unknown[0])}")
    bits, kind, symmetric = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("symmetric", True)
    if type(bits) is not int or kind not in ("int", "float") or type(symmetric) is not bool:
        raise CannotTell(f"{where} does not state num_bits, type and symmetric as a whole number, a name and a bool")
    strategy, block = _read_strategy(where, weights)
    return Scheme(form, bits, str(kind), symmetric, strategy, block, _read_order(where, weights))


def _read_strategy(where: str, weights: Mapping[str, object]) -> tuple[str, tuple[int, int]]:
    """Return the strategy with the height and width of the blocks that share a scale, (0, 0) if they have no number."""
    size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy")
    if strategy is None:  # as compressed-tensors infers it
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy in ("tensor", "channel"):
        return str(strategy), (0, 0)
    if strategy in ("group", "tensor_group") and type(size) is int and size > 0:
        return str(strategy), (1, size)
    if strategy == "block":
        sizes = block.split("x") if isinstance(block, str) else block
        if isinstance(sizes, list) and len(sizes) == 2:
            numbers = [int(n) if isinstance(n, str) and n.isdecimal() and len(n) < 10 else n for n in sizes]
            if all(type(n) is int and n > 0 for n in numbers):
                return "block", (numbers[0], numbers[1])
    what = f"strategy {quote(strategy)}, group_size {quote(size)}, block_structure {quote(block)}"
    raise CannotTell(f"{where} has {what}, which do not say which elements share a scale")


def _read_order(where: str, weights: Mapping[str, object]) -> str | None:
    """Return "group" if the columns of a group are not adjacent, else None. Raises CannotTell for an unknown order."""
    order = weights.get("actorder")
    if order in (None, False, "weight", "static"):
        return None
    if order in (True, "group", "dynamic"):
        return "group"
    raise CannotTell(f"{where} has actorder {quote(order)}")
