"""Define the options of the sanity check of an edited checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from swsurgery.errors import SwsurgeryError
from swsurgery.model import Placement
from swsurgery.model.bounds import CheckedBounds
from swsurgery.model.controls import parse_controls
from swsurgery.model.protocol import BosChoice, Protocol, ProtocolName, choose_protocol
from swsurgery.model.run_arguments import refuse_bad_prompts, refuse_device, refuse_empty_text
from swsurgery.storage.arguments import require_choice, require_integer, require_number, require_strings, require_type

Check = Literal["auto", "off", "weights", "forward"]


@dataclass(frozen=True)
class CheckOptions:
    """Options of the sanity check.

    `text` is the text to run, or None for the built-in passage. `bounds` take precedence over the manifest's bounds; a
    bound that is None is taken from the manifest. `protocol` says how the text is cut and scored, and `windows`,
    `window`, `stride`, `bos` and `score_first` change it (`model/protocol.py`); None keeps the protocol's value.
    `generate` is the number of tokens by which both models continue each prompt. `controls` are other changes of the
    base to compare with: "mean", "outliers" or "outliers:N" (`model/controls.py`).
    `required` is True if a check that cannot be made is an error. None means True if any other option was set.
    """

    kind: Check = "auto"
    device: str = "auto"
    placement: Placement = "auto"
    text: str | None = None
    prompts: Sequence[str] | None = None
    bounds: CheckedBounds | None = None
    windows: int | None = None
    window: int | None = None
    generate: int = 0
    required: bool | None = None
    protocol: ProtocolName = "default"
    stride: int | None = None
    bos: BosChoice | None = None
    score_first: bool | None = None
    controls: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise TypeError for a field of the wrong type.

        Raises ModelError for an unknown device, an empty text, a bad prompt or an unknown control, and SwsurgeryError
        if `generate` is negative.
        """
        require_choice("kind", self.kind, get_args(Check))
        require_type("device", self.device, str)
        require_choice("placement", self.placement, get_args(Placement))
        require_type("text", self.text, str, optional=True)
        require_strings("prompts", self.prompts)
        require_type("bounds", self.bounds, CheckedBounds, optional=True)
        for name in ("windows", "window", "stride", "generate"):
            if name == "generate" or getattr(self, name) is not None:
                object.__setattr__(self, name, require_integer(name, getattr(self, name)))
        if self.generate < 0:
            raise SwsurgeryError("the number of tokens to generate must not be negative", self.generate)
        refuse_device(self.device)
        refuse_empty_text(self.text)
        refuse_bad_prompts(self.prompts)
        object.__setattr__(self, "controls", tuple(self.controls) if parse_controls(self.controls) else ())
        self.choose_protocol()

    def choose_protocol(self) -> Protocol:
        """Return the protocol with the options that change it. Raises ModelError for an option that contradicts it."""
        return choose_protocol(
            self.protocol,
            windows=self.windows,
            window=self.window,
            stride=self.stride,
            bos=self.bos,
            score_first=self.score_first,
        )

    @classmethod
    def of(cls, check: CheckOptions | Check | None) -> CheckOptions:
        """Convert the argument `check` of a public function to options. Raises TypeError."""
        if check is None:
            return cls()
        if isinstance(check, cls):
            return check
        if isinstance(check, str) and check in get_args(Check):
            return cls(check)
        kinds = ", ".join(map(repr, get_args(Check)))
        raise TypeError(f"check must be a CheckOptions, None, or one of {kinds}, not {check!r:.80}")

    @property
    def asked(self) -> bool:
        """True if the check must be made: `required` is set, or an option needs a forward pass."""
        if self.required is not None:
            return self.required
        return replace(self, kind="auto", bounds=None) != CheckOptions()


def make_bounds(most: float | None, least: float | None) -> CheckedBounds | None:
    """Return the bounds for a maximum and a minimum perplexity ratio; None if both are None.

    Raises TypeError for a value that is not a number, and SwsurgeryError for a number that is not finite and above 0.
    """
    given = [
        None if value is None else require_number(f"{name}_perplexity_ratio", value)
        for name, value in (("max", most), ("min", least))
    ]
    for value in given:
        if value is not None and not 0 < value < float("inf"):
            raise SwsurgeryError("a perplexity ratio must be a finite number above 0", value)
    return None if given == [None, None] else CheckedBounds(*given)
