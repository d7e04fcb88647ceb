"""--values: each rule by a planted fault, with a clean twin, and what is no fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIG, tensor, write_index, write_llama, write_shard, write_single, write_sparse_shard
from patched import DOWN, apply_text, tensors, write_base, write_patched

import swsurgery
from swsurgery.cli import main
from swsurgery.progress import Silent
from swsurgery.verifying.value_findings import MAX_REPORTED

SHAPE = (8, 16)
MATRICES = [f"model.layers.{n}.mlp.{part}_proj.weight" for n in range(3) for part in ("gate", "up", "down")]


def bfloat16(*values: float) -> bytes:
    return (np.array(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()


def clean() -> dict:
    """Three layers whose norms are ones and whose biases are zeros, as in a model before its training."""
    found = {name: tensor("BF16", *SHAPE, seed=n) for n, name in enumerate(MATRICES)}
    for n in range(3):
        found[f"model.layers.{n}.input_layernorm.weight"] = ("BF16", (16,), bfloat16(1) * 16)
        found[f"model.layers.{n}.self_attn.q_norm.weight"] = ("BF16", (2, 16), bfloat16(1) * 32)
        found[f"model.layers.{n}.mlp.gate_proj.bias"] = ("F32", (16,), bytes(64))
        found[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = tensor("F32", 16)
        found[f"model.layers.{n}.attn.bias"] = ("BOOL", (1, 1, 8, 8), np.tril(np.ones((8, 8), bool)).tobytes())
        found[f"model.layers.{n}.attn.masked_bias"] = ("F32", (), np.float32(-1e9).tobytes())
    return found


def examine(tmp_path: Path, changes: dict, config: dict | None = None) -> list:
    write_single(tmp_path, {**clean(), **changes}, config)
    result = swsurgery.verify(tmp_path, values=True)
    assert result.ok is not any(f.level == "error" for f in result.findings)
    return [(f.rule, f.tensor, f.index, f.message) for f in result.findings]


def test_a_clean_checkpoint_has_no_finding(tmp_path):
    assert examine(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("bits", "value"), [(b"\xc0\x7f", "nan"), (b"\x80\xff", "-inf")]
)  # the last element of the tensor
def test_one_value_that_is_not_finite(tmp_path, bits, value):
    kind, shape, data = tensor("BF16", *SHAPE, seed=50)
    (found,) = examine(tmp_path, {MATRICES[4]: (kind, shape, data[:-2] + bits)})
    assert found == ("non-finite", MATRICES[4], (7, 15), f"the value is {value} (0x{bits[::-1].hex()})")


@pytest.mark.parametrize(
    ("dtype", "data", "value"),
    [
        ("BF16", bytes(256), "0"),
        ("BF16", b"\x00\x80" * 60 + bytes(136), "0"),
        ("BF16", bfloat16(0.5) * 128, "0.5"),
        ("F32", b"\0\0\x80\x3f" * 128, "1.0"),
        ("F8_E4M3", bytes(128), "0"),
        ("F4", b"\x22" * 64, "0x22"),
    ],
)
def test_a_constant_matrix(tmp_path, dtype, data, value):
    (found,) = examine(tmp_path, {MATRICES[2]: (dtype, SHAPE, data)})
    assert found == ("constant-weights", MATRICES[2], None, f"every value of this matrix is {value}")


def test_packed_codes_may_not_be_constant_but_their_zero_points_may(tmp_path):
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    codes = {
        "model.layers.0.mlp.q.qweight": ("I32", (4, 8), bytes(128)),
        "model.layers.0.mlp.q.qzeros": ("I32", (4, 8), b"\x77" * 128),
        "model.layers.0.mlp.q.scales": ("F16", (4, 8), b"\x00\x3c" * 32),
        "model.layers.1.mlp.q.g_idx": ("I32", (8, 4), bytes(128)),
    }
    (found,) = examine(tmp_path, codes, quantised)
    assert found[:2] == ("constant-weights", "model.layers.0.mlp.q.qweight")


def test_a_layer_that_is_stored_twice(tmp_path):
    parts = ("gate", "up", "down")
    copies = {f"model.layers.2.mlp.{p}_proj.weight": clean()[f"model.layers.0.mlp.{p}_proj.weight"] for p in parts}
    found = examine(tmp_path, copies)
    assert sorted(found) == sorted(
        ("identical-weights", name, None, f"its bytes are those of {name.replace('.2.', '.0.')}") for name in copies
    )


def test_the_same_values_in_another_order_are_no_copy(tmp_path):
    """The sums over words are the same, so the bytes decide."""
    kind, shape, data = clean()[MATRICES[0]]
    assert examine(tmp_path, {MATRICES[3]: (kind, shape, data[8:] + data[:8])}) == []


def test_a_copy_in_another_shard_is_found(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    copy = {"model.layers.9.mlp.up_proj.weight": clean()[MATRICES[0]]}
    write_shard(tmp_path / first, clean())
    write_shard(tmp_path / second, copy, padding=3)
    write_index(tmp_path, {first: clean(), second: copy})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (found,) = swsurgery.verify(tmp_path, values=True).findings
    assert (found.rule, found.level, found.file, found.tensor) == ("identical-weights", "warning", second, *copy)


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (("model.embed_tokens.weight", "lm_head.weight"), {"tie_word_embeddings": True}),
        (("model.layers.8.embed_tokens.weight", "model.layers.9.embed_tokens.weight"), {}),
        (("encoder.layers.0.fc.weight", "decoder.layers.0.fc.weight"), {"tie_encoder_decoder": True}),
        (("model.layers.0.mixer.A_log", "model.layers.1.mixer.A_log"), {}),
    ],
)
def test_copies_that_are_meant(tmp_path, names, config):
    data = tensor("BF16", *SHAPE, seed=99)
    assert examine(tmp_path, dict.fromkeys(names, data), config) == []


def test_encoder_and_decoder_differ_without_the_setting(tmp_path):
    names = ("encoder.layers.0.fc.weight", "decoder.layers.0.fc.weight")
    (found,) = examine(tmp_path, dict.fromkeys(names, tensor("BF16", *SHAPE, seed=99)))
    assert found[:2] == ("identical-weights", names[1])


def test_a_value_beyond_float16(tmp_path):
    kind, shape, data = clean()[MATRICES[5]]
    (found,) = examine(tmp_path, {MATRICES[5]: (kind, shape, data[:4] + bfloat16(70_000, -1e30) + data[8:])})
    text = "2 values are outside float16's range (up to 65,504); the first is 69632.0"  # BF16 has no 70,000
    assert found == ("dtype-overflow", MATRICES[5], (0, 2), text)
    edge = np.full(SHAPE, 65_504, "<f4")
    edge[0, 0] = 1
    assert examine(tmp_path, {MATRICES[5]: ("F32", SHAPE, edge.tobytes())}) == []


def test_subnormal_values(tmp_path):
    random = np.random.default_rng(5).normal(0, 1, SHAPE)
    few, many = (random * 0.002).astype("<f2").tobytes(), (random * 0.0002).astype("<f2").tobytes()
    assert examine(tmp_path, {MATRICES[0]: ("F16", SHAPE, few)}) == []
    (found,) = examine(tmp_path, {MATRICES[0]: ("F16", SHAPE, many)})
    share = float(found[3].split("%")[0]) / 100
    assert found[:3] == ("subnormal-weights", MATRICES[0], None)
    magnitudes = np.abs(np.frombuffer(many, "<f2").astype(float))
    assert share == pytest.approx(((magnitudes > 0) & (magnitudes < 2**-14)).mean(), abs=0.001)


def test_many_findings_are_summarised(tmp_path):
    names = [f"model.layers.{n}.mlp.w1.weight" for n in range(MAX_REPORTED + 5)]
    found = examine(tmp_path, dict.fromkeys(names, ("BF16", SHAPE, bytes(256))))
    assert len(found) == MAX_REPORTED + 1
    assert found[-1] == ("constant-weights", None, None, "5 more tensors of this file are constant")


def test_elements_that_are_no_numbers_are_reported_as_not_examined(tmp_path, capsys):
    codes = ("BF16", SHAPE, b"\xff" * 255 + b"\0")
    nf4 = {
        "model.layers.0.k.weight": ("BF16", (64, 1), b"\xff" * 128),
        "model.layers.0.k.weight.absmax": tensor("U8", 2),
    }
    extra = {"a.b_blocks": ("F6_E2M3", (64,), bytes(range(48))), "model.layers.0.q.W_q": codes, **nf4}
    write_single(tmp_path, {**clean(), **extra})
    result = swsurgery.verify(tmp_path, values=True)
    assert result.ok and not result.findings
    document = result.to_json()["values"]
    assert document["not_examined"]["model.layers.0.q.W_q"] == "stores packed codes in BF16 elements"
    assert document["not_examined"]["model.layers.0.k.weight"] == "stores packed codes in BF16 elements"
    assert "packs several elements" in document["not_examined"]["a.b_blocks"]
    assert set(document["tensors"]) == {*clean(), "model.layers.0.k.weight.absmax"}
    assert main(["verify", str(tmp_path), "--values", "--quiet"]) == 0
    assert "3 tensors not examined, such as " in capsys.readouterr().out


def test_every_format_reports_the_findings(tmp_path, capsys):
    name = "model.layers.0.mlp.\x1b[31m##[error].weight"
    write_single(tmp_path, {**clean(), name: ("BF16", SHAPE, bytes(256))})
    for form in ("text", "json", "junit", "sarif", "github"):
        assert main(["verify", str(tmp_path), "--values", "--quiet", "--format", form]) == 1
        text = capsys.readouterr().out
        assert "constant-weights" in text and "\x1b" not in text and "##[" not in text
    assert main(["verify", str(tmp_path), "--values", "--quiet", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["values"]["tensors"][MATRICES[0]] == {
        "file": "model.safetensors", "dtype": "BF16", "values": 128, "nan": 0, "infinite": 0, "zeros": 0,
        "subnormal": 0, "beyond_float16": 0,
        "largest_magnitude": float(np.abs(decode(clean()[MATRICES[0]][2])).max()),
    }  # fmt: skip
    assert {"non-finite", "identical-weights", "dtype-overflow", "subnormal-weights"} <= set(document["rules"])


def decode(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


def test_values_are_examined_while_the_files_are_hashed(tmp_path, monkeypatch):
    """One read: the search has nothing left to read after the digests, and sees what they saw."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    patched = write_patched(tmp_path)
    labels: list[str] = []

    class Labels(Silent):
        def start(self, total: int, unit: str, label: str) -> None:
            labels.append(label)

    result = swsurgery.verify(patched, values=True, reporter=Labels())
    assert result.ok and result.record and result.record.proved and labels == ["verifying"]
    assert {name for _, name in result.values.tensors} == set(tensors())


