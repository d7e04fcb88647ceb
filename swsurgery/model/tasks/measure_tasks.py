"""Run the requests of tasks on all variants of a model, and let lm-eval compute the scores of each."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swsurgery.errors import SwsurgeryError
from swsurgery.model import load, measure
from swsurgery.model.cutting import UNKNOWN_CONTEXT
from swsurgery.model.forward import LayeredModel
from swsurgery.model.tasks.answering import AnsweringModel, TextEncoder
from swsurgery.model.tasks.continuations import Run, score_continuations
from swsurgery.model.tasks.load import TASK_ERRORS, LoadedTasks, describe_error, hide_libraries
from swsurgery.model.tasks.paired import compare_items, compute_difference_interval
from swsurgery.model.tasks.report import TaskMetric, TaskReport, TaskScore


def measure_tasks(
    loaded: LoadedTasks, directory: Path, model: LayeredModel, names: Sequence[str], run: Run, models: int = 1
) -> TaskReport:
    """Score the variants of `run`, whose names are `names`; the first one is the base.

    `directory` contains the tokenizer. `run` runs all variants on `model`, or on `models` models like it in equal
    shares. All requests of all tasks are run together, in as many readings of the weights as the memory for hidden
    states needs. Raises SwsurgeryError, naming the tasks, if lm-eval cannot compute the scores, and ModelError if a
    request is longer than the model's context.
    """
    context = load.get_context_length(model.model)
    lm = AnsweringModel(
        TextEncoder(directory, load.load_tokenizer), UNKNOWN_CONTEXT if context == sys.maxsize else context
    )
    by_type: dict[str, list[Any]] = {}
    for instance in loaded.instances:
        by_type.setdefault(instance.request_type, []).append(instance)
    for kind, instances in by_type.items():
        getattr(lm, kind)(instances)
    measure.refuse_unknown_tokens(model.model, [each.tokens for each in lm.wanted])
    scored = score_continuations(list(lm.wanted), run)
    lm.answers = scored.answers
    results = [_compute_scores(loaded, lm, number) for number in range(len(names))]
    _refuse_without_metrics(loaded, results[0])
    return TaskReport(
        metrics=tuple(_list_metrics(loaded, results, names)),
        requests=len(loaded.instances),
        sequences=len(scored.inputs),
        readings=len(model.divide(scored.inputs, len(names) // models)),
        limit=loaded.options.limit,
        lm_eval=loaded.version,
        not_finite=tuple(
            name
            for number, name in enumerate(names)
            if not all(math.isfinite(each[number].loglikelihood) for each in scored.answers.values())
        ),
    )


def _compute_scores(loaded: LoadedTasks, lm: AnsweringModel, number: int) -> dict[str, Any]:
    """Let lm-eval compute the metrics of variant `number`."""
    from lm_eval.evaluator import evaluate

    lm.number = number
    for instance in loaded.instances:
        instance.resps, instance.filtered_resps = [], {}
    tasks = {"tasks": loaded.tasks, "groups": loaded.groups, "group_map": loaded.group_map}
    try:
        with hide_libraries():
            results: dict[str, Any] = evaluate(lm, tasks, limit=loaded.options.limit, log_samples=True)
    except SwsurgeryError:
        raise
    except TASK_ERRORS as error:
        raise SwsurgeryError(
            f"lm-eval cannot compute the scores: {describe_error(error)}", ", ".join(loaded.options.names)
        ) from error
    return results


def _refuse_without_metrics(loaded: LoadedTasks, result: dict[str, Any]) -> None:
    """Raise SwsurgeryError if lm-eval reports no metric of a task: nothing would be compared, and nothing printed."""
    for task in loaded.tasks:
        if not any("," in key for key in result["results"].get(task, {})):
            raise SwsurgeryError("lm-eval reports no metric of the task", task, "correct metric_list in its file")


def _list_metrics(loaded: LoadedTasks, results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[TaskMetric]:
    """Return the metrics of each task, and those of each group that has any."""
    found = []
    for task, figures in results[0]["results"].items():
        for key in figures:
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            found.append(_make_metric(loaded, results, names, task, metric, kind))
    return found


def _make_metric(
    loaded: LoadedTasks, results: Sequence[dict[str, Any]], names: Sequence[str], task: str, metric: str, kind: str
) -> TaskMetric:
    """Collect the scores of all models on one metric, and compare each with the base."""
    leaves = [task] if task in loaded.tasks else [leaf.task_name for leaf in loaded.groups[task].get_all_tasks()]
    items = [_list_items(result, leaves, metric, kind) for result in results]
    aggregate = loaded.tasks[task].aggregation().get(metric) if task in loaded.tasks else None
    scores: list[TaskScore] = []
    for number, (name, result) in enumerate(zip(names, results, strict=True)):
        figures = result["results"][task]
        value, error = figures[f"{metric},{kind}"], figures.get(f"{metric}_stderr,{kind}")
        stderr = float(error) if isinstance(error, int | float) else None
        if number == 0:
            scores.append(TaskScore(name, float(value), stderr))
            continue
        difference = float(value) - scores[0].value
        ends = compute_difference_interval(items[0], items[number], difference, aggregate) or (None, None)
        test = compare_items(items[0], items[number])
        scores.append(
            TaskScore(
                name,
                float(value),
                stderr,
                difference,
                *ends,
                *((test.risen, test.fallen, test.test, test.p_value) if test else ()),
            )
        )
    shots = results[0].get("n-shot", {}).get(task)
    better = results[0].get("higher_is_better", {}).get(task, {}).get(metric)
    return TaskMetric(
        task, metric, kind, len(items[0]), shots if isinstance(shots, int) else None, better, tuple(scores)
    )


def _list_items(result: dict[str, Any], tasks: Sequence[str], metric: str, kind: str) -> list[object]:
    """Return the value of each item that has this metric, in the order of the items."""
    return [
        sample[metric]
        for task in tasks
        for sample in result["samples"][task]
        if sample["filter"] == kind and metric in sample
    ]
