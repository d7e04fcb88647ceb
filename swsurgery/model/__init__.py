"""The only room that knows torch and transformers: it loads a checkpoint as a model and looks at what it computes.

    check.py        the sanity check on one page; start here
    load.py         device, dtype, model and tokenizer from a local directory, quietly
    tokenizer.py    the checkpoint's tokenizer, in a process of limited memory and time: tokenizer_child.py
    forward.py      any number of variants of a model, layer by layer, in one reading of its weights
    places.py       where stored scalars are in a loaded model, and how they get other values for a while
    calls.py        what a layer is called with
    stream.py       the weights of one layer at a time, straight from the shards; weight_plan.py says which bytes
                    make up which parameter
    measure.py      the figures: perplexity, KL, stop-word mass, next tokens
    activations.py  super weights by the activations that they make; spikes.py watches the layers for it, and
                    persistence.py says which activations persist
    weights.py      super weights by the weights alone; scores.py reads and scores them, without torch
    confirm.py      what zeroing candidates does; suspects.py adds companions, and random scalars of like size
    sweep.py        quality as a function of a factor
    stopwords.py    English function words
    passage.txt     the built-in text, written for this check

Importing this package, or `check`, does not load torch; running a check does. Nothing here reads shards for the
purpose of editing them, and nothing here writes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.storage.coordinate import Coordinate

Placement = Literal["auto", "whole", "streamed"]
"""Where the weights are while a model runs: all on the device, or two layers of them at a time."""


@dataclass(frozen=True)
class ScalarChange:
    """One edited scalar: where it is stored, and its exact value in the base and in the patched checkpoint."""

    coordinate: Coordinate
    base: float
    patched: float


def local_directory(checkpoint: Checkpoint) -> Path:
    """Return the directory of a checkpoint that is on this machine, as every checkpoint is that a model is run from."""
    assert isinstance(checkpoint.root, Path)
    return checkpoint.root


def available() -> str | None:
    """Why no model can be run here ("torch is not installed"), or None where it can. Loads neither library."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
