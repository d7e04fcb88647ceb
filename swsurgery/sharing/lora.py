"""Render edits of single scalars as a LoRA adapter that PEFT loads.

The files are made as bytes, without torch and without PEFT, under the names that PEFT 0.21 uses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from swsurgery.checkpoint.channels import SHARED_BLOCKS
from swsurgery.checkpoint.projections import name_prefixes
from swsurgery.checkpoint.tying import is_tied_by_config
from swsurgery.errors import NumberError, PlanError, pluralise
from swsurgery.manifest.patch import Patch, PatchScalar, render_json, render_safetensors
from swsurgery.storage.dtypes import DTYPES, decode, encode, round_to
from swsurgery.storage.numbers import format_exact

LINEAR = frozenset([
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value", "Wqkv", "dense", "gate_proj",
    "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "fc_in", "fc_out", "c_fc", "c_proj", "dense_h_to_4h",
    "dense_4h_to_h", "lm_head", "embed_out",
])  # fmt: skip
"""Names of modules that are linear layers in every model type of transformers that is not in TRANSPOSED."""

TRANSPOSED = {"gpt2": frozenset({"c_attn", "c_fc", "c_proj"}), "openai-gpt": frozenset({"c_attn", "c_fc", "c_proj"})}
"""Model types that use transformers' Conv1D layers, stored as [input, output], and the names of these layers."""

OF_EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj"})
"""Target names that PEFT 0.21 applies to the stacked experts of a mixture of experts, even if the layer is dense."""

NO_ZEROS: Mapping[str, int] = MappingProxyType({})
"""For edits of single scalars only."""


