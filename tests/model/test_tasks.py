"""Tasks of lm-eval, compared with lm-eval's own class for models of transformers. They need the extra `tasks`."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra tasks is not installed")

import datasets
import task_files
from json_documents import find_fault
from tiny_checkpoint import TEXT, Pair, write_pair

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import SwsurgeryError
from swsurgery.model import readings
from swsurgery.model.tasks import answering, measure_tasks
from swsurgery.model.tasks.report import TaskReport

pytestmark = pytest.mark.filterwarnings("ignore")  # pyarrow, datasets and evaluate warn about each other

SHORT = {"text": TEXT, "windows": 1, "window": 8, "device": "cpu"}


@pytest.fixture(autouse=True)
def own_data_sets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"), [((3, 7), 5.0), ((9, 2), -4.0)], bos=request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("plain"), [((3, 7), 5.0), ((9, 2), -4.0)], bos=False)


def ask_harness(model: Path, tasks: list[str], folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Return what lm-eval itself reports for a model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=1)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit)
    assert found is not None
    return dict(found)


class Recorder:
    """Records the results of lm-eval from which each score of a report is taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results: list[dict[str, Any]] = []
        compute = measure_tasks._compute_scores

        def record(*arguments: Any) -> dict[str, Any]:
            self.results.append(compute(*arguments))
            return json.loads(json.dumps(self.results[-1], default=str))

        monkeypatch.setattr(measure_tasks, "_compute_scores", record)


def assert_equal_to_harness(report: TaskReport, recorded: list[dict[str, Any]], harness: list[dict[str, Any]]) -> None:
    """Compare the answers to every request, and every metric with its standard error, of each model."""
    for number, (ours, theirs) in enumerate(zip(recorded, harness, strict=True)):
        for task, samples in theirs["samples"].items():
            for one, other in zip(ours["samples"][task], samples, strict=True):
                assert one["arguments"] == other["arguments"]
                for (mine,), (its,) in zip(one["resps"], other["resps"], strict=True):
                    mine, its = (x if isinstance(x, tuple) else (x,) for x in (mine, its))
                    assert mine == pytest.approx(its, abs=1e-4)
        for metric in report.metrics:
            figures, score = theirs["results"][metric.task], metric.scores[number]
            stderr = figures[f"{metric.metric}_stderr,{metric.filter}"]
            assert score.value == pytest.approx(figures[f"{metric.metric},{metric.filter}"], rel=1e-5)
            assert score.stderr == (None if isinstance(stderr, str) else pytest.approx(stderr, rel=1e-4))


def test_answers_and_scores_are_those_of_lm_eval(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "own"
    task_files.write_cloze(folder, 12)
    task_files.write_cloze(folder, 9, "with_examples", num_fewshot=2, fewshot_split="test")
    task_files.write_rolling(folder, [TEXT, TEXT[:90], "<s>a second BOS is not added"])
    task_files.write_last_word(folder)
    tasks = ["cloze", "with_examples", "rolling", "last_word"]
    recorder = Recorder(monkeypatch)
    found = swsurgery.check(pair.patched, base=pair.base, tasks=tasks, tasks_dir=folder, **SHORT).tasks
    assert found is not None and found.readings == 1 and found.not_finite == ()
    assert [metric.task for metric in found.metrics[::2]][:2] == ["cloze", "with_examples"]
    harness = [ask_harness(model, tasks, folder) for model in (pair.base, pair.patched)]
    assert_equal_to_harness(found, recorder.results, harness)
    assert any(score.difference for metric in found.metrics for score in metric.scores[1:]), "the edit has an effect"


def test_protocol_lm_eval_is_the_rolling_log_likelihood_without_added_tokens(pair: Pair) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(pair.base), dtype="float32", device="cpu", batch_size=1, add_bos_token=False)
    for text in (TEXT, "a boat"):
        [wanted] = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
        report = swsurgery.check(pair.base, text=text, protocol="lm-eval", prompts=["a"], device="cpu")
        assert -math.log(report.patched.perplexity) * report.scored_tokens == pytest.approx(wanted, rel=1e-5)


