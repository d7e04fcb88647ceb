"""The default check runs a quantised model if transformers can load it here, and says why if it cannot.

The oracle loads base and patched directory with transformers, each on its own, and computes the perplexity itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import tree, write_manifest
from listening import Listener
from safetensors.torch import load_file, save_file
from tiny_checkpoint import TEXT, make_tokenizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import swsurgery
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.editing.check_options import CheckOptions
from swsurgery.errors import ModelError, Unrunnable
from swsurgery.model.load import open_model
from swsurgery.model.quantisers import PACKAGES

DOWN = "model.layers.1.mlp.down_proj"
WINDOW = 24


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A tiny Llama in bfloat16, with matrices that every quantiser accepts."""
    folder = tmp_path_factory.mktemp("plain")
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def declare(folder: Path, declared: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))


def quantise(plain: Path, folder: Path, config: object) -> Path:
    """A checkpoint that transformers quantised and saved."""
    options = {"quantization_config": config, "device_map": {"": "cpu"}, "dtype": torch.bfloat16}
    transformers.AutoModelForCausalLM.from_pretrained(plain, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_nf4(plain: Path, folder: Path) -> Path:
    pytest.importorskip("bitsandbytes")
    return quantise(plain, folder, transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))


def write_int8(plain: Path, folder: Path) -> Path:
    pytest.importorskip("bitsandbytes")
    return quantise(plain, folder, transformers.BitsAndBytesConfig(load_in_8bit=True))


def write_torchao(plain: Path, folder: Path) -> Path:
    quantization = pytest.importorskip("torchao.quantization")
    return quantise(plain, folder, transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def write_fp8(plain: Path, folder: Path) -> Path:
    """FP8 with one scale for each block of 128 x 128, which transformers reads without another package."""
    if torch.cuda.is_available():
        pytest.skip("beside a GPU, transformers runs FP8 by kernels that are not installed, on the CPU too")
    shutil.copytree(plain, folder)
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = weight
            continue
        scale = weight.float().abs().max() / 448
        tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    declare(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})
    return folder


def write_compressed(plain: Path, folder: Path, bits: int, form: str) -> Path:
    """A checkpoint that compressed-tensors compressed."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    group = None if form == "int-quantized" else 32
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    weights = quantization.QuantizationArgs(
        num_bits=bits, type="int", strategy="group" if group else "channel", group_size=group
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    config = quantization.QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format=form, quantization_status="frozen"
    )
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weight = module.weight.data.float().unflatten(1, (-1, group or module.weight.shape[1]))
            module.weight_scale.data = (weight.abs().amax(2) / (2 ** (bits - 1) - 1)).to(module.weight_scale.dtype)
    compressor = compressors.ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


WRITERS = {
    "bitsandbytes NF4": write_nf4,
    "bitsandbytes int8": write_int8,
    "torchao int8": write_torchao,
    "FP8": write_fp8,
    "compressed-tensors int-quantized": lambda plain, folder: write_compressed(plain, folder, 8, "int-quantized"),
    "compressed-tensors pack-quantized": lambda plain, folder: write_compressed(plain, folder, 4, "pack-quantized"),
}
METHODS = {
    "bitsandbytes NF4": "bitsandbytes",
    "bitsandbytes int8": "bitsandbytes",
    "torchao int8": "torchao",
    "FP8": "fp8",
    "compressed-tensors int-quantized": "compressed-tensors",
    "compressed-tensors pack-quantized": "compressed-tensors",
}


@pytest.fixture(scope="module", params=[*WRITERS])
def base(request, plain, tmp_path_factory) -> Path:
    folder = WRITERS[request.param](plain, tmp_path_factory.mktemp("quantised") / "base")
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert declared["quant_method"] == METHODS[request.param]
    return folder


def find_codes(base: Path) -> str:
    """The stored codes of the down projection of layer 1."""
    names = [f"{DOWN}.weight", f"{DOWN}.weight_packed", f"{DOWN}._weight_qdata"]
    [found] = [name for name in names if name in load_file(base / "model.safetensors")]
    return found


def edit_codes(base: Path) -> list[dict]:
    """Invert a bit of thirty codes, in stored numbers of any layout."""
    name = find_codes(base)
    tensor = load_file(base / "model.safetensors")[name]
    bit = 2 if tensor.dtype == torch.uint8 else 7
    places = [[n // tensor.shape[1], n % tensor.shape[1]] for n in range(0, 600, 20)]
    return [{"op": "flip", "bit": bit, "raw": True, "tensor": name, "index": place} for place in places]


def compute_perplexity(folder: Path) -> float:
    """The perplexity on the first two windows of TEXT, computed in whole passes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": "cpu"}).eval()
    ids = make_tokenizer()(TEXT, add_special_tokens=False, return_tensors="pt").input_ids[0]
    losses = []
    for start in (0, WINDOW):
        window = ids[start : start + WINDOW]
        with torch.no_grad():
            logits = model(window[None], use_cache=False).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:]).item())
    return math.exp(sum(losses) / 2)


