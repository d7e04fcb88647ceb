"""A model and a state dict edited in memory are those of the checkpoint that apply writes, and nothing is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from checkpoints import (
    FIRST,
    SECOND,
    THIRD,
    down,
    place,
    sha256,
    tensor,
    tree,
    write_llama,
    write_manifest,
    write_single,
)
from hub import fixture
from safetensors.torch import load_file
from tiny_checkpoint import DOWN, load, write_pair

import swsurgery
from swsurgery.editing.check_options import CheckOptions
from swsurgery.errors import ManifestError, ModelError, PlanError
from swsurgery.sharing import export
from swsurgery.storage import filesystem

any_hub, hub = fixture.any_hub, fixture.hub
OFF = CheckOptions("off")
EDITS = (
    {"op": "set", "tensor": DOWN, "index": [3, 7], "value": 5},
    {"op": "zero", "tensor": DOWN, "index": [10, 0]},
    {"op": "scale", "tensor": "model.embed_tokens.weight", "index": [40, 2], "factor": -3.5},
    {"op": "set", "tensor": "model.norm.weight", "index": [6], "value": 0.25},
    {"op": "protect", "tensor": DOWN, "index": [0, 0]},
)


def logits(model, tokens: torch.Tensor = tiny_models.TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """base, m.json and what apply makes of them."""
    folder = tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        base = write_pair(folder, dtype=torch.bfloat16).base
        swsurgery.apply(write_manifest(folder / "m.json", base, *EDITS), output=folder / "edited", check=OFF)
    return folder


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=str)
def test_the_model_is_the_one_of_the_patched_checkpoint(llama, dtype):
    options = {} if dtype is None else {"dtype": dtype}
    model = swsurgery.load_patched(llama / "m.json", llama / "base", **options)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(llama / "edited", **options).eval()
    assert not model.training and model.dtype is (dtype or torch.bfloat16)
    assert torch.equal(logits(model), logits(wanted))
    assert not torch.equal(logits(model), logits(load(llama / "base").to(model.dtype))), "the edits matter"
    found, due = model.state_dict(), wanted.state_dict()
    assert found.keys() == due.keys() and all(torch.equal(found[name], due[name]) for name in due)


@pytest.mark.parametrize("kind", ["text", "dict", "str", "loaded", "patch", "own base"])
def test_a_manifest_in_any_form_does_the_same(llama, tmp_path, kind):
    path, base = llama / "m.json", str(llama / "base")
    if kind == "patch":
        export.export(path, tmp_path / "p", format="sparse")
    given = {
        "text": path.read_bytes(),
        "dict": json.loads(path.read_text()),
        "str": str(path),
        "loaded": swsurgery.load_manifest(path),
        "patch": tmp_path / "p",
        "own base": path,
    }[kind]
    model = swsurgery.load_patched(given, None if kind == "own base" else base)
    assert model.get_parameter(DOWN)[3, 7] == 5


FAMILIES = (
    "gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe", "gemma3", "qwen3_vl_moe",
)  # fmt: skip
OUTPUT_PROJECTIONS = ("down_proj", "c_proj.weight", "w2", "output_linear")


@pytest.mark.parametrize("name", FAMILIES)
def test_transposed_stacked_and_renamed_weights_are_found(tmp_path, name):
    base = tmp_path / "base"
    tiny_models.write(name, base)
    _, shapes = tiny_models.read(base)
    # The last one, which is an expert's where there are experts.
    down = max(name for name in shapes if any(part in name for part in OUTPUT_PROJECTIONS))
    index = [n // 2 for n in shapes[down]]
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "set", "tensor": down, "index": index, "value": 4})
    swsurgery.apply(manifest, output=tmp_path / "edited", check=OFF)
    model = swsurgery.load_patched(manifest, base)
    found, wanted = model.state_dict(), tiny_models.load(name, tmp_path / "edited").state_dict()
    plain = tiny_models.load(name, base).state_dict()
    assert [n for n in wanted if not torch.equal(wanted[n], plain[n])], "the edit is in the loaded model"
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_an_edit_of_a_tied_embedding_reaches_the_head(tmp_path):
    base = tmp_path / "base"
    model = tiny_models.build("qwen2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    edit = {"op": "set", "tensor": "model.embed_tokens.weight", "index": [7, 3], "value": 6}
    model = swsurgery.load_patched(write_manifest(tmp_path / "m.json", base, edit), base)
    assert model.get_output_embeddings().weight[7, 3] == 6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_nothing_is_written(llama, monkeypatch):
    before = tree(llama)
    for name in ("create", "write_all", "write_at", "write_file", "replace_file", "make_directories", "rename_new"):
        monkeypatch.setattr(filesystem, name, lambda *arguments, name=name: pytest.fail(f"{name}{arguments}"))
    swsurgery.load_patched(llama / "m.json", llama / "base")
    assert len(list(swsurgery.patched_state_dict(llama / "m.json", llama / "base"))) == 21
    assert tree(llama) == before


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_kernel_is_asked_to_write_nothing(llama, tmp_path):
    script = (
        "import sys, swsurgery\n"
        f"base, manifest = {str(llama / 'base')!r}, {str(llama / 'm.json')!r}\n"
        "assert float(swsurgery.load_patched(manifest, base).get_parameter(" + repr(DOWN) + ")[3, 7]) == 5\n"
        "assert sum(1 for _ in swsurgery.patched_state_dict(manifest, base)) == 21\n"
    )
    traced = tmp_path / "trace"
    calls = "trace=openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,symlink,symlinkat"
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", str(traced), "-e", calls, sys.executable, "-B", "-c", script],
        capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = [
        line for line in traced.read_text().splitlines()
        if ("O_WRONLY" in line or "O_RDWR" in line or "O_CREAT" in line or "(" in line and "open" not in line)
        and "= -1" not in line and "/dev/" not in line and "+++" not in line and "---" not in line
    ]  # fmt: skip
    assert [line for line in written if str(llama) in line or str(tmp_path) in line] == []
    assert traced.stat().st_size > 10_000, "there is a trace"


# State dicts ---------------------------------------------------------------------------------------------------------


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, whatever the dtype."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and (
        not a.numel() or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def test_the_state_dict_is_that_of_the_patched_shards(tmp_path):
    dtypes = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL")
    extra = {f"extra_{dtype}.weight": tensor(dtype, 3, 4) for dtype in dtypes}
    extra |= {"extra_scalar.weight": tensor("F32"), "extra_empty.weight": tensor("F32", 0, 4)}
    base = write_llama(tmp_path / "base", extra)
    floats = [d for d in dtypes if d.startswith(("F", "B")) and d != "BOOL"]
    edits = [{"op": "set", "tensor": f"extra_{d}.weight", "index": [2, 1], "value": 1.5} for d in floats]
    edits += [{"op": "zero", "layer": n, "row": 1, "col": 2} for n in range(3)]
    edits += [{"op": "set", "tensor": "extra_I64.weight", "index": [0, 0], "value": -(2**63)}]
    edits += [{"op": "set", "tensor": "extra_scalar.weight", "index": [], "value": 9}]
    manifest = write_manifest(tmp_path / "m.json", base, *edits)
    swsurgery.apply(manifest, output=tmp_path / "edited", check=OFF)
    wanted = {n: t for shard in (FIRST, SECOND, THIRD) for n, t in load_file(tmp_path / "edited" / shard).items()}
    plain = {n: t for shard in (FIRST, SECOND, THIRD) for n, t in load_file(base / shard).items()}
    found = dict(swsurgery.patched_state_dict(manifest, base))
    assert found.keys() == wanted.keys()
    assert [n for n in wanted if not same(found[n], wanted[n])] == []
    assert len([n for n in wanted if not same(plain[n], wanted[n])]) == len(edits)


def test_one_tensor_is_in_memory_at_a_time(llama):
    alive: list[weakref.ref] = []
    for _, weights in swsurgery.patched_state_dict(llama / "m.json", llama / "base"):
        assert [r for r in alive if r() is not None] == []
        alive.append(weakref.ref(weights))
        del weights
    assert len(alive) == 21


def test_a_state_dict_loads_into_a_model(llama):
    config = transformers.AutoConfig.from_pretrained(llama / "base")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.load_state_dict(dict(swsurgery.patched_state_dict(llama / "m.json", llama / "base")))
    assert torch.equal(logits(model), logits(load(llama / "edited")))


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path):
    base = write_llama(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "layer": 2, "row": 0, "col": 0})
    tensors = swsurgery.patched_state_dict(manifest, base)
    next(tensors)
    offset, size = place(base / THIRD, down(2), (0, 0))
    data = bytearray((base / THIRD).read_bytes())
    data[offset : offset + size] = bytes(size)
    (base / THIRD).write_bytes(data)
    with pytest.raises(swsurgery.SwsurgeryError, match="changed or replaced while it was read"):
        list(tensors)


# What is refused -----------------------------------------------------------------------------------------------------

FUNCTIONS = (swsurgery.load_patched, swsurgery.patched_state_dict)
BOTH = pytest.mark.parametrize("function", FUNCTIONS, ids=["model", "dict"])


@BOTH
def test_another_value_than_expected_is_refused_before_anything_is_read(llama, tmp_path, function):
    manifest = write_manifest(tmp_path / "m.json", llama / "base", {**EDITS[0], "expect": 77.5})
    with pytest.raises(PlanError, match="expected 77.5"):
        function(manifest)


@BOTH
@pytest.mark.parametrize("sound", [True, False])
def test_another_digest_is_refused(llama, tmp_path, function, sound):
    digest = sha256(llama / "base" / "model.safetensors") if sound else hashlib.sha256(b"").hexdigest()
    base = {"path": str(llama / "base"), "sha256": {"model.safetensors": digest}}
    manifest = write_manifest(tmp_path / "m.json", base, EDITS[0])
    if sound:
        function(manifest)
    else:
        with pytest.raises(PlanError, match="but the manifest says"):
            function(manifest)


@BOTH
def test_bad_manifests_and_bases_are_our_own_errors(llama, tmp_path, function):
    for base, manifest in (
        (llama / "base", tmp_path / "nothing.yaml"),
        (llama / "base", b"version: 2"),
        (llama / "base", {"version": 1}),
        (tmp_path / "nowhere", llama / "m.json"),
        (tmp_path, llama / "m.json"),
        ("hf://no such name", llama / "m.json"),
    ):
        with pytest.raises(swsurgery.SwsurgeryError):
            function(manifest, base)
    with pytest.raises(ManifestError):
        function(b"version: 2", llama / "base")


def test_a_model_that_transformers_cannot_load_is_one_line(tmp_path):
    base = write_single(tmp_path / "base", {DOWN: tensor("F32", 6, 10)}, {"model_type": "no_such"})
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "tensor": DOWN, "index": [0, 0]})
    with pytest.raises(ModelError, match="transformers cannot load the model"):
        swsurgery.load_patched(manifest, base)
    assert len(dict(swsurgery.patched_state_dict(manifest, base))) == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"device": "cpu"},
            "transformers does not know this argument of load_patched: device (give device_map)",
        ),
        ({"wrong": 1}, "transformers does not know this argument of load_patched: wrong (see from_pretrained of"),
        ({"dtype": "float17"}, "transformers refuses an argument of load_patched: .*: dtype (change it)"),
        (
            {"quantization_config": {"load_in_4bit": True}},
            "a model that is quantised while it is loaded cannot be edited: .* (write the patched checkpoint with",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_argument_that_cannot_be_used_is_named(llama, options, line):
    with pytest.raises(ModelError, match=line.replace("(", r"\(").replace(")", r"\)")) as caught:
        swsurgery.load_patched(llama / "m.json", llama / "base", **options)
    assert len(str(caught.value).splitlines()) == 1 and "config.json" not in str(caught.value)


def test_weights_that_would_be_made_up_are_refused(tmp_path):
    base = write_llama(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "layer": 0, "row": 0, "col": 0})
    with pytest.raises(ModelError, match="weights that the model needs are missing|cannot load the model"):
        swsurgery.load_patched(manifest, base)


def test_a_tensor_that_does_not_fit_the_config_is_named(llama, tmp_path):
    base = shutil.copytree(llama / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 328}))
    with pytest.raises(ModelError, match=r" is stored as \[320, 16\], but config.json asks for \[328, 16\]"):
        swsurgery.load_patched(write_manifest(tmp_path / "m.json", base, *EDITS), base)


def test_a_dtype_that_torch_lacks_is_refused_at_once(tmp_path):
    base = write_llama(tmp_path / "base", {"odd": ("F4", (4,), bytes(2))})
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "layer": 0, "row": 0, "col": 0})
    with pytest.raises(ModelError, match="torch has no dtype F4.*odd"):
        swsurgery.patched_state_dict(manifest, base)


def test_a_weight_that_the_loader_changes_is_refused(llama, monkeypatch):
    from swsurgery.model import patched

    class Doubling(transformers.LlamaForCausalLM):
        @classmethod
        def from_pretrained(cls, *arguments, **options):
            model, info = super().from_pretrained(*arguments, **options)
            model.get_parameter(DOWN).data *= 2
            return model, info

    monkeypatch.setattr(patched, "get_auto_class", lambda config: Doubling)
    with pytest.raises(ModelError, match="the loaded model holds 0x"):
        swsurgery.load_patched(llama / "m.json", llama / "base")


def test_a_machine_without_torch_is_told_what_to_install(llama, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    for function in FUNCTIONS:
        with pytest.raises(ModelError, match=r"not installed: torch \(pip install 'swsurgery\[check\]'\)"):
            function(llama / "m.json", llama / "base")


def test_a_base_on_the_hub_is_fetched(any_hub, llama):
    manifest = json.loads((llama / "m.json").read_text())
    commit, name = any_hub.add_repo("org/base", llama / "base"), any_hub.name("org/base")
    manifest["base"] = {"repo_id": name, "revision": commit}
    wanted = swsurgery.load_patched(manifest, llama / "base").state_dict()
    for base in (None, f"hf://{name}", f"hf://{name}@{commit}"):
        found = swsurgery.load_patched(manifest, base).state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert len(dict(swsurgery.patched_state_dict(manifest, base))) == 21


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_the_model_is_the_same(llama):
    model = swsurgery.load_patched(llama / "m.json", llama / "base", device_map="cuda", dtype=torch.float32)
    assert model.device.type == "cuda" and model.get_parameter(DOWN)[3, 7] == 5
    found, wanted = logits(model, tiny_models.TOKENS.cuda()).cpu(), logits(load(llama / "edited").float())
    assert torch.allclose(found, wanted, atol=1e-3)
