"""Several manifests against one base: held against checkpoints that are written, loaded and measured one at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_checkpoint import DOWN, TEXT, write_pair  # noqa: E402

import swsurgery  # noqa: E402
from swsurgery.cli import main  # noqa: E402
from swsurgery.errors import ManifestError, ModelError  # noqa: E402
from swsurgery.scanning.comparison import Comparison  # noqa: E402

WINDOW = 12
MANIFESTS = {
    "scalar": [{"op": "scale", "tensor": DOWN, "index": [3, 7], "factor": 20.0}],
    "row": [{"op": "zero", "layer": 0, "row": 3}, {"op": "scale", "tensor": DOWN, "index": [2, 2], "factor": 3.0}],
    "round": [
        {"op": "round", "tensors": "model.layers.*.mlp.*", "bits": 3, "block": [8, 8]},
        {"op": "protect", "tensor": DOWN, "index": [3, 7]},
    ],
    "nothing": [{"op": "protect", "tensor": DOWN, "index": [3, 7]}],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"), dtype=torch.bfloat16).base


@pytest.fixture(scope="module")
def manifests(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("manifests")
    return [write(folder / f"{name}.yaml", base, edits) for name, edits in MANIFESTS.items()]


def write(path: Path, base: Path, edits: Sequence[object]) -> Path:
    path.write_text(json.dumps({"version": 1, "base": {"path": str(base)}, "edits": edits}))
    return path


def compare(manifests: Sequence[Path], **options: object) -> Comparison:
    return swsurgery.compare(manifests, **({"text": TEXT, "window": WINDOW, "device": "cpu"} | options))


def cut(base: Path) -> list[list[int]]:
    ids = transformers.AutoTokenizer.from_pretrained(base)(TEXT, add_special_tokens=False)["input_ids"]
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)][:16]


def run_alone(folder: Path, windows: list[list[int]], around=None) -> list[torch.Tensor]:
    """Log-probabilities of every scored position, by window."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if around is not None:
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_pre_hook(lambda m, args: (around(args[0]),))
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1) for ids in windows]


def measure(folder: Path, base: Path, around=None) -> tuple[float, float, float]:
    windows = cut(base)
    mine, theirs = run_alone(folder, windows, around), run_alone(base, windows)
    targets = [torch.tensor(ids[1:]) for ids in windows]
    scored = sum(len(t) for t in targets)

    def loss(logs: list[torch.Tensor]) -> float:
        return -float(sum(log.gather(1, t[:, None]).sum() for log, t in zip(logs, targets, strict=True))) / scored

    kl = float(sum((t.exp() * (t - m)).sum() for m, t in zip(mine, theirs, strict=True))) / scored
    return math.exp(loss(mine)), math.exp(loss(mine) - loss(theirs)), kl


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_figures_equal_those_of_checkpoints_that_are_written(
    tmp_path: Path, base: Path, manifests: list[Path], placement: str
) -> None:
    report = compare(manifests, placement=placement)
    tolerance = 1e-3 if placement == "whole" else 0.05  # streamed weights stay in bfloat16
    assert [m.manifest for m in report.models] == [None, *map(str, manifests)]
    old = load_file(base / "model.safetensors")
    for manifest, model in zip(manifests, report.models[1:], strict=True):
        swsurgery.apply(manifest, output=tmp_path / manifest.stem, check="off")
        perplexity, ratio, kl = measure(tmp_path / manifest.stem, base)
        assert model.perplexity == pytest.approx(perplexity, rel=tolerance)
        assert model.ratio == pytest.approx(ratio, rel=tolerance)
        assert model.kl == pytest.approx(kl, rel=tolerance * 2, abs=1e-5)
        assert model.ratio_low <= model.ratio <= model.ratio_high
        assert model.kl_low <= model.kl * (1 + 1e-9) <= model.kl_high * (1 + 1e-9)
        new = load_file(tmp_path / manifest.stem / "model.safetensors")
        differs = {key: new[key].view(torch.int16) != old[key].view(torch.int16) for key in old}
        count = sum(int(d.sum()) for d in differs.values())
        assert (model.changed_scalars, model.changed_bytes) == (count, 2 * count)
        touched = [key for key, d in differs.items() if d.any()]
        squares = sum(float((new[key].double() - old[key].double()).square().sum()) for key in touched)
        total = sum(float(old[key].double().square().sum()) for key in touched)
        assert model.norm == pytest.approx(math.sqrt(squares), rel=1e-9)
        assert model.relative_norm == pytest.approx(math.sqrt(squares / total) if total else 0.0, rel=1e-9)
    assert report.models[0].ratio == 1
    assert report.models[-1].ratio == pytest.approx(1, abs=1e-6)
    assert report.method == ("streamed" if placement == "streamed" else "layer by layer")


