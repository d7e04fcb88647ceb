"""Define the options for running a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, get_args

from swsurgery.model import Placement
from swsurgery.model.protocol import Protocol
from swsurgery.model.run_arguments import refuse_device, refuse_empty_text
from swsurgery.storage.arguments import require_choice, require_type


class DeviceArguments(TypedDict):
    """Keyword arguments of every function that loads a model."""

    device: str
    placement: Placement


class RunArguments(DeviceArguments):
    """Keyword arguments of every function that runs a model on windows of a text."""

    text: str | None
    protocol: Protocol


@dataclass(frozen=True)
class RunOptions:
    """The options for running a model. `text` is the text that the model reads; None means the protocol's text."""

    device: str
    placement: Placement
    text: str | None
    protocol: Protocol

    def __post_init__(self) -> None:
        """Raise TypeError for a field of the wrong type, and ModelError for an unknown device or an empty text."""
        require_type("device", self.device, str)
        require_choice("placement", self.placement, get_args(Placement))
        require_type("text", self.text, str, optional=True)
        refuse_device(self.device)
        refuse_empty_text(self.text)

    @property
    def on_device(self) -> DeviceArguments:
        """The options for loading a model, as keyword arguments."""
        return {"device": self.device, "placement": self.placement}

    @property
    def on_text(self) -> RunArguments:
        """All options, as keyword arguments."""
        return {**self.on_device, "text": self.text, "protocol": self.protocol}
