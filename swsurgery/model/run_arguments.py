"""Check the arguments of functions that run a model, before torch is loaded.

Loading torch takes seconds, so a mistake that can be seen without it is reported first. Importing this module does not
load torch.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection

from swsurgery.errors import ModelError, Unrunnable

DEVICE_NAME = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
"""Matches the names of devices."""

GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
"""Device files of Linux drivers for GPUs: NVIDIA's, those of Jetson boards, of WSL and of AMD."""


def refuse_device(name: str) -> None:
    """Raise ModelError if no device has this name, and Unrunnable for a CUDA device if this machine has no GPU.

    The drivers are recognised by their device files, and only on Linux. `load.pick_device` asks torch later.
    """
    if not DEVICE_NAME.fullmatch(name):
        raise ModelError("no such device", name, "use --device auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and sys.platform == "linux" and not any(map(os.path.exists, GPU_FILES)):
        raise Unrunnable("no usable CUDA device", name, "use --device cpu")


def refuse_bad_prompts(prompts: Collection[str] | None) -> None:
    """Raise ModelError if a prompt is empty or is not valid Unicode. None stands for the built-in prompts."""
    for prompt in prompts or ():
        if not prompt:
            raise ModelError("a prompt is empty", "''", "give at least one character")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ModelError("the text is not valid Unicode", repr(prompt[:40]), "remove lone surrogates") from None


def refuse_empty_text(text: str | None) -> None:
    """Raise ModelError if the text is empty. None stands for the built-in text."""
    if text is not None and not text:
        raise ModelError("the text is too short", "0 of the 2 tokens that are needed", "give a longer text")
