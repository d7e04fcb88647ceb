"""Zeroing located neurons and experts in the files kills exactly those, in tiny models of every family."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from multiplied import VARIANTS, products, write_variant
from safetensors.numpy import load_file, save_file

from swsurgery.checkpoint.architectures import FAMILIES
from swsurgery.checkpoint.projections import (
    DownProjection,
    list_down_projections,
    list_loaded_candidates,
    list_templates,
    locate,
)
from swsurgery.checkpoint.structures import locate_column, locate_expert, locate_neuron, locate_row
from swsurgery.storage.region import Region

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

BIASED = {  # options that store biases of the MLP where the family has none by default, and the reverse
    "llama": {"mlp_bias": True},
    "granite": {"mlp_bias": True},
    "smollm3": {"mlp_bias": True},
    "falcon": {"bias": True},
    "starcoder2": {"use_bias": False},
    "opt": {"enable_bias": False},
}
SAME = ("hunyuan_v1_dense", "phi4_multimodal", "qwen2_5_omni_thinker")
"""Models whose only template is that of another model of `VARIANTS`."""
# EXAONE-4 is in no family; the names of its tensors are those of Llama.
CASES = [
    *(variant for variant in VARIANTS if variant[0] not in SAME),
    ("exaone4", ""),
    *((name, "biased") for name in BIASED),
]
MOE = [c for c in CASES if re.search("moe|mixtral|deepseek|gpt_oss|llama4|nemotron_h|jamba|kimi|longcat|step3", c[0])]


def write_case(name: str, variant: str, folder: Path) -> None:
    """Write a model whose biases are all different from zero."""
    if variant == "biased":
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **tiny_models.MODELS[name], **BIASED[name])
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0.0, 0.3)
        model.save_pretrained(folder)
    else:
        write_variant(name, variant, folder)
    tensors = load_file(folder / "model.safetensors")
    chance = np.random.default_rng(1)
    for tensor, values in tensors.items():
        if tensor.endswith("bias"):
            tensors[tensor] = chance.uniform(0.1, 0.3, values.shape).astype(values.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


class Case:
    """One saved model, and the same model with some regions of its file changed."""

    def __init__(self, name: str, variant: str, folder: Path):
        self.name, self.folder = name, folder
        write_case(name, variant, folder / "base")
        self.config, self.shapes = tiny_models.read(folder / "base")
        self.tensors = load_file(folder / "base" / "model.safetensors")
        self.base = tiny_models.load(name, folder / "base")
        self.projections = list(list_down_projections(self.config, self.shapes))
        self.chance = random.Random(f"{name} {variant}")

    def change(self, regions, how) -> torch.nn.Module:
        tensors = {name: values.copy() for name, values in self.tensors.items()}
        for tensor, bounds in regions:
            part = tensors[tensor][tuple(slice(*one) for one in bounds)]
            part[...] = how(part)
        shutil.copytree(self.folder / "base", self.folder / "patched", dirs_exist_ok=True)
        save_file(tensors, self.folder / "patched" / "model.safetensors", {"format": "pt"})
        return tiny_models.load(self.name, self.folder / "patched")

    def product(self, model: torch.nn.Module, projection: DownProjection, col: int):
        """Return the product of the activations [token, neuron] and the down projection."""
        layer, expert = projection.layer, projection.expert
        stored = locate(self.config, self.shapes, layer=layer, row=0, col=col, expert=expert)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        loaded = next(c for c in list_loaded_candidates(self.config, stored, self.shapes) if c.tensor in parameters)
        [product] = products(model, loaded)
        assert product.neuron == col
        return product

    def choose(self) -> list[DownProjection]:
        """Return one down projection of each kind."""
        kinds = dict.fromkeys(type(p.expert) for p in self.projections)
        return [self.chance.choice([p for p in self.projections if type(p.expert) is kind]) for kind in kinds]


def count_used(shapes, regions: list[Region]) -> dict[str, np.ndarray]:
    """Count how many regions use each scalar of a tensor."""
    used = {tensor: np.zeros(shapes[tensor], int) for tensor, _ in regions}
    for tensor, bounds in regions:
        used[tensor][tuple(slice(*one) for one in bounds)] += 1
    return used


def test_every_template_of_the_table_is_stored_by_one_of_the_models(tmp_path):
    stored = set()
    for name, variant in VARIANTS:
        folder = tmp_path / f"{name} {variant}"
        write_variant(name, variant, folder)
        config, shapes = tiny_models.read(folder)
        for projection in list_down_projections(config, shapes):
            stored.update(list_templates(config, projection))
    # No class of transformers stores these; test_structures.py has their published names.
    published = ("residual_mlp.w2", "block_sparse_moe.mlp.w2", "base_layer", "layers.{layer}.mlp.dense_4h_to_h")
    templates = {template for family in FAMILIES for template in family.templates if template.inputs} - stored
    assert not [template for template in templates if not any(name in template.name for name in published)]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_located_neuron_is_the_one_that_dies(name, variant, tmp_path):
    case = Case(name, variant, tmp_path)
    noise = np.random.default_rng(2)
    for projection in case.choose():
        place = (projection.layer, projection.expert)
        alive = case.product(case.base, projection, 0).left.abs().amax(0)
        neuron = case.chance.choice([n for n in range(projection.cols) if alive[n] > 0])
        others = [n for n in range(projection.cols) if n != neuron]
        *inputs, down = locate_neuron(case.config, case.shapes, place[0], neuron, place[1])
        before = case.product(case.base, projection, neuron)
        assert before.left[:, neuron].abs().max() > 0

        # The no-op twin: the same bytes give the same activations.
        same = case.product(case.change([*inputs, down], lambda part: part), projection, neuron)
        assert torch.equal(same.left, before.left) and torch.equal(same.result, before.result)

        # Without its inputs, its activation is exactly zero; the others keep every bit.
        dead = case.product(case.change(inputs, np.zeros_like), projection, neuron)
        assert not dead.left[:, neuron].any()
        assert torch.equal(dead.left[:, others], before.left[:, others])

        # Each of its inputs alone acts on it and on no other.
        for region in inputs:
            changed = case.change([region], lambda part: part + noise.uniform(0.5, 1, part.shape).astype(part.dtype))
            after = case.product(changed, projection, neuron)
            assert not torch.equal(after.left[:, neuron], before.left[:, neuron]), region
            assert torch.equal(after.left[:, others], before.left[:, others]), region

        # Without its down column, the activations are the same, and the product is that of the other neurons.
        cut = case.product(case.change([down], np.zeros_like), projection, neuron)
        assert torch.equal(cut.left, before.left)
        lost = before.result - cut.result
        column = case.tensors[down.tensor][tuple(slice(*one) for one in down.bounds)].reshape(-1)
        expected = torch.outer(before.left[:, neuron], torch.from_numpy(column))
        torch.testing.assert_close(lost, expected, rtol=1e-4, atol=1e-5)
        assert down == locate_column(case.config, case.shapes, place[0], neuron, place[1])


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_neurons_of_an_mlp_use_each_of_its_scalars_once(name, variant, tmp_path):
    case = Case(name, variant, tmp_path)
    for projection in case.projections:
        layer, expert = projection.layer, projection.expert
        neurons = [
            region
            for neuron in range(projection.cols)
            for region in locate_neuron(case.config, case.shapes, layer, neuron, expert)
        ]
        rows = [locate_row(case.config, case.shapes, layer, row, expert) for row in range(projection.rows)]
        used = count_used(case.shapes, neurons)
        assert {int(counts.max()) for counts in used.values()} == {1}
        assert np.array_equal(count_used(case.shapes, rows)[projection.tensor], used[projection.tensor])
        if expert is None:
            parent = projection.tensor.removesuffix(".weight").rpartition(".")[0]
            mlp = {"opt": "fc[12]", "zamba2": r"\w+|gate_up_proj_adapter_list\.\d\.1"}.get(name, r"\w+")
            stored = {t for t in case.shapes if re.fullmatch(rf"{re.escape(parent)}\.({mlp})\.(weight|bias)", t)}
            bias = projection.tensor.replace(".weight", ".bias")
            assert used.keys() == stored - {bias}
            assert all(counts.all() for counts in used.values())
        else:
            whole = count_used(case.shapes, list(locate_expert(case.config, case.shapes, layer, expert)))
            bias = {f"{projection.tensor}_bias"} & whole.keys()
            assert used.keys() == whole.keys() - bias
            assert all(np.array_equal(used[tensor], whole[tensor]) for tensor in used)


@pytest.mark.parametrize(("name", "variant"), MOE)
def test_a_located_expert_is_the_one_that_dies(name, variant, tmp_path):
    case = Case(name, variant, tmp_path)
    old = dict(case.base.named_parameters())
    for projection in case.choose():
        layer, expert = projection.layer, projection.expert
        if expert is None:
            continue
        regions = locate_expert(case.config, case.shapes, layer, expert)
        same = dict(case.change(regions, lambda part: part).named_parameters())
        assert all(torch.equal(same[n], old[n]) for n in old)

        dead = case.change(regions, np.zeros_like)
        product = case.product(dead, projection, 0)
        assert not product.left.any() and not product.result.any()
        # By the names of the loaded model: every number of the expert is zero, and no other number has changed.
        found = 0
        for n, parameter in dead.named_parameters():
            mine = re.search(rf"\.{layer}\.", n) and re.search(r"\.shared_(mlp|experts?)\.", n)
            if expert != "shared":
                mine = re.search(rf"\.{layer}\..*\bexperts\.", n) and "shared" not in n
            if not mine:
                assert torch.equal(parameter, old[n]), n
                continue
            found += 1
            if expert == "shared":
                assert not parameter.any(), n
                continue
            others = [e for e in range(parameter.shape[0]) if e != expert]
            assert not parameter[expert].any(), n
            assert torch.equal(parameter[others], old[n][others]), n
        assert found >= 2


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_located_row_is_one_channel_of_the_output(name, variant, tmp_path):
    case = Case(name, variant, tmp_path)
    for projection in case.choose():
        row = case.chance.randrange(projection.rows)
        region = locate_row(case.config, case.shapes, projection.layer, row, projection.expert)
        before = case.product(case.base, projection, 0)
        after = case.product(case.change([region], np.zeros_like), projection, 0)
        others = [r for r in range(projection.rows) if r != row]
        bias = after.result[:, row]  # addmm adds the bias of the down projection
        assert torch.equal(bias, bias[:1].expand_as(bias)) and not torch.equal(before.result[:, row], bias)
        assert torch.equal(after.result[:, others], before.result[:, others])