def test_a_matrix_that_an_edit_zeroed_is_no_finding(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_base(tmp_path / "base")
    text = f"version: 1\nbase: {{path: base}}\nedits:\n  - {{op: zero, tensors: '{DOWN}'}}\n"
    root = apply_text(tmp_path, text, "patched")
    assert swsurgery.verify(root, values=True).findings == ()
    (root / "swsurgery.json").unlink()
    (found,) = swsurgery.verify(root, values=True).findings
    assert (found.rule, found.tensor) == ("constant-weights", DOWN)


def test_finite_is_a_subset(tmp_path):
    write_single(tmp_path, {**clean(), MATRICES[0]: ("BF16", SHAPE, bytes(256))})
    assert swsurgery.verify(tmp_path, finite=True).ok
    assert not swsurgery.verify(tmp_path, values=True).ok
    with pytest.raises(TypeError):
        swsurgery.verify(tmp_path, values="yes")


@pytest.mark.parametrize("threads", ["1", "3"])
def test_the_answer_does_not_depend_on_the_threads(tmp_path, monkeypatch, threads):
    monkeypatch.setenv("SWSURGERY_THREADS", threads)
    write_single(tmp_path, {**clean(), MATRICES[0]: ("BF16", SHAPE, bytes(256))})
    assert [f.tensor for f in swsurgery.verify(tmp_path, values=True).findings] == [MATRICES[0]]


def test_tensors_without_elements_and_odd_offsets(tmp_path):
    root = write_llama(tmp_path, {"none": ("BF16", (0, 4), b""), "one": ("F64", (), np.float64(3).tobytes())})
    result = swsurgery.verify(root, values=True)
    assert result.ok and "none" not in result.to_json()["values"]["tensors"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_does_not_depend_on_the_size(tmp_path):
    write_sparse_shard(tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight", "BF16", 1 << 14, 1 << 14)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code = (
        "import pathlib, swsurgery, sys; print(swsurgery.verify(sys.argv[1], values=True).findings[0].rule);"
        "print(pathlib.Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    rule, kilobytes = done.stdout.split()
    assert rule == "constant-weights" and int(kilobytes) < 150_000


MODEL = os.environ.get("SWSURGERY_TEST_MODEL")


@pytest.mark.model
@pytest.mark.skipif(not MODEL, reason="SWSURGERY_TEST_MODEL names no model")
def test_a_real_model_has_no_finding():
    result = swsurgery.verify(MODEL, values=True)
    assert result.findings == () and len(result.values.tensors) == 272
