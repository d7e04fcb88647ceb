"""Define which tasks of lm-evaluation-harness are run, and check the choice before anything is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swsurgery.errors import SwsurgeryError
from swsurgery.storage.arguments import require_integer, require_path, require_strings

TASK_NAME = re.compile(r"[\w.+:-]{1,200}")
"""Matches the names of tasks, groups and tags of lm-eval."""


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks are run.

    `names` contains names of tasks, groups or tags. `directory` has task files of the user, or is None. `limit` is the
    maximum number of items of each task; None means all.
    """

    names: tuple[str, ...]
    directory: Path | None = None
    limit: int | None = None

    @classmethod
    def of(
        cls, tasks: Sequence[str] | None, tasks_dir: str | Path | None = None, limit: int | None = None
    ) -> TaskOptions | None:
        """Convert the arguments of a public function; None if no tasks are given.

        Raises TypeError for a wrong type. Raises SwsurgeryError for a bad or repeated name, a limit below 1, a
        directory that does not exist, and for a directory or a limit without tasks.
        """
        require_strings("tasks", tasks)
        if tasks is None:
            for name, value in (("tasks_dir", tasks_dir), ("limit", limit)):
                if value is not None:
                    raise SwsurgeryError(f"{name} has no effect without tasks", value, "name the tasks")
            return None
        _refuse_bad_names(tasks)
        directory = None if tasks_dir is None else require_path("tasks_dir", tasks_dir)
        if directory is not None and not directory.is_dir():
            raise SwsurgeryError("no such directory of tasks", directory)
        count = None if limit is None else require_integer("limit", limit)
        if count is not None and count < 1:
            raise SwsurgeryError("the limit on the items of a task must be at least 1", count)
        return cls(tuple(tasks), directory, count)


def _refuse_bad_names(tasks: Sequence[str]) -> None:
    """Raise SwsurgeryError if there is no name, if one cannot be the name of a task, or if one is repeated."""
    if not tasks:
        raise SwsurgeryError("no tasks are given", "[]", "name at least one")
    for name in tasks:
        if not TASK_NAME.fullmatch(name):
            raise SwsurgeryError("not the name of a task", repr(name[:40]), "write names like arc_easy,hellaswag")
    name, count = Counter(tasks).most_common(1)[0]
    if count > 1:
        raise SwsurgeryError("the task is named twice", name, "name it once")
