"""Task files for lm-eval, written for the tests. No test lives here."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

CLOZE = Path(__file__).parents[2] / "benchmarks" / "cloze" / "swsurgery_cloze.jsonl"


def write_task(folder: Path, name: str, items: Sequence[dict[str, Any]], **settings: Any) -> None:
    """Write a task and its items as `name`.yaml and `name`.jsonl."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **settings}))


def write_cloze(folder: Path, count: int | None = None, name: str = "cloze", **settings: Any) -> None:
    """Write the cloze task of this project, or its first `count` items."""
    items = [json.loads(line) for line in CLOZE.read_text().splitlines()][:count]
    choices = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{beginning}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    write_task(folder, name, items, **{**choices, **settings})


def write_rolling(folder: Path, texts: Sequence[str]) -> None:
    """Write a task that asks for the log-likelihood of whole texts."""
    metrics = [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    write_task(
        folder,
        "rolling",
        [{"text": text} for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=metrics,
    )


def write_last_word(folder: Path, last: str = "high", name: str = "last_word") -> None:
    """Write a task that asks for one continuation of each text, one of them without a context."""
    items = [{"text": "", "last": "The river"}, {"text": "The river was", "last": last}]
    metrics = [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ]
    write_task(
        folder,
        name,
        items,
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        target_delimiter=" " if last else "",
        doc_to_target="{{last}}",
        metric_list=metrics,
    )


class _Loader(yaml.SafeLoader):
    """Reads the task files of lm-eval without their functions."""


_Loader.add_constructor("!function", lambda loader, node: None)


def read_shipped_questions() -> list[dict[str, Any]]:
    """Read the 282 questions of MMLU that lm-eval ships as examples, five or four for each of 57 subjects."""
    import lm_eval

    found = []
    for path in sorted((Path(lm_eval.__file__).parent / "tasks/mmlu/flan_cot_fewshot").glob("mmlu_*.yaml")):
        settings = yaml.load(path.read_text(), _Loader)
        for sample in settings.get("fewshot_config", {}).get("samples", []):
            answer = re.search(r"answer is \(([A-E])\)", sample["target"])
            assert answer is not None
            found.append({"question": sample["question"], "answer": "ABCDE".index(answer[1])})
    return found


def write_shipped_questions(folder: Path) -> int:
    """Write a task of the questions that lm-eval ships. Returns their number."""
    items = read_shipped_questions()
    write_task(
        folder,
        "mmlu_shipped",
        items,
        output_type="multiple_choice",
        doc_to_text="{{question}}\nAnswer:",
        doc_to_choice=list("ABCDE"),
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    return len(items)
