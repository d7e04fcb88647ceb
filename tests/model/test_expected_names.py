"""--complete with and without transformers, on tiny models that transformers saved."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import Unrunnable
from swsurgery.progress import LOADING, Silent

WITH_TRANSFORMERS = {
    *("llama", "gemma3_text", "gpt2", "phi3", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "jamba"),
    *("gemma3", "qwen2_vl", "llava", "zamba2", "longcat_flash", "opt", "bloom"),
}
"""Tiny models of families that differ in names, experts, kinds of layers and conversion."""


def check(folder: Path, transformers: bool = True) -> list[tuple[str, str | None]]:
    report = swsurgery.verify(folder, complete=True, transformers=transformers)
    assert report.decided
    return [(f.rule, f.tensor) for f in report.findings]


@pytest.mark.parametrize("name", sorted(tiny_models.MODELS | tiny_models.OTHER_MODELS))
def test_what_transformers_saves_is_complete(tmp_path, name):
    tiny_models.write(name, tmp_path)
    assert check(tmp_path, name in WITH_TRANSFORMERS) == []


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_stacked_experts_are_complete(tmp_path, name):
    tiny_models.write(name, tmp_path, save_original_format=False)
    assert check(tmp_path) == []


def test_a_model_without_head_is_complete(tmp_path):
    tiny_models.write("llama", tmp_path, base=True)
    assert check(tmp_path) == []


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in ((n, change(n, t)) for n, t in tensors.items()) if t is not None},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip


def drop(*parts: str):
    return lambda name, tensor: None if any(part in name for part in parts) else tensor


def drop_vision(ending: str):
    return lambda name, tensor: None if "vision" in name and name.endswith(ending) else tensor


FAULTS = {
    "layer": ("llama", drop("layers.1."), ("layer-missing", "model.layers.1")),
    "tensor": (
        "llama", drop("layers.1.self_attn.q_proj"), ("tensor-missing", "model.layers.1.self_attn.q_proj.weight"),
    ),
    "last norm": ("llama", drop("model.norm"), ("tensor-missing", None)),
    "embedding": ("llama", drop("embed_tokens"), ("tensor-missing", None)),
    "expert": (
        "mixtral", drop("layers.0.block_sparse_moe.experts.2."),
        ("expert-missing", "model.layers.0.block_sparse_moe.experts.2"),
    ),
    "matrix of an expert": (
        "deepseek_v3", drop("layers.1.mlp.experts.3.up_proj"),
        ("tensor-missing", "model.layers.1.mlp.experts.3.up_proj.weight"),
    ),
    "head": ("llama", drop("lm_head"), ("head-missing", None)),
    "shape": (
        "qwen2_vl", lambda n, t: t[:, :15].contiguous() if "model.layers.1.self_attn.o_proj" in n else t,
        ("shape-mismatch", "model.layers.1.self_attn.o_proj.weight"),
    ),
    "rows": (
        "gpt2", lambda n, t: t[:30].contiguous() if "wte" in n else t, ("vocabulary", "transformer.wte.weight"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_the_headers_show_is_not_reported_twice(tmp_path, fault):
    name, change, expected = FAULTS[fault]
    tiny_models.write(name, tmp_path)
    rewrite(tmp_path, change)
    assert check(tmp_path, False) == [expected]
    assert check(tmp_path) == [expected]


ONLY_TRANSFORMERS = {
    "vision": (
        "llava", drop_vision("layers.1.mlp.fc1.weight"), "transformers-missing",
        "model.vision_tower.encoder.layers.1.mlp.fc1.weight",
    ),
    "position": ("gpt2", drop("wpe"), "transformers-missing", "transformer.wpe.weight"),
    "renamed": (
        "llama", lambda n, t: t, "transformers-unexpected", "model.layers.0.mlp.extra.weight",
    ),
    "vision shape": (
        "gemma3", lambda n, t: t[:-1].contiguous() if "vision" in n and n.endswith("layers.1.mlp.fc1.bias") else t,
        "transformers-shape", "model.vision_tower.encoder.layers.1.mlp.fc1.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", ONLY_TRANSFORMERS)
def test_what_only_transformers_knows(tmp_path, fault):
    name, change, rule, tensor = ONLY_TRANSFORMERS[fault]
    tiny_models.write(name, tmp_path)
    if fault == "renamed":
        tensors = load_file(tmp_path / "model.safetensors")
        tensors |= {f"model.layers.{n}.mlp.extra.weight": torch.zeros(2) for n in (0, 1)}
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    else:
        before = len(load_file(tmp_path / "model.safetensors"))
        rewrite(tmp_path, change)
        assert fault == "vision shape" or len(load_file(tmp_path / "model.safetensors")) < before
    assert check(tmp_path, False) == []
    found = check(tmp_path)
    assert found[0][0] == rule and found[0][1].split(".")[-4:] == tensor.split(".")[-4:]
    assert len(found) == (2 if fault == "renamed" else 1)
    document = swsurgery.verify(tmp_path, complete=True, transformers=True).to_json()["complete"]["transformers"]
    assert sum(len(document[kind]) for kind in ("missing", "unexpected", "other_shapes")) == len(found)


def test_the_meta_model_takes_no_weights_and_says_so(tmp_path, capsys):
    tiny_models.write("llama", tmp_path)
    assert main(["verify", str(tmp_path), "--complete", "--transformers"]) == 0
    assert capsys.readouterr().out.endswith("; transformers expects the same names and shapes\n")


@pytest.mark.parametrize("fault", ["quantised", "type", "code", "accelerate"])
def test_what_transformers_cannot_build_has_no_answer(tmp_path, capsys, monkeypatch, fault):
    tiny_models.write("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ran = tmp_path / "ran"
    if fault == "quantised":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    elif fault == "type":
        config |= {"model_type": "no_such_type", "architectures": ["NoSuchModel"]}
    elif fault == "code":
        (tmp_path / "own_code.py").write_text(f"open({str(ran)!r}, 'w')")
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own_code.C", "AutoModelForCausalLM": "own_code.M"}}
    else:
        monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda *a, **k: False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unrunnable):
        swsurgery.verify(tmp_path, complete=True, transformers=True)
    assert main(["verify", str(tmp_path), "--complete", "--transformers"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not ran.exists() and "own_code" not in sys.modules


def test_loading_transformers_is_announced(tmp_path):
    class Log(Silent):
        def start(self, total: int, unit: str, label: str) -> None:
            labels.append(label)

        def close(self) -> None:
            labels.append("end")

    labels: list[str] = []
    tiny_models.write("llama", tmp_path)
    assert swsurgery.verify(tmp_path, complete=True, transformers=True, reporter=Log()).ok
    assert labels[:2] == [LOADING, "end"]
