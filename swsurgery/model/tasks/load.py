"""Load tasks with lm-eval, and let it make their requests. Nothing here loads torch.

The settings are those of `lm-eval run` without options: the number of examples in the prompt comes from the task, and
the seeds are lm-eval's defaults, so the prompts are equal too.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import logging
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swsurgery.errors import SwsurgeryError, Unrunnable
from swsurgery.model.tasks.options import TaskOptions
from swsurgery.progress import Progress
from swsurgery.storage.numeric import load_numpy

PYTHON_SEED, NUMPY_SEED, EXAMPLE_SEED = 0, 1234, 1234
"""The default seeds of lm-eval: of Python's random, of numpy, and of the examples in prompts."""

SCORED = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
"""The output types of tasks that score given texts. Other tasks generate text."""


TASK_ERRORS = (Exception, SystemExit)
"""Exceptions that the code of a task may raise. A task that calls sys.exit must not end the command with exit 0."""


@dataclass(frozen=True)
class LoadedTasks:
    """The tasks and groups as lm-eval loads them, and the requests of all tasks.

    `tasks` and `groups` map names to objects of lm-eval. Building the requests again does nothing, so all variants of a
    model get the same ones. `version` is that of lm-eval.
    """

    options: TaskOptions
    tasks: dict[str, Any]
    groups: dict[str, Any]
    group_map: dict[str, list[str]]
    version: str

    @property
    def instances(self) -> list[Any]:
        """The requests of all tasks, in order. An instance of lm-eval is one request."""
        return [instance for task in self.tasks.values() for instance in task.instances]


def load_tasks(options: TaskOptions, progress: Progress) -> LoadedTasks:
    """Load the tasks, with their data, and make their requests. Data that are not in the cache are downloaded.

    Raises Unrunnable if lm-eval is not installed. Raises SwsurgeryError, naming the task, if there is no such task, if
    its data cannot be loaded, or if it generates text.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise Unrunnable("lm-eval is not installed", "tasks need it", "pip install 'swsurgery[tasks]'")
    progress.start(0, "", "loading the tasks")
    with hide_libraries(), _set_seeds():
        try:
            from lm_eval import __version__
            from lm_eval.tasks import TaskManager  # noqa: F401 (a broken installation is reported here)
        except (ImportError, OSError) as error:
            what = f"lm-eval cannot be imported: {type(error).__name__}"
            raise Unrunnable(what, error, "install it again") from error
        found = _load_all(options)
        for name, task in found["tasks"].items():
            _refuse_generation(name, task)
        for name, task in found["tasks"].items():
            _build_requests(name, task, options.limit)
    return LoadedTasks(options, found["tasks"], found["groups"], found["group_map"], str(__version__))


@contextlib.contextmanager
def hide_libraries() -> Iterator[None]:
    """Hide what lm-eval and datasets print, log and warn of for the length of a `with` block."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _set_seeds() -> Iterator[None]:
    """Set the seeds that lm-eval sets, for the length of a `with` block."""
    load_numpy()
    import numpy

    before, arrays_before = random.getstate(), numpy.random.get_state()
    random.seed(PYTHON_SEED)
    numpy.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(before)
        numpy.random.set_state(arrays_before)


def _load_all(options: TaskOptions) -> dict[str, dict[str, Any]]:
    """Load each named task, group or tag. Raises SwsurgeryError if two of them contain the same task."""
    found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    try:
        finder = _TaskFinder(options.directory)
    except Exception as error:
        what = f"lm-eval cannot list the tasks of a directory: {describe_error(error)}"
        raise SwsurgeryError(what, options.directory or "", "correct its files") from error
    for name in options.names:
        try:
            part = finder.load(name)
        except SwsurgeryError:
            raise
        except TASK_ERRORS as error:
            raise _make_error(name, error) from error
        if not part["tasks"]:
            raise SwsurgeryError("the group contains no task", name, "name a task")
        if shared := sorted(part["tasks"].keys() & found["tasks"].keys()):
            raise SwsurgeryError(f"{name} contains a task that was named before", shared[0], "name it once")
        for key, values in found.items():
            values.update(part.get(key) or {})
    return found


class _TaskFinder:
    """Loads tasks by name: those of the user's directory, and else those of lm-eval.

    The index of lm-eval's own tasks is made on first use. That takes seconds, because it reads 14,000 files.
    """

    def __init__(self, directory: Path | None):
        from lm_eval.tasks import TaskManager

        self._directory = directory
        self._where = None if directory is None else str(directory)
        self._own: Any = self._where and TaskManager(include_path=self._where, include_defaults=False)
        self._all: Any = None

    def load(self, name: str) -> dict[str, Any]:
        """Load a task, group or tag. Raises SwsurgeryError if there is none of this name, and any error of lm-eval."""
        if self._own and name in self._own.all_tasks:
            with contextlib.suppress(KeyError):  # a group of the directory may contain tasks of lm-eval
                return dict(self._own.load([name]))
        if self._all is None:
            from lm_eval.tasks import TaskManager

            self._all = TaskManager(include_path=self._where)
        if name not in self._all.all_tasks:
            raise self._make_unknown_error(name)
        return dict(self._all.load([name]))

    def _make_unknown_error(self, name: str) -> SwsurgeryError:
        if self._directory and (file := self._directory / f"{name}.yaml").is_file():
            what = f"lm-eval finds no task {name} in a file of that name"
            return SwsurgeryError(what, file, "correct its YAML, and its field task")
        near = difflib.get_close_matches(name, self._all.all_tasks, 1)
        where = f" or in {self._directory}" if self._directory else ""
        remedy = f"did you mean {near[0]}?" if near else "give the directory of its file with --tasks-dir"
        return SwsurgeryError(f"no such task in lm-eval{where}", name, remedy)


def describe_error(error: BaseException) -> str:
    """Return the first line of the message of `error`; the name of its type if the message is empty."""
    if isinstance(error, SystemExit):
        return f"its code calls exit({error.code})"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() not in ("", "None")]
    return lines[0][:160] if lines else type(error).__name__


def _make_error(name: str, error: BaseException) -> SwsurgeryError:
    what = f"the task cannot be loaded: {describe_error(error)}"
    if isinstance(error, OSError):  # also the errors of datasets without a network
        remedy = "its data must be in the cache of datasets, or the network must be reachable"
    else:
        remedy = "correct the task's file"
    return SwsurgeryError(what, name, remedy)


def _refuse_generation(name: str, task: Any) -> None:
    """Raise SwsurgeryError if a task generates text: that needs one reading of the weights for each token."""
    if task.OUTPUT_TYPE not in SCORED:
        raise SwsurgeryError("the task generates text", name, "name a task that scores given answers")


def _build_requests(name: str, task: Any, limit: int | None) -> None:
    """Make the requests of a task, and keep them: lm-eval would make others each time.

    Raises SwsurgeryError, naming the task, if that fails, or if a request generates text.
    """
    try:
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=EXAMPLE_SEED)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    except TASK_ERRORS as error:
        raise SwsurgeryError(
            f"the requests of the task cannot be made: {describe_error(error)}", name, "correct the task's file"
        ) from error
    if any(instance.request_type not in SCORED for instance in task.instances):
        raise SwsurgeryError("the task generates text", name, "name a task that scores given answers")
    task.build_all_requests = _keep_requests


def _keep_requests(**options: object) -> None:
    """Do nothing: the requests of this task exist already."""