def round_plainly(x: torch.Tensor, bits: int, per: str, held: bool) -> torch.Tensor:
    """Element by element, with Python's own rounding to even, in float32 scales."""
    out = x.clone().reshape(-1, x.shape[-1])
    rows = out.tolist()
    flat = [abs(v) for row in rows for v in row]
    most = flat.index(max(flat)) if held else -1
    top = 2 ** (bits - 1) - 1

    def f32(v: float) -> float:
        return struct.unpack("f", struct.pack("f", v))[0]

    def scale_of(values: list[float]) -> float:
        return f32(max(values, default=0.0) / top)

    columns = len(rows[0])
    everything = [abs(v) for r, row in enumerate(rows) for c, v in enumerate(row) if r * columns + c != most]
    for r, row in enumerate(rows):
        mine = [abs(v) for c, v in enumerate(row) if r * columns + c != most]
        scale = scale_of(mine if per == "token" else everything)
        for c, v in enumerate(row):
            if r * columns + c != most and scale:
                out[r, c] = round(f32(v / scale)) * scale
    return out.reshape(x.shape)


@pytest.mark.parametrize("per", ["tensor", "token"])
def test_activations_are_rounded_with_and_without_the_super_activation(
    base: Path, manifests: list[Path], per: str
) -> None:
    report = compare(manifests[:1], windows=2, placement="whole", activation_bits=4, activation_per=per)
    rows = [(m.manifest, m.activations) for m in report.models]
    what = f"4 bits per {per}"
    names = ["as computed", what, f"{what}, super activation held out"]
    assert rows == [(manifest, name) for manifest in (None, str(manifests[0])) for name in names]
    windows = cut(base)[:2]
    targets = [torch.tensor(ids[1:]) for ids in windows]
    for model, held in ((report.models[1], False), (report.models[2], True)):
        logs = run_alone(base, windows, lambda x, held=held: round_plainly(x, 4, per, held))
        loss = -sum(float(log.gather(1, t[:, None]).sum()) for log, t in zip(logs, targets, strict=True))
        assert model.perplexity == pytest.approx(math.exp(loss / sum(map(len, targets))), rel=0.02)
        assert model.ratio != pytest.approx(1, abs=1e-3)
    assert report.models[1].perplexity != report.models[2].perplexity


def test_the_check_reports_rounded_activations(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"text": TEXT, "window": WINDOW, "windows": 2, "device": "cpu"}
    report = swsurgery.check(base, activation_bits=8, activation_per="token", **options)
    assert [(side.side, side.activations) for side in report.rounded] == [
        ("patched", "8 bits per token"),
        ("patched", "8 bits per token, super activation held out"),
    ]
    assert [row["ratio"] for row in report.to_json()["rounded_activations"]] == pytest.approx([1, 1], abs=0.1)
    assert "rounded_activations" not in swsurgery.check(base, **options).to_json()
    with pytest.raises(ModelError, match="cannot be rounded to this number of bits: 1 "):
        swsurgery.check(base, activation_bits=1, **options)


def test_the_command(tmp_path: Path, manifests: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["--text", str(text), "--window", str(WINDOW), "--device", "cpu", "--quiet"]
    figure = tmp_path / "figure.svg"
    assert main(["compare", *map(str, manifests), *words, "--plot", str(figure)]) == 0
    out = capsys.readouterr().out
    assert all(str(manifest) in out for manifest in manifests)
    assert "KL(base || model)" in figure.read_text()
    assert main(["compare", *map(str, manifests), *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["version"], len(document["models"])) == (1, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.svg", "text.txt"]


def test_manifests_of_different_bases(tmp_path: Path, base: Path, manifests: list[Path], capsys) -> None:
    other = write_pair(tmp_path / "pair").base
    stranger = write(tmp_path / "stranger.yaml", other, MANIFESTS["row"])
    capsys.readouterr()  # of transformers, which has written a model
    assert main(["compare", str(manifests[0]), str(stranger)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"its base differs from that of {manifests[0]}: {stranger}" in line
    found = compare([manifests[0], stranger], base=base, windows=1)
    assert len(found.models) == 3
    with pytest.raises(ManifestError, match="nothing to compare"):
        compare([])
    with pytest.raises(TypeError, match="manifests must be a list"):
        swsurgery.compare("edits.yaml")
