"""Controls of an edit: check, apply and compare, against perplexities that transformers and plain hooks give."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_checkpoint import TEXT, VOCABULARY, make_tokenizer  # noqa: E402

import swsurgery  # noqa: E402
from swsurgery.cli import main  # noqa: E402
from swsurgery.errors import ModelError, PlanError  # noqa: E402
from swsurgery.model import controls  # noqa: E402
from swsurgery.model.controls import Control, ControlResult, compute_paper_count, parse_controls  # noqa: E402
from swsurgery.model.intervals import Interval, compute_mean_interval  # noqa: E402
from swsurgery.sharing.card_check import render_check  # noqa: E402

WINDOW, COUNT = 12, 5
DOWN = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)]
EDITED = {(DOWN[0], (3, 7)): 6.0, (DOWN[2], (5, 2)): 0.0}
"""The edited scalars and their new values."""
PROTECTED = (DOWN[1], (1, 1))
BOTH = ["mean", f"outliers:{COUNT}"]
OPTIONS = ["--text", "text.txt", "--window", str(WINDOW), "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with grouped queries, whose large scalars are known, a manifest and the patched checkpoint."""
    folder = tmp_path_factory.mktemp("room")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    base = folder / "base"
    model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    tensors[DOWN[0]][3, 7], tensors[DOWN[1]][1, 1], tensors[DOWN[2]][5, 2] = 3.0, -4.0, 5.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (folder / "text.txt").write_text(TEXT)
    edits: list[object] = [
        {"op": "set", "tensor": tensor, "index": list(index), "value": value}
        for (tensor, index), value in EDITED.items()
    ]
    edits.append({"op": "protect", "tensor": PROTECTED[0], "index": list(PROTECTED[1])})
    write(folder / "m.json", edits)
    write(folder / "row.json", [{"op": "zero", "layer": 0, "row": 3}])
    write(folder / "nothing.json", edits[-1:])
    swsurgery.apply(folder / "m.json", output=folder / "out", check="off")
    return folder


@pytest.fixture(autouse=True)
def inside(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(room)


def write(path: Path, edits: Sequence[object]) -> Path:
    path.write_text(json.dumps({"version": 1, "base": {"path": "base"}, "edits": edits}))
    return path


# An independent computation ------------------------------------------------------------------------------------------


def cut() -> list[list[int]]:
    ids = transformers.AutoTokenizer.from_pretrained("base")(TEXT, add_special_tokens=False)["input_ids"]
    return [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)][:16]


def measure(change: Callable[[transformers.PreTrainedModel], object] = lambda model: None) -> list[float]:
    """Return the mean loss of each window in the base after `change`."""
    model = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32).eval()
    change(model)
    losses = []
    with torch.no_grad():
        for ids in cut():
            logs = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            losses.append(-float(logs.gather(1, torch.tensor(ids[1:])[:, None]).mean()))
    return losses


def set_scalars(values: dict[tuple[str, tuple[int, ...]], float]) -> Callable[[transformers.PreTrainedModel], object]:
    def change(model: transformers.PreTrainedModel) -> None:
        for (tensor, index), value in values.items():
            model.get_parameter(tensor).data[index] = value

    return change


def hold_means(model: transformers.PreTrainedModel) -> None:
    """Replace the products of the edited scalars by their means, with hooks that keep the inputs of the whole text."""
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name, _ in EDITED}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append(args[0][0].clone()))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for ids in cut():
            model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    for (name, (row, col)), module in zip(EDITED, modules.values(), strict=True):
        products = torch.stack(inputs[name])[:, :, col] * model.get_parameter(name).data[row, col]
        constant = torch.full((WINDOW,), float(products[:, 1:].mean()))
        constant[0] = products[:, 0].mean()
        module.weight.data[row, col] = 0

        def add(module, args, output, row=row, constant=constant):
            output = output.clone()
            output[0, :, row] += constant
            return output

        module.register_forward_hook(add)


