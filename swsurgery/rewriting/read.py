"""Build the function of an operation from its JSON options, as a manifest gives them and the record stores them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from swsurgery.rewriting.clip import ClipFunction, Rule
from swsurgery.rewriting.elementwise import ScaleFunction, SetFunction, ZeroFunction
from swsurgery.rewriting.function import Function
from swsurgery.rewriting.prune import PruneFunction
from swsurgery.rewriting.round import RoundFunction
from swsurgery.rewriting.scope import read_scope
from swsurgery.storage.numbers import JSON_NUMBER, Written

Options = Mapping[str, object]

_RULES: tuple[Rule, ...] = ("z", "fraction", "iqr")


def build_function(op: str, options: Options) -> Function:
    """Build the function of the operation `op` ("zero", "scale", "set", "clip", "prune_outliers" or "round").

    Raises ValueError for an unknown operation, and for options that are missing, unknown or out of range.
    """
    build = FUNCTIONS.get(op)
    if build is None:
        raise ValueError(f"no function computes {op!r}: give one of {', '.join(FUNCTIONS)}")
    return build(options)


def _build_zero(options: Options) -> Function:
    _refuse_unknown("zero", options)
    return ZeroFunction()


def _build_scale(options: Options) -> Function:
    _refuse_unknown("scale", options, "factor")
    factor = _read_number("factor", options.get("factor"))
    if not factor:
        raise ValueError("factor is 0: use zero")
    return ScaleFunction(factor)


def _build_set(options: Options) -> Function:
    _refuse_unknown("set", options, "value", "bits")
    _require_one("set", options, "value", "bits")
    bits, value = options.get("bits"), options.get("value")
    if bits is not None:
        if not isinstance(bits, str) or not bits.startswith("0x"):
            raise ValueError(f"bits is {bits!r}: give a hexadecimal number such as '0x40bc'")
        return SetFunction(bits=bits)
    if isinstance(value, str) and re.fullmatch(JSON_NUMBER, value):
        value = Written(value)  # the text of a number that is no float64
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"value is {value!r}: give a number")
    return SetFunction(value)  # not converted to float64: it may be a Written or an int of any size


def _build_clip(options: Options) -> Function:
    return _read_clip("clip", options, "per", "block")


def _read_clip(op: str, options: Options, *scope: str) -> ClipFunction:
    """Build a clip from exactly one of `z`, `fraction` and `iqr`, and the options of its scope."""
    _refuse_unknown(op, options, *_RULES, *scope)
    _require_one(op, options, *_RULES)
    rule = next(name for name in _RULES if options.get(name) is not None)
    amount = _read_number(rule, options[rule])
    if rule == "fraction":
        _check_fraction(amount)
    elif amount < 0 or (rule == "z" and not amount):
        raise ValueError(f"{rule} is {amount:g}: give a {'positive number' if rule == 'z' else 'number from 0'}")
    return ClipFunction(rule, amount, read_scope(options.get("per"), options.get("block")))


def _build_prune(options: Options) -> Function:
    _refuse_unknown("prune_outliers", options, "count", "fraction")
    if _require_one("prune_outliers", options, "count", "fraction") == "fraction":
        fraction = _read_number("fraction", options["fraction"])
        _check_fraction(fraction)
        return PruneFunction(fraction=fraction)
    count = options["count"]
    if type(count) is not int or count < 1:
        raise ValueError(f"count is {count!r}: give a positive whole number")
    return PruneFunction(count=count)


def _build_round(options: Options) -> Function:
    _refuse_unknown("round", options, "bits", "symmetric", "levels", "per", "block", "clip")
    bits, clip = options.get("bits"), options.get("clip")
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}: give a whole number from 2 to 8")
    symmetric, levels = options.get("symmetric", True), options.get("levels", "integer")
    if not isinstance(symmetric, bool):
        raise ValueError(f"symmetric is {symmetric!r}: give true or false")
    if levels != "integer" and levels != "nf4":
        raise ValueError(f"levels is {levels!r}: give integer or nf4")
    if levels == "nf4" and (bits != 4 or not symmetric):
        raise ValueError("levels nf4 are 4 bits and symmetric")
    if clip is not None and not isinstance(clip, Mapping):
        raise ValueError(f"clip is {clip!r}: give the options of a clip, such as {{'z': 5}}")
    scope = read_scope(options.get("per"), options.get("block"))
    return RoundFunction(bits, symmetric, levels, scope, None if clip is None else _read_clip("clip of round", clip))


FUNCTIONS: dict[str, Callable[[Options], Function]] = {
    "zero": _build_zero,
    "scale": _build_scale,
    "set": _build_set,
    "clip": _build_clip,
    "prune_outliers": _build_prune,
    "round": _build_round,
}


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction:g}: give a number between 0 and 1")


def _refuse_unknown(op: str, options: Options, *names: str) -> None:
    unknown = sorted(options.keys() - set(names))
    if unknown:
        raise ValueError(f"{op} has no option {', '.join(unknown)}")


def _require_one(op: str, options: Options, *names: str) -> str:
    given = [name for name in names if options.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"{op} needs exactly one of {', '.join(names)}")
    return given[0]


def _read_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: give a finite number")
    return float(value)