def test_the_questions_that_lm_eval_ships(plain: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_files.write_shipped_questions(tmp_path) == 282
    recorder = Recorder(monkeypatch)
    found = swsurgery.check(
        plain.patched, base=plain.base, tasks=["mmlu_shipped"], tasks_dir=tmp_path, limit=40, **SHORT
    ).tasks
    assert found is not None and (found.limit, found.metrics[0].items, found.requests) == (40, 40, 200)
    assert found.sequences < found.requests, "the letters of one question share an input"
    harness = [ask_harness(model, ["mmlu_shipped"], tmp_path, 40) for model in (plain.base, plain.patched)]
    assert_equal_to_harness(found, recorder.results, harness)


def test_batches_and_streaming_change_no_score(plain: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task_files.write_cloze(tmp_path, 20)
    task_files.write_rolling(tmp_path, [TEXT])
    options: dict[str, Any] = {"base": plain.base, "tasks": ["cloze", "rolling"], "tasks_dir": tmp_path, **SHORT}
    whole = swsurgery.check(plain.patched, **options).tasks
    monkeypatch.setattr(readings, "STATES", 60 * 64 * 4 * 2)
    monkeypatch.setattr(answering, "TEXTS_PER_TOKENIZER", 7)  # several processes, one after another
    streamed = swsurgery.check(plain.patched, placement="streamed", **options).tasks
    assert whole is not None and streamed is not None
    assert whole.readings == 1 < streamed.readings
    for one, other in zip(whole.metrics, streamed.metrics, strict=True):
        assert [s.value for s in one.scores] == pytest.approx([s.value for s in other.scores], rel=1e-5)


def test_a_model_equal_to_its_base_differs_in_no_item(plain: Pair, tmp_path: Path) -> None:
    task_files.write_cloze(tmp_path, 8)
    found = swsurgery.check(plain.base, base=plain.base, tasks=["cloze"], tasks_dir=tmp_path, **SHORT).tasks
    assert found is not None
    assert all(len(metric.scores) == 1 for metric in found.metrics), "nothing to compare with"


def test_groups_and_rounded_activations(plain: Pair, tmp_path: Path) -> None:
    task_files.write_cloze(tmp_path, 10, "one")
    task_files.write_cloze(tmp_path, 14, "two")
    group = {
        "group": "both",
        "task": ["one", "two"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    found = swsurgery.check(
        plain.patched, base=plain.base, tasks=["both"], tasks_dir=tmp_path, activation_bits=4, **SHORT
    ).tasks
    assert found is not None
    whole = next(metric for metric in found.metrics if (metric.task, metric.metric) == ("both", "acc"))
    parts = [metric for metric in found.metrics if metric.task in ("one", "two") and metric.metric == "acc"]
    assert [score.model for score in whole.scores[:3]] == ["base", "patched", "base, 4 bits per tensor"]
    assert whole.items == 24 == sum(part.items for part in parts)
    for number, score in enumerate(whole.scores):
        assert score.value == pytest.approx(sum(p.scores[number].value * p.items for p in parts) / 24)
        if number:
            assert score.risen == sum(part.scores[number].risen or 0 for part in parts)


def make_manifest(pair: Pair, folder: Path) -> list[str]:
    names = []
    for number in range(3):
        edit = f"{{op: zero, tensor: {pair.changes[0].coordinate.tensor}, index: [{number}, 1]}}"
        path = folder / f"m{number}.yaml"
        path.write_text(f"version: 1\nbase: {{path: {pair.base}}}\nedits: [{edit}]\n")
        names.append(str(path))
    return names


def test_compare_prints_text_json_csv_latex_and_a_page(
    plain: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    task_files.write_cloze(own, 6)
    words = ["compare", *make_manifest(plain, tmp_path), "--tasks", "cloze", "--tasks-dir", str(own), "--quiet"]
    words += ["--windows", "1", "--window", "8", "--device", "cpu"]
    assert main([*words, "--json", "--page", str(tmp_path / "page.html")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert find_fault(document) is None
    scores = document["tasks"]["results"][0]["scores"]
    assert [score["model"] for score in scores] == ["base", *(model["manifest"] for model in document["models"][1:])]
    assert document["tasks"]["readings"] == 1
    assert "McNemar" in (tmp_path / "page.html").read_text()
    assert main([*words, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row["cloze acc"]) for row in rows] == [score["value"] for score in scores]
    assert main([*words, "--latex"]) == 0
    assert "cloze acc stderr" in capsys.readouterr().out
    assert main(words) == 0
    assert "12 requests of lm-eval" in capsys.readouterr().out


def test_check_prints_text_json_csv_latex_and_a_page(
    plain: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    task_files.write_cloze(own, 6)
    words = ["check", str(plain.patched), "--base", str(plain.base), "--tasks", "cloze", "--tasks-dir", str(own)]
    words += ["--windows", "1", "--window", "8", "--device", "cpu", "--quiet"]
    assert main([*words, "--json", "--page", str(tmp_path / "page.html")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert find_fault(document) is None
    assert "McNemar" in (tmp_path / "page.html").read_text()
    assert main([*words, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["model"] for row in rows] == ["base", "patched"] * 2
    assert main([*words, "--latex"]) == 0
    assert "acc" in capsys.readouterr().out
    assert main(words) == 0
    assert "McNemar" in capsys.readouterr().out


GENERATING = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["."]},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("clozes", "no such task in lm-eval or in .*: clozes [(]did you mean cloze[?][)]"),
        ("zzzqqq", "no such task in lm-eval or in .*: zzzqqq [(]give the directory"),
        ("arc_easy", "the task cannot be loaded: .*: arc_easy [(]its data must be in the cache"),
        ("writes", "the task generates text: writes"),
        ("broken", "the task cannot be loaded: 'no_such_field' is undefined: broken [(]correct"),
        ("absent", "the task cannot be loaded: .*: absent"),
        ("unreadable", "lm-eval finds no task unreadable in a file of that name: .*unreadable.yaml"),
        ("no_metrics", "lm-eval reports no metric of the task: no_metrics [(]correct"),
        ("other_metrics", "lm-eval reports no metric of the task: other_metrics [(]correct"),
        ("empty_group", "the group contains no task: empty_group [(]name a task"),
        ("no_end", "an answer of a task has 0 tokens, but the model accepts 1 to 64: ''"),
    ],
)
def test_a_task_that_cannot_be_run_is_one_line_that_names_it(plain: Pair, tmp_path: Path, name: str, said: str) -> None:
    own = tmp_path / "own"
    task_files.write_cloze(own, 4)
    task_files.write_cloze(own, 4, "writes", **GENERATING)
    task_files.write_cloze(own, 4, "broken", doc_to_text="{{no_such_field}}")
    task_files.write_cloze(own, 4, "absent")
    (own / "absent.jsonl").unlink()
    task_files.write_last_word(own, "", "no_end")
    (own / "unreadable.yaml").write_text("task: [unreadable")
    task_files.write_cloze(own, 4, "no_metrics", metric_list=[])
    metric = {"metric": "none", "aggregation": "mean", "higher_is_better": True}
    task_files.write_cloze(own, 4, "other_metrics", metric_list=[metric])
    (own / "empty_group.yaml").write_text("group: empty_group\ntask: []\n")
    with pytest.raises(SwsurgeryError, match=f"^{said}") as caught:
        swsurgery.check(plain.patched, tasks=[name], tasks_dir=own, **SHORT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["doc_to_text", "process_results"])
def test_a_task_that_calls_exit_is_an_error(plain: Pair, tmp_path: Path, field: str) -> None:
    """The exit code 0 would say that the check passed."""
    task_files.write_cloze(tmp_path, 4, **{field: "CODE"})
    file = tmp_path / "cloze.yaml"
    file.write_text(file.read_text().replace("CODE", "!function ends.end"))
    (tmp_path / "ends.py").write_text("import sys\n\ndef end(*arguments):\n    sys.exit(0)\n")
    with pytest.raises(SwsurgeryError, match=r"its code calls exit\(0\): cloze"):
        swsurgery.check(plain.patched, tasks=["cloze"], tasks_dir=tmp_path, **SHORT)


def test_a_folder_that_lm_eval_cannot_list_is_one_line(plain: Pair, tmp_path: Path) -> None:
    task_files.write_cloze(tmp_path, 4)
    (tmp_path / "number.yaml").write_text("task: 5\n")
    with pytest.raises(SwsurgeryError, match=r"^lm-eval cannot list the tasks of a directory: "):
        swsurgery.check(plain.patched, tasks=["cloze"], tasks_dir=tmp_path, **SHORT)


def test_one_task_under_two_names_is_refused(plain: Pair, tmp_path: Path) -> None:
    task_files.write_cloze(tmp_path, 4)
    (tmp_path / "group.yaml").write_text(json.dumps({"group": "whole", "task": ["cloze"]}))
    with pytest.raises(SwsurgeryError, match="whole contains a task that was named before: cloze"):
        swsurgery.check(plain.patched, tasks=["cloze", "whole"], tasks_dir=tmp_path, **SHORT)


@pytest.mark.model
def test_the_super_weight_of_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of docs/tasks.md."""
    base = Path(os.environ["SWSURGERY_TEST_MODEL"])
    task_files.write_cloze(tmp_path)
    manifest = tmp_path / "zero.yaml"
    edit = "{op: zero, layer: 11, row: 507, col: 1229, expect: 5.875}"
    manifest.write_text(f"version: 1\nbase: {{path: {base}}}\nedits: [{edit}]\n")
    recorder = Recorder(monkeypatch)
    found = swsurgery.compare([manifest], tasks=["cloze"], tasks_dir=tmp_path, **SHORT).tasks
    assert found is not None
    accuracy, normalised = ([score.value for score in metric.scores] for metric in found.metrics)
    assert accuracy == [62 / 64, 52 / 64] and normalised == [1, 47 / 64]
    assert_equal_to_harness(found, recorder.results[:1], [ask_harness(base, ["cloze"], tmp_path)])