def options(kind: str = "auto") -> CheckOptions:
    return CheckOptions(kind, device="cpu", text=TEXT, windows=2, window=WINDOW, prompts=["We walked"])


def test_both_models_are_run(base, tmp_path):
    manifest = write_manifest(tmp_path / "m.yaml", base, *edit_codes(base))
    applied = swsurgery.apply(manifest, output=tmp_path / "out", check=options())
    check = applied.record.check
    assert check["kind"] == "forward"
    assert check["base"]["perplexity"] == pytest.approx(compute_perplexity(base), rel=0.02)
    assert check["patched"]["perplexity"] == pytest.approx(compute_perplexity(tmp_path / "out"), rel=0.02)
    assert abs(check["perplexity_ratio"] - 1) > 1e-3 and check["kl"] > 1e-4
    again = swsurgery.check(tmp_path / "out", device="cpu", text=TEXT, windows=2, window=WINDOW, prompts=["We walked"])
    for side in ("base", "patched"):
        assert again.to_json()[side] == check[side]
    alone = swsurgery.check(base, device="cpu", text=TEXT, windows=2, window=WINDOW)
    assert not alone.compared and alone.base.perplexity == pytest.approx(check["base"]["perplexity"], rel=0.02)


def test_an_edit_in_place_is_compared_with_the_old_codes(base, plain, tmp_path):
    """The base exists no longer when the model is run."""
    copy = shutil.copytree(base, tmp_path / "copy")
    digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    pinned = {"path": str(copy), "sha256": {"model.safetensors": digest}}
    manifest = write_manifest(tmp_path / "m.yaml", pinned, *edit_codes(base))
    there = swsurgery.apply(manifest, copy, check=options(), in_place=True)
    fresh = swsurgery.apply(manifest, base, tmp_path / "out", check=options())
    assert there.record.check == fresh.record.check
    swsurgery.revert(copy)
    assert tree(copy) == tree(base)


def apply_and_listen(base: Path, output: Path, **more) -> tuple[dict, list[str]]:
    """Zero the last norm, and return the report of the check and the lines that were said."""
    said: list[str] = []
    edit = {"op": "zero", "tensor": "model.norm.weight", "index": [3]}
    manifest = write_manifest(output.parent / "m.yaml", base, edit)
    applied = swsurgery.apply(manifest, output=output, reporter=Listener(said.append), **more)
    return applied.record.check, said


def copy_with(plain: Path, folder: Path, declared: object) -> Path:
    shutil.copytree(plain, folder)
    declare(folder, declared)
    return folder


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ models need gptqmodel and optimum, which are not installed"),
        ({"quant_method": "hqq"}, "HQQ models need hqq, which is not installed"),
        ({"quant_method": "modelopt"}, "transformers cannot load models that were quantised with 'modelopt'"),
        ({"bits": 4}, "no `quant_method` attribute"),
        ("4 bits", "transformers cannot load the model"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(plain, tmp_path, declared, reason):
    base = copy_with(plain, tmp_path / "base", declared)
    check, said = apply_and_listen(base, tmp_path / "out")
    assert check["kind"] == "weights" and reason in check["reason"]
    [line] = [line for line in said if "only the weights were checked" in line]
    assert reason in line and "\n" not in line
    with pytest.raises(ModelError, match=re.escape(reason)) as refused:
        swsurgery.check(tmp_path / "out")
    assert len(refused.value.faults) == 1 and "swsurgery verify" in str(refused.value)
    with pytest.raises(ModelError, match=re.escape(reason)):
        apply_and_listen(base, tmp_path / "again", check="forward")
    assert not (tmp_path / "again").exists()


def test_a_missing_package_is_known_before_torch_is_loaded(plain, tmp_path):
    base = copy_with(plain, tmp_path / "base", {"quant_method": "gptq", "bits": 4})
    manifest = write_manifest(tmp_path / "m.yaml", base, {"op": "zero", "tensor": "model.norm.weight", "index": [3]})
    code = (
        "import sys; from swsurgery.cli import main; "
        f"code = main(['apply', {str(manifest)!r}, '-o', {str(tmp_path / 'out')!r}]); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert done.stderr.count("only the weights were checked: GPTQ models need") == 1


def test_a_scale_that_transformers_ignores_is_noticed(plain, tmp_path):
    """It would take the codes for weights, and only warn."""
    base = write_fp8(plain, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    renamed = {name.replace("_scale_inv", "_scale"): tensor for name, tensor in tensors.items()}
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(Unrunnable, match=r"transformers ignores a tensor that quantised weights depend on: .*_scale"):
        open_model(open_checkpoint(base), device="cpu")


def test_a_scale_that_does_not_matter_may_be_ignored(plain, tmp_path):
    base = write_fp8(plain, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    tensors["mtp.layers.0.down_proj.weight"] = torch.ones(4, 4).to(torch.float8_e4m3fn)
    tensors["mtp.layers.0.down_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    open_model(open_checkpoint(base), device="cpu")


def test_every_method_of_the_table_is_one_of_transformers():
    known = {method.removesuffix("_4bit").removesuffix("_8bit") for method in AUTO_QUANTIZER_MAPPING}
    assert set(PACKAGES) <= known
