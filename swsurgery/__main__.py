"""Run the command line: `python -m swsurgery` does the same as `swsurgery`."""

from swsurgery.cli import entry

entry()
