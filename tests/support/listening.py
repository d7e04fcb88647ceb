"""A reporter that hands each note to a function."""

from __future__ import annotations

from collections.abc import Callable

from swsurgery.progress import Silent


class Listener(Silent):
    def __init__(self, say: Callable[[str], object]):
        self._say = say

    def say(self, line: str) -> None:
        self._say(line)
