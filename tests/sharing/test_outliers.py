"""The format outliers: protected scalars as positions and values, which the reader of the page puts back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, INDEX, SECOND, down, stored, tensor, tree, write_llama, write_manifest, write_single
from hub import fixture
from safetensors import safe_open
from safetensors.torch import load_file

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import CheckpointError, PlanError

any_hub, hub = fixture.any_hub, fixture.hub
PAGE = (Path(__file__).parents[2] / "docs" / "patches.md").read_text()
READER = re.search(r"```python\n(import json\nfrom safetensors import safe_open\n.*?)```", PAGE, re.S)[1]
PROTECT = (
    {"op": "protect", "layer": 2, "row": 5, "col": 9},
    {"op": "protect", "layer": 2, "row": 0, "col": 1},
    {"op": "protect", "layer": 1, "row": 2, "col": 3},
)
ZERO = {"op": "zero", "layer": 1, "row": 2, "col": 4}


@pytest.fixture
def patched(tmp_path) -> Path:
    base = write_llama(tmp_path / "base")
    swsurgery.apply(write_manifest(tmp_path / "m.json", base, *PROTECT, ZERO), output=tmp_path / "patched", check="off")
    return tmp_path / "patched"


def read(path: Path) -> dict[tuple[str, int], bytes]:
    """(tensor, flat position) -> stored bytes, read with the safetensors library."""
    found = {}
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "swsurgery.outliers" and file.metadata()["format_version"] == "1"
        tensors = json.loads(file.metadata()["tensors"])
        assert [t["name"] for t in tensors] == sorted({t["name"] for t in tensors})
        assert set(file.keys()) == {f"{n}.{part}" for n in range(len(tensors)) for part in ("indices", "values")}
        for n, entry in enumerate(tensors):
            indices = file.get_tensor(f"{n}.indices")
            assert indices.dtype == torch.int64 and indices.tolist() == sorted(set(indices.tolist()))
            values = file.get_tensor(f"{n}.values")
            rows = values.reshape(-1, 1).view(torch.uint8).numpy()
            for flat, row in zip(indices.tolist(), rows, strict=True):
                found[entry["name"], flat] = row.tobytes()
    return found


def shard(folder: Path, name: str) -> Path:
    index = folder / INDEX
    return folder / json.loads(index.read_text())["weight_map"][name]


def test_the_protected_scalars_of_a_record_and_no_other(patched, tmp_path, capsys):
    out = tmp_path / "o.safetensors"
    before = tree(patched)
    assert main(["export", str(patched), "--format", "outliers", "-o", str(out)]) == 0
    assert "3 scalars as outliers" in capsys.readouterr().out
    places = [(down(1), (2, 3)), (down(2), (0, 1)), (down(2), (5, 9))]
    wanted = {(name, r * 10 + c): stored(shard(patched, name), name, (r, c)) for name, (r, c) in places}
    assert read(out) == wanted
    assert tree(patched) == before


def test_the_reader_of_the_page_puts_them_back(patched, tmp_path):
    assert len([line for line in READER.partition("def ")[2].splitlines() if line.strip()]) <= 10
    swsurgery.export(patched, tmp_path / "o", format="outliers")
    original = {}
    for path in patched.glob("*.safetensors"):
        original |= load_file(path)
    rounded = {name: torch.zeros_like(weight) for name, weight in original.items()}
    names: dict = {}
    exec(compile(READER, "docs/patches.md", "exec"), names)
    names["put_back"](rounded, tmp_path / "o")
    changed = {name: weight.nonzero().tolist() for name, weight in rounded.items() if weight.any()}
    assert changed == {down(1): [[2, 3]], down(2): [[0, 1], [5, 9]]}
    assert rounded[down(2)][5, 9] == original[down(2)][5, 9]
    with pytest.raises(AssertionError):
        names["put_back"]({name: weight.mT for name, weight in rounded.items() if weight.ndim == 2}, tmp_path / "o")


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_every_dtype_keeps_its_bits(tmp_path, dtype):
    base = write_single(tmp_path / "base", {down(n): tensor(dtype, 6, 10, seed=n) for n in range(3)}, CONFIG)
    made = swsurgery.export(
        {"version": 1, "base": {"path": str(base)}, "edits": list(PROTECT)}, tmp_path / "o", format="outliers"
    )
    assert made.scalars == 3 and made.files == {"o": (tmp_path / "o").stat().st_size}
    place = stored(base / "model.safetensors", down(2), (5, 9))
    assert read(tmp_path / "o")[down(2), 59] == place


def test_equal_scalars_give_equal_bytes_from_a_record_and_from_a_manifest(patched, tmp_path):
    swsurgery.export(patched, tmp_path / "a", format="outliers")
    swsurgery.export(tmp_path / "m.json", tmp_path / "b", format="outliers")
    turned = write_manifest(tmp_path / "t.json", tmp_path / "base", *PROTECT[::-1])
    swsurgery.export(turned, tmp_path / "c", format="outliers")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_scalars_that_an_earlier_step_protects_are_kept(patched, tmp_path):
    again = write_manifest(tmp_path / "n.json", patched, {"op": "zero", "layer": 0, "row": 0, "col": 0})
    swsurgery.apply(again, output=tmp_path / "twice", check="off")
    swsurgery.export(tmp_path / "twice", tmp_path / "o", format="outliers")
    assert len(read(tmp_path / "o")) == 3


def test_known_super_weights_of_a_checkpoint(tmp_path, capsys):
    config = CONFIG | {"hidden_size": 4096, "intermediate_size": 11008}
    weight = tensor("BF16", 4096, 11008, one=True)
    base = write_single(tmp_path / "base", {down(2): weight}, config)
    words = ["export", str(base), "--format", "outliers", "-o", str(tmp_path / "o")]
    assert main(words) == 2 and "cannot tell which known model this is" in capsys.readouterr().err
    assert main([*words, "--model", "llama-7b"]) == 0
    assert read(tmp_path / "o") == {(down(2), 3968 * 11008 + 7003): b"\x80\x3f"}


def test_a_known_super_weight_that_is_missing_is_an_error(tmp_path):
    base = write_llama(tmp_path / "base")
    with pytest.raises(PlanError, match="row 3968"):
        swsurgery.export(base, tmp_path / "o", format="outliers", model="llama-7b")
    assert not (tmp_path / "o").exists()


def test_from_a_repository(hub, patched, tmp_path):
    hub.add_repo("org/patched", patched)
    swsurgery.export(f"hf://{hub.name('org/patched')}", tmp_path / "a", format="outliers")
    swsurgery.export(patched, tmp_path / "b", format="outliers")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_export_is_no_more_readable_than_the_weights(patched, tmp_path):
    for file in patched.iterdir():
        file.chmod(0o600)
    swsurgery.export(patched, tmp_path / "o", format="outliers")
    assert (tmp_path / "o").stat().st_mode & 0o777 == 0o600


# Bad input ----------------------------------------------------------------------------------------------------------


def test_nothing_protected_is_an_error(tmp_path):
    base = write_llama(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.json", base, ZERO)
    swsurgery.apply(manifest, output=tmp_path / "patched", check="off")
    for source in (tmp_path / "patched", manifest):
        with pytest.raises(PlanError, match="no scalar is protected"):
            swsurgery.export(source, tmp_path / "o", format="outliers")
    assert not (tmp_path / "o").exists()


def test_a_protected_scalar_that_changed_is_an_error(patched, tmp_path):
    path = patched / SECOND
    name = next(n for n in (down(1), down(2)) if shard(patched, n) == path)
    data = bytearray(path.read_bytes())
    bits = stored(path, name, (2, 3) if name == down(1) else (5, 9))
    at = bytes(data).rindex(bits)
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="the stored scalar differs from its record"):
        swsurgery.export(patched, tmp_path / "o", format="outliers")


def test_codes_of_a_quantiser_are_refused(tmp_path):
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    tensors = {down(2): tensor("F8_E4M3", 6, 10), down(2) + "_scale_inv": tensor("F32", 1, 1)}
    base = write_single(tmp_path / "base", tensors, config)
    edit = {"op": "protect", "tensor": down(2), "index": [0, 0]}
    with pytest.raises(PlanError, match="not a weight|quantised"):
        swsurgery.export(
            {"version": 1, "base": {"path": str(base)}, "edits": [edit]}, tmp_path / "o", format="outliers"
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("patched --format sparse --model llama-7b", "--model is only for --format outliers"),
        ("m.json --format outliers --model llama-7b", "--model is only for a checkpoint"),
        ("patched --format outliers --base base", "--base is only for a manifest"),
    ],
)
def test_options_that_do_not_fit_are_one_line(patched, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *words.split(), "-o", "new"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"swsurgery: {said}") and error.count("\n") == 1 and not Path("new").exists()