def list_outliers(count: int) -> list[tuple[str, tuple[int, ...]]]:
    """Sort every scalar of the down projections that is neither edited nor protected."""
    tensors = load_file("base/model.safetensors")
    found = [
        (abs(float(tensors[name][row, col])), (name, (row, col)))
        for name in DOWN
        for row in range(16)
        for col in range(24)
        if (name, (row, col)) not in (*EDITED, PROTECTED)
    ]
    return [place for _, place in sorted(found, key=lambda pair: -pair[0])[:count]]


def compute_ratio(mine: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the ratio of two perplexities and the ends of its interval."""
    rises = [one - other for one, other in zip(mine, base, strict=True)]
    return [math.exp(end) for end in compute_mean_interval(rises, [1] * len(rises))]


@pytest.fixture(scope="module")
def expected(room: Path) -> dict[str, list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        zeros = dict.fromkeys(list_outliers(COUNT), 0.0)
        return {
            "base": measure(),
            "patched": measure(set_scalars(EDITED)),
            "mean": measure(hold_means),
            "outliers": measure(set_scalars(zeros)),
        }


# What is reported ----------------------------------------------------------------------------------------------------


def assert_expected(found: Sequence[ControlResult], expected: dict[str, list[float]]) -> None:
    assert [one.control for one in found] == ["mean", "outliers"]
    for one in found:
        losses = expected[one.control]
        assert one.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
        assert list(one.ratio) == pytest.approx(compute_ratio(losses, expected["base"]), rel=1e-3)
        assert list(one.edit) == pytest.approx(compute_ratio(expected["patched"], losses), rel=1e-3)
        assert one.finite and one.kl > 0
    mean, outliers = found
    assert (mean.scalars, mean.smallest, len(mean.held)) == (2, None, 2)
    assert (outliers.scalars, outliers.held) == (COUNT, ())
    tensor, index = list_outliers(COUNT)[-1]
    assert outliers.smallest == pytest.approx(abs(float(load_file("base/model.safetensors")[tensor][index])))
    assert len({round(losses[0], 6) for losses in expected.values()}) == 4  # all four models differ


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_check_reports_what_transformers_gives(expected, placement) -> None:
    options = {"text": TEXT, "window": WINDOW, "device": "cpu", "placement": placement}
    found = swsurgery.check("out", controls=BOTH, **options)
    assert_expected(found.controls, expected)
    assert found.method == ("streamed" if placement == "streamed" else "layer by layer")
    twin = swsurgery.check("out", **options)
    assert twin.controls == () and "controls" not in twin.to_json()
    document = found.to_json()
    assert [one.pop("control") for one in document.pop("controls")] == ["mean", "outliers"]
    assert document == twin.to_json()


def test_apply_records_the_controls(tmp_path, capsys, expected) -> None:
    output = str(tmp_path / "out")
    words = [word for control in BOTH for word in ("--control", control)]
    assert main(["apply", "m.json", "-o", output, *OPTIONS, *words, "--page", str(tmp_path / "p.html"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["check"]["controls"]
    assert json.loads(Path(output, "swsurgery.json").read_text())["check"]["controls"] == made
    assert made == swsurgery.check(output, text=TEXT, window=WINDOW, device="cpu", controls=BOTH).to_json()["controls"]
    assert made[0]["ratio"] == pytest.approx(compute_ratio(expected["mean"], expected["base"])[0], rel=1e-3)
    assert made[1]["meaning"] in (tmp_path / "p.html").read_text()
    [card] = render_check({"kind": "forward", "controls": made}, has_figure=False)
    assert f"| other outliers zeroed | {COUNT} | {made[1]['perplexity']} | {made[1]['ratio']} | " in card
    assert "control" not in render_check({"kind": "forward", "controls": "mean"}, has_figure=False)[0]
    assert main(["verify", output, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["lookup", output]) == 0
    text = capsys.readouterr().out
    assert "control   the products of 2 edited scalars held at their means: perplexity ratio" in text
    assert "control   5 other outliers (magnitude " in text and "the edit divided by this control: " in text
    here = shutil.copytree("base", tmp_path / "here")
    pinned = json.loads(Path("m.json").read_text())
    digest = hashlib.sha256((here / "model.safetensors").read_bytes()).hexdigest()
    pinned["base"] = {"path": str(here), "sha256": {"model.safetensors": digest}}
    (tmp_path / "pinned.json").write_text(json.dumps(pinned))
    assert main(["apply", str(tmp_path / "pinned.json"), "--in-place", *OPTIONS, *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"]["controls"] == made


def test_compare_has_a_row_for_each_control(tmp_path, capsys, expected) -> None:
    words = [word for control in BOTH for word in ("--control", control)]
    assert main(["compare", "m.json", *OPTIONS, *words, "--page", str(tmp_path / "p.html"), "--json"]) == 0
    base, edit, *rows = json.loads(capsys.readouterr().out)["models"]
    assert "control" not in base and "control" not in edit
    assert [row["control"] for row in rows] == ["mean", "5 other outliers zeroed"]
    assert [row["changed_scalars"] for row in rows] == [2, COUNT]
    for row, name in zip(rows, ("mean", "outliers"), strict=True):
        ratio = compute_ratio(expected[name], expected["base"])
        assert [row["ratio"], row["ratio_low"], row["ratio_high"]] == pytest.approx(ratio, rel=1e-3)
        assert row["norm"] is row["relative_norm"] is row["changed_bytes"] is None
        assert row["meaning"] in (tmp_path / "p.html").read_text()
    assert main(["compare", "m.json", *OPTIONS, *words, "--csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["control"] for row in table] == ["", "", *(row["control"] for row in rows)]
    assert main(["compare", "m.json", *OPTIONS, *words]) == 0
    text = capsys.readouterr().out
    assert all(f"control   m.json, {row['control']}: {row['meaning']}" in text for row in rows)


def test_a_hostile_report_breaks_no_line(room, tmp_path, capsys) -> None:
    """The report in a record is not validated when it is read."""
    shutil.copytree(room / "out", tmp_path / "out")
    found = swsurgery.check("out", controls=BOTH, text=TEXT, window=WINDOW, device="cpu").to_record()
    record = json.loads((tmp_path / "out" / "swsurgery.json").read_text())
    for hostile in ({"meaning": "a\nb\x1b[31m"}, {"ratio": "x"}, {"scalars": "1\n"}, {"control": ["mean"]}, "mean"):
        controls = [one | hostile if isinstance(hostile, dict) else hostile for one in found["controls"]]
        record["check"] = found | {"kind": "forward", "reason": None, "controls": controls}
        (tmp_path / "out" / "swsurgery.json").write_text(json.dumps(record))
        assert main(["lookup", str(tmp_path / "out")]) == 0
        text = capsys.readouterr().out
        assert "\x1b" not in text and "\nb" not in text


@pytest.mark.parametrize("control", ["outliers:3", "mean"])
def test_a_line_says_that_no_known_super_weights_are_left_out(tmp_path, capsys, control) -> None:
    manifest = json.loads(Path("m.json").read_text())
    manifest["edits"].pop()  # protects a scalar
    (tmp_path / "m.json").write_text(json.dumps(manifest | {"base": {"path": str(Path("base").resolve())}}))
    words = ["--text", "text.txt", "--windows", "1", "--window", "12", "--device", "cpu", "--control", control]
    for path, said in ((tmp_path / "m.json", control != "mean"), (Path("m.json"), False)):
        assert main(["compare", str(path), *words]) == 0
        assert ("super weights may be among the outliers" in capsys.readouterr().err) == said


# Meanings ------------------------------------------------------------------------------------------------------------


def make_result(control: str, ratio: tuple[float | None, ...], edit: tuple[float | None, ...]) -> ControlResult:
    return ControlResult(control, 3, 10.0, Interval(1.0, *ratio), Interval(1.0, *edit), 0.0, True)


@pytest.mark.parametrize(
    ("control", "ends", "meaning"),
    [
        ("mean", (0.99, 1.05), "harmless: "),
        ("mean", (1.051, 1.2), "harmful: "),
        ("mean", (math.inf, math.inf), "harmful: "),
        ("mean", (1.0, 1.2), "undecided: the interval"),
        ("mean", (None, None), "undecided: no finite interval"),
        ("mean", (math.nan, math.nan), "undecided: no finite interval"),
        ("outliers", (1.01, 2.0), "the edit raises perplexity more"),
        ("outliers", (0.5, 0.99), "the edit raises perplexity less"),
        ("outliers", (0.9, 1.1), "undecided: the edit and"),
        ("outliers", (None, None), "undecided: no finite interval"),
    ],
)
def test_the_meaning_follows_from_the_interval(control, ends, meaning) -> None:
    other = (0.2, 0.3)
    found = make_result(control, *((ends, other) if control == "mean" else (other, ends)))
    assert found.meaning.startswith(meaning)


def test_the_papers_rate_is_28_scalars_of_smollm2() -> None:
    assert compute_paper_count(30 * 576 * 1536) == 28
    assert compute_paper_count(1) == 1
    assert compute_paper_count(10**18) == controls.MOST_OUTLIERS


# Bad input -----------------------------------------------------------------------------------------------------------


def test_controls_are_read() -> None:
    assert parse_controls(None) == ()
    assert parse_controls(["outliers:7", "mean"]) == (Control("outliers", 7), Control("mean"))
    assert parse_controls(("outliers",)) == (Control("outliers"),)
    with pytest.raises(TypeError, match="controls must be None or a list of strings"):
        swsurgery.CheckOptions(controls="mean")


BAD = [
    (
        ["check", "out", "--control", "median"],
        "no such control: 'median' (use --control mean or --control outliers[:N])",
    ),
    (["check", "out", "--control", "outliers:"], "no such control: 'outliers:'"),
    (["check", "out", "--control", "outliers:-1"], "no such control: 'outliers:-1'"),
    (["check", "out", "--control", "outliers:٣"], "no such control: 'outliers:"),
    (["check", "out", "--control", "outliers:0"], "this number of outliers cannot be zeroed: 0 (give 1 to 1000000)"),
    (["check", "out", "--control", "outliers:1000001"], "this number of outliers cannot be zeroed: 1000001"),
    (["check", "out", "--control", "mean", "--control", "mean"], "this control is given twice: mean"),
    (["check", "out", "--control", "outliers", "--control", "outliers:2"], "this control is given twice: outliers"),
    (["check", "out", "--control", "mean", "--base", "base"], "a control needs the base of the record: --base"),
    (["check", "base", "--control", "mean"], "a control needs the list of the edited scalars, but there is no record"),
    (["check", "out", "--control", "outliers:5000"], "the down projections have "),
    (
        ["apply", "m.json", "-o", "new", "--check", "off", "--control", "mean"],
        "--check off does not run the model, but ",
    ),
    (["apply", "row.json", "-o", "new", "--control", "mean"], "a control needs edits of single scalars, but rows, "),
    (["apply", "nothing.json", "-o", "new", "--control", "outliers"], "a control needs at least one edited scalar"),
    (["apply", "m.json", "-o", "new", "--control", "x"], "no such control: 'x'"),
    (["apply", "m.json", "-o", "new", "--control", "outliers:5000"], "the down projections have "),
    (["compare", "m.json", "row.json", "--control", "mean"], "a control needs edits of single scalars, but rows, "),
    (["compare", "m.json", "--control", "outliers:x"], "no such control: 'outliers:x'"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_line(capsys, words, said) -> None:
    before = sorted(path.name for path in Path().iterdir())
    assert main([*words, "--text", "text.txt", "--window", str(WINDOW), "--quiet"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert sorted(path.name for path in Path().iterdir()) == before


def test_the_library_raises_the_same_errors() -> None:
    with pytest.raises(ModelError, match="no such control"):
        swsurgery.compare(["m.json"], controls=["nothing"])
    with pytest.raises(PlanError, match="there is no record"):
        swsurgery.check("base", controls=["mean"])
