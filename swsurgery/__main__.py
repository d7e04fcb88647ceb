"""Run the command line: `python -m swsurgery` does what `swsurgery` does."""

from swsurgery.cli import entry

entry()
