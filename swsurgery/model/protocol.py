"""Define protocols: how a text is cut into windows, and which of its tokens are scored.

Two perplexities can be compared only if they were measured by the same protocol. Every result therefore contains its
protocol. This module must not depend on torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from swsurgery.errors import ModelError
from swsurgery.storage.arguments import require_choice, require_integer, require_type

ProtocolName = Literal["default", "paper", "lm-eval"]
"""The names of the protocols, as `PROTOCOLS` defines them."""

BosChoice = Literal["auto", "yes", "no"]
"""Whether a window begins with the BOS token; "auto" means that it does if the tokenizer adds BOS by default."""


@dataclass(frozen=True)
class Protocol:
    """How a text is cut into windows, and which of its tokens are scored.

    At most `windows` windows are cut (None: all), each of `window` tokens of text (None: the model's context length).
    A window begins `stride` tokens after the window before it (None: `window`, so windows do not overlap). A token of
    text that is in two windows is scored in the first of them only. `bos` says whether each window begins with BOS.

    A token is scored if another token is before it in its window. With `score_first` False, the first token of text in
    a window is not scored even if BOS is before it. The same tokens are then scored with and without BOS.

    `changed` names the options by which a user changed the protocol `name`.
    """

    name: ProtocolName = "default"
    windows: int | None = 16
    window: int | None = 512
    stride: int | None = None
    bos: BosChoice = "auto"
    score_first: bool = True
    changed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ModelError if windows are too few or too short, or if text between two windows would be left out."""
        windows, window, stride = self.windows, self.window, self.stride
        if (windows is not None and windows < 1) or (window is not None and window < 2):
            raise ModelError(
                "the windows are too few or too short",
                f"{'all' if windows is None else windows} windows of {window} tokens",
                "use at least 1 window, and at least 2 tokens in each",
            )
        if stride is not None and window is not None and not 1 <= stride <= window:
            raise ModelError("the stride is not from 1 to the tokens of a window", stride, f"give 1 to {window}")

    def resolve(self, window: int, has_bos: bool) -> Protocol:
        """Return the protocol with the values that were used: tokens in a window, stride, and whether there was BOS."""
        stride = min(self.stride or window, window)
        return replace(self, window=window, stride=stride, bos="yes" if has_bos else "no")

    def describe(self) -> str:
        """Describe the protocol for a reader, such as "default: without overlap, without BOS".

        The number of windows and their length are left out, because every result states them.
        """
        changed = f" with another {' and '.join(self.changed)}" if self.changed else ""
        parts = ["without overlap" if self.stride in (None, self.window) else f"stride {self.stride:,}"]
        parts.append({"yes": "with BOS", "no": "without BOS", "auto": "BOS as the tokenizer adds it"}[self.bos])
        if self.name == "paper" and self.bos == "yes":
            parts[1] = "BOS in front of the whole text"
        if self.name == "lm-eval":
            parts = ["whole documents, every token scored"]
        parts += [] if self.score_first else ["first token not scored"]
        return f"{self.name}{changed}: {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """Return the protocol in types of JSON. The number of windows is left out, because results contain it."""
        return {
            "name": self.name,
            "description": self.describe(),
            "window": self.window,
            "stride": self.stride,
            "bos": self.bos,
            "score_first": self.score_first,
            "changed": list(self.changed),
        }


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "default": Protocol(),
    "paper": Protocol("paper", windows=None, window=2048),
    "lm-eval": Protocol("lm-eval", windows=None, window=None, bos="yes"),
}
"""The protocols. "paper" is that of arXiv:2411.07191: the raw test set of WikiText-2, whose lines are joined by empty
lines, in windows of 2,048 tokens. If the tokenizer adds BOS, it is the first token of the whole text, and no other
window has one. "lm-eval" is the rolling log-likelihood of lm-evaluation-harness: every token of a document is scored.
The first one is predicted from BOS, or from EOS without BOS. The first token of a later window is predicted from the
token before it."""

DEFAULT_PROTOCOL = PROTOCOLS["default"]
"""The protocol of every command for which the user names no other."""

FIXED: Mapping[ProtocolName, frozenset[str]] = {"lm-eval": frozenset({"windows", "stride", "bos", "score_first"})}
"""The options that contradict a protocol. All other options change it, and the result says so."""


def choose_protocol(
    name: ProtocolName = "default",
    *,
    windows: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    bos: BosChoice | None = None,
    score_first: bool | None = None,
) -> Protocol:
    """Return a protocol with the options that a user gave. None keeps the value of the protocol.

    Raises TypeError for an option of the wrong type, and ModelError for an option that contradicts the protocol, for
    a window of fewer than two tokens, and for a stride that is not between 1 and the length of a window.
    """
    require_choice("protocol", name, get_args(ProtocolName))
    require_choice("bos", bos, get_args(BosChoice), optional=True)
    require_type("score_first", score_first, bool, optional=True)
    numbers = {"windows": windows, "window": window, "stride": stride}
    given: dict[str, Any] = {
        key: require_integer(key, value) for key, value in numbers.items() if value is not None
    } | {key: value for key, value in (("bos", bos), ("score_first", score_first)) if value is not None}
    for key in FIXED.get(name, frozenset()) & set(given):
        option = f"--{key.replace('_', '-')}"
        raise ModelError(f"protocol {name} decides this itself", option, f"leave out {option}, or choose no protocol")
    chosen = PROTOCOLS[name]
    changed = () if name == "default" else tuple(key for key in given if given[key] != getattr(chosen, key))
    return replace(chosen, **given, changed=changed)
