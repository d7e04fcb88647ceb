"""Describe the part `tasks` of the documents of `check` and `compare`."""

from __future__ import annotations

from swsurgery.cli.documents.document import DocumentPart, Number


class TaskScoreItem(DocumentPart):
    """The score of one model, with its standard error, and its comparison with the base on the same items.

    `low` and `high` are the ends of the 95% interval of `difference`. `risen` and `fallen` count the items whose value
    is higher or lower than with the base. `p_value` is that of `test`. Fields are null if there is nothing to compare.
    """

    model: str
    value: Number
    stderr: Number
    difference: Number
    low: Number
    high: Number
    risen: int | None
    fallen: int | None
    test: str | None
    p_value: Number


class TaskMetricItem(DocumentPart):
    """One metric of a task or of a group of tasks, for all models; the first of `scores` is that of the base."""

    task: str
    metric: str
    filter: str
    items: int
    shots: int | None
    higher_is_better: bool | None
    scores: list[TaskScoreItem]


class TaskScores(DocumentPart):
    """The scores of all models on the requests of lm-eval.

    `requests` counts the log-likelihoods that lm-eval asked for, `sequences` the different inputs, and `readings` how
    often the weights were read for all models together. `not_finite` names models with a log-likelihood that is not
    finite. `lm_eval` is the version of lm-eval.
    """

    results: list[TaskMetricItem]
    requests: int
    sequences: int
    readings: int
    limit: int | None
    lm_eval: str
    not_finite: list[str]
