"""Report the scores of tasks for each model, with standard errors and paired tests against the base."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from swsurgery.storage.numbers import round_number
from swsurgery.storage.result import TableResult


@dataclass(frozen=True)
class TaskScore:
    """The score of one model on one metric of a task, and its comparison with the base.

    `model` is the name of the model in the report. `value` and `stderr` are what lm-eval reports; `stderr` is None if
    it reports none. `difference` is the value minus that of the base, with the 95% interval from `low` to `high`.
    `risen` and `fallen` are the numbers of items whose value is higher or lower than with the base, and `p_value` is
    that of `test` ("McNemar" or "sign"). These fields are None for the base, and if there is no test.
    """

    model: str
    value: float
    stderr: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    risen: int | None = None
    fallen: int | None = None
    test: str | None = None
    p_value: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as strict JSON types, with 6 significant digits; NaN and infinities become None."""
        return {
            key: (round_number(value) if math.isfinite(value) else None) if isinstance(value, float) else value
            for key, value in vars(self).items()
        }


@dataclass(frozen=True)
class TaskMetric:
    """One metric of a task or of a group of tasks, for all models; the first of `scores` is that of the base.

    `filter` is lm-eval's name for how answers were processed, usually "none". `shots` is the number of examples in the
    prompt, or None for a group whose tasks differ. `higher_is_better` is None if lm-eval does not say.
    """

    task: str
    metric: str
    filter: str
    items: int
    shots: int | None
    higher_is_better: bool | None
    scores: tuple[TaskScore, ...]

    @property
    def name(self) -> str:
        """The metric, with the filter if there is one."""
        return self.metric if self.filter == "none" else f"{self.metric},{self.filter}"


@dataclass(frozen=True, repr=False)
class TaskReport(TableResult):
    """The scores of several models on the same requests of lm-eval.

    `requests` is the number of log-likelihoods that lm-eval asked for, and `sequences` the number of different inputs
    that the models were run on. The weights were read `readings` times for all models together. `not_finite` names the
    models of which some log-likelihood is not finite. `limit` is the maximum number of items of each task, or None.
    """

    metrics: tuple[TaskMetric, ...]
    requests: int
    sequences: int
    readings: int
    limit: int | None
    lm_eval: str
    not_finite: tuple[str, ...] = ()

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per metric and model."""
        return [
            {"task": metric.task, "metric": metric.name, "items": metric.items, **score.to_json()}
            for metric in self.metrics
            for score in metric.scores
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the part `tasks` of the documents of `check` and `compare`."""
        names = ("requests", "sequences", "readings", "limit", "lm_eval")
        results = [
            {key: value for key, value in vars(metric).items() if key != "scores"}
            | {"scores": [score.to_json() for score in metric.scores]}
            for metric in self.metrics
        ]
        return {name: getattr(self, name) for name in names} | {
            "not_finite": list(self.not_finite),
            "results": results,
        }

    def to_columns(self, model: int) -> dict[str, object]:
        """Return the scores of model number `model` as columns, such as "arc_easy acc" and "arc_easy acc p"."""
        columns: dict[str, object] = {}
        for metric in self.metrics:
            found, name = metric.scores[model].to_json(), f"{metric.task} {metric.name}"
            columns |= {name: found["value"], f"{name} stderr": found["stderr"], f"{name} p": found["p_value"]}
        return columns