def render_adapter(
    patch: Patch, config: dict[str, Any], zeros: Mapping[str, int] = NO_ZEROS
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Render a LoRA adapter (arXiv:2106.09685): lora_B @ lora_A is new - old at each edited scalar and zero elsewhere.

    A scalar needs rank 1; scalars in one row, or in one column, share a rank. `zeros` contains the tensors in which an
    edit changes regions, and the number of their unchanged scalars that are -0.0. Such a tensor must be exact, bit for
    bit, when PEFT has merged the adapter.

    Returns (file name -> bytes, notes on single scalars that PEFT cannot merge exactly). Raises PlanError, which lists
    every edit that an adapter cannot represent, with one line for each tensor with regions.
    """
    faults: list[str] = []
    for group in patch.group_by_tensor():
        found = [fault for s in group if (fault := _explain_unfit(s, config))]
        if group[0].tensor in zeros:
            found = found or _list_inexact(group, zeros[group[0].tensor])
            more = f", and {len(found) - 1} more of this tensor" if len(found) > 1 else ""
            found = [found[0] + more] if found else []
        faults += found
    if faults:
        raise PlanError.of(faults)
    transposed = _get_kind(config) in TRANSPOSED
    arrays: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    ranks: dict[str, int] = {}
    notes: list[str] = []
    for group in patch.group_by_tensor():
        module = _find_module(group[0].tensor, config)
        assert module is not None, "_explain_unfit refuses a tensor without a module"
        rows, columns = group[0].shape[::-1] if transposed else group[0].shape
        deltas = {}
        for scalar in group:
            row, column = scalar.index[::-1] if transposed else scalar.index
            deltas[row, column], note = _compute_delta(scalar)
            notes += note
        a, b = _factorise(deltas, rows, columns)
        ranks[module] = len(a)
        for name, matrix in (("lora_A", a), ("lora_B", b)):
            key = f"base_model.model.{module}.{name}.weight"
            arrays[key] = "F32", (len(matrix), len(matrix[0]) // 4), b"".join(matrix)
    rank = max(ranks.values())
    others = {module: r for module, r in sorted(ranks.items()) if r != rank}
    pattern = {re.escape(module): r for module, r in others.items()}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": patch.base.repo_id,
        "revision": patch.base.revision,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": rank,
        "lora_alpha": rank,  # equal to r, so that PEFT does not scale the product
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
    }
    origin = {"format": "pt", "swsurgery": json.dumps(patch.describe_origin(), sort_keys=True, separators=(",", ":"))}
    return {
        "adapter_config.json": render_json(settings),
        "adapter_model.safetensors": render_safetensors(arrays, origin),
    }, tuple(notes)


def _list_inexact(group: Sequence[PatchScalar], zeros: int) -> list[str]:
    """List the scalars of a tensor that do not have exactly the new bits when PEFT has merged the adapter.

    `zeros` is the number of scalars of the tensor that are -0.0 and not edited.
    """
    faults: list[str] = []
    for scalar in group:
        negative = Fraction(decode(scalar.dtype, scalar.new)) == 0 and any(scalar.new)
        notes = [f"{scalar.coordinate} becomes -0.0, which a sum never is"] if negative else _compute_delta(scalar)[1]
        faults += [f"a LoRA adapter cannot represent this edit: {note} (use --format sparse)" for note in notes]
    if zeros:
        what = f"{pluralise(zeros, 'scalar')} of {group[0].tensor} would change from -0.0 to 0.0 when PEFT adds 0"
        faults.append(f"a LoRA adapter cannot represent this edit: {what} (use --format sparse)")
    return faults


def _get_kind(config: dict[str, Any]) -> str:
    """Return the model type in config.json, or "" if it is missing or not a string."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else ""


def _explain_unfit(scalar: PatchScalar, config: dict[str, Any]) -> str | None:
    """Return why an adapter cannot represent this edit, or None if it can.

    Only tensors that are certainly weights of linear layers are accepted. PEFT would silently ignore an adapter for
    any other weight, such as a scale or the weight of a router.
    """
    parts = scalar.tensor.split(".")
    kind = _get_kind(config)
    linear = TRANSPOSED.get(kind, LINEAR)
    reason = ""
    if "experts" in parts:
        reason = "is the weight of an expert, and transformers stacks the experts in one tensor"
    elif parts[-2:-1] and parts[-2] in OF_EXPERTS and any("experts" in key for key in config):
        reason = "has the name of a layer of the experts, to which PEFT would apply the adapter too"
    elif not SHARED_BLOCKS.isdisjoint(parts):
        reason = "belongs to a block that several layers share, and PEFT would change it in one of them"
    elif len(scalar.shape) != 2 or parts[-1] != "weight" or len(parts) < 2 or parts[-2] not in linear:
        reason = "is not known to be the weight of a linear layer"
    elif scalar.dtype.kind != "float":
        reason = f"is stored as {scalar.dtype.name}, which is not a floating-point dtype"
    elif parts[-2] in ("lm_head", "embed_out") and is_tied_by_config(config):
        reason = "is tied to the embedding, which an adapter of the head would not change"
    elif _find_module(scalar.tensor, config) is None:
        reason = "may have another name in the loaded model"
    elif not math.isfinite(decode(scalar.dtype, scalar.old)):
        reason = (
            f"is {format_exact(decode(scalar.dtype, scalar.old))} in the base, and adding a number does not change that"
        )
    elif not math.isfinite(decode(scalar.dtype, scalar.new)):
        reason = f"becomes {format_exact(decode(scalar.dtype, scalar.new))}, which adding a finite number cannot give"
    if not reason:
        return None
    return f"a LoRA adapter cannot represent this edit: {scalar.coordinate} {reason} (use --format sparse)"


def _find_module(tensor: str, config: dict[str, Any]) -> str | None:
    """Return the name that the module of a stored weight has in the loaded model, or None if it is uncertain.

    The loaded model has a language-model head, even if the checkpoint was saved without one.
    """
    module = tensor.removesuffix(".weight")
    if any(type(config.get(section)) is dict for section in ("text_config", "language_config", "llm_config")):
        return module if module.startswith("model.language_model.") else None
    trunk = name_prefixes(config)[:1]
    if module in ("lm_head", "embed_out") or not trunk or module.startswith(trunk[0]):
        return module
    if module.startswith("backbone."):  # Nemotron-H: transformers loads it under another name
        return None
    return trunk[0] + module  # the checkpoint was saved without a head, so its names lack the trunk's prefix


def _compute_delta(scalar: PatchScalar) -> tuple[bytes, list[str]]:
    """Return new - old as the bytes of a float32, and a list of notes.

    There is a note if adding this difference to the base's weight, as PEFT does, does not give the new value.
    """
    single = DTYPES["F32"]
    old, new = decode(scalar.dtype, scalar.old), decode(scalar.dtype, scalar.new)
    difference = Fraction(new) - Fraction(old)
    try:
        delta = encode(single, difference)
    except NumberError as error:
        raise PlanError(
            f"a LoRA adapter stores the difference as float32: {error}", scalar.coordinate, "use --format sparse"
        ) from None
    total: float | Fraction = Fraction(old) + Fraction(decode(single, delta))
    if scalar.dtype.name != "F64":
        total = round_to(single, total)  # PEFT adds in float32, or in float64 to a weight that is float64
    merged = round_to(scalar.dtype, total)
    if merged == new:
        return delta, []
    result = f"merged by PEFT, {scalar.coordinate} becomes {format_exact(merged)}, not {format_exact(new)}"
    return delta, [f"{result}: new - old = {format_exact(difference)} does not fit into float32"]


def _factorise(deltas: dict[tuple[int, int], bytes], rows: int, columns: int) -> tuple[list[bytes], list[bytes]]:
    """Return the rows of lora_A (rank x columns) and of lora_B (rows x rank), as bytes of float32.

    All nonzero values of one of the two matrices are 1, so their product is exact.
    """
    one = encode(DTYPES["F32"], 1)
    by_row = len({row for row, _ in deltas}) <= len({column for _, column in deltas})
    shared = sorted({place[0 if by_row else 1] for place in deltas})
    numbers = {position: number for number, position in enumerate(shared)}
    a = [bytearray(4 * columns) for _ in shared]
    b = [bytearray(4 * len(shared)) for _ in range(rows)]
    for (row, column), delta in deltas.items():
        number = numbers[row if by_row else column]
        in_a, in_b = (delta, one) if by_row else (one, delta)
        a[number][4 * column : 4 * column + 4] = in_a
        b[row][4 * number : 4 * number + 4] = in_b
    return [bytes(line) for line in a], [bytes(line) for line in b]
