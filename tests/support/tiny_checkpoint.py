"""A tiny Llama with a tokenizer, as a base and a patched directory on disk. No test lives here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from swsurgery.model import ScalarChange
from swsurgery.storage.coordinate import Coordinate

TEXT = """The river was high that spring, and the bridge was closed. We walked along the bank until we found a boat.
There was nobody in it. "Is it yours?" she asked. I said that it was not, but that THE RIVER did not mind.
In the theory of the thing, a boat goes where the water goes; in practice it went into the reeds, and so did we.
"""
DOWN = "model.layers.1.mlp.down_proj.weight"
VOCABULARY = 320


def make_tokenizer(bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE trained on TEXT; with `bos` it puts <s> in front and </s> behind, else it adds nothing."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def change(index: tuple[int, ...], patched: float, base: float, tensor: str = DOWN) -> ScalarChange:
    return ScalarChange(Coordinate(tensor, index), base, patched)


@dataclass(frozen=True)
class Pair:
    """Two directories that differ by `changes`."""

    base: Path
    patched: Path
    changes: tuple[ScalarChange, ...]

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.patched / "config.json").read_text())


def write_pair(
    folder: Path,
    edits: Sequence[tuple[tuple[int, ...], float]] = (((3, 7), 5.0),),
    *,
    bos: bool = False,
    dtype: torch.dtype = torch.float32,
    positions: int = 64,
) -> Pair:
    """Write folder/base and folder/patched: (index, new value) in DOWN. The random weights are large enough that the
    models make up their minds, and the same each time."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    base, patched = folder / "base", folder / "patched"
    model.to(dtype).save_pretrained(base)
    make_tokenizer(bos).save_pretrained(base)
    shutil.copytree(base, patched)
    tensors = load_file(base / "model.safetensors")
    changes = []
    for index, value in edits:
        old = float(tensors[DOWN][index])
        tensors[DOWN][index] = value
        changes.append(change(index, float(tensors[DOWN][index]), old))
    save_file(tensors, patched / "model.safetensors", {"format": "pt"})
    return Pair(base, patched, tuple(changes))


def load(folder: Path, device: str = "cpu") -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
