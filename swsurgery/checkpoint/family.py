"""Define what a family of models is: its model types, its prefixes, and how it stores its MLPs.

architectures.py contains the families themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

ProjectionKind: TypeAlias = Literal["dense", "routed", "shared"]
Axes: TypeAlias = Literal["row col", "col row", "expert row col", "expert col row"]
Fusion: TypeAlias = Literal["apart", "halves", "alternating"]


@dataclass(frozen=True)
class InputProjections:
    """The input projections of an MLP: the matrices whose products are the activations of its neurons.

    `names` are the names of the modules, which replace the name of the down projection's module: ("gate_proj",
    "up_proj"), or one name if the MLP has no gate. `fusion` is "apart" if each matrix is a tensor. Otherwise one tensor
    has gate and up: "halves" stores all neurons of the gate before those of up, "alternating" stores gate and up of
    neuron 0, then of neuron 1, and so on. The axes are those of the down projection with row and col exchanged.

    `adapters` is the name of a list of low-rank adapters, each stored as two matrices (`NAME.0.0` and `NAME.0.1`), or
    None. The second matrix of an adapter has the rows of the input projections, and the model adds its products to
    theirs.
    """

    names: tuple[str, ...]
    fusion: Fusion = "apart"
    adapters: str | None = None


@dataclass(frozen=True)
class Template:
    """One form in which a family stores down projections: their names, their axes, and the inputs of the same MLP.

    `name` is the name of the tensor without its prefix, such as "layers.{layer}.mlp.down_proj.weight" without "model.".
    `axes` names the axes of the tensor in order. `inputs` is None if nobody has compared the input projections with a
    running model; rows and columns are supported then, but not neurons and experts. `stored_only` is True if
    transformers transposes the tensors while loading them, so that only files store it in this way and no loaded
    model does.

    `rows_key` is the key of config.json that states the number of rows, such as "moe_latent_size", if it can differ
    from the hidden size. `direct` is False if another matrix multiplies the output before it is added to the residual
    stream, so that a row is no channel of the residual stream.
    """

    kind: ProjectionKind
    name: str
    axes: Axes
    inputs: InputProjections | None
    stored_only: bool = False
    rows_key: str | None = None
    direct: bool = True


@dataclass(frozen=True)
class Family:
    """Model types (as in config.json) that store their down projections in the same way.

    `trunks` are the prefixes of tensor names in a text-only model: one if the model has a language-modelling head
    ("model."), one if it has none (""). Nemotron-H has one more, because files and loaded models have different
    prefixes. A mixture of experts has several templates: one for each kind of layer, and one for each way to store
    the experts.
    """

    name: str
    model_types: tuple[str, ...]
    trunks: tuple[str, ...]
    templates: tuple[Template, ...]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """All prefixes that may precede a template's name in the full name of a tensor."""
        return list_prefixes(self.trunks)


WRAPPERS = ("language_model.", "model.language_model.", "text_model.", "model.text_model.", "thinker.")
"""Prefixes of the language model in multimodal models. Each may precede or replace the trunk of any family. Example:
LLaVA stores "language_model.model.layers.", and transformers loads it as "model.language_model.layers.". Qwen-Omni
stores "thinker.model.layers.", beside another language model for speech ("talker.model.layers.")."""


@cache
def list_prefixes(trunks: tuple[str, ...]) -> tuple[str, ...]:
    """Return all prefixes of tensor names: each trunk alone, each wrapper with each trunk, and each wrapper alone."""
    inner = (*trunks, "")
    return tuple(dict.fromkeys((*trunks, *(wrapper + trunk for wrapper in WRAPPERS for trunk in inner))))
