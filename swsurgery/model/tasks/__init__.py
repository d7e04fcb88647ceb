"""Run tasks of lm-evaluation-harness on several variants of a model, with one reading of the weights for each batch.

    options.py          which tasks are run
    load.py             tasks and their requests, made by lm-eval
    answering.py        the language model that lm-eval asks; it answers from log-likelihoods that are known already
    continuations.py    log-likelihoods of continuations, for all variants side by side
    measure_tasks.py    the whole: requests, log-likelihoods, scores and tests
    paired.py           tests of one variant against the base on the same items
    report.py           the result

Only this package imports lm_eval. Importing `options`, `load`, `paired` or `report` does not load torch.
"""
